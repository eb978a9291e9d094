"""Scores against float64 loops over the elements that each unit owns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from brute_force import by_loops, trainable_members
from graphprune import registry
from graphprune.analysis.structure import Structure
from graphprune.axes import Atom
from graphprune.errors import PlanError
from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program
from graphprune.passes.scores import SCORES, get_score
from graphprune.passes.scores.llm_pruner import Element1, ElementMix
from graphprune.passes.scores.magnitude import Magnitude
from graphprune.passes.scores.random_score import Random
from graphprune.passes.scores.taylor import Taylor
from graphprune.passes.selection.rank import rank
from graphprune.passes.selection.select import select
from graphprune.passes.shared import reduce
from graphprune.passes.shared.gradients import mean_gradients
from graphprune.passes.shared.reduce import marginals
from graphprune.passes.shared.score import Inputs


def of_role(program: Program, role: str) -> Structure:
    return next(s for s in program.structures if s.role == role)


@pytest.mark.parametrize(
    "shape", [(), (7,), (6, 5), (1, 9), (9, 1), (8, 3, 2, 2), (4, 6, 5), (3, 2, 2, 7)]
)
@pytest.mark.parametrize("piece", [1, 11, 1 << 18])
def test_marginals(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "PIECE", piece)
    tensor = torch.randn(shape)
    found = marginals((tensor,), torch.square, range(max(1, len(shape))))
    for dim, total in found.items():
        squares = tensor.double().numpy().reshape(shape or (1,)) ** 2
        others = tuple(d for d in range(squares.ndim) if d != dim)
        np.testing.assert_allclose(total, squares.sum(axis=others), rtol=1e-6)
        assert total.dtype == np.float64


def test_marginals_of_other_dtypes_and_layouts() -> None:
    half = torch.full((3, 300), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert marginals((half,), torch.square, [0])[0].tolist() == [300**3] * 3
    turned = torch.randn(4, 6).t()
    expected = turned.abs().double().sum(0).numpy()
    np.testing.assert_allclose(marginals((turned,), torch.abs, [1])[1], expected, rtol=1e-6)
    double = torch.tensor([[1.0, 1e-12]], dtype=torch.float64)
    assert marginals((double,), torch.abs, [0])[0][0] == 1.0 + 1e-12


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("which", ["gqa", "convs"])
def test_magnitude(norm: Literal["l1", "l2"], which: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(which)
    structures = [s for s in program.structures if s.prunable and not s.blocks]
    assert structures
    scores = Magnitude(norm).score(program, structures, Inputs())
    power = 1 if norm == "l1" else 2
    for structure in structures:
        expected = by_loops(
            program, structure, lambda p: program.weights[p].double().abs() ** power
        )
        found = scores[structure.name]
        assert found.shape[-1] == structure.size
        np.testing.assert_allclose(found.reshape(len(found), -1), expected, rtol=1e-5)


def test_buffers_do_not_count(convs: Program) -> None:
    stem = next(s for s in convs.structures if ("norm.running_mean", 0) in s.members)
    counted = [p for p, _ in stem.members if p in convs.trainable]
    assert len(counted) < len(stem.members)
    assert len(Magnitude().score(convs, [stem], Inputs())[stem.name]) == len(counted)


def test_a_layer_is_the_sum_over_its_parameters(gqa: Program) -> None:
    stack = of_role(gqa, "layers")
    found = Magnitude("l1").score(gqa, [stack], Inputs())[stack.name]
    expected = [
        sum(float(gqa.weights[p].detach().double().abs().sum()) for p in b.parameters)
        for b in stack.blocks
    ]
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_a_key_value_head_is_scored_with_its_own_query_heads(gqa: Program) -> None:
    """LLM-Pruner folds query head h onto key-value head h % kv; its owner is h // rep."""
    heads = of_role(gqa, "kv_heads")
    members = trainable_members(gqa, heads)
    row = members.index(("model.layers.0.self_attn.q_proj.weight", 0))
    found = Magnitude().score(gqa, [heads], Inputs())[heads.name][row]
    per_query = (
        gqa.weights[members[row][0]].detach().double().square().reshape(6, 8, -1).sum((1, 2))
    )
    np.testing.assert_allclose(found, per_query.view(2, 3).sum(1), rtol=1e-6)
    folded = per_query.view(3, 2).sum(0)
    assert not np.allclose(found, folded, rtol=1e-6)


def test_tied_weights_count_once(make_llama) -> None:
    tied, untied = make_llama(layers=2), make_llama(layers=2, tied=False)
    rows = [
        len(Magnitude().score(p, [of_role(p, "hidden")], Inputs())[of_role(p, "hidden").name])
        for p in (tied, untied)
    ]
    assert rows[0] == rows[1] - 1


