# SPDX-License-Identifier: Apache-2.0
"""The figure of P: a small network's weights by group, theta, P and P^T P = I.

    python -m experiments.figure_of_P        # writes experiments/figures/P.png

Everything in it is read from an adapter that gpart.attach has made. Alt text:

    The 28 weights of two layers, each with the colour and the number of its group, one
    of five dealt at random over both layers. They are w0 + P theta: P has 28 rows with
    one coloured entry each, theta five numbers. P^T P is the five by five identity.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import nn

from gpart import GPart, attach

PATH = Path(__file__).parent / "figures" / "P.png"
# From Okabe and Ito: colour-blind readers tell them apart, and cells have numbers too.
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7"]
EMPTY = "#F0F0F0"


def example() -> GPart:
    """An adapter of d = 5 on a network of two layers."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return attach(net, d=5, target_modules="all-linear")


def cells(
    axis: Axes,
    corner: tuple[float, float],
    rows: Iterable[Iterable[tuple[str, str]]],
    height: float = 1.0,
) -> None:
    """A matrix of (colour, text), its upper left corner at corner, cells one wide."""
    x, y = corner
    for i, row in enumerate(rows):
        for j, (color, text) in enumerate(row):
            at = x + j, y + i * height
            box = Rectangle(at, 1, height, facecolor=color, edgecolor="white")
            axis.add_patch(box)
            middle = at[0] + 0.5, at[1] + height / 2
            axis.text(*middle, text, ha="center", va="center", size=10)


def draw(adapter: GPart, path: Path) -> None:
    P = adapter.partition
    dense = P.dense()
    figure, axis = plt.subplots(figsize=(8, 3.7), layout="constrained")

    def label(x: float, y: float, text: str, size: float = 10.5) -> None:
        axis.text(x, y, text, ha="center", va="center", size=size)

    top = 0.0
    start = 0
    for name, (rows, columns) in adapter.manifest:
        groups = P.groups(start, start + rows * columns).view(rows, columns).tolist()
        cells(axis, (0, top), [[(COLORS[j], str(j)) for j in row] for row in groups])
        label(columns / 2, top - 0.55, f"{name} [{rows}, {columns}]")
        start += rows * columns
        top += rows + 2
    label(2, -2, f"{P.N} weights $w$\nin {P.d} groups", 11.5)
    label(2, 10, r"weight $i$ moves by $\theta_j/\sqrt{n_j}$," + "\n$j$ its group")

    label(6.2, 4.5, r"$= \; w_0 \; +$", 14)

    entries = [
        [(COLORS[j] if x else EMPTY, "") for j, x in enumerate(row)]
        for row in dense.tolist()
    ]
    cells(axis, (8.4, 0), entries, height=9 / P.N)
    label(10.9, -0.55, f"[{P.N}, {P.d}]")
    label(10.9, -2, "$P$", 13)
    values = sorted({f"{x:.2f}" for x in P.scale().tolist()})
    label(10.9, 10, f"one entry a row,\n$1/\\sqrt{{n_j}}$: {' or '.join(values)}")

    label(14.2, 4.5, "·", 20)

    cells(axis, (15, 2), [[(COLORS[j], rf"$\theta_{j}$")] for j in range(P.d)])
    label(15.5, 1.45, f"[{P.d}]")
    label(15.5, -2, r"$\theta$", 13)
    label(15.5, 10, "all that\ntrains")

    gram = [
        [(COLORS[j] if x > 0.5 else EMPTY, f"{x:.0f}") for j, x in enumerate(row)]
        for row in (dense.T @ dense).tolist()
    ]
    cells(axis, (19, 2), gram)
    label(21.5, 1.45, f"[{P.d}, {P.d}]")
    label(21.5, -2, r"$P^\top P = I$", 13)
    label(21.5, 10, "an isometry:\n" + r"$\|P\theta\| = \|\theta\|$")

    axis.set(xlim=(-1.6, 24.2), ylim=(11, -3))
    axis.axis("off")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw P of a small network.")
    parser.add_argument(
        "--output", type=Path, default=PATH, help=f"default: {PATH.name}"
    )
    draw(example(), parser.parse_args().output)


if __name__ == "__main__":
    main()
