# SPDX-License-Identifier: Apache-2.0
"""What a training step sends and what a device holds: formulas, and their check.

    python -m experiments.scaling       # half a minute; results/scaling.{json,md}

With A parameters in the model, A_root of them outside its layers, N adapted weights and
T trained numbers (GPart: d; LoRA: r (in + out) for each matrix; full fine-tuning: A),
in bytes:

    DDP reduce   4 T                           gradients, all-reduced
    FSDP gather  4 (A - A_root) + 2 A_root     bf16; layers in both passes, root once
    FSDP reduce  2 T, GPart 4 d                bf16; theta is no shard, stays float32
    state, full  4 A + 12 A                    12: gradient, Adam's moments in float32
      LoRA       b A + 4 T + 12 T              its factors in float32
      GPart      b A + 4 d + 12 d + 4 (N + d)  theta, and group ids and scale
    DDP buckets  4 T                           on top of the state

where a frozen weight has b = 4 bytes, or 2 in bf16. FSDP divides by its W devices what
it shards: not theta, not the ids. Of what is gathered or scattered a device sends
(W - 1) / W, of what is all-reduced twice that. Activations come on top, and full
fine-tuning keeps more of them.

RoBERTa-base confirms: DDP and FSDP2 run one step with torch's fake process group of 8,
and every collective call is counted; the state, of one device in float32, is the sum of
all storages alive between the optimizer's step and zero_grad. FSDP's shares of the
state and DDP's buckets are not counted. The 8B and 70B models are on the meta device.
"""

import argparse
import gc
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.bench import MODELS, build

HERE = Path(__file__).resolve().parent
WORLD, RANK = 8, 8  # devices of FSDP; LoRA's r
SIDES = ("gpart", "lora", "full")
LLAMA = {  # width, layers, width inside the MLP
    "Llama 3 8B": (4096, 32, 14336),
    "Llama 3 70B": (8192, 80, 28672),
}


def sizes(model: nn.Module, targets: list[str], d: int) -> dict[str, int]:
    """A, A_root, N, d and LoRA's T of a model, which may be on the meta device."""
    numel = {name: w.numel() for name, w in model.named_parameters()}
    root = sum(n for name, n in numel.items() if ".layer" not in name)
    ends = tuple(f".{target}.weight" for target in targets)
    adapted = [w for name, w in model.named_parameters() if name.endswith(ends)]
    N = sum(w.numel() for w in adapted)
    lora = sum(RANK * sum(w.shape) for w in adapted)
    return {"A": sum(numel.values()), "A_root": root, "N": N, "d": d, "lora": lora}


def trained(side: str, s: dict[str, int]) -> int:
    return {"gpart": s["d"], "lora": s["lora"], "full": s["A"]}[side]


def formulas(
    side: str, s: dict[str, int], frozen: int, world: int = 1
) -> dict[str, float]:
    """The docstring's bytes."""
    A, N, d, T = s["A"], s["N"], s["d"], trained(side, s)
    gathered = A + (s["lora"] if side == "lora" else 0)
    state = {
        "gpart": frozen * A / world + 4 * d + 12 * d + 4 * (N + d),
        "lora": (frozen * A + 4 * T + 12 * T) / world,
        "full": (4 * A + 12 * A) / world,
    }
    return {
        "ddp_reduce": 4 * T,
        "fsdp_gather": 4 * (gathered - s["A_root"]) + 2 * s["A_root"],
        "fsdp_reduce": (4 if side == "gpart" else 2) * T,
        "state": state[side],
    }


def sent(side: str, row: dict[str, float]) -> dict[str, float]:
    """By each device: (W - 1) / W of a gather or scatter, twice for an all-reduce."""
    share = (WORLD - 1) / WORLD
    return {
        "ddp_sent": 2 * share * row["ddp_reduce"],
        "fsdp_gather_sent": share * row["fsdp_gather"],
        "fsdp_reduce_sent": (2 if side == "gpart" else 1) * share * row["fsdp_reduce"],
    }


