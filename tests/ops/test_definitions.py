"""Operators that torch defines by others: taken apart, they are the same, and are pruned."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.frontends.tracing import decompose
from graphprune.ir.torch.interpreter import run_graph
from zoo.case import check, randomise


def total(y):
    """One number that tells about all numbers of a result."""
    parts = y if isinstance(y, list | tuple) else [y]
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts]
    return sum(((p.double() * 0.7).sin() * (i + 1)).sum() for i, p in enumerate(parts))


class Called(nn.Module):
    """A function of parameters, of which every axis may leave that the function lets go."""

    def __init__(self, function, *values):
        super().__init__()
        self.values = nn.ParameterList(values)
        self.function = function

    def forward(self, x):
        return total(self.function(*self.values)) + x.sum()


# What freezes nothing, and is computed by a slice of the operands what the slim model computes.
FREE = {
    "multiply": (lambda a, b: torch.multiply(a, b), (4, 6), (6,)),
    "divide": (lambda a, b: torch.divide(a, b, rounding_mode="floor"), (4, 6), (4, 6)),
    "subtract": (lambda a, b: torch.subtract(a, b, alpha=2), (4, 6), (4, 6)),
    "rsub": (lambda a: torch.rsub(a, 2), (4, 6)),
    "negative": (torch.negative, (4, 6)),
    "absolute": (torch.absolute, (4, 6)),
    "fix": (torch.fix, (4, 6)),
    "greater": (lambda a, b: torch.greater(a, b), (4, 6), (4, 6)),
    "less_equal": (lambda a: torch.less_equal(a, 0.1), (4, 6)),
    "not_equal": (lambda a, b: torch.not_equal(a, b), (4, 6), (4, 6)),
    "isclose": (lambda a, b: torch.isclose(a, b, atol=1.0), (4, 6), (4, 6)),
    "expit": (torch.special.expit, (4, 6)),
    "special_softmax": (lambda a: torch.special.softmax(a, -1), (4, 6)),
    "special_log_softmax": (lambda a: torch.special.log_softmax(a, 0).exp(), (4, 6)),
    "special_logsumexp": (lambda a: torch.special.logsumexp(a, 1), (4, 6)),
    "special_erf": (torch.special.erf, (4, 6)),
    "special_ndtr": (torch.special.ndtr, (4, 6)),
    "special_xlogy": (lambda a: torch.special.xlogy(a, a.square() + 1), (4, 6)),
    "arcsinh": (torch.arcsinh, (4, 6)),
    "arctan2": (torch.arctan2, (4, 6), (4, 6)),
    "logsigmoid": (F.logsigmoid, (4, 6)),
    "moveaxis": (lambda a: torch.moveaxis(a, 0, -1).square(), (4, 6, 3)),
    "atleast_3d": (torch.atleast_3d, (4, 6)),
    "ravel_of_one": (torch.ravel, (6,)),
    "fliplr": (torch.fliplr, (4, 6)),
    "hstack": (lambda a, b: torch.hstack([a, b]), (4, 6), (4, 3)),
    "hstack_of_vectors": (lambda a, b: torch.hstack([a, b]), (6,), (3,)),
    "vstack_of_vectors": (lambda a, b: torch.vstack([a, b]), (6,), (6,)),
    "column_stack": (lambda a, b: torch.column_stack([a, b]), (6,), (6, 2)),
    "vecdot": (torch.linalg.vecdot, (4, 6), (4, 6)),
    "inner": (torch.inner, (4, 6), (3, 6)),
    "kron": (torch.kron, (4, 6), (2, 3)),
    "chain_matmul": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), (4, 6), (6, 3), (3, 5)),
    "linalg_matmul": (torch.linalg.matmul, (4, 6), (6, 3)),
    "addbmm": (lambda m, a, b: torch.addbmm(m, a, b), (4, 3), (2, 4, 6), (2, 6, 3)),
    "addr": (lambda m, a, b: torch.addr(m, a, b, beta=2), (4, 6), (4,), (6,)),
    "pairwise_distance": (lambda a, b: F.pairwise_distance(a, b), (4, 6), (4, 6)),
    "frobenius": (lambda a: torch.linalg.matrix_norm(a), (2, 4, 6)),
    "linalg_norm": (lambda a: torch.linalg.norm(a, 3, dim=1), (4, 6)),
    "nanmean": (lambda a: torch.nanmean(a, 1), (4, 6)),
    "count_nonzero": (lambda a: torch.count_nonzero(a > 0.1, 1), (4, 6)),
    "broadcast_tensors": (lambda a, b: torch.broadcast_tensors(a, b), (4, 1), (1, 6)),
    "meshgrid_ij": (lambda a, b: torch.meshgrid(a, b, indexing="ij"), (4,), (6,)),
    "meshgrid_xy": (lambda a, b: torch.meshgrid(a, b, indexing="xy"), (4,), (6,)),
    "mse": (lambda a, b: F.mse_loss(a, b), (4, 6), (4, 6)),
    "huber": (lambda a, b: F.huber_loss(a, b), (4, 6), (4, 6)),
    "l1": (lambda a, b: F.l1_loss(a, b, reduction="none"), (4, 6), (4, 6)),
    "frexp": (lambda a: torch.frexp(a)[0], (4, 6)),
    "expand_copy": (lambda a: torch.expand_copy(a, (3, 4, 6)), (4, 6)),
    "permute_copy": (lambda a: torch.permute_copy(a, (1, 0)), (4, 6)),
}  # fmt: skip


def traced(function, *shapes):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    module = Called(function, *(nn.Parameter(v) for v in values)).eval()
    example = torch.zeros(2, dtype=torch.float64)
    return gp.trace(module, (example,)), values, example


def slices(program, plan, values):
    kept = plan.kept(program)
    found = []
    for i, value in enumerate(values):
        for dim, places in enumerate(kept.get(f"values.{i}", ())):
            if places is not None:
                value = value.index_select(dim, torch.as_tensor(np.asarray(places)))
        found.append(value)
    return found


PLACED = ("fliplr", "kron", "expand_copy")
"""Whose arguments or results count places, so that a slice of the operands gives something else."""


def computed(exported, weights, example):
    (found,) = run_graph(exported, weights, ((example,), {}))
    return float(found)


def near(function, values):
    wanted = float(total(function(*values)))
    largest = max(float(v.abs().max()) for v in values)
    return pytest.approx(wanted, rel=1e-12, abs=1e-11 * max(1.0, largest))


@pytest.mark.parametrize("name", FREE)
def test_taken_apart_it_is_the_same_and_a_slice_is_the_slim_model(name):
    function, *shapes = FREE[name]
    program, values, example = traced(function, *shapes)
    assert not program.typing.opaque
    assert all(r.startswith("an axis of size 1") for r in program.frozen().values())
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=1)
    assert plan.kept_units
    slim = gp.apply(program, plan)
    gp.verify(program, plan, slim, dtype=torch.float64).raise_if_failed()
    for scale in (0.01, 1.0, 100.0):
        scaled = [v * scale for v in values]
        dense = {n: w * scale for n, w in program.weights.items()}
        assert computed(program.exported, dense, example) == near(function, scaled)
        pruned = {n: slim.weights[n] * scale for n in slim.weights}
        if name not in PLACED:
            assert computed(slim.exported, pruned, example) == near(
                function, slices(program, plan, scaled)
            )


# What freezes some of its axes: function, shapes of its operands, the axes that stay prunable.
PARTLY = {
    "unfold": (lambda a: a.unfold(1, 3, 2), [(4, 7)], {("values.0", 0)}),
    "unfold_copy": (lambda a: torch.unfold_copy(a, 0, 2, 1), [(4, 7)], {("values.0", 1)}),
    "hsplit": (lambda a: torch.hsplit(a, 2), [(4, 6)], {("values.0", 0), ("values.0", 1)}),
    "cross": (lambda a, b: torch.cross(a, b), [(4, 3), (4, 3)], {("values.0", 0), ("values.1", 0)}),
    "linalg_cross": (
        lambda a, b: torch.linalg.cross(a, b, dim=0),
        [(3, 4), (3, 4)],
        {("values.0", 1), ("values.1", 1)},
    ),
    "diff": (
        lambda a, b: torch.diff(a, prepend=b),
        [(4, 6), (4, 2)],
        {("values.0", 0), ("values.1", 0)},
    ),
    "histc": (lambda a: torch.histc(a, 5, -1, 1), [(4, 6)], set()),
    "bucketize": (
        lambda a, b: torch.bucketize(a, b.sort()[0]),
        [(4, 6), (3,)],
        {("values.0", 0), ("values.0", 1)},
    ),
    "searchsorted": (
        lambda a, b: torch.searchsorted(a.sort(-1)[0], b),
        [(4, 6), (4, 2)],
        {("values.0", 0), ("values.1", 0), ("values.1", 1)},
    ),
    "cosine_similarity": (lambda a, b: F.cosine_similarity(a, b), [(4, 6), (4, 1)],
                          {("values.0", 0), ("values.1", 0)}),
    "batch_norm": (lambda a: F.batch_norm(a, None, None, training=True), [(4, 6)],
                   {("values.0", 1)}),
    "trapezoid": (lambda a: torch.trapezoid(a, dim=1), [(4, 6)], {("values.0", 0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_places_that_matter_are_frozen(name):
    function, shapes, free = PARTLY[name]
    program, values, example = traced(function, *shapes)
    assert not program.typing.opaque
    every = {(f"values.{i}", d) for i, s in enumerate(shapes) for d in range(len(s))}
    assert every - program.frozen().keys() == free
    assert computed(program.exported, program.weights, example) == near(function, values)
    if free:
        plan = gp.select(program, remove={"*": 0.5}, score="random", seed=1)
        slim = gp.apply(program, plan)
        gp.verify(program, plan, slim, dtype=torch.float64).raise_if_failed()
        if name != "hsplit":
            wanted = near(function, slices(program, plan, values))
            assert computed(slim.exported, slim.weights, example) == wanted


LIBRARY = torch.library.Library("graphprune_definitions", "FRAGMENT")


def defined(name, function):
    """An operator that is defined by others."""
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.graphprune_definitions, name)


def nested(x):
    return torch.multiply(torch.special.expit(x), x)


def writing(x):
    return x.clone().mul_(2).add_(x)


def by_size(x):
    return x.sum(-1) / x.shape[-1]


def repeated(x):
    return x.mean(-1, keepdim=True) + torch.zeros(x.shape[-1], dtype=x.dtype)


def by_length(x):
    return x if x.shape[0] > 3 else -x


class Around(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x):
        y = self.function(self.one(x))
        return self.two(y) if y.dim() > 1 else y


@pytest.mark.parametrize("function", [nested, writing], ids=lambda f: f.__name__)
def test_operators_of_other_packages_are_taken_apart_too(function):
    module = randomise(Around(defined(function.__name__, function)))
    x = torch.randn(4, 5)
    program = gp.trace(module, (x,))
    assert not program.typing.opaque
    slim = check(program, {"*": 0.5})
    kept = slim.plan.kept(program)["one.weight"][0]
    weight, bias = module.one.weight[kept], module.one.bias[kept]
    wanted = F.linear(function(F.linear(x, weight, bias)), module.two.weight[:, kept],
                      module.two.bias)  # fmt: skip
    torch.testing.assert_close(slim.exported.module()(x), wanted)


@pytest.mark.parametrize("function", [by_size, repeated], ids=lambda f: f.__name__)
def test_a_definition_that_computes_with_sizes_is_not_used(function):
    name = f"whole_{function.__name__}"
    program = gp.trace(randomise(Around(defined(name, function))), (torch.randn(4, 5),))
    reason = program.frozen()["one.weight", 0]
    assert f"no rule for operator graphprune_definitions.{name}" in reason
    assert "test_definitions.py" in reason


def test_a_definition_for_some_lengths_is_not_used(monkeypatch):
    @torch.library.custom_op("graphprune_definitions::any_length", mutates_args=())
    def any_length(x: torch.Tensor) -> torch.Tensor:
        return by_length(x).clone()

    any_length.register_fake(torch.empty_like)
    operator = torch.ops.graphprune_definitions.any_length.default
    monkeypatch.setattr(decompose, "decomposition_table", {operator: by_length})
    module = randomise(Around(operator))
    program = gp.trace(module, (torch.randn(4, 5),))
    assert "any_length" in program.frozen()["one.weight", 0]
    short = torch.randn(2, 5)
    torch.testing.assert_close(program.exported.module()(short), module(short))
    fixed = gp.trace(module, (torch.randn(4, 5),), dynamic_shapes={"x": None})
    assert ("one.weight", 0) not in fixed.frozen()


def test_names_modules_and_lines_stay():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Around(lambda y: torch.subtract(torch.special.softmax(y, -1), 0.5))

        def forward(self, x):
            a, b = torch.hsplit(self.inner.one(x), 2)
            return self.inner(x), torch.negative(a), torch.moveaxis(b, 0, 0)

    module, x = randomise(Two()), torch.randn(4, 5)
    before = torch.export.export(module, (x,), strict=False)
    names = [s.arg.name for s in before.graph_signature.output_specs]
    program = gp.trace(module, (x,))
    assert [s.arg.name for s in program.exported.graph_signature.output_specs] == names
    for found, wanted in zip(program.exported.module()(x), module(x), strict=True):
        torch.testing.assert_close(found, wanted)
    for node in program.exported.graph.nodes:
        if node.op == "call_function":
            assert "test_definitions.py" in node.meta["stack_trace"]
            assert node.meta["nn_module_stack"]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_files_and_classes(tmp_path, format):
    def function(y):
        left, right = torch.hsplit(torch.multiply(y, torch.special.expit(y)), 2)
        return torch.hstack([torch.negative(left), torch.absolute(right)])

    module, x = randomise(Around(function)), torch.randn(4, 5)
    slim = check(gp.trace(module, (x,)), {"ffn": 0.5})
    wanted = slim.exported.module()(x)
    assert type(slim.module) is Around
    torch.testing.assert_close(slim.module(x), wanted)
    path = tmp_path / f"slim.{format}"
    slim.save(path, format)
    if format == "pt2":
        found = torch.export.load(path).module()(x)
    else:
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        found = torch.from_numpy(found)
    torch.testing.assert_close(found, wanted)


def test_the_time_grows_with_the_number_of_operators_only():
    class Deep(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = nn.ModuleList(Around(torch.special.expit) for _ in range(layers))
            self.middle = nn.ModuleList(nn.Linear(3, 5) for _ in range(layers))

        def forward(self, x):
            for layer, middle in zip(self.layers, self.middle, strict=True):
                x = middle(layer(x))
            return x

    def traced_operators(layers):
        made = []
        original = decompose.make_fx

        def counting(*args, **options):
            made.append(args)
            return original(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decompose, "make_fx", counting)
            gp.trace(Deep(layers).eval(), (torch.randn(4, 5),))
        return len(made)

    assert traced_operators(6) == 3 * traced_operators(2) == 12
