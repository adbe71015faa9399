# SPDX-License-Identifier: Apache-2.0
"""train_vision.py: Trainer restores an attached model, results are what was run."""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import gpart
from experiments import train_vision

TINY = {**train_vision.VIT, "hidden_size": 16, "num_hidden_layers": 1}
TINY |= {"intermediate_size": 32}
RECIPE = {"d": 64, "epochs": 4, "batch_size": 16, "accumulate": 2, "weight_decay": 0.01}
RECIPE |= {"bf16": False, "workers": 0, "target_modules": None}
METHODS = ("gpart", "head", "unilora", "lora")


@pytest.fixture(autouse=True)
def quiet_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, a folder for the data sets' cache, a ViT that pretrains in a second."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(train_vision.train_glue, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train_vision.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train_vision, "VIT", TINY)
    monkeypatch.setitem(train_vision.PRETRAIN, "vit", TINY)
    monkeypatch.setitem(train_vision.PRETRAIN, "epochs", 1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> train_vision.Job:
    """A random ViT of one layer, and few of the digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY))
    model.save_pretrained(path)
    splits = {part: rows[:96] for part, rows in train_vision.digits("turned").items()}
    args = argparse.Namespace(**RECIPE)
    return train_vision.Job(args, splits, 10, str(path), "tiny", path)


def trainer_of(
    job: train_vision.Job, method: str, folder: Path
) -> train_vision.Trainer:
    model = train_vision.build(job, method, seed=0)
    return train_vision.prepare_trainer(model, job.splits, RECIPE, folder, (0.05, 0.05))


class Killed(transformers.TrainerCallback):
    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt


class Recorder(transformers.TrainerCallback):
    """The trained tensors at each evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        trained = train_vision.train_glue.trainable(model)
        self.seen.append({name: p.detach().clone() for name, p in trained.items()})


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_resumes_to_the_same_numbers(
    job: train_vision.Job, method: str, tmp_path: Path
) -> None:
    """From Trainer's checkpoint, in a new model; one cut short is passed over."""
    whole = trainer_of(job, method, tmp_path / "whole")
    dev = train_vision.fit(whole)
    killed = trainer_of(job, method, tmp_path / "killed")
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        train_vision.fit(killed)
    (tmp_path / "killed" / "checkpoint-999").mkdir()
    resumed, recorder = trainer_of(job, method, tmp_path / "killed"), Recorder()
    resumed.add_callback(recorder)
    assert train_vision.fit(resumed) == dev
    # After the third and the fourth epoch, and at the end.
    assert len(recorder.seen) == 3
    assert resumed.state.global_step == whole.state.global_step == 4 * 3
    trained = train_vision.train_glue.trainable
    for name, p in trained(whole.model).items():
        assert torch.equal(trained(resumed.model)[name], p), name


class Plain(train_vision.Trainer):
    """With the checkpoints that Trainer itself writes, of the whole model."""

    _save = transformers.Trainer._save


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation is worse than the one before, so the first epoch is the best."""
    values = ({"accuracy": k / 100} for k in range(100, 0, -1))
    monkeypatch.setattr(train_vision, "accuracy", lambda output: next(values))


@pytest.mark.usefixtures("falling")
@pytest.mark.parametrize("method", [*METHODS, "gpart, checkpoints of Trainer's own"])
def test_best_checkpoint_is_restored(
    job: train_vision.Job, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load_best_model_at_end gives back the theta and head of the best epoch."""
    method, *own = method.split(", ")
    monkeypatch.setattr(train_vision, "Trainer", Plain if own else train_vision.Trainer)
    trainer, recorder = trainer_of(job, method, tmp_path), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    first, *_, last = recorder.seen
    adapts = any("theta" in name or "lora" in name for name in first)
    assert adapts == (method != "head")
    for name, p in train_vision.train_glue.trainable(trainer.model).items():
        assert torch.equal(p, first[name]) and not torch.equal(p, last[name]), name


def test_best_checkpoint_that_is_not_restored_is_an_error(
    job: train_vision.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fit compares the dev accuracy of the restored model with the best one's."""
    trainer = trainer_of(job, "gpart", tmp_path)
    forget = trainer.model.gpart.theta.data.zero_
    monkeypatch.setattr(trainer, "_load_best_model", forget)
    message = r"was 0\.\d+ at the best checkpoint, restored it is 0"
    with pytest.raises(RuntimeError, match=message):
        train_vision.fit(trainer)


def test_rates_are_those_of_body_and_head(
    job: train_vision.Job, tmp_path: Path
) -> None:
    """Rate zero keeps theta where it is, and the other rate moves the head."""
    trainer = trainer_of(job, "gpart", tmp_path)
    trainer.rates = (0.0, 0.05)
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert not trainer.model.gpart.theta.any()
    assert not torch.equal(trainer.model.classifier.weight, before)


def test_rows_that_are_not_finite_are_wrong() -> None:
    """Whatever argmax makes of them."""
    logits = np.array([[1.0, 0.0], [np.nan, 0.0], [np.inf, 0.0], [1.0, 0.0]])
    output = transformers.EvalPrediction(logits, np.array([0, 0, 0, 1]))
    assert train_vision.accuracy(output) == {"accuracy": 0.25}


@pytest.mark.slow
def test_adapter_that_loads_otherwise_is_an_error(
    job: train_vision.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose reloaded or merged model classifies otherwise reports nothing."""
    monkeypatch.setattr(job, "work", tmp_path)
    message = "classifies the test images otherwise"
    with monkeypatch.context() as patch:
        patch.setattr(gpart, "load", lambda model, path: None)
        with pytest.raises(RuntimeError, match=f"reloaded, {message}"):
            train_vision.run(job, "gpart", (0.05, 0.05), 0)
    with monkeypatch.context() as patch:
        patch.setattr(gpart, "merge", lambda model: model.gpart.theta.detach().neg_())
        with pytest.raises(RuntimeError, match=f"merged, {message}"):
            train_vision.run(job, "gpart", (0.05, 0.05), 0)


def test_run_that_diverges_is_a_result(
    job: train_vision.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a test accuracy: a search goes on with the other rates."""
    monkeypatch.setattr(job, "work", tmp_path)
    result = train_vision.run(job, "head", (0.0, 1e38), 0)
    assert result["test"] is None and result["dev"] == 0.0


# --- The command ---
def digits(output: Path, *more: str) -> list[str]:
    command = ["--epochs", "1", "--methods", "gpart", "--d", "64", "--lr", "0.05"]
    command += ["--head-lr", "0.05", "--work", str(output.parent)]
    return [*command, "--output", str(output), *more]


@pytest.mark.slow
def test_finished_runs_are_kept_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command had done when it died is in the file; the next runs the rest."""
    output, real, calls = tmp_path / "vision.json", train_vision.run, []

    def counted(job: Any, method: str, rates: Any, seed: int) -> Any:
        if len(calls) == 1 and seed == 1:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append(seed)
        return real(job, method, rates, seed)

    monkeypatch.setattr(train_vision, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        train_vision.main(digits(output, "--seeds", "0", "1"))
    done = json.loads(output.read_text(encoding="utf-8"))["cells"]
    assert [*done] == ["gpart-lr0.05-head0.05-seed0"]
    train_vision.main(digits(output, "--seeds", "0", "1"))
    assert calls == [0, None, 1]
    monkeypatch.delattr(train_vision, "prepare")
    before = output.read_text(encoding="utf-8")
    result = train_vision.main(digits(output, "--seeds", "0", "1"))
    assert calls == [0, None, 1] and output.read_text(encoding="utf-8") == before
    assert "nothing was trained" in capsys.readouterr().out
    again = train_vision.main(digits(output, "--seeds", "0"))
    # A row keeps the seeds it has.
    assert calls == [0, None, 1] and again["chosen"] == result["chosen"]
    values = [100 * cell["test"] for cell in result["cells"].values()]
    row = train_vision.table(result).splitlines()[-1]
    assert row.startswith("| GPart | 64 | 170 | 0.05 | 0.05 | ")
    assert f"| {sum(values) / 2:.1f} ± " in row


def test_search_is_by_the_dev_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the head's rate, then the method's own; of equals the first."""
    devs = {"head-head0.1-seed0": 0.5, "gpart-lr0.2-head0.1-seed0": 0.7}
    ran = []

    def fake(job: Any, method: str, rates: Any, seed: int) -> dict[str, Any]:
        ran.append(train_vision.cell_name(method, rates, seed))
        result = {"dev": devs.get(ran[-1], 0.4), "test": 0.1}
        result |= {"versions": {"torch": "none"}, "device": "no"}
        return result | {"trained": 1, "trained_head": 2}

    def prepared(args: Any, result: dict[str, Any]) -> bool:
        result["majority"] = 0.1
        return True

    monkeypatch.setattr(train_vision, "run", fake)
    monkeypatch.setattr(train_vision, "prepare", prepared)
    rates = ["--head-lr", "0.01", "0.1", "--lr", "0.1", "0.2", "0.4"]
    rates += ["--seeds", "0", "1"]
    train_vision.main([*digits(tmp_path / "vision.json"), *rates])
    searched = [f"gpart-lr{rate}-head0.1-seed0" for rate in (0.1, 0.2, 0.4)]
    assert ran[:2] == ["head-head0.01-seed0", "head-head0.1-seed0"]
    assert ran[2:] == [*searched, "gpart-lr0.2-head0.1-seed1"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT for colour images, and its processor."""
    folder = tmp_path_factory.mktemp("colour-vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**TINY, "num_channels": 3, "num_labels": 7})
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def paint(folder: Path, *parts: str, classes: int = 3) -> Path:
    """PNG files, 12 x 10, each class with a colour of its own."""
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.uint8}
    for part in parts:
        for k in range(classes):
            own = folder / part / f"colour{k}"
            own.mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 60, (12, 10, 3), **draw)
                pixels[..., k] += 180
                Image.fromarray(pixels.numpy()).save(own / f"{i}.png")
    return folder


def command(model: Path, data: Path | str, output: Path, *more: str) -> list[str]:
    names = ["--model", str(model), "--data", str(data), "--output", str(output)]
    recipe = ["--d", "64", "--epochs", "6", "--batch-size", "8", "--accumulate", "1"]
    recipe += ["--lr", "0.1", "--head-lr", "0.05", "--seeds", "0", "--workers", "0"]
    return [*names, *recipe, "--work", str(output.parent / "work"), *more]


@pytest.mark.slow
def test_folder_of_images_is_learnt(vit: Path, tmp_path: Path) -> None:
    """A model and its processor from a folder, three colours from PNG files."""
    data = paint(tmp_path / "colours", "train", "test")
    output = tmp_path / "colours.json"
    result = train_vision.main(command(vit, data, output, "--methods", "gpart", "head"))
    assert result["rows"] == {"train": 33, "dev": 3, "test": 36}
    assert (result["classes"], result["N"]) == (3, 512)
    assert result["majority"] == pytest.approx(1 / 3)
    assert [cell["test"] for cell in result["cells"].values()] == [1.0, 1.0]
    assert [cell["trained"] for cell in result["cells"].values()] == [64, 0]
    run = "gpart-lr0.1-head0.05-seed0"
    (adapter,) = (tmp_path / "work").glob(f"*/{run}/adapter.safetensors")
    three = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = transformers.ViTForImageClassification.from_pretrained(vit, **three)
    assert gpart.load(model, adapter).partition.d == 64
    assert not list((tmp_path / "work").glob("**/checkpoint-*"))


def test_columns_are_found_by_their_kind() -> None:
    """The only image and class columns; of several, one has to be named."""
    image, label = datasets.Image, datasets.ClassLabel
    fine, coarse = label(num_classes=9), label(num_classes=3)
    two = {"img": image(), "fine_label": fine, "coarse_label": coarse}
    two = datasets.Features(two)
    column = train_vision.column
    assert column(two, image, None, "--image-column") == "img"
    assert column(two, label, "fine_label", "--label-column") == "fine_label"
    message = r"one of the ClassLabel columns \['fine_label', 'coar"
    for given in (None, "img"):
        with pytest.raises(ValueError, match=message):
            column(two, label, given, "--label-column")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown name", "--data DDT is no folder, no OWNER/NAME and none of Oxford"),
        ("missing folder", "no folder, no OWNER/NAME and none of OxfordPets"),
        ("unreachable", "cannot load --data nobody/nothing: "),
        ("no test", "has train, but no test"),
        ("no classes", "without a class in train: a folder needs train/CLASS and test"),
        ("one class", "the data has no ClassLabel column, only image"),
        ("large d", "d must be in 1..N = 1..512, got 513"),
        ("no model", "(--model takes a name on the hub, or a folder)"),
        ("no targets", "the model has no 'nothing' but"),
        ("half", "--model and --data go together"),
        ("twice", "has one twice"),
        ("other settings", "has runs with another d, epochs: delete it, or write to"),
    ],
)
def test_errors_are_one_line(
    case: str,
    message: str,
    vit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a user can get wrong: exit status 2, and one line that says what to do."""
    output = tmp_path / "vision.json"
    good = paint(tmp_path / "good", "train", "test", classes=2)
    if case == "no classes":
        (tmp_path / "flat" / "train").mkdir(parents=True)
        (tmp_path / "flat" / "test").mkdir()
        for part in ("train", "test"):
            for k in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / "flat" / part / f"{k}.png")
    if case == "other settings":
        settings = dict.fromkeys(train_vision.SETTINGS)
        settings |= {"model": str(vit), "data": str(good), "weight_decay": 0.01}
        settings |= {"batch_size": 8, "accumulate": 1, "bf16": False}
        content = {"settings": settings, "cells": {}}
        output.write_text(json.dumps(content), encoding="utf-8")
    one = paint(tmp_path / "one", "train", "test", classes=1)
    argv = {
        "unknown name": command(vit, "DDT", output),
        "missing folder": command(vit, tmp_path / "nowhere", output),
        "unreachable": command(vit, "nobody/nothing", output),
        "no test": command(vit, paint(tmp_path / "half", "train"), output),
        "no classes": command(vit, tmp_path / "flat", output),
        "one class": command(vit, one, output),
        "large d": command(vit, good, output, "--d", "513"),
        "no model": command(tmp_path / "none", good, output),
        "no targets": command(vit, good, output, "--target-modules", "nothing"),
        "half": ["--data", "DTD"],
        "twice": command(vit, good, output, "--seeds", "0", "0"),
        "other settings": command(vit, good, output),
    }[case]
    with pytest.raises(SystemExit) as stopped:
        train_vision.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("train_vision: error: ")
    assert message in error


def test_readme_has_the_table_of_the_result_file() -> None:
    """Every number, and the versions they come from."""
    here = train_vision.HERE
    result = (here / "results" / "vision.json").read_text(encoding="utf-8")
    result = json.loads(result)
    readme = (here / "README.md").read_text(encoding="utf-8")
    assert train_vision.table(result) in readme
    for cell in result["cells"].values():
        for module, version in cell["versions"].items():
            assert f"{module} {version.partition('+')[0]}" in readme
