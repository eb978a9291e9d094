"""Shares of domains by numbers that were worked out by hand and with the original code."""

import json
import math

import pytest
import torch

from graphprune.errors import TrainingError
from graphprune.training import Saving, Training, recover
from graphprune.training.domains.order import DomainOrder
from graphprune.training.domains.reference import reference_losses
from graphprune.training.domains.scaling import extrapolated
from graphprune.training.domains.shares import updated
from graphprune.training.dynamic import DynamicBatches
from training import workers
from training.gloo import together
from training.nets import program

SHARES, LOSSES, AIMS = [0.5, 0.3, 0.2], [2.0, 3.0, 1.5], [1.8, 2.5, 1.9]


def near(*values):
    return pytest.approx(values, abs=1e-5)


def test_the_papers_rule():
    once = updated(SHARES, LOSSES, AIMS)
    assert once == near(0.467856, 0.378924, 0.153219)
    assert updated(once, LOSSES, AIMS) == near(0.423478, 0.462976, 0.113546)
    assert updated(SHARES, AIMS, AIMS) == SHARES
    assert updated([0.6, 0.4, 0.0], LOSSES, AIMS)[2] == 0


def test_the_codes_rule():
    once = updated(SHARES, LOSSES, AIMS, rule="code")
    assert once == near(0.492731, 0.399077, 0.108193)
    assert updated(once, LOSSES, AIMS, rule="code") == near(0.451701, 0.493837, 0.054462)
    assert updated(SHARES, AIMS, AIMS, rule="code") == near(0.499983, 0.300003, 0.200013)
    assert updated([0.6, 0.4, 0.0], LOSSES, AIMS, rule="code") == near(0.526323, 0.473644, 3.3e-5)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_a_domain_whose_loss_is_no_number_keeps_its_share(rule):
    found = updated(SHARES, [2.0, math.nan, 1.5], AIMS, rule=rule)
    assert found[1] == 0.3
    assert sum(found) == pytest.approx(1)
    assert found[0] > 0.5


def test_a_floor_keeps_a_constant_gap_from_taking_everything():
    shares, floored = SHARES, SHARES
    for update in range(1, 21):
        shares = updated(shares, [0.2, 0, 0], [0, 0, 0], rule="code")
        floored = updated(floored, [0.2, 0, 0], [0, 0, 0], floor=0.1)
        if update in (1, 5, 10, 20):
            right = {1: 0.549812, 5: 0.730921, 10: 0.880529, 20: 0.981657}[update]
            assert shares[0] == pytest.approx(right, abs=1e-5)
    assert min(floored) >= 0.1
    assert sum(floored) == pytest.approx(1)
    assert updated([0.6, 0.4, 0.0], LOSSES, AIMS, floor=0.1)[2] == pytest.approx(0.1)


def test_a_scaling_law_is_found_again():
    sizes = [7e9, 13e9, 70e9]
    losses = [406.4 / n**0.336 + 0.69 for n in sizes]
    right = 406.4 / 1.3e9**0.336 + 0.69
    assert extrapolated(sizes, losses, 1.3e9) == pytest.approx(right, rel=1e-4)
    with pytest.raises(TrainingError, match="three sizes"):
        extrapolated(sizes[:2], losses[:2], 1.3e9)


def order(shares, sizes, exhausted="repeat", batch=4, total=400):
    return DomainOrder(
        sum(sizes), total, batch, 0, names=("a", "b"), sizes=sizes,
        shares=torch.tensor(shares, dtype=torch.float64),
        seen_of=torch.zeros(2, dtype=torch.int64), exhausted=exhausted,
    )  # fmt: skip


def test_samples_come_in_the_shares_each_once_before_any_comes_again():
    drawn = order([0.75, 0.25], (1000, 1000))
    seen = []
    for step in range(100):
        assert drawn.samples(step) == drawn.samples(step)
        seen += drawn.samples(step)
        drawn.advance(step)
    assert len(set(seen)) == 400
    assert sum(n < 1000 for n in seen) == pytest.approx(300, abs=30)
    assert int(drawn.seen_of.sum()) == 400


@pytest.mark.parametrize("world", [1, 2])
def test_a_domain_of_ten_samples_is_repeated_on_any_number_of_processes(world):
    drawn = order([1.0, 0.0], (10, 5))
    for step in range(10):
        parts = [drawn.share(step, rank, world, 1) for rank in range(world)]
        together = [n for rank in parts for micro in rank for n in micro]
        assert sorted(together) == sorted(drawn.samples(step))
        assert all(n < 10 for n in together)
        drawn.advance(step)


def test_other_policies_for_a_domain_that_is_exhausted():
    drawn = order([0.9, 0.1], (3, 50), "renormalise")
    for step in range(3):
        drawn.advance(step)
    assert drawn.seen_of.tolist() == [3, 9]
    drawn = order([0.9, 0.1], (3, 50), "stop")
    drawn.seen_of[0] = 3
    with pytest.raises(TrainingError, match="domain a"):
        drawn.samples(0)


