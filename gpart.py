# SPDX-License-Identifier: Apache-2.0
# gpart.py 0.2.0, the GPart reference implementation: one file, made to be copied.
"""GPart, end-to-end isometric fine-tuning (Mandica et al., arXiv 2605.14841).

A frozen model's weights w0 [N] are dealt into d groups; theta [d] is what trains:

    P[i, j] = 1/sqrt(n_j) if g(i) = j else 0    (Eq. 7)    Partition; P^T P = I_d
    w = w0 + P theta                            (Eq. 9)    expand, add_update
    grad_theta L = P^T grad_w L                 (Eq. 11)   reduce, FusedLinear

P is an isometry: distances, gradients and L2 penalties of theta are the update's.

    N, d       numbers of adapted and of trained weights; d is the one hyperparameter
    theta      float32 [d], zero at the start
    ids        g(i), the group of each weight, from a seed: int32
    scale      1/sqrt(n_j), n_j being the size of group j; ones if isometric=False
    manifest   the adapted parameters in the order of w: [(name, shape), ...]

Featuring any kind of layer, one matrix product a layer, a file of theta and a seed.
Not included: several adapters at once, quantised weights, dropout on the update.

>>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
>>> attach(net, d=5, target_modules="all-linear")
GPart(Partition(N=18, d=5, seed=0, isometric=True), merged=False)
>>> [name for name, w in net.named_parameters() if w.requires_grad]
['gpart.theta']
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import safetensors.torch
import torch
from torch import Tensor, nn

__version__ = "0.2.0"
Device = torch.device | str
Names = str | Sequence[str]
Path = str | os.PathLike[str]


def require(condition, message):
    if not condition:
        raise ValueError(message[:1000])  # it may quote a hostile file


# ------------------------------ Part I: the method ------------------------------------

# The permutation is made of integers only. A seed then means the same on every device,
# release and shard, which no library's random generator promises.


def round_keys(seed, rounds):
    """The top 31 bits of the first outputs of SplitMix64 (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    keys = []
    for t in range(1, rounds + 1):
        z = (seed + t * 0x9E3779B97F4A7C15) & mask
        z ^= z >> 30
        z = (z * 0xBF58476D1CE4E5B9) & mask
        z ^= z >> 27
        z = (z * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        keys.append(z >> 33)
    return keys


def round_function(key, x):
    """A hash of 31 bits, so no int64 product overflows (constants: Wellons 2018)."""
    mask = 2**31 - 1
    x = x ^ key
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= mask
    x ^= x >> 15
    x *= 0x46CA68B5
    x &= mask
    x ^= x >> 16
    return x


def permute(i, N, seed):
    """pi(i), a seeded bijection of 0..N-1, each index by itself: int64 [n] -> [n].

    A Feistel network on the grid Z_a x Z_b (Black and Rogaway 2002) that just holds N.
    What lands on a cell beyond N goes through again until it does not (cycle walking).

    >>> permute(torch.arange(6), N=6, seed=0).tolist()
    [2, 3, 4, 0, 1, 5]
    """
    a = math.isqrt(N - 1) + 1
    b = -(-N // a)
    # Measured: small N need 16 rounds before all permutations are equally likely; from
    # 2^16 up, 6 rounds pass the pairwise chi-square tests that 3 fail.
    rounds = 16 if N < 2**16 else 6
    left, right = i // b, i % b
    for t, key in enumerate(round_keys(seed, rounds)):
        if t % 2 == 0:
            left += round_function(key, right)
            left %= a
        else:
            right += round_function(key, left)
            right %= b
    x = left * b + right
    beyond = x >= N
    if beyond.any():
        x[beyond] = permute(x[beyond], N, seed)
    return x


def expand(theta, ids, scale):
    """(P theta)_i = theta_g(i) / sqrt(n_g(i)) for weights in ids, in scale's dtype."""
    return (theta.to(scale) * scale).index_select(0, ids)  # [d] -> [n]


def reduce(w, ids, scale):
    """(P^T w)_j = sum of group j's w_i / sqrt(n_j), summed in scale's dtype."""
    return torch.zeros_like(scale).index_add(0, ids, w.to(scale)) * scale  # [n] -> [d]


@dataclasses.dataclass(frozen=True)
class Partition:
    """P [N, d], never materialised: P^T P = I_d, so ||P theta|| = ||theta||.

    Weight i is in group g(i) = pi(i) mod d: sizes differ by at most one, none is empty.
    With isometric=False the scale is left out: P^T P = diag(n_1..n_d) (Appendix B).
    TypeError unless N, d and seed are ints; ValueError out of range.

    >>> P = Partition(N=6, d=2, seed=0)
    >>> P.groups().tolist(), P.groups(2, 4).tolist(), P.sizes().tolist()
    ([0, 1, 0, 0, 1, 1], [0, 0], [3, 3])
    """

    N: int
    d: int
    seed: int = 0
    isometric: bool = True

    def __post_init__(self) -> None:
        N, d, seed = self.N, self.d, self.seed
        if [type(v) for v in vars(self).values()] != [int, int, int, bool]:
            raise TypeError(f"N, d and seed are ints, isometric is a bool, got {self}")
        require(1 <= N <= 2**62, f"N must be in 1..2^62, got {N}")
        require(1 <= d <= N, f"d must be in 1..N = 1..{N}, got {d}")
        require(d < 2**31, f"d must be below 2^31, for ids are int32, got {d}")
        require(0 <= seed < 2**64, f"seed must be in 0..2^64-1, got {seed}")

    def groups(
        self, start: int = 0, stop: int | None = None, device: Device = "cpu"
    ) -> Tensor:
        """g(start..stop-1), int32 [stop - start]: equal to that slice of the whole."""
        stop = self.N if stop is None else stop
        require(0 <= start <= stop <= self.N, f"need 0 <= {start=} <= {stop=} <= N")
        # Other devices than these two compute on the host: MPS had wrong remainders.
        host = device if torch.device(device).type == "cuda" else "cpu"
        with torch.inference_mode(False):  # else the threads could not write to ids
            ids = torch.empty(stop - start, dtype=torch.int32, device=host)
        # A CPU wants chunks that stay in its cache, CUDA few launches.
        chunk = 2**24 if ids.is_cuda else 2**15
        threads = 1 if ids.is_cuda else torch.get_num_threads()

        def fill(at):
            i = torch.arange(at, min(at + chunk, stop), device=ids.device)
            group = permute(i, self.N, self.seed) % self.d
            ids[at - start : at - start + chunk] = group

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(start, stop, chunk)))
        return ids.to(device)

    def sizes(self) -> Tensor:
        """n_j = floor(N/d), one more in the first N mod d groups: int64 [d]."""
        larger = torch.arange(self.d, device="cpu") < self.N % self.d
        return self.N // self.d + larger.long()

    def scale(
        self, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """1/sqrt(n_j), or ones: [d], rounded from float64 on the host everywhere."""
        sizes = self.sizes().double()
        if not self.isometric:
            sizes = torch.ones_like(sizes)
        return sizes.sqrt().reciprocal().to(dtype).to(device)

    def expand(self, theta: Tensor) -> Tensor:
        """P @ theta: [d] -> [N], in promote(theta's dtype, float32)."""
        return expand(theta, *self.operands(theta, self.d))

    def reduce(self, w: Tensor) -> Tensor:
        """P^T @ w: [N] -> [d], summed in promote(w's dtype, float32)."""
        return reduce(w, *self.operands(w, self.N))

    def operands(self, v, length):
        require(v.shape == (length,), f"need a vector [{length}], got {list(v.shape)}")
        dtype = torch.promote_types(v.dtype, torch.float32)
        return self.groups(device=v.device), self.scale(v.device, dtype)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """P itself, [N, d], for teaching and tests."""
        one_hot = nn.functional.one_hot(self.groups().long(), self.d)
        return one_hot * self.scale(dtype=dtype)


def add_update(w, theta, ids, scale):
    """W + P theta (Eq. 9) for one weight: added in scale's dtype, cast to W's once."""
    return expand(theta, ids, scale).view(w.shape).add_(w).to(w.dtype)


class FusedLinear(torch.autograd.Function):
    """y = x (W + P theta)^T + b for rows x [n, in], W [out, in], theta [d].

    Backward keeps what exists anyway, the inputs, and builds W + P theta again.
    The plain path, autograd through add_update, gives the same numbers and keeps a copy
    of W. (torch.compile merges both builds and keeps W + P theta too, unless
    functorch's aggressive_recomputation is set.)
    """

    generate_vmap_rule = True  # for torch.func's vmap, grad and jacrev

    @staticmethod
    def forward(x, w, b, theta, ids, scale):
        return nn.functional.linear(x, add_update(w, theta, ids, scale), b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_y):
        x, w, _, theta, ids, scale = ctx.saved_tensors
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:  # in grad_y's dtype, which autocast may have set
            grad_x = grad_y @ add_update(w, theta, ids, scale).to(grad_y)
        if ctx.needs_input_grad[2]:
            grad_b = grad_y.sum(0)
        grad_w = grad_y.T @ x.to(grad_y)  # [out, n] @ [n, in] -> [out, in]
        grad_theta = reduce(grad_w.flatten(), ids, scale)  # Eq. 11: [out * in] -> [d]
        return grad_x, grad_w, grad_b, grad_theta.to(theta), None, None


# ------------------------------ Part II: the adapter ----------------------------------

FORMAT = "gpart-v1"  # names the permutation and the file: who changes one renames both
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
TARGETS = 'target_modules (by default query and value; "all-linear" would do)'


class GPart(nn.Identity):  # a model that is an nn.Sequential calls it as a layer
    """The adapter, model.gpart: .theta is trained, .partition is P, .manifest its rows.

    theta stays float32 whatever the model is cast to. ids and scale are no buffers:
    the seed gives them, and DistributedDataParallel would send buffers around.
    """

    def __init__(self, partition, name_of, own):
        super().__init__()
        self.partition = partition
        self.manifest = [(name, tuple(w.shape)) for w, name in name_of.items()]
        ids = {}
        start = 0
        for w in name_of:
            ids[w] = partition.groups(start, start + w.numel(), w.device)
            start += w.numel()
        # By each name of an adapted parameter: a tied one has several.
        self.ids = {name: ids[t] for name, t in own.items() if t in ids}
        self.scale = partition.scale(w.device)
        self.theta = nn.Parameter(torch.zeros_like(self.scale))
        self.active = True  # False while merged or disabled
        self.pretrained = {}  # {name: copy of W} while merged
        self.required_grad = {name: t.requires_grad for name, t in own.items()}

    def operands(self, name, w):
        """theta, ids and scale for a weight, on its device, in promote(dtype, fp32)."""
        scale = self.scale
        if w.dtype == torch.float64:
            scale = self.partition.scale(dtype=w.dtype)
        return self.theta, self.ids[name].to(w.device), scale.to(w.device)

    def updated(self, name, w):
        return add_update(w, *self.operands(name, w))

    def delta(self) -> dict[str, Tensor]:
        """{name: dW}, P theta cut by the manifest (Eq. 10): float32, differentiable."""
        zeros = {name: self.scale.new_zeros(shape) for name, shape in self.manifest}
        return {name: self.updated(name, zero) for name, zero in zeros.items()}

    def extra_repr(self) -> str:
        return f"{self.partition}, merged={bool(self.pretrained)}"

    def meaning(self):
        """What a theta means: P and the manifest, as the JSON of a file's metadata."""
        values = {**vars(self.partition), "manifest": self.manifest}
        return {key: json.dumps(value) for key, value in values.items()}

    def get_extra_state(self) -> Tensor:
        text = json.dumps(self.meaning())
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        theirs, ours = json.loads(bytes(state.tolist())), self.meaning()
        sides = f"{theirs!s:.300}, the model {ours!s:.300}"
        require(theirs == ours, f"the state dict has {sides}: attach the model like it")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "_extra_state" in state_dict:  # before theta is overwritten
            self.set_extra_state(state_dict[prefix + "_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # moved, and never cast
        self.ids = {name: ids.to(self.theta.device) for name, ids in self.ids.items()}
        self.scale = self.scale.to(self.theta.device)
        return self

    def _replicate_for_data_parallel(self):
        raise ValueError("DataParallel loses the adapter: use DistributedDataParallel")


class Adapted(nn.Module):
    """Mixed into the class of each module that owns an adapted parameter.

    nn.Module keeps parameters where Python finds no attribute, and so asks __getattr__:
    there a reader gets W + P theta, computed at each reading (of .weight.dtype too).
    parameters() and the state dict hold the frozen W. Not served is who reads
    module._parameters, keeps the Parameter, or writes to layer.weight.
    """

    def __getattr__(self, name):
        value = super().__getattr__(name)
        adapter, names = self._adapter
        if name not in names or not adapter.active:
            return value
        if isinstance(value, torch.fx.Proxy):
            raise TypeError("fx would freeze theta: trace inside disabled(model)")
        if hasattr(value, "full_tensor"):  # FSDP2 looks at its shard
            return value
        return adapter.updated(names[name], value)

    def __reduce_ex__(self, protocol):
        # pickle finds no mixed class by name: it is told what to mix again
        _, _, *state = super().__reduce_ex__(protocol)
        return blank, type(self).__bases__, *state


class AdaptedLinear(Adapted):
    """Mixed into an nn.Linear, which is then on the fused path."""

    def forward(self, input):
        adapter, names = self._adapter
        if "weight" not in names or not adapter.active:
            return super().forward(input)
        w = self._parameters["weight"]
        operands = adapter.operands(names["weight"], w)
        if input.dim() == 2:
            return FusedLinear.apply(input, w, self.bias, *operands)
        # Reshaped out here, y may be changed in place: autograd forbids that to what is
        # a view inside a Function.
        rows = input.reshape(-1, input.shape[-1])  # [..., in] -> [n, in]
        y = FusedLinear.apply(rows, w, self.bias, *operands)
        return y.view(*input.shape[:-1], len(w))  # [n, out] -> [..., out]


@functools.cache
def mixed(adapted, base):
    """One class for each base."""
    return type(f"Adapted{base.__name__}", (adapted, base), {})


def blank(adapted, base):
    cls = mixed(adapted, base)
    return cls.__new__(cls)


# --- Attaching to a model ---


def attach(
    model: nn.Module,
    d: int,
    *,
    seed: int = 0,
    target_modules: Names = ("query", "value"),
    modules_to_save: Names = (),
    isometric: bool = True,
    fused: bool = True,
) -> GPart:
    """Freeze model and let one theta [d] move its targets. Returns model.gpart.

    d: how many numbers train, 1..N for N adapted weights.
    seed: of the partition, 0..2^64-1. The global random state is not touched.
    target_modules: a name, or several, each whole or from a dot on. "query" means every
        ….query.weight; "in_proj_weight" or "query.bias" a parameter that is called so
        ("bias" is every bias). "all-linear" is the weight of each Linear and Conv1D but
        the output embeddings. A tied parameter counts once and moves everywhere.
    modules_to_save: names of modules that are trained whole, and saved.
    isometric: False leaves the scale out (Appendix B).
    fused: False puts nn.Linear on the plain path too.

    Attach after the model is loaded and on its devices; compile, shard and make the
    optimizer afterwards. ValueError, and no change, if a value is out of range, a name
    matches nothing, a weight cannot be adapted or the model has an adapter.
    """
    own = own_tensors(model)
    linear = linear_weights(model)

    def target(full, name):
        if name == "all-linear":
            return full in linear
        return f".{full}".endswith((f".{name}", f".{name}.weight"))

    def inside(full, name):
        return f".{name}." in f".{full}"

    saved = select(own, modules_to_save or (), inside, "modules_to_save")
    rest = {full: t for full, t in own.items() if full not in saved}
    name_of = {}
    for full in select(rest, target_modules, target, TARGETS):
        name_of.setdefault(own[full], full)  # a tied weight goes by its first name
    require(name_of, "target_modules is empty: nothing to adapt")
    partition = Partition(sum(w.numel() for w in name_of), d, seed, isometric)
    return install(model, own, partition, name_of, saved, fused)


def own_tensors(model):
    """{name: tensor} of the model alone: frozen parameters and persistent buffers."""
    kind = type(model).__name__
    wraps = kind in ("OptimizedModule", "DistributedDataParallel", "DataParallel")
    if wraps or not isinstance(model, nn.Module):
        raise TypeError(f"pass a model, a wrapper's ._orig_mod or .module, not {kind}")
    state = model.state_dict(keep_vars=True)
    return {
        name: t
        for name, t in state.items()
        if isinstance(t, Tensor) and not name.startswith("gpart.")
    }


def linear_weights(model):
    """Names of the weights of every Linear and Conv1D but the output embeddings."""
    heads = []
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):
            heads.append(module.get_output_embeddings())
    names = set()
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module not in heads:
            names.add(f"{path}.weight".removeprefix("."))
    return names


def select(own, names, means, argument):
    """Names of the tensors in own that names mean. ValueError if one means none."""
    parts = ", ".join(dict.fromkeys(".".join(own).split(".")))
    found = set()
    for name in [names] if isinstance(names, str) else names:
        meant = {full for full in own if means(full, name)}
        require(meant, f"{argument}: the model has no {name!r} but {parts:.300}…")
        found |= meant
    return [full for full in own if full in found]


def install(model, own, partition, name_of, saved, fused):
    """Adapt the weights of name_of, {parameter: name}, in that order."""
    check_weights(model, own, name_of, saved)
    adapter = GPart(partition, name_of, own)  # nothing fails from here on
    model.requires_grad_(False)
    unfreeze(adapter, own, saved)
    # A subclass of nn.Linear has a forward of its own.
    faster = {nn.Linear: AdaptedLinear} if fused else {}
    for module in model.modules():
        parameters = module._parameters.items()
        names = {key: name_of[w] for key, w in parameters if w in name_of}
        if names:
            module._adapter = (adapter, names)
            base = type(module)
            module.__class__ = mixed(faster.get(base, Adapted), base)
    model.gpart = adapter
    return adapter


def check_weights(model, own, name_of, saved):
    """ValueError for what cannot be adapted, or would be to no effect."""
    taken = any(isinstance(module, Adapted) for module in model.modules())
    require(not taken and not hasattr(model, "gpart"), "adapted already: detach first")
    for name in saved:
        require(own[name] not in name_of, f"{name} is adapted: it cannot be saved too")
    for w, name in name_of.items():
        plain = type(w) is nn.Parameter and w.dtype in FLOATS and not w.is_meta
        kind = f"{type(w).__name__} of {w.dtype} on {w.device}"
        require(plain, f"{name} is a {kind}: attach before quantising and sharding")
        layer = model.get_submodule(name.rpartition(".")[0])
        unread = isinstance(layer, nn.RNNBase) or getattr(layer, "sparse", False)
        require(not unread, f"{layer} would not see that {name} changes")


def unfreeze(adapter, own, names):
    """Train what can be of names, which save and load carry."""
    adapter.saved = set(names)
    for name in names:
        t = own[name]
        if isinstance(t, nn.Parameter):  # of whole numbers it has no gradient
            t.requires_grad_(t.is_floating_point() or t.is_complex())


# --- Merging ---


def adapter_of(model):
    """The adapter and the model's own tensors."""
    own = own_tensors(model)
    adapter = model._modules.get("gpart")
    found = isinstance(adapter, GPart)
    require(found, "no adapter here: attach one, and pass the model")
    return adapter, own


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + P theta in place, cast once: the attached forward at the plain cost.

    Keeps a copy of every W; theta gets no gradient while merged. ValueError if merged
    already, inside disabled(model), or if theta is not finite.
    """
    adapter, own = adapter_of(model)
    require(not adapter.pretrained, "merged already: unmerge(model) first")
    require(adapter.active, "inside disabled(model): leave it first")
    require(adapter.theta.isfinite().all(), "theta is not finite: nothing is merged")
    adapter.pretrained = {name: own[name].clone() for name in adapter.ids}
    adapter.active = False
    for name, w in adapter.pretrained.items():
        own[name].copy_(adapter.updated(name, w))


_merge = merge  # detach has an argument of that name


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """The pretrained weights again, bit for bit. ValueError if not merged."""
    adapter, own = adapter_of(model)
    require(adapter.pretrained, "not merged: there is nothing to undo")
    for name, w in adapter.pretrained.items():
        own[name].copy_(w)
    adapter.pretrained = {}
    adapter.active = True


def detach(model: nn.Module, merge: bool = False) -> None:
    """Remove the adapter: the pretrained weights bit for bit, or W + P theta if merge.

    Classes and requires_grad are as before attach; modules_to_save keep what they have.
    """
    adapter, own = adapter_of(model)
    if merge and not adapter.pretrained:
        _merge(model)
    if adapter.pretrained and not merge:
        unmerge(model)
    del model.gpart
    for module in model.modules():
        if isinstance(module, Adapted):
            del module._adapter
            module.__class__ = type(module).__bases__[1]
    for name, t in own.items():
        t.requires_grad_(adapter.required_grad.get(name, t.requires_grad))


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The pretrained weights inside the block, bit for bit. ValueError while merged."""
    adapter, _ = adapter_of(model)
    require(not adapter.pretrained, "merged: unmerge(model) first")
    before = adapter.active
    adapter.active = False
    try:
        yield
    finally:
        adapter.active = before


# --- Storage ---


def digest(metadata, tensors):
    """The adapter's identity: sha256 of the other metadata, then of each tensor."""
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    sha = hashlib.sha256(encode(metadata).encode())
    for name, t in sorted(tensors.items()):
        head = [name, str(t.dtype).removeprefix("torch."), t.shape]
        sha.update(encode(head).encode())
        sha.update(t.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def whole(t):
    """A copy of t in one piece, on the host."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t  # FSDP2 shards it
    return t.detach().cpu().clone(memory_format=torch.contiguous_format)


def to_save(adapter, own):
    """Names of what a file holds beside theta: modules_to_save, what else requires a
    gradient, and the buffers of modules that own such a parameter."""
    names = {name for name, t in own.items() if t.requires_grad}
    owners = {name.rpartition(".")[0] for name in names}
    for name, t in own.items():
        if name.rpartition(".")[0] in owners and not isinstance(t, nn.Parameter):
            names.add(name)
    return names | adapter.saved


def base_sums(tensors):
    """{name: sum} by which load knows the base: float64, to six digits, of entries
    rounded to bfloat16, so that a cast to 16 bits changes nothing."""
    sums = {}
    for name, t in tensors.items():
        if t.dtype in FLOATS and not t.is_meta:
            total = whole(t).bfloat16().sum(dtype=torch.float64).item()
            if math.isfinite(total):
                sums[name] = float(f"{total:.6g}")
    return sums


def save(model: nn.Module, path: Path) -> None:
    """Write theta, what else trains and what the seed means to a .safetensors file.

    4 d bytes, the head, and some kB of names. Written beside path and renamed: a crash
    leaves the old file or the new. Works while merged. ValueError if a value is not
    finite or an adapted weight was unfrozen; OSError if path cannot be written.
    """
    adapter, own = adapter_of(model)
    folder = os.path.dirname(os.path.abspath(path))
    os.stat(folder)  # an error that names it, not the temporary folder
    require("theta" not in own, "the model has a parameter called theta: rename it")
    tensors = {"theta": whole(adapter.theta)}
    for name in to_save(adapter, own):
        require(name not in adapter.ids, f"{name} is adapted: it must stay frozen")
        tensors[name] = whole(own.pop(name))
    for name, t in tensors.items():
        require(t.isfinite().all(), f"{name} is not finite: nothing saved")
    base_name = str(getattr(model, "name_or_path", ""))
    if os.path.isabs(base_name):
        base_name = os.path.basename(os.path.normpath(base_name))
    metadata = {
        "format": FORMAT,
        "gpart_version": __version__,
        "base_model_name_or_path": base_name,
        "base": json.dumps(base_sums(own | adapter.pretrained)),
        **adapter.meaning(),
    }
    metadata["sha256"] = digest(metadata, tensors)
    with tempfile.TemporaryDirectory(prefix=".gpart-", dir=folder) as beside:
        part = os.path.join(beside, "adapter.safetensors")
        safetensors.torch.save_file(tensors, part, metadata)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def load(model: nn.Module, path: Path) -> GPart:
    """Attach the adapter in path by its manifest, with what trained beside it.

    If model has it attached (same seed, d, manifest) only values are replaced: theta is
    the same Parameter. The weights are bit-identical in any process, on any device and
    release. ValueError, and no change, if the file is damaged, foreign, newer, does not
    fit the model, or lacks what trains here; OSError if it cannot be opened.
    UserWarning if the other weights are not those of the training.
    """
    own = own_tensors(model)
    partition, name_of, base, theta, heads = read(path, own)
    adapter = model._modules.get("gpart")
    if isinstance(adapter, GPart):
        require(not adapter.pretrained, "merged: unmerge(model), then load")
        manifest = [(name, tuple(w.shape)) for w, name in name_of.items()]
        theirs, ours = (partition, manifest), (adapter.partition, adapter.manifest)
        sides = f"{path} has {theirs!s:.300}, the model {ours!s:.300}"
        require(theirs == ours, f"{sides}: detach first")
        missing = to_save(adapter, own) - heads.keys()
        require(not missing, f"{path} lacks {missing!s:.300} that train: detach first")
        unfreeze(adapter, own, heads)
    else:
        adapter = install(model, own, partition, name_of, heads, fused=True)
    with torch.no_grad():
        adapter.theta.copy_(theta)
        for name, t in heads.items():
            own[name].copy_(t)
    warn_of_another_base(own, base)
    return adapter


def read(path, own):
    """(partition, {parameter: name}, base, theta, heads) of a file that fits the model.

    The header comes first: no tensor is read that the model has no place for.
    """
    with open(path, "rb"):
        pass  # the OSError of a path that cannot be opened
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            partition, name_of, base = fit(own, metadata, shapes)
            tensors = {name: file.get_tensor(name) for name in names}
        for name, t in tensors.items():
            ours = torch.float32 if name == "theta" else own[name].dtype
            cast = name != "theta" and {t.dtype, ours} <= FLOATS
            require(cast or t.dtype == ours, f"{name} in {t.dtype} does not fit")
            require(t.isfinite().all(), f"{name} is not finite")
    except (
        AttributeError,  # a dtype that this torch does not know
        OverflowError,
        RuntimeError,  # too deep, or too long for this machine
        TypeError,
        ValueError,
        safetensors.SafetensorError,
    ) as error:
        text = f"{path} is no adapter of this model: {error!s:.500}"
        raise ValueError(text) from error
    signature = metadata.pop("sha256", None)
    require(signature == digest(metadata, tensors), f"{path} is damaged: wrong sha256")
    return partition, name_of, base, tensors.pop("theta"), tensors


def fit(own, metadata, shapes):
    """What a header says, if the model has a place for all of it."""
    found = metadata.get("format")
    require(found == FORMAT, f"its format is {found}, not {FORMAT}")
    keys = ("N", "d", "seed", "isometric", "manifest", "base")
    *numbers, entries, sums = (json.loads(metadata.get(key, "{}")) for key in keys)
    partition = Partition(*numbers)
    theta = shapes.pop("theta", None)
    require(theta == [partition.d], f"theta has shape {theta}, not [{partition.d}]")
    for name, shape in [*entries, *shapes.items()]:
        ours = list(own[name].shape) if name in own else None
        require(list(shape) == ours, f"{name} has shape {shape}, and {ours} here")
    name_of = {own[name]: name for name, _ in entries}
    total = sum(w.numel() for w in name_of)
    require(total == partition.N, f"{total} weights are adapted, not {partition.N}")
    require(len(name_of) == len(entries), "the manifest names a parameter twice")
    for name in shapes:
        require(own[name] not in name_of, f"{name} is adapted, and replaced too")
    return partition, name_of, {name: float(total) for name, total in sums.items()}


def warn_of_another_base(own, base):
    sums = base_sums(own)
    for name, total in base.items():
        off = abs(sums.get(name, total) - total)
        if off and off > 0.01 * own[name].detach().double().norm().item():
            text = "is not what the adapter was trained on: another checkpoint, a head"
            text += " not in modules_to_save, or BatchNorm statistics that moved?"
            warnings.warn(f"{name} {text}", stacklevel=3)
            return
