# SPDX-License-Identifier: Apache-2.0
"""GPart without stored ids: each is computed where it is used, from N, d and the seed.

    gpart.attach(model, d)
    stateless(model)            # 4 bytes fewer for each adapted weight, on each device

The ids are those of Partition.groups, bit for bit. With a x b the grid that holds N,

    i = start + k,  l, r = i // b, i % b        k = 0..n-1, the weights of one layer
    l <- (l + F(key, r)) mod a,  r <- (r + F(key, l)) mod b         six rounds, or 16
    x = l b + r,  walked on while x >= N,  g(i) = x mod d

On the CPU torch.compile makes one loop of it, once for all layers. What is slow there
is the remainder of integers, so remainders are of float64: x - floor(x / m) m, exact
where x and m are integers and x + m < 2^53, for there no quotient is rounded up to the
next integer. F multiplies in int64, as in gpart.py: int32 would overflow, which C++
leaves undefined, and without vector instructions gave other bits. The few weights that
land beyond N, at most one in sqrt(N), are found once and their ids kept.

On CUDA two Triton kernels (stateless_triton.py) compute ids in registers: one gathers
and adds, W + P theta; one sums atomically, P^T grad_w.

What is kept from forward to backward is x, W, theta and scale, as in gpart.py, and no
ids. On the CPU there is one layer's int32 ids while they are used, as there is one
layer's W + P theta. Inside an outer torch.compile(model) the compiler sees the integer
arithmetic and decides itself what it keeps for backward, W + P theta for one.

    python -m experiments.stateless                 # 4 minutes on two CPU cores
    python -m experiments.stateless --device cuda
    python -m experiments.stateless --toy           # seconds, of no meaning

measures ns a weight beside stored ids and beside the layer's own matrix product, steps
beside the dense floor, and bytes; it writes results/stateless-<device>.json. Sides
alternate, in a new random order each round; medians, and quartiles of ratios in a
round. On a machine that is shared the processor's seconds say more than the wall's; of
a GPU they say nothing.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpart


# ------------------------------ the integers, on the CPU ------------------------------
def remainder(x: Tensor, m: Tensor) -> Tensor:
    return x - (x / m).floor() * m


def compute(n: int, grid: Tensor, keys: Tensor) -> Tensor:
    """g(start..start+n-1), int32 [n], or -1 where the first walk ends beyond N."""
    a, b, d, left, right, last_left, last_right = grid.unbind()
    right = right + torch.arange(n, dtype=torch.float64, device=grid.device)
    left, right = left + (right / b).floor(), remainder(right, b)
    for t, key in enumerate(keys.unbind()):
        if t % 2 == 0:
            left = remainder(left + gpart.round_function(key, right.long()), a)
        else:
            right = remainder(right + gpart.round_function(key, left.long()), b)
    # x = left b + right may have 62 bits: it is compared and divided in two steps
    beyond = (left - last_left) * b + (right - last_right) >= 0
    high = (left / 2**16).floor()
    low = left - high * 2**16
    group = remainder(remainder(high * b, d) * 2**16 + low * b + right, d)
    return torch.where(beyond, -1, group).int()


@functools.cache
def loop() -> Callable[..., Tensor]:
    return torch.compile(compute, dynamic=True)  # compiled at its first call


def compiled(n: int, grid: Tensor, keys: Tensor) -> Tensor:
    inside = torch.compiler.is_compiling()  # an outer compiler takes it as it is
    return compute(n, grid, keys) if inside else loop()(n, grid, keys)


class Ids:
    """How a weight's ids are computed: what adapter.ids holds in place of them."""

    def __init__(self, partition: gpart.Partition, start: int, n: int):
        self.partition, self.start, self.n = partition, start, n
        N = partition.N
        a = math.isqrt(N - 1) + 1
        b = -(-N // a)
        self.a, self.b = a, b
        self.keys = gpart.round_keys(partition.seed, 16 if N < 2**16 else 6)
        values = [a, b, partition.d, *divmod(start, b), *divmod(N, b)]
        self.grid = torch.tensor(values, dtype=torch.float64, device="cpu")
        self.key_tensor = torch.tensor(self.keys, device="cpu")

    @functools.cached_property
    def beyond(self) -> tuple[Tensor, Tensor]:
        """Which weights land beyond N, and their ids."""
        first = compiled(self.n, self.grid, self.key_tensor)
        at = (first < 0).nonzero().flatten()
        P = self.partition
        return at, (gpart.permute(self.start + at, P.N, P.seed) % P.d).int()

    @torch.no_grad()
    def ready(self, device: torch.device) -> Any:
        """int32 [n], computed now; on CUDA this object, which the kernels take."""
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return self
        at, groups = self.beyond
        ids = compiled(self.n, self.grid, self.key_tensor)
        ids[at] = groups
        return ids.to(device)

    def to(self, device: gpart.Device) -> "Ids":
        return self

    def bytes(self) -> int:
        """What it takes."""
        held = [self.grid, self.key_tensor, *vars(self).get("beyond", ())]
        return sum(t.nbytes for t in held)


# ------------------------------ W + P theta and P^T grad_w ----------------------------
def add_update(w: Tensor, theta: Tensor, ids: Any, scale: Tensor) -> Tensor:
    """W + P theta, as gpart.add_update; ids as Ids.ready gives them."""
    if isinstance(ids, Tensor):
        return gpart.add_update(w, theta, ids, scale)
    from experiments import stateless_triton

    return stateless_triton.add_update(w, theta.to(scale) * scale, ids)


def reduce(grad_w: Tensor, ids: Any, scale: Tensor) -> Tensor:
    """P^T grad_w, as gpart.reduce."""
    if isinstance(ids, Tensor):
        return gpart.reduce(grad_w.flatten(), ids, scale)
    from experiments import stateless_triton

    return stateless_triton.sums(grad_w, ids, scale) * scale


class Update(torch.autograd.Function):
    """W + P theta for the plain path: of ids, backward keeps how to compute them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w, theta, ids, scale):  # type: ignore[no-untyped-def]
        return add_update(w, theta, ids.ready(w.device), scale)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, theta, ctx.ids, scale = inputs
        ctx.save_for_backward(theta, scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        theta, scale = ctx.saved_tensors
        grad_theta = reduce(grad, ctx.ids.ready(grad.device), scale)
        return grad, grad_theta.to(theta), None, None


class FusedLinear(torch.autograd.Function):
    """gpart.FusedLinear, with ids computed in forward and again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, b, theta, ids, scale):  # type: ignore[no-untyped-def]
        moved = add_update(w, theta, ids.ready(w.device), scale)
        return nn.functional.linear(x, moved, b)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, w, _, theta, ctx.ids, scale = inputs
        ctx.save_for_backward(x, w, theta, scale)

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, w, theta, scale = ctx.saved_tensors
        ids = ctx.ids.ready(w.device)
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ add_update(w, theta, ids, scale).to(grad_y)
        if ctx.needs_input_grad[2]:
            grad_b = grad_y.sum(0)
        grad_w = grad_y.T @ x.to(grad_y)
        grad_theta = reduce(grad_w, ids, scale)
        return grad_x, grad_w, grad_b, grad_theta.to(theta), None, None


