"""Writes to tensors that go by several names: the graph computes what the module does, exactly."""

import time

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.frontends.tracing.functional import functional


class Function(nn.Module):
    """A function of an input ``[batch, 6, 8]``, with state that it may write to."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.arange(8.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.function(x, self)


def old_view_read_later(x, _):
    y = x * 1
    row = y[:, 2]
    y += 1
    return row * y[:, 0]


def overlapping_views(x, _):
    y = x * 1
    a, b = y[:, :4], y[:, 2:]
    a *= 2
    b += a[:, :1]
    a[:, 3] -= b[:, 0]
    return y, a, b * 1


def written_through_two_views(x, _):
    y = x.clone()
    z = y.transpose(1, 2)[:, 3:5]
    z[..., 1] = 7
    y[:, 1, 4] += z[:, 0, 0]
    return y, z


def reshaped_and_transposed(x, _):
    y = x * 1
    y.view(-1, 2, 3, 8).transpose(1, 3)[:, 2:5, 1].mul_(3)
    return y


def reshape_that_copies(x, _):
    y = (x * 1).transpose(1, 2)
    y.reshape(x.shape[0], -1).add_(1)
    return y * 1


def reshape_that_views(x, _):
    y = x * 1
    y.reshape(x.shape[0], -1).add_(1)
    return y * 1


def contiguous_that_copies(x, _):
    y = (x * 1).transpose(1, 2)
    y.contiguous().add_(1)
    return y * 1


def one_copy_of_an_expanded_one(x, _):
    y = x[:, :1] * 1
    z = y.expand(-1, 3, -1)
    z[:, 1].add_(1)
    return z * 1, y


def unbound(x, _):
    y = x * 1
    parts = y.unbind(1)
    parts[2].exp_()
    parts[4].copy_(parts[2])
    return torch.stack(parts, 1), y


def split_in_the_middle(x, _):
    y = x * 1
    a, b, c = y.split([2, 5, 1], dim=-1)
    b.relu_()
    c += a[..., :1]
    return torch.cat([c, b, a], -1), y


def split_batch(x, _):
    y = x * 1
    a, b = y.chunk(2, dim=0)
    b.neg_()
    return y, a * 1


def tensors_split(x, _):
    y = x * 1
    y.tensor_split(3, dim=-1)[1].zero_()
    return y * 1


def diagonals(x, _):
    y = x * 1
    y.diagonal(1, 1, 2).fill_(3)
    y[0].fill_diagonal_(-1)
    return y


def unfolded(x, _):
    y = x * 1
    y.unfold(2, 3, 2)[:, :, 1].mul_(5)
    return y


def strided(x, _):
    y = torch.zeros(6, 8) + x.sum()
    y[1:].as_strided((3, 2), (9, 2)).add_(1)
    y += 1
    y.as_strided((2, 3), (8, 1), 3).mul_(2)
    return y


def complex_parts(x, _):
    y = torch.complex(x[..., :4], x[..., 4:])
    y.real.mul_(2)
    y.imag[:, 1] = 0.5
    pairs = torch.view_as_real(y)
    pairs[..., 0] -= 1
    return torch.view_as_real(y * 1j)


def complex_view(x, _):
    y = x * 1
    torch.view_as_complex(y.unflatten(-1, (4, 2))).mul_(1j)
    return y


def element_of_a_list(x, _):
    parts = [x * 1, x * 2]
    parts[1][:, 0] += 1
    parts[0] += parts[1]
    return parts


def in_a_loop(x, _):
    y = x @ x.transpose(1, 2)
    for i in range(1, 6):
        row, block = y[..., i, :i].clone(), y[..., :i, :i].clone()
        y[..., i, :i] = row + (row.unsqueeze(-1) * block).sum(-2)
    return y


def added_to_slices(x, _):
    y = x * 1
    y[:, 1:3] += y[:, 3:5]
    y[..., ::2] *= 2
    y[:, -1] -= y[:, 0]
    return y


def masked(x, _):
    y = x * 1
    y[y > 0.5] = 0.0
    y[:, 2:4].masked_fill_(x[:, 2:4] < 0, -1)
    y[:, :, 1:3].transpose(1, 2).masked_scatter_(x[:, :, 1:3].transpose(1, 2) < 0, x)
    return y.view(-1)


def broadcast_and_cast(x, _):
    y = torch.zeros(x.shape, dtype=torch.float64)
    y[:, 1:3] = x[:1, 0]
    y[:, 4].copy_(torch.arange(8))
    n = torch.ones(6, 8, dtype=torch.int64)
    n[2] = x[0, 0] * 10
    n[3] += torch.arange(8, dtype=torch.int16)
    half = torch.zeros(6, dtype=torch.bfloat16)
    half += x[0, :, 0]
    return y, n, half


def indexed(x, _):
    y = x * 1
    y[:, [0, 3]] = y[:, [3, 0]]
    y.transpose(0, 1).index_add_(0, torch.tensor([1, 1]), x[:, :2].transpose(0, 1))
    y[:, 2].scatter_(1, torch.zeros(x.shape[0], 1, dtype=torch.int64), 9.0)
    y[:, [1], 2:4] += 1
    return y


def bits(x, _):
    y = x > 0
    y &= x < 1
    y[:, 0] |= True
    y[:, 1] ^= y[:, 2]
    return y


def renamed_in_place(x, _):
    y = x * 1
    flat = y.view(-1)
    y.unsqueeze_(1).transpose_(2, 3)
    y[:, :, 3].add_(1)
    flat[2:5].zero_()
    return y.squeeze_(1) * 2, flat


def written_by_chains(x, _):
    y = x * 1
    z = y.mul_(2).add_(1)
    w = z[:, 1].clamp_(min=0).sub_(3)
    return w + y[:, 0], z


def lies_as_before(x, _):
    y = (x * 1).transpose(1, 2)
    y.masked_fill_(y > 0, 1)
    z = torch.empty(x.shape)
    z.copy_(y.transpose(1, 2).flip(1).transpose(0, 1).transpose(0, 1))
    return y.transpose(1, 2).view(-1), z.view(-1)


def lists_of_views(x, _):
    a, b = torch.broadcast_tensors(x * 1, x[:1] * 2)
    a[:, 0] += 1
    c, d = torch.meshgrid(torch.arange(3.0), torch.arange(2.0), indexing="ij")
    c = c.clone()
    c.T[1] = 4
    return a + b, c + d


def einsum_that_views(x, _):
    y = x * 1
    torch.einsum("bij->bji", y)[:, 2].exp_()
    return y - 1


def no_operation(x, _):
    y = x * 1
    z = y.to(torch.float32).expand_as(y)[:].detach()
    z += 1
    return y * 1


def input_written(x, _):
    x[:, 1] += 1
    x.transpose(1, 2)[:, 0] = 2
    return x * 1, x


def state_written(x, own):
    own.state[2:4] = x[0, 0, :2]
    own.state.mul_(2)
    own.count += 1
    return x + own.state, own.count * 1


PATTERNS = [
    old_view_read_later, overlapping_views, written_through_two_views, reshaped_and_transposed,
    reshape_that_copies, reshape_that_views, contiguous_that_copies, one_copy_of_an_expanded_one,
    unbound, split_in_the_middle, split_batch, tensors_split, diagonals, unfolded, strided,
    complex_parts, complex_view, element_of_a_list, in_a_loop, added_to_slices, masked,
    broadcast_and_cast, indexed, bits, renamed_in_place, written_by_chains, lies_as_before,
    lists_of_views, einsum_that_views, no_operation, input_written, state_written,
]  # fmt: skip


def exported(module, x, sizes):
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=sizes, strict=False)


def run(module, x):
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(module(x))


@pytest.mark.parametrize("open_batch", [False, True], ids=["fixed", "open"])
@pytest.mark.parametrize("function", PATTERNS, ids=lambda f: f.__name__)
def test_values_are_those_of_the_module(function, open_batch, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("the graph was taken apart")

    sizes = {"x": {0: torch.export.Dim.AUTO}} if open_batch else None
    x = torch.randn(4, 6, 8)
    program = exported(Function(function).eval(), x.clone(), sizes)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    program = functional(program)
    assert not any(
        n.target._schema.is_mutable
        for n in program.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    )
    program.validate()
    module, own = program.module(), Function(function).eval()
    for batch in (4, 10) if open_batch else (4, 4):
        x = torch.randn(batch, 6, 8)
        ours, theirs = x.clone(), x.clone()
        found, expected = run(module, ours), run(own, theirs)
        assert len(found) == len(expected)
        for a, b in zip([*found, ours], [*expected, theirs], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    for name, buffer in own.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer)


class Layer(nn.Module):
    """A chunk of a gated delta rule: a triangular system, solved row by row in place."""

    def __init__(self, rows):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.rows = rows

    def forward(self, x):
        y = self.linear(x)
        y = y @ y.transpose(1, 2)
        for i in range(1, self.rows):
            row, block = y[..., i, :i].clone(), y[..., :i, :i].clone()
            y[..., i, :i] = row + (row.unsqueeze(-1) * block).sum(-2)
        return x + y @ x


def test_work_grows_with_the_writes_and_operators_stay_whole():
    added = []
    for layers in (1, 2, 4):
        module = nn.Sequential(*(Layer(6) for _ in range(layers))).eval()
        before = exported(module, torch.randn(3, 6, 8), None)
        linear = [n.name for n in before.graph.nodes if n.target is torch.ops.aten.linear.default]
        after = functional(before)
        names = [n.name for n in after.graph.nodes if n.target is torch.ops.aten.linear.default]
        assert names == linear
        added.append(len(after.graph.nodes) - len(before.graph.nodes))
    assert added == [added[0], 2 * added[0], 4 * added[0]]


@pytest.mark.slow  # a big graph
def test_a_gated_delta_net_takes_less_than_twice_its_export():
    """On fixed sizes: with open ones, torch.export alone takes ten times as long."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention"], mlp_only_layers=[0], num_experts=0, use_cache=False,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    start = time.process_time()
    with torch.no_grad():
        torch.export.export(model, (), {"input_ids": ids}, strict=False)
        alone = time.process_time() - start
        start = time.process_time()
        program = gp.trace(model, (), {"input_ids": ids}, {"input_ids": None})
        assert time.process_time() - start < 2 * alone
        logits = program.exported.module()(input_ids=ids)["logits"]
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)
