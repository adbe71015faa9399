# SPDX-License-Identifier: Apache-2.0
"""What evidence.py's runs say, from whatever runs there are.

    python -m experiments.verdicts

Intervals are 95 % by Student's t: of the mean of paired differences, or of a slope.
Metrics are in percent and losses in thousandths, both on the validation rows at the
checkpoint that dev picked. A comparison with fewer than two pairs is left out, and a
run that diverged has the metric 0 and no loss. Writes results/evidence.md and
figures/exponent.png.
"""

import argparse
import collections
import json
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments import evidence
from experiments import glue_table as glue
from experiments.evidence import Cell

NAMES = glue.NAMES | {
    "shira": "SHiRA",
    "waveft": "WaveFT",
    "c3a": "C3A",
}
TASKS = {"stsb": "STS-B", "mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA"}
SIZES = (360, 1440, 5760, glue.D, 92160, glue.N)
UNITS = {"metric": 100.0, "loss": 1000.0}
BETTER = {"metric": 1, "loss": -1}
# The official training rows that split() leaves, and the epochs of the paper's Table 6
PAPER = {"mrpc": (3302, 30), "stsb": (5175, 80), "sst2": (66349, 60)}
PAPER_LR, PAPER_DECAY, BATCH = 5e-3, 0.1, 32


