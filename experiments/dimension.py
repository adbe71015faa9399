# SPDX-License-Identifier: Apache-2.0
"""The metric against d (Figure 4, left), with theta's learning rate fixed and scaled.

    python -m experiments.dimension --data-dir glue     # stop and start at will
    python -m experiments.dimension --render            # only the table and the figure

STS-B and SST-2, seed 0, the cells and the rates of glue_table.py, which runs before.
Three curves:

    fixed     GPart at the rate that is best for d = 23,040, as in the paper
    scaled    that rate times sqrt(23040 / d): Adam moves a weight by about
              lr / sqrt(n), n = N / d, which this keeps the same for every d
    unilora   Uni-LoRA at its own best rate, up to the d where every factor entry is
              free

Writes results/dimension.md and figures/dimension.png.
"""

import math
from typing import Any

from experiments import glue_table as glue

TASKS = ("stsb", "sst2")
SIZES = [16, 90, 360, 1440, 5760, 23040, 92160, 368640, glue.N]
MOST = {"unilora": 4 * (384 + 384) * 12}  # numbers in the rank-4 factors of 12 matrices
CURVES = {"fixed": "gpart", "scaled": "gpart", "unilora": "unilora"}
LABELS = {
    "fixed": "GPart, one learning rate",
    "scaled": "GPart, scaled by sqrt(N/d)",
    "unilora": "Uni-LoRA, one learning rate",
}


def points(curve: str) -> list[tuple[int, float]]:
    """(d, learning rate) along a curve."""
    method = CURVES[curve]
    if not (best := glue.best_rate(method)):
        raise SystemExit(f"{method} has no rate yet: run experiments.glue_table first")
    sizes = [d for d in SIZES if d <= MOST.get(method, glue.N)]
    scale = {d: math.sqrt(glue.D / d) if curve == "scaled" else 1.0 for d in sizes}
    return [(d, float(f"{best * scale[d]:.3g}")) for d in sizes]


def found(task: str, curve: str) -> list[tuple[int, dict[str, Any]]]:
    """(d, cell) of the runs there are."""
    cells = [
        (d, glue.read(glue.cell(task, CURVES[curve], rate, 0, d)))
        for d, rate in points(curve)
    ]
    return [(d, cell) for d, cell in cells if cell]


def plateau(cells: list[tuple[int, dict[str, Any]]], within: float = 0.01) -> list[int]:
    """The sizes whose metric is at most that far below the best of the curve."""
    values = {d: cell["metric"] for d, cell in cells if cell["metric"] is not None}
    return [d for d, value in values.items() if value >= max(values.values()) - within]


def table() -> str:
    """A row for each task and curve, in percent."""
    lines = [
        "| task | curve | "
        + " | ".join(f"{d:,}" for d in SIZES)
        + " | within a point |"
    ]
    lines.append("|---" * (len(SIZES) + 3) + "|")
    for task in TASKS:
        for curve in CURVES:
            cells = found(task, curve)
            texts = {
                d: "diverged" if c["metric"] is None else f"{100 * c['metric']:.1f}"
                for d, c in cells
            }
            values = " | ".join(texts.get(d, "") for d in SIZES)
            good = ", ".join(f"{d:,}" for d in plateau(cells))
            lines.append(f"| {glue.TASKS[task]} | {curve} | {values} | {good} |")
    return "\n".join(lines)


def scaled_wins() -> tuple[int, int]:
    """At how many points of both tasks the scaled rate beats the fixed one, and of how
    many at which either beats the majority class; d = 23,040, one run, aside."""
    won = []
    for task in TASKS:
        fixed, scaled = (dict(found(task, curve)) for curve in ("fixed", "scaled"))
        for d in sorted((fixed.keys() & scaled.keys()) - {glue.D}):
            one, other = (c[d]["metric"] or 0.0 for c in (fixed, scaled))
            if max(one, other) > fixed[d]["majority"]:
                won.append(other > one)
    return sum(won), len(won)


def took() -> str:
    """Of the runs that are not glue_table.py's own."""
    every = [cell for task in TASKS for curve in CURVES for cell in found(task, curve)]
    minutes = [c.get("minutes", 0) for d, c in every if d != glue.D]
    return f"{len(minutes)} runs, {sum(minutes):.0f} minutes in sum"


def plot() -> None:
    figure, axes = glue.plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for curve, style in (("fixed", "o-"), ("scaled", "s--"), ("unilora", "^:")):
            ends = [
                (d, c["metric"])
                for d, c in found(task, curve)
                if c["metric"] is not None
            ]
            if ends:
                look = {"color": glue.COLORS[CURVES[curve]], "label": LABELS[curve]}
                axis.semilogx(*zip(*ends, strict=True), style, **look)
        axis.set(xlabel="d", ylabel=f"validation, {glue.TASKS[task]}")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(glue.HERE / "figures" / "dimension.png", dpi=150)


def render() -> str:
    rates = []
    for curve in CURVES:
        each = dict.fromkeys(f"{rate:g}" for _, rate in points(curve))
        rates.append(f"{curve} {', '.join(each)}")
    command = "`python -m experiments.dimension --data-dir glue`"
    won, of = scaled_wins()
    text = f"""# The metric against d

{command}, after `experiments.glue_table`: {took()}, one
CPU thread each, one seed. The validation metric in percent; the last column has the
sizes that are at most one point below the curve's best.

{table()}

Of the {of} points of both tasks at which either beats the majority class, scaled beats
fixed at {won}.

One rate and one rule: whether another exponent would do better is not asked here.

Learning rates, from the smallest d on: {"; ".join(rates)}.
"""
    (glue.HERE / "results" / "dimension.md").write_text(text, encoding="utf-8")
    plot()
    return text


def main() -> None:
    args = glue.parse(__doc__)
    if not args.render:
        cells = [
            (task, curve, *point)
            for curve in CURVES
            for point in points(curve)
            for task in TASKS
        ]
        glue.run_all(
            args,
            [
                glue.job(task, CURVES[curve], rate, 0, d)
                for task, curve, d, rate in cells
            ],
        )
    print(render())


if __name__ == "__main__":
    main()
