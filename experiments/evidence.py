# SPDX-License-Identifier: Apache-2.0
"""Runs that decide between GPart and its rivals, with rates searched for each of them.

    python -m experiments.evidence --data-dir glue      # goes on where it stopped

The runs are those of glue_table.py (all-MiniLM-L6-v2, one CPU thread, the same steps
and rows for each task), but the partition seed is the run seed, the mean loss on the
validation rows is recorded beside the metric, and all is float32: a CPU without bf16
instructions takes far longer with bf16. A file in results/evidence/ is named for
all that varies: task, method, d, learning rate, weight decay, partition seed, run seed.
Each names the commit that it was run at. Seed 0 with partition 0 and decay 0.1 is what
glue_table.py and dimension.py ran, in bf16; those results, which have no loss, serve to
choose rates, are read from results/glue/ and are not run again.

STAGES are run in their order, as far as there are workers; what a stage runs may depend
on what those before it found. A run is on the GPU where there is one.

    rates      two more rates for GPart, its non-isometric variant and Uni-LoRA, seed 0.
               On STS-B and SST-2 five are known, and the two are a factor sqrt(3) from
               the best; on MRPC and CoLA one is known, and they are a factor 3 from it.
               From here on each method has its best rate on each task, by dev metric
    equal      GPart and Uni-LoRA at d = 23,040, ten seeds that no rate was chosen with
    undecayed  Uni-LoRA without weight decay, the same seeds
    dose       GPart and its non-isometric variant, at learning rates sqrt(N/d) apart
               (the same steps in weight space), over the dose of decay, wd * sum(lr):
               with the same wd, and with wd * sqrt(N/d), which must coincide
    exponent   more rates for other d, seed 0: how does the best rate scale with d?
    small      GPart and Uni-LoRA at d = 360 and 5,760, each at its best rate there
    sharing    SHiRA, WaveFT and C3A, which are isometric up to a constant but share no
               number between weights of different layers (C3A: of different blocks):
               five rates, seed 0, then three seeds

In every search, as long as the largest rate is the best, three times that is tried too:
a rule that came after the first results, where it was so at d <= 1,440, with
Uni-LoRA on MRPC and with SHiRA on SST-2.

The test, written down before any of these runs: GPart is better than Uni-LoRA on a task
if the 95 % confidence interval of the mean paired difference of the validation metric
(the same seed: head, order of rows, dropout), Student's t over ten seeds, lies above 0;
worse, if below; else they cannot be told apart. The same for the loss, which resolves
more. Small d and dose: the same with three seeds.
"""

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import glue_table as glue
from experiments import peers

CELLS = glue.HERE / "results" / "evidence"
TWO, RIVALS = ("gpart", "unilora"), ("gpart", "gpart-noniso", "unilora")
PAIRED = tuple(range(10, 20))
THREE = PAIRED[:3]
DOSES = (0.0, 0.3, 1.0, 3.0, 10.0)
SHRINK = math.sqrt(glue.D / glue.N)  # a step of lr moves a weight by lr / sqrt(N / d)
ISOMETRIC = ("shira", "waveft", "c3a")
# Around and beyond the two of dimension.py, and Uni-LoRA's best at 23,040 times
# sqrt(23040 / d), and 3 and 9 times that
MORE_RATES: dict[str, dict[int, tuple[float, ...]]] = {
    "gpart": {
        360: (0.04, 0.21, 0.36, 1.08),
        5760: (0.01, 0.052, 0.09, 0.27),
        92160: (0.0025, 0.0043, 0.026, 0.045),
        glue.N: (6.3e-5, 0.00019, 0.00057, 0.00099),
    },
    "unilora": {
        360: (0.0134, 0.04, 0.12),
        1440: (0.0067, 0.02, 0.06),
        5760: (0.0033, 0.01, 0.03),
    },
}