def batches(**options):
    generator = torch.Generator().manual_seed(5)
    domains = {
        "low": torch.randint(0, 20, (12, 6), generator=generator),
        "high": torch.randint(20, 40, (12, 6), generator=generator),
    }
    held_out = {name: windows[:4] for name, windows in domains.items()}
    return DynamicBatches(domains, held_out, every=2, **options)


def train(beside, **given):
    options = Training(steps=6, batch=4, lr=1e-2, precision="float32")
    return recover(program(), beside.data, options, callbacks=(beside,), **given)


def test_shares_follow_losses_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def stop(now):
        if now.step == 3:
            raise Stopped

    aims = {"low": 1.0, "high": 100.0}
    whole = batches(reference=aims)
    found = train(whole)
    assert [m.step for m in whole.history] == [2, 4, 6]
    assert whole.history[-1].shares["low"] > 0.9
    right = updated([0.5, 0.5], list(whole.history[0].losses.values()), [1.0, 100.0])
    assert list(whole.history[0].shares.values()) == right
    with pytest.raises(Stopped):
        train(batches(reference=aims), state=Saving(tmp_path / "s", every=1), progress=stop)
    again = train(batches(reference=aims), state=Saving(tmp_path / "s", resume=True))
    assert again.losses == found.losses
    for name, weight in found.weights.items():
        assert torch.equal(weight, again.weights[name])


def test_the_models_own_losses_are_a_reference():
    still = batches()
    recover(
        program(), still.data, Training(steps=2, batch=4, lr=0.0, precision="float32"),
        callbacks=(still,),
    )  # fmt: skip
    assert list(still.history[0].shares.values()) == [0.5, 0.5]


def test_the_losses_of_another_model_are_a_reference():
    still = batches(reference=program())
    train(still)
    alone = batches()
    train(alone)
    assert still.aims == pytest.approx(alone.aims, rel=1e-6)


def test_what_was_measured_is_there_after_an_interruption(tmp_path):
    whole = batches()
    train(whole)

    class Stopped(Exception):
        pass

    def stop(now):
        if now.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        train(batches(), state=Saving(tmp_path, every=1), progress=stop)
    again = batches()
    train(again, state=Saving(tmp_path, resume=True))
    assert again.history == whole.history
    assert again.repeated == whole.repeated


@pytest.mark.parametrize("exhausted", ["repeat", "renormalise"])
def test_two_processes_deal_as_one_does(tmp_path, exhausted):
    right = workers.dealt(exhausted)
    together(workers.deal_together, tmp_path, exhausted)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == right.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, right[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("form", ["mapping", "list", "file", "law"])
def test_reference_losses_in_every_form(tmp_path, form):
    given = {"b": 3.0, "a": 2.0, "c": 9.0}
    if form == "list":
        given = [2.0, 3.0]
    if form == "file":
        (tmp_path / "losses.json").write_text(json.dumps(given))
        given = tmp_path / "losses.json"
    if form == "law":
        sizes = [7e9, 13e9, 70e9]
        fits = {"a": (406.4, 0.336, 0.69), "b": (300.0, 0.3, 1.1)}
        given = {"sizes": sizes, "losses": {
            name: [a / n**b + c for n in sizes] for name, (a, b, c) in fits.items()
        }}  # fmt: skip
        right = [a / 1.3e9**b + c for a, b, c in fits.values()]
        found = reference_losses(given, ("a", "b"), 1_300_000_000)
        assert found == pytest.approx(right, rel=1e-4)
        with pytest.raises(TrainingError, match="size of the model"):
            reference_losses(given, ("a", "b"))
        return
    assert reference_losses(given, ("a", "b")) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"a": 1.0}, "missing: b"),
        ([1.0], "missing: a, b"),
        ({"a": 1.0, "b": "high"}, "'high' is no number"),
        ({"a": 1.0, "b": True}, "True is no number"),
        ({"a": 1.0, "b": math.inf}, "inf is no number"),
        ({"sizes": [1, 2], "losses": {"a": [1, 2], "b": [1, 2]}}, "three sizes"),
        ({"sizes": [1, 2, 3], "losses": {"a": [1, 2, 3]}}, "missing: b"),
    ],
)
def test_reference_losses_that_are_none(given, told):
    with pytest.raises(TrainingError, match=told):
        reference_losses(given, ("a", "b"), 10)


def test_a_missing_reference_and_wrong_data_are_refused():
    with pytest.raises(TrainingError, match="reference loss"):
        train(batches(reference={"low": 1.0}))
    with pytest.raises(TrainingError, match="other names"):
        batches(shares={"low": 1.0})
    one = batches()
    with pytest.raises(TrainingError, match="something else"):
        recover(program(), one.data[:20], Training(steps=1, batch=4), callbacks=(one,))
