"""`slim.module` is the proved graph: of the source's class where its code computes the same."""

from __future__ import annotations

import warnings

import pytest
import torch

from emit.attention_nets import Attention, Encoder, Feature, Fused, masked, pruned, small
from graphprune.emit.expected import Expected


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def form_of(slim):
    """The form of the slim module; the warning about it has tests of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the slim module is the exported graph")
        return slim.form


def check(slim, x, tolerance=2e-6):
    """The module against the masked net in float64, on the caller's inputs and smaller ones."""
    judge = masked(slim)
    for scale in (1.0, 0.01, 0.0001):
        with torch.no_grad():
            wanted = judge(x.double() * scale)
            found = slim.module(x * scale)
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("build", "role", "form"),
    [
        (Fused, "qk_dim", "graph"),
        (Encoder, "qk_dim", "graph"),
        (Encoder, "ffn", "class"),
        (lambda: Attention("fused"), "qk_dim", "graph"),
        (lambda: Attention("shape"), "qk_dim", "graph"),
        (lambda: Attention("attribute"), "qk_dim", "class"),
        (lambda: Attention("attribute"), "kv_heads", "class"),
        (lambda: Attention("fused"), "kv_heads", "class"),
        (lambda: Attention("shape"), "v_dim", "class"),
    ],
)
def test_attention_for_large_inputs(build, role, form):
    """Attention that is uniform on standard normal inputs hides what its factor is there."""
    x = 100 * torch.randn(2, 5, 8)
    slim = pruned(small(build()), x, role)
    assert form_of(slim) == form
    check(slim, x)


def test_heads_are_counted_although_the_shapes_allow_more():
    slim = pruned(small(Attention("attribute")), 100 * torch.randn(2, 5, 8), "kv_heads")
    assert (slim.module.heads, slim.module.head_dim) == (3, 8)


def test_a_size_that_is_kept_stays():
    slim = pruned(small(Attention("attribute")), 100 * torch.randn(2, 5, 8), "qk_dim")
    assert (slim.module.heads, slim.module.head_dim) == (4, 8)


@pytest.mark.parametrize(
    ("between", "form"),
    [
        (lambda m, h: h / h.shape[-1], "graph"),
        (lambda m, h: h + 1e-7 * h.shape[-1], "graph"),  # less than float32 sees
        (lambda m, h: h * m.width**0.5, "class"),
        (lambda m, h: (h / m.width).exp(), "class"),
    ],
    ids=["divided", "hardly", "multiplied", "temperature"],
)
def test_factors_from_a_width(between, form):
    x = torch.randn(4, 8)
    slim = pruned(Feature(between).eval(), x, "ffn")
    assert form_of(slim) == form
    check(slim, x)


def of_float32(module, h):
    assert h.dtype == torch.float32
    return h


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h.to(torch.float32).softmax(-1, dtype=torch.float32) * h,
        lambda m, h: h / (h.abs().mean() + 1e6 * torch.finfo(h.dtype).eps),
        of_float32,
    ],
    ids=["named", "smallest-number", "checked"],
)
def test_code_that_names_a_dtype_is_compared_all_the_same(between):
    """It computes something else in float64, or nothing at all, and is right in its own."""
    slim = pruned(Feature(between).eval(), torch.randn(4, 8), "*")
    assert form_of(slim) == "class"


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: of_float32(m, h) + 1e-7 * h.shape[-1],
        lambda m, h: h / (m.one.weight.shape[0] * 1e-6 + h.abs() + torch.finfo(h.dtype).eps),
    ],
    ids=["checked", "smallest-number"],
)
def test_code_that_names_a_dtype_is_not_simply_accepted(between):
    x = torch.randn(4, 8)
    slim = pruned(Feature(between).eval(), x, "*")
    assert form_of(slim) == "graph"


def test_complex_and_integer_outputs_count():
    """The floating-point output alone is right."""

    class Outputs(Feature):
        def forward(self, x):
            h = self.one(x).tanh()
            y = self.two(h)
            return y, torch.complex(y, y * h.shape[-1]), (y > h.shape[-1] - 30).long()

    slim = pruned(Outputs(None).eval(), torch.randn(4, 8), "ffn")
    assert form_of(slim) == "graph"


def test_one_short_warning():
    slim = pruned(small(Fused()), 100 * torch.randn(2, 5, 8), "qk_dim")
    with pytest.warns(UserWarning, match="is the exported graph instead of Fused") as caught:
        module = slim.module
    ours = [str(w.message) for w in caught if "exported graph" in str(w.message)]
    assert len(ours) == 1
    assert "\n" not in ours[0]
    assert len(ours[0]) < 160
    assert [w.filename for w in caught if "exported graph" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim.module(torch.randn(2, 5, 8))
        assert slim.module is module
        assert slim.form == "graph"


def test_a_checkpoint_in_bfloat16_is_compared_in_float64():
    """Eight bits hide a factor that is off by an eighth; a written model isn't run in them only."""
    module = Attention("attribute").eval().to(torch.bfloat16)
    slim = pruned(module, torch.randn(2, 5, 8, dtype=torch.bfloat16), "qk_dim")
    assert form_of(slim) == "class"
    expected = Expected.of(slim)
    assert expected.deviation_of(slim.module) is None
    slim.module.head_dim = 6  # what a config with smaller heads would give
    assert "differs" in str(expected.deviation_of(slim.module))
    assert expected.tolerance > 0.05
