# SPDX-License-Identifier: Apache-2.0
"""Adapter files: what is saved comes back bit for bit, and knows its base; a crash in
between leaves the old file or the new one."""

import collections
import contextlib
import copy
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import warnings

import pytest
import safetensors
import torch
from torch import nn
from torch.distributed import fsdp

import gpart
from gpart import attach, detach, disabled, load, merge, save
from tests.models import (
    ALL,
    FUSED,
    MODELS,
    NET,
    D,
    Net,
    backward,
    normal,
    one_process,
    oracle,
    parameters,
    python,
    refused,
    sha256,
    slow,
    snapshot,
    trainable,
    two_layers,
)
from tests.storage_models import read, rewrite, trained
from tests.test_format import golden_model

BODY = ("body.0", "body.2", "body.0.bias", "body.2.bias")  # NET's, without its head
GOLDEN = pathlib.Path(__file__).parents[1] / "format" / "golden"
ANOTHER_BASE = (
    "is not what the adapter was trained on: another checkpoint, a head not in "
    r"modules_to_save, or BatchNorm statistics that moved\?$"
)


@pytest.fixture
def file(tmp_path):
    """The adapter of trained(), alone in its folder."""
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


# --- Another base ---
def test_the_first_in_the_order_of_the_file_is_named(tmp_path):
    """Where several tensors differ, whatever order this model has them in."""
    path = tmp_path / "adapter.safetensors"
    a, b, c = (torch.nn.Linear(4, 4) for _ in "123")
    model = torch.nn.ModuleDict({"z": a, "a": b, "target": c})
    attach(model, 2, target_modules="target")
    save(model, path)
    others = {name: torch.nn.Linear(4, 4) for name in ("a", "target", "z")}
    with pytest.warns(UserWarning, match="^z.weight is not what"):
        load(torch.nn.ModuleDict(others), path)


# --- Round trips ---
def test_a_loaded_model_is_the_saved_one(file):
    """A fresh model that loads the file: weights, head, buffers and flags."""
    model, fresh = trained(), NET.model()
    adapter = load(fresh, file)
    assert adapter is fresh.gpart
    assert snapshot(fresh) == snapshot(model)
    assert adapter.partition == model.gpart.partition
    assert adapter.manifest == model.gpart.manifest
    assert torch.equal(NET(fresh.eval()), NET(model))


@pytest.mark.parametrize("d", [1, 37, 504])
@pytest.mark.parametrize("isometric", [True, False])
def test_every_d_comes_back(isometric, d, file):
    """d = 1, d = N = 504 and a d that does not divide N."""
    kwargs = {"target_modules": ALL, "isometric": isometric, "seed": 2**64 - 1}
    model = two_layers()
    fresh = copy.deepcopy(model)
    attach(model, d, **kwargs).theta.data.copy_(normal(d))
    save(model, file)
    assert load(fresh, file).partition == gpart.Partition(504, d, 2**64 - 1, isometric)
    for layer in (0, 2):
        assert torch.equal(fresh[layer].weight, model[layer].weight)


@slow
def test_another_process_gets_the_same_bits(file):
    """There, after another seed and on two threads, W + P theta is the one of here."""
    base, there = file.with_name("base.pt"), file.with_name("there.pt")
    save(trained(), file)
    torch.save(NET.pristine, base)
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
    model = trained()
    detach(model, merge=True)
    found = torch.load(there, weights_only=False).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, w in model.state_dict().items():
        assert torch.equal(found[name], w)


def test_load_goes_by_the_manifest_and_not_by_matching(file):
    """A file in another order than the modules' loads in its own, and keeps it."""
    manifest = json.loads(read(file)[0]["manifest"])[::-1]
    rewrite(file, lambda m, t: m.update(manifest=json.dumps(manifest)))
    model = NET.model()
    adapter = load(model, file)
    assert [[name, [*shape]] for name, shape in adapter.manifest] == manifest
    dense = oracle(NET.pristine, adapter)
    for name, _ in manifest:
        layer, attribute = name.rsplit(".", 1)
        w = getattr(model.get_submodule(layer), attribute)
        assert torch.equal(w, dense.state_dict()[name])
    digest = read(file)[0]["sha256"]
    save(model, file)
    assert read(file)[0]["sha256"] == digest