# ------------------------------ on a model --------------------------------------------
class StatelessGPart(gpart.GPart):
    def updated(self, name, w):  # type: ignore[no-untyped-def]
        theta, ids, scale = self.operands(name, w)
        return Update.apply(w, theta, ids, scale)


class StatelessLinear(gpart.AdaptedLinear, nn.Linear):
    """gpart.AdaptedLinear with this file's FusedLinear."""

    __reduce_ex__ = nn.Module.__reduce_ex__  # pickle finds this class by its name

    def forward(self, input: Tensor) -> Tensor:
        adapter, names = self._adapter
        if "weight" not in names or not adapter.active:
            return nn.Linear.forward(self, input)
        w = self._parameters["weight"]
        theta, ids, scale = adapter.operands(names["weight"], w)
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        y = FusedLinear.apply(rows, w, self.bias, theta, ids, scale)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], len(w))


@torch.no_grad()
def stateless(model: nn.Module) -> gpart.GPart:
    """Forget the ids of an attached model, and compute them where they are used.

    Everything else stays: theta, files, merge, detach and all the rest. Needs a C++
    compiler on the CPU and Triton on CUDA. On CUDA there are no second derivatives.
    ValueError, and no change, if an id comes out other than it was.
    """
    adapter, own = gpart.adapter_of(model)
    gpart.require(not isinstance(adapter, StatelessGPart), "it is stateless already")
    P, ids, start = adapter.partition, {}, 0
    for name, _ in adapter.manifest:
        stored = adapter.ids[name]
        tied = [alias for alias in adapter.ids if own[alias] is own[name]]
        ids |= dict.fromkeys(tied, Ids(P, start, len(stored)))
        start += len(stored)
        device = stored.device if stored.is_cuda else torch.device("cpu")
        every = torch.arange(P.d, dtype=torch.float64, device=device)
        zeros = every.new_zeros(len(stored))
        found = add_update(
            zeros, every, ids[name].ready(device), torch.ones_like(every)
        )
        text = f"{name}: the compiler changed an id, so the ids are kept"
        gpart.require(torch.equal(found.int(), stored.to(device)), text)
    adapter.ids = ids
    adapter.__class__ = StatelessGPart
    for module in model.modules():
        if isinstance(module, gpart.AdaptedLinear):
            module.__class__ = StatelessLinear
    return adapter


