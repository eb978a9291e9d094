"""Gates on models of the zoo do nothing when open, what a cut does when closed, and fold."""

from __future__ import annotations

import functools
from typing import Any, cast

import pytest
import torch

from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program
from graphprune.plan.plan import Plan
from graphprune.training.gates.places import places_of
from training.gates.models import difference, lay, masked, refused, structures_of
from zoo.expected import CASES
from zoo.expected_pretrained import MODELS

ROUNDING = 2e-5

QUICK = ("llama_gqa_4", "gpt2", "gemma3", "resnet_basic")
MORE = (
    "llama_tied",
    "phi3",
    "mobilenet",
    "qwen3",
    "bert",
    "bart",
    "vit",
    "mixtral",
    "resnext",
    "densenet",
    "unet_batch_norm",
)
KNOWN: dict[str, Any] = {one.build.__name__: one for one in cast("Any", (*MODELS, *CASES))}


@functools.cache
def program_of(name: str) -> Program:
    program: Program = KNOWN[name].trace()
    return program


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)],  # each takes seconds
)
def test_gates_do_what_cuts_do(name: str):
    program = program_of(name)
    able = []
    for structure in structures_of(program):
        try:
            places_of(program, [structure])
        except PlanError:
            continue
        able.append(structure)
    assert able
    laid = lay(program, able)
    untouched = masked(program, Plan(program.fingerprint, {}))
    assert difference(laid.outputs(laid.ones()), untouched) < ROUNDING
    plan, binary, soft = laid.drawn(seed=1)
    right = masked(program, plan)
    assert difference(laid.outputs(binary), right) < ROUNDING
    gated = laid.outputs(soft)
    assert difference(gated, masked(laid.folded(soft), plan)) < ROUNDING
    assert difference(gated, right) > 1e-3  # scales matter
    assert difference(untouched, right) > 1e-3  # and so do units


@pytest.mark.parametrize("role", ["attention_blocks", "mlp_blocks", "layers"])
def test_branches_have_gates_of_their_own(role: str):
    program = program_of("gemma3")  # with norms behind the branches, of 1 + weight
    laid = lay(program, structures_of(program, role))
    plan, binary, soft = laid.drawn(seed=2)
    assert difference(laid.outputs(binary), masked(program, plan)) < ROUNDING
    assert difference(laid.outputs(soft), masked(laid.folded(soft), plan)) < ROUNDING


def test_a_tied_head_stays_tied():
    program = program_of("llama_tied")
    places = places_of(program, structures_of(program, "hidden"))
    assert "lm_head.weight" not in places.by_parameter
    assert "model.embed_tokens.weight" not in places.by_parameter
    assert "model.norm.weight" in places.by_parameter
    assert len(places.by_parameter) == 2 * 2 + 1


def test_query_heads_and_their_group_multiply_the_same_columns():
    program = program_of("llama_gqa_4")
    places = places_of(program, structures_of(program, "kv_heads", "query_heads"))
    for name, own in places.by_parameter.items():
        assert name.endswith("o_proj.weight")
        assert {p.dim for p in own} == {1}
        assert len(own) == 2


@pytest.mark.parametrize("name", QUICK[:3])
def test_decoders_refuse_nothing(name: str):
    assert refused(program_of(name)) == {}


@pytest.mark.slow  # traces a mixture of experts
def test_experts_have_gates_on_their_last_map():
    program = program_of("mixtral")
    laid = lay(program, structures_of(program, "experts"))
    assert set(laid.places.by_parameter) == {
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    }
    for seed in range(3):
        plan, binary, soft = laid.drawn(seed)
        right = masked(program, plan)
        assert difference(laid.outputs(binary), right) < ROUNDING
        assert difference(laid.outputs(soft), masked(laid.folded(soft), plan)) < ROUNDING
        assert difference(laid.outputs(soft), right) > 1e-4
    # However the noise falls, a router has as many experts to pick as it wants.
    for name, one in laid.gates.gated.items():
        a = laid.gates.locations[name]
        with torch.no_grad():
            a.fill_(-4.0)
        laid.gates.fixed = None
        for key in range(5):
            laid.gates.draw.key = (key,)
            assert int((laid.gates.value(name) > 0).sum()) >= one.structure.minimum == 2


@pytest.mark.slow  # traces a convolutional network
def test_what_offers_no_place_is_refused_with_the_reason():
    found = refused(program_of("resnet_basic"))
    assert set(found) <= {"layers"}
    assert all("adds nothing to a residual stream" in why for why in found.values())


@pytest.mark.parametrize(
    "roles",
    [
        ("kv_heads", "ffn"),
        ("kv_heads", "layers"),
        ("ffn", "hidden", "layers"),
        ("ffn",),
        ("v_dim",),
        ("qk_dim", "query_heads"),
    ],
)
def test_any_subset_of_roles_does(roles: tuple[str, ...]):
    """Of which the original takes heads, ffn and layers together alone."""
    program = program_of("llama_gqa_4")
    laid = lay(program, structures_of(program, *roles))
    plan, binary, soft = laid.drawn(seed=3)
    assert difference(laid.outputs(binary), masked(program, plan)) < ROUNDING
    assert difference(laid.outputs(soft), masked(laid.folded(soft), plan)) < ROUNDING
