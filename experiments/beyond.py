# SPDX-License-Identifier: Apache-2.0
"""One table of what lies beyond GLUE, from the result files of three scripts.

    python -m experiments.beyond

Trains nothing: the numbers are those of results/math.json (train_math.py),
results/vision.json (train_vision.py) and results/algebra.json (algebra.py), medians ±
standard deviations of the seeds where there is more than one. Writes results/beyond.md.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = ("gpart", "unilora", "lora", "head")  # whose column has other comparisons too
SCRIPTS = {"math": "train_math", "vision": "train_vision", "algebra": "algebra"}
ALGEBRA = "`python -m experiments.algebra --data-dir glue`"
COMBINED = {
    "seed 0": "one seed",
    "seed 1": "another",
    "mean of both seeds, heads too": "the mean of both thetas (and heads)",
    "sum of both tasks": "plus the other task's theta",
}
HEADS = "| | GPart | Uni-LoRA | LoRA | compare | command |"


def read(name: str) -> dict[str, Any]:
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run experiments.{SCRIPTS[name]} first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def loss(cell: dict[str, Any]) -> float:
    """Of an answer's token; nan if the run diverged."""
    if not cell["test"]:
        return math.nan
    return float(next(iter(cell["test"].values()))["loss"])


def accuracy(cell: dict[str, Any]) -> float:
    return math.nan if cell["test"] is None else 100 * float(cell["test"])


def spread(values: list[float], digits: int) -> str:
    """Median ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{deviation}"


def chosen(content: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The cells of a method at its learning rate; none if it was not run."""
    names = content["chosen"].get(method, {"cells": []})["cells"]
    return [content["cells"][name] for name in names]


def row(name: str, values: dict[str, str], command: str = "") -> str:
    columns = " | ".join(values.get(method, "") for method in METHODS)
    return f"| {name} | {columns} | {command} |"


def language(content: dict[str, Any]) -> list[str]:
    steps, d = content["settings"]["max_steps"], content["settings"]["d"]
    texts = {"head": f"{loss(content['cells']['none']):.4f}, pretrained"}
    for method in METHODS:
        if cells := chosen(content, method):
            texts[method] = spread([loss(cell) for cell in cells], 4)
    name = f"SmolLM2-135M on GSM8K, {steps} steps, {d:,} trained"
    command = "`python -m experiments.train_math --train … --test … --bf16`"
    return [row(f"{name}: loss of an answer's token", texts, command)]


def vision(content: dict[str, Any]) -> list[str]:
    texts = {
        method: spread([accuracy(cell) for cell in cells], 1)
        for method in METHODS
        if (cells := chosen(content, method))
    }
    texts["head"] += ", head alone"
    name = f"a small ViT on turned digits, {content['settings']['d']:,} trained"
    command = "`python -m experiments.train_vision`"
    return [row(f"{name}: accuracy in percent", texts, command)]


def algebra(content: dict[str, Any]) -> list[str]:
    found = {name: cell["found"] for name, cell in content["cells"].items()}
    ratios = {}
    for method in ("gpart", "lora"):
        pairs = found["geometry"][method].values()
        both = [p["coordinates"]["distance"] / p["update"]["distance"] for p in pairs]
        ratios[method] = f"{min(both):.3f} to {max(both):.3f}"
    name = "distance of two adapters: of what is trained / of the updates"
    lines = [row(name, ratios, ALGEBRA)]
    gauge = found["gauge"]
    moved = gauge["c = 10"]["factors"]["distance"] / gauge["norms"]["factors"]
    name = "(B, A) to (10 B, A/10), the same update: distance, in norms of (B, A)"
    lines.append(row(name, {"lora": f"{moved:.1f}"}))
    for task, metric in (("stsb", "STS-B, Pearson"), ("sst2", "SST-2, accuracy")):
        one = found["combine"][task]
        alone = f"{one['head of seed 0 alone']:.3f}, head alone"
        for what, name in COMBINED.items():
            head = alone if what == "seed 0" else ""
            texts = {"gpart": f"{one[what]:.3f}", "head": head}
            lines.append(row(f"{metric}: {name}", texts))
    for source, rows in found["project"].items():
        near, whole = rows[f"d = {content['settings']['d']:,}"], rows["all of it"]
        head = f"{whole['metric']:.3f}, not projected"
        share = f"{100 * near['norm']:.0f} % of its norm"
        name = f"STS-B: {source}, projected ({share})"
        lines.append(row(name, {"gpart": f"{near['metric']:.3f}", "head": head}))
    nested = found["nest"]
    d, coarse, steps = (content["settings"][key] for key in ("d", "coarse", "steps"))
    head = f"{nested['before']:.3f}, before"
    name = f"STS-B: d = {coarse:,} embedded in {d:,}"
    lines.append(row(name, {"gpart": f"{nested['embedded']:.3f}", "head": head}))
    went_on = nested[f"{steps} steps more at d = {d:,}"]
    stayed = nested[f"{steps} steps more at d = {coarse:,}"]
    head = f"{stayed:.3f}, not embedded"
    name = f"{steps} steps more there"
    lines.append(row(name, {"gpart": f"{went_on:.3f}", "head": head}))
    return lines


def margins() -> str:
    """GPart minus each other method, a seed at a time: mean ± standard deviation."""
    lines = ["| GPart minus | Uni-LoRA | LoRA | head alone |", "|---|---|---|---|"]
    for name, content, score, digits in (
        ("SmolLM2: loss", read("math"), loss, 4),
        ("ViT: accuracy in percent", read("vision"), accuracy, 1),
    ):
        own, texts = [score(cell) for cell in chosen(content, "gpart")], []
        for method in METHODS[1:]:
            other, text = [score(cell) for cell in chosen(content, method)], ""
            if other:
                pairs = [a - b for a, b in zip(own, other, strict=True)]
                mean, deviation = statistics.mean(pairs), statistics.stdev(pairs)
                text = f"{mean:+.{digits}f} ± {deviation:.{digits}f}"
            texts.append(text)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def table() -> str:
    lines = [HEADS, "|---" * (len(METHODS) + 2) + "|"]
    for name, part in (("math", language), ("vision", vision), ("algebra", algebra)):
        lines += part(read(name))
    return "\n".join(lines)


def main() -> None:
    parts = ("# Beyond GLUE", "`python -m experiments.beyond`", table(), margins())
    text = "\n\n".join(parts) + "\n"
    (HERE / "results" / "beyond.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
