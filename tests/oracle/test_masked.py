"""The masked model against modules that were cut by hand."""

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.ir.torch.interpreter import run_graph
from graphprune.oracle.masked import run_masked

EXACT = 1e-12


def plan_of(program, kept):
    """A plan that keeps the given units of the named structures."""
    return gp.Plan(
        program.fingerprint,
        {name: tuple(units) for name, units in kept.items()},
        {name: program.by_name[name].size for name in kept},
    )


def masked(program, kept, *args, **kwargs):
    selection = plan_of(program, kept).bind(program)
    return run_masked(program, selection, (args, kwargs))


def randomise(module, seed=0):
    """Every parameter and buffer away from its initial value, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.5
                tensor.copy_(values.abs() + 0.5 if name.endswith("var") else values)
    return module.eval()


def cut(tensor, **dims):
    """`tensor` in double at the given indices: ``cut(w, d0=rows, d1=columns)``."""
    tensor = tensor.detach().double()
    for name, index in dims.items():
        tensor = tensor.index_select(int(name[1:]), torch.as_tensor(index))
    return tensor


def assert_same(given, expected, tolerance=EXACT):
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    assert (given - expected).abs().max() <= tolerance


class Mlp(nn.Module):
    """Linear, a norm over the hidden axis, gelu, linear."""

    def __init__(self, norm):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = norm
        self.down = nn.Linear(10, 4)

    def forward(self, x):
        return self.down(F.gelu(self.norm(self.up(x))))


class Chain(nn.Module):
    """Linear, a function of the hidden axis, linear."""

    def __init__(self, function):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.up(x)))


KEPT = [0, 3, 4, 7, 9]


def by_hand(module, x, function):
    """The MLP with its hidden axis cut to KEPT and `function` in the middle."""
    h = F.linear(x.double(), cut(module.up.weight, d0=KEPT), cut(module.up.bias, d0=KEPT))
    return F.linear(function(h), cut(module.down.weight, d1=KEPT), module.down.bias.double())


def test_layer_norm():
    module = randomise(Mlp(nn.LayerNorm(10)))
    x = torch.randn(5, 6)
    given = masked(gp.trace(module, (x,)), {"up.weight:0": KEPT}, x)
    w, b = cut(module.norm.weight, d0=KEPT), cut(module.norm.bias, d0=KEPT)
    assert_same(given[0], by_hand(module, x, lambda h: F.gelu(F.layer_norm(h, (5,), w, b))))


@pytest.mark.parametrize("eps", [1e-3, None])
def test_rms_norm(eps):
    module = randomise(Mlp(nn.RMSNorm(10, eps=eps)))
    x = torch.randn(5, 6)
    given = masked(gp.trace(module, (x,)), {"up.weight:0": KEPT}, x)
    w = cut(module.norm.weight, d0=KEPT)
    assert_same(given[0], by_hand(module, x, lambda h: F.gelu(F.rms_norm(h, (5,), w, eps))))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h - h.mean(-1, keepdim=True),
        lambda h: h / h.std(-1, keepdim=True),
        lambda h: h * h.var(dim=-1, unbiased=False).unsqueeze(-1),
        lambda h: h.softmax(-1),
        lambda h: F.log_softmax(h, dim=-1),
        lambda h: h - h.amax(-1, keepdim=True),
        lambda h: h + h.amin(-1).unsqueeze(-1),
        lambda h: h - torch.logsumexp(h, -1, keepdim=True),
        lambda h: F.normalize(h, dim=-1),
        lambda h: h * torch.linalg.vector_norm(h, -1, dim=-1, keepdim=True),
        lambda h: torch.cumsum(h, -1).mean(-1, keepdim=True) + h,
        lambda h: h.exp().log2() + (h > 0).all(-1, keepdim=True),
    ],
    ids=lambda f: f"line{f.__code__.co_firstlineno}",
)
def test_function_of_the_kept_coordinates(function):
    module = randomise(Chain(function))
    x = torch.randn(5, 6)
    given = masked(gp.trace(module, (x,)), {"up.weight:0": KEPT}, x)
    assert_same(given[0], by_hand(module, x, function))


def test_infinite_values_at_removed_coordinates_vanish():
    module = randomise(Chain(lambda h: (h * h).log() + 1 / h))
    x = torch.randn(5, 6)
    given = masked(gp.trace(module, (x,)), {"up.weight:0": KEPT}, x)
    assert given[0].isfinite().all()
    assert_same(given[0], by_hand(module, x, module.function))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.relu6(self.norm(self.first(x)))
        x = F.max_pool2d(F.silu(self.depthwise(x)), 2)
        return self.last(x).mean((2, 3))


def test_convolution_batch_norm_and_depthwise():
    module = randomise(Convolutions())
    x, keep = torch.randn(2, 3, 6, 6), [1, 2, 6]
    given = masked(gp.trace(module, (x,)), {"first.weight:0": keep}, x)
    n = module.norm
    statistics = [cut(t, d0=keep) for t in (n.running_mean, n.running_var, n.weight, n.bias)]
    y = F.conv2d(x.double(), cut(module.first.weight, d0=keep), padding=1)
    y = F.relu6(F.batch_norm(y, *statistics))
    d = module.depthwise
    y = F.conv2d(y, cut(d.weight, d0=keep), cut(d.bias, d0=keep), padding=1, groups=3)
    y = F.max_pool2d(F.silu(y), 2)
    y = F.conv2d(y, cut(module.last.weight, d1=keep), module.last.bias.double())
    assert_same(given[0], y.mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(3, 12, 1)
        self.norm = nn.GroupNorm(4, 12)
        self.down = nn.Conv1d(12, 2, 1)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


@pytest.mark.parametrize(
    ("groups", "inner"), [([0, 2, 3], [0, 1, 2]), ([0, 1, 2, 3], [0, 2]), ([1, 3], [1, 2])]
)
def test_group_norm(groups, inner):
    module = randomise(Grouped())
    x = torch.randn(2, 3, 5)
    channels = [3 * g + i for g in groups for i in inner]
    kept = {"up.weight:0/0": groups, "up.weight:0/1": inner}
    given = masked(gp.trace(module, (x,)), kept, x)
    y = F.conv1d(x.double(), cut(module.up.weight, d0=channels), cut(module.up.bias, d0=channels))
    weight, bias = (cut(p, d0=channels) for p in (module.norm.weight, module.norm.bias))
    y = torch.tanh(F.group_norm(y, len(groups), weight, bias))
    assert_same(
        given[0], F.conv1d(y, cut(module.down.weight, d1=channels), module.down.bias.double())
    )


KV, REP, DIM, V = 2, 3, 8, 5


def rotate(x, frequencies):
    """Rotary embedding of pairs that are half the last dimension apart."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies.to(x.dtype)
    angles = torch.cat([angles, angles], -1)
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; manual or by SDPA."""

    def __init__(self, manual):
        super().__init__()
        self.manual = manual
        self.q = nn.Linear(7, KV * REP * DIM)
        self.k = nn.Linear(7, KV * DIM)
        self.v = nn.Linear(7, KV * V)
        self.o = nn.Linear(KV * REP * V, 7)
        self.register_buffer("frequencies", torch.zeros(DIM // 2))

    def forward(self, x):
        batch, length, _ = x.shape
        q = rotate(self.q(x).view(batch, length, -1, DIM).transpose(1, 2), self.frequencies)
        k = rotate(self.k(x).view(batch, length, -1, DIM).transpose(1, 2), self.frequencies)
        v = self.v(x).view(batch, length, -1, V).transpose(1, 2)
        k, v = (t.repeat_interleave(REP, 1) for t in (k, v))
        if self.manual:
            y = (q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


def attention_by_hand(module, x, heads, pairs, values):
    """Attention with the given query heads per kept group, rotary pairs and value coordinates."""
    x, dim = x.double(), [*pairs, *(p + DIM // 2 for p in pairs)]
    outputs, f = [], module.frequencies[pairs]
    for group, queries in heads.items():
        rows = [group * DIM + d for d in dim]
        k = rotate(F.linear(x, cut(module.k.weight, d0=rows), cut(module.k.bias, d0=rows)), f)
        rows = [group * V + d for d in values[group]]
        v = F.linear(x, cut(module.v.weight, d0=rows), cut(module.v.bias, d0=rows))
        for head in ((group * REP) + r for r in queries):
            rows = [head * DIM + d for d in dim]
            q = F.linear(x, cut(module.q.weight, d0=rows), cut(module.q.bias, d0=rows))
            scores = rotate(q, f) @ k.transpose(-1, -2) / DIM**0.5
            if not module.manual:
                n = x.shape[1]
                scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            columns = [head * V + d for d in values[group]]
            outputs.append(scores.softmax(-1) @ v @ cut(module.o.weight, d1=columns).T)
    return sum(outputs) + module.o.bias.double()


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("length", [4, 9])
def test_grouped_query_attention_with_rotary(manual, length):
    module = randomise(Attention(manual))
    example = torch.randn(2, 4, 7)
    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = gp.trace(module, (example,), dynamic_shapes=shapes)
    roles = {s.role: s.name for s in program.structures if s.prunable}
    x = torch.randn(3, length, 7)
    pairs, tied = [0, 2, 3], {0: [0, 2], 1: [1, 2]}
    values = {0: [1, 2, 4], 1: [0, 3, 4]}
    both = {
        roles["query_heads"]: list(map(tuple, tied.values())),
        roles["v_dim"]: list(map(tuple, values.values())),
        roles["qk_dim"]: pairs,
    }
    given = masked(program, both, x)
    assert_same(given[0], attention_by_hand(module, x, tied, pairs, values))
    whole = {g: list(range(V)) for g in range(KV)}
    given = masked(program, {roles["kv_heads"]: [1], roles["qk_dim"]: pairs}, x)
    assert_same(given[0], attention_by_hand(module, x, {1: [0, 1, 2]}, pairs, whole))


class Folded(nn.Module):
    """Heads merged with a dynamic batch, as many vision models do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 3 * 4 * 5)
        self.out = nn.Linear(4 * 5, 6)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, 4, 5).permute(2, 0, 3, 1, 4)
        q, k, v = (t.reshape(batch * 4, length, 5) for t in qkv.unbind(0))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return self.out(y.view(batch, 4, length, 5).transpose(1, 2).reshape(batch, length, 20))