class Wire(TorchDispatchMode):
    """Counts the bytes of each collective call: of all that is gathered or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gather": 0, "reduce": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            tensors = [args[0], args[1]] if "_base_" in name else list(args[0])
            size = max(t.numel() * t.element_size() for t in tensors)
            self.bytes["gather" if "gather" in name else "reduce"] += size
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    ids = torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
    if optimizer:
        optimizer.step()


def measured(side: str, name: str) -> dict[str, float]:
    """The same bytes, counted."""
    before = alive()
    model = build(side, name, "cpu")
    trainable = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6)
    step(model, optimizer)
    state = alive() - before
    result: dict[str, float] = {"state": state}
    optimizer.zero_grad()

    ddp, sent = DistributedDataParallel(model), []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().nbytes)
        (done := torch.futures.Future()).set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, count)
    step(ddp)
    result["ddp_reduce"] = sum(sent)

    model = build(side, name, "cpu")
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ignored = set()
    if side == "gpart":
        theta = model.gpart.theta
        ignored.add(theta)
        theta.register_post_accumulate_grad_hook(lambda w: dist.all_reduce(w.grad))
    for path, module in model.named_modules():
        if path.split(".")[-2:-1] == ["layer"]:
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    with Wire() as wire:
        step(model)
    return result | {f"fsdp_{key}": size for key, size in wire.bytes.items()}


def alive() -> int:
    """Bytes of all tensor storages that Python can reach."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def check(counted: dict[str, float], formula: dict[str, float]) -> None:
    """Each figure within 0.1 %: FSDP pads, a few small buffers are in no formula."""
    for key, value in formula.items():
        if abs(counted[key] / value - 1) > 1e-3:
            raise ValueError(f"{key}: counted {counted[key]:,}, formula says {value:,}")


def table(models: dict[str, Any]) -> str:
    """What one device sends in a step, and what it holds."""
    lines = [
        "| model | method | trained | DDP sends | DDP holds | FSDP sends, weights |"
        " gradients | FSDP holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for side, row in model["rows"].items():
            cells = [name, side, f"{row['trained']:,}"]
            cells += [size(row[key]) for key in ("ddp_sent", "state_ddp")]
            cells += [size(row[f"fsdp_{key}_sent"]) for key in ("gather", "reduce")]
            lines.append(f"| {' | '.join(cells)} | {size(row['state'])} |")
    return "\n".join(lines)


def size(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n > 1e9 else f"{n / 1e6:,.1f} MB"


def report(confirmed: dict[str, Any], models: dict[str, Any]) -> str:
    lines = [
        "| RoBERTa-base, fp32 | figure | formula, bytes | counted | off by |",
        "|---|---|---|---|---|",
    ]
    for side, row in confirmed.items():
        for key, value in row["formula"].items():
            counted = row["counted"][key]
            off = f"{100 * (counted / value - 1):.3f} %"
            lines.append(f"| {side} | {key} | {value:,.0f} | {counted:,} | {off} |")
    ran_on = f"torch {torch.__version__}, CPU, a fake process group of {WORLD}"
    return f"""# What a training step sends and what a device holds

`python -m experiments.scaling`, {ran_on}.

```text
{formula_text()}
```

## Llama 3 on {WORLD} devices: q, k, v and o in bf16, LoRA of rank {RANK}

{table(models)}

## The formulas, confirmed where they can be run

{chr(10).join(lines)}
"""


def formula_text() -> str:
    """The docstring from its third paragraph on."""
    return "\n\n".join((__doc__ or "").strip().split("\n\n")[2:-1])


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    small = sizes(build("full", "roberta-base", "cpu"), ["query", "value"], 23040)
    confirmed = {}
    for side in SIDES:
        formula, counted = formulas(side, small, 4), measured(side, "roberta-base")
        check(counted, formula)
        confirmed[side] = {"formula": formula, "counted": counted}
        print(side, confirmed[side])
    models: dict[str, Any] = {}
    for name, (width, layers, inside) in LLAMA.items():
        config = transformers.LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=inside,
            num_attention_heads=width // 128,
            num_key_value_heads=8,
            vocab_size=128256,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        s = sizes(model, MODELS["qwen2.5-0.5b"]["target_modules"], 524288)
        rows = {}
        for side in SIDES:
            row = {"trained": trained(side, s), **formulas(side, s, 2, WORLD)}
            row["state_ddp"] = formulas(side, s, 2)["state"] + row["ddp_reduce"]
            rows[side] = row | sent(side, row)
        models[name] = {**s, "rows": rows}
    text = report(confirmed, models)
    (HERE / "results" / "scaling.md").write_text(text, encoding="utf-8")
    print(text)
    result = {
        "confirmed": {"RoBERTa-base": {**small, "rows": confirmed}},
        "models": models,
        **{m.__name__: m.__version__ for m in (torch, transformers)},
        "device": f"CPU {platform.machine()}, fake process group of {WORLD}",
    }
    text = json.dumps(result, indent=2) + "\n"
    (HERE / "results" / "scaling.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
