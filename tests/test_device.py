# SPDX-License-Identifier: Apache-2.0
"""A device is as good as another: the same bits where the format fixes them, and the
same results to rounding.

    GPART_DEVICE=cuda pytest tests/test_device.py

The device is compared with the CPU. Without GPART_DEVICE it is CUDA where there is one;
GPART_DEVICE=cpu tries the tests themselves.
"""

import os
import zlib

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import gpart
from gpart import Partition, detach, disabled, load, merge, save, unmerge
from tests.models import (
    FUSED,
    PATHS,
    D,
    backward,
    normal,
    oracle,
    parameters,
    slow,
    variant,
)
from tests.test_partition import GOLDEN

DEVICE = os.environ.get("GPART_DEVICE", "cuda" * torch.cuda.is_available())
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU, and no GPART_DEVICE=cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions on CUDA are in TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(found, expected):
    """To the rounding of float32 sums in another order."""
    assert found.device.type == torch.device(DEVICE).type
    assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def on_device(name, **changes):
    """The case of that name with its input on the device."""
    case = variant(name, **changes)
    if isinstance(case.inputs, dict):
        moved = {
            key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for key, value in case.inputs.items()
        }
    else:
        moved = tuple(x.to(DEVICE) for x in case.inputs)
    return variant(name, **changes, inputs=moved)


def weights(model, adapter):
    """What the model reads as its adapted weights, on the CPU."""
    found = {}
    for name, _ in adapter.manifest:
        owner, _, key = name.rpartition(".")
        found[name] = getattr(model.get_submodule(owner), key).detach().cpu()
    return found


def equal(found, expected):
    """Bit for bit, as far as numbers go."""
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


def read(model, adapter):
    return {
        name: parameters(model)[name].detach().cpu() for name, _ in adapter.manifest
    }


# --- Bits ---
@pytest.mark.parametrize(
    ("N", "seed", "first", "crc"), GOLDEN, ids=[f"N={row[0]}" for row in GOLDEN]
)
def test_ids_are_the_formats(N, seed, first, crc):
    """The golden vectors, computed on the device."""
    pi = Partition(N, N, seed).groups(device=DEVICE)
    assert pi.device.type == torch.device(DEVICE).type and pi.dtype == torch.int32
    assert pi[:12].tolist() == [*map(int, first.split())]
    assert zlib.crc32(pi.cpu().numpy().astype("<i8").tobytes()) == crc


@pytest.mark.parametrize("N", [2**24 + 70_001, 2**40, 2**62])
def test_slices_across_chunks_are_the_hosts(N):
    """Around 2^15 and 2^24, where the chunks of a CPU and of CUDA end."""
    partition = Partition(N, 2**20 + 7, seed=5)
    for edge in (2**15, 2**24):
        part = edge - 1000, edge + 1000
        found = partition.groups(*part, device=DEVICE).cpu()
        assert torch.equal(found, partition.groups(*part))
    whole = partition.groups(7, 2**24 + 70_000, device=DEVICE)
    assert torch.equal(
        whole[2**24 - 8 : 2**24 + 92].cpu(), partition.groups(2**24 - 1, 2**24 + 99)
    )


@FUSED
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_the_hosts_bits(dtype, isometric, fused):
    """Attached on the device or moved there, merged, and back as they were."""
    case = on_device("sequential", fused=fused)
    host = case.model().to(dtype)
    here = case.attach(host, isometric=isometric)
    here.theta.data.copy_(normal(D))
    expected, pretrained = weights(host, here), read(case.model().to(dtype), here)
    moved = case.model().to(dtype)
    adapter = case.attach(moved, isometric=isometric)
    moved.to(DEVICE)
    built = case.model().to(DEVICE, dtype)
    other = case.attach(built, isometric=isometric)
    for model, one in ((moved, adapter), (built, other)):
        one.theta.data.copy_(normal(D))
        places = {
            one.theta.device,
            one.scale.device,
            *(i.device for i in one.ids.values()),
        }
        assert {place.type for place in places} == {torch.device(DEVICE).type}
        equal(weights(model, one), expected)
        merge(model)
        equal(read(model, one), expected)
        unmerge(model)
        equal(read(model, one), pretrained)
        with disabled(model):
            equal(weights(model, one), pretrained)
        detach(model, merge=True)
        equal(read(model, one), expected)


