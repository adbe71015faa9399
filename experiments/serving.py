# SPDX-License-Identifier: Apache-2.0
"""Serving many adapters from one model: seconds for a swap, bytes for a thousand.

    python -m experiments.serving       # two minutes; writes results/serving.json

RoBERTa-base with random weights, query and value; GPart with d = 23,040 beside PEFT's
LoRA of rank 8. All sides alternate in one process; the figures are medians. A swap goes
to an adapter that is

    file     on disk: read, checked, in place of the one before
    memory   kept in memory already: theta copied, or PEFT's set_adapter
    merged   kept in memory, while the model serves with merged weights: unmerge,
             swap, merge

and the forward passes of one sequence of 1, 16 and 128 tokens are what a request pays
then: an attached GPart rebuilds W + P theta whatever the number of tokens.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import transformers

import gpart
from experiments.bench import build

HERE = Path(__file__).resolve().parent
ROUNDS, LENGTHS = 25, (1, 16, 128)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    g, lora = (build(side, "roberta-base", "cpu").eval() for side in ("gpart", "lora"))
    plain = build("full", "roberta-base", "cpu").eval()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 100, (1, max(LENGTHS)), generator=draw)
    with tempfile.TemporaryDirectory() as folder:
        gpart.save(g, file := f"{folder}/gpart.safetensors")
        lora.save_pretrained(f"{folder}/lora")
        lora.load_adapter(f"{folder}/lora", "other")
        sizes = {
            "gpart": Path(file).stat().st_size,
            "lora": Path(f"{folder}/lora/adapter_model.safetensors").stat().st_size,
        }
        merged_g = build("gpart", "roberta-base", "cpu")
        gpart.merge(merged_g.eval())
        merged_lora = build("lora", "roberta-base", "cpu")
        merged_lora.load_adapter(f"{folder}/lora", "other")
        merged_lora.eval().merge_adapter(["default"])
        theta, names = torch.randn(g.gpart.theta.shape), ["default", "other"]
        turn = 0

        def lora_file() -> None:
            lora.set_adapter("default")
            lora.delete_adapter("other")
            lora.load_adapter(f"{folder}/lora", "other")
            lora.set_adapter("other")

        def gpart_merged() -> None:
            gpart.unmerge(merged_g)
            merged_g.gpart.theta.data.copy_(theta)
            gpart.merge(merged_g)

        def lora_merged() -> None:
            merged_lora.unmerge_adapter()
            merged_lora.set_adapter(names[turn % 2])
            merged_lora.merge_adapter([names[turn % 2]])

        actions: dict[str, Callable[[], object]] = {
            "file gpart": lambda: gpart.load(g, file),
            "file lora": lora_file,
            "memory gpart": lambda: g.gpart.theta.data.copy_(theta),
            "memory lora": lambda: lora.set_adapter(names[turn % 2]),
            "merged gpart": gpart_merged,
            "merged lora": lora_merged,
        }
        models = {"plain": plain, "gpart": g, "lora": lora}
        models |= {"merged gpart": merged_g, "merged lora": merged_lora}
        for name, model in models.items():
            for n in LENGTHS:
                actions[f"forward {name}, {n}"] = partial(model, tokens[:, :n])
        times: dict[str, list[float]] = {name: [] for name in actions}
        order = [*actions]
        for turn in range(-2, ROUNDS):
            random.Random(turn).shuffle(order)
            for name in order:
                with torch.set_grad_enabled("lora" in name and "forward" not in name):
                    start = time.perf_counter()  # PEFT's swaps set requires_grad
                    actions[name]()
                    seconds = time.perf_counter() - start
                if turn >= 0:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {}
    for name in models:
        for n in LENGTHS:
            own, bare = (times[f"forward {which}, {n}"] for which in (name, "plain"))
            pairs = zip(own, bare, strict=True)
            ratios[f"{name}, {n}"] = statistics.median(a / b for a, b in pairs)
    print("| | from file, ms | from memory, ms | merged, ms | 1,000 files, MB |")
    print("|---|---|---|---|---|")
    for side, size in sizes.items():
        swaps = [medians[f"{what} {side}"] for what in ("file", "memory", "merged")]
        row = [f"{seconds * 1e3:.3g}" for seconds in swaps]
        print(f"| {side} | {' | '.join(row)} | {size / 1e3:,.0f} |")
    print(f"\n| forward / plain | {' | '.join(f'{n} tokens' for n in LENGTHS)} |")
    print("|---" * (1 + len(LENGTHS)) + "|")
    for name in models:
        row = [f"{ratios[f'{name}, {n}']:.2f}" for n in LENGTHS]
        print(f"| {name} | {' | '.join(row)} |")
    result = {
        "seconds": medians,
        "forward_to_plain": ratios,
        "file_bytes": sizes,
        "rounds": ROUNDS,
        **{m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
    }
    text = json.dumps(result, indent=2) + "\n"
    (HERE / "results" / "serving.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
