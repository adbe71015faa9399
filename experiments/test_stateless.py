# SPDX-License-Identifier: Apache-2.0
"""Without stored ids everything is as with them.

The laws are test_gpart.py's own, on models that forget their ids as they are attached
or loaded. Where Triton is installed the last test runs a part of this again on the
kernels for CUDA, by Triton's interpreter.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gpart
import test_gpart
from experiments import stateless as module
from experiments.stateless import Ids, StatelessGPart, StatelessLinear, stateless
from tests.models import ALL, D, normal, snapshot, two_layers, variant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
KERNELS = INTERPRETED or DEVICE != CPU
# dynamo's and inductor's own, while they compile
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAMES = ("bert",) if INTERPRETED else ("bert", "gpt2", "t5-tied", "conv-embedding")


@pytest.fixture(params=[(n, p) for n in NAMES for p in (True, False)], ids=str)
def case(request: pytest.FixtureRequest) -> Any:
    name, fused = request.param
    return variant(name, fused=fused)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """attach and load end in stateless."""
    install = gpart.install

    def forgetful(model: nn.Module, *args: Any, **kwargs: Any) -> gpart.GPart:
        install(model, *args, **kwargs)
        return stateless(model)

    monkeypatch.setattr(gpart, "install", forgetful)


# Run here, too, with `case` and `forget` of this file
LAWS = """
a_cast_moves_the_weights_and_not_theta
a_compiled_model_equals_the_eager_one
a_copy_is_the_same_model_and_its_own
a_file_gives_the_same_model
a_layer_may_be_on_another_device
a_pretrained_state_dict_goes_in_beside_theta
a_state_dict_names_its_partition
a_step_takes_the_matrix_products_of_the_dense_step
another_theta_is_seen_at_the_next_forward
any_input_of_a_linear
attached_equals_the_dense_oracle
autocast_equals_the_dense_oracle
both_paths_equal_the_dense_P_in_float64
detach_restores_everything
detach_with_merge_leaves_an_ordinary_model
disabled_is_the_pretrained_model
gradient_checkpointing_changes_nothing
half_precision_models_add_in_float32
merge_equals_the_attached_forward
names_stay_and_only_theta_and_the_heads_train
reading_an_adapted_parameter_gives_W_plus_delta
the_default_device_is_not_asked
the_gradient_is_summed_in_float32
the_output_may_be_changed_in_place
tied_parameters_count_once_and_move_everywhere
torch_func_agrees_with_autograd
unmerge_is_bit_exact
"""
SOME = """
a_file_gives_the_same_model
detach_with_merge_leaves_an_ordinary_model
merge_equals_the_attached_forward
the_gradient_is_summed_in_float32
tied_parameters_count_once_and_move_everywhere
"""  # the interpreter takes 50 ms a launch
for name in (SOME if INTERPRETED else LAWS).split():
    globals()[f"test_{name}"] = getattr(test_gpart, f"test_{name}")


def found(P: gpart.Partition, start: int, n: int) -> torch.Tensor:
    """The ids that a layer gets, by either way."""
    ids = Ids(P, start, n).ready(DEVICE)
    if isinstance(ids, torch.Tensor):
        return ids
    every = torch.arange(P.d, dtype=torch.float64, device=DEVICE)
    zeros, ones = every.new_zeros(n), torch.ones_like(every)
    with torch.no_grad():
        return module.add_update(zeros, every, ids, ones).int().cpu()


EDGES = [2**k + e for k in (16, 31, 32, 53, 61, 62) for e in (-1, 0, 1)]
SIZES = [*range(1, 9), 14155776, 12 * 10**9, *EDGES[:-1]]


@pytest.mark.parametrize("N", SIZES)
def test_ids_at_the_edges(N: int) -> None:
    """Where the rounds change and where a type ends, at both ends of the weights."""
    for d in {1, min(N, 23040), min(N, 2**18 - 1)}:
        P, n = gpart.Partition(N, d, seed=N), min(N, 1500)
        for start in {0, (N - n) // 2, N - n}:
            expected = P.groups(start, start + n)
            assert torch.equal(found(P, start, n), expected)


@settings(deadline=None, max_examples=20 if INTERPRETED else 100)
@given(data=st.data(), seed=st.integers(0, 2**64 - 1))
def test_ids_are_those_of_the_partition(data: st.DataObject, seed: int) -> None:
    """For any N up to 2^62, any d, seed and range, bit for bit."""
    N = data.draw(st.integers(1, 2 ** data.draw(st.integers(0, 62), "bits")), "N")
    # the check of the kernels gathers from d numbers
    d = data.draw(st.integers(1, min(N, 2**18 if KERNELS else 2**31 - 1)), "d")
    n = data.draw(st.integers(1, min(N, 3000)), "n")
    start = data.draw(st.integers(0, N - n), "start")
    P = gpart.Partition(N, d, seed)
    assert torch.equal(found(P, start, n), P.groups(start, start + n))


def test_one_loop_is_compiled_for_all_layers() -> None:
    """Another size, partition or place in it compiles nothing."""
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    for N, d, n in ((10**6, 50, 700), (2**62, 99, 1000), (10**5, 10**4, 64)):
        Ids(gpart.Partition(N, d), n, n).ready(CPU)
    assert stats["unique_graphs"] == (0 if INTERPRETED else 1)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_nothing_of_weight_size_is_kept(fused: bool) -> None:
    """Neither by the model nor for backward, but the frozen weight itself."""
    model, kept = nn.Linear(320, 240), []
    with torch.no_grad():
        before = {t.data_ptr() for t in model.parameters()}
    adapter = gpart.attach(model, 5, target_modules=ALL, fused=fused)
    assert isinstance(adapter, StatelessGPart)
    assert (type(model) is StatelessLinear) == fused
    assert sum(ids.bytes() for ids in adapter.ids.values()) < 4 * 320 * 240 / 100

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        (model(normal(2, 320)) if fused else model.weight).sum().backward()
    assert {t.data_ptr() for t in kept if t.numel() >= 320 * 240} <= before
    assert kept


@pytest.mark.skipif(
    INTERPRETED, reason="of Triton's kernels there is no second derivative"
)
@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck]
)
def test_both_functions_agree_with_numerical_differentiation(check: Any) -> None:
    """First and second derivatives in x, W, b and theta."""
    P, shapes = gpart.Partition(N=20, d=3), [(3, 5), (4, 5), (4,), (3,)]
    x, w, b, theta = (
        normal(*shape, seed=k, dtype=torch.float64).requires_grad_()
        for k, shape in enumerate(shapes)
    )
    rest = theta, Ids(P, 0, 20), P.scale(dtype=torch.float64)
    assert check(module.FusedLinear.apply, (x, w, b, *rest))
    assert check(module.Update.apply, (w, *rest))


def test_an_id_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a compiler do its sums otherwise, the model keeps its ids."""
    monkeypatch.undo()
    model = two_layers()
    gpart.attach(model, D, target_modules=ALL)
    before, real = snapshot(model), module.add_update

    def off(*args: Any) -> torch.Tensor:
        out = real(*args)
        out[-1, ...] += 1
        return out

    monkeypatch.setattr(module, "add_update", off)
    with pytest.raises(ValueError, match="the ids are kept"):
        stateless(model)
    assert snapshot(model) == before
    monkeypatch.undo()
    stateless(model)
    with pytest.raises(ValueError, match="already"):
        stateless(model)
    gpart.detach(model)
    with pytest.raises(ValueError, match="no adapter here"):
        stateless(model)


DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_equals_that_of_stored_ids(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y, grad x and grad theta: on the CPU bit for bit, by the kernels to rounding.
    (To bfloat16 Triton's interpreter truncates; see the test of machine code.)"""
    results = []
    for forgets in (True, False):
        if not forgets:
            monkeypatch.undo()
        torch.manual_seed(0)
        model = two_layers().to(DEVICE, dtype)
        adapter = gpart.attach(model, D, target_modules=ALL)
        adapter.theta.data.copy_(normal(D))
        x = normal(6, 16).to(DEVICE, dtype).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, adapter.theta.grad])
        assert isinstance(adapter, StatelessGPart) == forgets
    near = 4 * torch.finfo(dtype).eps if KERNELS else 0
    for by_recipe, stored in zip(*results, strict=True):
        assert by_recipe.dtype == stored.dtype
        assert (by_recipe - stored).norm() <= near * stored.norm()


def test_the_script_runs(tmp_path: Path) -> None:
    """At toy size: every figure is there and is a time or a size."""
    if INTERPRETED:
        pytest.skip("the interpreter of triton is no bench")
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "experiments.stateless", "--toy", "--device=cpu"]
    subprocess.run([*command, f"--output={path}"], check=True)
    result = json.loads(path.read_text(encoding="utf-8"))
    for row in result["layers"]:
        assert all(0 < wall < math.inf for wall, _ in row["ns_a_weight"].values())
    (case,) = result["cases"]
    assert case["rows"]["stateless"]["ids_bytes"] < case["rows"]["gpart"]["ids_bytes"]
    assert case["rows"]["dense"]["to_dense"] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_for_a_gpu() -> None:
    """As far as an H100's machine code, without one: no division is left in it, and the
    update is rounded to bfloat16, not cut."""
    triton = pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("triton interprets here")
    from triton.backends.compiler import GPUTarget

    from experiments import stateless_triton as kernels

    ids = Ids(gpart.Partition(12 * 10**9, 524288), 0, 1000)
    code = ""
    for kernel, types in (
        (kernels.add_kernel, ["*bf16", "*fp32", "*bf16", "i64", "i32"]),
        (kernels.sum_kernel, ["*bf16", "*fp32", "i64", "i32"]),
    ):
        n = len(types)
        types += ["constexpr", "constexpr"]
        values = {(n,): kernels.constants(ids), (n + 1,): kernels.BLOCK}
        signature = dict(zip(kernel.arg_names, types, strict=True))
        source = triton.compiler.ASTSource(kernel, signature, values)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        assert made["cubin"]
        code += made["ptx"]
    assert "mul." in code and "div." not in code and "rem." not in code
    assert "cvt.rn.bf16" in code and "relaxed.add.f32" in code


@pytest.mark.skipif(INTERPRETED, reason="this is the run on Triton's interpreter")
def test_the_kernels() -> None:
    """This file with TRITON_INTERPRET=1: ids, y, grad x and grad theta; life after."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
