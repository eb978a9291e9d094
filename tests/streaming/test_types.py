"""What waits between two segments comes back to the bit, whatever type it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune as gp
import graphprune.checkpoints.memory as held_module
from graphprune.streaming import Held, State, batches, find_sites, stream
from streaming.oracle import Halving
from zoo.case import randomise

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.complex32, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def numbers(dtype, *shape):
    """Random bits, as numbers of a type."""
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 2 if dtype == torch.bool else 120, (count,), generator=generator)
    return bits.to(torch.uint8).view(dtype).view(shape)


def bits(x):
    return x.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def saved_and_loaded(folder, **values):
    state = State(folder, every=1)
    state.commit(0, lambda: [values])
    _, (found,) = state.load_values()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_a_tensor(tmp_path, dtype):
    given = {
        "matrix": numbers(dtype, 3, 4),
        "number": numbers(dtype),
        "nothing": numbers(dtype, 0, 4),
        "turned": numbers(dtype, 3, 4).T,
        "repeated": numbers(dtype, 3, 1).expand(3, 5),
        "part": numbers(dtype, 3, 8)[:, 1::2],
    }
    found = saved_and_loaded(tmp_path, **given)
    assert found.keys() == given.keys()
    for name, x in given.items():
        y = found[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.equal(bits(y), bits(x)), name


def test_numbers_lists_and_conjugates(tmp_path):
    z = torch.randn(3, dtype=torch.complex64)
    given = {"n": 3, "x": 0.1, "z": 1 - 2j, "no": None, "yes": True, "inf": float("inf")}
    found = saved_and_loaded(tmp_path, **given, both=(z, [z.conj(), 2]), imag=z.conj().imag)
    assert {n: found[n] for n in given} == given
    first, (second, two) = found["both"]
    assert torch.equal(first, z)
    assert second.tolist() == [x.conjugate() for x in z.tolist()]
    assert two == 2
    assert found["imag"].tolist() == [-x.imag for x in z.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_waits_in_a_file(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(held_module, "SMALL", 1)
    for x in (numbers(dtype, 6, 4), numbers(dtype), numbers(dtype, 0, 4)):
        y = Held(None, tmp_path).away(x)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.equal(bits(y), bits(x))


class Turning(nn.Module):
    """Linear layers on pairs that are turned by angles, as complex numbers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("speeds", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x):
        angles = torch.outer(torch.arange(x.shape[1]), self.speeds)
        turns = torch.polar(torch.ones_like(angles), angles)
        for layer in (self.one, self.two, self.three):
            pairs = torch.view_as_complex(layer(x).unflatten(-1, (4, 2)))
            x = torch.view_as_real(pairs * turns).flatten(-2) + torch.view_as_real(
                pairs * turns.conj()
            ).flatten(-2)
        return x


class Interrupted(Exception):
    pass


class Stopping(Halving):
    """Fails after the second group."""

    def treat(self, group, observers, weights):
        yield from super().treat(group, observers, weights)
        if group.index == 1:
            raise Interrupted


@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
def test_complex_numbers_wait(tmp_path, monkeypatch, files):
    monkeypatch.setattr(held_module, "SMALL", 1)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    program = gp.trace(randomise(Turning()), (data[0],))
    given = batches(program, [(x,) for x in data])
    held = Held(None, tmp_path) if files else None
    sites = find_sites(program)
    expected = stream(program, sites, given, Halving())
    folder = tmp_path / "state"
    with pytest.raises(Interrupted):
        stream(program, sites, given, Stopping(), held=held, state=State(folder, every=1))
    state = State(folder, every=1, resume=True)
    assert list(folder.glob("activations-*"))
    found = stream(program, sites, given, Halving(), held=held, state=state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
