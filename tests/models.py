# SPDX-License-Identifier: Apache-2.0
"""Small random models of real architectures, an ordinary model that holds W + P theta
to compare them with, and what several test files ask of a model."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrize

import gpart
from gpart import attach

D = 37  # the d of most tests
ALL = "all-linear"
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
slow = pytest.mark.slow


def normal(*shape, seed=0, dtype=torch.float32):
    """Drawn from a generator of its own: the same numbers in any order of tests."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


# --- Models that are not in transformers ---
class Plain(nn.Module):
    """An Embedding, a Conv1d and a Conv2d, none of which has a fused path; a Linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.conv1 = nn.Conv1d(16, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        h = self.conv1(self.embed(x).mT)
        return self.head(self.conv2(h.unsqueeze(1)))


class ReadByParent(nn.Module):
    """A parent that never calls its Linear, but reads the Linear's weight."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.lin.weight, self.lin.bias)


class Experts(nn.Module):
    """Parameters that are called neither weight nor bias, one of them at the root."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(16))
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 8))

    def forward(self, x):
        return torch.einsum("bti,eio->beto", x + self.cls_token, self.gate_up()).sum(1)

    def gate_up(self):
        return self.experts.gate_up_proj


class Doubled(nn.Linear):
    """A subclass of Linear whose forward is not Linear's."""

    def forward(self, input):
        return 2 * super().forward(input)


class Twice(nn.Module):
    """One layer that is called twice in a graph."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x):
        return self.lin(self.lin(x).tanh())


class Net(nn.Module):
    """A name, a head with buffers to be trained, and a buffer of its own."""

    name_or_path = "someone/some-model"

    def __init__(self):
        super().__init__()
        self.body = two_layers()
        self.head = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        self.register_buffer("stats", torch.zeros(5))

    def forward(self, x):
        return self.head(self.body(x))


def two_layers():
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))


def encoder():
    """torch's own, whose fast path hands the weights of a layer to one C++ call."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def wav2vec2(**config):
    """Without its weight norm, which refuses pickle with an adapter or without."""
    model = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**config))
    conv = model.encoder.pos_conv_embed.conv
    parametrize.remove_parametrizations(conv, "weight")
    conv._load_state_dict_pre_hooks.clear()
    return model


def transformer(name, task, **config):
    """A function that builds one of transformers' models, with random weights."""
    cls, config_class = getattr(hf, name + task), getattr(hf, f"{name}Config")
    return lambda: cls(config_class(**config))


