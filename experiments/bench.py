# SPDX-License-Identifier: Apache-2.0
r"""Step time, memory and file size: GPart, dense training, LoRA and its relatives.

    python -m experiments.bench                     # 17 minutes on two CPU cores
    python -m experiments.bench --device cuda --model qwen2.5-0.5b --batch 2 \
        --length 2048 --dtype bf16

A step is forward, backward, AdamW and zero_grad on fixed random tokens, of a model with
random weights, without dropout. The sides are

    dense      the target weights trained as ordinary parameters: the same matrix
               products (floor)
    gpart      one theta of d numbers, fused path
    plain      the same, fused=False: autograd through W + P theta
    unilora    peft's Uni-LoRA, rank 4, the same d
    lora       peft's LoRA, rank 8
    vera       peft's VeRA, rank 1024
    fourierft  peft's FourierFT, 1,000 frequencies a matrix
    shira      peft's SHiRA, as near to the same d as its rules allow
    waveft     peft's WaveFT, likewise
    c3a        peft's C3A, likewise
    full       every parameter trained

and four of them a second time under torch.compile; "recomputed" is with functorch's
aggressive_recomputation. All alternate in one process, in a new random order each
round, and a ratio is that of two steps in the same round; the tables have medians and
quartiles over the rounds. Peak memory is what a process that trains this side alone
grows by (CPU, not for the compiled ones), or what the side has allocated at most
(CUDA); "kept" is what the forward pass keeps for the backward pass beside parameters,
buffers and ids. GFLOP are the matrix products of one step. Without arguments it runs
the cases of its device and writes results/bench-<device>.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from torch import nn
from torch._functorch import config as functorch
from torch.utils.flop_counter import FlopCounterMode

import gpart
from experiments import peers

HERE = Path(__file__).resolve().parent
PEERS = ("unilora", "lora", "vera", "fourierft", "shira", "waveft", "c3a")
SIDES = ("dense", "gpart", "plain", *PEERS, "full")
EAGER = ("dense", "gpart", "unilora", "lora")  # of those that are compiled too
COMPILED = (*(f"{side}, compiled" for side in EAGER), "gpart, compiled, recomputed")
ENCODER = {"target_modules": ["query", "value"], "d": 23040}
DECODER = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "d": 131072}
MODELS: dict[str, dict[str, Any]] = {
    "roberta-base": {**ENCODER, "hidden_size": 768, "num_hidden_layers": 12},
    "roberta-large": {**ENCODER, "hidden_size": 1024, "num_hidden_layers": 24},
    "qwen2.5-0.5b": {**DECODER, "hidden_size": 896, "num_hidden_layers": 24},
    # for the tests
    "tiny": {**ENCODER, "d": 100, "hidden_size": 32, "num_hidden_layers": 2},
}
CASES = {  # model, batch, length, dtype
    "cpu": [("roberta-base", 8, 128, "fp32")],
    "cuda": [
        ("roberta-base", 32, 128, "bf16"),
        ("roberta-base", 32, 128, "fp32"),
        ("roberta-base", 32, 512, "bf16"),
        ("roberta-base", 32, 512, "fp32"),
        ("roberta-large", 32, 128, "bf16"),
        ("qwen2.5-0.5b", 2, 2048, "bf16"),
    ],
}


def base_model(name: str, device: str = "cpu") -> nn.Module:
    """The architecture with random weights, float32, nothing dropped out."""
    with torch.device(device):  # a GPU draws them at once
        return drawn(name)


def drawn(name: str) -> nn.Module:
    shape = {key: MODELS[name][key] for key in ("hidden_size", "num_hidden_layers")}
    h = shape["hidden_size"]
    torch.manual_seed(0)
    if name.startswith("qwen"):
        qwen = transformers.Qwen2Config(
            **shape,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            intermediate_size=4864,
            use_cache=False,
        )
        return transformers.Qwen2ForCausalLM(qwen)
    config = transformers.RobertaConfig(
        **shape,
        vocab_size=50265 if h > 32 else 100,
        num_attention_heads=max(h // 64, 1),
        intermediate_size=4 * h,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.RobertaForSequenceClassification(config)


def build(side: str, name: str, device: str) -> nn.Module:
    """The model with what one method trains; the rest, the head too, is frozen."""
    model = base_model(name, device)
    targets, d = MODELS[name]["target_modules"], MODELS[name]["d"]
    if side == "dense":
        ends = tuple(f".{target}.weight" for target in targets)
        for key, w in model.named_parameters():
            w.requires_grad_(key.endswith(ends))
    elif side in ("gpart", "plain"):
        gpart.attach(model, d, target_modules=targets, fused=side == "gpart")
    elif side != "full":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peers.config(side, model, d, targets))
    return model.to(device).train()


def adapter_bytes(side: str, model: nn.Module) -> int:
    """What the method's own save writes: the tensors' file."""
    with tempfile.TemporaryDirectory() as folder:
        if side in ("gpart", "plain"):
            gpart.save(model, f"{folder}/adapter.safetensors")
        elif isinstance(model, peft.PeftModel):
            model.save_pretrained(folder)
        else:
            named = model.named_parameters()
            trained = {name: w.detach() for name, w in named if w.requires_grad}
            safetensors.torch.save_file(trained, f"{folder}/model.safetensors")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def recomputing(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend of its own, for dynamo takes equal graphs of one backend for one."""
    from torch._inductor.compile_fx import compile_fx  # the compiler takes a while

    with functorch.patch(aggressive_recomputation=True):
        return compile_fx(graph, inputs)


