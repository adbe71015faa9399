# SPDX-License-Identifier: Apache-2.0
r"""What 16-bit weights leave of the update P theta, and what a float32 theta is worth.

    python train_glue.py --task stsb --data-dir glue --max-steps 180 \
        --max-length 64 --output runs/stsb
    python -m tests.numerics runs/stsb/adapter.safetensors \
        --data-dir glue                                             # one minute

The trained adapter is put on its base model in bfloat16 and in float16, at its own
size, at a tenth and at ten times that. In a 16-bit model w = cast(W + P theta),
attached or merged, has few bits below W's leading one, and an update smaller than half
the last one is rounded away or up:

    moved       weights that differ from W at all
    kept        <w - W, P theta> / ||P theta||^2: 1 if rounding is unbiased over the
                weights
    noise       ||w - W - P theta|| / ||P theta||
    effect      error of the change in the logits, relative to that change in float32
    theta 16    error of the update alone, without W, if theta and it were 16-bit
    stuck       theta's entries that an Adam step of 5e-4 does not change if theta is
                16-bit
    gradient    error of theta's gradient on one batch against the same weights in
                float64
    sum 16      error of P^T alone, had it summed the weights' gradients in 16 bits
    sum 16 d16  the same for 16 groups, each as large as groups are in a large model

Writes results/numerics.json and prints the table.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpart
import train_glue

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("moved", "kept", "noise", "effect", "theta 16", "stuck", "gradient")
COLUMNS += ("sum 16", "sum 16 d16")


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits.double()


def gradients(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(grad_theta, grad_w [N] in the model's dtype) of the loss."""
    g = model.gpart
    named = dict(model.named_parameters())
    gpart.merge(model)  # the dense weights have gradients of their own then
    weights = [named[name].requires_grad_() for name, _ in g.manifest]
    grads = torch.autograd.grad(model(**batch).loss, weights)
    for w in weights:
        w.requires_grad_(False)
    gpart.unmerge(model)
    g.theta.grad = None
    model(**batch).loss.backward()
    return g.theta.grad, torch.cat([w.flatten() for w in grads])


def measure(args: Any, dtype: torch.dtype, size: float, batch: Any) -> dict[str, float]:
    """One row: the adapter, theta times size, on its base model in dtype."""
    whole = train_glue.load_adapter(args, args.adapter).eval()  # float32
    whole.gpart.theta.data.mul_(size)
    half = train_glue.load_adapter(args, args.adapter).eval().to(dtype)
    half.gpart.theta.data.mul_(size)
    exact = train_glue.load_adapter(args, args.adapter).eval().to(dtype).double()
    exact.gpart.theta.data.mul_(size)
    g, P, theta = half.gpart, half.gpart.partition, half.gpart.theta.detach()

    def flat() -> Tensor:
        own = dict(half.named_parameters())
        return torch.cat([own[name].detach().flatten() for name, _ in g.manifest])

    before = flat()
    gpart.merge(half)
    change = flat().double() - before.double()
    gpart.unmerge(half)
    update = P.expand(theta.double())
    theta16 = P.expand(theta.to(dtype)).to(dtype)
    draw = torch.Generator().manual_seed(0)
    step = 5e-4 * torch.randn(len(theta), generator=draw).sign()
    stepped = theta.to(dtype) + step.to(dtype)

    def effect(model: nn.Module) -> Tensor:
        after = logits(model, batch)
        with gpart.disabled(model):
            return after - logits(model, batch)

    grad, grad_w = gradients(half, batch)
    want, _ = gradients(exact, batch)

    def sum_in_16_bits(d: int) -> float:
        P16 = gpart.Partition(P.N, d, P.seed)
        in_16_bits = gpart.reduce(grad_w, P16.groups(), P16.scale(dtype=dtype))
        return error(in_16_bits, P16.reduce(grad_w.double()))

    return {
        "moved": (change != 0).double().mean().item(),
        "kept": (change @ update / update.square().sum()).item(),
        "noise": error(change, update),
        "effect": error(effect(half), effect(whole)),
        "theta 16": error(theta16, update),
        "stuck": (stepped == theta.to(dtype)).double().mean().item(),
        "gradient": error(grad, want),
        "sum 16": sum_in_16_bits(P.d),
        "sum 16 d16": sum_in_16_bits(16),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("adapter", type=Path)
    p.add_argument("--data-dir", required=True)
    own = p.parse_args()
    text = (own.adapter.parent / "results.json").read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    settings |= {"data_dir": own.data_dir, "adapter": own.adapter}
    args = argparse.Namespace(**settings)
    train_glue.transformers.logging.set_verbosity_error()
    train_glue.transformers.logging.disable_progress_bar()
    _, validation, source = train_glue.read_data(args)
    path = train_glue.model_path(args.model)
    tokenizer = train_glue.transformers.AutoTokenizer.from_pretrained(path)
    accelerator = train_glue.accelerate.Accelerator()
    bench = train_glue.Bench(args, train_glue.TASKS[args.task], tokenizer, accelerator)
    batch = bench.encode(validation[:64])
    theta = train_glue.load_adapter(args, own.adapter).gpart.theta
    table = []
    for dtype in (torch.bfloat16, torch.float16):
        for size in (0.1, 1.0, 10.0):
            name = str(dtype).removeprefix("torch.")
            row = measure(args, dtype, size, batch)
            table.append({"base": name, "theta": size, **row})
    result = {
        "task": args.task,
        "data": Path(source).name,
        "d": args.d,
        "theta_rms": theta.square().mean().sqrt().item(),
        "torch": torch.__version__,
        "device": f"CPU {platform.machine()}",
        "rows": table,
    }
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / "numerics.json").write_text(text, encoding="utf-8")
    print("| base | theta |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in table:
        cells = [f"{row[column]:.3g}" for column in COLUMNS]
        print(f"| {row['base']} | x {row['theta']:g} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