@pytest.mark.parametrize("batch", [2, 5])
def test_pruned_axis_merged_with_a_dynamic_one(batch):
    module = randomise(Folded())
    program = gp.trace(module, (torch.randn(2, 3, 6),))
    heads = next(s.name for s in program.structures if s.prunable and s.size == 4)
    x, keep = torch.randn(batch, 3, 6), [0, 3]
    given = masked(program, {heads: keep}, x)
    rows = [part * 20 + h * 5 + d for part in range(3) for h in keep for d in range(5)]
    qkv = F.linear(x.double(), cut(module.qkv.weight, d0=rows), cut(module.qkv.bias, d0=rows))
    q, k, v = qkv.view(batch, 3, 3, 2, 5).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(batch, 3, 10)
    columns = [h * 5 + d for h in keep for d in range(5)]
    assert_same(given[0], F.linear(y, cut(module.out.weight, d1=columns), module.out.bias.double()))


class Block(Mlp):
    def __init__(self):
        super().__init__(nn.LayerNorm(10))
        self.down = nn.Linear(10, 6)

    def forward(self, x):
        return x + super().forward(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sin()


@pytest.mark.parametrize("kept", [[0, 3], [1, 2], [2]])
def test_removed_layers(kept):
    module = randomise(Stack())
    program = gp.trace(module, (torch.randn(5, 6),))
    x = torch.randn(5, 6)
    given = masked(program, {"layers": kept}, x)
    double, y = module.double(), x.double()
    for i in kept:
        y = double.layers[i](y)
    assert_same(given[0], y.sin().detach())


def test_removed_layers_are_not_read():
    module = randomise(Stack())
    x = torch.randn(5, 6)
    program = gp.trace(module, (x,))
    read = []

    class Recording(Mapping):
        def __getitem__(self, name):
            read.append(name)
            return module.state_dict()[name]

        def __iter__(self):
            return iter(module.state_dict())

        def __len__(self):
            return len(module.state_dict())

    program.weights = Recording()
    masked(program, {"layers": [0, 3]}, x)
    assert {name.split(".")[1] for name in read} == {"0", "3"}


def test_weights_are_held_one_at_a_time():
    module = randomise(Stack())
    x = torch.randn(5, 6)
    program = gp.trace(module, (x,))
    alive: weakref.WeakSet = weakref.WeakSet()
    peak = []

    class Fresh(Mapping):
        def __getitem__(self, name):
            tensor = module.state_dict()[name].clone()
            alive.add(tensor)
            peak.append(len(alive))
            return tensor

        def __iter__(self):
            return iter(module.state_dict())

        def __len__(self):
            return len(module.state_dict())

    program.weights = Fresh()
    gc.collect()
    run_graph(program.exported, program.weights, ((x,), {}), torch.float32)
    assert max(peak) <= 3  # a linear operator reads its weight and its bias
    assert len(peak) == len(module.state_dict())


class Casting(nn.Module):
    """Goes through half precision, creates tensors, and checks dtypes in its graph."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)

    def forward(self, x, scale):
        h = self.up(x).to(torch.float16).float() * torch.full((10,), 0.1)
        h = torch.softmax(h, -1, dtype=torch.float32).to(torch.bfloat16) + torch.arange(3.0)[2]
        return self.down(h.float()) * scale["by"], h.argmax(-1)


def test_everything_runs_in_one_dtype():
    module = randomise(Casting())
    x, scale = torch.randn(5, 6), {"by": torch.rand(5, 1)}
    program = gp.trace(module, (x,), {"scale": scale})
    given, places = run_graph(program.exported, program.weights, ((x,), {"scale": scale}))
    double = module.double()
    h = torch.softmax(double.up(x.double()) * 0.1, -1) + 2
    assert_same(given, (double.down(h) * scale["by"].double()).detach())
    assert places.dtype == torch.int64
    assert torch.get_default_dtype() == torch.float32


def test_inputs_of_another_form_are_refused():
    program = gp.trace(randomise(Casting()), (torch.randn(5, 6),), {"scale": {"by": torch.ones(1)}})
    with pytest.raises(gp.VerifyError, match="form"):
        run_graph(program.exported, program.weights, ((torch.randn(5, 6),), {}))
