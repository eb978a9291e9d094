"""Certificates: right slim models pass, wrong ones don't, and each failure says why."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.checkpoints import memory as checkpoint_memory
from graphprune.ir.torch import memory
from graphprune.ir.torch.memory import affordable_dtype, is_widened_whole
from graphprune.ir.torch.random_inputs import random_inputs
from graphprune.oracle.verification import compare, verify

KEPT = [0, 3, 4, 7, 9]


def plan_of(program, kept):
    return gp.Plan(program.fingerprint, kept, {n: program.by_name[n].size for n in kept})


def slim_of(module, *args):
    """A hand-made slim module as a slim model."""
    traced = gp.trace(module, args)
    return SimpleNamespace(exported=traced.exported, weights=traced.weights)


class Mlp(nn.Module):
    """Linear, layer norm, gelu, linear; `counted` is what the norm divides by."""

    def __init__(self, hidden, counted=None):
        super().__init__()
        self.up = nn.Linear(6, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, 4)
        self.counted = counted

    def forward(self, x):
        h = self.up(x)
        if self.counted is None:
            h = self.norm(h)
        else:
            h = h - h.sum(-1, keepdim=True) / self.counted
            h = h / (h.square().sum(-1, keepdim=True) / self.counted + self.norm.eps).sqrt()
            h = h * self.norm.weight + self.norm.bias
        return self.down(F.gelu(h))


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module.eval()


def cut_mlp(dense, kept, counted=None):
    slim = Mlp(len(kept), counted).eval()
    with torch.no_grad():
        for old, new in ((dense.up, slim.up), (dense.norm, slim.norm)):
            new.weight.copy_(old.weight[kept])
            new.bias.copy_(old.bias[kept])
        slim.down.weight.copy_(dense.down.weight[:, kept])
        slim.down.bias.copy_(dense.down.bias)
    return slim


@pytest.fixture
def mlp():
    x = torch.randn(5, 6)
    dense = randomise(Mlp(10))
    program = gp.trace(dense, (x,))
    return SimpleNamespace(dense=dense, x=x, program=program,
                           plan=plan_of(program, {"up.weight:0": tuple(KEPT)}))  # fmt: skip


def test_right_model_passes(mlp):
    cert = verify(mlp.program, mlp.plan, slim_of(cut_mlp(mlp.dense, KEPT), mlp.x))
    assert cert.passed
    assert cert.max_abs_error < 1e-13
    assert cert.max_rel_error < 1e-13
    assert cert.dense_difference > 0.1
    assert (cert.dtype, cert.tolerance) == ("float64", 1e-9)
    assert len(cert.outputs) == 1
    assert cert.inputs == "random, seed 0: x float32[5, 6]"
    cert.raise_if_failed()


class Gate(nn.Module):
    """Hidden units that nothing below 50 opens."""

    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 4)

    def forward(self, x):
        return self.down((self.up(x) - 50).relu())


def test_inputs_have_the_scale_of_the_example():
    """On standard normal ones all of these models are the same constant."""
    x = 100 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    dense = randomise(Gate(10))
    program = gp.trace(dense, (x,))
    plan = plan_of(program, {"up.weight:0": tuple(KEPT)})
    slim = Gate(len(KEPT)).eval()
    with torch.no_grad():
        slim.up.weight.copy_(dense.up.weight[KEPT])
        slim.up.bias.copy_(dense.up.bias[KEPT])
        slim.down.weight.copy_(dense.down.weight[:, KEPT])
        slim.down.bias.copy_(dense.down.bias)
        assert verify(program, plan, slim_of(slim, x)).passed
        slim.down.weight[0, 0] += 0.1
        certificate = verify(program, plan, slim_of(slim, x))
    assert not certificate.passed
    assert certificate.inputs.startswith("random, seed 0, of unit scale and of the example's: x")


def test_right_model_passes_in_float32(mlp):
    slim = slim_of(cut_mlp(mlp.dense, KEPT), mlp.x)
    cert = verify(mlp.program, mlp.plan, slim, dtype=torch.float32)
    assert cert.passed
    assert (cert.dtype, cert.tolerance) == ("float32", 1e-4)
    assert not verify(mlp.program, mlp.plan, slim, dtype=torch.float32, tolerance=1e-12).passed


def test_rewritten_model_passes(mlp):
    slim = gp.apply(mlp.program, mlp.plan)
    cert = verify(mlp.program, mlp.plan, slim, ((torch.randn(9, 6),), {}))
    assert cert.passed
    assert cert.inputs == "1 given: x float32[9, 6]"


def test_wrong_unit(mlp):
    slim = slim_of(cut_mlp(mlp.dense, [0, 3, 4, 7, 8]), mlp.x)
    cert = verify(mlp.program, mlp.plan, slim)
    assert not cert.passed
    with pytest.raises(gp.VerifyError) as caught:
        cert.raise_if_failed()
    assert caught.value.where == f"output {cert.outputs[0]} (float64, {cert.inputs})"
    assert "differs by" in str(caught.value.why)


def test_norm_over_the_full_count(mlp):
    right = slim_of(cut_mlp(mlp.dense, KEPT, counted=5), mlp.x)
    assert verify(mlp.program, mlp.plan, right).passed
    wrong = slim_of(cut_mlp(mlp.dense, KEPT, counted=10), mlp.x)
    assert not verify(mlp.program, mlp.plan, wrong).passed


class Attention(nn.Module):
    def __init__(self, dim, scale=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (2 * dim, 2 * dim, 6))
        self.scale = scale

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("scale", "passes"), [(8**-0.5, True), (None, False)])
def test_scale_of_attention(scale, passes):
    dense, x = randomise(Attention(8)), torch.randn(2, 5, 6)
    program = gp.trace(dense, (x,))
    name = next(s.name for s in program.structures if s.prunable and s.size == 8)
    plan = plan_of(program, {name: (1, 4, 6)})
    slim = Attention(3, scale).eval()
    state = dense.state_dict()
    for p in ("q.weight", "q.bias", "k.weight", "k.bias"):
        state[p] = state[p].unflatten(0, (2, 8))[:, [1, 4, 6]].flatten(0, 1)
    slim.load_state_dict(state)
    assert verify(program, plan, slim_of(slim, x)).passed is passes


def test_wrong_shape_and_graph_that_fails(mlp):
    slim = slim_of(cut_mlp(mlp.dense, KEPT), mlp.x)
    slim.weights = dict(slim.weights) | {"down.weight": torch.ones(4, 3)}
    cert = verify(mlp.program, mlp.plan, slim)
    assert not cert.passed
    assert "doesn't run" in str(cert.problem)
    slim.weights = dict(slim.weights) | {
        "down.weight": torch.ones(3, 5), "down.bias": torch.ones(3)
    }  # fmt: skip
    cert = verify(mlp.program, mlp.plan, slim)
    assert "shape is [5, 3] instead of [5, 4]" in str(cert.problem)


class Logarithm(nn.Module):
    """Finite for the dense model; NaN once the hidden axis has lost what makes its sum positive."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)

    def forward(self, x):
        return (self.up(x).square() - 1).sum(-1).log()