def test_load_does_not_depend_on_the_order_of_modules(file):
    """Where the same modules are registered in another order, each gets its update."""
    one = NET.model()
    other = copy.deepcopy(one)
    layers = [*other.body.named_children()][::-1]
    other.body = nn.Sequential(collections.OrderedDict(layers))
    NET.attach(one).theta.data.copy_(normal(D))
    save(one, file)
    load(other, file)
    assert [*other.body._modules] == [*one.body._modules][::-1]
    for name, update in one.gpart.delta().items():
        assert torch.equal(other.gpart.delta()[name], update)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_theta_is_stored_in_float32_and_a_head_in_its_own_dtype(dtype, file):
    model = trained().to(dtype)
    save(model, file)
    tensors = read(file)[1]
    assert tensors["theta"].dtype == torch.float32
    assert torch.equal(tensors["theta"], trained().gpart.theta)
    assert tensors["head.0.weight"].dtype == dtype
    assert torch.equal(tensors["head.0.weight"], model.head[0].weight)


@pytest.mark.parametrize("here", [torch.float16, torch.bfloat16, torch.float64])
def test_a_stored_head_is_cast_to_the_dtype_of_the_model(here, file):
    """theta is not: it is float32 for every model."""
    model = NET.model().to(here)
    adapter = load(model, file)
    head = trained().head[0].weight
    assert model.head[0].weight.dtype == here
    assert torch.equal(model.head[0].weight, head.to(here))
    assert adapter.theta.dtype == torch.float32
    assert torch.equal(adapter.theta, trained().gpart.theta)


def test_a_head_of_any_memory_format_comes_back(file):
    """A channels_last head is stored as any other, and the model keeps its layout."""
    head = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": head})
    other = copy.deepcopy(model)
    attach(model, 2, target_modules="body", modules_to_save="head")
    nn.init.normal_(head.weight)
    save(model, file)
    load(other, file)
    assert torch.equal(read(file)[1]["head.weight"], head.weight)
    assert torch.equal(other["head"].weight, head.weight)
    assert other["head"].weight.stride() == head.weight.stride() != (12, 4, 2, 1)


# --- Loading into a model that has the adapter ---
def test_load_keeps_the_theta_that_an_optimizer_holds(file):
    """On an attached model values are replaced and Parameters are not: the next step
    moves the model. No group id is computed again."""
    model = trained(seed=1)
    adapter, theta, ids = model.gpart, model.gpart.theta, dict(model.gpart.ids)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(gpart, "permute")
        assert load(model, file) is adapter
    assert snapshot(model) == snapshot(trained())
    assert adapter.theta is theta
    assert all(adapter.ids[name] is ids[name] for name in ids)
    backward(NET(model, grad=True))
    optimizer.step()
    moved = trained().gpart.theta - theta.grad
    assert not torch.equal(moved, trained().gpart.theta)
    assert torch.equal(adapter.theta, moved)


OTHERWISE = [{"seed": 1}, {"d": 36}, {"isometric": False}, {"target_modules": ALL}]


@pytest.mark.parametrize("kwargs", OTHERWISE, ids=str)
def test_load_refuses_a_model_attached_otherwise(kwargs, file):
    """A seed, a d or a manifest unlike the attached one is no silent change."""
    model = NET.model()
    NET.attach(model, **kwargs)
    sides = r"has \(Partition\(.*the model \(Partition\("
    with refused(model, rf"{sides}.*: detach first$"):
        load(model, file)


def test_load_refuses_a_manifest_in_another_order(file):
    """N, d and seed agree, and each weight would be in another group."""
    model = trained(seed=1)
    manifest = json.loads(read(file)[0]["manifest"])[::-1]
    rewrite(file, lambda m, t: m.update(manifest=json.dumps(manifest)))
    with refused(model, r"has \(Partition\(.*: detach first$"):
        load(model, file)


def test_the_way_out_is_named_however_long_the_manifest(file):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(99)))
    attach(model, 5, target_modules=ALL)
    save(model, file)
    detach(model)
    attach(model, 5, target_modules=ALL, seed=12345)
    with refused(model, "seed=0.*seed=12345.*: detach first$"):
        load(model, file)
    detach(model)
    attach(model, 5, target_modules=ALL)
    for k in range(99):
        model[k].bias.requires_grad_()
    with refused(model, r"lacks .*\.bias.*: detach first$"):
        load(model, file)


