"""Complaints about the topology of convolutional nets (structured.md, section 3 C)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.pipeline.steps.rounds import composed
from graphprune.rewrite.retrace import retrace
from regressions.hand import (
    gone,
    kept,
    plan_of,
    quiet_module,
    structure_at,
    structures_at,
    verified,
)
from zoo import convolutional, images, sharing
from zoo.case import check, randomise


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.two(torch.cat([x, x], 1))


def test_24_a_concatenation_with_itself_has_two_offsets_of_one_set():
    program = gp.trace(randomise(Twice()), (torch.randn(2, 3, 4, 4),))
    first = plan_of(program, (structure_at(program, "one.weight", 0), gone(8, 0, 5)))
    slim = verified(program, first)
    assert kept(program, first, "two.weight")[1] == [1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15]
    current = retrace(slim)
    later = plan_of(current, (structure_at(current, "one.weight", 0), gone(6, 1)))
    both = composed(slim, current, later)
    verified(program, both)
    assert kept(program, both, "one.weight")[0] == [1, 3, 4, 6, 7]
    assert kept(program, both, "two.weight")[1] == [1, 3, 4, 6, 7, 9, 11, 12, 14, 15]


def test_25_an_untouched_c2f_block():
    module = randomise(convolutional.C2f(6, 8, 2, skip=True))
    program = gp.trace(module, (torch.randn(2, 6, 5, 5),))
    inner = structure_at(program, "m.0.cv2.conv.weight", 0, "channels")
    plan = plan_of(program, (inner, [0, 2, 3]))
    slim = verified(program, plan)
    # the chain y[1], y[2], y[3] is one axis, since each adds to the one before; y[0] is free
    assert kept(program, plan, "cv1.conv.weight")[0] == [0, 1, 2, 3, 4, 6, 7]
    columns = [0, 1, 2, 3] + [4 * part + u for part in (1, 2, 3) for u in (0, 2, 3)]
    assert kept(program, plan, "cv2.conv.weight")[1] == columns
    assert kept(program, plan, "m.1.cv1.conv.weight")[1] == [0, 2, 3]
    assert quiet_module(slim)(torch.randn(2, 6, 5, 5)).shape == (2, 8, 5, 5)
    check(program, {"channels": 0.5})


class Mix(nn.Module):
    """CMUNeXt: a residual depthwise convolution and an inverted bottleneck."""

    def __init__(self, c):
        super().__init__()
        self.depth, self.bn = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c)
        self.up, self.down = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)

    def forward(self, x):
        x = x + self.bn(F.gelu(self.depth(x)))
        return self.down(F.gelu(self.up(x)))


class SkipNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.down = nn.Conv2d(3, 6, 3, padding=1), Mix(6), nn.Conv2d(6, 8, 1)
        self.b, self.merge, self.out = Mix(8), nn.Conv2d(14, 5, 3, padding=1), nn.Conv2d(5, 1, 1)

    def forward(self, x):
        a = self.a(self.stem(x))
        b = self.b(self.down(F.max_pool2d(a, 2)))
        b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=True)
        return self.out(F.relu(self.merge(torch.cat([a, b], 1))))


def test_26_each_branch_of_a_skip_has_its_own_offset():
    program = gp.trace(randomise(SkipNet()), (torch.randn(2, 3, 8, 8),))
    skip = structure_at(program, "a.down.weight", 0)
    deep = structure_at(program, "b.down.weight", 0)
    assert (skip.size, deep.size) == (6, 8)
    plan = plan_of(program, (skip, [0, 4]), (deep, [1, 6, 7]))
    verified(program, plan)
    assert kept(program, plan, "merge.weight")[1] == [0, 4, 6 + 1, 6 + 6, 6 + 7]
    assert kept(program, plan, "down.weight")[1] == [0, 4]
    expanded = structure_at(program, "a.up.weight", 0)
    assert expanded.size == 24
    check(program, {"channels": 0.5})


class Restormer(nn.Module):
    """Attention between channels with a learnt temperature for each head, a gated MLP."""

    def __init__(self, c=12, heads=3):
        super().__init__()
        self.stem, self.heads = nn.Conv2d(3, c, 3, padding=1), heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.depth = nn.Conv2d(3 * c, 3 * c, 3, 1, 1, groups=3 * c)
        self.proj = nn.Conv2d(c, c, 1)
        self.gate, self.gate_depth = nn.Conv2d(c, 20, 1), nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.down, self.out = nn.Conv2d(10, c, 1), nn.Conv2d(c, 3, 1)

    def forward(self, x):
        skip, x = x, self.stem(x)
        b, c, h, w = x.shape
        q, k, v = self.depth(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        x = x + self.proj((weights @ v).reshape(b, c, h, w))
        a, g = self.gate_depth(self.gate(x)).chunk(2, dim=1)
        return skip + self.out(x + self.down(F.gelu(a) * g))


def test_27_attention_between_channels():
    program = gp.trace(randomise(Restormer()), (torch.randn(2, 3, 4, 4),))
    heads = structure_at(program, "temperature", 0)
    plan = plan_of(program, (heads, [0, 2]))
    verified(program, plan)
    inner = [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept(program, plan, "proj.weight")[1] == inner
    assert kept(program, plan, "depth.weight")[0] == [12 * p + i for p in range(3) for i in inner]
    hidden = structure_at(program, "stem.weight", 0)
    assert heads not in structures_at(program, "stem.weight", 0)
    check(program, {hidden.role: 0.5})
    check(program, {"*": 0.5})


def test_28_branches_that_are_concatenated_stay_apart():
    program = gp.trace(randomise(sharing.wide_deep()), (torch.randn(4, 8),))
    wide, deep = structure_at(program, "wide.weight", 0), structure_at(program, "deep.2.weight", 0)
    assert wide is not deep
    plan = plan_of(program, (wide, [1, 5]), (deep, [0, 8]))
    verified(program, plan)
    assert kept(program, plan, "out.weight")[1] == [1, 5, 6 + 0, 6 + 8]


def test_29_a_single_output_channel_makes_no_depthwise_convolution():
    program = gp.trace(randomise(images.single_output()), (torch.randn(2, 3, 4, 4),))
    plan = plan_of(program, (structure_at(program, "0.weight", 0), [3, 4]))
    slim = verified(program, plan)
    assert kept(program, plan, "2.weight") == [[0], [3, 4], [0, 1, 2], [0, 1, 2]]
    assert slim.shapes["2.weight"] == (1, 2, 3, 3)
    assert slim.module.get_submodule("2").groups == 1


class TwoGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(F.relu(self.two(F.relu(self.one(x)))))


def test_30_groups_stay_equal_or_go_whole():
    program = gp.trace(randomise(TwoGrouped()), (torch.randn(2, 3, 4, 4),))
    groups = next(s for s in structures_at(program, "one.weight", 0) if s.size == 4)
    inside = next(s for s in structures_at(program, "one.weight", 0) if s.size == 3)
    outside = next(s for s in structures_at(program, "out.weight", 1) if s.size == 2)
    assert groups in structures_at(program, "out.weight", 1)

    whole = plan_of(program, (groups, [0, 3]))
    slim = verified(program, whole)
    assert kept(program, whole, "one.weight")[0] == [0, 1, 2, 9, 10, 11]
    assert kept(program, whole, "two.weight")[:2] == [[0, 1, 6, 7], [0, 1, 2]]
    assert slim.module.two.groups == 2

    thin = gp.Plan(
        program.fingerprint,
        {inside.name: ((0, 1), (1, 2), (0, 2), (0, 1)), outside.name: (1,)},
        {inside.name: 3, outside.name: 2},
    ) if inside.within else plan_of(program, (inside, [0, 2]), (outside, [1]))  # fmt: skip
    slim = verified(program, thin)
    assert len(kept(program, thin, "one.weight")[0]) == 8
    assert slim.shapes["two.weight"] == (4, 2, 3, 3)
    assert kept(program, thin, "out.weight")[1] == [1, 3, 5, 7]
    assert slim.module.two.groups == 4


def test_31_implicit_parameters_are_sliced_and_cost_less():
    program = gp.trace(randomise(images.yolo_implicit()), (torch.randn(2, 3, 4, 4),))
    channels = structure_at(program, "add", 1)
    plan = plan_of(program, (channels, [0, 1, 9]))
    slim = verified(program, plan)
    assert kept(program, plan, "add") == [[0], [0, 1, 9], [0], [0]]
    assert kept(program, plan, "head.weight")[1] == [0, 1, 9]
    per_unit = 12 * 9 + 6  # of 16 places: its own kernel, and its column in the head
    assert program.costs.total().macs - slim.cost.macs == 7 * per_unit * 16
    assert program.costs.total().params - slim.cost.params == 7 * (12 * 9 + 2 + 1 + 6)


def test_32_no_gradient_is_needed():
    module = randomise(images.frozen_batch_norm())
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        program = gp.trace(module, (torch.randn(2, 3, 4, 4),))
        plan = plan_of(program, (structure_at(program, "0.weight", 0), gone(12, 0)))
        slim = verified(program, plan)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert kept(program, plan, f"1.{name}")[0] == gone(12, 0)
        assert slim.shapes[f"1.{name}"] == (11,)


class Grid(nn.Module):
    """YOLO's grid of places, made anew for every size; nearest upsampling; noise; a Python int."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.stem, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.noise:
            x = x + 0.1 * torch.randn(x.shape[0], 1, *x.shape[2:])
        x = F.relu(self.up(F.interpolate(x, scale_factor=2)))
        _, _, h, w = x.shape
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((xs, ys)).to(x.dtype)
        y = self.out(x)
        return torch.cat([(y[:, :2].sigmoid() * 2 - 0.5 + grid) * 8, y[:, 2:] * int(w // h)], 1)


@pytest.mark.parametrize("noise", [False, True])
def test_33_operators_of_shapes_and_constants_are_neutral(noise):
    module = randomise(Grid(noise))
    dims = {"x": {2: torch.export.Dim("side", min=4, max=32) * 2}} if not noise else None
    x = torch.randn(2, 3, 8, 8)
    program = gp.trace(module, (x,), dynamic_shapes=dims)
    one, two = structure_at(program, "stem.weight", 0), structure_at(program, "up.weight", 0)
    plan = plan_of(program, (one, gone(8, 2)), (two, [1, 3, 5]))
    if noise:
        slim = gp.apply(program, plan)  # noise of the same shape in both: its channel is 1
        assert slim.shapes["up.weight"] == (3, 7, 3, 3)
        return
    slim = verified(program, plan)
    other = torch.randn(1, 3, 16, 8)
    gp.verify(program, plan, slim, inputs=((other,), {})).raise_if_failed()


@torch.library.custom_op("regressions::pooled_regions", mutates_args=())
def pooled_regions(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3)) * boxes.sum(-1, keepdim=True)


@pooled_regions.register_fake
def _(x, boxes):
    return x.new_empty(x.shape[0], x.shape[1])


class Detector(nn.Module):
    """A backbone with frozen statistics, and an operator that nobody knows (18: ROIAlign)."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), images.FrozenBatchNorm(8)
        self.body = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))

    def forward(self, x, boxes):
        x = F.relu(self.body(F.relu(self.bn(self.stem(x)))))
        return self.head(torch.ops.regressions.pooled_regions(x, boxes))


def test_18_an_unknown_operator_freezes_its_channels_and_no_others():
    args = (torch.randn(2, 3, 6, 6), torch.rand(2, 4))
    program = gp.trace(randomise(Detector()), args)
    reason = program.frozen()["body.weight", 0]
    assert "no rule for operator regressions.pooled_regions" in reason
    assert "test_topology.py:" in reason
    assert program.frozen()["head.0.weight", 1] == reason
    stem, ffn = structure_at(program, "stem.weight", 0), structure_at(program, "head.0.weight", 0)
    plan = plan_of(program, (stem, [0, 1, 2]), (ffn, [4, 5]))
    verified(program, plan)
    assert kept(program, plan, "bn.running_var")[0] == [0, 1, 2]
