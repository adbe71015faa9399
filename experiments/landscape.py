# SPDX-License-Identifier: Apache-2.0
"""The loss around a trained solution (Figure 4, right): a picture, and numbers it
cannot fake.

    python -m experiments.landscape --data-dir glue

all-MiniLM-L6-v2 on STS-B, GPart and Uni-LoRA at d = 23,040, each trained by
train_glue.py at its best rate of glue_table.py, with three seeds. The loss is the mean
squared error on the first 256 rows of the validation set, as a function of the vector
theta alone; the head stays.

    grid     theta + x |theta| u + y |theta| v for two random unit vectors u, v of R^d and x, y in
             -1..1: 9 x 9 points, three seeds of directions; in the picture those of the
             first seed of training, with one colour scale for both methods
    ratio    largest over smallest curvature u^T H u of 32 random unit directions u, which says
             nothing where one of them is not positive; spread, their deviation over
             their mean
    top      the five largest eigenvalues of the Hessian H (Lanczos, scipy's eigsh)
    moved    |J u|, how far the weights move for a unit step along u, also along the eigenvectors:
             1 for GPart, measured for both; and curvature per squared weight distance,
             u^T H u / |J u|^2, which does not depend on the units of theta

H is that of the plain path: fused=False, and attention by plain products, for second
derivatives. Writes results/landscape.json, results/landscape.md and
figures/landscape.png; a solution that is in the first is not measured again.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import numpy as np
import torch
import transformers
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import gpart
import train_glue
from experiments import glue_table as glue
from experiments import runs

HERE = Path(__file__).resolve().parent
METHODS = ("gpart", "unilora")
ROWS, SIDE, DIRECTIONS, SEEDS = 256, 9, 32, (0, 1, 2)
SETTINGS = {
    "rows": ROWS,
    "side": SIDE,
    "directions": DIRECTIONS,
    "seeds": [*SEEDS],
    "d": glue.D,
}


class Loss:
    """A trained model's validation loss as a function of theta."""

    def __init__(self, args: argparse.Namespace, method: str, seed: int) -> None:
        rate = glue.best_rate(method)
        if rate is None:
            raise SystemExit(
                f"{method} has no rate yet: run experiments.glue_table first"
            )
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            train_glue.model_path(args.model)
        )
        bench = train_glue.Bench(
            args, train_glue.TASKS["stsb"], tokenizer, accelerate.Accelerator(cpu=True)
        )
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
            if hasattr(module, "get_delta_weight") or isinstance(module, gpart.Adapted):
                ends = []
                for sign in (1, -1):
                    self.theta.copy_(self.start + sign * step * u)
                    ends.append(
                        module.get_delta_weight("default")
                        if hasattr(module, "get_delta_weight")
                        else module.weight
                    )
                total += float(((ends[0] - ends[1]) / (2 * step)).square().sum())
        self.theta.copy_(self.start)
        return total**0.5


def unit(d: int, seed: int) -> torch.Tensor:
    u = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


