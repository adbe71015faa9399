# SPDX-License-Identifier: Apache-2.0
"""What gpart.py promises a model: each test is a law, its docstring the statement.

The laws of P itself are in test_properties.py. Here P acts on real architectures, on
the fused and on the plain path, in every dtype, through the life of an adapter and
under careless calls. What is exhaustive or takes long is in tests/.
"""

import copy
import functools
import io
import math
import pickle
import random
import re

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import gpart
from gpart import (
    FusedLinear,
    Partition,
    attach,
    detach,
    disabled,
    load,
    merge,
    save,
    unmerge,
)
from test_properties import dense as dense_P
from tests.models import (
    ALL,
    FUSED,
    MODELS,
    NET,
    PATHS,
    TOKENS,
    D,
    Doubled,
    Net,
    X,
    backward,
    dense_gradient,
    normal,
    one_process,
    oracle,
    parameters,
    refused,
    slow,
    snapshot,
    trainable,
    two_layers,
    variant,
)
from tests.storage_models import trained


@pytest.fixture(params=PATHS, ids="-".join)
def case(request):
    """Each architecture, on the fused and on the plain path."""
    name, path = request.param
    return variant(name, fused=path == "fused")


MERGED = pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])


# --- 1. Each architecture, on both paths ---
def test_training_starts_at_the_pretrained_model(case):
    """theta = 0 leaves the output as it was, bit for bit."""
    model = case.model()
    case.attach(model)
    assert torch.equal(case(model), case(case.pristine))


def test_attached_equals_the_dense_oracle(case):
    """The output is that of an ordinary model with the weights W + P theta, and not the
    pretrained one; theta.grad is P^T of that model's gradients (Eq. 11)."""
    model, adapter = case.adapted()
    dense = oracle(case.pristine, adapter)
    assert torch.equal(case(model), case(dense))  # torch's encoder on its fast path
    dense.requires_grad_(True)
    with pytest.raises(AssertionError):
        assert_close(case(model), case(case.pristine), rtol=1e-2, atol=1e-5)
    assert_close(backward(case(model, grad=True)), backward(case(dense, grad=True)))
    gradient = dense_gradient(dense, adapter)
    assert_close(adapter.theta.grad, gradient, rtol=1e-4, atol=1e-5)
    own = parameters(dense)
    for name in set(trainable(model)) - {"gpart.theta"}:  # modules_to_save
        assert_close(model.get_parameter(name).grad, own[name].grad)