class Cell(NamedTuple):
    """A run: all that varies between two of them."""

    task: str
    method: str
    lr: float
    seed: int = 0  # of the run, and of the partition
    d: int = glue.D
    decay: float = 0.1

    @property
    def path(self) -> Path:
        size = f"d{self.d}-lr{self.lr:g}-wd{self.decay:g}"
        seeds = f"p{self.seed:02d}-seed{self.seed:02d}"
        return CELLS / f"{self.task}-{self.method}-{size}-{seeds}.json"

    @property
    def command(self) -> list[str]:
        """train_glue.py's arguments, but for the folders."""
        line = (
            f"--task {self.task} --method {self.method} --d {self.d} --lr {self.lr:g}"
        )
        line += f" --weight-decay {self.decay:g}"
        if self.method != "c3a":  # which draws nothing
            line += f" --partition-seed {self.seed}"
        line += f" --split-seed 0 --seeds {self.seed}"
        return [*line.split(), *glue.BUDGET[self.task]]

    @property
    def known(self) -> Path:
        """The file of the result: an older one where that is the same run."""
        old = glue.cell(self.task, self.method, self.lr, self.seed, self.d)
        same = self.seed == 0 and self.decay == 0.1 and old.exists()
        return old if same else self.path

    def read(self) -> dict[str, Any] | None:
        return glue.read(self.known)


def digits(x: float) -> float:
    """As a name and a command have it."""
    return float(f"{x:.4g}")


# --- Rates ---
def rates(task: str, method: str, d: int = glue.D) -> list[float]:
    """All that are tried with seed 0: as long as the largest is the best, three times
    that too; [] while the first ones are missing."""
    found = first_rates(task, method, d)
    while found and best_of([Cell(task, method, x, d=d) for x in found]) == max(found):
        found.append(digits(3 * max(found)))
    return found


def first_rates(task: str, method: str, d: int) -> list[float]:
    """Those of the plan, before a search goes on."""
    if d != glue.D:
        best = glue.best_rate(method) or 0.0
        old = {best, float(f"{best * math.sqrt(glue.D / d):.3g}")}
        return sorted({*MORE_RATES[method][d], *(old if method == "gpart" else {best})})
    if method in ISOMETRIC:
        return [digits(peers.LR[method] * 3.0**k) for k in (0, 1, -1, 2, -2)]
    five = task in ("stsb", "sst2")
    known = glue.rates(method) if five else [glue.best_rate(method) or 0.0]
    middle = best_of([Cell(task, method, rate) for rate in known])
    if middle is None:
        return []
    factor = math.sqrt(3) if five else 3.0
    return [*known, digits(middle * factor), digits(middle / factor)]


def best_of(cells: list[Cell]) -> float | None:
    """The rate with the best dev metric, the smaller of equals; a run that diverged is
    the worst; None while one is missing."""
    found = [(cell, cell.read()) for cell in cells]
    if not found or any(result is None for _, result in found):
        return None
    dev = {c.lr: -1.0 if r["dev"] is None else r["dev"] for c, r in found if r}
    return max(sorted(dev), key=lambda rate: dev[rate])


def best_rate(task: str, method: str, d: int = glue.D) -> float:
    """ValueError while a run is missing."""
    cells = [Cell(task, method, rate, d=d) for rate in rates(task, method, d)]
    if (rate := best_of(cells)) is None:
        raise ValueError(f"the rates of {method} on {task}, d = {d}, are not all there")
    return rate


def steps(task: str) -> int:
    budget = glue.BUDGET[task]
    return int(budget[budget.index("--max-steps") + 1])


def rate_sum(steps: int, lr: float) -> float:
    """The sum of the learning rate over a run: half of all, for a linear schedule with
    any warmup."""
    return lr * steps / 2


# --- Stages ---
def search(method: str, task: str, d: int = glue.D) -> list[Cell]:
    return [Cell(task, method, rate, d=d) for rate in rates(task, method, d)]


def equal(tasks: tuple[str, ...], d: int = glue.D, seeds: Any = PAIRED) -> list[Cell]:
    """Seed by seed, so that a stop leaves whole pairs."""
    best = {(t, m): best_rate(t, m, d) for t in tasks for m in TWO}
    return [Cell(t, m, best[t, m], s, d) for s in seeds for t in tasks for m in TWO]