# --- A model, its input and its targets ---
@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is fed, and how attach is called on it."""

    build: object
    inputs: tuple | dict
    targets: str | tuple[str, ...]
    save: tuple[str, ...] = ()
    train: bool = False
    fused: bool = True

    @functools.cached_property
    def pristine(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().train(self.train)
        for k, w in enumerate(model.parameters()):
            w.data.add_(0.1 * normal(*w.shape, seed=k))  # no bias stays at zero
            w.requires_grad_(k % 3 > 0)  # what detach has to restore
        return model

    def model(self):
        return copy.deepcopy(self.pristine)

    def attach(self, model, d=D, **kwargs):
        options = {"target_modules": self.targets, "modules_to_save": self.save}
        return attach(model, d, **{**options, "fused": self.fused, **kwargs})

    def adapted(self, draw=7, **kwargs):
        """A fresh model, attached, with a random theta; and its adapter."""
        model = self.model()
        adapter = self.attach(model, **kwargs)
        adapter.theta.data.copy_(normal(len(adapter.theta), seed=draw))
        return model, adapter

    def __call__(self, model, grad=False):
        """The model's output for the case's input."""
        named = isinstance(self.inputs, dict)
        with torch.set_grad_enabled(grad):
            y = model(**self.inputs) if named else model(*self.inputs)
        return y if isinstance(y, torch.Tensor) else y[0]


WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZE = {
    **WIDTHS,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
DEBERTA = {**SIZE, **NO_DROPOUT, "relative_attention": True}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"]}
LONGFORMER = {**SIZE, **NO_DROPOUT, "attention_window": 4}
SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]}
SWIN |= {"num_heads": [1, 2], "window_size": 2, "drop_path_rate": 0.0}
WAV2VEC2 = {
    **WIDTHS,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
for part in ("hidden", "activation", "attention", "feat_proj"):
    WAV2VEC2[f"{part}_dropout"] = 0.0

TOKENS = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(1))
IDS, X = {"input_ids": TOKENS}, (normal(2, 7, 16),)
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
PAIR = {**IDS, "decoder_input_ids": TOKENS.flip(1), "use_cache": False}
IMAGE = {"pixel_values": normal(2, 3, 8, 8)}
SOUND = {"input_values": normal(2, 64), "attention_mask": torch.ones(2, 64).long()}
SOUND["attention_mask"][1, 40:] = 0
CLASSIFIER = "ForSequenceClassification"
QUERY_VALUE, HEAD = ("query", "value"), ("classifier",)
QKV = ("q_proj", "k_proj", "v_proj")
QKV_BIASES = tuple(f"{name}.bias" for name in QKV)
EVERYTHING = (ALL, "in_proj_weight", "in_proj_bias", "bias")

MODELS = {
    "roberta": Case(transformer("Roberta", "Model", **SIZE), IDS, QUERY_VALUE),
    "bert": Case(
        transformer("Bert", CLASSIFIER, **SIZE, **NO_DROPOUT),
        {**IDS, "attention_mask": MASK},
        QUERY_VALUE,
        save=HEAD,
        train=True,
    ),
    "mpnet": Case(
        transformer("MPNet", "Model", **SIZE), IDS, ("q", "q.bias", "v", "v.bias")
    ),
    "deberta": Case(transformer("Deberta", "Model", **DEBERTA), IDS, ALL, train=True),
    "longformer": Case(
        transformer("Longformer", "Model", **LONGFORMER),
        {"input_ids": TOKENS[:1]},
        QUERY_VALUE,
        train=True,
    ),
    "gpt2": Case(
        transformer("GPT2", "LMHeadModel", **GPT2), IDS, ("c_attn", "c_proj", "bias")
    ),
    "llama": Case(transformer("Llama", "ForCausalLM", **LLAMA), IDS, ALL),
    "qwen2": Case(transformer("Qwen2", "ForCausalLM", **LLAMA), IDS, QKV + QKV_BIASES),
    "t5-tied": Case(
        transformer("T5", "ForConditionalGeneration", **T5), PAIR, ("shared", "q", "v")
    ),
    "vit": Case(
        transformer("ViT", "ForImageClassification", **VIT), IMAGE, ALL, save=HEAD
    ),
    "swin2": Case(transformer("Swinv2", "Model", **SWIN), IMAGE, ALL, train=True),
    "wav2vec2": Case(lambda: wav2vec2(**WAV2VEC2), SOUND, ALL, train=True),
    "torch-encoder": Case(encoder, X, EVERYTHING),
    "torch-encoder-train": Case(encoder, X, EVERYTHING, train=True),
    "conv-embedding": Case(
        Plain, (TOKENS,), ("embed", "conv1", "conv2", "head", "bias")
    ),
    "read-by-parent": Case(ReadByParent, X, ("lin", "lin.bias")),
    "experts": Case(Experts, X, ("cls_token", "experts.gate_up_proj")),
    "linear-subclass": Case(lambda: Doubled(16, 8), X, ALL),
    "layer-used-twice": Case(Twice, X, ALL),
    "sequential": Case(two_layers, X, (ALL, "bias")),
    "one-linear": Case(lambda: nn.Linear(16, 24), X, ALL),
}
NET = Case(Net, (normal(4, 16),), (ALL, "0.bias", "2.bias"), save=("head",))
PATHS = [*itertools.product(MODELS, ("fused", "plain"))]


def variant(name, **changes):
    """The case of that name with other fields; its pretrained model is built once."""
    case = dataclasses.replace(MODELS[name], **changes)
    if "build" not in changes:
        vars(case)["pristine"] = MODELS[name].pristine
    return case


# --- What a model holds, and what it should ---
def sha256(t):
    return hashlib.sha256(t.detach().flatten().view(torch.uint8).numpy()).hexdigest()


def snapshot(model):
    """All that "unchanged" means: every class, attribute name, flag, dtype and bit."""
    state = model.state_dict(keep_vars=True).items()
    modules = [(name, type(m), *sorted(vars(m))) for name, m in model.named_modules()]
    return modules + [(name, t.requires_grad, t.dtype, sha256(t)) for name, t in state]


def parameters(model):
    """{name: parameter}, a tied one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def trainable(model):
    return [name for name, w in model.named_parameters() if w.requires_grad]


def oracle(pristine, adapter):
    """An ordinary model that holds W + P theta, P by Eq. 7 from the ids alone: products
    and sums in float32 or wider, then one cast."""
    model = copy.deepcopy(pristine)
    own, start = parameters(model), 0
    ids = adapter.partition.groups()
    sizes = ids.bincount(minlength=adapter.partition.d).double()
    scale = 1 / sizes.sqrt() if adapter.partition.isometric else torch.ones_like(sizes)
    for name, shape in adapter.manifest:
        w, n = own[name], math.prod(shape)
        wide = torch.promote_types(w.dtype, torch.float32)
        delta = adapter.theta.detach().to(wide) * scale.to(wide)
        delta = delta[ids[start : start + n]].view(shape)
        w.data = (w.data.to(wide) + delta).to(w.dtype)
        start += n
    return model


def dense_gradient(model, adapter):
    """P^T of the gradients in an oracle's weights."""
    own = parameters(model)
    grads = [own[name].grad.flatten() for name, _ in adapter.manifest]
    return adapter.partition.reduce(torch.cat(grads))


def backward(y):
    """Send a fixed random gradient into y. Returns y without its graph."""
    (y * normal(*y.shape, seed=9).to(y)).sum().backward()
    return y.detach()


@contextlib.contextmanager
def refused(model, match, error=ValueError):
    """The block raises, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert snapshot(model) == before


@contextlib.contextmanager
def one_process():
    """torch.distributed with this process alone. Yields a device mesh."""
    dist = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def python(code, *args):
    """What code prints in another process, with another hash seed."""
    root = pathlib.Path(gpart.__file__).parent
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *map(str, args)]
    run = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return run.stdout
