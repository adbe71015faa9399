# SPDX-License-Identifier: Apache-2.0
"""The method, proved by execution: each test is a theorem, its docstring the statement.

Notation: P in R^{N x d} is a drawn partition, t and s are vectors in R^d, w is one in
R^N, n_j is the size of group j, Q = P P^T. What the library computes without ever
forming P is compared with the dense P of its definition, in float64; the partition is
compared with a second statement of the format, in plain integers. Hypothesis draws N,
d, the seed and the vectors, and shrinks a failure to the smallest partition that breaks
the law. In the order of the file:

    P itself       entries (Eq. 7), P^T P = I (Eq. 8), diag(n) without isometry (Appendix B),
                   norms, inner products, distances, injectivity
    P and P^T      expand is P t (Eq. 10), reduce is P^T w, the adjoint identity, d = 1 and d = N
    P P^T          the orthogonal projection; GPart.project is the nearest point
    gradients      y at w0 + P theta (Eq. 9), grad_theta = P^T grad_w (Eq. 11) and its norm
    weight decay   L2 (Eq. 18), SGD, AdamW, and what each means without isometry
    partition      sizes, bijection, nesting, slices, chunks, seeds
    exactness      merge and unmerge, disabled, detach, save and load: bit for bit
    life cycle     after any calls in any order: the weights, the outputs, what detach gives
    N <= 24        every (N, d), not sampled
    format         gpart-v1 against plain integers, and its golden vectors

HYPOTHESIS_PROFILE=dev draws new examples at each run; the default, ci, always draws the
same ones.
"""

import copy
import dataclasses
import functools
import itertools
import math
import operator
import os
import pickle
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from safetensors import safe_open
from torch import Tensor, nn

import gpart
from gpart import GPart, Partition, attach, detach, disabled, load, merge, save, unmerge

