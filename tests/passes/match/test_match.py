"""Blocks trained on the dense stream, judged by plain modules and by least squares."""

from __future__ import annotations

import copy

import pytest
import torch

import graphprune as gp
from graphprune.errors import PlanError, RecipeError
from graphprune.passes.match import BlockStep, Match, masks_of, match
from graphprune.streaming import apply_weights
from passes.match.models import WIDTH, Net, Straight, halves, net, relative, windows

JUDGES = {4, 12}  # of sixteen samples


def masked(program, sparsity=0.5):
    """The program without some of the smallest weights of each matrix, and the masks."""
    new = {}
    for name in sorted(program.trainable):
        weight = program.weights[name].detach()
        if weight.dim() == 2 and name.startswith("layers"):
            small = weight.abs() <= weight.abs().flatten().float().quantile(sparsity)
            new[name] = weight.masked_fill(small, 0)
    changed = apply_weights(program, new)
    return changed, masks_of(changed, new)


def loaded(program) -> Net:
    """A module with the weights of a program."""
    module = copy.deepcopy(program.module)
    module.load_state_dict({n: program.weights[n] for n in module.state_dict()})
    return module


@pytest.fixture(scope="module")
def dense():
    return gp.trace(net(), (windows(1)[0],))


def test_samples_that_judge_lie_evenly_between_the_others():
    assert Match().judges(16) == JUDGES
    assert Match().judges(64) == {4, 12, 20, 28, 36, 44, 52, 60}
    assert Match().judges(2) == {1}
    assert Match(held_out=0.9).judges(3) == {0, 2}


def test_one_matrix_becomes_what_least_squares_says():
    """One window trains and one judges, so that every step sees the whole problem."""
    module = net(Straight, 2).double()
    mixed = [x.double() for x in windows(2, 40)]
    data = [x + 0.8 * x.roll(1, -1) for x in mixed]  # columns tell of their neighbours
    program = gp.trace(module, (data[0],))
    name = "layers.0.map.weight"
    weight = program.weights[name].detach()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 1] = mask[2:, 4] = False
    student = apply_weights(program, {name: weight.masked_fill(~mask, 0)})
    options = Match(lr=0.05, epochs=250, weigh="none")
    found = match(program, student, data, masks={name: mask}, options=options, dtype=torch.float64)
    x = data[0][0]
    wanted = torch.zeros_like(weight)
    for row in range(WIDTH):
        kept = mask[row].nonzero().squeeze(1)
        wanted[row, kept] = torch.linalg.lstsq(x[:, kept], (x @ weight[row])[:, None]).solution[
            :, 0
        ]
    assert found.blocks[0].stays
    torch.testing.assert_close(found.program.weights[name], wanted, atol=1e-5, rtol=0)


def test_errors_are_those_of_the_plain_modules(dense):
    """Every block is wanted to compute the dense stream, from what the model gives it by then."""
    student, masks = masked(dense)
    data = windows()
    found = match(dense, student, data, masks=masks, options=Match(lr=1e-2))
    before, after, module = loaded(student), loaded(found.program), dense.module
    judging = [data[i] for i in sorted(JUDGES)]
    for i, block in enumerate(found.blocks):
        wanted = [module.stream(x, i + 1) for x in judging]
        assert block.path == f"layers.{i}"
        given = [after.stream(x, i) for x in judging]
        own = relative([before.layers[i](x) for x in given], wanted)
        assert block.before == pytest.approx(own, rel=1e-5)
        learnt = relative([after.layers[i](x) for x in given], wanted)
        assert block.error == pytest.approx(learnt, rel=1e-5)
        assert block.stays
        assert block.after < 0.8 * block.before
    fresh = [torch.randn(1, 30, WIDTH, generator=torch.Generator().manual_seed(9))]
    ends = [module.stream(x) for x in fresh]
    assert relative([after.stream(x) for x in fresh], ends) < 0.5 * relative(
        [before.stream(x) for x in fresh], ends
    )


def test_what_equals_the_dense_model_stays_as_it_is(dense):
    found = match(dense, dense, windows(), options=Match(lr=1e-2))
    assert [(b.before, b.after, b.stays) for b in found.blocks] == [(0.0, 0.0, False)] * 3
    for name in dense.trainable:
        assert torch.equal(found.program.weights[name], dense.weights[name])


def test_what_makes_held_out_samples_worse_is_not_kept(dense):
    student, masks = masked(dense)
    found = match(dense, student, windows(), masks=masks, options=Match(lr=0.9))
    assert [b.stays for b in found.blocks] == [False] * 3
    assert all(b.after > b.before == b.error for b in found.blocks)
    for name in dense.trainable:
        assert torch.equal(found.program.weights[name], student.weights[name])


