# SPDX-License-Identifier: Apache-2.0
# gpart.py 0.1.0, the GPart reference implementation: one file of plain PyTorch, made to
# be copied.
"""GPart, end-to-end isometric fine-tuning (Mandica et al., arXiv:2605.14841).

One trainable theta in R^d moves every adapted weight of a frozen model, w0 in R^N,
through a seeded partition of the N weights into d groups:

    P[i, j] = 1/sqrt(n_j) if g(i) = j else 0    (Eq. 7)    Partition; P^T P = I_d (Eq. 8)
    delta_w = P theta                           (Eq. 10)   expand, GPart.delta
    w = w0 + P theta                            (Eq. 9)    add_update, in FusedLinear and merge
    grad_theta L = P^T grad_w L                 (Eq. 11)   reduce, in FusedLinear.backward

P is an isometry: distances, gradients and L2 penalties of theta are those of the
update, lambda ||theta||^2 = lambda ||delta_w||^2 (Eq. 18). The trained state is theta
and the seed.

    code      paper        meaning
    N, d      N, d         adapted weights; trainable numbers, the one hyperparameter
    theta     theta        the trained vector, float32 [d], zero at the start
    ids       g(i)         the group of each weight, int32, computed from the seed alone
    sizes     n_j          weights in group j: floor(N/d), or one more
    scale     1/sqrt(n_j)  makes every column of P a unit vector; ones if isometric=False (App. B)
    manifest               the adapted parameters in flattening order (Eq. 5): [(name, shape), ...]

>>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
>>> attach(net, d=5, target_modules="all-linear")
GPart(Partition(N=18, d=5, seed=0, isometric=True), merged=False)
>>> [name for name, p in net.named_parameters() if p.requires_grad]
['gpart.theta']
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

__version__ = "0.1.0"

FORMAT = "gpart-v1"  # names the permutation as much as the file: whoever changes one renames both
CHUNK = (
    1 << 15
)  # indices permuted at a time: they stay in the cache, and on the calling thread
Device = torch.device | str
Path = str | os.PathLike[str]


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(f"{message:.1000}")  # it may quote a hostile file


# --- 1. The permutation pi: integers only, the same on every device, release and shard ---
def round_keys(seed: int, rounds: int) -> list[int]:
    """k_0..k_{rounds-1}: the top 31 bits of SplitMix64's first outputs from state =
    seed."""
    mask, keys = (1 << 64) - 1, []
    for t in range(1, rounds + 1):
        z = (seed + t * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        keys.append((z ^ (z >> 31)) >> 33)
    return keys


def round_function(key: int, x: Tensor) -> Tensor:
    """F(k, x) on 0 <= x < 2^31, where no int64 product overflows."""
    x = x ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0x7FFFFFFF
    x = ((x ^ (x >> 15)) * 0x46CA68B5) & 0x7FFFFFFF
    return x ^ (x >> 16)


def permute(i: Tensor, N: int, seed: int) -> Tensor:
    """pi(i), a seeded bijection of 0..N-1, each index by itself: int64 [n] -> int64
    [n].

    A Feistel network on the near-square grid Z_a x Z_b that just holds N indices; what
    lands on a spare cell of the grid goes through again until it is below N (cycle
    walking).

    >>> permute(torch.arange(6), N=6, seed=0).tolist()
    [2, 3, 4, 0, 1, 5]
    """
    a = math.isqrt(N - 1) + 1
    b = -(-N // a)
    keys = round_keys(seed, 16 if N < 1 << 16 else 6)
    left, right = i // b, i % b
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + round_function(even, right)) % a
        right = (right + round_function(odd, left)) % b
    x = left * b + right
    if len(spare := (x >= N).nonzero().flatten()):
        x[spare] = permute(x[spare], N, seed)
    return x


# --- 2. P and P^T ---
def expand(theta: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """(P theta)_i = theta_g(i) / sqrt(n_g(i)) for the rows in ids, in scale's dtype."""
    return (theta.to(scale) * scale).index_select(0, ids)  # [d] -> [n]


