"""Packed linear layers against float64, as operators of torch, and the choice of a format."""

import copy
import json
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from graphprune.kernels import choose as choosing
from graphprune.kernels import native
from graphprune.kernels.choose import DENSE, Setting, Table, choose, measure, worth_trying
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.formats.files import FORMATS
from graphprune.kernels.formats.reference import ACTIVATIONS
from graphprune.kernels.linear import SparseLinear
from graphprune.kernels.operators import TOKENS, linear

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def two_of_four(rows, columns, dtype=torch.float32):
    """A weight that every format holds."""
    drawn = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=drawn).unflatten(1, (-1, 4))
    lost = torch.rand(weight.shape, generator=drawn).argsort(dim=2)[..., :2]
    return weight.scatter(2, lost, 0).flatten(1).to(dtype)


def exact(x, weight, bias, activation):
    y = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return {
        "none": y,
        "relu": y.clamp(min=0),
        "silu": y / (1 + torch.exp(-y)),
        "gelu": y / 2 * (1 + torch.erf(y / 2**0.5)),
        "gelu_tanh": y / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
    }[activation]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (TOKENS,), (TOKENS + 1,), (0,)], ids=str)
def test_products_equal_float64(format, dtype, tokens):
    weight = two_of_four(48, 96, dtype)
    x, bias = torch.randn(*tokens, 96).to(dtype), torch.randn(48).to(dtype)
    packed = FORMATS[format].pack(weight)
    expected = exact(x, weight, bias, "none")
    found = linear(x, packed, bias)
    assert found.dtype == dtype
    assert found.shape == (*tokens, 48)
    if found.numel():
        assert (found - expected).abs().max() < ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_activations_equal_float64(format, activation, biased):
    weight = two_of_four(32, 64)
    x, bias = torch.randn(5, 64), torch.randn(32) if biased else None
    layer = SparseLinear(FORMATS[format].pack(weight), bias, activation)
    expected = exact(x, weight, bias, activation)
    assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("columns", [64, 68], ids=["whole", "padded"])
@pytest.mark.parametrize("tokens", [1, TOKENS + 1])
def test_two_of_four_runs_as_a_bitmap(columns, tokens, monkeypatch):
    """Some groups have fewer than two values."""
    weight = two_of_four(32, columns)
    weight[3] = 0
    weight[:, 5] = 0
    packed = FORMATS["nm24"].pack(weight)
    unpacked = []
    unpack = type(packed).unpack
    monkeypatch.setattr(type(packed), "unpack", lambda self: unpacked.append(1) or unpack(self))
    bitmap = packed.as_bitmap()
    assert (bitmap is None) == (columns % 8 != 0)
    x, bias = torch.randn(tokens, columns), torch.randn(32)
    expected = exact(x, weight, bias, "none")
    for found in (linear(x, packed, bias), SparseLinear(packed, bias)(x)):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if bitmap is not None:
        assert bitmap.values.data_ptr() == packed.values.data_ptr()
        bitmap.validate()
        assert torch.equal(bitmap.unpack(), weight)
        assert bool(unpacked) != native.available()


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_needn_t_be_contiguous(format):
    weight = two_of_four(32, 64)
    x = torch.randn(64, 7).T
    packed = FORMATS[format].pack(weight)
    assert torch.allclose(linear(x, packed), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_torch_accepts_the_operators(format):
    packed = FORMATS[format].pack(two_of_four(32, 64))
    operator = getattr(torch.ops.graphprune, f"{format}_linear").default
    parts = list(packed.tensors().values())
    arguments = (torch.randn(3, 64), parts, 32, 64, torch.randn(32), "relu")
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("format", FORMATS)
def test_torch_export_and_compile_see_one_operator(format):
    layer = SparseLinear(FORMATS[format].pack(two_of_four(32, 64)), torch.randn(32)).eval()
    x = torch.randn(3, 64)
    expected = layer(x)
    tokens = torch.export.Dim("tokens", min=2, max=50)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
    called = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert called == [getattr(torch.ops.graphprune, f"{format}_linear").default]
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(exported.module()(x[:2]), layer(x[:2]))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_state_dicts_move_between_layers(format):
    weight = two_of_four(32, 64)
    packed = FORMATS[format].pack(weight)
    layer, other = (SparseLinear(packed, torch.randn(32)) for _ in range(2))
    copied = {n: t.clone() for n, t in layer.state_dict().items()}
    assert set(copied) == {*packed.tensors(), "bias"}
    other.load_state_dict(copied, assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.weight, weight)


def test_a_weight_is_unpacked_only_where_numbers_are_read(monkeypatch):
    weight = two_of_four(32, 64).bfloat16()
    layer = SparseLinear(Bitmap.pack(weight))
    unpack, calls = Bitmap.unpack, []
    monkeypatch.setattr(Bitmap, "unpack", lambda self: calls.append(1) or unpack(self))
    found = layer.weight
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, found.device.type, found.shape) == (torch.bfloat16, "cpu", (32, 64))
    assert (found.dim(), found.numel(), found.element_size()) == (2, 32 * 64, 2)
    assert not found.requires_grad
    assert not calls
    assert torch.equal(found, weight)
    assert len(calls) == 1
    x = torch.randn(3, 64).bfloat16()
    for result, wanted in (
        (torch.nn.functional.linear(x, found), torch.nn.functional.linear(x, weight)),
        (found.float().sum(1), weight.float().sum(1)),
        (torch.cat([found, weight]), torch.cat([weight, weight])),
        (found[3:5], weight[3:5]),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, wanted)
    assert repr(found.sum()) == repr(weight.sum())


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_a_layer_calls_the_kernel_as_the_operator_does():
    layer = SparseLinear(Bitmap.pack(two_of_four(32, 64)), torch.randn(32), "silu")
    x = torch.randn(2, 3, 64)
    expected = linear(x, layer.packed, layer.bias, "silu")
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert layer(x[:0]).shape == (0, 3, 32)
    # Other weights in the same layer are another kernel's.
    other = Bitmap.pack(2 * two_of_four(32, 64))
    layer.load_state_dict({**other.tensors(), "bias": 2 * layer.bias}, assign=True)
    assert torch.equal(layer(x), linear(x, other, layer.bias, "silu"))
    with pytest.raises(ValueError, match="float64"):
        layer(x.double())
    with pytest.raises(ValueError, match="not"):
        layer(x[..., :-8])


