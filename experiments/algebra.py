# SPDX-License-Identifier: Apache-2.0
"""Adapter algebra: theta is an exact coordinate of the update, LoRA's factors are not.

    python -m experiments.algebra --data-dir glue

all-MiniLM-L6-v2, d = 23,040. The adapters are runs of glue_table.py and dimension.py,
which run before, at their best rates by the dev split: found in --work or trained again
(4 minutes each). Metrics are on the validation set, in float32, each task with its own
head. Updates are compared as vectors of all N adapted weights, in float64. One run
each; the two seeds of a task differ in the order of the data, for LoRA in where A
starts, too.

    geometry   distances and cosines of four adapters (two tasks, two seeds) from
               theta alone and from the updates; the same for LoRA, from (B, A)
               and from B A
    combine    the mean of two seeds; the sum of two tasks; a task subtracted
    project    P^T of full fine-tuning (GPart with d = N is that) and of a merged
               LoRA: how much of the norm stays in d dimensions, and how much of
               the metric
    nest       theta of d = 5,760 embedded in d = 23,040, which leaves the update as
               it is, and trained on for 120 steps there, or where it was
    gauge      (B, A) -> (cB, A/c): the same update, other factors (the paper's
               Appendix F)

Writes results/algebra.json and results/algebra.md.
"""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import gpart
import train_glue
from experiments import dimension, runs
from experiments import glue_table as glue

HERE = Path(__file__).resolve().parent
Update = dict[str, torch.Tensor]  # {name: dW}
COARSE, STEPS = 5760, 120
SIZES = (1440, glue.D, 368640)  # to project onto


# --- Updates as vectors ---
def vector(update: Update) -> torch.Tensor:
    return torch.cat([dw.flatten() for dw in update.values()]).double()  # [N]


def combine(*terms: tuple[float, Update]) -> Update:
    """The sum of factor * update."""
    return {name: sum(c * update[name] for c, update in terms) for name in terms[0][1]}  # type: ignore[misc]


