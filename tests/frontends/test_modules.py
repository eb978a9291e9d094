"""Modules of one's own: every form of inputs and outputs, dtypes, wrappers, hooks, rounds."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.errors import TraceError
from graphprune.pipeline.steps.rounds import composed
from graphprune.rewrite.retrace import retrace
from zoo import plain, recurrent, sharing
from zoo.case import check, check_module, prunable_sizes, randomise


class Net(nn.Module):
    """A convolution with batch norm, and a linear layer on its pooled channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def image(batch=2):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def halved(program, seed=0):
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=seed)
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim, dtype=torch.float64).raise_if_failed()
    return plan, slim


class Several(nn.Module):
    """Positional and keyword inputs, an optional one, a list of tensors, a flag."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, others, *, scale, mask=None, twice=False):
        h = F.relu(self.a(x) + self.b(others[0] - others[1]["y"])) * scale
        if mask is not None:
            h = h.masked_fill(mask[:, None], 0.0)
        h = h * 2 if twice else h
        return {"out": self.c(h), "parts": [(h.sum(-1), None), {"n": 7, "mean": h.mean()}]}


def test_several_and_keyword_inputs_and_nested_outputs():
    args = (torch.randn(4, 5), [torch.randn(4, 3), {"y": torch.randn(4, 3)}])
    mask = torch.tensor([True, False, False, True])
    kwargs = {"scale": torch.randn(4, 1), "mask": mask, "twice": True}
    module = randomise(Several())
    program = gp.trace(module, args, kwargs)
    assert prunable_sizes(program) == {"ffn": (8,)}
    slim = check(program, {"ffn": 0.5})
    check_module(slim, same_class=True)
    given = slim.module(*args, **kwargs)
    assert pytree.tree_structure(given) == pytree.tree_structure(module(*args, **kwargs))
    assert given["parts"][1]["n"] == 7
    assert given["parts"][0][1] is None


def test_ranges_given_by_the_user_hold():
    module = randomise(Net())
    dims = {"x": {0: Dim("batch", min=1, max=32), 2: Dim("height", min=4, max=64)}}
    program = gp.trace(module, (image(),), dynamic_shapes=dims)
    _, slim = halved(program)
    low, high = sorted((r.lower, r.upper) for r in slim.exported.range_constraints.values())
    assert (low, high) == ((1, 32), (4, 64))
    x = torch.randn(7, 3, 11, 6)
    with torch.no_grad():
        torch.testing.assert_close(slim.exported.module()(x), slim.module(x))
    gp.verify(program, slim.plan, slim, inputs=((x,), {})).raise_if_failed()


def test_the_batch_is_dynamic_by_default_and_stays_so():
    _, slim = halved(gp.trace(randomise(Net()), (image(),)))
    assert slim.exported.module()(image(batch=5)).shape == (5, 4)


def test_batch_norm_statistics_are_sliced_with_their_channels():
    module = randomise(Net())
    plan, slim = halved(gp.trace(module, (image(),)))
    (kept,) = plan.kept_units.values()
    assert len(kept) == 4
    for name in ("bn.running_mean", "bn.running_var", "bn.weight", "bn.bias", "conv.bias"):
        dense = module.state_dict()[name]
        assert torch.equal(slim.module.state_dict()[name], dense[list(kept)])
    assert slim.module.bn.num_features == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module = randomise(Net()).to(dtype)
    x = image().to(dtype)
    plan, slim = halved(gp.trace(module, (x,)))
    assert {t.dtype for t in slim.module.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(slim.module(x), slim.exported.module()(x))
        assert slim.module(x).dtype == dtype
    kept = list(next(iter(plan.kept_units.values())))
    assert torch.equal(slim.module.conv.weight, module.conv.weight[kept])  # no rounding on the way


def test_mixed_precision_keeps_each_parameters_dtype():
    module = randomise(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    module[0].to(torch.bfloat16)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = module

        def forward(self, x):
            return self.body[2](self.body[1](self.body[0](x.bfloat16()).float()))

    _, slim = halved(gp.trace(Mixed().eval(), (torch.randn(4, 6),)))
    assert slim.module.body[0].weight.dtype == torch.bfloat16
    assert slim.module.body[1].weight.dtype == torch.float32


@pytest.mark.parametrize("part", [None, "bn"])
def test_training_mode_is_refused(part):
    module = Net().eval()
    (module if part is None else module.get_submodule(part)).train()
    with pytest.raises(TraceError, match="training mode") as caught:
        gp.trace(module, (image(),))
    assert caught.value.where == (part or "Net")
    assert "eval()" in str(caught.value)


@pytest.mark.parametrize("args", [(), (image(), image())], ids=["none", "too many"])
def test_inputs_that_do_not_fit_forward_are_a_trace_error(args):
    with pytest.raises(TraceError):
        gp.trace(Net().eval(), args)


def test_control_flow_on_values_is_a_trace_error():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Branch"):
        gp.trace(Branch().eval(), (image(),))


def test_forward_hooks_are_part_of_the_model():
    module = randomise(Net())
    plain_output = module(image())
    module.conv.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.bn.register_forward_hook(lambda m, args, out: out + 0.5)
    with torch.no_grad():
        hooked = module(image())
    assert not torch.allclose(plain_output, hooked)
    program = gp.trace(module, (image(),))
    torch.testing.assert_close(program.exported.module()(image()), hooked)
    check_module(check(program, {"*": 0.5}), same_class=True)


def test_data_parallel_and_compiled_modules_are_unwrapped():
    module = randomise(Net())
    names = set(gp.trace(module, (image(),)).parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(module)
        wrapped: Any = torch.compile(nn.DataParallel(compiled))
    program = gp.trace(wrapped, (image(),))
    assert program.module is module
    assert set(program.parameters) == names
    _, slim = halved(program)
    assert type(slim.module) is Net


@pytest.mark.parametrize("build", [recurrent.lstm_stacked, sharing.weight_norm_old, Net])
def test_the_module_is_left_as_it_was(build):
    module = randomise(build())
    shape = {recurrent.lstm_stacked: (2, 4, 5), sharing.weight_norm_old: (2, 3, 8)}.get(build)
    x = torch.randn(shape) if shape else image()
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        before = module(x)
        _, slim = halved(gp.trace(module, (x,)))
        slim.module(x)
        after = module(x)
    assert pytree.tree_all(lambda ab: True, before)
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(state[n], t) for n, t in module.state_dict().items())
    assert not any(p.grad is not None for p in module.parameters())


def test_gradients_flow_through_the_slim_module():
    module = randomise(Net())
    module.conv.weight.requires_grad_(False)
    _, slim = halved(gp.trace(module, (image(),)))
    assert not slim.module.conv.weight.requires_grad
    slim.module(image()).sum().backward()
    assert slim.module.fc.weight.grad.shape == (4, 4)
    assert slim.module.conv.weight.grad is None


# Several rounds. What is right is what two prunings one after the other leave.


def rounds(program, first, then):
    """Both plans as one, and the model that was pruned twice."""
    once = gp.apply(program, first(program))
    current = retrace(once)
    later = then(current)
    return composed(once, current, later), gp.apply(current, later), once, later


def fraction(part, seed):
    return lambda p: gp.select(p, remove={"*": part}, score="random", seed=seed)


def same_tensors(a, b):
    constants = ("lifted", "c_")
    names = {n for n in a.weights if not n.startswith(constants)}
    assert names == {n for n in b.weights if not n.startswith(constants)}
    for name in names:
        assert torch.equal(a.weights[name], b.weights[name])


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (Net, (2, 3, 6, 6)),  # its own class in between
        (plain.attention_grouped, (2, 5, 8)),  # the exported graph in between, ragged heads
        (plain.encoder_pre_norm, (2, 5, 8)),  # layers leave
        (recurrent.lstm_projected, (2, 4, 5)),
        (sharing.permuted, (2, 5, 8)),
    ],
)
def test_two_prunings_are_one_plan(build, shape):
    program = gp.trace(randomise(build()), (torch.randn(shape),))
    plan, twice, _, _ = rounds(program, fraction(0.3, 3), fraction(0.4, 5))
    at_once = gp.apply(program, plan)
    gp.verify(program, plan, at_once, dtype=torch.float64).raise_if_failed()
    same_tensors(at_once, twice)


def test_the_units_of_a_second_plan_are_counted_among_those_of_the_first():
    program = gp.trace(randomise(Net()), (image(),))
    plan, _, once, later = rounds(program, fraction(0.25, 1), fraction(0.5, 2))
    (first,), (then,) = once.plan.kept_units.values(), later.kept_units.values()
    (units,) = plan.kept_units.values()
    assert units == tuple(first[u] for u in then)
    assert len(units) == 3  # 8, then 6, then 3


def test_a_structure_that_has_moved_is_not_mistaken_for_another():
    """With one head left there is no factor for it: the dims take the heads' place."""
    module = randomise(plain.attention_cosine())
    program = gp.trace(module, (torch.randn(2, 5, 8),))
    heads = next(s for s in program.structures if s.role == "kv_heads")
    one_head = gp.Plan(program.fingerprint, {heads.name: (2,)}, {heads.name: 4})
    once = gp.apply(program, one_head)
    current = retrace(once)
    dims = next(s for s in current.structures if s.role == "qk_dim")
    later = gp.Plan(current.fingerprint, {dims.name: (1, 4)}, {dims.name: 6})
    plan = composed(once, current, later)
    kept = plan.kept(program)
    assert kept["q.weight"][0].tolist() == [2 * 6 + 1, 2 * 6 + 4]
    assert kept["v.weight"][0].tolist() == list(range(12, 18))
    same_tensors(gp.apply(program, plan), gp.apply(current, later))


def test_hidden_need_not_be_heads_times_dim():
    """TP#436: hidden 14, 3 heads of 6 after one round, and on it goes."""
    module = randomise(plain.encoder_pre_norm())
    program = gp.trace(module, (torch.randn(2, 5, 8),))
    shape = {"hidden": 14, "kv_heads": 3}
    slim = gp.apply(program, gp.select(program, shape=shape, score="random"))
    current = retrace(slim)
    assert current.parameters["encoder.layers.0.self_attn.in_proj_weight"] == (3 * 3 * 6, 14)
    assert prunable_sizes(current)["kv_heads"] == (3, 3)
    check(current, {"hidden": 0.5, "kv_heads": 1 / 3})
