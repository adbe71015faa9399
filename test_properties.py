# SPDX-License-Identifier: Apache-2.0
"""The paper's laws: each test is a theorem, its docstring the statement.

A small network is adapted, w = w0 + P theta, and compared with the dense P that is
written down here from its definition (Eq. 7):

    isometry            ||w - w0|| = ||theta||, for P^T P = I            (Eq. 8)
    injectivity         different thetas are different weights
    adjoint             <P theta, w> = <theta, P^T w>
    gradient identity   grad_theta L = P^T grad_w L                      (Eq. 11)
    weight decay        lambda ||theta||^2 = lambda ||w - w0||^2         (Eq. 18)

and, without isometry (Appendix B), what is left of each. The network and theta are in
float64, so that a law holds to the last digits or is broken.

Hypothesis draws the partition and the vectors, and shrinks a failure to the smallest
partition that breaks the law. The profile ci draws the same examples at each run,
HYPOTHESIS_PROFILE=dev new ones. What else P promises is in tests/test_partition.py,
what an adapted model does in test_gpart.py.
"""

import functools
import math
import os

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from gpart import Partition, attach

BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "ci", **BUSY, derandomize=True, database=None, max_examples=50
)
settings.register_profile("dev", **BUSY, max_examples=500)
settings.register_profile(  # for mutation tests: a mutant need only fail, not shrink
    "quick",
    settings.get_profile("ci"),
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LR, DECAY = 0.125, 0.3
SEEDS = st.integers(0, 2**64 - 1)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


# --- What is drawn ---
@st.composite
def partitions(draw, *isometric, even=False):
    """N = q d + r: d = 1, d = N and uneven groups all come up."""
    d = draw(st.integers(1, 6))
    q = draw(st.integers(1, 8))
    r = 0 if even else draw(st.integers(0, d - 1))
    return Partition(q * d + r, d, draw(SEEDS), draw(st.sampled_from(isometric)))


def vectors(n):
    """[n]. An entry shrinks to 1: every law holds at 0."""
    entry = st.floats(-3, 1).map(lambda x: 1 + x)
    entries = st.lists(entry, min_size=n, max_size=n)
    return entries.map(lambda v: torch.tensor(v, dtype=torch.float64))


# --- The definition ---
def sizes(partition):
    """n_j, counted: float64 [d]."""
    return torch.bincount(partition.groups(), minlength=partition.d).double()


def dense(partition):
    """P[i, j] = 1/sqrt(n_j) if g(i) = j else 0 (Eq. 7); without isometry, 1 or 0."""
    P = torch.zeros(partition.N, partition.d, dtype=torch.float64)
    for i, j in enumerate(partition.groups().tolist()):
        P[i, j] = 1.0
    return P / sizes(partition).sqrt() if partition.isometric else P


# --- The network ---
def network(w):
    """x [., a] -> tanh -> [., b]: the weights are w [N], N = a + b.

    Groups reach across both layers. One layer will do for N = 1.
    """
    b = len(w) // 2
    a = len(w) - b
    net = nn.Sequential(nn.Linear(a, 1, bias=False), nn.Tanh()).double()
    net[0].weight.data.copy_(w[:a])
    if b:
        net.append(nn.Linear(1, b, bias=False).double())
        net[2].weight.data.copy_(w[a:, None])
    return net


def adapted(partition, w0, theta, fused=True):
    """The network of w0, and its adapter at theta."""
    net = network(w0)
    adapter = attach(
        net,
        partition.d,
        seed=partition.seed,
        target_modules="all-linear",
        isometric=partition.isometric,
        fused=fused,
    )
    adapter.theta = nn.Parameter(theta.clone())
    return net, adapter


def layers(net):
    return [module for module in net if isinstance(module, nn.Linear)]


def weights(net):
    """w [N], as the layers read it: w0 + P theta in an adapted network."""
    return torch.cat([layer.weight.flatten() for layer in layers(net)])


def inputs(partition):
    """Two rows of input."""
    a = partition.N - partition.N // 2
    return vectors(2 * a).map(lambda v: v.view(2, a))


def loss(net, x):
    return (net(x) - 1).square().sum()


# --- Isometry ---
@given(partitions(True), st.data())
def test_isometry(partition, data):
    """||w - w0|| = ||theta||."""
    w0, theta = data.draw(vectors(partition.N)), data.draw(vectors(partition.d))
    net, _ = adapted(partition, w0, theta)
    assert_close((weights(net) - w0).norm(), theta.norm())


@given(partitions(True, False))
def test_columns_are_orthogonal(partition):
    """P^T P = I (Eq. 8); without isometry it is diag(n_1..n_d)."""
    P = dense(partition)
    gram = torch.ones(partition.d) if partition.isometric else sizes(partition)
    assert_close(P.T @ P, gram.double().diag())


@given(partitions(True, False), st.data())
def test_update_is_P_theta(partition, data):
    """w = w0 + P theta (Eq. 9)."""
    w0, theta = data.draw(vectors(partition.N)), data.draw(vectors(partition.d))
    net, _ = adapted(partition, w0, theta)
    assert_close(weights(net), w0 + dense(partition) @ theta)


# --- Injectivity ---
@given(partitions(True, False), st.data())
def test_injectivity(partition, data):
    """theta can be read off the weights, so no two thetas are the same weights.

    P has a left inverse, also without isometry: no group is empty.
    """
    w0, theta = data.draw(vectors(partition.N)), data.draw(vectors(partition.d))
    net, _ = adapted(partition, w0, theta)
    left_inverse = torch.linalg.pinv(dense(partition))
    assert_close(left_inverse @ (weights(net) - w0), theta)


# --- The adjoint ---
@given(partitions(True, False), st.data())
def test_adjoint(partition, data):
    """<P theta, w> = <theta, P^T w>, and both are the dense products."""
    theta, w = data.draw(vectors(partition.d)), data.draw(vectors(partition.N))
    P = dense(partition)
    assert_close(partition.expand(theta) @ w, theta @ partition.reduce(w))
    assert_close(partition.expand(theta), P @ theta)
    assert_close(partition.reduce(w), P.T @ w)


# --- The gradient identity ---
def gradients(partition, fused, data):
    """grad_theta of the adapted network, grad_w of an ordinary one of equal weights."""
    w0, theta = data.draw(vectors(partition.N)), data.draw(vectors(partition.d))
    x = data.draw(inputs(partition))
    net, adapter = adapted(partition, w0, theta, fused)
    ordinary = network(w0 + dense(partition) @ theta)
    assert_close(net(x), ordinary(x))
    loss(net, x).backward()
    loss(ordinary, x).backward()
    grad_w = torch.cat([layer.weight.grad.flatten() for layer in layers(ordinary)])
    return adapter.theta.grad, grad_w


@given(partitions(True, False), st.booleans(), st.data())
def test_gradient_identity(partition, fused, data):
    """grad_theta L = P^T grad_w L (Eq. 11), on the fused path and on the plain one."""
    grad_theta, grad_w = gradients(partition, fused, data)
    assert_close(grad_theta, dense(partition).T @ grad_w)


@given(partitions(True), st.booleans(), st.data())
def test_gradient_is_never_longer(partition, fused, data):
    """||grad_theta||^2 = ||grad_w||^2 - ||grad_w - P grad_theta||^2 <= ||grad_w||^2.

    grad_theta is the part of grad_w that lies in the image of P.
    """
    grad_theta, grad_w = gradients(partition, fused, data)
    outside = grad_w - dense(partition) @ grad_theta
    expected = grad_w.square().sum() - outside.square().sum()
    assert_close(grad_theta.square().sum(), expected)


# --- Weight decay ---
def update_after(partition, w0, theta, x, optimizer, penalty=0.0):
    """w - w0 after one step on loss + penalty/2 ||w - w0||^2."""
    net, adapter = adapted(partition, w0, theta)
    l2 = (weights(net) - w0).square().sum()
    (loss(net, x) + penalty / 2 * l2).backward()
    optimizer([adapter.theta]).step()
    return (weights(net) - w0).detach()


def sgd(decay):
    return functools.partial(torch.optim.SGD, lr=LR, weight_decay=decay)


def adamw(decay, n=1.0):
    """AdamW whose steps in theta are sqrt(n) times shorter, for gradients sqrt(n) times
    as long: without isometry, a step as long in weight space."""
    lr, eps = LR / math.sqrt(n), 1e-3 * math.sqrt(n)
    return functools.partial(torch.optim.AdamW, lr=lr, eps=eps, weight_decay=decay)


def draw_start(partition, data):
    """(w0, theta, x): where a step starts."""
    w0, theta = data.draw(vectors(partition.N)), data.draw(vectors(partition.d))
    return w0, theta, data.draw(inputs(partition))


@given(partitions(True), st.data())
def test_sgd_decay_is_an_l2_penalty_on_the_update(partition, data):
    """(lambda/2) ||w - w0||^2 in the loss is weight_decay=lambda on theta (Eq. 18)."""
    start = draw_start(partition, data)
    decayed = update_after(partition, *start, sgd(DECAY))
    penalised = update_after(partition, *start, sgd(0.0), penalty=DECAY)
    assert_close(decayed, penalised)


@given(partitions(False), st.data())
def test_sgd_decay_without_isometry_is_weaker_by_n(partition, data):
    """The penalty pulls theta_j as weight_decay = lambda n_j would, not lambda."""
    start = draw_start(partition, data)
    plain = update_after(partition, *start, sgd(0.0))
    decayed = update_after(partition, *start, sgd(DECAY))
    penalised = update_after(partition, *start, sgd(0.0), penalty=DECAY)
    n = dense(partition) @ sizes(partition)  # of each weight's own group
    assert_close(plain - penalised, n * (plain - decayed))


@given(partitions(False, even=True), st.data())
def test_sgd_decay_without_isometry_is_off_by_N_over_d(partition, data):
    """In groups of equal size the penalty is weight_decay = lambda N/d."""
    start = draw_start(partition, data)
    factor = partition.N / partition.d
    decayed = update_after(partition, *start, sgd(DECAY * factor))
    penalised = update_after(partition, *start, sgd(0.0), penalty=DECAY)
    assert_close(decayed, penalised)


@given(partitions(True, False), st.data())
def test_adamw_decay_shrinks_the_update(partition, data):
    """Decoupled decay takes lr lambda (w - w0) off the update, isometric or not."""
    start = draw_start(partition, data)
    plain = update_after(partition, *start, adamw(0.0))
    decayed = update_after(partition, *start, adamw(DECAY))
    w0, theta, _ = start
    before = weights(adapted(partition, w0, theta)[0]).detach() - w0
    assert_close(decayed, plain - LR * DECAY * before)


@given(partitions(True, even=True), st.data())
def test_adamw_decay_at_equal_steps_is_off_by_sqrt_N_over_d(partition, data):
    """Without isometry, equal steps in weight space need lr / sqrt(n): then the
    decoupled decay is weaker by sqrt(N/d), not by N/d."""
    w0, theta, x = draw_start(partition, data)
    n = partition.N / partition.d
    other = Partition(partition.N, partition.d, partition.seed, isometric=False)
    theta_other = theta / math.sqrt(n)  # the same update

    plain = update_after(partition, w0, theta, x, adamw(0.0))
    plain_other = update_after(other, w0, theta_other, x, adamw(0.0, n))
    assert_close(plain_other, plain)

    decay = plain - update_after(partition, w0, theta, x, adamw(DECAY))
    decayed_other = update_after(other, w0, theta_other, x, adamw(DECAY, n))
    assert_close((plain_other - decayed_other) * math.sqrt(n), decay)
