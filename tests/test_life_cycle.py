# SPDX-License-Identifier: Apache-2.0
"""After any calls in any order a model is what an ordinary one beside it says.

Hypothesis draws programs of the calls below and shrinks one that fails. The model
beside it never has an adapter: it is told what each call means.
"""

import copy
import dataclasses
import itertools
import operator
import pickle

import pytest
import torch
from hypothesis import settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from torch import nn
from torch.testing import assert_close

import gpart
from gpart import Partition, attach, detach, disabled, load, merge, save, unmerge
from test_properties import SEEDS
from tests.models import (
    ALL,
    MODELS,
    normal,
    parameters,
    refused,
    sha256,
    slow,
    snapshot,
    trainable,
    two_layers,
)

LR, DECAY = 0.125, 0.3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASTS = (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double)
DRAWS = st.integers(0, 2**32 - 1)
INPUTS = st.lists(st.integers(0, 4), min_size=8, max_size=8).map(
    lambda tokens: torch.tensor(tokens).view(4, 2)
)
TARGETS = (
    ("body",),
    ("embed",),
    ("conv", "conv.bias", "out"),
    ("embed", "conv", "body", "body.bias", "out.bias"),
)
OPTIONS = st.fixed_dictionaries(
    {
        "target_modules": st.sampled_from(TARGETS),
        "seed": SEEDS,
        "isometric": st.booleans(),
        "fused": st.booleans(),
    }
)


def sgd(weights):
    return torch.optim.SGD(weights, lr=LR, weight_decay=DECAY)


def adamw(weights):
    return torch.optim.AdamW(weights, lr=LR, weight_decay=DECAY, eps=1e-3)