def undecayed(task: str) -> list[Cell]:
    best = best_rate(task, "unilora")
    return [Cell(task, "unilora", best, seed, decay=0.0) for seed in PAIRED]


def dosed(task: str, dose: float, kind: str, seed: int) -> Cell:
    """kind: gpart; same, the non-isometric variant with the same wd; scaled, with wd
    sqrt(N/d)."""
    lr = best_rate(task, "gpart")
    decay = dose / rate_sum(steps(task), lr)
    if kind == "gpart":
        return Cell(task, "gpart", lr, seed, decay=digits(decay))
    decay *= 1 if kind == "same" else 1 / SHRINK
    return Cell(task, "gpart-noniso", digits(lr * SHRINK), seed, decay=digits(decay))


def doses(task: str) -> list[Cell]:
    kinds = ("gpart", "same", "scaled")
    return [dosed(task, x, kind, s) for s in THREE for x in DOSES for kind in kinds]


def sharing(task: str) -> list[Cell]:
    return [
        Cell(task, method, best_rate(task, method), seed)
        for seed in THREE
        for method in ISOMETRIC
    ]


def exponent(task: str, sizes: tuple[int, ...] = ()) -> list[Cell]:
    """sizes: all of MORE_RATES if none is given."""
    return [
        cell
        for method, more in MORE_RATES.items()
        for d in more
        if d in (sizes or more)
        for cell in search(method, task, d)
    ]


def searches(task: str, methods: tuple[str, ...]) -> list[Cell]:
    return [cell for method in methods for cell in search(method, task)]


STAGES: list[Callable[[], list[Cell]]] = [
    lambda: searches("stsb", TWO),
    lambda: equal(("stsb",)),
    lambda: searches("mrpc", TWO),
    lambda: equal(("mrpc",)),
    lambda: doses("mrpc"),
    lambda: doses("stsb"),
    lambda: exponent("stsb", (360, 5760)),
    lambda: equal(("stsb",), 360, THREE) + equal(("stsb",), 5760, THREE),
    lambda: searches("stsb", ISOMETRIC),
    lambda: sharing("stsb"),
    lambda: searches("sst2", TWO),
    lambda: equal(("sst2",)),
    lambda: exponent("stsb"),
    lambda: undecayed("stsb"),
    lambda: exponent("sst2", (360, 5760)),
    lambda: equal(("sst2",), 360, THREE) + equal(("sst2",), 5760, THREE),
    lambda: searches("sst2", ISOMETRIC),
    lambda: sharing("sst2"),
    lambda: exponent("sst2"),
    lambda: searches("cola", TWO),
    lambda: [c for t in ("stsb", "mrpc", "sst2", "cola") for c in searches(t, RIVALS)],
]


def waiting() -> list[Cell]:
    """What can run now, in the stages' order: a stage whose rates are not all there has
    to wait, and nothing else has."""
    cells: list[Cell] = []
    for stage in STAGES:
        with contextlib.suppress(ValueError):
            cells += stage()
    return [cell for cell in dict.fromkeys(cells) if not cell.known.exists()]


def main() -> None:
    args = glue.parse(__doc__, renders=False)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    spawn = multiprocessing.get_context("spawn")
    begun: set[Cell] = set()
    running: set[Any] = set()
    with concurrent.futures.ProcessPoolExecutor(args.workers, spawn) as pool:
        while True:
            free = args.workers - len(running)
            for cell in [cell for cell in waiting() if cell not in begun][:free]:
                begun.add(cell)
                running.add(pool.submit(glue.run, args, cell.path, cell.command))
            if not running:
                break
            first = concurrent.futures.FIRST_COMPLETED
            done, running = concurrent.futures.wait(running, return_when=first)
            for future in done:
                if error := future.exception():  # the others go on
                    print(error, flush=True)
    if left := waiting():
        raise SystemExit(f"{len(left)} runs failed")


if __name__ == "__main__":
    main()
