# SPDX-License-Identifier: Apache-2.0
"""Does a seed mean the same bits everywhere? Group ids, files, weights are compared.

    python tests/same_bits.py FOLDER        # a few minutes, 6 GB of downloads
    python tests/same_bits.py --here FILE   # with the torch that is installed

Two virtual environments are made in FOLDER (once): the oldest torch, numpy and
safetensors that pyproject.toml allows, and those that .ci/constraints.txt pins. Each
saves adapters, and each loads what either saved, in processes of 1, 2 and 3 threads,
and on CUDA where there is one. All that the format fixes must agree to the last bit.
Writes results/same_bits.json. --here needs no network: it tries one Python against the
checksums in that file, and writes FILE.
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
cuda = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
versions = {"torch": torch.__version__, "gpart": gpart.__version__}
print(json.dumps({**versions, "cuda": cuda, "out": out}))
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
    parser.add_argument(
        "folder", nargs="?", type=Path, help="where the two environments go"
    )
    here = "this Python against the checksums that are known, and where to write it"
    parser.add_argument("--here", type=Path, metavar="FILE", help=here)
    args = parser.parse_args()
    if (args.folder is None) == (args.here is None):
        parser.error("give a FOLDER, or --here FILE")
    path, seen = ROOT / "tests" / "results" / "same_bits.json", {}
    if args.here:
        known = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        seen = {name: {*shas} for name, shas in known.items()}
        path, pythons = args.here, [sys.executable]
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        oldest = environment(args.folder / "oldest", oldest=True)
        pythons = [oldest, environment(args.folder / "newest", oldest=False)]
    versions, runs, devices = [], [], ["CPU " + platform.machine()]
    threads: list[tuple[str, str]] = [("1", "cpu"), ("2", "cpu"), ("3", "cpu")]
    with tempfile.TemporaryDirectory() as files:
        for k, python in enumerate(pythons):
            (Path(files) / str(k)).mkdir()
            info = run(python, "save", f"{files}/{k}", "1", "cpu")
            versions.append(info["torch"])
            devices += [name for name in info["cuda"] if name not in devices]
        settings = [*threads, *[("1", "cuda")] * (len(devices) > 1)]
        pairs = itertools.product(pythons, range(len(pythons)), settings)
        for python, saver, setting in pairs:
            info = run(python, "load", f"{files}/{saver}", *setting)
            saved = versions[saver]
            runs.append({"torch": info["torch"], "saved by": saved, "setting": setting})
            for name, sha in info["out"].items():
                seen.setdefault(name, set()).add(sha)
            differ = [name for name, shas in seen.items() if len(shas) > 1]
            print(runs[-1], "differ:", differ, flush=True)
    result = {
        "equal": all(len(shas) == 1 for shas in seen.values()),
        "gpart": info["gpart"],
        "torch": versions,
        "device": ", ".join(devices),
        "processes": len(runs),
        "checks": len(info["out"]),
        "threads, device": settings,
        "sha256": {name: sorted(shas) for name, shas in seen.items()},
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{len(runs)} processes, {len(seen)} checks, all equal: {result['equal']}")
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