class Network(nn.Module):
    """An Embedding, a Conv1d, a Linear, a Linear tied to the Embedding, a head with
    buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, 3), nn.Conv1d(2, 2, 1)
        self.body, self.out = nn.Linear(3, 3), nn.Linear(3, 5)
        self.out.weight = self.embed.weight
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, tokens):
        h = self.body(self.conv(self.embed(tokens))).tanh()  # [4, 2] -> [4, 2, 3]
        return self.head(self.out(h).sum(1)).tanh()  # [4, 2, 5] -> [4, 5] -> [4, 2]


def bits(tensors):
    """{name: what it is, to the last bit}"""
    return {name: (t.dtype, t.shape, sha256(t)) for name, t in tensors.items()}


@dataclasses.dataclass
class Beside:
    """What the model must hold, read and compute."""

    plain: nn.Module  # pretrained weights and the head as it is, cast like the model
    theta: torch.Tensor | None = None  # float32 [d], while attached
    recipe: tuple = ()  # names, partition: files of the same recipe fit
    ids: dict = dataclasses.field(default_factory=dict)  # {name: g, shaped as it}
    kept: dict = dataclasses.field(default_factory=dict)  # pretrained, while merged
    merged: dict = dataclasses.field(default_factory=dict)  # W + P theta, while merged
    blocks: int = 0  # disabled blocks that the adapter is in

    def names(self, targets):
        """The model's names of what the targets mean, a tied parameter's once."""
        found = {}
        for name, w in parameters(self.plain).items():
            if name in targets or name.removesuffix(".weight") in targets:
                found.setdefault(w, name)
        return [*found.values()]

    def attach(self, names, partition):
        own, start, groups = parameters(self.plain), 0, partition.groups()
        for name in names:
            stop = start + own[name].numel()
            ids = groups[start:stop].view(own[name].shape)
            tied = [key for key, w in own.items() if w is own[name]]
            self.ids |= dict.fromkeys(tied, ids)
            start = stop
        self.theta, self.recipe = torch.zeros(partition.d), (names, partition)

    def detach(self):
        vars(self).update(vars(Beside(self.plain)))

    def moved(self, theta):
        """{name: W + P theta}: in promote(W's dtype, float32), then one cast."""
        own, new = parameters(self.plain), {}
        scale = 1 / self.recipe[1].sizes().double().sqrt()
        if not self.recipe[1].isometric:
            scale = torch.ones_like(scale)
        for name, ids in self.ids.items():
            wide = torch.promote_types(own[name].dtype, torch.float32)
            delta = (theta.to(wide) * scale.to(wide))[ids]
            new[name] = (own[name].detach().to(wide) + delta).to(own[name].dtype)
        return new

    def merge(self):
        own = parameters(self.plain)
        self.merged = self.moved(self.theta)
        self.kept = {name: own[name].detach().clone() for name in self.merged}

    def unmerge(self):
        """The copies come back in the weights' dtype, cast once."""
        for name, w in self.kept.items():
            self.plain.get_parameter(name).data.copy_(w)
        self.merged, self.kept = {}, {}

    @property
    def active(self):
        return self.theta is not None and not self.merged and not self.blocks

    def run(self, tokens, theta=None):
        """The output of the plain network with the weights that the model must read."""
        theta = self.theta if theta is None else theta
        weights = self.moved(theta) if self.active else self.merged
        call = torch.func.functional_call
        return call(self.plain, weights, tokens, tie_weights=False)

    def check(self, model):
        """The model holds and reads these bits, and trains what it must; detached, it
        is as it was."""
        held = {**self.plain.state_dict(), **self.merged}
        expected = {**held, **self.moved(self.theta)} if self.active else held
        read = {name: operator.attrgetter(name)(model) for name in held}
        assert bits(read) == bits(expected)
        state, trained = model.state_dict(), set(trainable(model))
        assert trained <= {*state}
        if self.theta is None:
            assert trained == set(trainable(self.plain))
            pairs = zip(model.modules(), self.plain.modules(), strict=True)
            for module, plain in pairs:
                assert (type(module), {*vars(module)}) == (type(plain), {*vars(plain)})
        else:
            held["gpart.theta"] = self.theta
            heads = {n for n in parameters(self.plain) if n.startswith("head.")}
            assert trained == {"gpart.theta", *heads}
            assert f"merged={bool(self.merged)}" in repr(model.gpart)
            del state["gpart._extra_state"]
        assert bits(state) == bits(held)


class LifeCycle(stateful.RuleBasedStateMachine):
    """A model, the one beside it, and every call that may happen to it."""

    files = stateful.Bundle("files")
    folder = None  # set by the test

    def __init__(self):
        super().__init__()
        self.count = itertools.count()
        self.left = []  # by deepcopy: (model, beside)
        self.blocks = []  # disabled ones: (block, its adapter)

    @initialize(
        target=files,
        draw=DRAWS,
        dtype=st.sampled_from(DTYPES),
        frozen=st.sets(st.integers(0, 9)),
        d=st.integers(1, 50),
        options=OPTIONS,
    )
    def start(self, draw, dtype, frozen, d, options):
        """A pretrained network; theta random and saved."""
        plain = Network().to(dtype)
        for k, w in enumerate(plain.parameters()):
            w.data.copy_(normal(*w.shape, seed=draw + k))
            w.requires_grad_(k not in frozen)
        self.model, self.beside = copy.deepcopy(plain), Beside(plain)
        self.random = torch.get_rng_state()
        self.attach(d, options)
        self.set_theta(draw)
        return self.save()

    @property
    def attached(self):
        return self.beside.theta is not None

    @invariant()
    def model_is_what_the_one_beside_it_says(self):
        self.beside.check(self.model)
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), self.random)

    @precondition(lambda self: not self.attached)
    @rule(d=st.integers(1, 50), options=OPTIONS)
    def attach(self, d, options):
        names = self.beside.names(options["target_modules"])
        own = parameters(self.beside.plain)
        N = sum(own[name].numel() for name in names)
        partition = Partition(N, min(d, N), options["seed"], options["isometric"])
        self.beside.attach(names, partition)
        attach(self.model, partition.d, modules_to_save="head", **options)

    @precondition(lambda self: self.attached)
    @rule(draw=DRAWS)
    def set_theta(self, draw):
        self.beside.theta = normal(len(self.beside.theta), seed=draw)
        self.model.gpart.theta.data.copy_(self.beside.theta)

    @precondition(lambda self: self.attached)
    @rule(x=INPUTS, optimizer=st.sampled_from([sgd, adamw]))
    def train_step(self, x, optimizer):
        """The gradient is that of the dense weights; nothing else has one, or moves."""
        theta = self.beside.theta.clone().requires_grad_()
        own = parameters(self.model)
        trained = {name: own[name] for name in trainable(self.model)}
        optimizer = optimizer(trained.values())
        y, expected = self.model(x), self.beside.run(x, theta)
        assert torch.equal(y, expected)
        y.mean().backward()
        found = {name for name, w in own.items() if w.grad is not None}
        if self.beside.active:
            [gradient] = torch.autograd.grad(expected.mean(), theta)
            eps = 100 * max(torch.finfo(t.dtype).eps for t in (y, theta))
            assert_close(trained["gpart.theta"].grad, gradient, rtol=eps, atol=eps)
            assert found == {*trained}
        else:
            assert found == {*trained} - {"gpart.theta"}
        optimizer.step()
        optimizer.zero_grad()
        self.beside.theta = trained.pop("gpart.theta").detach().clone()
        for name, w in trained.items():
            self.beside.plain.get_parameter(name).data.copy_(w.detach())

    @rule(x=INPUTS, training=st.booleans())
    def run(self, x, training):
        """In train() or eval() from now on."""
        self.model.train(training)
        self.beside.plain.train(training)
        assert torch.equal(self.beside.run(x), self.model(x))

    @precondition(lambda self: self.attached and not self.beside.blocks)
    @rule()
    def merge_or_unmerge(self):
        if self.beside.merged:
            unmerge(self.model)
            self.beside.unmerge()
        else:
            merge(self.model)
            self.beside.merge()

    @precondition(lambda self: self.attached and not self.beside.merged)
    @rule()
    def enter_disabled(self):
        block = disabled(self.model)
        block.__enter__()
        self.blocks.append((block, self.model.gpart))
        self.beside.blocks += 1

    @precondition(lambda self: self.blocks)
    @rule(error=st.none() | st.just(KeyError()))
    def leave_disabled(self, error=None):
        """By an exception or not; if that adapter is gone, nothing happens."""
        block, adapter = self.blocks.pop()
        assert not block.__exit__(error and KeyError, error, None)
        if self.attached and self.model.gpart is adapter:
            self.beside.blocks -= 1

    @precondition(lambda self: self.attached)
    @rule(with_merge=st.booleans())
    def detach(self, with_merge):
        """The pretrained weights; or W + P theta, pretrained from then on."""
        with_merge = with_merge and not self.beside.blocks
        detach(self.model, merge=with_merge)
        if with_merge:
            weights = self.beside.merged or self.beside.moved(self.beside.theta)
            self.beside.plain.load_state_dict(weights, strict=False)
        else:
            self.beside.unmerge()
        self.beside.detach()

    @precondition(lambda self: self.attached)
    @rule(target=files)
    def save(self):
        path = self.folder / f"{next(self.count)}.safetensors"
        save(self.model, path)
        state = copy.deepcopy(self.beside.plain.state_dict())
        heads = {name: t for name, t in state.items() if name.startswith("head.")}
        return path, self.beside.recipe, self.beside.theta.clone(), heads

    @rule(file=files)
    def load(self, file):
        """The file's theta and head; attached already, only unmerged and if the recipe
        is equal."""
        path, recipe, theta, heads = file
        beside = self.beside
        if beside.merged or recipe != (beside.recipe or recipe):
            with pytest.raises(ValueError, match=r"unmerge\(model\)|detach first"):
                load(self.model, path)
            return
        if not self.attached:
            beside.attach(*recipe)
        load(self.model, path)
        beside.theta = theta
        beside.plain.load_state_dict(heads, strict=False)

    @rule(data=st.data())
    def refuse(self, data):
        """What the state does not allow is a ValueError and changes nothing."""
        beside, nowhere = self.beside, self.folder / "nowhere"
        calls = {
            "attach": (self.attached, lambda: attach(self.model, 1)),
            "merge": (not beside.active, lambda: merge(self.model)),
            "unmerge": (not beside.merged, lambda: unmerge(self.model)),
            "disabled": (
                not self.attached or bool(beside.merged),
                lambda: disabled(self.model).__enter__(),
            ),
            "detach": (not self.attached, lambda: detach(self.model)),
            "merging": (beside.blocks > 0, lambda: detach(self.model, merge=True)),
            "save": (not self.attached, lambda: save(self.model, nowhere)),
            "load": (True, lambda: load(self.model, self.folder / "junk")),
        }
        wrong = [name for name, (refuses, _) in calls.items() if refuses]
        with pytest.raises(ValueError, match=r"query|merge|attach|disabled|no adapter"):
            calls[data.draw(st.sampled_from(wrong))][1]()
        assert not nowhere.exists()

    @rule(cast=st.sampled_from(CASTS))
    def cast(self, cast):
        """All but theta."""
        dtype = cast(self.beside.plain).head[1].weight.dtype
        cast(self.model)
        self.beside.merged = {n: w.to(dtype) for n, w in self.beside.merged.items()}

    @precondition(lambda self: self.attached)
    @rule(follow=st.booleans())
    def deepcopy(self, follow):
        """Go on with the copy or the original: the other must not change. A copy taken
        inside disabled stays disabled."""
        pairs = [(self.model, self.beside), copy.deepcopy((self.model, self.beside))]
        self.model, self.beside = pairs.pop(follow and not self.beside.blocks)
        self.left += pairs

    @precondition(lambda self: self.attached and not self.beside.blocks)
    @rule()
    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: self.attached)
    @rule(assign=st.booleans())
    def state_dict_round_trip(self, assign):
        """Into itself, after theta was lost. assign=True unties the tied, with equal
        values."""
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        nn.init.ones_(self.model.gpart.theta)
        self.model.load_state_dict(state, assign=assign)
        if assign:
            plain = self.beside.plain
            state = {name: t.clone() for name, t in plain.state_dict().items()}
            plain.load_state_dict(state, assign=True)

    def teardown(self):
        while self.blocks:
            self.leave_disabled()
        everyone = [(self.model, self.beside), *self.left]
        for model, beside in everyone:
            beside.check(model)
        for model, beside in everyone:
            if beside.theta is not None:
                detach(model)
                beside.unmerge()
                beside.detach()
        for model, beside in everyone:
            beside.check(model)


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=slow)])
@pytest.mark.filterwarnings("ignore:.* is not what the adapter was trained on")
def test_any_calls_in_any_order(steps, tmp_path, monkeypatch):
    """Weights, reads, outputs, gradients and flags, bit for bit, after each call; in
    the end detach gives the pretrained weights, flags and classes."""
    (tmp_path / "junk").write_bytes(b"junk")
    monkeypatch.setattr(LifeCycle, "folder", tmp_path)
    budget = settings(stateful_step_count=steps)
    stateful.run_state_machine_as_test(LifeCycle, settings=budget)