def test_nothing_changes_without_steps(dense):
    student, masks = masked(dense)
    for options in (Match(lr=0), Match(epochs=0)):
        found = match(dense, student, windows(), masks=masks, options=options)
        assert not any(b.stays for b in found.blocks)
        for name in dense.trainable:
            assert torch.equal(found.program.weights[name], student.weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero_to_the_bit_and_kept_zeros_may_grow(dtype):
    module = net().to(dtype)
    data = [x.to(dtype) for x in windows()]
    program = gp.trace(module, (data[0],))
    student, masks = masked(program)
    name = "layers.1.down.weight"
    kept = masks[name].clone()
    kept[:, 3] = True  # zero in part, and not held
    masks[name] = kept
    found = match(program, student, data, masks=masks, options=Match(lr=1e-2))
    for one, mask in masks.items():
        weight = found.program.weights[one]
        assert weight.dtype == dtype
        bits = weight[~mask].view(torch.uint8)
        assert len(bits)
        assert not bits.any()
        assert not torch.equal(weight, student.weights[one])
    assert found.program.weights[name][:, 3].count_nonzero() > WIDTH // 2


def test_runs_are_alike_under_one_seed(dense):
    student, masks = masked(dense)
    data = windows()

    def run(**options):
        chosen = Match(lr=1e-2, **options)
        found = match(dense, student, data, masks=masks, options=chosen).program
        return torch.cat([found.weights[n].flatten() for n in sorted(dense.trainable)])

    first = run()
    assert torch.equal(first, run())
    assert not torch.equal(first, run(seed=1))
    assert not torch.equal(first, run(held="bfloat16"))
    torch.testing.assert_close(first, run(held="bfloat16"), atol=0.05, rtol=0)


def test_removed_units_and_layers(dense):
    """A layer behind a removed one makes up for it; the last ones are made up for by the last."""
    stack = {"layers": (0, 2)}
    whole = halves(dense)
    plan = gp.Plan(dense.fingerprint, {**whole.kept_units, **stack}, {**whole.sizes, "layers": 3})
    check_layers(dense, plan, {0: 1, 2: 3})
    plan = gp.Plan(dense.fingerprint, {"layers": (0, 1)}, {"layers": 3})
    check_layers(dense, plan, {0: 1, 1: 3})


def check_layers(dense, plan, wanted):
    """Match, and compare with streams of the dense module after `wanted` layers."""
    data, module = windows(), dense.module
    found = match(dense, dense, data, plan, options=Match(lr=1e-2))
    assert [b.path for b in found.blocks] == [f"layers.{i}" for i in wanted]
    slim = gp.apply(found.program, plan)
    assert gp.verify(found.program, plan, slim).passed
    judging = [data[i] for i in sorted(JUDGES)]
    for i, (block, after) in enumerate(zip(found.blocks, wanted.values(), strict=True)):
        ends = [module.stream(x, after) for x in judging]
        own = relative([slim.module.stream(x, i + 1) for x in judging], ends)
        assert block.error == pytest.approx(own, rel=1e-5)
    assert found.blocks[-1].after < 0.9 * found.blocks[-1].before
    for name in dense.trainable:  # what goes is as it was
        for dim, kept in enumerate(plan.kept(dense)[name]):
            rows = [i for i in range(dense.parameters[name][dim]) if i not in kept]
            old, new = (p.weights[name].index_select(dim, torch.tensor(rows, dtype=torch.int64))
                        for p in (dense, found.program))  # fmt: skip
            assert torch.equal(old, new)


def test_masks_and_widths_together(dense):
    plan = halves(dense)
    student, masks = masked(dense)
    found = match(dense, student, windows(), plan, masks=masks, options=Match(lr=1e-2))
    assert all(b.stays for b in found.blocks)
    for name, mask in masks.items():
        assert not found.program.weights[name][~mask].view(torch.uint8).any()
    slim = gp.apply(found.program, plan)
    assert gp.verify(found.program, plan, slim).passed


def test_progress_tells_blocks_and_the_time_left(dense):
    student, masks = masked(dense)
    steps: list[BlockStep] = []
    found = match(dense, student, windows(), masks=masks, progress=steps.append)
    assert [s.group.index for s in steps] == [0, 1, 2]
    assert [s.block for s in steps] == list(found.blocks)
    assert {s.total for s in steps} == {3}
    assert all(s.left is not None and s.left >= 0 for s in steps)
    assert steps[-1].left == 0
    stream = 20 * WIDTH * 4
    assert {s.held_bytes for s in steps} == {2 * 16 * stream}


def test_refusals(dense):
    data = windows()
    with pytest.raises(PlanError, match="there is one sample"):
        match(dense, dense, data[:1])
    flat = gp.trace(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()).eval(), (data[0],))
    with pytest.raises(PlanError, match="no residual blocks"):
        match(flat, flat, data)
    with pytest.raises(PlanError, match="different graphs"):
        match(flat, dense, data)
    name = "layers.0.up.weight"
    mask = torch.zeros_like(dense.weights[name], dtype=torch.bool)
    with pytest.raises(PlanError, match="at zero that aren't zero") as told:
        match(dense, dense, data, masks={name: mask})
    assert told.value.where == name
    with pytest.raises(PlanError, match="doesn't fit its parameter"):
        match(dense, dense, data, masks={name: mask.float()})
    with pytest.raises(PlanError, match="no such parameter"):
        match(dense, dense, data, masks={"layers.9.up.weight": mask})
    broken = apply_weights(dense, {name: torch.full_like(dense.weights[name], torch.nan)})
    with pytest.raises(PlanError, match="not a finite number") as told:
        match(dense, broken, data)
    assert told.value.where == "layers.0"


@pytest.mark.parametrize(
    "options",
    [{"lr": -1}, {"lr": 1}, {"epochs": -1}, {"held_out": 0}, {"held_out": 1}, {"weigh": "rows"},
     {"held": "float16"}],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(RecipeError, match="match"):
        Match(**options)
