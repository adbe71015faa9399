# SPDX-License-Identifier: Apache-2.0
"""One parameter under several names: found by any of them, moved in every module that
owns it, stored once."""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gpart import attach, detach, load, merge, save, unmerge
from tests.models import FUSED, MODELS, normal, refused, snapshot


@pytest.mark.parametrize(
    ("targets", "name"), [("b", "b.weight"), (("b", "a"), "a.weight")], ids=str
)
def test_a_tied_parameter_goes_by_the_first_of_its_names_that_match(
    targets, name, tmp_path
):
    """Even if only its second name is a target, a tied weight moves in both owners, and
    is merged, saved and loaded."""
    layers = collections.OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    pristine, x = nn.Sequential(layers), normal(2, 4)
    pristine.b.weight = pristine.a.weight
    model, other = copy.deepcopy(pristine), copy.deepcopy(pristine)
    attach(model, 5, target_modules=targets).theta.data.fill_(1.0)
    y = model(x)
    assert torch.equal(model.a.weight, model.b.weight)
    save(model, tmp_path / "a.safetensors")
    load(other, tmp_path / "a.safetensors")
    assert model.gpart.manifest == other.gpart.manifest == [(name, (4, 4))]
    for m in (model, other):
        merge(m)
        assert torch.equal(m(x), y)
        assert m.a.weight is m.b.weight
        detach(m)
        assert snapshot(m) == snapshot(pristine)


@FUSED
def test_a_shared_bias_moves_in_a_layer_that_was_not_named(fused):
    """A Linear that shares only an adapted bias runs with that bias."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].bias = model[0].bias
    b, x = model[0].bias.detach().clone(), normal(2, 24)
    adapter = attach(model, 5, target_modules=["0", "0.bias"], fused=fused)
    adapter.theta.data.fill_(1.0)
    b += adapter.delta()["0.bias"]
    assert_close(model[1](x), nn.functional.linear(x, model[1].weight, b))


def test_a_head_may_be_tied_inside(tmp_path):
    """Two names of one tensor in modules_to_save are stored, and come back tied."""
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    pristine = nn.ModuleDict({"body": nn.Linear(4, 4), "head": head})
    model, fresh = copy.deepcopy(pristine), copy.deepcopy(pristine)
    attach(model, 2, target_modules="body", modules_to_save="head")
    model["head"][0].weight.data.fill_(3.0)
    save(model, tmp_path / "a.safetensors")
    load(fresh, tmp_path / "a.safetensors")
    assert fresh["head"][1].weight is fresh["head"][0].weight
    assert torch.equal(fresh["head"][1].weight, model["head"][0].weight)


def test_a_weight_tied_to_a_trained_head_is_refused():
    """It cannot be both adapted and trained whole."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["a"].weight
    with refused(model, "^head.weight is adapted: it cannot be saved too$"):
        attach(model, 2, target_modules="a", modules_to_save="head")


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_head_tied_to_what_is_not_named_trains(names):
    """All is frozen before the head is unfrozen, whichever name comes first."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in [*names, "body"]})
    model["a"].weight = model["b"].weight
    attach(model, 2, target_modules="body", modules_to_save="a")
    assert model["a"].weight.requires_grad


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_untied_parameters_still_move_together(merged):
    """load_state_dict(assign=True) unties what attach found tied: merge, unmerge and
    detach reach each."""
    case = MODELS["t5-tied"]
    model, _ = case.adapted()
    y = case(model)
    if merged:
        merge(model)
    state = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    if not merged:
        merge(model)
    assert model.lm_head.weight is not model.shared.weight
    assert torch.equal(case(model), y)
    unmerge(model)
    assert torch.equal(case(model), y)
    detach(model)
    assert snapshot(model) == snapshot(case.pristine)