def test_torch_runs_the_encoder_in_one_call(monkeypatch):
    """The laws here hold on torch's fast path, too: without grad it calls C++ once a
    layer, with the parameters that it read."""
    real, calls = torch._transformer_encoder_layer_fwd, []

    def layer(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", layer)
    case = MODELS["torch-encoder"]
    case(case.adapted()[0])
    assert len(calls) == 2


def test_reading_an_adapted_parameter_gives_W_plus_delta(case):
    """delta() is float32, in the manifest's order; the attribute reads W + dW."""
    model, adapter = case.adapted()
    own, delta = parameters(case.pristine), adapter.delta()
    assert [(name, tuple(dw.shape)) for name, dw in delta.items()] == adapter.manifest
    for name, dw in delta.items():
        path, _, attribute = name.rpartition(".")
        read = getattr(model.get_submodule(path), attribute)
        assert dw.dtype == torch.float32
        assert torch.equal(read, own[name] + dw)
        assert not torch.equal(read, own[name])


def test_merge_equals_the_attached_forward(case):
    """merge puts W + P theta into the weights and leaves the output, bit for bit."""
    model, adapter = case.adapted()
    y, own = case(model), parameters(oracle(case.pristine, adapter))
    merge(model)
    assert torch.equal(case(model), y)
    merged = parameters(model)
    assert all(torch.equal(merged[name], own[name]) for name in own)


def test_unmerge_is_bit_exact(case):
    """merge and unmerge, however often, give back every bit and the attached output."""
    model, _ = case.adapted()
    before, y = snapshot(model), case(model)
    for _ in range(3):
        merge(model)
        assert snapshot(model) != before
        unmerge(model)
        assert snapshot(model) == before
        assert torch.equal(case(model), y)


def test_disabled_is_the_pretrained_model(case):
    """Inside disabled: the pretrained output, nested too. After it, even after an
    exception: the adapted one."""
    model, _ = case.adapted()
    y = case(model)
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            pass
        assert torch.equal(case(model), case(case.pristine))
        raise KeyError
    assert torch.equal(case(model), y)


@MERGED
def test_detach_restores_everything(case, merged):
    """detach: classes, names, requires_grad, bits are as before, however often."""
    model = case.model()
    before = snapshot(model)
    for _ in range(2):
        case.attach(model).theta.data.fill_(1.0)
        if merged:
            merge(model)
        assert snapshot(model) != before
        detach(model)
        assert snapshot(model) == before
    assert torch.equal(case(model), case(case.pristine))


@MERGED
def test_detach_with_merge_leaves_an_ordinary_model(case, merged):
    """detach(merge=True): W + P theta in the original classes, and nothing else."""
    model, adapter = case.adapted()
    dense, y = oracle(case.pristine, adapter), case(model)
    if merged:
        merge(model)
    detach(model, merge=True)
    assert snapshot(model) == snapshot(dense)
    assert torch.equal(case(model), y)


def test_names_stay_and_only_theta_and_the_heads_train(case):
    """The state dict gains theta and what it means; no other key or bit changes."""
    model, _ = case.adapted()
    base, state = case.pristine.state_dict(), model.state_dict()
    assert {*state} == {*base, "gpart.theta", "gpart._extra_state"}
    assert state["gpart._extra_state"].dtype == torch.uint8
    assert all(torch.equal(state[name], w) for name, w in base.items())
    heads = [n for n, _ in model.named_parameters() if n.split(".")[0] in case.save]
    assert trainable(model) == [*heads, "gpart.theta"]


def test_a_file_gives_the_same_model(case, tmp_path):
    """save, and load into a fresh model: the same output and manifest, bit for bit;
    nothing is drawn from the global generators."""
    path, fresh = tmp_path / "adapter.safetensors", case.model()
    before = torch.get_rng_state(), random.getstate()
    model, adapter = case.adapted()
    save(model, path)
    loaded = load(fresh, path)
    merge(fresh)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (loaded.partition, loaded.manifest) == (adapter.partition, adapter.manifest)
    assert torch.equal(case(fresh), case(model))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("trip", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_the_same_model_and_its_own(case, trip):
    """deepcopy, pickle, torch.save: the same classes and output; then neither follows
    the other, and the copy detaches to the pretrained model."""
    model, adapter = case.adapted()
    twin, y = trip(model), case(model)
    assert [*map(type, twin.modules())] == [*map(type, model.modules())]
    assert torch.equal(case(twin), y)
    twin.gpart.theta.data.zero_()
    assert torch.equal(case(model), y)
    twin.gpart.theta.data.copy_(adapter.theta)
    merge(model)
    assert torch.equal(case(twin), y)
    detach(twin)
    assert snapshot(twin) == snapshot(case.pristine)


def test_a_training_step_computes_no_group_id(case, monkeypatch):
    """The ids are made once, by attach."""
    model, adapter = case.adapted()
    monkeypatch.delattr(gpart, "permute")
    backward(case(model, grad=True))
    assert adapter.theta.grad.any()


# --- 2. The fused linear ---
@FUSED
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained", "adapted"])
@pytest.mark.parametrize("d", [1, 3, "N"])
def test_both_paths_equal_the_dense_P_in_float64(d, bias, isometric, fused):
    """y, grad x, grad theta and grad b are those of w = w0 + P @ theta, P by Eq. 7."""
    model = nn.Linear(5, 4, bias=bias != "none").double()
    targets = ["weight", "bias"] if bias == "adapted" else ["weight"]
    own = {name: w.detach().clone() for name, w in model.named_parameters()}
    w0 = torch.cat([own[name].flatten() for name in targets])
    d = len(w0) if d == "N" else d
    options = {"isometric": isometric, "fused": fused}
    adapter = attach(model, d, target_modules=targets, **options)
    adapter.theta.data.copy_(normal(d))
    if bias == "trained":
        model.bias.requires_grad_(True)
    x1 = normal(2, 6, 5, dtype=torch.float64).requires_grad_()
    y = backward(model(x1))

    theta = normal(d).double().requires_grad_()
    w = w0 + dense_P(adapter.partition) @ theta
    b = own.get("bias")
    if bias == "trained":
        b.requires_grad_(True)
    x2 = x1.detach().clone().requires_grad_()
    expected = nn.functional.linear(
        x2, w[:20].view(4, 5), w[20:] if bias == "adapted" else b
    )
    assert_close(y, backward(expected))
    assert_close(x1.grad, x2.grad)
    assert_close(adapter.theta.grad, theta.grad.float())
    if bias == "trained":
        assert_close(model.bias.grad, b.grad)


CHECKS = [torch.autograd.gradcheck, torch.autograd.gradgradcheck]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_linear_agrees_with_numerical_differentiation(check, bias):
    """First and second derivatives in x, W, b and theta."""
    P, shapes = Partition(N=20, d=3), [(3, 5), (4, 5), (4,), (3,)]
    x, w, b, theta = (
        normal(*shape, seed=k, dtype=torch.float64).requires_grad_()
        for k, shape in enumerate(shapes)
    )
    constants = P.groups(), P.scale(dtype=torch.float64)
    assert check(FusedLinear.apply, (x, w, b if bias else None, theta, *constants))


SHAPES = [(16,), (3, 16), (2, 3, 16), (2, 3, 2, 16)]


@FUSED
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_may_be_changed_in_place(shape, bias, fused):
    """A ReLU(inplace=True) after the layer gives what one out of place gives."""
    model = nn.Linear(16, 24, bias=bias)
    adapter = attach(model, D, target_modules=ALL, fused=fused)
    adapter.theta.data.copy_(normal(D))
    results = []
    for inplace in (True, False):
        x = normal(*shape).requires_grad_()
        y = nn.functional.relu(model(x), inplace=inplace)
        results.append([backward(y), x.grad, adapter.theta.grad])
        adapter.theta.grad = None
    assert_close(*results, rtol=0, atol=0)


INPUTS = {
    "one-dimensional": normal(16),
    "four-dimensional": normal(2, 3, 1, 16),
    "transposed": normal(16, 3).T,
    "three-dimensional and transposed": normal(3, 2, 16).transpose(0, 1),
    "channels moved": normal(2, 16, 3).mT,
    "strided": normal(3, 32)[:, ::2],
    "expanded": normal(1, 16).expand(3, 16),
    "empty": normal(0, 16),
    "empty inside": normal(2, 0, 16),
}


@FUSED
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_any_input_of_a_linear(x, need_x, fused):
    """Any shape and stride, whether or not x needs a gradient."""
    model, adapter = variant("one-linear", fused=fused).adapted()
    dense = oracle(MODELS["one-linear"].pristine, adapter).requires_grad_(True)
    results = []
    for layer in (model, dense):
        leaf = x.detach().requires_grad_(need_x)
        results.append([backward(layer(input=leaf)), leaf.grad])
        assert (leaf.grad is not None) == need_x
    assert_close(*results) if need_x else assert_close(results[0][0], results[1][0])
    gradient = dense_gradient(dense, adapter)
    assert_close(adapter.theta.grad, gradient, rtol=1e-4, atol=1e-5)


@FUSED
def test_the_fused_path_keeps_nothing_of_weight_size(fused):
    """For backward it keeps the frozen weight and its ids, which exist anyway. (The
    plain path keeps more: so the test can fail.)"""
    model, kept = nn.Linear(64, 48), []
    adapter = attach(model, 5, target_modules=ALL, fused=fused)

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(normal(2, 64).requires_grad_())
    large = {(t.data_ptr(), t.dtype) for t in kept if t.numel() >= 48 * 64}
    w, ids = model._parameters["weight"], adapter.ids["weight"]
    anyway = {(w.data_ptr(), torch.float32), (ids.data_ptr(), torch.int32)}
    assert (large == anyway) == fused


@FUSED
def test_a_step_takes_the_matrix_products_of_the_dense_step(fused):
    """A training step's FLOPs are those of training the same dense weights."""
    roberta, flops = variant("roberta", fused=fused), []
    dense = roberta.model()
    for name, w in dense.named_parameters():
        w.requires_grad_(name.endswith(("query.weight", "value.weight")))
    for model in (dense, roberta.adapted()[0]):
        with FlopCounterMode(display=False) as counter:
            roberta(model, grad=True).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def loss_of(model, theta, x):
    tensors = {**dict(model.named_parameters()), "gpart.theta": theta}
    return torch.func.functional_call(model, tensors, (x,)).square().sum()


@pytest.mark.skipif(torch.__version__ < "2.8", reason="ids are int32: torch 2.8")
@FUSED
def test_torch_func_agrees_with_autograd(fused):
    """torch.func's grad, jacrev, and vmap of grad over inputs and over thetas."""
    model, adapter = variant("sequential", fused=fused).adapted()
    loss, theta = functools.partial(loss_of, model), adapter.theta.detach()
    thetas, x = normal(3, D), normal(3, 5, 16)

    def gradient(theta, x):
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(loss(theta, x), theta)[0]

    grad = torch.func.grad(loss)
    assert_close(grad(theta, x[0]), gradient(theta, x[0]))
    assert_close(torch.func.jacrev(loss)(theta, x[0]), gradient(theta, x[0]))
    by_input = torch.vmap(grad, in_dims=(None, 0))(theta, x)
    assert_close(by_input, torch.stack([gradient(theta, row) for row in x]))
    by_theta = torch.vmap(grad, in_dims=(0, None))(thetas, x[0])
    assert_close(by_theta, torch.stack([gradient(row, x[0]) for row in thetas]))


# --- 3. Precision ---
@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "conv-embedding"])
def test_half_precision_models_add_in_float32(name, dtype, fused):
    """A 16-bit model runs on (W.float() + P theta) cast once, merged too; theta and its
    gradient are float32."""
    case = variant(name, fused=fused)
    model = case.model().to(dtype)
    adapter = case.attach(model)
    adapter.theta.data.copy_(normal(D, seed=7))
    dense = oracle(case.model().to(dtype), adapter).requires_grad_(True)
    y = case(model)
    assert torch.equal(y, case(dense))
    backward(case(model, grad=True))
    backward(case(dense, grad=True))
    expected = dense_gradient(dense, adapter)
    assert adapter.theta.dtype == adapter.theta.grad.dtype == torch.float32
    assert (adapter.theta.grad - expected).norm() < 1e-2 * expected.norm()
    merge(model)
    assert torch.equal(case(model), y)