def test_pruning_that_makes_nan_names_the_node():
    dense = Logarithm().eval()
    with torch.no_grad():
        dense.up.weight.zero_()
        dense.up.bias.fill_(0.5)
        dense.up.bias[0] = 9.0
    program = gp.trace(dense, (torch.randn(5, 6),))
    plan = plan_of(program, {"up.weight:0": tuple(range(1, 10))})
    cert = verify(program, plan, gp.apply(program, plan))
    assert not cert.passed
    assert "pruning makes it NaN or infinite, first at log" in str(cert.problem)


def test_slim_model_that_makes_nan_names_the_node(mlp):
    slim = slim_of(cut_mlp(mlp.dense, KEPT), mlp.x)
    slim.weights = dict(slim.weights) | {"norm.weight": torch.full((5,), torch.nan)}
    cert = verify(mlp.program, mlp.plan, slim)
    assert not cert.passed
    assert "the slim model makes it NaN or infinite, first at layer_norm" in str(cert.problem)


def test_vacuous_comparison_is_recorded(mlp):
    with torch.no_grad():
        mlp.dense.down.weight.zero_()
    program = gp.trace(mlp.dense, (mlp.x,))
    cert = verify(program, mlp.plan, slim_of(cut_mlp(mlp.dense, KEPT), mlp.x))
    assert cert.passed
    assert cert.dense_difference == 0