def compare(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Distance and cosine of two vectors, in float64."""
    a, b = a.double(), b.double()
    cosine = a @ b / a.norm() / b.norm()
    return {"distance": float((a - b).norm()), "cosine": float(cosine)}


def lora_factors(model: Any) -> torch.Tensor:
    """All entries of B and A as one vector."""
    named = model.named_parameters()
    return torch.cat([p.detach().flatten() for n, p in named if "lora_" in n])


def lora_update(model: Any) -> Update:
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {
        f"{n}.weight": m.get_delta_weight("default").detach() for n, m in layers.items()
    }


@torch.no_grad()
def regauge(model: Any, c: float) -> None:
    """(B, A) -> (cB, A/c) in every layer."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.mul_(c if "lora_B" in name else 1 / c)


def embed(
    theta: torch.Tensor, coarse: gpart.Partition, fine: gpart.Partition
) -> torch.Tensor:
    """theta of coarse in fine, whose groups divide its own: the same update (nesting).

    theta_fine[j] / sqrt(n_fine[j]) = theta[j mod d] / sqrt(n[j mod d])
    """
    per_weight = theta.double() * coarse.scale(dtype=torch.float64)  # [d]
    repeated = per_weight.repeat(fine.d // coarse.d)  # [k d]
    return repeated / fine.scale(dtype=torch.float64)


# --- Real adapters ---
class Study:
    """Trained adapters, and the metric of any update with a task's head."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def rate(self, method: str, d: int) -> float:
        """glue_table.py's best; for another d the better of dimension.py's two."""
        if (best := glue.best_rate(method)) is None:
            hint = "run experiments.glue_table first"
            raise SystemExit(f"the rates are not known yet: {hint}")
        if d == glue.D:
            return best
        rates = [dict(dimension.points(curve))[d] for curve in ("fixed", "scaled")]
        devs = [glue.dev("stsb", method, rate, d) for rate in rates]
        if None in devs:
            hint = "run experiments.dimension first"
            raise SystemExit(f"d = {d} has no rate yet: {hint}")
        return max(zip(devs, rates, strict=True))[1]

    def model(self, task: str, method: str, seed: int, d: int = glue.D) -> Any:
        """A trained model."""
        _, command, output = glue.trained(
            self.args, task, method, self.rate(method, d), seed, d
        )
        self.settings = train_glue.parser().parse_args(command)
        return train_glue.load_adapter(
            self.settings, output / "adapter.safetensors"
        ).eval()

    @functools.cache  # noqa: B019  one study for the whole program
    def bench(self, task: str) -> tuple[train_glue.Bench, Any, Any]:
        """What encodes and evaluates, the training rows, the validation rows."""
        command = ["--task", task, "--data-dir", self.args.data_dir]
        args = train_glue.parser().parse_args([*command, "--max-length", "64"])
        path = train_glue.model_path(args.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        accelerator = accelerate.Accelerator(cpu=True)
        rows, test_rows, _ = train_glue.read_data(args)
        train_rows, _ = train_glue.split(rows, args.split_seed, None)
        spec = train_glue.TASKS[task]
        bench = train_glue.Bench(args, spec, tokenizer, accelerator)
        return bench, train_rows, test_rows

    def metric(self, task: str, update: Update | None, head: Update) -> float:
        """The validation metric of the pretrained weights plus update, with head."""
        bench, _, test_rows = self.bench(task)
        bench.args.method = "head"
        model = train_glue.build(bench.args, seed=0)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, dw in (update or {}).items():
                own[name] += dw.float()
            for name, value in head.items():
                own[name].copy_(value)
        return bench.evaluate(model, test_rows)


def head_of(model: Any) -> Update:
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if train_glue.is_head(model, n)}


def detached(update: Update) -> Update:
    return {name: dw.detach() for name, dw in update.items()}


# --- The measurements ---
def geometry(study: Study) -> dict[str, Any]:
    four = [(task, seed) for task in ("stsb", "sst2") for seed in (0, 1)]
    result: dict[str, Any] = {}
    for method in ("gpart", "lora"):
        points, updates = {}, {}
        for task, seed in four:
            model = study.model(task, method, seed)
            if method == "gpart":
                point, update = model.gpart.theta.detach(), model.gpart.delta()
            else:
                point, update = lora_factors(model), lora_update(model)
            points[f"{task} {seed}"] = point
            updates[f"{task} {seed}"] = vector(detached(update))
        names = [*points]
        result[method] = {
            f"{a} to {b}": {
                "coordinates": compare(points[a], points[b]),
                "update": compare(updates[a], updates[b]),
            }
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }
    return result


def arithmetic(study: Study) -> dict[str, Any]:
    updates, heads = {}, {}
    for task in ("stsb", "sst2"):
        for seed in (0, 1):
            model = study.model(task, "gpart", seed)
            updates[task, seed] = detached(model.gpart.delta())
            heads[task, seed] = head_of(model)
    result: dict[str, Any] = {}
    both = [(1.0, updates["stsb", 0]), (1.0, updates["sst2", 0])]
    for task in ("stsb", "sst2"):
        head = heads[task, 0]
        mean = combine((0.5, updates[task, 0]), (0.5, updates[task, 1]))
        mean_head = combine((0.5, head), (0.5, heads[task, 1]))
        rows = {
            "seed 0": (updates[task, 0], head),
            "seed 1": (updates[task, 1], heads[task, 1]),
            "mean of both seeds, heads too": (mean, mean_head),
            "head of seed 0 alone": (None, head),
            "sum of both tasks": (combine(*both), head),
            "half the sum of both tasks": (combine(*((0.5, u) for _, u in both)), head),
            "subtracted": (combine((-1.0, updates[task, 0])), head),
        }
        result[task] = {name: study.metric(task, *row) for name, row in rows.items()}
    return result


def project(study: Study) -> dict[str, Any]:
    full, lora = study.model("stsb", "gpart", 0, glue.N), study.model("stsb", "lora", 0)
    update_of_full = detached(full.gpart.delta())
    sources = {
        "full fine-tuning of query and value": (update_of_full, head_of(full)),
        "merged LoRA": (lora_update(lora), head_of(lora)),
    }
    result: dict[str, Any] = {}
    for source, (update, head) in sources.items():
        whole = study.metric("stsb", update, head)
        nothing = study.metric("stsb", None, head)
        result[source] = {
            "all of it": {"norm": 1.0, "metric": whole},
            "none of it": {"norm": 0.0, "metric": nothing},
        }
        for d in SIZES:
            study.settings.d, study.settings.method = d, "gpart"
            g = train_glue.build(study.settings, seed=0).gpart
            update_w = vector({name: update[name] for name, _ in g.manifest})
            g.theta.data.copy_(g.partition.reduce(update_w))  # the nearest theta
            near = detached(g.delta())
            kept = float(vector(near).norm() / vector(update).norm())
            metric = study.metric("stsb", near, head)
            result[source][f"d = {d:,}"] = {"norm": kept, "metric": metric}
            result[source][f"d = {d:,}"]["sqrt(d/N)"] = math.sqrt(d / glue.N)
    return result


def go_on(model: Any, bench: train_glue.Bench, rows: Any, lr: float) -> None:
    """STEPS more steps as train_glue.py takes them, from another order of the rows."""
    groups = [
        {"params": [model.gpart.theta], "lr": lr, "weight_decay": 0.1},
        {"params": [*train_glue.trainable(model, head=True).values()], "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 7, STEPS)
    torch.manual_seed(1)  # of the dropout
    for chosen in train_glue.batches(len(rows), 32, STEPS, seed=1):
        model.train()
        model(**bench.encode([rows[i] for i in chosen])).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def nest(study: Study) -> dict[str, Any]:
    bench, train_rows, _ = study.bench("stsb")
    coarse = study.model("stsb", "gpart", 0, COARSE)
    before, head = detached(coarse.gpart.delta()), head_of(coarse)
    study.settings.d = glue.D
    fine = train_glue.build(study.settings, seed=0)
    own = dict(fine.named_parameters())
    with torch.no_grad():
        for name, value in head.items():
            own[name].copy_(value)
        theta = embed(coarse.gpart.theta, coarse.gpart.partition, fine.gpart.partition)
        fine.gpart.theta.copy_(theta)
    after = detached(fine.gpart.delta())
    off = float((vector(after) - vector(before)).norm() / vector(before).norm())
    result: dict[str, Any] = {"update changed by": off}
    result["before"] = study.metric("stsb", before, head)
    result["embedded"] = study.metric("stsb", after, head_of(fine))
    for model, d in ((coarse, COARSE), (fine, glue.D)):
        go_on(model, bench, train_rows, study.rate("gpart", d))
        metric = study.metric("stsb", detached(model.gpart.delta()), head_of(model))
        result[f"{STEPS} steps more at d = {d:,}"] = metric
    return result


def gauge(study: Study) -> dict[str, Any]:
    model = study.model("stsb", "lora", 0)
    start, update = lora_factors(model).clone(), vector(lora_update(model))
    result = {}
    for c in (0.1, 10.0):
        regauge(model, c)
        moved = {"factors": compare(start, lora_factors(model))}
        moved["update"] = compare(update, vector(lora_update(model)))
        result[f"c = {c:g}"] = moved
        regauge(model, 1 / c)
    norms = {"factors": float(start.double().norm()), "update": float(update.norm())}
    return {**result, "norms": norms}


PARTS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "geometry": geometry,
    "combine": arithmetic,
    "project": project,
    "nest": nest,
    "gauge": gauge,
}


def render(record: runs.Record) -> str:
    """results/algebra.md."""
    results = {name: cell["found"] for name, cell in record.content["cells"].items()}
    lines = ["# Adapter algebra", "", "`python -m experiments.algebra --data-dir glue`"]
    lines[-1] += f": {record.ran_on}; one run each."
    for method, what in (("gpart", "theta"), ("lora", "(B, A)")):
        lines += ["", f"## Geometry: {glue.NAMES[method]}", ""]
        columns = [f"{measure} of {what}" for measure in ("distance", "cosine")]
        lines += [f"| | {' | of the updates | '.join(columns)} | of the updates |"]
        lines += ["|---|---|---|---|---|"]
        for pair, both in results["geometry"][method].items():
            a, b = both["coordinates"], both["update"]
            cells = [f"{x[key]:.6f}" for key in ("distance", "cosine") for x in (a, b)]
            lines.append(f"| {pair} | {' | '.join(cells)} |")
    lines += ["", "## Combine", ""]
    lines += ["| | STS-B (Pearson) | SST-2 (accuracy) |", "|---|---|---|"]
    stsb, sst2 = (results["combine"][task] for task in ("stsb", "sst2"))
    lines += [f"| {name} | {stsb[name]:.3f} | {sst2[name]:.3f} |" for name in stsb]
    lines += ["", "## Project onto d dimensions (STS-B)", ""]
    lines += ["| of | onto | norm kept | sqrt(d/N) | Pearson |"]
    lines += ["|---|---|---|---|---|"]
    for source, rows in results["project"].items():
        for name, row in rows.items():
            chance = f"{row['sqrt(d/N)']:.3f}" if "sqrt(d/N)" in row else ""
            cells = [f"{row['norm']:.3f}", chance, f"{row['metric']:.3f}"]
            lines.append(f"| {source} | {name} | {' | '.join(cells)} |")
    lines += ["", f"## Nest: d = {COARSE:,} in d = {glue.D:,} (STS-B)", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in results["nest"].items()]
    lines += ["", "## Gauge: (B, A) -> (cB, A/c)", ""]
    heads = ("factors moved by, of their norm", "their cosine")
    lines += [f"| | {' | '.join(heads)} | update moved by, of its norm |"]
    lines += ["|---|---|---|---|"]
    norms = results["gauge"]["norms"]
    for c in ("c = 0.1", "c = 10"):
        row = results["gauge"][c]
        moved = {key: row[key]["distance"] / norms[key] for key in norms}
        numbers = (moved["factors"], row["factors"]["cosine"], moved["update"])
        lines.append(f"| {c} | {' | '.join(f'{x:.3g}' for x in numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of GLUE's TSV files")
    parser.add_argument(
        "--work", default="runs/glue", help="folder of glue_table.py's runs"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = {"d": glue.D, "coarse": COARSE, "steps": STEPS, "sizes": [*SIZES]}
    record = runs.Record(HERE / "results" / "algebra.json", settings)
    study = Study(args)
    for name, part in PARTS.items():
        record.cell(name, lambda: {"found": part(study)})  # noqa: B023  called at once
    text = render(record)
    (HERE / "results" / "algebra.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