BUSY = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a shared machine
settings.register_profile("ci", BUSY, derandomize=True, max_examples=50, database=None)
settings.register_profile("dev", BUSY, max_examples=200)
PHASES = [Phase.explicit, Phase.generate]  # no shrinking: a mutant need only fail
settings.register_profile(
    "quick", settings.get_profile("ci"), max_examples=10, phases=PHASES
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LR, DECAY = 0.125, 0.3
RANDOM = st.integers(0, 2**32 - 1)  # seeds of the vectors; small ones shrink well
SEEDS = st.integers(0, 2**64 - 1)  # seeds of the partition
EDGES = [
    (1, 1),
    (12, 1),
    (12, 12),
    (12, 5),
    (24, 6),
]  # d = 1, d = N, d not a divisor of N, and one
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


# --- Drawing ---
@st.composite
def partitions(draw: st.DrawFn, variants: tuple[bool, ...], max_N: int) -> Partition:
    """P with isometric in variants; shrinks to N = d = 1."""
    N = draw(st.integers(1, max_N))
    d = draw(st.integers(1, N) | st.just(N))
    return Partition(N, d, draw(SEEDS), draw(st.sampled_from(variants)))


def for_all(*variants: bool, max_N: int = 100) -> Callable[[Any], Any]:
    """Test the law for drawn partitions P and vector seeds, and for every edge case."""

    def decorate(law: Any) -> Any:
        law = given(P=partitions(variants, max_N), seed=RANDOM)(law)
        for N, d in EDGES:
            for isometric in variants:
                law = example(P=Partition(N, d, 1, isometric), seed=0)(law)
        return law

    return decorate


def normals(seed: int, *lengths: int) -> list[Tensor]:
    """Independent standard normal vectors, float64."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=source, dtype=torch.float64) for n in lengths]


@st.composite
def adapters(
    draw: st.DrawFn, *dtypes: torch.dtype, head: bool = False
) -> tuple[nn.Module, nn.Module, GPart]:
    """A pretrained network, its adapted copy on a drawn path, and the adapter, theta
    random.

    Two Linears, an Embedding and a Conv1d; with head, the last Linear is in
    modules_to_save.
    """
    a, b, c = draw(st.tuples(*[st.integers(1, 4)] * 3))
    layers = (
        nn.Embedding(5, a),
        nn.Linear(a, b),
        nn.Tanh(),
        nn.Conv1d(3, 2, 1),
        nn.Linear(b, c),
    )
    base = nn.Sequential(*layers).to(draw(st.sampled_from(dtypes or (torch.float64,))))
    source = torch.Generator().manual_seed(draw(RANDOM))
    targets, heads = (["0", "1", "3"], ["4"]) if head else (["0", "1", "3", "4"], [])
    N = sum(base.get_parameter(f"{name}.weight").numel() for name in targets)
    bias, isometric, fused = draw(st.tuples(*[st.booleans()] * 3))
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p, q in zip(base.parameters(), model.parameters(), strict=True):
            q.copy_(p.normal_(generator=source))
        g = attach(
            model,
            draw(st.integers(1, N) | st.just(N)),
            seed=draw(SEEDS),
            target_modules=targets,
            modules_to_save=heads,
            bias=bias,
            isometric=isometric,
            fused=fused,
        )
        for p in model.parameters():
            if p.requires_grad:  # theta and the head
                p.normal_(generator=source)
    return base, model, g


# --- Helpers ---
def split(g: GPart, w: Tensor) -> dict[str, Tensor]:
    """[N] -> {name: tensor}, cut and shaped by the manifest."""
    pieces = torch.split(w, [math.prod(shape) for _, shape in g.manifest])
    return {
        name: w.view(shape) for (name, shape), w in zip(g.manifest, pieces, strict=True)
    }


def flat(g: GPart, tensors: dict[str, Tensor]) -> Tensor:
    """{name: tensor} -> [N], the inverse of split."""
    return torch.cat([tensors[name].flatten() for name, _ in g.manifest])


def raw(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """{name: dtype, shape and bytes}: stricter than ==, since -0.0 is not 0.0."""
    flat = {name: t.detach().flatten().view(torch.uint8) for name, t in tensors.items()}
    return {
        name: (t.dtype, t.shape, flat[name].tolist()) for name, t in tensors.items()
    }


def bits(model: nn.Module) -> dict[str, Any]:
    """raw of every parameter but theta."""
    return raw(
        {name: p for name, p in model.named_parameters() if name != "gpart.theta"}
    )


def adamw(theta: Tensor, grad: Tensor, lr: float, decay: float) -> Tensor:
    """theta after the first step of torch's AdamW with that gradient."""
    theta = theta.clone().requires_grad_()
    theta.grad = grad.clone()
    torch.optim.AdamW([theta], lr=lr, weight_decay=decay, eps=0).step()
    return theta.detach()


def relation(g: Tensor, h: Tensor, d: int) -> float:
    """How far two assignments are from independent: the chi-square of their d x d table
    of joint counts, in standard deviations. About 0 if unrelated, N/sqrt(2) for a copy,
    renamed or not."""
    table = torch.bincount(g.long() * d + h, minlength=d * d).double()
    expected, freedom = len(g) / d**2, (d - 1) ** 2
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def plain_pi(N: int, seed: int) -> Callable[[int], int]:
    """pi of the format gpart-v1, restated step by step in plain integers: no torch, no
    vectors."""
    a = math.isqrt(N - 1) + 1  # 1. the grid
    b = (N + a - 1) // a
    rounds = 16 if N < 65536 else 6  # 2. the rounds
    keys, state = [], seed  # 3. the round keys, from SplitMix64
    for _ in range(rounds):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z = z ^ (z >> 31)
        keys.append(z >> 33)

    def F(k: int, x: int) -> int:  # 4. the round function
        x ^= k
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**31
        x ^= x >> 15
        x = x * 0x46CA68B5 % 2**31
        return x ^ (x >> 16)

    def E(x: int) -> int:  # 5. the Feistel network
        left, right = divmod(x, b)
        for t, k in enumerate(keys):
            if t % 2 == 0:
                left = (left + F(k, right)) % a
            else:
                right = (right + F(k, left)) % b
        return left * b + right

    def pi(i: int) -> int:  # 6. cycle walking
        x = E(i)
        while x >= N:
            x = E(x)
        return x

    return pi


# --- P itself ---
@for_all(True)
def test_columns_are_orthonormal(P: Partition, seed: int) -> None:
    """P^T P = I_d (Eq. 8)."""
    dense = P.dense()
    assert_close(dense.T @ dense, torch.eye(P.d, dtype=torch.float64))
    assert torch.equal(P.dense(torch.float32), dense.float())


@for_all(False)
def test_columns_without_isometry_are_orthogonal(P: Partition, seed: int) -> None:
    """P^T P = diag(n_1..n_d) if isometric=False (Appendix B)."""
    dense = P.dense()
    assert_close(dense.T @ dense, P.sizes().double().diag())


@for_all(True)
def test_isometry(P: Partition, seed: int) -> None:
    """||P t|| = ||t||."""
    [t] = normals(seed, P.d)
    assert_close(P.expand(t).norm(), t.norm())


@for_all(True)
def test_inner_products_are_kept(P: Partition, seed: int) -> None:
    """<P s, P t> = <s, t>."""
    s, t = normals(seed, P.d, P.d)
    assert_close(P.expand(s) @ P.expand(t), s @ t)


@for_all(True)
def test_injective_with_equal_distance(P: Partition, seed: int) -> None:
    """||P s - P t|| = ||s - t||: different thetas are different updates, however small
    the step."""
    t, u = normals(seed, P.d, P.d)
    for step in (1.0, 1e-3, 1e-6):
        s = t + step * u
        assert_close(
            (P.expand(s) - P.expand(t)).norm(), (s - t).norm(), rtol=1e-8, atol=0.0
        )


@for_all(False)
def test_injective_without_isometry(P: Partition, seed: int) -> None:
    """||P s - P t||^2 = sum_j n_j (s_j - t_j)^2 >= ||s - t||^2 if isometric=False."""
    s, t = normals(seed, P.d, P.d)
    distance = (P.expand(s) - P.expand(t)).square().sum()
    assert_close(distance, P.sizes().double() @ (s - t).square())
    assert distance * (1 + 1e-12) >= (s - t).square().sum()


# --- P and P^T ---
@for_all(True, False)
def test_expand_is_the_dense_product(P: Partition, seed: int) -> None:
    """expand(t) = P t (Eq. 10)."""
    [t] = normals(seed, P.d)
    assert_close(P.expand(t), P.dense() @ t)


@for_all(True, False)
def test_reduce_is_the_dense_product(P: Partition, seed: int) -> None:
    """reduce(w) = P^T w."""
    [w] = normals(seed, P.N)
    assert_close(P.reduce(w), P.dense().T @ w)


@for_all(True, False)
def test_adjoint_identity(P: Partition, seed: int) -> None:
    """<P t, w> = <t, P^T w>."""
    t, w = normals(seed, P.d, P.N)
    assert_close(P.expand(t) @ w, t @ P.reduce(w))


@for_all(True, False)
def test_reduce_inverts_expand(P: Partition, seed: int) -> None:
    """P^T (P t) = t, or n t if isometric=False."""
    [t] = normals(seed, P.d)
    assert_close(P.reduce(P.expand(t)), t if P.isometric else P.sizes() * t)


@given(N=st.integers(1, 1000), partition_seed=SEEDS, seed=RANDOM)
def test_one_group_is_one_shared_scalar(N: int, partition_seed: int, seed: int) -> None:
    """d = 1: (P t)_i = t / sqrt(N) for every i."""
    [t] = normals(seed, 1)
    assert_close(
        Partition(N, 1, partition_seed).expand(t), (t / math.sqrt(N)).expand(N)
    )


@given(N=st.integers(1, 1000), partition_seed=SEEDS, seed=RANDOM)
def test_n_groups_are_full_fine_tuning(N: int, partition_seed: int, seed: int) -> None:
    """d = N: P is a permutation matrix, so P P^T w = w exactly."""
    P, [w] = Partition(N, N, partition_seed), normals(seed, N)
    assert torch.equal(P.expand(P.reduce(w)), w)


# --- P P^T ---
@for_all(True)
def test_p_pt_is_an_orthogonal_projection(P: Partition, seed: int) -> None:
    """Q = P P^T: Q Q = Q, Q^T = Q, trace Q = d; and expand(reduce(w)) = Q w."""
    [w] = normals(seed, P.N)
    Q = P.dense() @ P.dense().T
    assert_close(Q @ Q, Q)
    assert_close(Q.T, Q)
    assert_close(Q.trace().item(), float(P.d))
    assert_close(P.expand(P.reduce(w)), Q @ w)


@given(adapters(), RANDOM)
def test_project_is_the_nearest_point(nets: Any, seed: int) -> None:
    """project(w) = argmin_t ||w - P t||, with P^T (w - P t) = 0 there; also without
    isometry."""
    g, dense = nets[2], nets[2].partition.dense()
    w, u = normals(seed, g.partition.N, g.partition.d)
    t = g.project(split(g, w))
    assert_close(t, torch.linalg.lstsq(dense, w).solution)
    assert_close(dense.T @ (w - dense @ t), torch.zeros_like(t))
    for step in (1.0, -1.0, 1e-3, -1e-3):
        assert (w - dense @ (t + step * u)).norm() > (w - dense @ t).norm()


@given(adapters(), RANDOM)
def test_project_inverts_p(nets: Any, seed: int) -> None:
    """project(P t) = t, and project(delta()) = theta; also without isometry."""
    g = nets[2]
    [t] = normals(seed, g.partition.d)
    assert_close(g.project(split(g, g.partition.dense() @ t)), t)
    torch.testing.assert_close(g.project(g.delta()), g.theta)  # both float32


# --- Gradients ---
@given(adapters(*DTYPES))
def test_training_starts_at_the_pretrained_model(nets: Any) -> None:
    """theta = 0: P theta = 0 and the output is the pretrained network's, bit for
    bit."""
    base, model, g = nets
    nn.init.zeros_(g.theta)
    x = torch.arange(12).view(4, 3) % 5
    assert not flat(g, g.delta()).any()
    assert torch.equal(model(x), base(x))


@given(adapters(), RANDOM)
def test_gradient_identity(nets: Any, seed: int) -> None:
    """y = f(w0 + P theta) (Eq. 9) and grad_theta = P^T grad_w (Eq. 11), fused and
    plain.

    With isometry ||grad_theta||^2 = ||grad_w||^2 - ||grad_w - Q grad_w||^2 <=
    ||grad_w||^2.
    """
    base, model, g = nets
    g.theta = nn.Parameter(g.theta.double())
    P, x = g.partition.dense(), torch.arange(12).view(4, 3) % 5
    for name, dw in split(g, P @ g.theta.detach()).items():
        base.get_parameter(name).data += dw
    assert_close(model(x), base(x))
    [c] = normals(seed, base(x).numel())
    for net in (model, base):
        (net(x).flatten().sin() @ c).backward()
    grad_w = flat(g, {name: base.get_parameter(name).grad for name, _ in g.manifest})
    assert_close(g.theta.grad, P.T @ grad_w)
    if g.partition.isometric:
        residual = grad_w - P @ g.theta.grad
        assert_close(
            g.theta.grad.square().sum(), grad_w.square().sum() - residual.square().sum()
        )
        assert g.theta.grad.norm() <= grad_w.norm() * (1 + 1e-12)


@given(adapters())
def test_delta_is_p_theta(nets: Any) -> None:
    """delta() = P theta (Eq. 10), cut and shaped by the manifest."""
    g = nets[2]
    dense = split(g, g.partition.dense() @ g.theta.detach().double())
    torch.testing.assert_close(
        g.delta(), {name: dw.float() for name, dw in dense.items()}
    )


# --- Weight decay ---
@for_all(True)
def test_weight_decay_l2_penalty(P: Partition, seed: int) -> None:
    """(lambda/2) ||P t||^2 = (lambda/2) ||t||^2 (Eq. 18), and its gradient is lambda
    t."""
    [t] = normals(seed, P.d)
    t.requires_grad_()
    penalty = DECAY / 2 * P.expand(t).square().sum()
    [gradient] = torch.autograd.grad(penalty, t)
    assert_close(penalty, DECAY / 2 * t.square().sum())
    assert_close(gradient, DECAY * t)


@for_all(False)
def test_weight_decay_l2_penalty_without_isometry(P: Partition, seed: int) -> None:
    """The gradient of (lambda/2) ||P t||^2 is lambda n t: stronger by n_j, N/d on
    average."""
    [t] = normals(seed, P.d)
    t.requires_grad_()
    penalty = DECAY / 2 * P.expand(t).square().sum()
    [gradient] = torch.autograd.grad(penalty, t)
    factor = gradient / (DECAY * t)
    assert_close(factor, P.sizes().double())
    assert_close(factor.mean().item(), P.N / P.d)


@for_all(True)
def test_weight_decay_sgd_step_is_the_projected_step(P: Partition, seed: int) -> None:
    """SGD with L2 on t: w <- w - lr (Q grad + lambda delta), Q times full SGD with L2
    on delta."""
    t, w0, c = normals(seed, P.d, P.N, P.N)
    theta, delta = t.clone().requires_grad_(), P.expand(t).requires_grad_()
    for variable, update in ((theta, P.expand(theta)), (delta, delta)):
        torch.autograd.backward((w0 + update).sin() @ c)
        torch.optim.SGD([variable], lr=LR, weight_decay=DECAY).step()
    dense = P.dense()
    start, grad = dense @ t, (w0 + dense @ t).cos() * c
    assert_close(dense @ theta, start - LR * (dense @ dense.T @ grad + DECAY * start))
    assert_close(dense @ theta, dense @ dense.T @ delta)


@for_all(True, False)
def test_weight_decay_adamw_factor(P: Partition, seed: int) -> None:
    """AdamW's decoupled decay is (1 - lr wd) on t and on P t alike, isometric or
    not."""
    t, gradient = normals(seed, P.d, P.d)
    step = adamw(t, gradient, LR, 0.0) - t
    decayed = adamw(t, gradient, LR, DECAY)
    assert_close(decayed, (1 - LR * DECAY) * t + step)
    assert_close(P.expand(decayed), (1 - LR * DECAY) * P.expand(t) + P.expand(step))


@given(n=st.integers(1, 20), d=st.integers(1, 20), partition_seed=SEEDS, seed=RANDOM)
def test_weight_decay_adamw_at_equal_steps(
    n: int, d: int, partition_seed: int, seed: int
) -> None:
    """Adam's first step in R^N is equal if lr is 1/sqrt(n) without isometry; then the
    decoupled decay is weaker by sqrt(N/d), not by N/d."""
    one, other = (
        Partition(n * d, d, partition_seed, isometric) for isometric in (True, False)
    )
    t, grad_w = normals(seed, d, n * d)
    u, lr = t / math.sqrt(n), LR / math.sqrt(n)

    def step(P: Partition, theta: Tensor, lr: float, decay: float) -> Tensor:
        return P.expand(adamw(theta, P.reduce(grad_w), lr, decay))

    assert_close(other.expand(u), one.expand(t))
    assert_close(step(other, u, lr, 0.0), step(one, t, LR, 0.0))
    decay = step(one, t, LR, 0.0) - step(one, t, LR, DECAY)
    decay_other = step(other, u, lr, 0.0) - step(other, u, lr, DECAY)
    assert_close(decay, LR * DECAY * one.expand(t))
    assert_close(decay_other, decay / math.sqrt(one.N / one.d))


# --- The partition ---
@for_all(True, max_N=100_000)
@example(P=Partition(65535, 65534), seed=0)
@example(P=Partition(65536, 17), seed=0)
def test_sizes_in_closed_form(P: Partition, seed: int) -> None:
    """n_j = #{i: g(i) = j} = floor(N/d) + [j < N mod d]: equal up to one, and never
    0."""
    q, r = divmod(P.N, P.d)
    assert P.sizes().tolist() == [q + 1] * r + [q] * (P.d - r)
    assert torch.equal(torch.bincount(P.groups(), minlength=P.d), P.sizes())


@given(N=st.integers(1, 100_000), seed=SEEDS)
@example(N=65535, seed=0)
@example(N=65536, seed=0)
def test_pi_is_a_bijection(N: int, seed: int) -> None:
    """{pi(0), ..., pi(N-1)} = {0, ..., N-1}; and g = pi at d = N."""
    i = torch.arange(N)
    pi = gpart.permute(i, N, seed)
    assert torch.equal(pi.sort().values, i)
    assert torch.equal(Partition(N, N, seed).groups().long(), pi)


@st.composite
def nested(draw: st.DrawFn) -> tuple[Partition, Partition]:
    """P_d and P_kd of equal N, seed and variant."""
    N, seed, isometric = draw(st.integers(1, 100)), draw(SEEDS), draw(st.booleans())
    d = draw(st.integers(1, N))
    k = draw(st.integers(1, N // d))
    return Partition(N, d, seed, isometric), Partition(N, k * d, seed, isometric)


@given(nested(), RANDOM)
def test_nesting(pair: tuple[Partition, Partition], seed: int) -> None:
    """g_d = g_kd mod d, so P_d t = P_kd s with s_j = t_(j mod d) sqrt(n^kd_j / n^d_(j
    mod d))."""
    coarse, fine = pair
    [t] = normals(seed, coarse.d)
    assert torch.equal(coarse.groups(), fine.groups() % coarse.d)
    j = torch.arange(fine.d) % coarse.d
    s = (t * coarse.scale(dtype=t.dtype))[j] / fine.scale(dtype=t.dtype)
    assert_close(fine.expand(s), coarse.expand(t))
    Q = fine.dense() @ torch.linalg.pinv(fine.dense())  # onto image(P_kd)
    assert_close(Q @ coarse.dense(), coarse.dense())


@given(adapters(), st.data())
def test_a_trained_theta_embeds_into_a_finer_partition(
    nets: Any, data: st.DataObject
) -> None:
    """P_kd project_kd(P_d theta) = P_d theta: more groups continue where fewer have
    ended."""
    base, _, g = nets
    P = g.partition
    names = [name.rpartition(".")[0] for name, _ in g.manifest]
    finer = attach(
        copy.deepcopy(base),
        P.d * data.draw(st.integers(1, P.N // P.d)),
        seed=P.seed,
        target_modules=names,
        bias=any(name.endswith("bias") for name, _ in g.manifest),
        isometric=P.isometric,
    )
    with torch.no_grad():
        finer.theta.copy_(finer.project(g.delta()))
    torch.testing.assert_close(finer.delta(), g.delta())


@given(P=partitions((True,), 300), chunk=st.integers(1, 50), data=st.data())
def test_any_slice_is_that_slice_of_the_whole(
    P: Partition, chunk: int, data: Any
) -> None:
    """groups(start, stop) = groups()[start:stop], whatever the chunk it is computed
    in."""
    start = data.draw(st.integers(0, P.N))
    stop = data.draw(st.integers(start, P.N))
    with mock.patch.object(gpart, "CHUNK", chunk):
        part = P.groups(start, stop)
    assert torch.equal(part, P.groups()[start:stop])  # int32 both
    assert part.dtype == torch.int32


@pytest.mark.parametrize("chunk", [1000, 1 << 15, 1 << 20])
def test_slices_across_chunks(chunk: int) -> None:
    """The same, where N has more rows than one chunk and slices start and stop around
    its edges."""
    P = Partition(70_000, 137, seed=5)
    whole = gpart.permute(torch.arange(P.N), P.N, P.seed) % P.d
    with mock.patch.object(gpart, "CHUNK", chunk):
        assert torch.equal(P.groups().long(), whole)
        for start, stop in [
            (32_767, 32_769),
            (1, 65_537),
            (32_768, 70_000),
            (999, 2_001),
            (7, 7),
        ]:
            assert torch.equal(P.groups(start, stop).long(), whole[start:stop])


@pytest.mark.parametrize("N", [1024, 1 << 16])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**64 - 2))
def test_neighbouring_seeds_are_unrelated(N: int, seed: int) -> None:
    """g_(s+1) is independent of g_s and of its shifts, where a copy is 700 deviations
    off."""
    g, h = Partition(N, 8, seed).groups(), Partition(N, 8, seed + 1).groups()
    assert relation(g, (g + 3) % 8, 8) > 700
    assert max(relation(g.roll(shift), h, 8) for shift in range(-16, 17)) < 10


@settings(max_examples=5)
@given(seed=SEEDS)
@example(seed=0)
@example(seed=2**64 - 1)
def test_each_bit_of_the_seed_matters(seed: int) -> None:
    """For each of the 64 bits, flipping it gives an unrelated partition."""
    g = Partition(1024, 8, seed).groups()
    flipped = [Partition(1024, 8, seed ^ 1 << bit).groups() for bit in range(64)]
    assert max(relation(g, h, 8) for h in flipped) < 10
    assert len({tuple(h.tolist()) for h in [g, *flipped]}) == 65


@given(st.lists(SEEDS, min_size=2, max_size=6, unique=True))
@example([0, 2**32, 2**63, 2**64 - 1])
def test_different_seeds_give_different_partitions(seeds: list[int]) -> None:
    """s != s' implies g_s != g_s' (1024 weights, 8 groups: a chance of less than
    2^-1000)."""
    assert len({tuple(Partition(1024, 8, s).groups().tolist()) for s in seeds}) == len(
        seeds
    )


# --- Exactness ---
@given(adapters(*DTYPES), st.integers(1, 4))
def test_merge_is_one_rounding_and_unmerge_is_exact(nets: Any, times: int) -> None:
    """merge: W <- cast(W + P theta), rounded once; unmerge: W, bit for bit, however
    often."""
    base, model, g = nets
    before = bits(model)
    want = copy.deepcopy(base)
    for name, dw in split(g, torch.arange(g.partition.N)).items():
        w, j = want.get_parameter(name), g.partition.groups()[dw]
        wide = torch.promote_types(w.dtype, torch.float32)
        update = g.theta.detach().to(wide)[j] * g.partition.scale(dtype=wide)[j]
        w.data = (w.data.to(wide) + update).to(w.dtype)
    assert before == bits(base)
    for _ in range(times):
        merge(model)
        assert bits(model) == bits(want)
        unmerge(model)
        assert bits(model) == before


@given(adapters(*DTYPES))
def test_merging_keeps_the_function(nets: Any) -> None:
    """f(merged) = f(attached), and f(disabled) = f(unmerged and detached) =
    f(pretrained)."""
    base, model, _ = nets
    x = torch.arange(12).view(4, 3) % 5
    attached, pretrained = model(x).detach(), base(x)
    with disabled(model):
        assert torch.equal(model(x), pretrained)
    merge(model)
    assert torch.equal(model(x), attached)
    with disabled(model):
        assert torch.equal(model(x), pretrained)
    assert torch.equal(model(x), attached)
    detach(model)
    assert torch.equal(model(x), pretrained)
    assert bits(model) == bits(base)


@given(adapters(*DTYPES))
def test_detach_with_merge_is_merge(nets: Any) -> None:
    """detach(merge=True) leaves what merge leaves, bit for bit."""
    _, model, _ = nets
    other = copy.deepcopy(model)
    merge(other)
    detach(model, merge=True)
    assert bits(model) == bits(other)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@given(nets=adapters(*DTYPES, head=True))
def test_save_and_load_are_exact(folder: Path, nets: Any) -> None:
    """load(save(model)) has the theta, the partition, the head and W + P theta of
    model, bit for bit: into a fresh model, and into one that has the adapter with
    another theta."""
    base, model, g = nets
    save(model, folder / "adapter.safetensors")
    swapped = copy.deepcopy(model)
    nn.init.ones_(swapped.gpart.theta)
    merge(model)
    for other in (base, swapped):
        h = load(other, folder / "adapter.safetensors")
        assert torch.equal(h.theta, g.theta)
        assert (h.partition, h.manifest) == (g.partition, g.manifest)
        merge(other)
        assert bits(other) == bits(model)


@given(nets=adapters(*DTYPES, head=True))
def test_saving_is_repeatable(folder: Path, nets: Any) -> None:
    """save(load(file)) is the file again: digest and tensors; and so is saving while
    merged."""
    base, model, _ = nets
    files = [folder / f"{k}.safetensors" for k in range(3)]
    save(model, files[0])
    merge(model)
    save(model, files[1])
    load(base, files[0])
    save(base, files[2])
    contents = []
    for path in files:
        with safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in sorted(f.keys())}
            contents.append((f.metadata(), raw(tensors)))
    assert contents[0] == contents[1] == contents[2]


# --- Life cycle ---
Weights = dict[str, Tensor]
TOKENS = st.lists(st.integers(0, 4), min_size=8, max_size=8)
TARGETS = (["body"], ["embed"], ["conv", "out"], ["embed", "conv", "body", "out"])
OPTIONS = st.fixed_dictionaries(
    {
        "target_modules": st.sampled_from(TARGETS),
        "seed": SEEDS,
        "bias": st.booleans(),
        "isometric": st.booleans(),
        "fused": st.booleans(),
    }
)
SGD = functools.partial(torch.optim.SGD, lr=LR, weight_decay=DECAY)
ADAMW = functools.partial(
    torch.optim.AdamW, lr=LR, weight_decay=DECAY, eps=1e-3
)  # float16's eps
CASTS = (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double)


class Network(nn.Module):
    """An Embedding, a Conv1d, a Linear, a Linear tied to the Embedding, and a head with
    buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, 3), nn.Conv1d(2, 2, 1)
        self.body, self.out = nn.Linear(3, 3), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.body(self.conv(self.embed(tokens))).tanh()  # [4, 2] -> [4, 2, 3]
        return self.head(self.out(h).sum(1)).tanh()  # [4, 2, 5] -> [4, 5] -> [4, 2]


def parameters(model: nn.Module) -> Weights:
    """{name: parameter}, a tied one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


@dataclasses.dataclass
class Oracle:
    """What a model must hold, read and compute, by a network that never has an
    adapter."""

    plain: (
        nn.Module
    )  # the pretrained weights, and the head as it is; cast like the model
    theta: Tensor | None = None  # float32 [d], while attached
    recipe: Any = None  # names, d, seed, isometric: files of that recipe fit
    ids: Weights = dataclasses.field(
        default_factory=dict
    )  # {name: g, in the weight's shape}
    scale: Any = None  # float64 [d]
    fused: bool = True
    merged: Weights = dataclasses.field(
        default_factory=dict
    )  # W + P theta as merge computed it
    blocks: int = 0  # disabled blocks that the adapter is in

    def names(self, modules: Any, bias: bool) -> list[str]:
        """The manifest's: in the network's order, the first of those a tied parameter
        has there."""
        first: dict[int, str] = {}
        for name, w in parameters(self.plain).items():
            module, _, kind = name.rpartition(".")
            if module in modules and (bias or kind == "weight"):
                first.setdefault(id(w), name)
        return [*first.values()]

    def attach(self, recipe: Any, fused: bool) -> None:
        """theta = 0, and g from the format in plain integers."""
        (names, d, seed, isometric), own = recipe, parameters(self.plain)
        parts = [own[name].numel() for name in names]
        pi, (q, r) = plain_pi(sum(parts), seed), divmod(sum(parts), d)
        g = torch.tensor([pi(i) % d for i in range(sum(parts))]).split(parts)
        for name, j in zip(names, g, strict=True):
            tied = [key for key, w in own.items() if w is own[name]]
            self.ids |= dict.fromkeys(tied, j.view(own[name].shape))
        sizes = torch.tensor([q + (j < r) for j in range(d)], dtype=torch.float64)
        self.scale = sizes.sqrt().reciprocal() if isometric else torch.ones_like(sizes)
        self.theta, self.recipe, self.fused = torch.zeros(d), recipe, fused

    def detach(self) -> None:
        """The pretrained weights again."""
        vars(self).update(vars(Oracle(self.plain)))

    def moved(self, theta: Any) -> Weights:
        """{name: cast(W + P theta)}: in promote(W's dtype, float32), rounded once."""
        own, new = parameters(self.plain), {}
        for name, j in self.ids.items():
            wide = torch.promote_types(own[name].dtype, torch.float32)
            delta = (theta.to(wide) * self.scale.to(wide))[j]
            new[name] = (own[name].detach().to(wide) + delta).to(own[name].dtype)
        return new

    @property
    def active(self) -> bool:
        return self.theta is not None and not self.merged and not self.blocks

    @property
    def picklable(self) -> bool:
        """Attached on the fused path alone: other classes are made by attach."""
        return self.fused and {name.partition(".")[0] for name in self.ids} == {"body"}

    def run(self, tokens: Tensor, theta: Any) -> Tensor:
        """The output of the plain network with the weights that the model must read."""
        weights = self.moved(theta) if self.active else self.merged
        return torch.func.functional_call(
            self.plain, weights, tokens, tie_weights=False
        )

    def check(self, model: Any) -> None:
        """model holds and reads these bits, and trains what it must; detached, it is as
        it was."""
        held = {**self.plain.state_dict(), **self.merged}
        read = {**held, **self.moved(self.theta)} if self.active else held
        assert raw({name: operator.attrgetter(name)(model) for name in held}) == raw(
            read
        )
        modes = {
            name: m.training for name, m in model.named_modules() if name != "gpart"
        }
        assert modes == {name: m.training for name, m in self.plain.named_modules()}
        trained = {name for name, w in parameters(model).items() if w.requires_grad}
        if self.theta is None:
            assert trained == {
                n for n, w in parameters(self.plain).items() if w.requires_grad
            }
            for module, plain in zip(
                model.modules(), self.plain.modules(), strict=True
            ):
                assert (type(module), {*vars(module)}) == (type(plain), {*vars(plain)})
        else:
            held["gpart.theta"] = self.theta
            heads = {n for n in parameters(self.plain) if n.startswith("head.")}
            assert trained == {"gpart.theta", *heads}
            assert f"merged={bool(self.merged)}" in repr(model.gpart)
        assert raw(model.state_dict()) == raw(held)


class LifeCycle(stateful.RuleBasedStateMachine):
    """A model, its oracle, and every call that may happen to it; oracle.check after
    each."""

    files = stateful.Bundle("files")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.count = folder, itertools.count()

    @initialize(
        target=files,
        seed=RANDOM,
        dtype=st.sampled_from(DTYPES),
        frozen=st.sets(st.integers(0, 9)),
        d=st.integers(1, 50),
        options=OPTIONS,
        merged=st.booleans(),
    )
    def start(
        self,
        seed: int,
        dtype: Any,
        frozen: set[int],
        d: int,
        options: Any,
        merged: bool,
    ) -> Any:
        """A pretrained network, theta random and saved, perhaps merged."""
        source, plain = torch.Generator().manual_seed(seed), Network().to(dtype)
        for k, w in enumerate(plain.parameters()):
            w.data.normal_(generator=source)
            w.requires_grad_(k not in frozen)
        self.model: Any = copy.deepcopy(plain)
        self.oracle, self.random = Oracle(plain), torch.get_rng_state()
        self.left: list[tuple[Any, Oracle]] = []  # by deepcopy
        self.blocks: list[
            tuple[Any, Any, bool]
        ] = []  # disabled ones: its GPart, was it merged
        self.attach(d, options)
        self.set_theta(seed)
        if merged:
            self.merge_or_unmerge()
        return self.save()

    @property
    def attached(self) -> bool:
        return self.oracle.theta is not None

    @invariant()
    def is_as_the_oracle_says(self) -> None:
        self.oracle.check(self.model)
        assert torch.is_grad_enabled() and torch.equal(
            torch.get_rng_state(), self.random
        )

    @precondition(lambda self: not self.attached)
    @rule(d=st.integers(1, 50), options=OPTIONS)
    def attach(self, d: int, options: Any) -> None:
        names = self.oracle.names(options["target_modules"], options["bias"])
        d = min(d, sum(self.oracle.plain.get_parameter(name).numel() for name in names))
        self.oracle.attach(
            (names, d, options["seed"], options["isometric"]), options["fused"]
        )
        attach(self.model, d, modules_to_save=["head"], **options)

    @precondition(lambda self: self.attached)
    @rule(seed=RANDOM)
    def set_theta(self, seed: int) -> None:
        [theta] = normals(seed, len(self.oracle.theta))
        self.oracle.theta = theta.float()
        self.model.gpart.theta.data.copy_(theta)

    @precondition(lambda self: self.attached)
    @rule(tokens=TOKENS, optimizer=st.sampled_from([SGD, ADAMW]))
    def train_step(self, tokens: list[int], optimizer: Any) -> None:
        """The gradient is that of the dense weights; nothing else has one, or moves."""
        x, theta = (
            torch.tensor(tokens).view(4, 2),
            self.oracle.theta.clone().requires_grad_(),
        )
        trained = {n: w for n, w in parameters(self.model).items() if w.requires_grad}
        optimizer = optimizer(trained.values())
        y, want = self.model(x), self.oracle.run(x, theta)
        assert raw({"y": y}) == raw({"y": want})
        y.mean().backward()
        found = {
            name for name, w in parameters(self.model).items() if w.grad is not None
        }
        if self.oracle.active:
            [gradient] = torch.autograd.grad(want.mean(), theta)
            eps = 100 * max(torch.finfo(dtype).eps for dtype in (y.dtype, theta.dtype))
            torch.testing.assert_close(
                trained["gpart.theta"].grad, gradient, rtol=eps, atol=eps
            )
            assert found == {*trained}
        else:
            assert found == {*trained} - {"gpart.theta"}
        optimizer.step()
        optimizer.zero_grad()
        self.oracle.theta = trained.pop("gpart.theta").detach().clone()
        for name, w in trained.items():
            self.oracle.plain.get_parameter(name).data.copy_(w.detach())

    @rule(tokens=TOKENS, training=st.booleans())
    def run(self, tokens: list[int], training: bool) -> None:
        """In train() or eval() from now on."""
        x = torch.tensor(tokens).view(4, 2)
        self.model.train(training)
        self.oracle.plain.train(training)
        want = self.oracle.run(x, self.oracle.theta)
        assert raw({"y": self.model(x)}) == raw({"y": want})

    @precondition(lambda self: self.attached and not self.oracle.blocks)
    @rule()
    def merge_or_unmerge(self) -> None:
        (unmerge if self.oracle.merged else merge)(self.model)
        active = self.oracle.active
        self.oracle.merged = self.oracle.moved(self.oracle.theta) if active else {}

    @precondition(lambda self: self.attached or self.blocks)
    @rule(nest=st.booleans(), error=st.none() | st.just(KeyError()))
    def disabled(self, nest: bool, error: KeyError | None) -> None:
        """Enter a block; or leave one, by an exception or not."""
        if self.blocks and not (nest and self.attached):
            self.leave(error)
            return
        self.blocks.append(
            (disabled(self.model), self.model.gpart, bool(self.oracle.merged))
        )
        self.blocks[-1][0].__enter__()
        self.oracle.merged = {}
        self.oracle.blocks += 1

    def leave(self, error: KeyError | None = None) -> None:
        """Merged again if it was; if that adapter is gone: nothing."""
        block, g, merged = self.blocks.pop()
        assert not block.__exit__(error and KeyError, error, None)
        if self.attached and self.model.gpart is g:
            self.oracle.blocks -= 1
            self.oracle.merged = self.oracle.moved(self.oracle.theta) if merged else {}

    @precondition(lambda self: self.attached)
    @rule(merge=st.booleans())
    def detach(self, merge: bool) -> None:
        """The pretrained weights; if merge, W + P theta, which are pretrained from then
        on."""
        if merge := merge and not self.oracle.blocks:
            weights = self.oracle.merged or self.oracle.moved(self.oracle.theta)
            self.oracle.plain.load_state_dict(weights, strict=False)
        self.oracle.detach()
        detach(self.model, merge=merge)

    @precondition(lambda self: self.attached)
    @rule(target=files)
    def save(self) -> Any:
        path = self.folder / f"{next(self.count)}.safetensors"
        save(self.model, path)
        state = copy.deepcopy(self.oracle.plain.state_dict())
        heads = {name: t for name, t in state.items() if name.startswith("head.")}
        return path, self.oracle.recipe, self.oracle.theta.clone(), heads

    @rule(file=files)
    def load(self, file: Any) -> None:
        """The file's theta and head; attached already, only unmerged and if the recipe
        is equal."""
        path, recipe, theta, heads = file
        if self.oracle.merged or recipe != (self.oracle.recipe or recipe):
            with pytest.raises(ValueError, match=r"unmerge\(model\)|detach\(model\)"):
                load(self.model, path)
            return
        if not self.attached:
            self.oracle.attach(recipe, fused=True)
        self.oracle.theta = theta
        self.oracle.plain.load_state_dict(heads, strict=False)
        load(self.model, path)

    @rule(data=st.data())
    def refused(self, data: Any) -> None:
        """What the state does not allow is a ValueError and changes nothing."""
        attached, oracle = self.attached, self.oracle
        nowhere, junk = self.folder / "nowhere", self.folder / "junk"
        junk.write_bytes(b"junk")
        calls: dict[str, tuple[bool, Callable[..., Any]]] = {
            "attach": (attached, lambda m: attach(m, 1, target_modules="body")),
            "merge": (not oracle.active, merge),
            "unmerge": (not oracle.merged, unmerge),
            "disabled": (not attached, lambda m: disabled(m).__enter__()),
            "detach": (not attached, detach),
            "detach(merge=True)": (
                bool(oracle.blocks),
                lambda m: detach(m, merge=True),
            ),
            "save": (not attached, lambda m: save(m, nowhere)),
            "load": (True, lambda m: load(m, junk)),
        }
        call = data.draw(
            st.sampled_from([name for name, (wrong, _) in calls.items() if wrong])
        )
        with pytest.raises(ValueError, match=r"merge|attach|detach|no usable"):
            calls[call][1](self.model)
        assert not nowhere.exists()

    @rule(
        casts=st.lists(st.sampled_from(CASTS), min_size=1, max_size=2),
        explicit=st.booleans(),
    )
    def cast(self, casts: Any, explicit: bool) -> None:
        """All but theta; merged, both the weights in use and the pretrained ones."""
        for cast in casts:
            dtype = cast(self.oracle.plain).head[1].weight.dtype
            self.oracle.merged = {
                name: w.to(dtype) for name, w in self.oracle.merged.items()
            }
            self.model.to("cpu", dtype) if explicit else cast(self.model)

    @precondition(lambda self: self.attached)
    @rule(follow=st.booleans())
    def deepcopy(self, follow: bool) -> None:
        """Go on with the copy or the original: the other must not change. A copy taken
        inside disabled stays disabled."""
        pairs = [(self.model, self.oracle), copy.deepcopy((self.model, self.oracle))]
        self.model, self.oracle = pairs.pop(follow and not self.oracle.blocks)
        self.left += pairs

    @precondition(lambda self: self.oracle.picklable and not self.oracle.blocks)
    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: self.attached)
    @rule(assign=st.booleans())
    def state_dict_round_trip(self, assign: bool) -> None:
        """Into itself, after theta was lost. assign=True unties the tied, with equal
        values."""
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        nn.init.ones_(self.model.gpart.theta)
        self.model.load_state_dict(state, assign=assign)
        if assign:
            plain = {
                name: t.clone() for name, t in self.oracle.plain.state_dict().items()
            }
            self.oracle.plain.load_state_dict(plain, assign=True)

    @precondition(lambda self: self.attached and not self.oracle.blocks)
    @rule()
    def state_dict_into_a_fresh_model(self) -> None:
        """An ordinary checkpoint: attach anew, in the same state, and load it. Not if
        the network was untied in between."""
        names, d, seed, isometric = self.oracle.recipe
        modules = [*dict.fromkeys(name.rpartition(".")[0] for name in names)]
        bias, fused = any(name.endswith("bias") for name in names), self.oracle.fused
        fresh, oracle = copy.deepcopy(self.oracle.plain), Oracle(self.oracle.plain)
        oracle.attach((oracle.names(modules, bias), d, seed, isometric), fused)
        if (oracle.recipe, {*oracle.ids}) != (self.oracle.recipe, {*self.oracle.ids}):
            return
        options = {"seed": seed, "bias": bias, "isometric": isometric, "fused": fused}
        attach(fresh, d, target_modules=modules, modules_to_save="head", **options)
        if self.oracle.merged:
            merge(fresh)
        fresh.load_state_dict(self.model.state_dict())
        self.model = fresh

    def teardown(self) -> None:
        while self.blocks:
            self.leave()
        everyone = [(self.model, self.oracle), *self.left]
        for model, oracle in everyone:
            oracle.check(model)
        for model, oracle in everyone:
            if oracle.theta is not None:
                detach(model)
                oracle.detach()
        for model, oracle in everyone:
            oracle.check(model)


def test_life_cycle(folder: Path) -> None:
    """After any calls in any order the model is as the oracle says, bit for bit, and
    detach gives the pretrained weights, flags and classes."""
    machine = functools.partial(LifeCycle, folder)
    budget = settings(max_examples=2 * settings().max_examples, stateful_step_count=50)
    stateful.run_state_machine_as_test(machine, settings=budget)


# --- N <= 24, exhaustively ---
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("N", range(1, 25))
def test_all_small_entries_and_grams(N: int, isometric: bool) -> None:
    """P[i, j] = 1/sqrt(n_j) or 1 if g(i) = j, else 0 (Eq. 7); P^T P = I or diag(n) (Eq.
    8)."""
    pi = plain_pi(N, seed=N)
    for d in range(1, N + 1):
        sizes = [N // d + (j < N % d) for j in range(d)]
        column = [1 / math.sqrt(n) if isometric else 1.0 for n in sizes]
        rows = [
            [column[j] if pi(i) % d == j else 0.0 for j in range(d)] for i in range(N)
        ]
        P = Partition(N, d, N, isometric)
        assert_close(P.dense(), torch.tensor(rows, dtype=torch.float64))
        gram = [1.0] * d if isometric else sizes
        assert_close(
            P.dense().T @ P.dense(), torch.tensor(gram, dtype=torch.float64).diag()
        )


@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("N", range(1, 25))
def test_all_small_products(N: int, isometric: bool) -> None:
    """expand(t) = P t and reduce(w) = P^T w, for every d <= N."""
    for d in range(1, N + 1):
        P, [t, w] = Partition(N, d, N, isometric), normals(N, d, N)
        assert_close(P.expand(t), P.dense() @ t)
        assert_close(P.reduce(w), P.dense().T @ w)


@pytest.mark.parametrize("N", range(1, 25))
def test_all_small_sizes_and_bijections(N: int) -> None:
    """pi is a bijection of 0..N-1 and n_j = #{i: g(i) = j}, for every d <= N and a few
    seeds."""
    for seed in (0, 1, 2**32, 2**64 - 1):
        assert sorted(gpart.permute(torch.arange(N), N, seed).tolist()) == [*range(N)]
        for d in range(1, N + 1):
            P = Partition(N, d, seed)
            groups = P.groups().tolist()
            assert [groups.count(j) for j in range(d)] == P.sizes().tolist()
            assert P.sizes().tolist() == [N // d + (j < N % d) for j in range(d)]


@pytest.mark.parametrize("N", range(1, 25))
def test_all_small_nestings(N: int) -> None:
    """g_d = g_kd mod d and P_kd P_kd^T P_d = P_d, for every d and every multiple kd <=
    N."""
    whole = [Partition(N, d, N) for d in range(1, N + 1)]
    groups, dense = [P.groups() for P in whole], [P.dense() for P in whole]
    for d in range(1, N + 1):
        for kd in range(d, N + 1, d):
            assert torch.equal(groups[d - 1], groups[kd - 1] % d)
            fine, coarse = dense[kd - 1], dense[d - 1]
            assert_close(fine @ (fine.T @ coarse), coarse)


# --- The format ---
@st.composite
def slices(draw: st.DrawFn) -> tuple[Partition, int, int]:
    """A partition of up to 2^40 weights, near squares and powers of two as well, and a
    slice."""
    around = st.builds(
        lambda x, off: max(1, x + off), st.integers(0, 20), st.integers(-1, 1)
    )
    squares = st.builds(
        lambda x, off: max(1, x * x + off), st.integers(1, 2**20), st.just(-1)
    )
    powers = st.builds(
        lambda k, off: max(1, 2**k + off), st.integers(0, 39), st.integers(-1, 1)
    )
    N = draw(st.integers(1, 100) | st.integers(1, 2**40) | squares | powers | around)
    d = draw(st.integers(1, min(N, 2**31 - 1)))
    start = draw(st.integers(0, N))
    return Partition(N, d, draw(SEEDS)), start, min(N, start + draw(st.integers(0, 40)))


@settings(max_examples=200)
@given(slices())
@example((Partition(2**62, 2**31 - 1, 2**64 - 1), 2**62 - 40, 2**62))
@example((Partition(65535, 65535, 1), 0, 40))
@example((Partition(65536, 65536, 1), 0, 40))
def test_groups_follow_the_format(case: tuple[Partition, int, int]) -> None:
    """groups(start, stop) = [pi(i) mod d for i in start..stop-1], pi in plain
    integers."""
    P, start, stop = case
    pi = plain_pi(P.N, P.seed)
    assert P.groups(start, stop).tolist() == [pi(i) % P.d for i in range(start, stop)]


GOLDEN = [  # N, seed, pi(0..11), the CRC-32 of pi(0..N-1) as little-endian int64
    (6, 0, "2 3 4 0 1 5", "34555f7a"),
    (12, 42, "10 7 8 5 9 3 2 6 4 1 0 11", "ff719bae"),
    (1000, 0, "797 313 182 843 883 494 433 24 736 938 265 596", "e1defc76"),
    (
        65536,
        0,
        "63495 61759 50020 16914 54213 58783 39364 31582 27658 41251 53169 37129",
        "4c8a68f1",
    ),
    (
        14155776,
        0,
        "8851087 3660970 5812129 1328578 12909139 235528 8291414 4263969 4323443 8921921 11763214 "
        "12880720",
        "5cc2c6c3",
    ),
]


@pytest.mark.parametrize(
    ("N", "seed", "first", "crc"), GOLDEN, ids=lambda x: str(x)[:8]
)
def test_golden_vectors(N: int, seed: int, first: str, crc: str) -> None:
    """pi is what format gpart-v1 has always meant: files are read as they were
    written."""
    pi = Partition(N, N, seed).groups()  # g = pi at d = N
    assert " ".join(map(str, pi[:12].tolist())) == first
    assert f"{zlib.crc32(pi.numpy().astype('<i8').tobytes()):08x}" == crc


@pytest.mark.parametrize(
    ("N", "seed", "first", "crc"), GOLDEN, ids=lambda x: str(x)[:8]
)
def test_golden_vectors_in_plain_integers(
    N: int, seed: int, first: str, crc: str
) -> None:
    """The second statement of the format, which the others are compared with, has them
    too."""
    pi = plain_pi(N, seed)
    assert " ".join(str(pi(i)) for i in range(min(N, 12))) == first
    if N <= 65536:
        values = b"".join(pi(i).to_bytes(8, "little") for i in range(N))
        assert f"{zlib.crc32(values):08x}" == crc