def test_load_refuses_a_model_that_is_merged(file):
    model = trained()
    merge(model)
    with refused(model, r"^merged: unmerge\(model\), then load$"):
        load(model, file)


def test_load_refuses_to_leave_something_that_trains_as_it_is(file):
    """A head, a norm and a norm's statistics that the file lacks would stay as they
    are, half of another adapter."""
    bare = NET.model()
    NET.attach(bare, target_modules=BODY, modules_to_save=())
    save(bare, file)
    model = NET.model()
    NET.attach(model, target_modules=BODY, modules_to_save="head.0")
    with refused(model, r"lacks .*head\.0\.weight.* that train: detach first$"):
        load(model, file)
    detach(model)
    NET.attach(model, target_modules=BODY, modules_to_save=())
    model.head[1].bias.requires_grad_()
    with refused(model, r"lacks .*head\.1\.bias.* that train: detach first$"):
        load(model, file)


def test_load_unfreezes_what_the_file_brings_to_an_attached_model(file):
    model = NET.model()
    NET.attach(model, target_modules=BODY, modules_to_save=())
    load(model, file)
    assert snapshot(model) == snapshot(trained())
    assert trainable(model) == trainable(trained()) != ["gpart.theta"]
    again = file.with_name("again.safetensors")
    model.head.requires_grad_(False)  # it stays in the file, for it was in it
    save(model, again)
    assert read(again)[0]["sha256"] == read(file)[0]["sha256"]


