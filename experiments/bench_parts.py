# SPDX-License-Identifier: Apache-2.0
"""Where a fused step's time goes, and what else was tried.

    python -m experiments.bench_parts               # one minute on two CPU cores

prints the figures in results/bench-notes.md:

1. torch.profiler over three steps of three sides of the bench: milliseconds by
   operator.
2. One adapted 768 x 768 Linear on 8 x 128 tokens, forward and backward, with other ways
   to write FusedLinear. All alternate in random order; median and lower decile.
3. The gather and the scatter alone, with other operators, on that layer's 589,824 ids,
   and what the bias costs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import gpart
from experiments.bench import Side

Actions = dict[str, Callable[[], object]]


def operators(device: str, batch: int, length: int, dtype: str, most: int = 12) -> None:
    """Self time by operator, and by side."""
    sides = ("dense", "gpart", "unilora")
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    times: dict[str, dict[str, float]] = {}
    for side in sides:
        one = Side(side, "roberta-base", batch, length, dtype, device)
        for _ in range(2):
            one.step()
        with profile(activities=activities) as p:
            for _ in range(3):
                one.step()
        for e in p.key_averages():
            if device == "cuda":  # the kernels, and not the operators that start them
                kernel = e.device_type == DeviceType.CUDA and not e.is_user_annotation
                spent = e.self_device_time_total if kernel else 0.0
            else:
                spent = e.self_cpu_time_total
            times.setdefault(e.key, dict.fromkeys(sides, 0.0))[side] += spent / 3e3
    print(f"| operator, ms a step | {' | '.join(sides)} |\n|---|---|---|---|")
    ranked = sorted(times.items(), key=lambda item: -max(item[1].values()))
    total = {side: sum(row[side] for row in times.values()) for side in sides}
    for key, row in [*ranked[:most], ("all", total)]:
        print(f"| {key} | {' | '.join(f'{row[side]:.1f}' for side in sides)} |")


def alternate(actions: Actions, device: str, rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in actions}
    order = [*actions]
    for name in [*actions]:
        try:
            actions[name]()
        except RuntimeError as error:  # scatter_add takes int32 only in recent releases
            if "scatter_add" not in name:
                raise
            print(f"{name}: {error}")
            del times[name]
            order.remove(name)
    for at in range(-3, rounds):
        random.Random(at).shuffle(order)
        for name in order:
            start = time.perf_counter()
            actions[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if at >= 0:
                times[name].append(time.perf_counter() - start)
    print("| what | median, ms | lower decile |\n|---|---|---|")
    for name, values in times.items():
        low = statistics.quantiles(values, n=10)[0]
        print(f"| {name} | {statistics.median(values) * 1e3:.2f} | {low * 1e3:.2f} |")


def variant(backward: str) -> Any:
    """FusedLinear with one thing done otherwise."""

    class Variant(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, w: Tensor, b: Tensor, *parts: Tensor
        ) -> Tensor:
            moved = gpart.add_update(w, *parts)
            ctx.save_for_backward(x, moved if backward == "keep" else w, *parts)
            return F.linear(x, moved, b)

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
            x, w, *parts = ctx.saved_tensors
            moved = w if backward == "keep" else gpart.add_update(w, *parts)
            grad_x = grad_y @ moved
            out = moved if backward == "reuse" else None
            grad_w = torch.mm(grad_y.T, x, out=out)
            if backward == "scatter":
                _, ids, scale = parts
                zeros = torch.zeros_like(scale)
                grad_theta = zeros.scatter_add_(0, ids, grad_w.flatten()) * scale
            else:
                grad_theta = gpart.reduce(grad_w.flatten(), *parts[1:])
            return grad_x, None, None, grad_theta, None, None

    return Variant


def layer(device: str, batch: int, length: int) -> Actions:
    """The whole layer."""
    torch.manual_seed(0)
    P = gpart.Partition(768 * 768, 23040)
    ids, scale = P.groups(device=device), P.scale(device)
    theta = nn.Parameter(torch.randn(P.d, device=device))
    w, b = torch.randn(768, 768, device=device) / 30, torch.zeros(768, device=device)
    x = torch.randn(batch * length, 768, device=device, requires_grad=True)
    grad_y = torch.randn(batch * length, 768, device=device)
    dense = nn.Parameter(w.clone())
    adamw = torch.optim.AdamW([dense], lr=1e-6)
    a_ids = torch.randint(P.d, (4, 768), device=device)
    b_ids = torch.randint(P.d, (768, 4), device=device)
    a_scale = torch.rand(4, 768, device=device)
    b_scale = torch.rand(768, 4, device=device)

    def run(y: Tensor) -> None:
        y.backward(grad_y)
        x.grad = theta.grad = None

    def trained() -> None:
        run(F.linear(x, dense, b))
        adamw.step()
        dense.grad = None

    def unilora() -> None:
        low, high = theta[a_ids] * a_scale, theta[b_ids] * b_scale
        run(F.linear(x, w, b) + F.linear(F.linear(x, low), high))

    def fused(function: Any) -> Callable[[], object]:
        return lambda: run(function.apply(x, w, b, theta, ids, scale))

    return {
        "frozen": lambda: run(F.linear(x, w, b)),
        "dense, with AdamW": trained,
        "Uni-LoRA, rank 4": unilora,
        "plain": lambda: run(F.linear(x, gpart.add_update(w, theta, ids, scale), b)),
        "fused": fused(gpart.FusedLinear),
        "fused, W + P theta kept for backward": fused(variant("keep")),
        "fused, grad_w in the memory of W + P theta": fused(variant("reuse")),
        "fused, scatter_add": fused(variant("scatter")),
    }


def single(device: str, batch: int, length: int) -> Actions:
    """Gather and scatter alone, and what a bias costs."""
    P = gpart.Partition(768 * 768, 23040)
    ids, theta = P.groups(device=device), torch.randn(P.d, device=device)
    w, zeros = torch.randn(P.N, device=device), torch.zeros_like(theta)
    long, square = ids.long(), w.view(768, 768)
    x = torch.randn(batch, length, 768, device=device)
    return {
        "linear with a bias": lambda: F.linear(x, square, w[:768]),
        "linear without": lambda: F.linear(x, square),
        "index_select, int32 (as it is)": lambda: theta.index_select(0, ids),
        "index_select, int64": lambda: theta.index_select(0, long),
        "theta[ids], int32": lambda: theta[ids],
        "theta[ids], int64": lambda: theta[long],
        "take, int64": lambda: theta.take(long),
        "gather, int64": lambda: theta.gather(0, long),
        "embedding, int32": lambda: F.embedding(ids, theta[:, None]),
        "index_add, int32 (as it is)": lambda: zeros.index_add(0, ids, w),
        "index_add, int64": lambda: zeros.index_add(0, long, w),
        "scatter_add, int32 (torch 2.13)": lambda: zeros.scatter_add(0, ids, w),
        "scatter_add, int64": lambda: zeros.scatter_add(0, long, w),
        "bincount, float64": lambda: torch.bincount(ids, w, P.d),
        "index_put, int64": lambda: zeros.index_put((long,), w, accumulate=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {args.device}, {threads} threads\n")
    operators(args.device, args.batch, args.length, args.dtype)
    print()
    alternate(layer(args.device, args.batch, args.length), args.device, args.rounds)
    print()
    alternate(single(args.device, args.batch, args.length), args.device, args.rounds)


if __name__ == "__main__":
    main()