class Side:
    """A model, compiled perhaps, its optimizer and one fixed batch."""

    def __init__(
        self, side: str, name: str, batch: int, length: int, dtype: str, device: str
    ):
        side, *options = side.split(", ")
        self.model, self.device = build(side, name, device), device
        self.trained = [w for w in self.model.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 100, (batch, length), generator=draw).to(device)
        labels = ids if name.startswith("qwen") else ids[:, 0] % 2
        self.batch = {"input_ids": ids, "labels": labels}
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")
        if options:  # at the first step
            self.model.compile(
                backend=recomputing if "recomputed" in options else "inductor"
            )
            self.step()

    def step(self) -> float:
        """Seconds of one training step."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        with self.autocast:
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    def kept(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, of what is new."""
        old = [*self.model.parameters(), *self.model.buffers()]
        if "gpart" in self.model._modules:
            old += self.model.gpart.ids.values()
        found = {t.untyped_storage().data_ptr(): 0 for t in old}
        alive = []  # so that no address comes twice

        def keep(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            found.setdefault(storage.data_ptr(), storage.nbytes())
            alive.append(t)
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, self.autocast:
            self.model(**self.batch).loss.backward()
        self.optimizer.zero_grad()
        return sum(found.values())


def peak(device: str) -> int:
    """Bytes at most so far, on the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(side: str, *case: Any) -> tuple[dict[str, Any], Side]:
    """Peak memory, GFLOP a step, trained numbers and size of the file; and the side."""
    device = case[-1]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the others' stay allocated
    before = peak(device)
    one = Side(side, *case)
    for _ in range(3):
        one.step()
    row = {"peak_MB": (peak(device) - before) / 1e6}
    if side in SIDES:
        with FlopCounterMode(display=False) as counter:
            one.step()
        row["GFLOP"] = counter.get_total_flops() / 1e9
        row["trained"] = sum(w.numel() for w in one.trained)
        row["bytes"] = adapter_bytes(side, one.model)
    return row, one


def measured_alone(side: str, *case: Any) -> dict[str, Any]:
    """For a process of its own."""
    return measured(side, *case)[0]


def spread(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")]


def run(
    case: tuple[str, int, int, str], device: str, rounds: int, names: list[str]
) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {side: {} for side in names}
    sides = {}
    if device == "cuda":
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # workspaces
        for side in names:
            rows[side], sides[side] = measured(side, *case, device)
    else:  # each forked from a process that has imported everything, and done no more
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["experiments.bench"])
        with ProcessPoolExecutor(1, server, max_tasks_per_child=1) as pool:
            for side in (side for side in names if side in SIDES):
                rows[side] = pool.submit(measured_alone, side, *case, device).result()
        sides = {side: Side(side, *case, device) for side in names}
    for side in (side for side in names if side in (*EAGER, *COMPILED)):
        rows[side]["kept_MB"] = sides[side].kept() / 1e6
    times: dict[str, list[float]] = {side: [] for side in names}
    order = [*names]
    for at in range(-2, rounds):  # two rounds to warm up
        random.Random(at).shuffle(order)
        for side in order:
            seconds = sides[side].step()
            if at >= 0:
                times[side].append(seconds)
        print(f"{at + 1}/{rounds}", end="\r", file=sys.stderr, flush=True)
    for side, row in rows.items():
        row["seconds"] = spread(times[side])
        floors = {"to_dense": "dense", "to_unilora": "unilora"}
        if side in COMPILED:
            floors = {"to_dense": "dense, compiled", "to_eager": side.split(", ")[0]}
        for key, floor in floors.items():
            pairs = zip(times[side], times[floor], strict=True)
            row[key] = spread([a / b for a, b in pairs])
    keys = ("model", "batch", "length", "dtype")
    return {**dict(zip(keys, case, strict=True)), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Of a case; and a second one of what was compiled, if anything was."""
    rows = result["rows"]
    eager = [side for side in rows if side not in COMPILED]
    compiled = [side for side in rows if side in COMPILED]

    def cells(row: dict[str, Any], *ratios: str) -> str:
        spreads = (row[name] for name in ratios)
        return " | ".join(f"{b:.3f} ({a:.3f}-{c:.3f})" for a, b, c in spreads)

    lines = ["{model}, {batch} x {length}, {dtype}".format(**result), ""]
    heads = ("step / dense", "step / unilora", "GFLOP", "peak, MB", "trained")
    lines.append(f"| side | {' | '.join(heads)} | file, bytes |")
    lines.append("|---|---|---|---|---|---|---|")
    for side in eager:
        row = rows[side]
        rest = (f"{row[key]:,.0f}" for key in ("GFLOP", "peak_MB", "trained", "bytes"))
        steps = cells(row, "to_dense", "to_unilora")
        lines.append(f"| {side} | {steps} | {' | '.join(rest)} |")
    if compiled:
        heads = ("step / dense, compiled", "step / not compiled", "kept, MB")
        lines += ["", f"| side | {' | '.join(heads)} | not compiled |"]
        lines.append("|---|---|---|---|---|")
    for side in compiled:
        pair = rows[side], rows[side.split(", ")[0]]
        kept = (f"{row['kept_MB']:,.1f}" for row in pair)
        steps = cells(rows[side], "to_dense", "to_eager")
        lines.append(f"| {side} | {steps} | {' | '.join(kept)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=CASES, default=best)
    one_case = "one case instead of the device's own"
    parser.add_argument("--model", choices=MODELS, help=one_case)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=30)
    eager = "leave torch.compile out, which has a minute for each of five sides"
    parser.add_argument("--eager", action="store_true", help=eager)
    default = "results/bench-<device>.json if no --model"
    parser.add_argument("--output", type=Path, help=default)
    resume = "keep the cases that the output has already"
    parser.add_argument("--resume", action="store_true", help=resume)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # PEFT's, and compilers'
    os.environ["PYTHONWARNINGS"] = "ignore"
    one = (args.model, args.batch, args.length, args.dtype)
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        **{m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "gpart": gpart.__version__,
        "python": platform.python_version(),
        "command": "python -m experiments.bench " + " ".join(sys.argv[1:]),
        "rounds": args.rounds,
        "cases": [],
    }
    path = args.output or HERE / "results" / f"bench-{args.device}.json"
    keep = args.output or not args.model
    if args.resume and path.exists():
        result["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    cases = [one] if args.model else CASES[args.device]
    for case in cases[len(result["cases"]) :]:
        first = case == cases[0] and not args.eager  # the others take too long
        names = [*SIDES, *COMPILED] if first else [*SIDES]
        result["cases"].append(run(case, args.device, args.rounds, names))
        print(table(result["cases"][-1]), end="\n\n")
        if keep:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