def test_only_parameters_of_the_given_structures_are_read_and_each_once(gqa: Program) -> None:
    class Counting(dict):
        reads: list[str] = []  # noqa: RUF012

        def __getitem__(self, name):
            self.reads.append(name)
            return super().__getitem__(name)

    program = Program(
        **{
            f: getattr(gqa, f)
            for f in (
                "exported",
                "module",
                "aliases",
                "typing",
                "structures",
                "example",
                "trainable",
            )
        },
        weights=Counting(gqa.weights),
    )
    chosen = [s for s in gqa.structures if s.role in ("ffn", "kv_heads") and ".0." in s.name]
    Magnitude().score(program, chosen, Inputs())
    expected = {p for s in chosen for p, _ in s.members if p in gqa.trainable}
    assert sorted(Counting.reads) == sorted(expected)


def test_nan_is_an_error_that_names_the_parameter(make_mlp) -> None:
    weight = torch.ones(8, 5)
    weight[3, 2] = math.nan
    program = make_mlp(up_weight=weight)
    with pytest.raises(PlanError, match="NaN") as caught:
        Magnitude().score(program, [s for s in program.structures if s.prunable], Inputs())
    assert caught.value.where == "parameter up.weight"


def test_random_depends_on_the_seed_and_on_nothing_else(gqa: Program) -> None:
    structures = [s for s in gqa.structures if s.prunable]
    one = Random().score(gqa, structures, Inputs(seed=1))
    assert Random(seed=1).score(gqa, structures[::-1], Inputs(seed=5)).keys() == one.keys()
    for name, scores in Random(seed=1).score(gqa, structures[::-1], Inputs(seed=5)).items():
        assert np.array_equal(scores, one[name])
    other = Random().score(gqa, structures, Inputs(seed=2))
    assert not any(np.array_equal(other[name], one[name]) for name in one)