def measure(loss: Loss) -> dict[str, Any]:
    d, size = len(loss.start), float(loss.start.norm())
    steps = np.linspace(-1, 1, SIDE).tolist()
    grids = []
    for seed in SEEDS:
        u, v = unit(d, 2 * seed), unit(d, 2 * seed + 1)
        grids.append(
            [
                [loss.at(loss.start + size * (x * u + y * v)) for x in steps]
                for y in steps
            ]
        )
        print(f"grid {seed}", flush=True)
    curvatures, lengths = [], []
    for seed in range(100, 100 + DIRECTIONS):
        u = unit(d, seed)
        curvatures.append(float(u @ loss.hessian(u)))
        lengths.append(loss.moved(u))
    operator = LinearOperator(
        (d, d),
        lambda x: loss.hessian(torch.from_numpy(x).float().flatten()).numpy(),
        dtype="f4",
    )
    start = unit(d, 0).numpy()
    top, vectors = eigsh(
        operator, k=5, which="LA", v0=start, tol=1e-2
    )  # the largest is last
    top, vectors = top[::-1].tolist(), vectors.T[::-1].copy()
    along = [loss.moved(torch.from_numpy(v)) for v in vectors]
    scaled = [c / n**2 for c, n in zip(curvatures, lengths, strict=True)]
    return {
        "metric": loss.metric,
        "loss": loss.at(loss.start),
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
    """A column for each method, in each a number for each seed of training; then their
    ratios."""

    def row(
        name: str, value: Callable[[dict[str, Any]], Any], compare: bool = False
    ) -> str:
        columns = [
            [value(cells[f"{method}-{seed}"]) for seed in SEEDS] for method in METHODS
        ]
        columns.append(
            [b / a for a, b in zip(*columns, strict=True)] if compare else []
        )
        texts = [
            ", ".join(x if isinstance(x, str) else f"{x:.3g}" for x in c)
            for c in columns
        ]
        return f"| {name} | {' | '.join(texts)} |"

    def ratio(cell: dict[str, Any]) -> Any:
        return (
            cell["ratio"] or f"{sum(c <= 0 for c in cell['curvatures'])} not positive"
        )

    def span(cell: dict[str, Any]) -> str:
        return f"{min(cell['moved']):.3g} to {max(cell['moved']):.3g}"

    def mean(cell: dict[str, Any]) -> float:
        return statistics.mean(cell["curvatures"])

    names = [glue.NAMES[method] for method in METHODS]
    lines = [
        f"| seeds {', '.join(map(str, SEEDS))} | {' | '.join(names)} | {' / '.join(names[::-1])} |",
        "|---" * (len(METHODS) + 2) + "|",
        row("Pearson, all of the validation set", lambda c: c["metric"]),
        row(f"loss, {ROWS} rows", lambda c: c["loss"]),
        row("norm of theta", lambda c: c["norm of theta"]),
        row(
            "mean rise of the loss on the grid",
            lambda c: statistics.mean(rises(c)),
            True,
        ),
        row("its deviation over directions", lambda c: statistics.stdev(rises(c))),
        row("largest loss on the grid", lambda c: float(np.max(c["grids"])), True),
        row(f"curvature, mean of {DIRECTIONS} directions", mean, True),
        row("largest / smallest of them", ratio),
        row("their deviation / mean", lambda c: c["spread"]),
        row("largest eigenvalue", lambda c: c["top"][0], True),
        row("largest eigenvalue / mean curvature", lambda c: c["top"][0] / mean(c)),
        row("weights moved by a unit step, random direction", span),
        row("weights moved, top eigenvector", lambda c: c["moved along top"][0]),
        row(
            "curvature per squared weight distance, mean",
            lambda c: c["curvature per weight distance"],
            True,
        ),
        row(
            "the same, top eigenvector", lambda c: c["top per weight distance"][0], True
        ),
    ]
    return "\n".join(lines)


def spectra(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each solution, with all the eigenvalues."""
    heads = {
        "five largest eigenvalues": "top",
        "weights moved along them": "moved along top",
        "curvature per squared weight distance": "top per weight distance",
    }
    lines = [
        f"| method | seed | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for method, seed in itertools.product(METHODS, SEEDS):
        cell = cells[f"{method}-{seed}"]
        texts = [", ".join(f"{x:.3g}" for x in cell[key]) for key in heads.values()]
        lines.append(f"| {glue.NAMES[method]} | {seed} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    figure, axes = plt.subplots(
        2, len(SEEDS), figsize=(8, 5), layout="constrained", sharex=True
    )
    grids = {method: np.array(results[f"{method}-0"]["grids"]) for method in METHODS}
    every = np.array(list(grids.values()))
    norm = matplotlib.colors.LogNorm(every.min(), every.max())
    for line, method in zip(axes, METHODS, strict=True):
        for axis, seed in zip(line, SEEDS, strict=True):
            grid = grids[method][seed]
            image = axis.imshow(grid, origin="lower", extent=(-1, 1, -1, 1), norm=norm)
            axis.set(title=f"{glue.NAMES[method]}, directions {seed}")
    figure.supxlabel("step along u, in norms of theta")
    figure.supylabel("step along v")
    figure.colorbar(image, ax=axes, label="validation loss (STS-B)")
    figure.savefig(HERE / "figures" / "landscape.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of GLUE's TSV files")
    parser.add_argument(
        "--work", default="runs/glue", help="folder of glue_table.py's runs"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = runs.Record(HERE / "results" / "landscape.json", SETTINGS)
    for seed, method in itertools.product(
        SEEDS, METHODS
    ):  # B023: the lambda is called at once
        record.cell(f"{method}-{seed}", lambda: measure(Loss(args, method, seed)))  # noqa: B023
    cells = record.content["cells"]
    plot(cells)
    text = f"""# The loss around a trained solution

`python -m experiments.landscape --data-dir glue`: {record.ran_on}; STS-B.
d = {glue.D:,}, {len(SEEDS)} seeds of training, with each {len(SEEDS)} of directions.

{table(cells)}

{spectra(cells)}
"""
    (HERE / "results" / "landscape.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
