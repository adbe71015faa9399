# SPDX-License-Identifier: Apache-2.0
"""Tables 1 and 4 on real GLUE: every method at its own learning rate, on five tasks.

    python -m experiments.glue_table --data-dir glue    # hours; stop and start at will
    python -m experiments.glue_table --render           # only the tables and the figure

Every cell is one run of train_glue.py and one file in results/glue/, and what has a
file is not run again (whoever changes BUDGET deletes them, and --work, where the
adapters stay). It is all-MiniLM-L6-v2 in bf16 autocast on one CPU thread, as many cells
at a time as there are cores. First each method's learning rate: five values a factor of
3 apart around its published one, the best mean dev metric of STS-B and SST-2 with seed
0 (for the head alone, of the head's; for the non-isometric variant the five of GPart
times sqrt(d/N), the same steps in weight space). Then the tables: the validation metric
at that rate, the checkpoint picked on the dev split. The head's own rate beside an
adapter is 1e-3 on STS-B and SST-2; on RTE, MRPC and CoLA, where no method learns much
with it in so few steps, it is the one that is best for the head alone.

Without --render it ends with results/glue.md and figures/rates.png, which --render
makes from whatever cells there are.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import matplotlib

from experiments import peers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
CELLS = HERE / "results" / "glue"
TASKS = {  # and the heads of their columns
    "stsb": "STS-B (Pearson)",
    "sst2": "SST-2 (accuracy)",
    "rte": "RTE (accuracy)",
    "mrpc": "MRPC (accuracy)",
    "cola": "CoLA (Matthews)",
}
BUDGET = {  # of each task: what fits into about four minutes of a core
    "stsb": ["--max-steps", "240", "--max-length", "64"],
    "sst2": ["--max-steps", "300", "--max-length", "64", "--max-train-samples", "6000"],
    "rte": ["--max-steps", "120", "--max-length", "96", "--head-lr", "0.009"],
    "mrpc": ["--max-steps", "150", "--max-length", "96", "--head-lr", "0.009"],
    "cola": ["--max-steps", "500", "--max-length", "64", "--head-lr", "0.009"],
}
N, D = 1769472, 23040  # query and value of all-MiniLM-L6-v2
RATES = {  # the middle one of five
    "gpart": 5e-3,
    "gpart-noniso": 5e-3 * math.sqrt(D / N),
    "unilora": 5e-3,
    "lora": 5e-4,
    "head": 1e-3,
    "bitfit": 4e-4,
    "vera": 1e-2,
    "fourierft": 5e-2,
    "full": 5e-5,
}
THREE_SEEDS = ("gpart", "gpart-noniso", "unilora", "lora", "head")
SEEDS = (0, 1, 2)
TABLE_1 = {method: SEEDS if method in THREE_SEEDS else SEEDS[:1] for method in RATES}
# Points below the best: how wide a range is depends on where the line is.
WITHIN = (2, 5, 10)
NAMES = {
    "gpart": "GPart",
    "gpart-noniso": "GPart, not isometric",
    "unilora": "Uni-LoRA",
    "lora": "LoRA, rank 8",
    "head": "head alone",
    "bitfit": "BitFit",
    "vera": "VeRA, rank 1024",
    "fourierft": "FourierFT, 1,000",
    "full": "full fine-tuning",
}

COLORS = {  # as in course/geometry.ipynb
    "gpart": "#0072B2",
    "gpart-noniso": "#CC79A7",
    "unilora": "#009E73",
    "lora": "#D55E00",
    "head": "0.4",
    "bitfit": "#56B4E9",
    "vera": "#E69F00",
    "fourierft": "#8C564B",
    "full": "black",
}


# --- Cells ---
def rates(method: str) -> list[float]:
    return [float(f"{RATES[method] * 3**k:.3g}") for k in (0, 1, -1, 2, -2)]


def cell(task: str, method: str, rate: float, seed: int, d: int = D) -> Path:
    size = f"-d{d}" if d != D else ""
    return CELLS / f"{task}-{method}{size}-lr{rate:g}-seed{seed}.json"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def command(task: str, method: str, rate: float, seed: int, d: int = D) -> list[str]:
    """train_glue.py's arguments, but for the folders."""
    line = ["--task", task, "--method", method, "--seeds", str(seed), "--bf16"]
    if method.startswith("gpart") or method in peers.SIZED:
        line += ["--d", str(d)]
    rates = ["--head-lr" if method == "head" else "--lr", f"{rate:g}"]
    return [*line, *BUDGET[task], *rates]


