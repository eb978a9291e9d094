"""Complaints about attention (structured.md, section 3 B), as far as they are about modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.pipeline.steps.rounds import composed
from graphprune.rewrite.retrace import retrace
from regressions.hand import (
    blocks,
    kept,
    plan_of,
    quiet_module,
    structure_at,
    structures_at,
    verified,
)
from zoo import plain, sharing
from zoo.case import check, prunable_sizes, randomise

HEADS, DIM = plain.HEADS, plain.DIM
INNER = HEADS * DIM
SEQUENCE = (2, 5, 8)


def rows_by_part(units):
    """Rows of a fused weight in the order three, heads, dim."""
    return [part * INNER + i for part in range(3) for i in blocks(units, DIM)]


def rows_by_head(units):
    """Rows in the order heads, three, dim (or heads, dim, three): one block per head."""
    return blocks(units, 3 * DIM)


@pytest.mark.parametrize(
    ("build", "rows"),
    [
        (plain.qkv_thd, rows_by_part),
        (plain.qkv_indexed, rows_by_part),
        (plain.qkv_split, rows_by_part),
        (plain.qkv_sliced, rows_by_part),
        (plain.qkv_htd, rows_by_head),
        (plain.qkv_htd_indexed, rows_by_head),
        (plain.qkv_hdt, rows_by_head),
    ],
    ids=lambda f: f.__name__,
)
def test_9_heads_are_the_same_whatever_takes_qkv_apart(build, rows):
    program = gp.trace(randomise(build()), (torch.randn(SEQUENCE),))
    heads = structure_at(program, "proj.weight", 1, "kv_heads")
    plan = plan_of(program, (heads, [0, 2, 3]))
    verified(program, plan)
    assert kept(program, plan, "qkv.weight")[0] == rows([0, 2, 3])
    assert kept(program, plan, "qkv.bias")[0] == rows([0, 2, 3])
    assert kept(program, plan, "proj.weight")[1] == blocks([0, 2, 3], DIM)


class Attributes(nn.Module):
    """Sizes are attributes, as in torchvision, timm and BERT."""

    def __init__(self, hidden=24, heads=4):
        super().__init__()
        self.hidden_dim, self.num_heads, self.head_dim = hidden, heads, hidden // heads
        self.all_head_size = hidden
        self.stem, self.head = nn.Linear(8, hidden), nn.Linear(hidden, 3)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        b, n, _ = x.shape
        x = self.stem(x)
        torch._assert(x.shape[2] == self.hidden_dim, "wrong hidden_dim")
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2)
        return self.head(x + self.proj(y.reshape(b, n, self.all_head_size)))


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ({"kv_heads": 2}, (24, 2, 6, 12)),
        ({"hidden": 16}, (16, 4, 6, 24)),
        ({"kv_heads": 3, "hidden": 10}, (10, 3, 6, 18)),
    ],
    ids=str,
)
def test_10_11_14_size_attributes_follow(shape, attributes):
    program = gp.trace(randomise(Attributes()), (torch.randn(SEQUENCE),))
    slim = verified(program, gp.select(program, shape=shape, score="random"))
    module = slim.module
    assert type(module) is Attributes
    found = (module.hidden_dim, module.num_heads, module.head_dim, module.all_head_size)
    assert found == attributes
    x = torch.randn(3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x[:, :5]), slim.exported.module()(x[:, :5]))
        assert module(x).shape == (3, 9, 3)  # the length was never a constant of the source


def test_a_head_of_another_size_keeps_the_scale_that_it_was_trained_with():
    """The class would divide by the root of the new size, so the slim module is the graph."""
    program = gp.trace(randomise(Attributes()), (torch.randn(SEQUENCE),))
    slim = verified(program, gp.select(program, shape={"qk_dim": 4}, score="random"))
    scales = [
        n.kwargs["scale"] for n in slim.graph_module.graph.nodes if "scaled_dot" in str(n.target)
    ]
    assert scales == pytest.approx([6**-0.5])
    assert not isinstance(quiet_module(slim), Attributes)


def test_12_heads_stay_heads_over_five_rounds():
    class Wide(plain.Fused):
        def __init__(self):
            super().__init__(lambda qkv: tuple(plain.split_heads(t, t.shape[-1] // 2)
                                               for t in qkv.chunk(3, -1)))  # fmt: skip

    program = gp.trace(randomise(Wide()), (torch.randn(SEQUENCE),))
    heads = structure_at(program, "proj.weight", 1, "kv_heads")
    assert heads.size == INNER // 2
    plan, slim, current = None, None, program
    for count in (10, 8, 6, 4, 3):
        found = gp.select(current, shape={"kv_heads": count}, score="random", seed=count)
        plan = composed(slim, current, found) if slim else found
        slim = verified(program, plan)
        current = retrace(slim)
        inner = kept(program, plan, "proj.weight")[1]
        assert inner == blocks(sorted({i // 2 for i in inner}), 2)
        assert len(inner) == 2 * count


class Pooled(nn.Module):
    """MViT: depthwise convolutions over the places of every head of q, k and v."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv = nn.Linear(8, 20), nn.Linear(20, 3 * INNER)
        self.pools = nn.ModuleList(
            [nn.Conv2d(DIM, DIM, 3, s, 1, groups=DIM, bias=False) for s in (1, 2, 2)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(3)])
        self.proj, self.head = nn.Linear(INNER, 20), nn.Linear(20, 3)

    def pool(self, x, i):
        b, heads, _, dim = x.shape
        x = x.reshape(b * heads, 4, 4, dim).permute(0, 3, 1, 2)
        x = self.pools[i](x).flatten(2).transpose(1, 2)
        return self.norms[i](x.reshape(b, heads, -1, dim))

    def forward(self, x):
        x = self.stem(x)
        b = x.shape[0]
        qkv = self.qkv(x).reshape(b, 16, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        q, k, v = (self.pool(t, i) for i, t in enumerate(qkv.unbind(0)))
        y = F.scaled_dot_product_attention(q, k, v) + q
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, 16, INNER)))