# ------------------------------ what it costs -----------------------------------------
Shape = tuple[int, int, int, int, int, torch.dtype]  # out, in, tokens, N, d
ROBERTA = (768, 768, 4096, 14_155_776, 23_040)
LLAMA = (4096, 4096, 4096, 1_342_177_280, 524_288)  # q, k, v, o of an 8B model
LAYERS: dict[str, list[Shape]] = {
    "cpu": [(*ROBERTA, torch.float32)],
    "cuda": [(*ROBERTA, torch.bfloat16), (*LLAMA, torch.bfloat16)],
    "toy": [(16, 16, 4, 512, 7, torch.float32)],
}
CASES: dict[str, list[tuple[str, int, int, str]]] = {
    "cpu": [("roberta-base", 8, 128, "fp32")],
    "cuda": [
        ("roberta-base", 32, 128, "bf16"),
        ("roberta-base", 32, 128, "fp32"),
        ("qwen2.5-0.5b", 2, 2048, "bf16"),
    ],
    "toy": [("tiny", 2, 8, "fp32")],
}


def alternate(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """{clock: {name: seconds of each round}}, in a new random order each round."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times: dict[str, Any] = {clock: {name: [] for name in actions} for clock in clocks}
    order = [*actions]
    for at in range(-2, rounds):  # two rounds to warm up
        random.Random(at).shuffle(order)
        for name in order:
            starts = {clock: read() for clock, read in clocks.items()}
            actions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            for clock, read in clocks.items():
                if at >= 0:
                    times[clock][name].append(read() - starts[clock])
    return times


@torch.no_grad()
def layer(shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """ns a weight of one layer in the middle of N, by both clocks: medians."""
    rows, columns, tokens, N, d, dtype = shape
    P, n = gpart.Partition(N, d), rows * columns
    start = N // 2 // n * n
    w = torch.randn(rows, columns, device=device, dtype=dtype)
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    theta, scale = torch.randn(d, device=device), P.scale(device)
    stored = P.groups(start, start + n, device)
    ready = functools.partial(Ids(P, start, n).ready, w.device)
    actions = {
        "x W^T": lambda: nn.functional.linear(x, w),
        "Partition.groups": lambda: P.groups(start, start + n, device),
        "stored, W + P theta": lambda: gpart.add_update(w, theta, stored, scale),
        "stored, P^T grad": lambda: gpart.reduce(w.flatten(), stored, scale),
        "stateless, W + P theta": lambda: add_update(w, theta, ready(), scale),
        "stateless, P^T grad": lambda: reduce(w, ready(), scale),
    }
    if device == "cpu":
        actions["stateless, ids"] = ready
    for action, tolerance in (("W + P theta", 0), ("P^T grad", 1e-4)):
        pair = (actions[f"{way}, {action}"]() for way in ("stateless", "stored"))
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
    times = alternate(actions, rounds)
    return {
        **dict(zip(("out", "in", "tokens", "N", "d", "dtype"), shape, strict=True)),
        "dtype": str(dtype),
        "ns_a_weight": {
            name: [
                round(1e9 / n * statistics.median(t[name]), 4) for t in times.values()
            ]
            for name in actions
        },
    }


def steps(case: tuple[str, int, int, str], device: str, rounds: int) -> dict[str, Any]:
    """Training steps beside the dense floor, as in bench.py, and bytes of ids."""
    from experiments import bench  # which wants peft; stateless(model) does not

    names = ("dense", "gpart", "stateless")
    sides = {
        name: bench.Side("gpart" if name == "stateless" else name, *case, device)
        for name in names
    }
    stateless(sides["stateless"].model)
    times = alternate({name: side.step for name, side in sides.items()}, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        rows[name] = {"seconds": bench.spread(times["wall"][name])}
        for clock, key in (("wall", "to_dense"), ("processor", "to_dense, processor")):
            pairs = zip(times[clock][name], times[clock]["dense"], strict=True)
            rows[name][key] = bench.spread([a / b for a, b in pairs])
        if name != "dense":
            ids = side.model.gpart.ids.values()
            sizes = [i.bytes() if isinstance(i, Ids) else i.nbytes for i in ids]
            rows[name]["ids_bytes"] = sum(sizes)
    keys = ("model", "batch", "length", "dtype")
    return {**dict(zip(keys, case, strict=True)), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows of the report."""
    lines = ["| one layer, ns a weight | wall | processor |", "|---|---|---|"]
    for row in result["layers"]:
        where = "{out} x {in}, {tokens} tokens".format(**row)
        for name, ns in row["ns_a_weight"].items():
            lines.append("| {}, {} | {:.3g} | {:.3g} |".format(name, where, *ns))
    heads = ("step / dense, wall", "step / dense, processor", "bytes of ids")
    lines += ["", f"| a training step | {' | '.join(heads)} |", "|---|---|---|---|"]
    for case in result["cases"]:
        what = "{model}, {batch} x {length}, {dtype}".format(**case)
        for name, row in case["rows"].items():
            spreads = row["to_dense"], row["to_dense, processor"]
            ratios = " | ".join(f"{b:.3f} ({a:.3f}-{c:.3f})" for a, b, c in spreads)
            lines.append(f"| {name}, {what} | {ratios} | {row.get('ids_bytes', 0):,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--rounds", type=int, default=20)
    default = "results/stateless-<device>.json, and none if --toy"
    parser.add_argument("--output", type=Path, help=default)
    args = parser.parse_args()
    size, rounds = ("toy", 2) if args.toy else (args.device, args.rounds)
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    cuda, packages = args.device == "cuda", ("torch", "transformers")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else cpu,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "command": "python -m experiments.stateless " + " ".join(sys.argv[1:]),
        "rounds": rounds,
    }
    result["layers"] = [layer(s, args.device, 3 * rounds) for s in LAYERS[size]]
    result["cases"] = [steps(case, args.device, rounds) for case in CASES[size]]
    print(table(result))
    path = args.output
    if not path and not args.toy:
        path = Path(__file__).parent / "results" / f"stateless-{args.device}.json"
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
