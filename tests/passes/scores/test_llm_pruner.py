"""Scores of gradients against one plain backward pass per sample in float64."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from brute_force import by_loops, owned, trainable_members
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program
from graphprune.passes.scores import get_score
from graphprune.passes.shared import gradients as gradients_module
from graphprune.passes.shared.gradients import (
    backward,
    batches_of,
    mean_gradients,
    moments,
    samples_of,
)
from graphprune.passes.shared.score import Inputs, wanted_dims


def gpt2() -> Program:
    """Fused queries, keys and values, stored as [in, out]."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=32, use_cache=False
    )
    model = GPT2LMHeadModel(config).eval()
    return trace(model, kwargs={"input_ids": torch.randint(0, 96, (2, 7))})


@pytest.fixture(scope="module")
def programs(make_llama) -> dict[str, Program]:
    return {"gqa": make_llama(layers=2), "gpt2": gpt2()}


def tokens_of(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 96, (count, 9), generator=torch.Generator().manual_seed(3))


def per_sample(program: Program, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter to the gradients of every sample's loss, ``[samples, *shape]`` in float64."""
    model = program.module
    assert model is not None
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.double()
    found: dict[str, list[torch.Tensor]] = {}
    for window in tokens:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(parameter.grad.clone())
    model.zero_grad(set_to_none=True)
    model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return {n: torch.stack(g) for n, g in found.items()}


def axes_of(program: Program) -> list[Structure]:
    return [s for s in program.structures if s.prunable and not s.blocks]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(
        found.reshape(len(found), -1), expected, rtol=2e-3, atol=2e-6 * np.abs(expected).max()
    )


def saliences(program: Program, tokens: torch.Tensor) -> dict[str, Any]:
    """Score to its salience of a parameter, in float64."""
    samples = per_sample(program, tokens)

    def weight(name: str) -> torch.Tensor:
        return program.weights[name].detach().double()

    def first(name: str) -> torch.Tensor:
        return weight(name) * samples[name].mean(0)

    def second(name: str) -> torch.Tensor:
        return weight(name).square() * samples[name].square().mean(0)

    return {
        "taylor": lambda name: first(name).abs(),
        "element1": lambda name: first(name).abs(),
        "element2": second,
        "element-mix": lambda name: (first(name) - 0.5 * second(name)).abs(),
        "signed": first,
    }


@pytest.mark.parametrize("which", ["gqa", "gpt2"])
@pytest.mark.parametrize("name", ["element1", "element2", "element-mix"])
def test_element_wise(programs: dict[str, Program], which: str, name: str) -> None:
    program = programs[which]
    tokens = tokens_of()
    salience = saliences(program, tokens)[name]
    found = get_score(name).score(program, axes_of(program), Inputs(calibration=tokens))
    for structure in axes_of(program):
        close(found[structure.name], by_loops(program, structure, salience))


@pytest.mark.parametrize("which", ["gqa", "gpt2"])
def test_vector_wise(programs: dict[str, Program], which: str) -> None:
    """The absolute value is taken of the sum over a row or column, of each that a unit owns."""
    program = programs[which]
    tokens = tokens_of()
    signed = saliences(program, tokens)["signed"]
    found = get_score("vector").score(program, axes_of(program), Inputs(calibration=tokens))
    for structure in axes_of(program):
        rows = []
        for parameter, dim in trainable_members(program, structure):
            values = signed(parameter).numpy()
            others = tuple(d for d in range(values.ndim) if d != dim)
            vectors = np.abs(values.sum(axis=others))
            units = owned(program, structure, parameter, dim)
            rows.append([vectors[unit].sum() for unit in units])
        close(found[structure.name], np.array(rows))


def test_layers(programs: dict[str, Program]) -> None:
    program = programs["gqa"]
    tokens = tokens_of()
    (stack,) = (s for s in program.structures if s.role == "layers")
    expected = saliences(program, tokens)
    for name in ("element1", "element2", "element-mix"):
        scores = get_score(name).score(program, [stack], Inputs(calibration=tokens))
        wanted = [sum(float(expected[name](p).sum()) for p in b.parameters) for b in stack.blocks]
        np.testing.assert_allclose(scores[stack.name], [wanted], rtol=1e-3)
    together = [*axes_of(program), stack]
    vector = get_score("vector").score(program, together, Inputs(calibration=tokens))[stack.name]
    for block, found in zip(stack.blocks, vector[0], strict=True):
        signed = [expected["signed"](p) for p in block.parameters]
        rows = [s.flatten(1).sum(1) if s.dim() > 1 else s for s in signed]
        assert found == pytest.approx(sum(float(row.abs().sum()) for row in rows), rel=1e-3)


def test_all_samples_count(programs: dict[str, Program]) -> None:
    """The original code takes its Hessian from the last sample's gradient in some versions."""
    program = programs["gqa"]
    tokens = tokens_of()
    ffn = [next(s for s in program.structures if s.role == "ffn")]
    one = get_score("element2").score(program, ffn, Inputs(tokens))[ffn[0].name]
    turned = get_score("element2").score(program, ffn, Inputs(tokens.flip(0)))[ffn[0].name]
    np.testing.assert_allclose(one, turned, rtol=1e-4)
    parts = [
        get_score("element2").score(program, ffn, Inputs(tokens[i : i + 1]))[ffn[0].name]
        for i in range(len(tokens))
    ]
    np.testing.assert_allclose(one, np.mean(parts, axis=0), rtol=1e-4)
    assert not np.allclose(one, parts[-1], rtol=0.05)
    # Nor is it the square of the mean gradient.
    mean = mean_gradients(program, list(wanted_dims(program, ffn)), batches_of(tokens, 5))
    square = by_loops(program, ffn[0], lambda p: (program.weights[p] * mean[p]).square())
    assert not np.allclose(one, square, rtol=0.05)


def test_tensors_in_a_sequence_are_split_into_samples(programs: dict[str, Program]) -> None:
    program = programs["gqa"]
    tokens = tokens_of()
    ffn = [next(s for s in program.structures if s.role == "ffn")]
    for name in ("element2", "element-mix"):
        score = get_score(name)
        whole = score.score(program, ffn, Inputs(tokens))[ffn[0].name]
        parts = score.score(program, ffn, Inputs([tokens[:2], tokens[2:]]))[ffn[0].name]
        np.testing.assert_allclose(whole, parts, rtol=1e-6)


@pytest.mark.parametrize("name", ["taylor", "element1", "vector"])
def test_the_result_does_not_depend_on_the_batch(programs: dict[str, Program], name: str) -> None:
    program = programs["gqa"]
    tokens = tokens_of()
    structures = axes_of(program)
    one = get_score({"name": name, "batch": 1}).score(program, structures, Inputs(tokens))
    all_ = get_score({"name": name, "batch": 5}).score(program, structures, Inputs(tokens))
    for key, scores in one.items():
        np.testing.assert_allclose(scores, all_[key], rtol=1e-2, atol=1e-4 * scores.max())


def test_eight_heads_of_two_groups_are_scored_by_their_owners(make_llama) -> None:
    """The original folds query head h onto group h mod 2; its owner is h // 4."""
    program = make_llama(hidden=64, heads=8, kv=2, layers=1)
    tokens = tokens_of()
    (groups,) = (s for s in program.structures if s.role == "kv_heads")
    found = get_score("element1").score(program, [groups], Inputs(tokens))[groups.name]
    salience = saliences(program, tokens)["element1"]
    members = trainable_members(program, groups)
    for parameter, dim in members:
        if "q_proj" in parameter or "o_proj" in parameter:
            heads = salience(parameter).movedim(dim, 0).reshape(8, -1).sum(1)
            owner, wrong = np.zeros(2), np.zeros(2)
            for head in range(8):
                owner[head // 4] += float(heads[head])
                wrong[head % 2] += float(heads[head])
            row = found[members.index((parameter, dim))]
            np.testing.assert_allclose(row, owner, rtol=1e-3)
            assert not np.allclose(row, wrong, rtol=1e-3)


class Watched:
    """Counts the gradients that are alive when a new one comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[int] = []
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.names: list[str] = []
        real = gradients_module.backward

        def watching(program, names, batches, loss, take) -> None:
            def counted(name, gradient, share) -> None:
                self.alive.append(sum(one() is not None for one in self.seen))
                self.seen.append(weakref.ref(gradient))
                self.names.append(name)
                take(name, gradient, share)

            real(program, names, batches, loss, counted)

        monkeypatch.setattr(gradients_module, "backward", watching)


@pytest.mark.parametrize(
    ("score", "held"),
    [
        ({"name": "element1", "batch": 5}, 0),
        ({"name": "vector", "batch": 2}, 0),
        ("element2", 0),
        # What is accumulated in place of the first sample's gradient.
        ({"name": "element1", "batch": 2}, 1),
        ("element-mix", 1),
    ],
)
def test_no_gradient_outlives_its_turn(
    programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch, score: Any, held: int
) -> None:
    program = programs["gqa"]
    watched = Watched(monkeypatch)
    ffn = [s for s in axes_of(program) if s.role == "ffn"]
    get_score(score).score(program, ffn, Inputs(tokens_of()))
    wanted = {p for s in ffn for p, _ in s.members}
    assert set(watched.names) == wanted  # layers outside need no gradient
    assert len(watched.names) > len(wanted) or held == 0
    assert max(watched.alive) <= held * len(wanted)


def test_the_gradients_of_a_pass_are_not_alive_together(programs: dict[str, Program]) -> None:
    program = programs["gqa"]
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def take(name: str, gradient: torch.Tensor, share: float) -> None:
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(gradient))
        assert share == 0.5
        assert gradient.shape == program.weights[name].shape

    backward(program, sorted(program.trainable), batches_of(tokens_of(2), 1), None, take)
    assert len(alive) == 2 * len(program.trainable)
    assert max(alive) == 0


def test_a_fisher_that_half_precision_can_not_hold() -> None:
    """Squares of gradients below 2e-4 are zero in float16."""

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(4, 6)
            self.down = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    program = trace(Half().eval().half(), (torch.randn(2, 4, dtype=torch.float16),))
    samples = [torch.randn(1, 4, dtype=torch.float16) for _ in range(4)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(batch).float().sum() * 1e-4

    inner = [s for s in axes_of(program) if s.size == 6]
    mean, fisher = moments(program, ["down.weight"], samples_of(samples), loss)
    assert mean["down.weight"].dtype == fisher["down.weight"].dtype == torch.float32
    assert 0 < float(fisher["down.weight"].max()) < 6e-8
    assert not fisher["down.weight"].half().any()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    up = program.weights["up.weight"].detach().double()
    bias = program.weights["up.bias"].detach().double()
    for x in samples:
        hidden = torch.relu(x.double() @ up.T + bias)
        expected += (hidden[0].detach() * 1e-4).square() / len(samples)
    torch.testing.assert_close(fisher["down.weight"].double(), expected, rtol=5e-2, atol=1e-11)
    scores = get_score("element2").score(program, inner, Inputs(samples, loss))[inner[0].name]
    weight = program.weights["down.weight"].detach().double()
    np.testing.assert_allclose(
        scores[-1], (weight.square() * expected).sum(0), rtol=0.1, atol=1e-11
    )
    assert (scores[-1] > 0).any()


def test_tied_weights_have_the_gradient_of_all_their_uses(make_llama) -> None:
    program = make_llama(layers=1)
    tokens = tokens_of(2)
    name = "model.embed_tokens.weight"
    expected = per_sample(program, tokens)[name].mean(0)
    for module in (program.module, None):
        program.module = module
        found = mean_gradients(program, [name], batches_of(tokens, 2))[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_what_is_missing(programs: dict[str, Program]) -> None:
    program = programs["gqa"]
    ffn = [next(s for s in program.structures if s.role == "ffn")]
    for name in ("element1", "element2", "element-mix", "vector"):
        score = get_score(name)
        with pytest.raises(PlanError, match=f"score {name} needs calibration"):
            score.score(program, ffn, Inputs())
        with pytest.raises(PlanError, match="no calibration data"):
            score.score(program, ffn, Inputs([]))
        with pytest.raises(PlanError, match="depend on the weights"):
            score.score(program, ffn, Inputs([1], lambda m, b: torch.ones(())))
    for name in ("element1", "vector", "taylor"):
        with pytest.raises(PlanError, match="at least one window"):
            get_score({"name": name, "batch": 0})


def test_a_gradient_that_is_not_finite_names_its_parameter(make_mlp) -> None:
    program = make_mlp()
    inner = [s for s in axes_of(program) if s.size == 8]
    batch = torch.ones(1, 5)

    def loss(model: Any, x: Any) -> torch.Tensor:
        # The root has no slope at zero.
        return (model(x) * 0).sum().sqrt()

    for name in ("element1", "element2", "element-mix", "vector"):
        with pytest.raises(PlanError, match="not a finite number") as caught:
            get_score(name).score(program, inner, Inputs([batch], loss))
        assert str(caught.value.where).startswith("parameter ")
