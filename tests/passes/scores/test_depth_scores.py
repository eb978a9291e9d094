"""Scores of layers, against modules with hooks and modules without these layers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.frontends.hf.load import trace_model
from graphprune.passes.scores import get_score
from graphprune.passes.selection.select import select
from graphprune.passes.shared import forward
from graphprune.passes.shared.forward import Route, sites_of
from graphprune.passes.shared.score import Inputs
from streaming.oracle import tokens, traced
from zoo import decoders, encoders, mixtures
from zoo.case import randomise


def stacks(program):
    return [s for s in program.structures if s.blocks]


def deep(layers=5, **options):
    """A decoder with random weights, its program and its module in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=96, num_hidden_layers=layers, num_key_value_heads=1, **sizes, **options
    )
    module = randomise(LlamaForCausalLM(config)).eval()
    return trace_model(module), copy.deepcopy(module).double()


@pytest.fixture(scope="module")
def decoder():
    return deep()


def streams(module, stack, *args, **kwargs):
    """What goes into and comes out of each layer of a module, in float64."""
    seen = []

    def hook(layer, args, kwargs, result):
        entry = args[0] if args else kwargs["hidden_states"]
        seen.append((entry, result[0] if isinstance(result, tuple) else result))

    layers = module.get_submodule(stack)
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        module(*args, **kwargs)
    for one in hooks:
        one.remove()
    return seen