def test_a_layer_computes_in_the_dtype_it_is_moved_to():
    weight = two_of_four(32, 64)
    layer = SparseLinear.of_linear(given(weight), "bitmap")
    x = torch.randn(2, 64)
    before = layer(x)
    moved = layer.to(torch.bfloat16)
    assert moved.compressed.dtype == torch.bfloat16
    assert moved.bitmask.dtype == torch.uint8
    assert (moved(x.bfloat16()).float() - before).abs().max() < 2e-2 * before.abs().max()


def given(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("format", FORMATS)
def test_what_doesn_t_fit_is_refused(format):
    packed = FORMATS[format].pack(two_of_four(32, 64))
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="float64"):
        linear(x.double(), packed)
    with pytest.raises(ValueError, match="bias"):
        linear(x, packed, torch.randn(31))
    with pytest.raises(ValueError, match="'tanh' isn't one of"):
        linear(x, packed, activation="tanh")
    with pytest.raises(ValueError, match="'tanh' isn't one of"):
        SparseLinear(packed, activation="tanh")
    operator = getattr(torch.ops.graphprune, f"{format}_linear")
    with pytest.raises(ValueError, match="tensors instead of"):
        operator(x, [], 32, 64, None, "none")
    with pytest.raises(ValueError, match="fit"):
        operator(x, list(packed.tensors().values()), 1600, 64, None, "none")
    if format not in ("csr", "strip_u8", "block"):  # whose parts don't tell the columns
        with pytest.raises(ValueError, match="fit"):
            operator(torch.randn(3, 300), list(packed.tensors().values()), 32, 300, None, "none")
    with pytest.raises(ValueError, match="no format 'foo'"):
        SparseLinear.of_linear(torch.nn.Linear(4, 4), "foo")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [1, 57, 63, 65, 128, 256])
