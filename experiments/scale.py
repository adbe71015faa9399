# SPDX-License-Identifier: Apache-2.0
"""The partition at scale: seconds and memory against N, and an 8B model by its shapes.

    python -m experiments.scale         # six minutes on one CPU core, 12 GB of memory
    python -m experiments.scale --ids   # how ids are best computed, a minute

1. All group ids of N = 10^6 ... 10^9 weights, d = 23,040, beside torch.randperm(N),
   which would be the ordinary way to a partition; each in a process of its own. Peak is
   what the process grows by.
2. attach, load and merge: query and value of RoBERTa-base and -large, whole; of q, k, v
   and o of Llama 3 8B one matrix at a time, ids from Partition.groups(start, stop) and
   W + P theta, as where the model does not fit into memory.

Writes results/scale.json. --ids is about Partition.groups alone: nanoseconds a weight
beside its own loop with other chunks and numbers of threads, all alternating, medians.
One thread and 2^15 is how gpart 0.1.0 did it. Writes results/ids-<device>.json.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import gpart

HERE = Path(__file__).resolve().parent
SIZES = [10**k for k in (6, 7, 8, 9)]
CHILD = """
import copy, json, math, sys, tempfile, time, torch, gpart
from torch import nn
what, N = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def peak():  # GB
    with open("/proc/self/status", encoding="utf-8") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024 / 1e9

def timed(f, *args):
    start = time.perf_counter()
    out = f(*args)
    return time.perf_counter() - start, out

gpart.Partition(1000, 7).groups()
torch.randperm(1000)
before, result = peak(), {}
if what == "groups":
    result["seconds"], out = timed(gpart.Partition(N, 23040).groups)
elif what == "randperm":
    result["seconds"], out = timed(torch.randperm, N)
elif what == "llama":  # q, k, v, o of each layer; grouped-query attention
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)] * N
    P = gpart.Partition(sum(a * b for a, b in shapes), 524288)
    theta, scale, start = torch.randn(P.d), P.scale(), 0
    result = {"N": P.N, "ids": 0.0, "merge": 0.0}
    for shape in shapes:
        # as read from one shard of a checkpoint
        w = torch.zeros(shape, dtype=torch.bfloat16)
        seconds, ids = timed(P.groups, start, start + w.numel())
        result["ids"] += seconds
        result["merge"] += timed(gpart.add_update, w, theta, ids, scale)[0]
        start += w.numel()
else:  # width of an encoder with N layers
    def layer():
        shape = int(what), int(what)
        return nn.ModuleDict({key: nn.Linear(*shape) for key in ("query", "value")})

    model = nn.ModuleList(layer() for _ in range(N))
    other = copy.deepcopy(model)
    result["attach"], g = timed(gpart.attach, model, 23040)
    with tempfile.TemporaryDirectory() as folder:
        gpart.save(model, f"{folder}/a.safetensors")
        result["load"] = timed(gpart.load, other, f"{folder}/a.safetensors")[0]
        result["swap"] = timed(gpart.load, model, f"{folder}/a.safetensors")[0]
    result["merge"] = timed(gpart.merge, model)[0]
    result["N"] = g.partition.N
print(json.dumps({**result, "peak_GB": peak() - before}))
"""


def run(what: str, N: int) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", CHILD, what, str(N)]
    child = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    print(what, N, child.stdout.strip(), flush=True)
    return json.loads(child.stdout)


def ids_by(P: gpart.Partition, chunk: int, threads: int, device: str) -> torch.Tensor:
    """P.groups() in other chunks."""
    ids = torch.empty(P.N, dtype=torch.int32, device=device)

    def fill(at: int) -> None:
        i = torch.arange(at, min(at + chunk, P.N), device=device)
        ids[at : at + chunk] = gpart.permute(i, P.N, P.seed) % P.d

    if threads == 1:
        for at in range(0, P.N, chunk):
            fill(at)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, P.N, chunk)))
    return ids


def measure_ids(N: int, device: str, rounds: int, path: Path) -> None:
    P, cores = gpart.Partition(N, 23040), torch.get_num_threads()
    ways = [(k, cores) for k in range(13, 18)] + [(15, 1)]
    if device == "cuda":
        ways = [(15, 1), (20, 1), (24, 1)]
    sides = {f"2^{k}, {n} threads": (2**k, n) for k, n in ways}
    expected = P.groups(device=device)
    for chunk, threads in sides.values():  # which also warms up
        if not torch.equal(ids_by(P, chunk, threads, device), expected):
            raise RuntimeError(f"other ids with {chunk=}, {threads=}")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {"groups": [], **{name: [] for name in sides}}
    for at in range(rounds):
        order = [*times]
        random.Random(at).shuffle(order)
        for name in order:
            wait()
            start = time.perf_counter()
            if name == "groups":
                P.groups(device=device)
            else:
                ids_by(P, *sides[name], device)
            wait()
            times[name].append(time.perf_counter() - start)
    one = times["2^15, 1 threads"]
    cpu = f"CPU {platform.machine()}, {cores} threads"
    result = {
        "N": N,
        "rounds": rounds,
        "ns": {name: 1e9 * statistics.median(t) / N for name, t in times.items()},
        "to_one_thread": {
            name: statistics.median(a / b for a, b in zip(t, one, strict=True))
            for name, t in times.items()
        },
        "gpart": gpart.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| chunk, threads | ns a weight | to one thread, 2^15 |\n|---|---|---|")
    for name, ratio in result["to_one_thread"].items():
        print(f"| {name} | {result['ns'][name]:.2f} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ids", action="store_true", help="only the ids, by chunk")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--N", type=int, default=12 * 2 * 768**2, help="for --ids")
    parser.add_argument("--rounds", type=int, default=15, help="for --ids")
    parser.add_argument("--output", type=Path, help="for --ids")
    args = parser.parse_args()
    if args.ids:
        path = args.output or HERE / "results" / f"ids-{args.device}.json"
        measure_ids(args.N, args.device, args.rounds, path)
        return
    began, rows = time.monotonic(), []
    for N in SIZES:
        row: dict[str, float] = {"N": N}
        for what in ("groups", "randperm"):
            row |= {f"{what}_{key}": value for key, value in run(what, N).items()}
        rows.append(row)
    models = {"RoBERTa-base": run("768", 12), "RoBERTa-large": run("1024", 24)}
    models["Llama 3 8B, by matrix"] = run("llama", 32)
    result = {
        "partition": rows,
        "models": models,
        "torch": torch.__version__,
        "device": f"CPU {platform.machine()}, 1 thread",
        "minutes": (time.monotonic() - began) / 60,
    }
    text = json.dumps(result, indent=2) + "\n"
    (HERE / "results" / "scale.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