def cosines(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


@pytest.mark.parametrize("build", [decoders.gpt2, decoders.gpt_neox, mixtures.mixtral])
def test_block_influence_is_one_minus_the_mean_cosine(build):
    program, module = traced(build)
    windows = tokens(5, 9)
    (stack,) = stacks(program)
    found = get_score({"name": "block-influence", "batch": 2}).score(
        program, [stack], Inputs(windows)
    )
    expected = [1 - cosines(x, y).mean().item() for x, y in streams(module, stack.name, windows)]
    assert found[stack.name].shape == (1, stack.size)
    np.testing.assert_allclose(found[stack.name][0], expected, atol=2e-6)


def test_block_influence_of_encoders_doesn_t_see_padding():
    program, module = traced(encoders.bert)
    windows, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[0, 4:] = mask[2, 7:] = 0
    inputs = {"input_ids": windows, "attention_mask": mask}
    (stack,) = stacks(program)
    found = get_score("block-influence").score(program, [stack], Inputs(inputs))[stack.name][0]
    seen = streams(module, stack.name, **inputs)
    expected = [1 - cosines(x, y)[mask.bool()].mean().item() for x, y in seen]
    padded = [1 - cosines(x, y).mean().item() for x, y in seen]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(np.subtract(padded, expected)).max() > 1e-4


def test_block_influence_of_an_encoder_and_its_decoder_in_one_pass():
    program, module = traced(encoders.bart)
    inputs = {"input_ids": tokens(3, 9), "decoder_input_ids": tokens(3, 7, seed=6)}
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    found = get_score("block-influence").score(program, stacks(program), Inputs(inputs))
    assert len(found) == 2
    for name, scores in found.items():
        seen = streams(module, name, **inputs)
        expected = [1 - cosines(x, y).mean().item() for x, y in seen]
        np.testing.assert_allclose(scores[0], expected, atol=2e-6)


def test_block_influence_of_images_compares_channels():
    program, module = image_program()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    stack = next(s for s in stacks(program) if len(s.blocks) > 1)
    found = get_score("block-influence").score(program, [stack], Inputs(images))[stack.name][0]
    seen = streams(module, stack.name, images.double())
    for block in stack.blocks:
        x, y = (v.movedim(1, -1) for v in seen[block.index])
        assert found[block.index] == pytest.approx(1 - cosines(x, y).mean().item(), abs=2e-6)


def image_program():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.wide, self.narrow = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 6, 1)

        def forward(self, x):
            return x + self.narrow(torch.relu(self.wide(self.norm(x))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
            self.blocks = nn.Sequential(Block(), Block(), Block())

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    torch.manual_seed(0)
    module = randomise(Net()).eval()
    return gp.trace(module, (torch.randn(2, 3, 16, 16),)), copy.deepcopy(module).double()


def test_spans_have_the_smallest_angle_of_their_length(decoder):
    program, module = decoder
    windows = tokens(4, 8)
    seen = streams(module, "model.layers", windows)
    size = len(seen)

    def angle(first, last):
        return (torch.arccos(cosines(seen[first][0], seen[last][1])) / math.pi).mean().item()

    for n in range(1, size):
        plan = select(
            program, shape={"layers": size - n}, score="span-influence", calibration=windows
        )
        best = min(range(size - n + 1), key=lambda s: angle(s, s + n - 1))
        kept = tuple(i for i in range(size) if not best <= i < best + n)
        assert plan.kept_units["model.layers"] == kept
    single = get_score("span-influence").score(program, stacks(program), Inputs(windows))
    expected = [angle(i, i) for i in range(size)]
    np.testing.assert_allclose(single["model.layers"][0], expected, atol=2e-6)


def test_spans_keep_clear_of_what_is_excluded(decoder):
    program, _ = decoder
    options = {"score": "span-influence", "calibration": tokens(2, 8)}
    plan = select(
        program, shape={"layers": 3}, exclude=["model.layers.1.*", "model.layers.2.*"], **options
    )
    assert plan.kept_units["model.layers"] == (0, 1, 2)
    with pytest.raises(PlanError, match="no 2 layers in a row") as caught:
        select(program, shape={"layers": 3}, exclude=["model.layers.[13].*"], **options)
    assert "the longest run of layers that may go has 1" in str(caught.value)


def loss_without(module, gone, windows):
    """The next-token loss of a module without some layers, in float64."""
    slim = copy.deepcopy(module)
    for i in sorted(gone, reverse=True):
        del slim.model.layers[i]
    with torch.no_grad():
        logits = slim(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item()


def test_greedy_removal_follows_the_loss(decoder):
    program, module = decoder
    windows = tokens(5, 8)
    (stack,) = stacks(program)
    score = get_score({"name": "loss-greedy", "batch": 2})
    found = score.choose(program, stack, np.arange(stack.size), Inputs(windows))
    gone = []
    for n in (1, 2, 3):
        losses = {i: loss_without(module, [*gone, i], windows) for i in range(5) if i not in gone}
        order = found.order(n)
        assert found.losses == pytest.approx(losses, rel=1e-5)
        gone.append(min(losses, key=losses.get))
        assert found.removed == gone == order[:n]
        assert sorted(order) == list(range(5))
        plan = select(program, shape={"layers": 5 - n}, score=score, calibration=windows)
        assert plan.kept_units["model.layers"] == tuple(i for i in range(5) if i not in gone)
    assert found.searches == 5 + 4 + 3
    assert found.order(4)[:3] == gone  # no deeper than half of the layers
    assert found.searches == 5 + 4 + 3
    ranking = score.score(program, [stack], Inputs(windows))["model.layers"][0]
    assert [int(i) for i in np.argsort(ranking)[:3]] == gone


def test_greedy_removal_takes_only_the_windows_that_it_is_given(decoder):
    program, module = decoder
    windows = tokens(6, 8)
    (stack,) = stacks(program)
    score = get_score({"name": "loss-greedy", "windows": 2})
    found = score.choose(program, stack, np.array([1, 3]), Inputs(windows))
    found.order(1)
    expected = {i: loss_without(module, [i], windows[:2]) for i in (1, 3)}
    assert found.losses == pytest.approx(expected, rel=1e-5)
    plan = select(
        program, shape={"layers": 4}, score=score, calibration=windows, include=["model.layers.3.*"]
    )
    assert plan.kept_units["model.layers"] == (0, 1, 2, 4)


def test_greedy_removal_with_a_loss_of_one_s_own():
    """A loss that calls an encoder twice, on inputs that aren't token windows."""
    program, module = traced(encoders.bert)
    (stack,) = stacks(program)
    mask = torch.ones(2, 6, dtype=torch.long)
    pairs = [[{"input_ids": tokens(2, 6, seed=s + k), "attention_mask": mask} for k in (0, 50)]
             for s in range(3)]  # fmt: skip

    def distance(model, batch):
        a, b = (model(**part) for part in batch)
        a, b = (v.logits if hasattr(v, "logits") else v[0] for v in (a, b))
        return (a - b).square().mean()

    found = get_score("loss-greedy").choose(
        program, stack, np.arange(stack.size), Inputs(pairs, distance)
    )
    found.order(1)
    for gone in range(stack.size):
        slim = copy.deepcopy(module)
        del slim.get_submodule(stack.name)[gone]
        with torch.no_grad():
            expected = np.mean([distance(slim, pair).item() for pair in pairs])
        assert found.losses[gone] == pytest.approx(expected, rel=1e-5)


def test_greedy_removal_runs_only_what_a_layer_changes(decoder, monkeypatch):
    """A search costs half a pass for each layer, and not a whole one."""
    program, _ = decoder
    (stack,) = stacks(program)
    inside = {name for b in stack.blocks for name in b.nodes}
    ran = []
    execute = forward.Forward.execute

    def counted(self, node, values, *rest):
        ran.append(node.name)
        return execute(self, node, values, *rest)

    monkeypatch.setattr(forward.Forward, "execute", counted)
    get_score("loss-greedy").choose(
        program, stack, np.arange(stack.size), Inputs(tokens(1, 8))
    ).order(1)
    layers = sum(name in inside for name in ran) / (len(inside) / stack.size)
    # The layers before each of the five: once for all; those behind it: 4 + 3 + 2 + 1.
    assert layers == pytest.approx(4 + 10, rel=0.15)


def test_a_budget_takes_the_layers_that_a_score_chooses(decoder):
    program, _ = decoder
    windows = tokens(3, 8)
    whole = program.costs.total().params
    layer = program.costs.block(stacks(program)[0].blocks[0]).params
    for name in ("block-influence", "span-influence", "loss-greedy"):
        plan = select(
            program,
            target={"params": whole - 2 * layer},
            roles=["layers"],
            score=name,
            calibration=windows,
        )
        same = select(program, shape={"layers": 3}, score=name, calibration=windows)
        assert plan.kept_units == same.kept_units


@pytest.mark.parametrize("name", ["block-influence", "span-influence", "loss-greedy"])
def test_what_a_depth_score_needs(decoder, name):
    program, _ = decoder
    with pytest.raises(PlanError, match="needs calibration data"):
        select(program, remove={"layers": 0.4}, score=name)
    with pytest.raises(PlanError, match="is for layers and their branches"):
        select(program, remove={"ffn": 0.5}, score=name, calibration=tokens(2, 8))
    with pytest.raises(PlanError, match="at least one window"):
        get_score({"name": name, "batch": 0})


def test_activations_that_are_not_finite_are_an_error():
    program, _ = deep(2)
    weights = dict(program.weights)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = torch.full_like(weights[name], math.nan)
    program.weights = weights
    with pytest.raises(PlanError, match="not finite"):
        select(program, shape={"layers": 1}, score="block-influence", calibration=tokens(2, 8))
    with pytest.raises(PlanError, match="not a finite number"):
        select(
            program,
            shape={"layers": 1},
            score="loss-greedy",
            calibration=tokens(2, 8),
            exclude=["model.layers.0.*"],
        )


def test_experts_are_never_gathered():
    """What follows a layer of experts runs with one matrix at a time: nothing is that large."""
    program, _ = traced(mixtures.mixtral)
    results = [str(n) for n in program.exported.graph.output_node().all_input_nodes]
    route = Route(program, sites_of(program), results)
    gathers = [n for n in route.order if n.name.startswith("index")
               and n.all_input_nodes[0] in route.weights]  # fmt: skip
    assert route.experts
    assert not gathers