def test_files_go_both_ways(tmp_path):
    """Saved on either side a file has the same tensors, and loads on the other."""
    case = on_device("sequential")
    models = {}
    for place in ("cpu", DEVICE):
        models[place], adapter = case.adapted()
        models[place].to(place)
        save(models[place], tmp_path / place)
    equal(load_file(tmp_path / "cpu"), load_file(tmp_path / DEVICE))
    for place, other in (("cpu", DEVICE), (DEVICE, "cpu")):
        fresh = case.model().to(place)
        loaded = load(fresh, tmp_path / other)
        equal(weights(fresh, loaded), weights(models["cpu"], adapter))
        theta = loaded.theta
        theta.data.zero_()
        assert load(fresh, tmp_path / other).theta is theta
        equal(weights(fresh, loaded), weights(models["cpu"], adapter))


# --- Results ---
@pytest.mark.parametrize(("name", "path"), PATHS)
def test_a_model_computes_what_it_does_on_the_host(name, path):
    """Weights, output and theta's gradient, of each architecture."""
    host = variant(name, fused=path == "fused")
    case = on_device(name, fused=path == "fused")
    plain, here = host.adapted()
    model, adapter = case.adapted()
    model.to(DEVICE)
    equal(weights(model, adapter), read(oracle(case.pristine, here), here))
    close(backward(case(model, grad=True)), backward(host(plain, grad=True)))
    close(adapter.theta.grad, here.theta.grad)


@FUSED
def test_autocast_is_near_float32(fused):
    """bfloat16 products, a float32 theta and gradient."""
    case = on_device("sequential", fused=fused)
    model, adapter = case.adapted()
    model.to(DEVICE)
    results = []
    for enabled in (False, True):
        adapter.theta.grad = None
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=enabled):
            y = case(model, grad=True)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        backward(y.float())
        results.append(adapter.theta.grad)
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert results[1].dtype == torch.float32 and 0 < error < 0.05


@FUSED
def test_a_layer_on_the_device_of_a_model_on_the_host(fused):
    """The gradient comes back to theta, which stays where it is."""
    case = on_device("one-linear", fused=fused)
    model, adapter = case.adapted()
    host, expected = variant("one-linear", fused=fused).adapted()
    backward(variant("one-linear", fused=fused)(host, grad=True))
    for w in parameters(model).values():
        if w is not adapter.theta:
            w.data = w.data.to(DEVICE)
    close(backward(case(model, grad=True)), case(host.to(DEVICE)).cpu())
    assert adapter.theta.device.type == "cpu"
    assert_close(adapter.theta.grad, expected.theta.grad.cpu(), rtol=1e-3, atol=1e-4)


@slow
@FUSED
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
def test_a_compiled_model_is_the_eager_one(fused):
    """torch.compile(fullgraph=True), output and gradient."""
    torch.compiler.reset()
    case = on_device("sequential", fused=fused)
    model, adapter = case.adapted()
    model.to(DEVICE)
    results = []
    for one in (model, torch.compile(model, fullgraph=True)):
        adapter.theta.grad = None
        results.append((backward(case(one, grad=True)), adapter.theta.grad))
    assert_close(*results, rtol=1e-3, atol=1e-4)


def test_fused_keeps_no_weight_for_backward():
    """Forward allocates rows, and not a weight; the plain path does."""
    if DEVICE == "cpu":
        pytest.skip("a CPU does not count its bytes: needs a GPU")
    grown = {}
    for fused in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(2048, 2048)).to(DEVICE)
        gpart.attach(model, D, target_modules="0", fused=fused)
        x = torch.ones(8, 2048, device=DEVICE, requires_grad=True)
        model(x)  # workspaces of the first product
        before = torch.cuda.memory_allocated()
        y = model(x)
        grown[fused] = torch.cuda.memory_allocated() - before
        del y
    weight = 4 * 2048**2
    assert grown[True] < weight / 10 < weight <= grown[False]
