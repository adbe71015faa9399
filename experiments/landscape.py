# SPDX-License-Identifier: Apache-2.0
"""The loss around a trained solution (Figure 4, right), in numbers.

    python -m experiments.landscape --data-dir glue

all-MiniLM-L6-v2 on STS-B, GPart and Uni-LoRA at d = 23,040, each trained by
train_glue.py at its best rate of glue_table.py, with three seeds. The loss is the mean
squared error on the first 256 rows of the validation set, as a function of the vector
theta alone; the head stays.

    grid     theta + x |theta| u + y |theta| v for two random unit vectors u, v of R^d
             and x, y in -1..1: 9 x 9 points, three seeds of directions
    ratio    largest over smallest curvature u^T H u of 32 random unit directions u,
             which says nothing where one of them is not positive; spread, their
             deviation over their mean
    top      the five largest eigenvalues of the Hessian H (Lanczos, scipy's eigsh)
    moved    |J u|, how far the weights move for a unit step along u, also along the
             eigenvectors: 1 for GPart, measured for both; and curvature per squared
             weight distance, u^T H u / |J u|^2, which does not depend on the units
             of theta

H is that of the plain path: fused=False, and attention by plain products, for second
derivatives. Writes results/landscape.json and results/landscape.md; a solution that is
in the first is not measured again.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpart
import train_glue
from experiments import glue_table as glue
from experiments import runs

HERE = Path(__file__).resolve().parent
METHODS = ("gpart", "unilora")
ROWS, SIDE, DIRECTIONS, SEEDS = 256, 9, 32, (0, 1, 2)
SETTINGS = {"rows": ROWS, "side": SIDE, "directions": DIRECTIONS}
SETTINGS |= {"seeds": [*SEEDS], "d": glue.D}


class Loss:
    """A trained model's validation loss as a function of theta."""

    def __init__(self, args: argparse.Namespace, method: str, seed: int) -> None:
        rate = glue.best_rate(method)
        if rate is None:
            hint = "run experiments.glue_table first"
            raise SystemExit(f"{method} has no rate yet: {hint}")
        results, command, output = glue.trained(args, "stsb", method, rate, seed)
        self.metric = results["median"]
        args = train_glue.parser().parse_args(command)
        rows = train_glue.read_data(args)[1][:ROWS]
        model = train_glue.load_adapter(args, output / "adapter.safetensors").eval()
        if method == "gpart":  # the plain path can be differentiated twice
            theta, manifest = model.gpart.theta.detach(), model.gpart.manifest
            gpart.detach(model)
            gpart.attach(model, glue.D, target_modules=args.target_modules, fused=False)
            assert model.gpart.manifest == manifest
            model.gpart.theta.data.copy_(theta)
            self.theta = model.gpart.theta
        else:
            self.theta = next(p for n, p in model.named_parameters() if "theta_d" in n)
        self.model, self.start = model, self.theta.detach().clone()
        path = train_glue.model_path(args.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        accelerator = accelerate.Accelerator(cpu=True)
        task = train_glue.TASKS["stsb"]
        bench = train_glue.Bench(args, task, tokenizer, accelerator)
        self.batches = [bench.encode(rows[at : at + 64]) for at in range(0, ROWS, 64)]

    def mean(self) -> torch.Tensor:
        return torch.stack([self.model(**batch).loss for batch in self.batches]).mean()

    @torch.no_grad()
    def at(self, theta: torch.Tensor) -> float:
        self.theta.copy_(theta)
        loss = float(self.mean())
        self.theta.copy_(self.start)
        return loss

    def hessian(self, u: torch.Tensor) -> torch.Tensor:
        """H u at the trained theta."""
        total = torch.zeros_like(u)
        with sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                loss = self.model(**batch).loss / len(self.batches)
                (grad,) = torch.autograd.grad(loss, self.theta, create_graph=True)
                total += torch.autograd.grad(grad @ u, self.theta)[0]
        return total

    @torch.no_grad()
    def moved(self, u: torch.Tensor, step: float = 1e-3) -> float:
        """|J u|: how far the weights move for a unit step of theta along u."""
        total = 0.0
        for module in self.model.modules():
            peft = hasattr(module, "get_delta_weight")
            if not peft and not isinstance(module, gpart.Adapted):
                continue
            ends = []
            for sign in (1, -1):
                self.theta.copy_(self.start + sign * step * u)
                w = module.get_delta_weight("default") if peft else module.weight
                ends.append(w)
            total += float(((ends[0] - ends[1]) / (2 * step)).square().sum())
        self.theta.copy_(self.start)
        return total**0.5


def unit(d: int, seed: int) -> torch.Tensor:
    u = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


def measure(loss: Loss) -> dict[str, Any]:
    start, d, size = loss.start, len(loss.start), float(loss.start.norm())
    steps = np.linspace(-1, 1, SIDE).tolist()
    grids = []
    for seed in SEEDS:
        u, v = unit(d, 2 * seed), unit(d, 2 * seed + 1)
        grid = [[loss.at(start + size * (x * u + y * v)) for x in steps] for y in steps]
        grids.append(grid)
        print(f"grid {seed}", flush=True)
    curvatures, lengths = [], []
    for seed in range(100, 100 + DIRECTIONS):
        u = unit(d, seed)
        curvatures.append(float(u @ loss.hessian(u)))
        lengths.append(loss.moved(u))

    def times_hessian(x: Any) -> Any:
        return loss.hessian(torch.from_numpy(x).float().flatten()).numpy()

    operator = LinearOperator((d, d), times_hessian, dtype="f4")
    first = unit(d, 0).numpy()
    top, vectors = eigsh(operator, k=5, which="LA", v0=first, tol=1e-2)
    top, vectors = top[::-1].tolist(), vectors.T[::-1].copy()  # the largest first
    along = [loss.moved(torch.from_numpy(v)) for v in vectors]
    scaled = [c / n**2 for c, n in zip(curvatures, lengths, strict=True)]
    return {
        "metric": loss.metric,
        "loss": loss.at(start),
        "norm of theta": size,
        "grids": grids,
        "curvatures": curvatures,
        "ratio": max(curvatures) / min(curvatures) if min(curvatures) > 0 else None,
        "spread": statistics.stdev(curvatures) / statistics.mean(curvatures),
        "moved": lengths,
        "curvature per weight distance": sum(scaled) / len(scaled),
        "top": top,
        "moved along top": along,
        "top per weight distance": [c / n**2 for c, n in zip(top, along, strict=True)],
    }


def rises(cell: dict[str, Any]) -> list[float]:
    """Mean loss on a grid minus the solution's, for each seed of directions."""
    return [float(np.mean(grid)) - float(cell["loss"]) for grid in cell["grids"]]


def table(cells: dict[str, dict[str, Any]]) -> str:
    """A column for each method, with a number for each seed of training; their ratios.

    A row that compares has the second method's numbers over the first one's.
    """

    def text(values: list[Any]) -> str:
        return ", ".join(x if isinstance(x, str) else f"{x:.3g}" for x in values)

    def row(
        name: str, value: Callable[[dict[str, Any]], Any], compare: bool = False
    ) -> str:
        a, b = ([value(cells[f"{method}-{k}"]) for k in SEEDS] for method in METHODS)
        ratios = [y / x for x, y in zip(a, b, strict=True)] if compare else []
        return f"| {name} | {text(a)} | {text(b)} | {text(ratios)} |"

    def ratio(cell: dict[str, Any]) -> Any:
        negative = sum(c <= 0 for c in cell["curvatures"])
        return cell["ratio"] or f"{negative} not positive"

    def span(cell: dict[str, Any]) -> str:
        return f"{min(cell['moved']):.3g} to {max(cell['moved']):.3g}"

    def mean(cell: dict[str, Any]) -> float:
        return statistics.mean(cell["curvatures"])

    def rise(cell: dict[str, Any]) -> float:
        return statistics.mean(rises(cell))

    def scaled(cell: dict[str, Any]) -> Any:
        return cell["curvature per weight distance"]

    def scaled_top(cell: dict[str, Any]) -> Any:
        return cell["top per weight distance"][0]

    a, b = (glue.NAMES[method] for method in METHODS)
    lines = [
        f"| seeds {', '.join(map(str, SEEDS))} | {a} | {b} | {b} / {a} |",
        "|---|---|---|---|",
        row("Pearson, all of the validation set", lambda c: c["metric"]),
        row(f"loss, {ROWS} rows", lambda c: c["loss"]),
        row("norm of theta", lambda c: c["norm of theta"]),
        row("mean rise of the loss on the grid", rise, True),
        row("its deviation over directions", lambda c: statistics.stdev(rises(c))),
        row("largest loss on the grid", lambda c: float(np.max(c["grids"])), True),
        row(f"curvature, mean of {DIRECTIONS} directions", mean, True),
        row("largest / smallest of them", ratio),
        row("their deviation / mean", lambda c: c["spread"]),
        row("largest eigenvalue", lambda c: c["top"][0], True),
        row("largest eigenvalue / mean curvature", lambda c: c["top"][0] / mean(c)),
        row("weights moved by a unit step, random direction", span),
        row("weights moved, top eigenvector", lambda c: c["moved along top"][0]),
        row("curvature per squared weight distance, mean", scaled, True),
        row("the same, top eigenvector", scaled_top, True),
    ]
    return "\n".join(lines)


def spectra(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each solution, with all the eigenvalues."""
    heads = {
        "five largest eigenvalues": "top",
        "weights moved along them": "moved along top",
        "curvature per squared weight distance": "top per weight distance",
    }
    lines = [f"| method | seed | {' | '.join(heads)} |"]
    lines.append("|---" * (2 + len(heads)) + "|")
    for method, seed in itertools.product(METHODS, SEEDS):
        cell = cells[f"{method}-{seed}"]
        texts = [", ".join(f"{x:.3g}" for x in cell[key]) for key in heads.values()]
        lines.append(f"| {glue.NAMES[method]} | {seed} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of GLUE's TSV files")
    work = "folder of glue_table.py's runs"
    parser.add_argument("--work", default="runs/glue", help=work)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = runs.Record(HERE / "results" / "landscape.json", SETTINGS)

    def measured(method: str, seed: int) -> dict[str, Any]:
        return measure(Loss(args, method, seed))

    for seed, method in itertools.product(SEEDS, METHODS):
        record.cell(f"{method}-{seed}", functools.partial(measured, method, seed))
    cells = record.content["cells"]
    text = f"""# The loss around a trained solution

`python -m experiments.landscape --data-dir glue`: {record.ran_on}; STS-B.
d = {glue.D:,}, {len(SEEDS)} seeds of training, with each {len(SEEDS)} of directions.

{table(cells)}

{spectra(cells)}
"""
    (HERE / "results" / "landscape.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