def test_several_inputs_all_count(mlp):
    slim = gp.apply(mlp.program, mlp.plan)
    first, second = torch.randn(2, 6), torch.randn(7, 6)
    given: list = [((first,), {}), ((second,), {})]
    assert verify(mlp.program, mlp.plan, slim, given).passed
    second[3, 2] = torch.nan
    assert not verify(mlp.program, mlp.plan, slim, given, tolerance=0.0).passed


def test_plan_of_another_model(mlp):
    other = gp.trace(randomise(Mlp(12)), (mlp.x,))
    with pytest.raises(gp.PlanError):
        verify(other, mlp.plan, slim_of(mlp.dense, mlp.x))


class Tokens(nn.Module):
    """Embeddings by token and by kind, with a mask whose sum must not be zero."""

    def __init__(self):
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 8), nn.Embedding(3, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, ids, kind, mask):
        h = self.words(ids) + self.kinds(kind.unsqueeze(0).expand(2, -1))
        h = self.down(F.relu(self.up(h)))
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), ids


def test_random_inputs_stay_in_the_vocabulary():
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    example = (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.int32), mask)
    program = gp.trace(randomise(Tokens()), example, dynamic_shapes=())
    (ids, kind, given), _ = random_inputs(program)
    assert (ids.dtype, ids.shape) == (torch.int64, (2, 5))
    assert 3 <= ids.max() < 50
    assert kind.dtype == torch.int32
    assert 0 < kind.max() < 3
    assert torch.equal(given, mask)
    again, other = random_inputs(program)[0], random_inputs(program, seed=1)[0]
    assert torch.equal(again[0], ids)
    assert not torch.equal(other[0], ids)
    plan = plan_of(program, {"up.weight:0": (1, 5, 6)})
    cert = verify(program, plan, gp.apply(program, plan))
    assert cert.passed
    assert len(cert.outputs) == 2


def test_example_without_values():
    example = (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64),
               torch.ones(2, 5, dtype=torch.int64))  # fmt: skip
    program = gp.trace(randomise(Tokens()), example, dynamic_shapes=())
    program.example = ((), {})
    (ids, _, mask), _ = random_inputs(program)
    assert ids.shape == (2, 5)
    assert (mask == 1).all()


def test_example_serves_where_random_inputs_fail():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.down(self.up(x.sqrt()))

    program = gp.trace(randomise(Root()), (torch.rand(5, 6),))
    plan = plan_of(program, {"up.weight:0": tuple(KEPT)})
    cert = verify(program, plan, gp.apply(program, plan))
    assert cert.passed
    assert cert.inputs.startswith("the example's")


def test_modules_are_widened_whole_where_little_is_held(mlp, monkeypatch):
    whole = 8 * sum(p.numel() for p in mlp.dense.parameters())
    for held, wanted in ((whole, True), (whole - 1, False)):
        monkeypatch.setattr(checkpoint_memory, "HELD", held)
        assert is_widened_whole(mlp.program) is wanted


def test_dtype_follows_the_memory(mlp, monkeypatch):
    # One weight at a time, in a few copies.
    needed = 4 * 8 * max(p.numel() for p in mlp.dense.parameters())
    for available, dtype in ((2 * needed, torch.float64), (2 * needed - 2, torch.float32)):
        monkeypatch.setattr(memory, "available_memory", lambda n=available: n)
        assert affordable_dtype(mlp.program) is dtype
    monkeypatch.undo()
    assert memory.available_memory() > 2**20


@pytest.mark.parametrize(
    ("expected", "actual", "problem"),
    [
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf]), None),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), None),
        (torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.inf]), "on one side only"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "on one side only"),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), "no finite value"),
        (torch.tensor([], dtype=torch.float64), torch.tensor([], dtype=torch.float64), None),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs by 1"),
        (torch.tensor([True]), torch.tensor([False]), "differs by 1"),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), "differs by 2"),
        (torch.tensor([1e6, 1.0]), torch.tensor([1e6, 1.0 + 5e-4]), None),
        (torch.tensor([0.1]), torch.tensor([0.2]), "differs by"),
        (3, 3, None),
        (None, 3, "3 instead of None"),
    ],
)
def test_compare(expected, actual, problem):
    (difference,) = compare(["y"], [expected], [actual], 1e-9)
    if problem is None:
        assert difference.problem is None
    else:
        assert problem in str(difference.problem)
    assert compare(["y"], [expected], [], 1e-9)[0].problem == "0 outputs instead of 1"