def test_13_pooling_convolutions_follow_the_dims_of_all_heads():
    program = gp.trace(randomise(Pooled()), (torch.randn(2, 16, 8),))
    dims = structure_at(program, "pools.0.weight", 0)
    heads = structure_at(program, "proj.weight", 1, "kv_heads")
    assert (dims.size, heads.size) == (DIM, HEADS)
    plan = plan_of(program, (dims, [0, 1, 4]), (heads, [1, 2, 3]))
    verified(program, plan)
    inner = [h * DIM + d for h in (1, 2, 3) for d in (0, 1, 4)]
    assert kept(program, plan, "qkv.weight")[0] == [p * INNER + i for p in range(3) for i in inner]
    for i in range(3):
        assert kept(program, plan, f"pools.{i}.weight")[0] == [0, 1, 4]
        assert kept(program, plan, f"norms.{i}.weight")[0] == [0, 1, 4]


def test_15_every_slice_of_a_modulation_follows_hidden():
    args = (torch.randn(2, 5, 8), torch.randn(2, 5))
    program = gp.trace(randomise(sharing.adaptive_norm()), args)
    hidden = structure_at(program, "stem.weight", 0)
    units = [0, 1, 5, 9, 15]
    plan = plan_of(program, (hidden, units))
    verified(program, plan)
    rows = [16 * part + u for part in range(6) for u in units]
    assert kept(program, plan, "modulation.weight")[0] == rows
    assert kept(program, plan, "modulation.bias")[0] == rows
    assert kept(program, plan, "head.weight")[1] == units


class Relative(nn.Module):
    """SAM: positions decomposed into rows and columns, looked up by distance."""

    def __init__(self, side=3):
        super().__init__()
        self.side = side
        self.stem, self.qkv = nn.Linear(8, 20), nn.Linear(20, 3 * INNER)
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * side - 1, DIM)) for _ in range(2))
        self.proj, self.head = nn.Linear(INNER, 20), nn.Linear(20, 3)

    def table(self, parameter):
        places = torch.arange(self.side)[:, None] - torch.arange(self.side)[None] + self.side - 1
        return parameter[places]

    def forward(self, x):
        s, b = self.side, x.shape[0]
        x = self.stem(x)
        qkv = self.qkv(x).reshape(b, s * s, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * HEADS, s * s, DIM).unbind(0)
        scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
        grid = q.reshape(b * HEADS, s, s, DIM)
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, self.table(self.rows))
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, self.table(self.columns))
        scores = scores.view(b * HEADS, s, s, s, s) + by_row[..., None] + by_column[:, :, :, None]
        y = scores.view(b * HEADS, s * s, s * s).softmax(-1) @ v
        y = y.view(b, HEADS, s * s, DIM).transpose(1, 2).reshape(b, s * s, INNER)
        return self.head(x + self.proj(y))


def test_16_relative_position_tables_lose_the_dims_of_queries():
    program = gp.trace(randomise(Relative()), (torch.randn(2, 9, 8),))
    dims = structure_at(program, "rows", 1)
    assert dims.size == DIM
    assert ("columns", 1) in dims.members
    assert "indexed by" in program.frozen()["rows", 0] or "place" in program.frozen()["rows", 0]
    plan = plan_of(program, (dims, [0, 2, 3, 5]))
    verified(program, plan)
    assert kept(program, plan, "rows")[1] == [0, 2, 3, 5]
    check(program, {"heads": 0.5})


@pytest.mark.parametrize("keep", [1, 5, 11])
def test_17_merged_patches_are_four_copies_of_the_channels(keep):
    program = gp.trace(randomise(sharing.patch_merging()), (torch.randn(2, 3, 8, 8),))
    hidden = structure_at(program, "stem.weight", 0)
    units = list(range(12))[-keep:]
    plan = plan_of(program, (hidden, units))
    verified(program, plan)
    four = [12 * part + u for part in range(4) for u in units]
    assert kept(program, plan, "norm.weight")[0] == four
    assert kept(program, plan, "reduce.weight")[1] == four


