# SPDX-License-Identifier: Apache-2.0
"""Weight decay with and without isometry (Appendix B.2): by which factor does it differ?

    python -m experiments.decay --data-dir glue

all-MiniLM-L6-v2 on STS-B, 120 steps of 16 rows, constant learning rates a factor sqrt(N/d) apart,
so that both variants take the same steps in weight space; the same data in the same order, the head
frozen. The norm of the update at the end, ||P theta||, falls with the weight decay; the factor is
by how much more decay the non-isometric variant needs for the same norm, read off where the curves
have lost half of their (logarithmic) height. Two kinds:

    Adam     coupled, torch.optim.Adam(weight_decay): adds wd theta to the gradient, an L2 penalty
             (wd/2) ||theta||^2. Expected factor N/d.
    AdamW    decoupled: theta shrinks by 1 - lr wd in each step. Expected factor sqrt(N/d), and only
             because the learning rates are that far apart.

Writes results/decay.json and figures/decay.png. A finished point is not run again.
"""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_glue
from experiments.glue_table import D, N

HERE = Path(__file__).resolve().parent
STEPS, BATCH, LR = 120, 16, 5e-3
DECAYS = {  # of the isometric variant; the other one gets them times 1 and times what is expected
    "Adam": [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3],
    "AdamW": [0.0, 0.3, 1.0, 3.0, 10.0, 30.0],
}
EXPECTED = {"Adam": N / D, "AdamW": math.sqrt(N / D)}


def train(data_dir: str, method: str, kind: str, decay: float) -> float:
    """||P theta|| at the end."""
    command = ["--task", "stsb", "--method", method, "--d", str(D), "--data-dir", data_dir]
    args = train_glue.parser().parse_args([*command, "--max-length", "64"])
    task = train_glue.TASKS["stsb"]
    rows = train_glue.read_data(args)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(train_glue.model_path(args.model))
    bench = train_glue.Bench(args, task, tokenizer, accelerate.Accelerator(cpu=True))
    model = train_glue.build(args, seed=0).eval()  # no dropout: both variants see the same noise
    lr = LR if method == "gpart" else LR * math.sqrt(D / N)
    optimizer = getattr(torch.optim, kind)([model.gpart.theta], lr=lr, weight_decay=decay)
    for chosen in train_glue.batches(len(rows), BATCH, STEPS, seed=0):
        model(**bench.encode([rows[i] for i in chosen])).loss.backward()
        optimizer.step()
        model.zero_grad()
    return float(torch.cat([dw.flatten() for dw in model.gpart.delta().values()]).norm())


def crossing(points: list[tuple[float, float]], level: float) -> float:
    """The decay at which the norm falls to level, between the points in log-log."""
    x, y = (np.log(np.array(v)) for v in zip(*[p for p in sorted(points) if p[0] > 0], strict=True))
    return float(np.exp(np.interp(-math.log(level), -y, x)))


def summary(points: dict[str, dict[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    result = {}
    for kind, curves in points.items():
        free = max(norm for curve in curves.values() for decay, norm in curve if decay == 0)
        least = max(min(norm for _, norm in curve) for curve in curves.values())
        level = math.sqrt(free * least)
        at = {method: crossing(curve, level) for method, curve in curves.items()}
        factor = at["gpart-noniso"] / at["gpart"]
        result[kind] = {"level": level, "at": at, "factor": factor, "expected": EXPECTED[kind]}
    return result


def plot(points: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axis, (kind, curves) in zip(axes, points.items(), strict=True):
        for (method, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
            axis.loglog(
                *zip(*[p for p in sorted(curve) if p[0] > 0], strict=True), style, label=method
            )
        axis.set(xlabel=f"weight decay ({kind})")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="norm of the update")
    axes[0].legend(["GPart", "GPart, not isometric"])
    figure.savefig(HERE / "figures" / "decay.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of GLUE's TSV files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results" / "decay.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"points": {}}
    points = result["points"]
    for kind, decays in DECAYS.items():
        both = {"gpart": 1.0, "gpart-noniso": EXPECTED[kind]}
        for method, factor in both.items():
            curve = points.setdefault(kind, {}).setdefault(method, [])
            for decay in decays:
                if not any(math.isclose(decay * factor, done) for done, _ in curve):
                    curve.append(
                        (decay * factor, train(args.data_dir, method, kind, decay * factor))
                    )
                    print(kind, method, *curve[-1], flush=True)
                    path.write_text(json.dumps(result, indent=1) + "\n")
    result |= {"summary": summary(points), "steps": STEPS, "batch": BATCH, "lr": LR, "N": N, "d": D}
    result |= {m.__name__: m.__version__ for m in (torch, transformers)}
    result["device"] = f"CPU {platform.machine()}, 1 thread"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(points)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