def job(*one: Any) -> tuple[Path, list[str]]:
    """For run_all: the file of a result and the command that makes it."""
    return cell(*one), command(*one)


def train(
    args: argparse.Namespace, name: str, line: list[str]
) -> tuple[dict[str, Any], list[str], Path]:
    """(train_glue.py's results, its whole command line, the folder with the adapter) of
    one run, which is trained, or goes on where it was killed, unless it is in the
    folder already. SystemExit with train_glue.py's message for what it refuses."""
    import train_glue

    output = Path(args.work, name)
    line = [*line, "--data-dir", args.data_dir, "--output", str(output), "--resume"]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            return train_glue.main(line), line, output
        except SystemExit as error:
            said = errors.getvalue().strip().splitlines()
            raise SystemExit(
                said[-1] if error.code == 2 and said else error.code
            ) from None


def trained(
    args: argparse.Namespace, *one: Any
) -> tuple[dict[str, Any], list[str], Path]:
    """train() for what cell() takes."""
    return train(args, cell(*one).stem, command(*one))


def commit() -> str:
    """That of this tree, "-dirty" if a file of it was changed; unknown without git."""
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(line, cwd=HERE, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run(args: argparse.Namespace, path: Path, line: list[str]) -> Any:
    """The result in that file, or from training by that command line."""
    if (done := read(path)) is not None:
        return done
    result: dict[str, Any]
    try:
        full = train(args, path.stem, line)[0]
    except SystemExit as error:
        if "diverged" not in str(error):
            raise RuntimeError(f"{path.stem}: {error}") from error
        result = {"dev": None, "metric": None, "loss": None}  # that is a result too
    else:
        (one,) = full["runs"]
        keys = ("dev", "metric", "loss", "step", "minutes", "adapter_bytes")
        result = {key: one[key] for key in keys}
        keys = ("majority", "trainable", "trainable_head", "rows", "versions", "device")
        result |= {"of": full["metric"]} | {key: full[key] for key in keys}
        result["settings"] = {
            k: v for k, v in full["settings"].items() if k[:4] != "data"
        }
    result |= {"command": " ".join(line), "commit": commit()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    print(
        f"{path.stem}: {result['metric']} ({result.get('minutes', 0):.1f} min)",
        flush=True,
    )
    return result


def run_all(args: argparse.Namespace, jobs: list[tuple[Path, list[str]]]) -> None:
    """Those (result file, train_glue.py's arguments) that have no file yet, on
    args.workers processes of one thread each."""
    missing = {path: line for path, line in jobs if not path.exists()}
    if missing:
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.workers, spawn) as pool:
            for future in [pool.submit(run, args, *job) for job in missing.items()]:
                future.result()


# --- Learning rates ---
def dev(task: str, method: str, rate: float, d: int = D) -> float | None:
    """The dev metric of a finished run; -1 if it diverged, None if it is not
    finished."""
    done = read(cell(task, method, rate, 0, d))
    return None if done is None else -1.0 if done["dev"] is None else float(done["dev"])


def best_rate(method: str) -> float | None:
    """The best of the five on STS-B and SST-2; None while one of them is missing."""
    means = {}
    for rate in rates(method):
        values = [dev(task, method, rate) for task in ("stsb", "sst2")]
        if None in values:
            return None
        means[rate] = sum(v for v in values if v is not None)
    return max(means, key=lambda rate: means[rate])


def good_rates(method: str, within: float) -> list[float]:
    """Those that are at most that far below the method's best dev metric, on STS-B and
    on SST-2."""
    good = set(rates(method))
    for task in ("stsb", "sst2"):
        values = {rate: dev(task, method, rate) for rate in rates(method)}
        known = {rate: value for rate, value in values.items() if value is not None}
        top = max(known.values(), default=0.0)
        good &= {rate for rate, value in known.items() if value >= top - within}
    return sorted(good)


# --- Tables ---
def score(task: str, method: str, seed: int) -> float | None:
    """The validation metric at the method's best rate; 0 if it diverged, None if there
    is none."""
    rate = best_rate(method)
    done = read(cell(task, method, rate, seed)) if rate else None
    return (
        None
        if done is None
        else 0.0
        if done["metric"] is None
        else float(done["metric"])
    )


def row(method: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """{task: (median, std, number of seeds)} and what all runs share."""
    rate = best_rate(method)
    result: dict[str, Any] = {"rate": rate, "tasks": {}}
    for task in TASKS if rate else ():
        values = [v for seed in seeds if (v := score(task, method, seed)) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            result["tasks"][task] = (statistics.median(values), spread, len(values))
        for seed in seeds:
            if "trainable" in (one := read(cell(task, method, rate, seed)) or {}):
                result["trainable"] = one["trainable"]
    return result


def rate_table() -> str:
    heads = " | ".join(f"good to {within} points" for within in WITHIN)
    lines = [
        f"| method | published | best | {heads} |",
        "|---" * (3 + len(WITHIN)) + "|",
    ]
    for method in RATES:
        if best := best_rate(method):
            cells = [f"{RATES[method]:.3g}", f"{best:g}"]
            for within in WITHIN:
                good = good_rates(method, within / 100)
                cells.append(", ".join(f"{rate:g}" for rate in good) or "none")
            lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def majority(task: str) -> str:
    for path in sorted(CELLS.glob(f"{task}-*.json")):
        if "majority" in (one := json.loads(path.read_text(encoding="utf-8"))):
            return f"{100 * one['majority']:.1f}"
    return ""


def table(seeds_of: dict[str, tuple[int, ...]]) -> str:
    """{method: seeds} -> a row for each there is: median, and ± the deviation of
    several seeds."""
    lines = [
        f"| method | trained | lr | {' | '.join(TASKS.values())} | average |",
        "|---" * (len(TASKS) + 4) + "|",
        f"| majority class | | | {' | '.join(majority(task) for task in TASKS)} | |",
    ]
    for method, seeds in seeds_of.items():
        one = row(method, seeds)
        if not one["tasks"]:  # its rates are still being searched
            continue
        cells = []
        for task in TASKS:
            median, spread, count = one["tasks"].get(task, (None, None, 0))
            text = "" if median is None else f"{100 * median:.1f}"
            text += "" if spread is None else f" ± {100 * spread:.1f}"
            cells.append(
                text
                + ("" if count in (0, len(seeds)) else f" ({count} of {len(seeds)})")
            )
        medians = [m for m, *_ in one["tasks"].values()]
        whole = len(medians) == len(TASKS)
        average = f"{100 * statistics.mean(medians):.1f}" if whole else ""
        numbers = f"{one.get('trainable', 0):,}" if "trainable" in one else ""
        rate = f"{one['rate']:g}" if one["rate"] else ""
        texts = [NAMES[method], numbers, rate, *cells, average]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def margins(method: str, others: tuple[str, ...], seeds: tuple[int, ...]) -> str:
    """What method has more than each other one, by seed: mean ± std, in points."""
    lines = [
        f"| {NAMES[method]} minus | {' | '.join(TASKS.values())} | average |",
        "|---" * (len(TASKS) + 2) + "|",
    ]
    for other in others:
        columns = []
        for task in TASKS:
            pairs = [[score(task, m, seed) for m in (method, other)] for seed in seeds]
            columns.append([100 * (a - b) for a, b in pairs if None not in (a, b)])
        # The averages of the seeds have a spread too.
        whole = all(len(column) == len(seeds) for column in columns)
        by_seed = zip(*columns, strict=True) if whole else ()
        columns.append([statistics.mean(values) for values in by_seed])
        texts = [""] * len(columns)
        for k, values in enumerate(columns):
            if len(values) == len(seeds):
                mean, deviation = statistics.mean(values), statistics.stdev(values)
                texts[k] = f"{mean:+.1f} ± {deviation:.1f}"
        lines.append(f"| {NAMES[other]} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot() -> None:
    """The dev metric against the learning rate, a panel for each method."""
    figure, axes = plt.subplots(
        3, 3, figsize=(8, 5.5), layout="constrained", sharex=True, sharey=True
    )
    looks = {"stsb": ("o-", COLORS["gpart"]), "sst2": ("s--", COLORS["lora"])}
    for axis, method in zip(axes.flat, RATES, strict=True):
        axis.axvline(1, color="0.8")  # the published rate
        for task, (style, color) in looks.items():
            points = [
                (rate / RATES[method], dev(task, method, rate))
                for rate in rates(method)
            ]
            points = sorted((x, y) for x, y in points if y is not None)
            if points:
                line = zip(*points, strict=True)
                axis.semilogx(*line, style, color=color, label=TASKS[task], ms=4)
        axis.set_title(NAMES[method], fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("learning rate / published", fontsize=9)
    figure.supylabel("dev metric, seed 0", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    figure.savefig(HERE / "figures" / "rates.png", dpi=150)


def render() -> str:
    # Those with a d in their name are dimension.py's.
    paths = [path for path in CELLS.glob("*.json") if "-d" not in path.stem]
    done = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    minutes = sum(c.get("minutes", 0) for c in done)
    versions = {
        json.dumps(c["versions"], sort_keys=True) for c in done if "versions" in c
    }
    devices = {c["device"] for c in done if "device" in c}
    took = f"{len(done)} runs, {minutes / 60:.1f} hours in sum"
    median, mean = "median ± deviation", "mean ± standard deviation"
    search = "five a factor of 3 apart, on the dev splits of STS-B and SST-2, seed 0"
    text = f"""# GLUE

`python -m experiments.glue_table --data-dir glue`: {took}.
{"; ".join(sorted(devices))}. {"; ".join(sorted(versions))}

All runs have partition seed 0, so that no deviation includes the choice of P.

## Table 1: the validation metric in percent, {median} of three seeds, or one seed

{table(TABLE_1)}

## Table 4 and the like: GPart minus another method, {mean} of three pairs

{margins("gpart", THREE_SEEDS[1:], SEEDS)}

## Learning rates: {search}

A range is counted from the method's own best, and in multiples of its own rates.

{rate_table()}

## All methods, seed 0

{table(dict.fromkeys(RATES, SEEDS[:1]))}
"""
    (HERE / "results" / "glue.md").write_text(text, encoding="utf-8")
    plot()
    return text


def parse(doc: str | None, renders: bool = True) -> argparse.Namespace:
    """renders: whether the script has a --render, which needs no data."""
    p = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    p.add_argument("--data-dir", help="folder of GLUE's TSV files")
    p.add_argument(
        "--work", default="runs/glue", help="folder of the runs: checkpoints, adapters"
    )
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    p.set_defaults(render=False)
    if renders:
        p.add_argument("--render", action="store_true", help="run nothing")
    args = p.parse_args()
    if args.workers < 1:
        p.error(f"--workers must be at least 1, got {args.workers}")
    tsv = "folder of GLUE's TSV files"
    if not args.render and not args.data_dir:
        way_out = "; --render runs nothing" if renders else ""
        p.error(f"--data-dir names the {tsv}{way_out}")
    # Or each cell would say so, one by one.
    if args.data_dir and not Path(args.data_dir).is_dir():
        p.error(f"--data-dir {args.data_dir}: no such folder; it takes the {tsv}")
    return args


def main() -> None:
    args = parse(__doc__)
    rest = [method for method in RATES if method not in THREE_SEEDS]
    # One by one: a stop leaves whole rows.
    alone = [((method,), SEEDS[:1]) for method in rest]
    for methods, seeds in [(THREE_SEEDS, SEEDS), *alone]:
        if not args.render:
            search = [
                (t, m, r, 0)
                for r in range(5)
                for m in methods
                for t in ("stsb", "sst2")
            ]
            run_all(args, [job(t, m, rates(m)[r], seed) for t, m, r, seed in search])
            best = {m: best_rate(m) for m in methods}
            run_all(
                args,
                [
                    job(t, m, best[m], seed)
                    for seed in seeds
                    for m in methods
                    for t in TASKS
                ],
            )
    print(render())


if __name__ == "__main__":
    main()
