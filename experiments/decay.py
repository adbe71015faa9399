# SPDX-License-Identifier: Apache-2.0
"""Weight decay with and without isometry (Appendix B.2): how far apart are they?

    python -m experiments.decay --data-dir glue

all-MiniLM-L6-v2 on STS-B, 120 steps of 16 rows, constant learning rates a factor
sqrt(N/d) apart, so that both variants take the same steps in weight space; the same
data in the same order, the head frozen. The norm of the update at the end, ||P theta||,
falls with the weight decay; the factor is by how much more decay the non-isometric
variant needs for the same norm, read off where the curves have lost half of their
(logarithmic) height. Two kinds:

    Adam     coupled, torch.optim.Adam(weight_decay): adds wd theta to the gradient, an
             L2 penalty (wd/2) ||theta||^2. Expected factor N/d
    AdamW    decoupled: theta shrinks by 1 - lr wd in each step. Expected factor
             sqrt(N/d), because the learning rates are that far apart. This is an
             identity: with lr / sqrt(n) and wd sqrt(n), n = N/d, the variant makes the
             same updates step by step, so it checks the code and finds nothing

Writes results/decay.json and results/decay.md. A finished point is not run again.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers

import train_glue
from experiments import runs
from experiments.glue_table import NAMES, D, N

HERE = Path(__file__).resolve().parent
STEPS, BATCH, LR = 120, 16, 5e-3
DECAYS = {  # of the isometric variant; the other one gets them times what is expected
    "Adam": [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3],
    "AdamW": [0.0, 0.3, 1.0, 3.0, 10.0, 30.0],
}
EXPECTED = {"Adam": N / D, "AdamW": math.sqrt(N / D)}
FORMULAS = {"Adam": "N/d", "AdamW": "sqrt(N/d)"}
SETTINGS = {"steps": STEPS, "batch": BATCH, "lr": LR, "N": N, "d": D, "max_length": 64}
Curves = dict[str, list[tuple[float, float]]]  # {method: [(decay, norm of the update)]}


def train(data_dir: str, method: str, kind: str, decay: float) -> dict[str, float]:
    """||P theta|| at the end."""
    command = ["--task", "stsb", "--method", method, "--d", str(D)]
    command += ["--data-dir", data_dir, "--max-length", "64"]
    args = train_glue.parser().parse_args(command)
    task = train_glue.TASKS["stsb"]
    rows = train_glue.read_data(args)[0]
    path = train_glue.model_path(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    bench = train_glue.Bench(args, task, tokenizer, accelerate.Accelerator(cpu=True))
    # Without dropout: both variants see the same noise.
    model = train_glue.build(args, seed=0).eval()
    lr = LR if method == "gpart" else LR * math.sqrt(D / N)
    kind_of_adam = getattr(torch.optim, kind)
    optimizer = kind_of_adam([model.gpart.theta], lr=lr, weight_decay=decay)
    for chosen in train_glue.batches(len(rows), BATCH, STEPS, seed=0):
        model(**bench.encode([rows[i] for i in chosen])).loss.backward()
        optimizer.step()
        model.zero_grad()
    update = torch.cat([dw.flatten() for dw in model.gpart.delta().values()])  # [N]
    return {"norm": float(update.norm())}


def curves(record: runs.Record, data_dir: str, kind: str) -> Curves:
    """Both variants, from the record or trained."""
    found: Curves = {}
    for method, factor in (("gpart", 1.0), ("gpart-noniso", EXPECTED[kind])):
        decays = [decay * factor for decay in DECAYS[kind]]
        names = [f"{kind}-{method}-wd{decay:.3g}" for decay in decays]
        found[method] = [
            (
                x,
                record.cell(name, functools.partial(train, data_dir, method, kind, x))[
                    "norm"
                ],
            )
            for name, x in zip(names, decays, strict=True)
        ]
    return found


def crossing(points: list[tuple[float, float]], level: float) -> float:
    """The decay at which the norm falls to level, between the points in log-log."""
    x, y = (
        np.log(np.array(v))
        for v in zip(*[p for p in sorted(points) if p[0] > 0], strict=True)
    )
    if not y[-1] <= math.log(level) <= y[0]:
        raise ValueError(
            f"no crossing of {level:g} in {points}: DECAYS must reach further"
        )
    return float(np.exp(np.interp(-math.log(level), -y, x)))


def summary(two: Curves) -> dict[str, Any]:
    """Where both have lost half of their logarithmic height; the factor of decay."""
    free = max(norm for curve in two.values() for decay, norm in curve if decay == 0)
    least = max(min(norm for _, norm in curve) for curve in two.values())
    level = math.sqrt(free * least)
    at = {method: crossing(curve, level) for method, curve in two.items()}
    return {"level": level, "at": at, "factor": at["gpart-noniso"] / at["gpart"]}


def table(kinds: dict[str, Curves]) -> str:
    lines = [
        "| | expected | found | norm there | decay: GPart | not isometric |",
        "|---" * 6 + "|",
    ]
    for kind, two in kinds.items():
        one = summary(two)
        expected = f"{FORMULAS[kind]} = {EXPECTED[kind]:.3g}"
        at = " | ".join(f"{decay:.3g}" for decay in one["at"].values())
        lines.append(
            f"| {kind} | {expected} | {one['factor']:.3g} | {one['level']:.3g} | {at} |"
        )
    return "\n".join(lines)


def norms(kind: str, two: Curves) -> str:
    lines = [
        f"| {kind}, decay of GPart | {' | '.join(f'{x:g}' for x in DECAYS[kind])} |"
    ]
    lines.append("|---" * (1 + len(DECAYS[kind])) + "|")
    for method, curve in two.items():
        times = f", decay times {EXPECTED[kind]:.3g}" if method != "gpart" else ""
        cells = " | ".join(f"{norm:.4g}" for _, norm in curve)
        lines.append(f"| {NAMES[method]}{times} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of GLUE's TSV files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = runs.Record(HERE / "results" / "decay.json", SETTINGS)
    try:
        kinds = {kind: curves(record, args.data_dir, kind) for kind in DECAYS}
    except ValueError as error:  # no data there
        parser.error(str(error))
    parts = [
        "# Weight decay with and without isometry",
        f"`python -m experiments.decay --data-dir glue`: {record.ran_on}; one seed.",
        table(kinds),
        "The row of AdamW is an identity: learning rates sqrt(N/d) apart and decays\n"
        "sqrt(N/d) apart the other way make the same updates. It checks the code.",
        "The norm of the update at the end:",
        *[norms(kind, two) for kind, two in kinds.items()],
    ]
    text = "\n\n".join(parts) + "\n"
    (HERE / "results" / "decay.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