def test_19_weight_normed_groups_are_cut_in_g_and_v():
    for build, g, v in (
        (sharing.weight_norm_grouped, "original0", "original1"),
        (sharing.weight_norm_old, "weight_g", "weight_v"),
    ):
        program = gp.trace(randomise(build()), (torch.randn(2, 3, 8),))
        prefix = "conv.parametrizations.weight." if "original" in g else "conv."
        inner = structure_at(program, prefix + v, 1)
        (groups,) = (s for s in structures_at(program, "stem.weight", 0) if s is not inner)
        assert (groups.size, inner.size) == (4, 4)
        plan = plan_of(program, (groups, [1, 2, 3]), (inner, [0, 3]))
        slim = verified(program, plan)
        channels = [4, 7, 8, 11, 12, 15]
        assert kept(program, plan, "stem.weight")[0] == channels
        assert kept(program, plan, prefix + v)[:2] == [channels, [0, 3]]
        assert slim.shapes[prefix + g] == (1, 1, 4)  # the norms are of the kernel's places
        assert slim.module.conv.groups == 3


def test_20_key_value_groups_are_units():
    program = gp.trace(randomise(plain.attention_grouped()), (torch.randn(SEQUENCE),))
    groups = structure_at(program, "k.weight", 0, "kv_heads")
    plan = plan_of(program, (groups, [1]))
    verified(program, plan)
    assert kept(program, plan, "k.weight")[0] == [*range(6, 12)]
    assert kept(program, plan, "v.weight")[0] == [*range(6, 12)]
    assert kept(program, plan, "q.weight")[0] == [*range(12, 24)]  # its own two query heads
    assert kept(program, plan, "o.weight")[1] == [*range(12, 24)]


class Grouped(nn.Module):
    """Query heads in groups over fewer key-value heads."""

    def __init__(self, heads, kv_heads, dim=2):
        super().__init__()
        self.sizes = heads, kv_heads, dim
        self.q, self.o = nn.Linear(8, heads * dim), nn.Linear(heads * dim, 3)
        self.k, self.v = nn.Linear(8, kv_heads * dim), nn.Linear(8, kv_heads * dim)

    def forward(self, x):
        heads, kv_heads, dim = self.sizes
        b, n, _ = x.shape
        q = self.q(x).view(b, n, heads, dim).transpose(1, 2)
        k, v = (f(x).view(b, n, kv_heads, dim).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, heads * dim))


def test_21_query_heads_within_a_group_are_units_each_group_with_its_own():
    program = gp.trace(randomise(Grouped(14, 2)), (torch.randn(SEQUENCE),))
    assert prunable_sizes(program)["kv_heads"] == (2,)
    queries = structure_at(program, "q.weight", 0, "query_heads")
    assert queries.size == 7
    assert queries.within is not None
    rows = ((0, 1, 2, 3, 4, 6), (1, 2, 3, 4, 5, 6))
    plan = gp.Plan(program.fingerprint, {queries.name: rows}, {queries.name: 7})
    verified(program, plan)
    heads = [0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13]
    assert kept(program, plan, "q.weight")[0] == blocks(heads, 2)
    assert kept(program, plan, "o.weight")[1] == blocks(heads, 2)
    assert kept(program, plan, "k.weight")[0] == [0, 1, 2, 3]


def test_22_one_key_value_head_leaves_query_heads():
    program = gp.trace(randomise(Grouped(6, 1)), (torch.randn(SEQUENCE),))
    queries = structure_at(program, "o.weight", 1, "query_heads")
    plan = plan_of(program, (queries, [0, 5]))
    verified(program, plan)
    assert kept(program, plan, "q.weight")[0] == [0, 1, 10, 11]
    assert kept(program, plan, "k.weight")[0] == [0, 1]
    by_role = gp.select(program, remove={"heads": 0.5}, score="random")
    assert len(by_role.kept_units[queries.name]) == 3


class SharedBias(nn.Module):
    """T5: one table of position biases, a column for each head, for all layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, HEADS)
        self.stem, self.head = nn.Linear(8, 20), nn.Linear(20, 3)
        self.layers = nn.ModuleList([nn.Linear(20, 3 * INNER) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Linear(INNER, 20) for _ in range(2)])

    def forward(self, x):
        x = self.stem(x)
        places = torch.arange(5)
        bias = self.table(places[:, None] - places[None] + 4).permute(2, 0, 1)[None]
        for qkv, out in zip(self.layers, self.outs, strict=True):
            q, k, v = plain.order_split(qkv(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + out(plain.merge_heads(y))
        return self.head(x)


def test_23_a_shared_position_bias_couples_the_heads_of_all_layers():
    program = gp.trace(randomise(SharedBias()), (torch.randn(SEQUENCE),))
    heads = structure_at(program, "table.weight", 1)
    assert heads.size == HEADS
    assert {("layers.0.weight", 0), ("layers.1.weight", 0)} <= set(heads.members)
    plan = plan_of(program, (heads, [0, 3]))
    verified(program, plan)
    assert kept(program, plan, "table.weight")[1] == [0, 3]
    for i in range(2):
        assert kept(program, plan, f"layers.{i}.weight")[0] == rows_by_part([0, 3])