@FUSED
def test_the_gradient_is_summed_in_float32(fused):
    """4096 ones sum to 4096 on a bf16 model, where a sum in bf16 stops at 256."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    adapter = attach(model, 1, target_modules=ALL, fused=fused)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert adapter.theta.grad.tolist() == [4096 / math.sqrt(4096)]


@FUSED
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "torch-encoder-train"])
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_autocast_equals_the_dense_oracle(inside, name, fused):
    """Under autocast: the merged model's output, bit for bit, and the dense gradient,
    whether backward runs after the autocast block, as it should, or inside."""
    case = variant(name, fused=fused)
    model, adapter = case.adapted()
    dense = oracle(case.pristine, adapter).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case(model, grad=True), case(dense, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        for y in outputs:
            backward(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case(model)
        merge(model)
        assert torch.equal(case(model), y)
    assert adapter.theta.grad.dtype == torch.float32
    gradient = dense_gradient(dense, adapter)
    assert_close(adapter.theta.grad, gradient, rtol=1e-3, atol=1e-4)


CASTS = {
    "half()": lambda model: model.half(),
    "bfloat16()": lambda model: model.bfloat16(),
    "double()": lambda model: model.double(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to(cpu, float64)": lambda model: model.to("cpu", torch.float64),
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv-embedding"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_moves_the_weights_and_not_theta(cast, name):
    """A cast model runs as its cast weights + P theta. Merged, cast, unmerged: the
    pretrained weights cast the same way, bit for bit."""
    case = MODELS[name]
    model, adapter = case.adapted()
    cast(model)
    assert torch.equal(adapter.theta, normal(D, seed=7))
    assert_close(case(model), case(oracle(cast(case.model()), adapter)))
    merged, _ = case.adapted()
    merge(merged)
    unmerge(cast(merged))
    base = snapshot(cast(case.model()))
    for m in (model, merged):
        detach(m)
        assert snapshot(m) == base


# --- 4. Devices and frameworks ---
@FUSED
@pytest.mark.parametrize("isometric", [True, False])
def test_everything_moves_with_the_model(isometric, fused):
    """A moved model takes theta, ids, scale, updates and gradients along."""
    case = variant("sequential", fused=fused)
    model, adapter = case.adapted(isometric=isometric)
    model.to("meta")
    x = normal(2, 16).to("meta").requires_grad_()
    model(x).sum().backward()
    tensors = [adapter.theta, adapter.theta.grad, x.grad, adapter.scale]
    tensors += [*adapter.ids.values(), *adapter.delta().values()]
    assert {t.device.type for t in tensors} == {"meta"}


@FUSED
def test_a_layer_may_be_on_another_device(fused):
    """theta goes to the layer's device; and the gradient would come back to theta's,
    which from meta, where nothing has values, is an error."""
    model = two_layers()
    adapter = attach(model, 5, target_modules="0", fused=fused)
    model[0].to("meta")
    y = model[0](normal(2, 16).to("meta"))
    assert y.is_meta and not adapter.theta.is_meta
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        y.sum().backward()


def test_the_default_device_is_not_asked():
    """theta and the ids are where the weights are, whatever the default device."""
    case, model = MODELS["sequential"], MODELS["sequential"].model()
    expected, _ = case.adapted()
    with torch.device("meta"):
        adapter = case.attach(model)
    adapter.theta.data.copy_(normal(D, seed=7))
    assert torch.equal(case(model), case(expected))


@FUSED
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant, fused):
    """Recomputed activations give the same output and the same theta.grad."""
    case, results = variant("bert", fused=fused), []
    for checkpointing in (False, True):
        model, adapter = case.adapted()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append((backward(case(model, grad=True)), adapter.theta.grad))
    assert_close(*results)


COMPILED = [
    ("sequential", True, "aot_eager"),
    ("sequential", False, "aot_eager"),
    pytest.param("roberta", True, "aot_eager", marks=slow),
    pytest.param("conv-embedding", False, "aot_eager", marks=slow),
    pytest.param("sequential", True, "inductor", marks=slow),
]


@pytest.mark.parametrize(("name", "fused", "backend"), COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's and inductor's own
def test_a_compiled_model_equals_the_eager_one(name, fused, backend):
    """torch.compile(fullgraph=True): values, gradients, a new theta, a merge."""
    torch.compiler.reset()
    case = variant(name, fused=fused)
    model, adapter = case.adapted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in (1, 2):
        adapter.theta.data.copy_(normal(D, seed=seed))
        results = []
        for m in (model, compiled):
            adapter.theta.grad = None
            results.append((backward(case(m, grad=True)), adapter.theta.grad))
        assert_close(*results, rtol=1e-4, atol=1e-5)
    y = case(model)
    merge(model)
    assert_close(case(compiled), y, rtol=1e-4, atol=1e-5)


@FUSED
def test_fx_is_refused(fused):
    """A traced copy would hold W + P theta and add P theta again: an error. Inside
    disabled the pretrained model can be traced."""
    case = variant("sequential", fused=fused)
    model, _ = case.adapted()
    error, match = TypeError, r"^fx would freeze theta: trace inside disabled\(model\)$"
    if fused:
        error, match = torch.fx.proxy.TraceError, "symbolic"
    with pytest.raises(error, match=match):
        torch.fx.symbolic_trace(model)
    with disabled(model):
        traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*X), case(case.pristine))


# --- 5. Targets ---
class Tree(nn.Module):
    """Names to be confused: whole names, dotted suffixes, longer names, a head."""

    def __init__(self):
        super().__init__()
        self.q, self.act = nn.Linear(2, 3), nn.ReLU()
        seq, conv = nn.Linear(3, 2, bias=False), nn.Conv1d(3, 2, 1)
        self.block = nn.ModuleDict({"q": nn.Linear(3, 3), "seq": seq, "conv": conv})
        self.block["q"].add_module("inner", nn.Linear(3, 3))
        self.head = nn.ModuleDict({"q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        self.header = nn.Linear(2, 2)


LINEAR = "q.weight block.q.weight block.q.inner.weight block.seq.weight"
MATCHES = [  # target_modules, modules_to_save, the manifest
    ("q", (), "q.weight block.q.weight head.q.weight"),
    (["q"], (), "q.weight block.q.weight head.q.weight"),
    ("block.q", (), "block.q.weight"),
    ("block.q.weight", (), "block.q.weight"),
    ("block.q.bias", (), "block.q.bias"),
    (["head.q", "block.q"], (), "block.q.weight head.q.weight"),  # the model's order
    (("seq", "conv", "seq.weight"), (), "block.seq.weight block.conv.weight"),
    ("q.bias", (), "q.bias block.q.bias head.q.bias"),
    ("bias", "block", "q.bias head.q.bias head.norm.bias header.bias"),
    (ALL, (), f"{LINEAR} head.q.weight header.weight"),
    ([ALL, "conv"], ["head", "header"], f"{LINEAR} block.conv.weight"),
    (ALL, "head", f"{LINEAR} header.weight"),  # "head" is not the header
    ("q", ["head.q"], "q.weight block.q.weight"),
    (("q", "norm"), ["head.q"], "q.weight block.q.weight head.norm.weight"),
]


@pytest.mark.parametrize(("targets", "saved", "expected"), MATCHES, ids=str)
def test_a_name_means_parameters(targets, saved, expected):
    """Those whose name, with or without .weight, it is or ends after a dot, less those
    inside modules_to_save; in the model's order, not the list's."""
    model = Tree()
    options = {"target_modules": targets, "modules_to_save": saved}
    adapter = attach(model, 1, **options)
    own = parameters(model)
    manifest = [(name, tuple(own[name].shape)) for name in expected.split()]
    assert adapter.manifest == manifest
    inside = tuple(
        f"{name}." for name in ([saved] if isinstance(saved, str) else saved)
    )
    assert trainable(model) == [
        name for name in own if name.startswith(inside) or name == "gpart.theta"
    ]


def test_the_default_targets_are_query_and_value():
    """attach(model, d) adapts the weights of query and value, as the paper does."""
    names = [name for name, _ in attach(MODELS["roberta"].model(), 1).manifest]
    assert len(names) == 4
    assert all(name.endswith(("query.weight", "value.weight")) for name in names)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["model", "inside"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5-tied"])
def test_all_linear_leaves_the_output_embeddings(name, wrap):
    """ "all-linear" is every Linear and Conv1D except lm_head, in a wrapper too."""
    model, linear = wrap(MODELS[name].model()), (nn.Linear, hf.pytorch_utils.Conv1D)
    paths = [path for path, m in model.named_modules() if isinstance(m, linear)]
    adapter = attach(model, 1, target_modules=ALL)
    assert [name for name, _ in adapter.manifest] == [
        f"{path}.weight" for path in paths if not path.endswith("lm_head")
    ]


def test_only_nn_linear_itself_is_fused():
    """A subclass of Linear keeps its forward; fused is the default."""
    model = nn.Sequential(nn.Linear(16, 16), Doubled(16, 16))
    attach(model, 5, target_modules=ALL)
    assert isinstance(model[0], gpart.AdaptedLinear)
    assert isinstance(model[1], Doubled)
    assert type(model[1]).forward is Doubled.forward


def test_tied_parameters_count_once_and_move_everywhere():
    """T5's one matrix is in N once, and encoder, decoder and lm_head all see W + dW;
    merged, it is still one parameter."""
    pristine = MODELS["t5-tied"].pristine
    model, adapter = MODELS["t5-tied"].adapted()
    assert adapter.manifest[0] == ("shared.weight", (64, 16))
    names = dict(adapter.manifest)
    own = dict(pristine.named_parameters())
    assert sum(own[name].numel() for name in names) == adapter.partition.N
    moved = pristine.shared.weight + adapter.delta()["shared.weight"]
    for owner in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens):
        assert torch.equal(owner(TOKENS), moved[TOKENS])
    h = normal(3, 16)
    assert torch.equal(model.lm_head(h), nn.functional.linear(h, moved))
    merge(model)
    assert model.lm_head.weight is model.shared.weight


# --- 6. The life of an adapter ---
def test_states_do_not_stack(file):
    """No second attach, double merge, unmerge without merge, merge inside disabled,
    disabled or load while merged; the attempts leave no trace."""
    model = trained()
    with refused(model, "^adapted already: detach first$"):
        NET.attach(model)
    with refused(model, "^not merged: there is nothing to undo$"):
        unmerge(model)
    for call in (merge, lambda model: detach(model, merge=True)):
        with disabled(model), refused(model, r"^inside disabled\(model\): leave it"):
            call(model)
    merge(model)
    with refused(model, r"^merged already: unmerge\(model\) first$"):
        merge(model)
    with refused(model, r"^merged: unmerge\(model\), then load$"):
        load(model, file)
    with refused(model, r"^merged: unmerge\(model\) first$"), disabled(model):
        pass
    unmerge(model)
    assert snapshot(model) == snapshot(trained())


def test_a_trained_head_stays_when_the_adapter_goes():
    """detach keeps what modules_to_save learnt."""
    case = MODELS["bert"]
    model, _ = case.adapted()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    backward(case(model, grad=True))
    optimizer.step()
    head = model.classifier.weight.detach().clone()
    detach(model)
    assert torch.equal(model.classifier.weight, head)
    assert not torch.equal(head, case.pristine.classifier.weight)


def put_state(model, theta, **options):
    state = {**model.state_dict(), "gpart.theta": theta}
    model.load_state_dict(state, **options)


PUT = {
    "data": lambda model, theta: setattr(model.gpart.theta, "data", theta.data),
    "parameter": lambda model, theta: setattr(model.gpart, "theta", theta),
    "state dict": put_state,
    "assigned": functools.partial(put_state, assign=True),
}


@FUSED
@pytest.mark.parametrize("put", PUT.values(), ids=PUT)
def test_another_theta_is_seen_at_the_next_forward(put, fused):
    """theta is looked up at call time, in whatever way another one took its place."""
    case = variant("sequential", fused=fused)
    model, _ = case.adapted(draw=1)
    other, adapter = case.adapted(draw=2)
    put(model, adapter.theta)
    assert torch.equal(case(model), case(other))


OTHERS = [{"d": 5}, {"seed": 1}, {"isometric": False}, {"target_modules": ALL}]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_a_state_dict_names_its_partition(change):
    """Into a model that is attached otherwise it is an error, and theta is kept."""
    case = MODELS["sequential"]
    (model, _), (other, adapter) = case.adapted(), case.adapted(draw=8, **change)
    theta = adapter.theta.detach().clone()
    both = "^the state dict has {'N': .*, the model {'N': .*: attach the model like it$"
    with pytest.raises(ValueError, match=both):
        other.load_state_dict(model.state_dict())
    assert torch.equal(adapter.theta, theta)


def test_a_pretrained_state_dict_goes_in_beside_theta():
    """load_state_dict(strict=False) of a checkpoint without adapter keeps theta."""
    case = MODELS["sequential"]
    model, adapter = case.adapted()
    other = two_layers()
    case.attach(other).theta.data.copy_(adapter.theta)
    other.load_state_dict(case.pristine.state_dict(), strict=False)
    assert torch.equal(case(other), case(model))


def test_the_adapter_says_what_it_is():
    """print(model.gpart) shows N, d, the seed, and whether it is merged."""
    model = NET.model()
    adapter = NET.attach(model)
    shown = "GPart(Partition(N=533, d=37, seed=0, isometric=True), merged="
    assert repr(adapter) == f"{shown}False)"
    merge(model)
    assert repr(adapter) == f"{shown}True)"


@pytest.fixture
def file(tmp_path):
    """The adapter of trained()."""
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


# --- 7. Errors: what was got, what is allowed, what to do ---
TYPES = [{"d": 1e2}, {"d": True}, {"d": "5"}, {"seed": None}, {"isometric": 1}]


@pytest.mark.parametrize("kwargs", TYPES, ids=str)
def test_wrong_types_are_type_errors(kwargs):
    """d and seed are ints: no float, no string, no bool; isometric is a bool."""
    model, [(name, value)] = Net(), kwargs.items()
    with refused(model, f"^N, d and seed are ints,.*{name}={value!r}", TypeError):
        attach(model, **{"d": 5, "target_modules": ALL, **kwargs})


TARGETS, SAVE = "target_modules", "modules_to_save"
WRONG = {  # of a Net
    "d zero": ({"d": 0}, r"^d must be in 1..N = 1..519, got 0$"),
    "d over N": ({"d": 520}, r"^d must be in 1..N = 1..519, got 520$"),
    "seed negative": ({"seed": -1}, r"^seed must be in 0..2\^64-1, got -1$"),
    "seed large": ({"seed": 2**64}, r"^seed must be in 0..2\^64-1, got 18446"),
    "typed nothing": (
        {TARGETS: ("query", "value")},
        r'^target_modules \(by default query and value; "all-linear" would do\)',
    ),
    "one unknown": ({TARGETS: [ALL, "nope"]}, "no 'nope' but stats, body, 0, weight,"),
    "part of a name": ({TARGETS: "bod"}, "the model has no 'bod' but"),
    "a container": ({TARGETS: "body"}, "the model has no 'body' but"),
    "no weight": ({TARGETS: "body.1"}, "the model has no 'body.1' but"),
    "a buffer": ({TARGETS: "stats"}, "^stats is a Tensor of"),
    "no targets": ({TARGETS: []}, "^target_modules is empty: nothing to adapt$"),
    "all saved": ({TARGETS: "0", SAVE: ["body", "head"]}, "has no '0' but"),
    "unknown head": ({SAVE: "pooler"}, "^modules_to_save: .* no 'pooler' but .* head,"),
    "part of a head": ({SAVE: "hea"}, "^modules_to_save: the model has no 'hea' but"),
}


@pytest.mark.parametrize(("kwargs", "match"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(kwargs, match):
    """A ValueError says what is wrong, before anything is changed."""
    model = Net()
    with refused(model, match):
        attach(model, **{"d": 5, "target_modules": ALL, **kwargs})


def test_a_long_list_of_names_is_cut():
    """The message names containers, a classifier among them, and ends with …"""
    model = nn.ModuleDict({f"layer{k}": nn.Linear(1, 1) for k in range(99)})
    model = nn.ModuleDict({"classifier": nn.Linear(1, 1), "layers": model})
    with refused(model, "but classifier, weight, bias, layers, layer0, .*…$") as raised:
        attach(model, 1)
    assert len(str(raised.value)) < 500


class Quantised(nn.Parameter):
    """As bitsandbytes' and torchao's weights: a Parameter of another class."""


def holding(w, cls=nn.Parameter):
    return nn.ParameterDict({"w": cls(w, requires_grad=False)})


ONES = torch.ones(2, 3)
QUANTISED = {
    "int8": (holding(ONES.char()), "^w is a Parameter of torch.int8 on cpu: attach"),
    "float8": (holding(ONES.to(torch.float8_e4m3fn)), "of torch.float8_e4m3fn on cpu"),
    "complex": (holding(ONES.cfloat()), "of torch.complex64 on cpu"),
    "a subclass": (holding(ONES, Quantised), "^w is a Quantised of torch.float32"),
}


@pytest.mark.parametrize(("model", "match"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_refused(model, match):
    """Only what is exactly an nn.Parameter of 16 to 64 bit floats is adapted."""
    with refused(model, match):
        attach(model, 2, target_modules="w")


def test_weights_without_values_are_refused():
    """On the meta device there is nothing to adapt."""
    with pytest.raises(ValueError, match=r"^0\.weight is a .* on meta: "):
        attach(two_layers().to("meta"), 2, target_modules=ALL)


UNREAD = {
    "weight_hh_l0": nn.LSTM(2, 2),
    "bias_ih_l0": nn.GRU(2, 2),
    "weight_ih_l0": nn.Sequential(nn.RNN(2, 2)),
    "weight": nn.Embedding(3, 2, sparse=True),
    "0": nn.Sequential(nn.EmbeddingBag(3, 2, sparse=True)),
}


@pytest.mark.parametrize(("name", "model"), UNREAD.items(), ids=UNREAD)
def test_modules_that_would_not_see_the_update_are_refused(name, model):
    """An RNN reads a list of its own, a sparse embedding has no dense gradient."""
    with refused(model, rf"{name}.* changes$"):
        attach(model, 2, target_modules=name)


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_adapter_is_refused(inside):
    """Also around an attached submodule, and where something is called gpart."""
    model = Net()
    if inside:
        attach(model.body, 3, target_modules=ALL)
    else:
        model.gpart = nn.ReLU()
    with refused(model, "^adapted already: detach first$"):
        NET.attach(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_a_wrapper_is_refused():
    """torch.compile, DistributedDataParallel, DataParallel: the model inside is
    meant, and the error says by which attribute it is had."""
    model = two_layers()
    with one_process():
        wrappers = [
            torch.compile(model),
            nn.parallel.DistributedDataParallel(model),
            nn.DataParallel(model),
        ]
    for wrapper in wrappers:
        match = rf"^pass .* ._orig_mod or .module, not {type(wrapper).__name__}$"
        with refused(model, match, TypeError):
            attach(wrapper, 2, target_modules=ALL)
        attach(model, 2, target_modules=ALL)
        for call in (merge, detach, lambda model: save(model, "never")):
            with refused(model, match, TypeError):
                call(wrapper)
        detach(model)


def test_data_parallel_is_refused():
    """nn.DataParallel's replicas would read the frozen weights: an error."""
    model, _ = MODELS["sequential"].adapted()
    message = "^DataParallel loses the adapter: use DistributedDataParallel$"
    with pytest.raises(ValueError, match=message):
        for module in model.modules():
            module._replicate_for_data_parallel()


