"""In-place operators: values kept, operators undecomposed where possible, modules still known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import graphprune as gp
from graphprune.frontends.tracing.functional import functional
from graphprune.ir.torch.interpreter import run_graph


class Function(nn.Module):
    """A linear layer and a function of its output and of the input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x), x)


def old_name_read(y, x):
    z = y.relu_()
    return y + z


def chained(y, x):
    return y.mul_(2).add_(1).clamp_(min=-0.5, max=1.5)


def masked_fill(y, x):
    y.masked_fill_(y > 0.3, -1.0)
    return y * 2


def added_tensor(y, x):
    y += F.pad(x, (1, 1))
    return y * y


def on_view(y, x):
    y.view(-1).relu_()
    return y * 2


def on_part(y, x):
    a, b = y.chunk(2, dim=-1)
    a.neg_()
    return torch.cat([b, a, y], -1)


def on_same(y, x):
    z = y.contiguous()
    z.exp_()
    return y - 1


def on_einsum(y, x):
    z = torch.einsum("ij->ij", y)
    z.exp_()
    return y - 1


def slice_assigned(y, x):
    z = torch.zeros_like(y)
    z[:, 2:6] = y[:, :4]
    z[:, :2] += 1
    return z + y


def index_assigned(y, x):
    y[:, [1, 3]] = x[:, :2]
    return y * 1


def written_output(y, x):
    y.relu_()
    return y


def squeezed(y, x):
    z = y.unsqueeze_(1)
    return z.squeeze_(1) * 2


def dropped(y, x):
    return F.dropout(F.leaky_relu(y, 0.1, inplace=True), 0.5, training=False, inplace=True)


def narrow_dtype(y, x):
    z = y.to(torch.bfloat16) * 1
    z += x.sum(-1, keepdim=True)
    return z.float()


def copied(y, x):
    z = torch.empty_like(y)
    z.copy_(y)
    return z + 1


EXCHANGED = [old_name_read, chained, masked_fill, added_tensor, dropped, squeezed, copied]
SORTED_OUT = [on_view, on_part, on_same, on_einsum, slice_assigned, index_assigned, narrow_dtype,
              written_output]  # fmt: skip


def exported(module, *args):
    with torch.no_grad():
        return torch.export.export(module.eval(), args, strict=False)


def is_functional(program):
    return not any(
        getattr(getattr(n.target, "_schema", None), "is_mutable", False)
        for n in program.graph.nodes
    )


@pytest.mark.parametrize("function", EXCHANGED + SORTED_OUT, ids=lambda f: f.__name__)
def test_values_are_kept(function):
    module, x = Function(function), torch.randn(3, 6)
    with torch.no_grad():
        expected = module(x.clone())
    program = functional(exported(module, x))
    assert is_functional(program)
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("function", EXCHANGED, ids=lambda f: f.__name__)
def test_an_operator_is_exchanged_and_nothing_else(function):
    program = exported(Function(function), torch.randn(3, 6))
    before = [str(n.target).replace("_.", ".") for n in program.graph.nodes]
    assert [str(n.target) for n in functional(program).graph.nodes] == before


def test_without_in_place_operators_nothing_happens():
    program = exported(Function(lambda y, x: y.relu()), torch.randn(3, 6))
    assert functional(program) is program


def test_batch_norm_stays_whole_and_modules_are_known():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
    )
    program = functional(exported(module, torch.randn(2, 3, 6, 6)))
    calls = {n.name: n for n in program.graph.nodes if n.op == "call_function"}
    names = [str(n.target) for n in calls.values()]
    assert names == ["aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default",
                     "aten.conv2d.default"]  # fmt: skip
    paths = [list(n.meta["nn_module_stack"].values())[-1][0] for n in calls.values()]
    assert paths == ["0", "1", "2", "3"]


def test_modules_are_known_after_torch_has_sorted_it_out():
    inner = Function(slice_assigned)
    program = functional(exported(nn.Sequential(inner, nn.Linear(8, 2)), torch.randn(3, 6)))
    stacks = {
        list(n.meta["nn_module_stack"].values())[-1][0]
        for n in program.graph.nodes
        if n.op == "call_function"
    }
    assert stacks == {"0", "0.linear", "1"}


class Counter(nn.Module):
    """State that forward writes, and an input that it writes."""

    def __init__(self, write_input):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(8))
        self.write_input = write_input

    def forward(self, x):
        if self.write_input:
            x.mul_(2)
        h = F.relu(self.up(x))
        if not self.write_input:
            self.seen += h.mean(0)
        return self.down(h)


def test_written_state_is_frozen_with_a_reason():
    x = torch.randn(3, 6)
    program = gp.trace(Counter(write_input=False).eval(), (x,))
    reasons = program.frozen()
    assert "a dimension of updated state" in reasons["seen", 0]
    assert reasons["up.weight", 0] == reasons["seen", 0]


def test_a_written_input_still_leaves_the_middle_prunable():
    x = torch.randn(3, 6)
    module = Counter(write_input=True).eval()
    expected = module(x.clone())
    program = gp.trace(module, (x.clone(),))
    given = run_graph(program.exported, program.weights, ((x.clone(),), {}), torch.float32)
    torch.testing.assert_close(given[0], expected)
    plan = gp.select(program, remove={"ffn": 0.5}, score="random")
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim).raise_if_failed()


@pytest.mark.parametrize("function", [old_name_read, slice_assigned], ids=lambda f: f.__name__)
def test_pruning_goes_through(function):
    module = nn.Sequential(Function(function), nn.ReLU(inplace=True), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 6)
    program = gp.trace(module, (x,))
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=2)
    slim = gp.apply(program, plan)
    certificate = gp.verify(program, plan, slim)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 0
    assert len(pytree.tree_leaves(slim.exported.module()(x))) == 1
