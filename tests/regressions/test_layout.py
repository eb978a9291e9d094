"""Complaints about reshapes and layouts (structured.md, section 3 A), with index sets by hand."""

import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.rewrite.retrace import retrace
from regressions.hand import (
    blocks,
    gone,
    kept,
    plan_of,
    quiet_module,
    structure_at,
    structures_at,
    verified,
)
from zoo.case import randomise


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.up = nn.Linear(16, 12 * 4 * 4), nn.ConvTranspose2d(12, 5, 4, 2, 1)

    def forward(self, z):
        return self.up(F.relu(self.fc(z)).view(-1, 12, 4, 4))


def test_1_a_channel_behind_a_view_is_a_block_of_linear_outputs():
    module = randomise(Decoder())
    z = torch.randn(3, 16)
    program = gp.trace(module, (z,))
    channels = structure_at(program, "up.weight", 0)
    assert channels.size == 12
    plan = plan_of(program, (channels, gone(12, 2, 7)))
    slim = verified(program, plan)
    rows = gone(192, *range(32, 48), *range(112, 128))
    assert kept(program, plan, "fc.weight")[0] == rows
    assert kept(program, plan, "fc.bias")[0] == rows
    assert kept(program, plan, "up.weight")[:2] == [gone(12, 2, 7), [*range(5)]]
    with torch.no_grad():
        x = F.relu(F.linear(z, module.fc.weight[rows], module.fc.bias[rows])).view(-1, 10, 4, 4)
        wanted = F.conv_transpose2d(x, module.up.weight[gone(12, 2, 7)], module.up.bias, 2, 1)
        torch.testing.assert_close(slim.exported.module()(z), wanted)


def test_2_fully_connected_columns_go_in_blocks_of_the_feature_map():
    module = randomise(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    )
    program = gp.trace(module, (torch.randn(2, 3, 4, 4),))
    plan = plan_of(program, (structure_at(program, "0.weight", 0), [0, 3, 4]))
    verified(program, plan)
    assert kept(program, plan, "3.weight")[1] == blocks([0, 3, 4], 16)


class Literal(nn.Module):
    """A fused qkv whose shape is a literal, batch and all."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(2, 7, 3, 4, 6).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(2, 7, 24))


def test_3_literal_shapes_are_rewritten():
    program = gp.trace(randomise(Literal()), (torch.randn(2, 7, 24),))
    heads = structure_at(program, "qkv.weight", 0, "kv_heads")
    plan = plan_of(program, (heads, [1, 3]))
    slim = verified(program, plan)
    rows = [part * 24 + i for part in range(3) for i in blocks([1, 3], 6)]
    assert kept(program, plan, "qkv.weight")[0] == rows
    assert slim.shapes["qkv.weight"] == (36, 24)
    literals = [n.args[1] for n in slim.graph_module.graph.nodes if "reshape" in str(n.target)]
    assert [2, 7, 3, 2, 6] in literals
    assert [2, 7, 12] in literals


class Shuffle(nn.Module):
    """1x1, channel shuffle in two groups, depthwise, 1x1."""

    def __init__(self):
        super().__init__()
        self.one, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.two = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.relu(self.one(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.two(self.depth(x))


def test_4_a_channel_shuffle_permutes_the_indices():
    """Channel 4 g + i goes to place 2 i + g."""
    program = gp.trace(randomise(Shuffle()), (torch.randn(2, 3, 5, 5),))
    groups, within = structures_at(program, "one.weight", 0)
    assert (groups.size, within.size) == (2, 4)  # groups stay of equal size: each loses unit i
    plan = plan_of(program, (within, [0, 2, 3]))
    verified(program, plan)
    assert kept(program, plan, "one.weight")[0] == [0, 2, 3, 4, 6, 7]
    assert kept(program, plan, "depth.weight")[0] == [0, 1, 4, 5, 6, 7]
    assert kept(program, plan, "two.weight")[1] == [0, 1, 4, 5, 6, 7]


def test_5_pixel_shuffle_takes_blocks_of_r_squared_channels():
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))
    program = gp.trace(randomise(module), (torch.randn(2, 3, 4, 4),))
    plan = plan_of(program, (structure_at(program, "2.weight", 1), [0, 3]))
    verified(program, plan)
    assert kept(program, plan, "0.weight")[0] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert kept(program, plan, "2.weight")[1] == [0, 3]


class Folded(nn.Module):
    """The batch is a size in a reshape, and not the first."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        b = x.shape[0]
        y = F.relu(self.one(x)).transpose(0, 1).reshape(-1, b, 16)
        return self.two(y.reshape(-1, 16)).view(-1, b, 3)


def test_6_constants_that_depend_on_the_batch_stay_symbolic():
    program = gp.trace(randomise(Folded()), (torch.randn(2, 5, 6),))
    plan = plan_of(program, (structure_at(program, "one.weight", 0), [*range(0, 16, 3)]))
    slim = verified(program, plan)
    other = torch.randn(7, 5, 6)
    assert slim.exported.module()(other).shape == (5, 7, 3)
    gp.verify(program, plan, slim, inputs=((other,), {})).raise_if_failed()


def rearrange(x, heads):
    """What einops' "b n (h d) -> b h n d" executes."""
    b, n, inner = x.shape
    return x.reshape(b, n, heads, inner // heads).permute(0, 2, 1, 3)


class Patches(nn.Module):
    """vit_pytorch: patches by a rearrangement, a fused chunked qkv with a constant h."""

    def __init__(self, heads=4, dim=6, width=20):
        super().__init__()
        self.heads = heads
        self.patch = nn.Linear(3 * 4, width)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * heads * dim, bias=False)
        self.out, self.head = nn.Linear(heads * dim, width), nn.Linear(width, 5)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        x = self.patch(x.reshape(b, (h // 2) * (w // 2), 4 * c))
        q, k, v = (rearrange(t, self.heads) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 6**-0.5).softmax(-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v).permute(0, 2, 1, 3)
        return self.head(x + self.out(y.reshape(b, -1, y.shape[2] * y.shape[3])))


def test_7_rearranged_heads_are_units():
    program = gp.trace(randomise(Patches()), (torch.randn(2, 3, 4, 4),))
    heads = structure_at(program, "out.weight", 1, "kv_heads")
    plan = plan_of(program, (heads, [0, 1, 3]))
    verified(program, plan)
    inner = blocks([0, 1, 3], 6)
    assert kept(program, plan, "out.weight")[1] == inner
    rows = [24 * part + i for part in range(3) for i in inner]
    assert kept(program, plan, "qkv.weight")[0] == rows


def test_8_multiply_accumulates_of_the_slim_model_are_right():
    program = gp.trace(randomise(Patches()), (torch.randn(2, 3, 4, 4),))
    heads = structure_at(program, "out.weight", 1, "kv_heads")
    slim = verified(program, plan_of(program, (heads, [2])))

    def macs(h):  # an image of 4 patches
        linear = 12 * 20 + 20 * (3 * h * 6) + (h * 6) * 20 + 20 * 5
        return 4 * linear + 2 * h * 4 * 4 * 6

    assert program.costs.total().macs == macs(4)
    assert slim.cost.macs == macs(1)
    assert retrace(slim).costs.total() == slim.cost
    assert quiet_module(slim)(torch.randn(3, 3, 4, 4)).shape == (3, 4, 5)