# --- What trains is saved ---
class Normed(nn.Module):
    """Norms that nobody names in modules_to_save, two of them with buffers."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 5)
        self.body = nn.Module()
        self.body.norm, self.body.frozen = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.out = nn.LayerNorm(5)


def test_what_is_unfrozen_by_hand_is_saved_and_comes_back(file):
    """A parameter, and the buffers of the module that owns it; nothing else."""
    model = Normed()
    fresh = copy.deepcopy(model)
    attach(model, 7, target_modules="query")
    model.body.norm.weight.requires_grad_()
    model.out.bias.requires_grad_()
    norm = model.body.norm
    for t in (norm.weight, model.out.bias, norm.running_mean):
        nn.init.normal_(t)
    save(model, file)
    buffers = {f"body.norm.{name}" for name, _ in model.body.norm.named_buffers()}
    brought = {"theta", "body.norm.weight", "out.bias"} | buffers
    assert len(buffers) == 3
    assert read(file)[1].keys() == brought
    load(fresh, file)
    assert trainable(fresh) == trainable(model)
    for name in brought - {"theta"}:
        assert torch.equal(fresh.state_dict()[name], model.state_dict()[name])
    detach(fresh)
    assert all(w.requires_grad for w in fresh.parameters())


def test_modules_to_save_are_saved_frozen_or_not(file):
    digest = read(file)[0]["sha256"]
    model = trained()
    model.head.requires_grad_(False)
    save(model, file)
    assert read(file)[0]["sha256"] == digest


class Odd(nn.Linear):
    """It has a parameter of whole numbers, and an extra state that is no tensor."""

    def __init__(self):
        super().__init__(4, 2)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        raise AssertionError("an adapter file has none of it")


def test_a_head_may_hold_what_cannot_train(file):
    """Whole numbers are saved as they are; the rest of the head trains."""
    model = nn.Sequential(nn.Linear(4, 4), Odd())
    fresh, heads = copy.deepcopy(model), ["1.weight", "1.bias", "gpart.theta"]
    attach(model, 2, target_modules="0", modules_to_save="1")
    assert trainable(model) == heads
    model[1].steps += 1
    save(model, file)
    for other in (fresh, model):
        load(other, file)
        assert trainable(other) == heads
        assert torch.equal(other[1].steps, torch.arange(1, 4))


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_weight_that_was_unfrozen_is_not_saved(merged, file):
    """Its training would be lost: the file holds theta alone for it."""
    before = file.read_bytes()
    model = trained()
    parameters(model)["body.0.weight"].requires_grad_()
    if merged:
        merge(model)
    with refused(model, r"^body\.0\.weight is adapted: it must stay frozen$"):
        save(model, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("state", ["adapted", "trained", "frozen"])
def test_a_parameter_called_theta_is_not_saved(state, file):
    """It has the name that the file has for the adapter's."""
    before = file.read_bytes()
    model = nn.Linear(4, 4)
    model.theta = nn.Parameter(torch.ones(3))
    attach(model, 2, target_modules="theta" if state == "adapted" else ALL)
    if state == "trained":
        model.theta.requires_grad_()
    with refused(model, "the model has a parameter called theta: rename it$"):
        save(model, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gpart.theta", "head.0.bias", "head.1.running_mean"])
def test_what_is_not_finite_is_not_saved(name, value, file):
    before = file.read_bytes()
    model = trained()
    model.state_dict()[name][-1] = value
    with refused(model, f"{name.removeprefix('gpart.')} is not finite: nothing saved$"):
        save(model, file)
    assert file.read_bytes() == before
    assert [*file.parent.iterdir()] == [file]


# --- Metadata and digest ---
def test_the_metadata_are_what_the_format_says(file):
    metadata, tensors = read(file)
    assert metadata.pop("format") == "gpart-v1"
    assert metadata.pop("gpart_version") == gpart.__version__
    assert metadata.pop("base_model_name_or_path") == "someone/some-model"
    body = {"body.0.weight": [24, 16], "body.0.bias": [24]}
    body |= {"body.2.weight": [5, 24], "body.2.bias": [5]}
    assert json.loads(metadata.pop("manifest")) == [[*entry] for entry in body.items()]
    assert json.loads(metadata.pop("base")).keys() == {*body, "stats"}
    assert re.fullmatch("[0-9a-f]{64}", metadata.pop("sha256"))
    assert metadata == {"N": "533", "d": "37", "seed": "0", "isometric": "true"}
    head = {f"head.{key}" for key in NET.pristine.head.state_dict()}
    assert tensors.keys() == {"theta"} | head


def test_equal_adapters_have_equal_digests_and_others_have_not(file):
    """theta, a buffer and the seed each tell two adapters apart."""
    digest = read(file)[0]["sha256"]
    other = trained()
    other.head[1].num_batches_tracked.add_(1)
    for model in (trained(seed=8), trained(**{"d": 36}), other):
        save(model, file)
        assert read(file)[0]["sha256"] != digest
    save(trained(), file)
    assert read(file)[0]["sha256"] == digest


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_save_in_any_state_writes_the_same(state, file, monkeypatch):
    """Merged or disabled, and to a relative path."""
    before, model = read(file)[0], trained()
    if state == "merged":
        merge(model)
    monkeypatch.chdir(file.parent)
    with disabled(model) if state == "disabled" else contextlib.nullcontext():
        save(model, file.name)
    assert read(file)[0] == before
    assert [*file.parent.iterdir()] == [file]


NAMES = {
    "someone/some-model": "someone/some-model",
    "./checkpoints/7": "./checkpoints/7",
    os.path.abspath("some/folder/checkpoint-7"): "checkpoint-7",
    os.path.abspath("some/folder/checkpoint-7") + os.sep: "checkpoint-7",
    None: "",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_the_base_is_stored_and_no_absolute_path(name, file):
    model = trained()
    if name is None:
        model = MODELS["sequential"].adapted()[0]
    else:
        model.name_or_path = name
    save(model, file)
    assert read(file)[0]["base_model_name_or_path"] == NAMES[name]
    assert os.path.abspath("some").encode() not in file.read_bytes()


@pytest.mark.parametrize("d", [1, 60_000])
def test_a_file_is_four_bytes_a_theta_and_less_than_4_kB_of_names(d, file):
    model = nn.Linear(256, 256)
    attach(model, d, target_modules=ALL)
    save(model, file)
    assert 4 * d < file.stat().st_size < 4 * d + 4000


# --- The file knows its base ---
def sums(path):
    return json.loads(read(path)[0]["base"])


def test_the_sums_are_of_everything_that_the_file_does_not_carry(file):
    """Of each float parameter and persistent buffer: rounded to bfloat16, added in
    float64, six significant digits."""
    model = trained()
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("bad", torch.tensor([1.0, math.inf]))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    model.stats.copy_(torch.tensor([2.0**30, 1.0, -(2.0**30), 1.0, 0.3]))
    save(model, file)
    own = model.state_dict()
    carried = {"steps", "bad", "gpart.theta", "gpart._extra_state", *read(file)[1]}
    assert sums(file).keys() == own.keys() - carried
    assert {"stats", "body.0.weight"} <= sums(file).keys()
    for name, total in sums(file).items():
        exact = math.fsum(own[name].bfloat16().flatten().tolist())
        assert f"{total:.6g}" == f"{exact:.6g}"


def drawn(seed):
    torch.manual_seed(seed)
    return Net()


def test_load_warns_of_another_checkpoint(file):
    """It names the first tensor that differs, in the order of the file, once. What the
    file says is loaded."""
    model = drawn(0)
    adapter = attach(model, 5, target_modules=ALL, modules_to_save="head")
    adapter.theta.data.copy_(normal(5))
    save(model, file)
    other = drawn(1)
    with pytest.warns(UserWarning) as caught:
        load(other, file)
    assert len(caught) == 1
    assert re.match(rf"body\.0\.weight {ANOTHER_BASE}", str(caught[0].message))
    assert torch.equal(other.gpart.theta, adapter.theta)
    assert torch.equal(other.head[0].weight, model.head[0].weight)

    other = drawn(0)
    other.body[2].weight.data.add_(1.0)
    with pytest.warns(UserWarning, match=r"^body\.2\.weight is not"):
        load(other, file)


def test_the_warning_points_to_the_line_that_calls_load(file):
    with pytest.warns(UserWarning, match=ANOTHER_BASE) as caught:
        load(drawn(1), file)
    assert caught[0].filename == __file__


def test_load_warns_of_a_fresh_head_that_was_not_saved(file):
    """The head was drawn anew for this task, and again when the adapter is loaded."""
    model = drawn(0)
    fresh = copy.deepcopy(model)
    attach(model, 5, target_modules="body.0")
    save(model, file)
    load(copy.deepcopy(fresh), file)
    torch.manual_seed(1)
    fresh.head[0].reset_parameters()
    with pytest.warns(UserWarning, match=rf"^head\.0\.weight {ANOTHER_BASE}"):
        load(fresh, file)


def test_load_warns_of_running_statistics_that_moved(file):
    """A frozen BatchNorm in training mode drifts, and is not in the file."""
    model = drawn(0)
    fresh = copy.deepcopy(model)
    attach(model, 5, target_modules="body.0")
    model.train()(normal(8, 16))
    save(model, file)
    with pytest.warns(UserWarning, match=r"^head\.1\.running_mean .*BatchNorm stat"):
        load(fresh, file)


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("there", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("here", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_of_the_base_is_no_other_base(here, there, file):
    """Trained in one dtype, loaded in another: trained and loaded without a word."""
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 3))
    for w in model.parameters():
        w.data.copy_(normal(*w.shape, seed=w.numel()) / 50)
    trained_in = copy.deepcopy(model).to(there)
    attach(trained_in, 5, target_modules="0")
    save(trained_in, file)
    with silence():
        load(model.to(here), file)


@pytest.mark.parametrize("state", ["attached", "merged", "disabled"])
def test_the_base_of_training_brings_no_warning(state, file):
    """Nor does loading again, into the attached model; the pretrained weights are
    those that a merged model keeps."""
    model = trained()
    if state == "merged":
        merge(model)
    with disabled(model) if state == "disabled" else contextlib.nullcontext():
        save(model, file)
    fresh = NET.model()
    with silence():
        load(fresh, file)
        load(fresh, file)


@pytest.mark.parametrize(("percent", "warned"), [(0.99, False), (1.01, True)])
def test_a_sum_may_differ_by_a_percent_of_the_norm(percent, warned, file):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.copy_(torch.eye(4))  # the norm is 2
    attach(model, 3, target_modules="0")
    save(model, file)
    base = sums(file) | {"1.weight": 4 + 2 * percent / 100}
    rewrite(file, lambda m, t: m.update(base=json.dumps(base)))
    detach(model)
    expected = pytest.warns(UserWarning, match=r"^1\.weight") if warned else silence()
    with expected:
        load(model, file)


def test_what_this_model_has_not_is_not_compared(file):
    """A tensor that is gone, or one that is infinite."""
    base = sums(file) | {"gone": 1.0, "stats": 1e9}
    rewrite(file, lambda m, t: m.update(base=json.dumps(base)))
    with pytest.warns(UserWarning, match="^stats is not"):
        load(NET.model(), file)
    model = NET.model()
    model.stats.fill_(math.inf)
    with silence():
        load(model, file)


MERGED = {  # sha256 of the bytes of every tensor after detach(merge=True), from 0.1.0
    "one-number": "ecf32c664b59bbb9d5d0a256074e1106b01c8eafdd676e644c26550f71b3d6ff",
    "not-isometric": "909b58997c63027e4c66d500eb8bc26239b7e776e7201578c514eba923f3319c",
    "six-rounds": "af12920c8c1f04fcaac8380d8d908543b7c9f5fb4b1e6079a30720791731e562",
    "one-each": "f0f6b93bdbf099a843e1e85510a8e5b36455bc8028ec2fbff16410203de885bb",
}


@pytest.mark.parametrize("name", MERGED)
def test_files_of_the_first_release_load_for_ever(name, tmp_path):
    """They give the merged weights that they gave, without a warning though they have
    no sums, and are saved again with the same content. If this fails, the format has
    changed: rename FORMAT."""
    path, model = GOLDEN / f"{name}.safetensors", golden_model(f"{name}.safetensors")
    metadata, tensors = read(path)
    assert metadata["gpart_version"] == "0.1.0"
    assert "base" not in metadata
    with silence():
        load(model, path)
    again = tmp_path / "again.safetensors"
    save(model, again)
    new_metadata, new_tensors = read(again)
    for text in (metadata, new_metadata):
        for key in ("gpart_version", "base", "sha256"):
            text.pop(key, None)
    assert new_metadata == metadata
    assert gpart.digest({}, new_tensors) == gpart.digest({}, tensors)
    detach(model, merge=True)
    state = [t.flatten().view(torch.uint8) for t in model.state_dict().values()]
    assert sha256(torch.cat(state)) == MERGED[name]


# --- Sharded models ---
@FUSED
@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 needs CUDA before torch 2.7"
)
def test_a_sharded_model_saves_the_same_file(fused, file):
    """Under FSDP2's fully_shard, weights, head and theta are shards."""
    before = read(file)[0]["sha256"]
    model = trained(fused=fused)
    with one_process() as mesh:
        for module in (*model.body, model):
            fsdp.fully_shard(module, mesh=mesh)
        assert type(model.gpart.theta).__name__ == "DTensor"
        save(model, file)
    assert read(file)[0]["sha256"] == before


# --- A crash leaves the old file or the new ---
def test_save_writes_beside_the_target_only(file, monkeypatch):
    """In a hidden folder beside path: renaming is atomic on one disk alone."""
    seen, real = [], safetensors.torch.save_file

    def see(tensors, path, metadata):
        seen.append(pathlib.Path(path).resolve())
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", see)
    save(trained(), file)
    monkeypatch.chdir(file.parent)
    save(trained(), file.name)
    assert len(seen) == 2
    for part in seen:
        assert part.parent.name.startswith(".gpart-")
        assert part.parent.parent == file.parent.resolve()


STEPS = ["os.replace", "os.fsync", "safetensors.torch.save_file"]


@pytest.mark.parametrize("step", STEPS)
def test_whatever_fails_in_save_the_old_file_stays(step, file, monkeypatch):
    """And nothing is left beside it."""

    def fail(*args, **kwargs):
        raise OSError("disk full")

    before = file.read_bytes()
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(trained(seed=8), file)
    assert file.read_bytes() == before
    assert [*file.parent.iterdir()] == [file]


def test_what_was_written_is_synced_before_it_is_renamed(file, monkeypatch):
    """Else a power cut could leave the new name on an empty file."""
    order = []
    sync, replace = os.fsync, os.replace

    def see_sync(handle):
        order.append(os.fstat(handle).st_ino)
        sync(handle)

    def see_replace(source, target):
        order.append(os.stat(source).st_ino)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", see_sync)
    monkeypatch.setattr(os, "replace", see_replace)
    save(trained(), file)
    assert order == [file.stat().st_ino] * 2


# Saves theta = 2 over the file of theta = 1, stopped at step k = 0, 1, 2, ... until a
# save runs through. Printed for each k: the theta then found, whether the file is still
# the old one, what lies beside it, and the theta found after saving theta = 3.
INTERRUPTED = """
import ctypes, json, os, pathlib, resource, shutil, signal, sys
import safetensors.torch, torch, gpart

def model(theta):
    net = torch.nn.Linear(8, 8)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.ones_(net.bias)
    if theta:
        gpart.attach(net, 9, target_modules="all-linear").theta.data.fill_(theta)
    return net

def found():
    return gpart.load(model(None), path).theta[0].item()

def announced(function):
    def wrapper(*args):
        sys.audit("gpart.before")
        function(*args)
        sys.audit("gpart.after")
    return wrapper

def python(k):
    # the process exits where Python announces its k-th file operation
    pid = os.fork()
    if not pid:
        left = iter(range(k))
        files = ("os.", "shutil.", "tempfile.", "gpart.")
        def hook(event, _):
            if event == "open" or event.startswith(files):
                next(left, None) is None and os._exit(9)
        safetensors.torch.save_file = announced(safetensors.torch.save_file)
        os.fsync, os.replace = announced(os.fsync), announced(os.replace)
        sys.addaudithook(hook)
        gpart.save(new, path)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 0

def kernel(k):
    # the process is killed as it enters or leaves a system call, the k-th such stop
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

def size(k):
    # no file can grow beyond 7 k bytes: a write ends there, as on a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7 * k, hard))
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
    assert len(results) < 2000
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
unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's ptrace")


def interrupted(how, path):
    """How many saves that INTERRUPTED stopped left the old file, how many the new one,
    and whether nothing ever lay beside it. There is no third: the old bytes, or what
    loads as the new file; and then the next save works."""
    results = json.loads(python(INTERRUPTED, path, how))
    old = sum(same for _, same, _, _ in results)
    states = [(1.0, True)] * old + [(2.0, False)] * (len(results) - old)
    assert [(then, same) for then, same, _, _ in results] == states
    assert all(after == 3.0 for _, _, _, after in results)
    beside = [name for _, _, names, _ in results for name in names]
    assert all(name.startswith(".gpart-") for name in beside)
    return old, len(results) - old, not beside


@slow
@unix
def test_save_killed_at_any_file_operation(tmp_path):
    """The old file, then the new one."""
    old, new, _ = interrupted("python", tmp_path / "adapter.safetensors")
    assert old > 5
    assert new > 2


@slow
@linux
def test_save_killed_between_any_two_system_calls(tmp_path):
    """SIGKILL before and after each of them: the old file, then the new one."""
    try:
        old, new, _ = interrupted("kernel", tmp_path / "adapter.safetensors")
    except subprocess.CalledProcessError as error:
        if "not permitted" not in error.stderr:
            raise
        pytest.skip("ptrace is not permitted here")
    assert old > 20
    assert new > 10


@slow
@unix
def test_save_cut_short_keeps_the_old_file(tmp_path):
    """A disk that is full after 0, 7, 14, ... bytes: nothing is left beside it."""
    path = tmp_path / "adapter.safetensors"
    old, new, alone = interrupted("size", path)
    assert (old, new, alone) == (math.ceil(path.stat().st_size / 7), 1, True)


# --- Paths, and bugs of our own ---
def test_what_cannot_be_opened_is_an_os_error(file):
    """A wrong path is no damaged file, and the error names it."""
    model = NET.model()
    missing = file.with_name("missing")
    with refused(model, re.escape(str(missing)), FileNotFoundError):
        load(model, missing)
    with refused(model, re.escape(str(file.parent)), OSError):
        load(model, file.parent)


def test_what_cannot_be_written_is_an_os_error(file):
    """A missing folder is named as it was given, not by a temporary name."""
    missing = file.parent / "missing" / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(missing.parent))}'$"):
        save(trained(), missing)
    folder = file.parent / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        save(trained(), folder)
    with pytest.raises(OSError):
        save(trained(), file / "under a file")
    assert {*file.parent.iterdir()} == {file, folder}


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, AttributeError])
@pytest.mark.parametrize("step", ["digest", "permute", "install", "base_sums"])
def test_a_bug_of_our_own_is_no_bad_file(step, error, file, monkeypatch):
    """It comes out of load as it is."""

    def bug(*args, **kwargs):
        raise error("a bug of our own")

    monkeypatch.setattr(gpart, step, bug)
    with pytest.raises(error) as raised:
        load(NET.model(), file)
    assert raised.value.args == ("a bug of our own",)