def reduce(w: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """(P^T w)_j = sum of w_i over group j / sqrt(n_j), of the rows in ids, in scale's
    dtype."""
    return torch.zeros_like(scale).index_add(0, ids, w.to(scale)) * scale  # [n] -> [d]


@dataclasses.dataclass(frozen=True)
class Partition:
    """P in R^{N x d}, never materialised: P^T P = I_d, hence ||P theta|| = ||theta||.

    g(i) = pi(i) mod d deals N weights into d groups: sizes differ by at most one, none
    is empty. With isometric=False the columns keep their length: P^T P =
    diag(n_1..n_d). ValueError unless 1 <= d <= min(N, 2^31 - 1) and 0 <= seed < 2^64;
    TypeError unless integers.

    >>> P = Partition(N=6, d=2, seed=0)
    >>> P.groups().tolist(), P.groups(2, 4).tolist(), P.sizes().tolist()
    ([0, 1, 0, 0, 1, 1], [0, 0], [3, 3])
    """

    N: int
    d: int
    seed: int = 0
    isometric: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (
            ("N", 1, 2**62),
            ("d", 1, 2**31 - 1),
            ("seed", 0, 2**64 - 1),
        ):
            if (
                type(value := getattr(self, name)) is not int
                or type(self.isometric) is not bool
            ):
                raise TypeError(
                    f"{name} must be an int, got {value!r}, isometric a bool: {self}"
                )
            _require(
                low <= value <= high, f"{name} must be in {low}..{high}, got {value}"
            )
        _require(self.d <= self.N, f"d must be in 1..N = 1..{self.N}, got {self.d}")

    def groups(
        self, start: int = 0, stop: int | None = None, device: Device = "cpu"
    ) -> Tensor:
        """g(start..stop-1), int32 [stop - start]: any slice equals that slice of the
        whole."""
        stop = self.N if stop is None else stop
        _require(
            0 <= start <= stop <= self.N,
            f"need 0 <= {start=} <= {stop=} <= N = {self.N}",
        )
        ids = torch.empty(stop - start, dtype=torch.int32, device=device)
        for at in range(start, start if ids.is_meta else stop, CHUNK):
            i = torch.arange(at, min(at + CHUNK, stop), device=device)
            ids[at - start : at - start + len(i)] = (
                permute(i, self.N, self.seed) % self.d
            )
        return ids

    def sizes(self) -> Tensor:
        """n_j = floor(N/d) + (1 if j < N mod d else 0), int64 [d]."""
        return (
            self.N // self.d
            + (torch.arange(self.d, device="cpu") < self.N % self.d).long()
        )

    def scale(
        self, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """1/sqrt(n_j), or n_j^0 = 1, [d]: rounded from float64 on the host, equal on
        any device."""
        return (
            self.sizes()
            .double()
            .pow(self.isometric)
            .sqrt()
            .reciprocal()
            .to(dtype)
            .to(device)
        )

    def expand(self, theta: Tensor) -> Tensor:
        """P @ theta: [d] -> [N], in promote(theta's dtype, float32)."""
        _require(
            theta.shape == (self.d,), f"theta must be [{self.d}], got {[*theta.shape]}"
        )
        scale = self.scale(
            theta.device, torch.promote_types(theta.dtype, torch.float32)
        )
        return expand(theta, self.groups(device=theta.device), scale)

    def reduce(self, w: Tensor) -> Tensor:
        """P^T @ w: [N] -> [d], summed in promote(w's dtype, float32). <P t, w> = <t,
        P^T w>."""
        _require(w.shape == (self.N,), f"w must be [{self.N}], got {[*w.shape]}")
        scale = self.scale(w.device, torch.promote_types(w.dtype, torch.float32))
        return reduce(w, self.groups(device=w.device), scale)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """P itself, [N, d], for teaching and tests."""
        return (self.groups()[:, None] == torch.arange(self.d)) * self.scale(
            dtype=dtype
        )


# --- 3. The fused linear ---
def add_update(w: Tensor, theta: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """W + P theta (Eq. 9) for one weight: added in scale's dtype, cast to W's once."""
    return expand(theta, ids, scale).view(w.shape).add_(w).to(w)  # [n] -> W's shape


class FusedLinear(torch.autograd.Function):
    """y = x (W + P theta)^T + b, keeping for backward only what exists anyway: x, W,
    theta, ids. Backward rebuilds W + P theta. Autograd through add_update, the plain
    path, gives the same numbers and keeps a second copy of each W. x [..., in], W [out,
    in], ids [out*in], theta [d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, w, *parts)
        return nn.functional.linear(
            x, add_update(w, *parts), b
        )  # [..., in] -> [..., out]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *parts = (
            ctx.saved_tensors
        )  # products are in grad_y's dtype, which autocast may set
        grad_x = (
            grad_y @ add_update(w, *parts).to(grad_y)
            if ctx.needs_input_grad[0]
            else None
        )
        rows = grad_y.reshape(-1, len(w))  # [..., out] -> [n, out]
        grad_b = rows.sum(0) if ctx.needs_input_grad[2] else None  # [n, out] -> [out]
        grad_w = rows.T @ x.reshape(-1, w.shape[1]).to(rows)  # [out, n] @ [n, in]
        # grad_theta: [out * in] -> [d]
        return (
            grad_x,
            grad_w,
            grad_b,
            reduce(grad_w.flatten(), *parts[1:]).to(parts[0]),
            None,
            None,
        )


# --- 4. Attaching to a model ---
class Adapted(nn.Module):
    """Mixed into the class of each module that owns an adapted parameter: whoever reads
    that gets W + P theta, so no adapter is silently ignored. parameters and state_dict
    hold the frozen W."""

    def __getattr__(self, name: str) -> Any:
        w: Any = super().__getattr__(name)
        g, names, _ = self.__dict__[
            "_adapter"
        ]  # GPart, {attribute: name}, the class before
        adapted = (
            g.active and name in names and not hasattr(w, "full_tensor")
        )  # a shard of FSDP2's
        # accelerate's hooks, about to move a weight, would keep W + P theta as W
        moving = (
            adapted
            and "_old_forward" in self.__dict__
            and "_hf_hook" not in self.__dict__
        )
        _require(
            not moving,
            "dispatch or offload the model before attach, or inside disabled",
        )
        return add_update(w, *g.parts(names[name], w)) if adapted else w


class AdaptedLinear(Adapted, nn.Linear):
    """An nn.Linear on the fused path."""

    def forward(self, input: Tensor) -> Any:
        (g, names, _), w = self.__dict__["_adapter"], self._parameters["weight"]
        if not g.active or "weight" not in names:
            return super().forward(input)
        return FusedLinear.apply(input, w, self.bias, *g.parts(names["weight"], w))  # type: ignore[no-untyped-call]


class GPart(nn.Module):
    """The adapter, registered as model.gpart: .theta is what is trained, .partition is
    P. theta is looked up at every call, so a moved, reloaded or sharded one is seen; it
    stays float32 whatever the model is cast to. ids and scale are no buffers: they
    follow from the seed."""

    def __init__(
        self, model: nn.Module, P: Partition, weights: Any, saved: Any, fused: bool
    ):
        """Adapt weights, {name: parameter}, in that order; what can fail precedes any
        change."""
        super().__init__()
        used = hasattr(model, "gpart") or any(
            isinstance(m, Adapted) for m in model.modules()
        )
        _require(not used, "the model has an adapter already: detach(model) first")
        own = dict(model.named_parameters(remove_duplicate=False))
        trained = {id(w) for name, w in own.items() if name in saved}
        names = {id(w): name for name, w in weights.items() if id(w) not in trained}
        self.ids, self.spans, n = {}, {}, 0
        for name, w in weights.items():
            usable = (
                isinstance(w, nn.Parameter) and w.is_floating_point() and w.itemsize > 1
            )
            _require(
                usable,
                f"{name} is {w.dtype}: only unquantised 16 to 64 bit parameters adapt",
            )
            _require(
                names.get(id(w)) == name,
                f"{name} is tied to modules_to_save or another name",
            )
            self.spans[name] = n, (n := n + w.numel())
            self.ids[name] = P.groups(*self.spans[name], w.device)
        self.partition, self.scale = P, P.scale("cpu" if w.is_meta else w.device)
        self.theta = nn.Parameter(torch.zeros_like(self.scale))
        self.manifest = [(name, tuple(w.shape)) for name, w in weights.items()]
        # modules_to_save's keys; not merged or disabled; copies of the weights while
        # merged
        self.saved, self.active, self.pretrained = [*saved], True, dict[str, Tensor]()
        self.owners = {name: names[id(w)] for name, w in own.items() if id(w) in names}
        self.flags = {name: w.requires_grad for name, w in own.items()}
        for m in model.modules():
            if adapted := {
                k: names[id(w)] for k, w in m._parameters.items() if id(w) in names
            }:
                m.__dict__["_adapter"] = (self, adapted, base := type(m))
                plain = type(f"Adapted{base.__name__}", (Adapted, base), {})
                m.__class__ = AdaptedLinear if fused and base is nn.Linear else plain
        for w in model.parameters():
            w.requires_grad_(id(w) in trained)
        model.gpart = self

    def parts(self, name: str, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, ids and scale for one weight: on its device, in promote(its dtype,
        float32). Ids on meta, as of weights there at attach, are computed each time
        until to_empty."""
        P, ids = self.partition, self.ids[name]
        ids = P.groups(*self.spans[name], w.device) if ids.is_meta else ids.to(w.device)
        scale = P.scale(dtype=w.dtype) if w.dtype is torch.float64 else self.scale
        return self.theta, ids, scale.to(w.device)

    def delta(self) -> dict[str, Tensor]:
        """{name: dW}, P theta cut and shaped by the manifest (Eq. 10): float32,
        differentiable."""
        return {n: expand(*self.parts(n, self.scale)).view(s) for n, s in self.manifest}

    def project(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """{name: dW} -> [d], P^T vec(dW): the theta whose P theta is nearest, so
        project(delta()) is theta. (Without isometry the nearest is (P^T P)^-1 P^T
        vec(dW).)"""
        wrong = {(name, tuple(dw.shape)) for name, dw in deltas.items()} ^ {
            *self.manifest
        }
        _require(
            not wrong,
            f"project needs exactly the manifest, got or lacks {sorted(wrong)[:2]}",
        )
        parts = (
            (dw.flatten(), *self.parts(name, dw)[1:]) for name, dw in deltas.items()
        )
        theta = sum(
            (reduce(*p).to(self.theta.device) for p in parts),
            torch.zeros_like(self.theta),
        )
        return (
            theta
            if self.partition.isometric
            else theta / self.partition.sizes().to(theta)
        )

    forward = (
        nn.Identity.forward
    )  # a model that is an nn.Sequential calls it as one more layer

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            "nn.DataParallel would lose the adapter: use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        return f"{self.partition}, merged={bool(self.pretrained)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.scale = self.scale.to(
            device := fn(self.theta.data[:0]).device
        )  # without casts
        self.ids = {
            name: self.parts(name, fn(ids[:0]))[1] for name, ids in self.ids.items()
        }
        self.pretrained = {name: fn(w) for name, w in self.pretrained.items()}
        return super()._apply(lambda t: t.to(device), recurse)  # type: ignore[no-untyped-call]


def attach(
    model: nn.Module,
    d: int,
    *,
    seed: int = 0,
    target_modules: str | Sequence[str] = ("query", "value"),
    modules_to_save: str | Sequence[str] = (),
    bias: bool = False,
    isometric: bool = True,
    fused: bool = True,
) -> GPart:
    """Freeze model and let one theta [d] move the weights of target_modules: w = w0 + P
    theta.

    As in PEFT, a name matches the modules whose whole name or dotted suffix it is, and
    "all-linear" every Linear and Conv1D but the output embeddings. What lies inside
    modules_to_save is trained whole instead. bias=True adds the targets' biases. A
    parameter tied between modules counts once and moves in all. fused=False puts
    nn.Linear on the plain path too, with equal results. Returns model.gpart.
    ValueError, and an unchanged model, for d or seed out of range, a name that matches
    nothing, a quantised weight, or a model that has an adapter.
    """
    whole = _match(model, modules_to_save, "modules_to_save")
    saved = [
        f"{path}.{key}" for path, module in whole.items() for key in module.state_dict()
    ]
    first: dict[
        int, tuple[str, Tensor]
    ] = {}  # a tied parameter has the first of its names
    for path, module in _match(
        model, target_modules, "target_modules", skip=whole
    ).items():
        _require(
            module._parameters.get("weight") is not None,
            f"{path} has no weight to adapt",
        )
        for name, w in module.named_parameters(path, recurse=False):
            if name.rpartition(".")[2] in ("weight", "bias")[: 1 + bias]:
                first.setdefault(id(w), (name, w))
    partition = Partition(sum(w.numel() for _, w in first.values()), d, seed, isometric)
    return GPart(model, partition, dict(first.values()), saved, fused)


def _match(
    model: nn.Module, names: Any, argument: str, skip: Any = ()
) -> dict[str, nn.Module]:
    """{path: module} of what names mean, in named_modules order, outside the modules in
    skip."""
    modules, found = dict(model.named_modules()), set()
    for name in [names] if isinstance(names, str) else names or ():
        hits = {path for path in modules if f".{path}".endswith(f".{name}")}
        if name == "all-linear":
            heads = [
                getattr(m, "get_output_embeddings", lambda: None)()
                for m in modules.values()
            ]
            rest = [(path, m) for path, m in modules.items() if m not in heads]
            hits = {
                p
                for p, m in rest
                if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
            }
        hits -= {p for p in hits for outer in skip if f"{p}.".startswith(f"{outer}.")}
        some = dict.fromkeys(
            p.rpartition(".")[2] for p, m in modules.items() if m._parameters
        )
        _require(
            hits,
            f"{argument}: no module matches {name!r} among {', '.join([*some][:12])}",
        )
        found |= hits
    return {path: module for path, module in modules.items() if path in found}


# --- 5. Merging ---
def _attached(model: nn.Module, write: bool = False) -> tuple[GPart, dict[str, Tensor]]:
    """The adapter and all it adapts, each name of a tied one: W, or W + P theta while
    merged."""
    g, own = (
        model._modules.get("gpart"),
        dict(model.named_parameters(remove_duplicate=False)),
    )
    if isinstance(g, GPart):
        away = write and any(own[name].is_meta for name in g.owners)
        _require(
            not away,
            "weights on meta cannot be merged or unmerged: give them values first",
        )
        return g, {name: own[name] for name in g.owners}
    raise ValueError(
        f"{type(model).__name__} has no adapter: attach or load one, or unwrap it"
    )


def merge(model: nn.Module) -> None:
    """W <- W + P theta in place: the forward equals the attached one at the plain
    model's cost. Added in promote(W's dtype, float32), cast once; keeps a copy of every
    W. ValueError if merged already, inside disabled(model), or if theta is not
    finite."""
    g, weights = _attached(model, write=True)
    _require(
        g.active,
        "merged or disabled already: unmerge(model), or leave the disabled block",
    )
    _require(
        g.theta.isfinite().all(), "theta has NaN or infinite values: nothing is merged"
    )
    g.pretrained, g.active = (
        {name: w.detach().clone() for name, w in weights.items()},
        False,
    )
    for name, w in weights.items():
        w.detach().copy_(
            add_update(g.pretrained[name], *g.parts(g.owners[name], w)).detach()
        )


def unmerge(model: nn.Module) -> None:
    """The pretrained weights again, bit for bit. ValueError if the adapter is not
    merged."""
    g, weights = _attached(model, write=True)
    _require(g.pretrained, "the adapter is not merged: merge(model) comes first")
    for name, w in weights.items():
        w.detach().copy_(g.pretrained[name])
    g.pretrained, g.active = {}, True


def detach(model: nn.Module, merge: bool = False) -> None:
    """Remove the adapter; the weights are the pretrained ones bit for bit, or W + P
    theta if merge. Classes and requires_grad are as attach found them; modules_to_save
    keep what they learnt."""
    g, _ = _attached(model)
    if merge != bool(g.pretrained):
        (globals()["merge"] if merge else unmerge)(
            model
        )  # the argument hides the function
    del model.gpart
    for module in model.modules():
        if isinstance(module, Adapted):
            module.__class__ = module.__dict__.pop("_adapter")[2]
    for name, w in model.named_parameters():
        w.requires_grad_(g.flags.get(name, w.requires_grad))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the weights are the pretrained ones, bit for bit;
    modules_to_save stay."""
    g, _ = _attached(model)
    active, merged = g.active, bool(g.pretrained)
    if merged:
        unmerge(model)
    g.active = False
    try:
        yield
    finally:
        g.active = active or merged
        if merged and model._modules.get("gpart") is g:  # not detached inside the block
            merge(model)


# --- 6. Storage ---
def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The adapter's identity: sha256 of the other metadata, then of every tensor by
    name."""
    compact = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    sha = hashlib.sha256(compact(metadata).encode())
    for name, t in sorted(tensors.items()):
        sha.update(
            compact([name, str(t.dtype).removeprefix("torch."), t.shape]).encode()
        )
        sha.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(model: nn.Module, path: Path) -> None:
    """Write theta, modules_to_save and all that the seed means to one .safetensors
    file. 4 d bytes, the head and a few kB of names. Written beside path and renamed: a
    crash leaves the old file or the new one. Works while merged too. ValueError if a
    value is not finite.
    """
    (g, _), state = _attached(model), model.state_dict()
    tensors = {
        "theta": g.theta.detach().float(),
        **{key: state[key] for key in g.saved},
    }
    for name, t in tensors.items():
        t = t.full_tensor() if hasattr(t, "full_tensor") else t  # FSDP2 shards it
        _require(
            not t.is_meta and t.isfinite().all(),
            f"{name} has NaN or infinite values or none",
        )
        tensors[name] = t.cpu().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": FORMAT,
        "gpart_version": __version__,
        "manifest": json.dumps(g.manifest),
    }
    metadata |= {key: json.dumps(value) for key, value in vars(g.partition).items()}
    metadata["base_model_name_or_path"] = str(getattr(model, "name_or_path", ""))
    metadata["sha256"] = _digest(metadata, tensors)
    with tempfile.TemporaryDirectory(
        prefix=".gpart-", dir=os.path.dirname(path) or "."
    ) as folder:
        part = os.path.join(folder, "adapter.safetensors")
        safetensors.torch.save_file(tensors, part, metadata)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)


def load(
    model: nn.Module, path: Path, rename: Mapping[str, str] | None = None
) -> GPart:
    """Attach the adapter in path by its manifest; if model has that one attached, swap
    theta. The weights are bit-identical in any process, on any device and release.
    rename={stored: here} maps parameter names that another release of the model spells
    otherwise. ValueError, and an unchanged model, if the file is damaged, foreign,
    newer or longer than an adapter of the model can be, or has a name, shape or kind of
    dtype that the model has not; OSError if not opened.
    """
    own = {**model.state_dict(), **dict(model.named_parameters(remove_duplicate=False))}
    rename, numel = (
        rename or {},
        sum(w.numel() for w in [*model.parameters(), *model.buffers()]),
    )
    with open(path, "rb") as file:
        head, size = int.from_bytes(file.read(8), "little"), file.seek(0, os.SEEK_END)
    try:  # refuse unread what no adapter of this model needs: 1 kB per tensor, 8 bytes per number
        _require(
            head <= 1024 * (64 + len(own)) and size <= 8 + head + 8 * numel,
            "it is too long",
        )
        with safetensors.safe_open(path, framework="pt") as f:
            metadata, stored = (
                f.metadata() or {},
                {key: f.get_tensor(key) for key in [*f.keys()]},
            )
        _require(
            metadata.get("format") == FORMAT,
            f"format {metadata.get('format')}, not {FORMAT}",
        )
        _require(
            metadata.pop("sha256", None) == _digest(metadata, stored),
            "its sha256 is wrong",
        )
        P = Partition(
            *(json.loads(metadata[key]) for key in ("N", "d", "seed", "isometric"))
        )
        manifest = [
            (rename.get(n, n), tuple(s)) for n, s in json.loads(metadata["manifest"])
        ]
        got = f"{(theta := stored.pop('theta')).dtype} {[*theta.shape]}"
        _require(
            got == f"torch.float32 [{P.d}]", f"its theta is {got}, not float32 [{P.d}]"
        )
        _require(
            all(t.isfinite().all() for t in [theta, *stored.values()]),
            "it has NaN or inf",
        )
    except Exception as error:
        raise ValueError(f"{path} is no usable adapter file: {error!s:.500}") from error
    heads = {rename.get(name, name): t for name, t in stored.items()}
    for name, shape in [*manifest, *((name, (*t.shape,)) for name, t in heads.items())]:
        here = (
            tuple(own[name].shape)
            if name in own
            else "nothing; rename={stored: here} maps it"
        )
        _require(
            here == shape, f"{path} has {name} of shape {shape}, the model has {here}"
        )
    types = [
        (own[name].dtype, t.dtype) for name, t in heads.items() if not own[name].is_meta
    ]
    alike = all(torch.can_cast(a, b) and torch.can_cast(b, a) for a, b in types)
    unique = len(names := dict(manifest)) == len(manifest) and len(types) == len(stored)
    whole = alike and unique and sum(own[name].numel() for name in names) == P.N
    _require(
        whole,
        f"{path} repeats a name, has wrong dtypes, meta heads or does not add up to N",
    )
    g = model._modules.get("gpart")
    g = (
        g
        if isinstance(g, GPart)
        else GPart(model, P, {n: own[n] for n in names}, heads, True)
    )
    _require(
        not g.pretrained and not g.theta.is_meta,
        "merged, or on meta: unmerge(model) first",
    )
    for new, old in ((P, g.partition), ({*heads}, {*g.saved}), (manifest, g.manifest)):
        _require(new == old, f"{path} has {new}, the model {old}: detach(model) first")
    for w, t in [(g.theta, theta), *((own[name], t) for name, t in heads.items())]:
        w.detach().copy_(t)
    return g
