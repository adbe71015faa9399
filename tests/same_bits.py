# SPDX-License-Identifier: Apache-2.0
"""Does a seed mean the same bits everywhere? Group ids, files, weights are compared.

    python tests/same_bits.py FOLDER        # a few minutes, 6 GB of downloads

Two virtual environments are made in FOLDER (once): the oldest torch, numpy and
safetensors that pyproject.toml allows, and those that .ci/constraints.txt pins. Each
saves adapters, and each loads what either saved, in processes of 1, 2 and 3 threads,
and on CUDA where there is one. All that the format fixes must agree to the last bit.
Writes results/same_bits.json.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTITIONS = [(1000, 7, 0), (70_000, 137, 5), (14_155_776, 23_040, 2**64 - 1)]
FAR = (2**40, 2**31 - 1, 2**63, 2**39)  # N, d, seed, and where a slice of it starts
CHILD = """
import itertools, json, sys, hashlib, torch, gpart
action, folder, threads, device = sys.argv[1:5]
torch.set_num_threads(int(threads))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

def sha(t):
    raw = t.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()

def model(dtype):  # weights without a random generator: multiples of 1/64
    layers = {"a": torch.nn.Linear(300, 230), "b": torch.nn.Embedding(50, 17)}
    net = torch.nn.ModuleDict(layers)
    for w in net.parameters():
        w.data.copy_((torch.arange(w.numel()) * 37 % 129 - 64).view(w.shape) / 64)
    return net.to(dtype).to(device)

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def path(dtype, isometric):
    return f"{folder}/{str(dtype)[6:]}-{isometric}.safetensors"

out = {}
for dtype, isometric in itertools.product(DTYPES, (True, False)):
    net, name = model(dtype), f"{str(dtype)[6:]}, isometric={isometric}"
    if action == "save":
        targets = ["a", "a.bias", "b"]
        g = gpart.attach(net, 1001, seed=2**40 + 1, target_modules=targets,
                         isometric=isometric)
        with torch.no_grad():
            g.theta.copy_((torch.arange(1001) * 7919 % 1001 - 500) / 3)
        gpart.save(net, path(dtype, isometric))
    else:
        g = gpart.load(net, path(dtype, isometric))
        out[f"scale, {name}"] = sha(g.scale)
        out[f"update, {name}"] = sha(flat(g.delta().values()))
        out[f"weight attached, {name}"] = sha(net["a"].weight)
        gpart.detach(net, merge=True)
        out[f"weights merged, {name}"] = sha(flat(net.parameters()))
if action == "load":
    for N, d, seed in json.loads(sys.argv[5]):
        P = gpart.Partition(N, d, seed)
        out[f"groups, N={N}, d={d}, seed={seed}"] = sha(P.groups(device=device))
    N, d, seed, start = json.loads(sys.argv[6])
    P = gpart.Partition(N, d, seed)
    part = P.groups(start, start + 100_000, device=device)
    out[f"groups {start}.. of N={N}"] = sha(part)
info = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "out": out}
print(json.dumps(info))
"""


def environment(folder: Path, oldest: bool) -> str:
    """The interpreter of the environment in folder, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        names = ("torch", "numpy", "safetensors")
        pins = ROOT / ("pyproject.toml" if oldest else ".ci/constraints.txt")
        text = pins.read_text(encoding="utf-8")
        found = {name: re.search(rf"\b{name}[>=]=([\d.]+)", text) for name in names}
        wanted = [f"{name}=={match[1]}" for name, match in found.items() if match]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "done").touch()
    return str(python)


def run(python: str, *args: str) -> dict[str, object]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    extra = [json.dumps(PARTITIONS), json.dumps(FAR)]
    command = [python, "-W", "ignore", "-c", CHILD, *args, *extra]
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(child.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two environments go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    oldest = environment(folder / "oldest", oldest=True)
    pythons = [oldest, environment(folder / "newest", oldest=False)]
    files, runs, seen = Path(tempfile.mkdtemp()), [], {}
    versions, cuda = [], False
    for k, python in enumerate(pythons):
        (files / str(k)).mkdir()
        info = run(python, "save", str(files / str(k)), "1", "cpu")
        versions.append(info["torch"])
        cuda |= bool(info["cuda"])
    settings = itertools.product(("1", "2", "3"), ("cpu",))
    settings = [*settings, ("1", "cuda")] if cuda else [*settings]
    for python, saver, setting in itertools.product(pythons, (0, 1), settings):
        info = run(python, "load", str(files / str(saver)), *setting)
        saved = versions[saver]
        runs.append({"torch": info["torch"], "saved by": saved, "setting": setting})
        for name, sha in info["out"].items():
            seen.setdefault(name, set()).add(sha)
        differ = [name for name, shas in seen.items() if len(shas) > 1]
        print(runs[-1], "differ:", differ)
    result = {
        "equal": all(len(shas) == 1 for shas in seen.values()),
        "torch": versions,
        "cuda": cuda,
        "device": f"CPU {platform.machine()}",
        "processes": len(runs),
        "checks": len(seen),
        "threads, device": settings,
        "sha256": {name: sorted(shas) for name, shas in seen.items()},
    }
    path = ROOT / "tests" / "results" / "same_bits.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(runs)} processes, {len(seen)} checks, all equal: {result['equal']}")
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