def reference_gradients(program: Program, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean next-token loss of all windows at once."""
    model = program.module
    assert model is not None
    model.zero_grad()
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("from_graph", [False, True])
def test_taylor(make_llama, from_graph: bool) -> None:
    program = make_llama(layers=2)
    tokens = torch.randint(0, 96, (5, 9))
    gradients = reference_gradients(program, tokens)
    before = {n: (p.requires_grad, p.clone()) for n, p in program.module.named_parameters()}
    if from_graph:
        module, program.module = program.module, None
    structures = [s for s in program.structures if s.prunable and not s.blocks]
    scores = Taylor(batch=2).score(program, structures, Inputs(calibration=tokens))
    for structure in structures:
        expected = by_loops(program, structure, lambda p: program.weights[p] * gradients[p])
        absolute = by_loops(program, structure, lambda p: (program.weights[p] * gradients[p]).abs())
        assert not np.allclose(expected, absolute)
        found = scores[structure.name]
        np.testing.assert_allclose(found.reshape(len(found), -1), absolute, rtol=2e-3, atol=1e-9)
    for name, parameter in (module if from_graph else program.module).named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_taylor_with_a_loss_of_ones_own(make_mlp) -> None:
    program = make_mlp(up_weight=torch.arange(40.0).view(8, 5))
    batches = [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(3)]

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    found = mean_gradients(program, {"up.weight"}, [(b, 1) for b in batches], loss)
    sum(loss(program.module, b) for b in batches).div(3).backward()
    torch.testing.assert_close(found["up.weight"], program.module.up.weight.grad)
    structure = next(s for s in program.structures if s.prunable)
    scores = Taylor().score(program, [structure], Inputs(batches, loss))[structure.name]
    row = trainable_members(program, structure).index(("up.weight", 0))
    expected = (program.module.up.weight * program.module.up.weight.grad).abs().sum(1)
    np.testing.assert_allclose(scores[row], expected.detach(), rtol=1e-5)


def test_taylor_says_what_is_missing(gqa: Program, make_mlp) -> None:
    ffn = [of_role(gqa, "ffn")]
    with pytest.raises(PlanError, match="needs calibration"):
        Taylor().score(gqa, ffn, Inputs())
    with pytest.raises(PlanError, match="no calibration data"):
        Taylor().score(gqa, ffn, Inputs(calibration=[]))
    with pytest.raises(PlanError, match="not a batch of token windows"):
        Taylor().score(gqa, ffn, Inputs(calibration=torch.randn(2, 4)))
    with pytest.raises(PlanError, match="not a scalar"):
        Taylor().score(gqa, ffn, Inputs([1], lambda m, b: torch.ones(2)))
    with pytest.raises(PlanError, match="not a finite number"):
        Taylor().score(gqa, ffn, Inputs([1], lambda m, b: torch.tensor(math.nan)))
    program = make_mlp()
    with pytest.raises(PlanError, match="determine all inputs"):
        Taylor().score(
            program,
            [s for s in program.structures if s.prunable],
            Inputs(calibration=torch.zeros(2, 5, dtype=torch.long)),
        )
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).eval()
        empty = trace(model, (torch.zeros(2, 3),))
    with pytest.raises(PlanError, match="gradients need weights"):
        Taylor().score(
            empty,
            [s for s in empty.structures if s.prunable],
            Inputs([1], lambda m, b: m(torch.zeros(2, 3)).sum()),
        )


def structure_of(size: int) -> Structure:
    return Structure("s", "ffn", size, (), True, None, 0, 0, atom=Atom(size))


@pytest.mark.parametrize(
    ("aggregate", "price"),
    [
        ("sum", [6, 9, 11]),
        ("mean", [3, 4.5, 5.5]),
        ("max", [3, 6, 10]),
        ("prod", [9, 10, 18]),
        ("last", [3, 6, 10]),
    ],
)
def test_aggregates(aggregate: str, price: list[float]) -> None:
    scores = np.array([[1.0, 3.0, 3.0], [10.0, 6.0, 3.0]])
    ranked = rank(structure_of(3), scores, aggregate=aggregate, normalize="none")
    expected = np.sqrt(price) if aggregate == "prod" else price
    np.testing.assert_allclose(ranked.price, expected)


def test_the_product_of_many_members_does_not_overflow() -> None:
    scores = np.full((400, 2), 1e10)
    scores[0, 0] = 0.5e10
    assert rank(structure_of(2), scores, aggregate="prod").order.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("normalize", "price"),
    [
        ("none", [1, 2, 6]),
        ("mean", [1 / 3, 2 / 3, 2]),
        ("max", [1 / 6, 1 / 3, 1]),
        ("sum", [1 / 9, 2 / 9, 6 / 9]),
    ],
)
def test_normalisation(normalize: str, price: list[float]) -> None:
    ranked = rank(structure_of(3), np.array([[2.0, 6.0, 1.0]]), normalize=normalize)
    np.testing.assert_allclose(ranked.price, price)
    assert ranked.order.tolist() == [2, 0, 1]


def test_negative_scores_are_never_divided() -> None:
    """Divided by a mean just below zero, the most important units would go first."""
    scores = np.array([[-1.5, 0.5, 0.9]])
    for normalize in ("none", "mean", "max", "sum"):
        ranked = rank(structure_of(3), scores, normalize=normalize)
        assert ranked.order.tolist() == [0, 1, 2]
        assert ranked.price.tolist() == [-1.5, 0.5, 0.9]
    with pytest.raises(PlanError, match="below zero"):
        rank(structure_of(3), scores, aggregate="prod")


def test_the_last_member_is_the_one_that_the_graph_reads_last() -> None:
    """Not the one that was defined last, nor the last by name."""

    class Backwards(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Linear(6, 3)
            self.up = torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    program = trace(Backwards().eval(), (torch.randn(2, 4),))
    (inner,) = (s for s in program.structures if s.prunable and s.size == 6)
    assert inner.members[0] == ("down.weight", 1)
    scores = Magnitude().score(program, [inner], Inputs())[inner.name]
    down = program.weights["down.weight"].detach().double().square().sum(0)
    assert len(scores) == 3
    np.testing.assert_allclose(scores[-1], down, rtol=1e-6)
    plan = select(program, shape={inner.role: 2}, aggregate="last")
    assert plan.kept_units[inner.name] == tuple(sorted(down.topk(2).indices.tolist()))


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("element-mix", "element1", "element2", "flap", "magnitude", "minitron", "random",
            "taylor", "vector", "wanda-sp")  # fmt: skip
    assert set(ours) <= set(SCORES.names())
    assert list(SCORES.names()) == sorted(SCORES.names())
    assert [type(get_score(name)).__name__.lower() for name in ours] == [
        name.replace("-", "") for name in ours
    ]
    assert get_score("element-mix") == ElementMix()
    assert get_score({"name": "element1", "batch": 2}) == Element1(2)
    assert get_score("magnitude") == Magnitude("l2")
    assert get_score({"name": "magnitude", "norm": "l1"}) == Magnitude("l1")
    assert get_score({"name": "magnitude", "norm": None}) == Magnitude()
    mine = Random(seed=3)
    assert get_score(mine) is mine
    with pytest.raises(PlanError, match="did you mean 'magnitude'"):
        get_score("magnitud")
    with pytest.raises(PlanError, match="no option 'norm'"):
        get_score({"name": "random", "norm": "l1"})
    with pytest.raises(PlanError, match="norm"):
        get_score({"name": "magnitude", "norm": "l3"})


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Mine:
        power: int = 2

        def score(self, program: Any, structures: Any, inputs: Any) -> dict[str, Any]:
            return {}

    def broken() -> None:
        raise ImportError("no module named x")

    points = [
        SimpleNamespace(name="mine", value="a:Mine", load=lambda: Mine),
        SimpleNamespace(name="broken", value="b:B", load=broken),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert get_score({"name": "mine", "power": 3}) == Mine(3)
    assert "mine" in SCORES.names()
    with pytest.raises(PlanError, match="can't be loaded"):
        get_score("broken")
    points.append(SimpleNamespace(name="taylor", value="c:C", load=lambda: Mine))
    with pytest.raises(PlanError, match="two scores are named 'taylor'"):
        get_score("magnitude")