def test_tokens_of_another_width_are_refused(format, columns):
    layer = SparseLinear(FORMATS[format].pack(two_of_four(32, 64)))
    x = torch.randn(3, columns)
    for given in (x, x[0], x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"not \[\.\.\., 64\]"):
            layer(given)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(ValueError, match=r"not \[\.\.\., 64\]"), fakes as mode:
        linear(mode.from_tensor(x), layer.packed)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_biases_and_of_one_token(format):
    weight, bias = two_of_four(32, 64), torch.randn(32)
    layer = SparseLinear(FORMATS[format].pack(weight), bias.clone())
    layer.bias.requires_grad_()
    x = torch.randn(64)
    layer(x).square().sum().backward()
    y = functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(layer.bias.grad.double(), 2 * y, atol=1e-4)
    layer.bias.requires_grad_(False)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert torch.allclose(x.grad.double(), 2 * y @ weight.double(), atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_what_tensors_carry_is_not_dropped(format):
    layer = SparseLinear(FORMATS[format].pack(two_of_four(32, 64)))
    x = torch.randn(3, 64)
    assert torch.allclose(layer(torch._neg_view(x)), -layer(x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        layer(forward_ad.make_dual(x, torch.ones(3, 64)))
    assert layer.to("meta")(x.to("meta")).shape == (3, 32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_weight_can_t_be_changed(format):
    layer = SparseLinear(FORMATS[format].pack(two_of_four(32, 64)))
    for change in (
        lambda w: w.mul_(0), lambda w: w.copy_(torch.ones(32, 64)),
        lambda w: torch.add(torch.ones(32, 64), 1, out=w),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            change(layer.weight)
    target = torch.zeros(32, 64)
    target.copy_(layer.weight)
    assert torch.equal(target, layer.packed.unpack())
    assert torch.equal(copy.deepcopy(layer.weight) + 0, target)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_loaded_is_checked(format):
    layer = SparseLinear(FORMATS[format].pack(two_of_four(32, 64)))
    layer(torch.randn(1, 64))
    state = {name: part.clone() for name, part in layer.state_dict().items()}
    layer.load_state_dict(state)
    name = next(n for n, p in state.items() if not p.is_floating_point())
    state[name].fill_(255 if state[name].dtype == torch.uint8 else 99)
    if format == "strip_u8":  # whose places may all be in the matrix, but not the same
        state["values"].copy_(torch.randn(state["values"].shape))
    with pytest.raises(RuntimeError, match="Error"):
        layer.load_state_dict(state)


def test_a_choice_is_the_fastest_format(tmp_path):
    weight = two_of_four(48, 96)
    table = Table(tmp_path / "more" / "times.json")
    setting = Setting.of(weight, 1)
    assert (setting.sparsity, setting.tokens, setting.dtype) == (50, 1, "float32")
    table.keep(setting.key, {DENSE: 1.0, "bitmap": 0.5, "csr": 0.4, "block": 2.0})
    table.keep(Setting.of(weight, 4).key, {DENSE: 1.0, "bitmap": 0.5, "csr": 0.9, "block": 2.0})
    formats = ["bitmap", "csr", "block"]
    assert choose(weight, (1,), formats, table) == "csr"
    assert choose(weight, (1, 4), formats, table) == "bitmap"
    assert choose(weight, (1,), ["block"], table) == DENSE
    table.keep(setting.key, {"csr": 0.98, "bitmap": 0.99})  # within the noise
    assert choose(weight, (1,), formats, table) == DENSE
    again = Table.open(tmp_path / "more" / "times.json")
    assert again.times == table.times


def test_a_damaged_table_is_measured_anew(tmp_path):
    weight = two_of_four(48, 96)
    for text in ("", "[]", "3", '{"a": 1}', '{"a": {"b": "c"}}'):
        (tmp_path / "times.json").write_text(text)
        table = Table.open(tmp_path / "times.json")
        assert table.times == {}
    assert choose(weight, (1,), ["csr"], table) in (DENSE, "csr")
    assert json.loads((tmp_path / "times.json").read_text()) == table.times


def test_a_table_that_can_t_be_written_is_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "times.json")
    table.keep("key", {"csr": 1.0})
    assert table.times == {"key": {"csr": 1.0}}


def test_measured_times_are_there_for_every_format():
    weight = two_of_four(64, 64)
    formats = worth_trying(weight)
    assert {"csr", "block"} <= set(formats)
    found = measure(weight, 2, [*formats, "nm24"])
    assert set(found) == {DENSE, "nm24", *formats}
    assert all(0 < seconds < 1 for seconds in found.values())


def test_a_format_that_can_t_hold_a_weight_isn_t_chosen():
    weight = torch.randn(20, 30)
    assert measure(weight, 1, ["block"])["block"] == float("inf")
    assert choose(weight, (1,), ["block"], Table(None)) == DENSE


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_reach_tokens_and_bias(format):
    weight = two_of_four(32, 64)
    layer = SparseLinear(FORMATS[format].pack(weight), torch.randn(32))
    found, expected = (torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    found.requires_grad_()
    expected.requires_grad_()
    layer(found).square().sum().backward()
    functional.linear(expected, weight, layer.bias).square().sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-3)
    with pytest.raises(NotImplementedError, match="activation outside"):
        SparseLinear(layer.packed, layer.bias, "relu")(found)


def test_tracers_see_the_operator():
    layer = SparseLinear(Bitmap.pack(two_of_four(32, 64)), torch.randn(32))
    x = torch.randn(3, 64)
    expected = layer(x)
    traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(2 * x), layer(2 * x))
    graph = make_fx(layer)(x)
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert called == [torch.ops.graphprune.bitmap_linear.default]
    assert torch.equal(graph(x), expected)


def test_a_layer_follows_memory_that_moves():
    layer = SparseLinear(Bitmap.pack(two_of_four(32, 64)), torch.randn(32))
    x = torch.randn(3, 64)
    expected = layer(x)
    layer.share_memory()
    assert torch.equal(layer(x), expected)


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match="bias"):
        SparseLinear(Bitmap.pack(two_of_four(32, 64)), torch.zeros(1))


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_bits_that_were_loaded_into_a_layer_are_checked():
    layer = SparseLinear(Bitmap.pack(two_of_four(32, 64)))
    state = {**layer.state_dict(), "bitmask": torch.full((32, 8), 255, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="by the bits before"):
        layer.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="bits"):
        layer(torch.randn(3, 64))


def test_autocast_leaves_a_layer_its_dtype():
    weight = two_of_four(32, 64)
    layer = SparseLinear(Bitmap.pack(weight))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x.bfloat16())
    assert torch.equal(found, layer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_has_one_dtype_for_all_formats(format):
    weight = two_of_four(32, 64)
    layer = SparseLinear(FORMATS[format].pack(weight))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x.detach())
    assert y.dtype == compiled.dtype == torch.bfloat16
    assert torch.equal(y, compiled)
    assert torch.allclose(y.float(), functional.linear(x, weight), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(3, 64), rtol=0.02, atol=0.02)


def test_settings_tell_structures_apart():
    full, spread = torch.zeros(64, 64), torch.zeros(64, 64)
    full[:16] = 1
    spread[:, ::4] = 1
    first, second = Setting.of(full, 1), Setting.of(spread, 1)
    assert (first.sparsity, first.blocks) == (75, 30)
    assert (second.sparsity, second.blocks) == (75, 100)
    assert first.key != second.key
    # Strips have no kernel on the processor: how full they are would have others timed again.
    assert first.slots == second.slots == 0
    assert choosing.structure_of(full) == (30, 64)
    assert choosing.structure_of(spread) == (100, 16)


def test_what_a_layer_prepares_is_not_timed(monkeypatch):
    class SlowAtFirst:
        def __init__(self, packed):
            self.waits = iter([0.05])

        def __call__(self, x):
            time.sleep(next(self.waits, 0.0))

    monkeypatch.setattr(choosing, "SparseLinear", SlowAtFirst)
    weight = torch.randn(32, 32).where(torch.rand(32, 32) < 0.5, 0)
    monkeypatch.setattr(choosing, "COLD", 4 * weight.nbytes)
    assert measure(weight, 1, ["bitmap"])["bitmap"] < 0.02


def test_tables_of_two_processes_are_merged(tmp_path):
    first, second = (Table.open(tmp_path / "times.json") for _ in range(2))
    first.keep("one", {"csr": 1.0})
    second.keep("two", {"csr": 2.0})
    assert Table.open(tmp_path / "times.json").times == {"one": {"csr": 1.0}, "two": {"csr": 2.0}}
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]


def test_a_user_without_a_home_has_no_table(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)
    assert Table.usual().path is None
