# SPDX-License-Identifier: Apache-2.0
"""In which dtype P theta, P^T w and W + P theta are computed, and where rounded.

That W comes back bit for bit is in test_life_cycle.py, files in test_storage.py.
"""

import copy
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from gpart import Partition, attach, merge
from test_properties import SEEDS, dense, partitions, vectors
from tests.models import backward, dense_gradient, oracle, parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = st.sampled_from(DTYPES)


def bits(t):
    """The integers that hold t: -0.0 is not 0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(kinds[t.element_size()])


def values(model):
    """Every parameter and buffer of the model but the adapter's."""
    state = model.state_dict()
    return [t for name, t in state.items() if not name.startswith("gpart.")]


def assert_same_bits(model, other):
    for one, two in zip(values(model), values(other), strict=True):
        assert_close(bits(one), bits(two), rtol=0, atol=0)


# --- P and P^T ---
@given(partitions(True, False), dtypes)
@example(Partition(2**24 + 7, 3), torch.float32)
def test_scale_is_rounded_once(partition, dtype):
    """scale(dtype) is 1/sqrt(n_j) in float64, then one cast; ones without isometry."""
    exact = 1 / partition.sizes().double().sqrt()
    exact = exact if partition.isometric else torch.ones_like(exact)
    assert_close(partition.scale(dtype=dtype), exact.to(dtype), rtol=0, atol=0)


@given(partitions(True, False), dtypes, st.data())
def test_expand_is_computed_in_float32_or_wider(partition, dtype, data):
    """expand(t) is in promote(t's dtype, float32): one product, rounded once."""
    t = data.draw(vectors(partition.d)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    products = t.to(wide) * partition.scale(dtype=wide)
    expected = products[partition.groups().long()]
    assert_close(partition.expand(t), expected, rtol=0, atol=0)


@given(partitions(True, False), dtypes, st.data())
def test_reduce_is_computed_in_float32_or_wider(partition, dtype, data):
    """reduce(w) is in promote(w's dtype, float32), and P^T w to that rounding."""
    w = data.draw(vectors(partition.N)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (dense(partition).T @ w.double()).to(wide)
    eps = 100 * torch.finfo(wide).eps
    assert_close(partition.reduce(w), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_sums_in_float32(dtype):
    """4096 ones sum to 4096 in each of 3 groups: in bfloat16 a sum stops at 256, in
    float16 at 2048."""
    partition = Partition(3 * 4096, 3, isometric=False)
    ones = torch.ones(partition.N, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(partition.reduce(ones), torch.full((3,), 4096, dtype=wide))


@pytest.mark.parametrize("d", [1, 23, 1000, 2**20])
def test_float32_keeps_the_isometry(d):
    """||P t|| = ||t|| to 1e-6 for 2^20 weights. P^T P t = t only to N/d roundings: the
    terms that reduce sums one by one are all equal here, and the errors add up."""
    partition = Partition(2**20, d)
    t = torch.randn(d, generator=torch.Generator().manual_seed(0))
    update = partition.expand(t)
    assert_close(update.double().norm(), t.double().norm(), rtol=1e-6, atol=0)
    rounding = torch.finfo(torch.float32).eps * (1 + partition.N / d)
    assert_close(partition.reduce(update), t, rtol=rounding, atol=0)


# --- W + P theta ---
@st.composite
def adapters(draw):
    """(pretrained network, its adapted copy, the adapter), theta random, any dtype.

    Two Linears on the fused or the plain path, an Embedding, a Conv1d, and a bias; the
    last Linear may be trained whole instead.
    """
    a, b, c = draw(st.tuples(*[st.integers(1, 6)] * 3))
    pristine = nn.Sequential(
        nn.Embedding(5, a),
        nn.Linear(a, b),
        nn.Tanh(),
        nn.Conv1d(3, 2, 1),
        nn.Linear(b, c),
    ).to(draw(dtypes))
    targets, heads = draw(
        st.sampled_from(
            [
                (["0", "1", "3", "4"], []),
                (["1", "1.bias", "4"], []),
                (["0", "1", "3", "3.bias"], ["4"]),
            ]
        )
    )
    names = [name if name.endswith("bias") else f"{name}.weight" for name in targets]
    N = sum(pristine.get_parameter(name).numel() for name in names)
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    with torch.no_grad():
        for w in pristine.parameters():
            w.normal_(generator=source)
        model = copy.deepcopy(pristine)
        adapter = attach(
            model,
            draw(st.integers(1, 6).map(lambda k: min(k, N)) | st.integers(1, N)),
            seed=draw(SEEDS),
            target_modules=targets,
            modules_to_save=heads,
            isometric=draw(st.booleans()),
            fused=draw(st.booleans()),
        )
        adapter.theta.normal_(generator=source)
    return pristine, model, adapter


INPUTS = torch.arange(12).view(4, 3) % 5


@given(adapters())
def test_sum_is_rounded_once(case):
    """W + P theta is read and merged as cast(wide(W) + P theta), bit for bit: the
    product and the sum in float32 or wider, one cast to W's dtype."""
    pristine, model, adapter = case
    expected = oracle(pristine, adapter)
    for name, w in parameters(expected).items():
        path, _, attribute = name.rpartition(".")
        assert torch.equal(bits(getattr(model.get_submodule(path), attribute)), bits(w))
    assert_same_bits(model, pristine)  # parameters() and the state dict hold W
    merge(model)
    assert_same_bits(model, expected)


@given(adapters())
def test_delta_is_P_theta_in_float32(case):
    """delta() is P theta cut and shaped by the manifest, whatever the model's dtype."""
    _, _, adapter = case
    update = adapter.partition.expand(adapter.theta)
    shapes = [shape for _, shape in adapter.manifest]
    pieces = update.split([math.prod(shape) for shape in shapes])
    for delta, piece, shape in zip(
        adapter.delta().values(), pieces, shapes, strict=True
    ):
        assert_close(delta, piece.view(shape), rtol=0, atol=0)


@given(adapters())
def test_gradient_is_summed_in_float32_or_wider(case):
    """theta.grad is float32, and P^T of an ordinary network's gradients in W's dtype:
    they are rounded to it once, and not again in the sum."""
    pristine, model, adapter = case
    ordinary = oracle(pristine, adapter)
    backward(model(INPUTS))
    backward(ordinary(INPUTS))
    expected = dense_gradient(ordinary, adapter).float()
    assert_close(adapter.theta.grad, expected, rtol=1e-5, atol=1e-5)