# --- Statistics ---
class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def verdict(self, sign: int = 1) -> str:
        """sign: -1 where less is better."""
        low, high = sorted((sign * self.low, sign * self.high))
        return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def interval(values: list[float]) -> Interval | None:
    """Of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, n = statistics.fmean(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def value(cell: Cell, key: str) -> float | None:
    """In percent or thousandths; None if the run or its loss is missing."""
    result = cell.read() or {key: None, "dev": 0.0}
    if result["dev"] is None and key == "metric":  # it diverged
        return 0.0
    found = result.get(key)
    return None if found is None else UNITS[key] * found


def differences(one: list[Cell], other: list[Cell], key: str) -> dict[int, float]:
    """{seed: one minus other}, where both are there."""
    pairs = [
        (a.seed, value(a, key), value(b, key)) for a, b in zip(one, other, strict=True)
    ]
    return {s: x - y for s, x, y in pairs if x is not None and y is not None}


def paired(one: list[Cell], other: list[Cell], key: str) -> Interval | None:
    return interval([*differences(one, other, key).values()])


def mean(cells: list[Cell], key: str) -> str:
    """Mean ± deviation of the runs that are there."""
    values = [v for cell in cells if (v := value(cell, key)) is not None]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}" if values else ""


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- Rates ---
def known_rate(task: str, method: str, d: int = glue.D) -> float | None:
    try:
        return evidence.best_rate(task, method, d)
    except ValueError:
        return None


def rates_table() -> str:
    """The dev metric at every rate, the best one in bold."""
    rows = []
    for task in TASKS:
        for method in evidence.RIVALS:
            rates = sorted(evidence.rates(task, method))
            best = known_rate(task, method)
            texts = []
            for rate in rates:
                if (result := Cell(task, method, rate).read()) is not None:
                    dev = result["dev"]
                    text = "diverged" if dev is None else f"{100 * dev:.1f}"
                    text = f"{rate:g}: {text}"
                    texts.append(f"**{text}**" if rate == best else text)
            rows.append([TASKS[task], NAMES[method], ", ".join(texts)])
    return table(["task", "method", "rate: dev metric, seed 0"], rows)


# --- GPart against Uni-LoRA ---
def pair(task: str, d: int, seeds: tuple[int, ...]) -> list[list[Cell]]:
    """GPart's and Uni-LoRA's runs; [] while a rate is not known."""
    rates = [known_rate(task, method, d) for method in ("gpart", "unilora")]
    if None in rates:
        return []
    return [
        [Cell(task, method, rate or 0.0, seed, d) for seed in seeds]
        for method, rate in zip(("gpart", "unilora"), rates, strict=True)
    ]


def versus(tasks: tuple[str, ...], sizes: tuple[int, ...], seeds: Any) -> str:
    """GPart minus Uni-LoRA, and of several tasks their mean, seed by seed."""
    rows: list[list[Any]] = []
    for d in sizes:
        every = {task: pair(task, d, seeds) for task in tasks}
        for key, sign in BETTER.items():
            per_task = []
            for task, two in every.items():
                if not two or (found := paired(*two, key)) is None:
                    continue
                per_task.append(differences(*two, key))
                both = [mean(cells, key) for cells in two]
                rates = " / ".join(f"{cells[0].lr:g}" for cells in two)
                what = [TASKS[task], f"{d:,}", key, rates, found.n]
                rows.append([*what, *both, found, found.verdict(sign)])
            common = set.intersection(*map(set, per_task)) if per_task else set()
            if key == "metric" and len(per_task) == len(tasks) > 1:
                means = [statistics.fmean(x[s] for x in per_task) for s in common]
                if (found := interval(means)) is not None:
                    what = ["their mean", f"{d:,}", key, "", found.n, "", ""]
                    rows.append([*what, found, found.verdict()])
    heads = ["task", "d", "what", "rates", "pairs", "GPart", "Uni-LoRA"]
    return table([*heads, "difference", "GPart is"], rows)


def undecayed_table() -> str:
    """What weight decay does to Uni-LoRA."""
    rows: list[list[Any]] = []
    if (rate := known_rate("stsb", "unilora")) is not None:
        without = evidence.undecayed("stsb")
        decayed = [cell._replace(lr=rate, decay=0.1) for cell in without]
        for key, sign in BETTER.items():
            if (found := paired(without, decayed, key)) is not None:
                both = [mean(cells, key) for cells in (without, decayed)]
                rows.append([key, found.n, *both, found, found.verdict(sign)])
    heads = ["what", "pairs", "wd 0", "wd 0.1", "difference", "without decay it is"]
    return table(heads, rows)


# --- The dose of decay ---
def paper_doses() -> str:
    """wd * sum(lr) of the paper's settings for RoBERTa-base, and of ours."""
    rows = []
    for task, (size, epochs) in PAPER.items():
        steps = epochs * (size // BATCH)
        theirs = PAPER_DECAY * evidence.rate_sum(steps, PAPER_LR)
        ours = PAPER_DECAY * evidence.rate_sum(evidence.steps(task), 0.015)
        rows.append([TASKS[task], f"{steps:,}", f"{theirs:.2g}", f"{ours:.2g}"])
    return table(["task", "the paper's steps", "its dose", "glue_table.py's"], rows)


def dose_table(task: str) -> str:
    """Isometric minus not: with the same wd, and with the same dose."""
    if known_rate(task, "gpart") is None:
        return "The rates are not known yet."
    rows: list[list[Any]] = []
    for dose in evidence.DOSES:
        for key, sign in BETTER.items():
            runs = {
                kind: [evidence.dosed(task, dose, kind, s) for s in evidence.THREE]
                for kind in ("gpart", "same", "scaled")
            }
            row = [f"{dose:g}", f"{runs['gpart'][0].decay:g}", key]
            row += [mean(cells, key) for cells in runs.values()]
            same, scaled = (paired(runs["gpart"], runs[k], key) for k in list(runs)[1:])
            if same and scaled:
                row += [str(same), same.verdict(sign), str(scaled)]
                rows.append(row)
    heads = ["dose", "wd", "what", "GPart", "not isometric, same wd", "same dose"]
    heads += ["GPart minus same wd", "GPart is", "GPart minus same dose"]
    return table(heads, rows)


# --- The rate against d ---
def optimum(points: list[tuple[float, float]]) -> float | None:
    """The rate at the top of the parabola through the best of (rate, metric) and its
    neighbours, in the logarithm of the rate; None if the best is at an end."""
    points = sorted(points)
    top = max(range(len(points)), key=lambda i: points[i][1], default=0)
    if not 0 < top < len(points) - 1:
        return None
    x, y = np.array(points[top - 1 : top + 2]).T
    a, b, _ = np.polyfit(np.log(x / x[1]), y, 2)
    return float(x[1] * math.exp(-b / (2 * a)))


def optima(task: str, method: str) -> dict[int, tuple[float | None, Cell]]:
    """{d: (the best rate by the parabola, the best run)} where all rates were tried."""
    found: dict[int, tuple[float | None, Cell]] = {}
    for d in SIZES:
        if d != glue.D and d not in evidence.MORE_RATES[method]:
            continue
        if (best := known_rate(task, method, d)) is None:
            continue
        tried = [Cell(task, method, r, d=d) for r in evidence.rates(task, method, d)]
        results = [(cell.lr, (cell.read() or {}).get("dev")) for cell in tried]
        points = [(rate, dev) for rate, dev in results if dev is not None]
        found[d] = optimum(points), Cell(task, method, best, d=d)
    return found


def slope(points: dict[int, float]) -> Interval | None:
    """The exponent e of rate ~ d^e; None for fewer than three sizes."""
    if len(points) < 3:
        return None
    fit = stats.linregress(np.log([*points]), np.log([*points.values()]))
    half = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
    return Interval(fit.slope, fit.slope - half, fit.slope + half, len(points))


def exponent_table() -> str:
    rows: list[list[Any]] = []
    for task in ("stsb", "sst2"):
        for method in ("gpart", "unilora"):
            found = optima(task, method)
            texts = []
            for d in SIZES:
                top, cell = found.get(d, (None, None))
                text = (
                    "" if cell is None else f"{cell.lr:g}: {value(cell, 'metric'):.1f}"
                )
                texts.append(text + (f" ({top:.2g})" if top else ""))
            line = slope({d: top for d, (top, _) in found.items() if top})
            rows.append([TASKS[task], NAMES[method], *texts, line or "not yet"])
    heads = ["task", "method", *(f"{d:,}" for d in SIZES), "exponent"]
    return table(heads, rows)


def rule_table() -> str:
    """What lr sqrt(d/d') makes of GPart's top at 23,040, over the top that is there."""
    rows: list[list[Any]] = []
    for task in ("stsb", "sst2"):
        tops = {d: top for d, (top, _) in optima(task, "gpart").items() if top}
        scaled = {
            d: tops[glue.D] * math.sqrt(glue.D / d) for d in tops if glue.D in tops
        }
        texts = [f"{scaled[d] / tops[d]:.2f}" if d in scaled else "" for d in SIZES]
        rows.append([TASKS[task], *texts])
    return table(["task", *(f"{d:,}" for d in SIZES)], rows)


def plot() -> None:
    """The validation metric against d, each at its best rate (Figure 4, left)."""
    curves = {
        (task, method): {
            d: value(cell, "metric") for d, (_, cell) in optima(task, method).items()
        }
        for task in ("stsb", "sst2")
        for method in ("gpart", "unilora")
    }
    if not any(curves.values()):
        return
    figure, axes = glue.plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, task in zip(axes, ("stsb", "sst2"), strict=True):
        for method, style in (("gpart", "o-"), ("unilora", "^--")):
            curve = curves[task, method]
            look = {"color": glue.COLORS[method], "label": NAMES[method]}
            axis.semilogx([*curve], [*curve.values()], style, **look)
        axis.set(xlabel="d", ylabel=f"validation, {TASKS[task]}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(glue.HERE / "figures" / "exponent.png", dpi=150)


# --- Sharing ---
def sharing_table() -> str:
    """GPart minus each method that is isometric up to a constant, and Uni-LoRA."""
    rows: list[list[Any]] = []
    for task in ("stsb", "sst2"):
        for method in ("gpart", *evidence.ISOMETRIC, "unilora"):
            ours, rate = known_rate(task, "gpart"), known_rate(task, method)
            if ours is None or rate is None:
                continue
            one = [Cell(task, "gpart", ours, seed) for seed in evidence.THREE]
            other = [Cell(task, method, rate, seed) for seed in evidence.THREE]
            size = next((r["trained"] for c in other if (r := trained(c))), "")
            for key, sign in BETTER.items():
                if not (text := mean(other, key)):
                    continue
                found = None if method == "gpart" else paired(one, other, key)
                what = [TASKS[task], NAMES[method], size, f"{rate:g}", key, text]
                rows.append([*what, found or "", found.verdict(sign) if found else ""])
    heads = ["task", "method", "trained", "rate", "what", "mean ± deviation"]
    return table([*heads, "GPart minus it", "GPart is"], rows)


def trained(cell: Cell) -> dict[str, str]:
    result = cell.read() or {}
    return {"trained": f"{result['trainable']:,}"} if "trainable" in result else {}


# --- The page ---
def devices(results: list[dict[str, Any]]) -> str:
    """What ran where: a run that diverged does not say."""
    found: collections.Counter[str] = collections.Counter()
    for result in results:
        if "device" in result:
            versions = result["versions"]
            names = ("python", "torch", "transformers", "gpart")
            software = ", ".join(f"{name} {versions[name]}" for name in names)
            found[f"{result['device']} ({software})"] += 1
    return ";\n".join(f"{n} on {where}" for where, n in sorted(found.items()))


def render() -> str:
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(evidence.CELLS.glob("*.json"))
    ]
    hours = sum(r.get("minutes", 0.0) for r in results) / 60
    commits = ", ".join(sorted({r["commit"][:9] for r in results}))
    return f"""# Evidence

`python -m experiments.evidence --data-dir glue`, then `python -m experiments.verdicts`:
{len(results)} runs, {hours:.1f} hours in sum, one CPU thread each, at commit {commits}:
{devices(results)}.
A pair has the same head and rows; on two devices its dropout differs. Metrics in
percent, losses in thousandths; intervals 95 %.

## Rates

{rates_table()}

## GPart and Uni-LoRA at d = {glue.D:,}

{versus(("stsb", "mrpc", "sst2"), (glue.D,), evidence.PAIRED)}

Uni-LoRA without weight decay, STS-B:

{undecayed_table()}

## The dose of weight decay, wd * sum(lr)

{paper_doses()}

STS-B, three seeds:

{dose_table("stsb")}

MRPC, three seeds:

{dose_table("mrpc")}

## The best rate against d

The best rate by dev and its validation metric; in brackets the top of a parabola.

{exponent_table()}

lr sqrt(d/d') over GPart's top: what the top at {glue.D:,} makes of it at another d.

{rule_table()}

## Small d, three seeds

{versus(("stsb", "sst2"), (360, 5760), evidence.THREE)}

## Does sharing help, or only isometry? Three seeds

{sharing_table()}
"""


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    text = render()
    (glue.HERE / "results" / "evidence.md").write_text(text, encoding="utf-8")
    plot()
    print(text)


if __name__ == "__main__":
    main()
