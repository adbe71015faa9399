# SPDX-License-Identifier: Apache-2.0
"""What several scripts share: a file of finished runs, transformers' Trainer."""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

import train_glue


def digest(settings: Any) -> str:
    """A short name for settings, of folders that other settings must not share."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def check(seeds: Sequence[int]) -> None:
    """ValueError for what would spoil a comparison before it begins."""
    if len({*seeds}) < len(seeds):
        hint = "a deviation needs different ones"
        raise ValueError(f"--seeds {seeds} has one twice: {hint}")
    # On several the Trainer would take DataParallel, which gpart refuses.
    if torch.cuda.device_count() > 1:
        hint = "set CUDA_VISIBLE_DEVICES to one"
        raise ValueError(f"more than one GPU is visible: {hint}")


class Trainer(transformers.Trainer):
    """transformers' own, with checkpoints of what is trained and nothing else.

    GPart does with the inherited _save too. PEFT's methods, inserted into a model, do
    not: it may write names of transformers 4, and what reads them back skips those it
    does not know, with a line in the log; Uni-LoRA's vector is shared by several
    modules, which safetensors refuses.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = train_glue.copies(self.model)
        safetensors.torch.save_file(trained, folder / "model.safetensors")


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole one: trainer_state.json is what Trainer writes last."""

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=step)) if whole else None


class Record:
    """A results file: settings, and cells, each computed once and written when done.

    .content is what the file holds; torch, device and minutes at its top are those of
    all cells. ValueError if the file is damaged, or has cells with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "cells": {}}
        if not path.exists():
            return
        hint = "delete it, or write to another file"
        try:
            self.content = json.loads(path.read_text(encoding="utf-8"))
            stored, _ = self.content["settings"], self.content["cells"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no results file ({error!r}): {hint}") from None
        if differ := [key for key in settings if settings[key] != stored.get(key)]:
            names = ", ".join(differ)
            raise ValueError(f"{path} has runs with another {names}: {hint}")

    def cell(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        cells = self.content["cells"]
        if name not in cells:
            modules = ("torch", "transformers", "peft")
            versions = {one: importlib.metadata.version(one) for one in modules}
            cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
            cpu = f"CPU {platform.machine()}, {threads} thread{'s' * (threads > 1)}"
            device = torch.cuda.get_device_name() if cuda else cpu
            began = time.monotonic()
            found = compute()
            minutes = round((time.monotonic() - began) / 60, 2)
            ran_on = {"minutes": minutes, "versions": versions, "device": device}
            cells[name] = found | ran_on
            self.write()
            print(f"{name}: {json.dumps(found)[:400]} ({minutes:g} min)", flush=True)
        return dict(cells[name])

    @property
    def ran_on(self) -> str:
        """For a table: versions, device and minutes."""
        c = self.content
        return f"torch {c['torch']}, {c['device']}, {c['minutes']:.0f} minutes"

    def write(self) -> None:
        """At any moment the file is the last whole one."""
        cells = self.content["cells"].values()
        versions = {cell["versions"]["torch"] for cell in cells}
        self.content["torch"] = "; ".join(sorted(versions))
        self.content["device"] = "; ".join(sorted({cell["device"] for cell in cells}))
        self.content["minutes"] = round(sum(cell["minutes"] for cell in cells), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1) + "\n"
        train_glue.atomically(
            self.path, lambda part: part.write_text(text, encoding="utf-8")
        )