@pytest.mark.parametrize("anew", [False, True])
def test_leaving_disabled_after_detach_changes_nothing(anew):
    """An adapter detached inside the block does not come back, nor does the block
    touch its successor."""
    case = MODELS["bert"]
    model, _ = case.adapted()
    with disabled(model):
        detach(model)
        if anew:
            case.attach(model).theta.data.fill_(1.0)
        inside, y = snapshot(model), case(model)
    assert snapshot(model) == inside
    assert torch.equal(case(model), y)


def test_a_failed_merge_loses_nothing(monkeypatch):
    """Out of memory halfway through merge: unmerge still gives the pretrained bits."""
    model, _ = MODELS["bert"].adapted()
    before, add_update, calls = snapshot(model), gpart.add_update, itertools.count()

    def scarce(*args):
        if next(calls) == 2:
            raise MemoryError
        return add_update(*args)

    monkeypatch.setattr(gpart, "add_update", scarce)
    with pytest.raises(MemoryError):
        merge(model)
    assert snapshot(model) != before
    with refused(model, "^merged already"):
        merge(model)
    unmerge(model)
    assert snapshot(model) == before


def test_unmerge_never_drifts():
    """100 merges of a large theta into a bf16 model and back leave not one bit
    changed."""
    model, adapter = MODELS["bert"].adapted()
    adapter.theta.data.mul_(1e3)
    before = snapshot(model.bfloat16())
    for _ in range(100):
        merge(model)
        unmerge(model)
    assert snapshot(model) == before


def test_detach_leaves_what_came_after_attach():
    """A parameter that was added later keeps its own requires_grad."""
    model = two_layers()
    attach(model, 5, target_modules=ALL)
    model.late = nn.Linear(2, 2)
    model.late.bias.requires_grad_(False)
    detach(model)
    assert trainable(model)[-1] == "late.weight"