ACTIONS = {
    "merge": lambda model, path: merge(model),
    "unmerge": lambda model, path: unmerge(model),
    "detach": lambda model, path: detach(model),
    "detach(merge=True)": lambda model, path: detach(model, merge=True),
    "disabled": lambda model, path: disabled(model).__enter__(),
    "save": save,
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("inside", [False, True])
def test_each_call_needs_an_adapter_of_its_own(inside, action, tmp_path):
    """Without one it says so and does nothing, also around an attached submodule."""
    model = Net()
    if inside:
        attach(model.body, 3, target_modules=ALL)
    with refused(model, "^no adapter here: attach one, and pass the model$"):
        action(model, tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_careless_calls_are_told(file, tmp_path):
    """Swapped arguments, the adapter instead of the model, a folder that is not there,
    a pickle: each error names what was got."""
    model = trained()
    with pytest.raises(TypeError, match=r"^pass a model, .* not \w*Path$"):
        save(file, model)
    with pytest.raises(TypeError, match=r"^pass a model, .* not int$"):
        attach(5, model)
    with refused(model, "no adapter here: attach one, and pass the model"):
        save(model.gpart, file)
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"'{re.escape(str(missing))}'"):
        save(model, missing / "adapter.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = NET.model()
    with refused(fresh, "state.pt is no adapter of this model"):
        load(fresh, tmp_path / "state.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["merge", "detach(merge=True)"])
def test_a_theta_that_is_not_finite_is_not_merged(action, value, file):
    """A diverged theta reaches the weights no more than the disk (test_storage.py)."""
    model = trained()
    model.gpart.theta.data[3] = value
    with refused(model, "^theta is not finite: nothing is merged$"):
        ACTIONS[action](model, file)
