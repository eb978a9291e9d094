"""Options, learning rates and the order of samples."""

import pytest

from graphprune.errors import RecipeError
from graphprune.passes.turn import Round
from graphprune.recipe.recipe import Recipe
from graphprune.training import LLM_PRUNER, Training
from graphprune.training.core.order import Order, permutation


@pytest.mark.parametrize(
    ("step", "factor"),
    # min(1, (s + 1)/3) * (.1 + .9 (1 + cos(pi s/32))/2)
    [(0, 0.333333), (1, 0.665222), (2, 0.991353), (3, 0.980623), (16, 0.55), (31, 0.102167)],
)
def test_learning_rate(step, factor):
    assert Training(lr=2.0).rate(step, 32) == pytest.approx(2 * factor, abs=2e-6)


def test_default_learning_rates():
    assert Training().rate(3, 32) == pytest.approx(2e-4 * 0.980623, rel=1e-5)
    assert Training(train="lora").rate(3, 32) == pytest.approx(1e-3 * 0.980623, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "ful"},
            "training option 'train': input should be 'full', 'norms', 'lora' or 'frozen'",
        ),
        ({"batch": 0}, "training option 'batch': input should be greater than or equal to 1"),
        ({"lr": float("nan")}, "training option 'lr'"),
        ({"steps": 1, "tokens": 5}, "one of them only"),
        ({"also": ("biases",)}, "beside adapters, not with full"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RecipeError, match=message):
        Training(**options)


def test_published_settings():
    """Adapters of rank 8, alpha 16, dropout .05; 1e-4, 64 samples a step in fours, two passes."""
    assert (LLM_PRUNER.rank, LLM_PRUNER.alpha, LLM_PRUNER.dropout) == (8, 16.0, 0.05)
    assert (LLM_PRUNER.batch, LLM_PRUNER.micro_batch, LLM_PRUNER.epochs) == (64, 4, 2)
    assert LLM_PRUNER.rate(99, 1556) == pytest.approx(1e-4, rel=0.02)
    assert LLM_PRUNER.rate(49, 1556) == pytest.approx(5e-5, rel=0.01)
    assert LLM_PRUNER.rate(828, 1556) == pytest.approx(5e-5, rel=0.01)  # halfway down a line
    assert LLM_PRUNER.rate(1555, 1556) == pytest.approx(1e-4 / 1456, rel=0.01)
    assert LLM_PRUNER.loss == "ce"


def test_a_preset_in_a_recipe():
    whole = {"train": "lora", "loss": "ce", "batch": 64, "micro_batch": 4, "lr": 1e-4,
             "falling": "linear", "final": 0.0, "warmup": 100 / 1556}  # fmt: skip
    cut = {"remove": {"ffn": 0.5}}
    assert Recipe.parse({**cut, "recover": "llm-pruner"}).recover == {**whole, "epochs": 2}
    given = {"preset": "llm-pruner", "tokens": 640, "batch": 8}
    expected = {**whole, "tokens": 640, "batch": 8}
    assert Recipe.parse({**cut, "recover": given}).recover == expected
    for step in ({"recover": given}, {"repeat": {"rounds": 1, "steps": [{"recover": given}]}}):
        (one,) = Recipe.parse({"steps": [step]}).passes
        assert one.options == expected
    with pytest.raises(RecipeError, match="did you mean 'llm-pruner'"):
        Recipe.parse({**cut, "recover": "llm-prune"})


def test_options_from_a_recipe():
    assert Training(include=["*.weight"], lr=1).include == ("*.weight",)


def test_a_last_group_that_is_not_full_is_a_step_too():
    """100 samples, 16 a step: 7 steps, of 16, ..., 16 and 4, and none is left over."""
    order = Order(count=100, total=100, batch=16, seed=0)
    groups = [order.samples(step) for step in range(order.steps)]
    assert [len(g) for g in groups] == [16] * 6 + [4]
    assert sorted(n for g in groups for n in g) == list(range(100))


def test_every_pass_has_an_order_of_its_own():
    order = Order(count=10, total=30, batch=4, seed=3)
    seen = [n for step in range(order.steps) for n in order.samples(step)]
    passes = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert permutation(10, 3, 0) != permutation(10, 4, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_processes_share_the_samples_of_a_step(world, size):
    order = Order(count=20, total=20, batch=8, seed=0)
    for step in range(order.steps):
        shares = [order.share(step, rank, world, size) for rank in range(world)]
        assert len({len(s) for s in shares}) == 1  # as many micro-batches each
        assert [n for s in shares for m in s for n in m] == order.samples(step)


def test_parts_of_a_run_see_what_the_whole_sees():
    whole = Order(count=10, total=31, batch=4, seed=3)
    parts = [whole.part(*ends) for ends in ((0, 0.25), (0.25, 0.5), (0.5, 1))]
    assert [part.steps for part in parts] == [2, 2, 4]
    assert sum(part.seen for part in parts) == whole.seen == 31
    seen = [part.samples(step) for part in parts for step in range(part.steps)]
    assert seen == [whole.samples(step) for step in range(whole.steps)]


@pytest.mark.parametrize(
    ("turn", "part"),
    [
        (Round(), (0.0, 1.0)),
        (Round(1, 3), (0.0, 0.25)),
        (Round(2, 3), (0.25, 0.5)),
        (Round(3, 3), (0.5, 1.0)),
        (Round(2, 2), (0.5, 1.0)),
        (Round(2, 3, given=True), (0.0, 1.0)),
    ],
)
def test_the_last_turn_has_half_of_the_training(turn, part):
    assert turn.part == part
