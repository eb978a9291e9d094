"""Sparse formats against the dense matrix that they stand for, and against damage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.formats.block import Block
from graphprune.kernels.formats.csr import CSR
from graphprune.kernels.formats.files import FORMATS, KEY, load, save
from graphprune.kernels.formats.nm24 import NM24
from graphprune.kernels.formats.packed import FormatError, nbytes
from graphprune.kernels.formats.strip import Strip, conflicts

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def matrix(rows, columns, density, seed=0, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=drawn)
    gone = torch.rand(rows, columns, generator=drawn) >= density
    return weight.masked_fill(gone, 0).to(dtype)


def suited(format, weight):
    """A matrix that a format can hold, made of another."""
    if format == "nm24":
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)).unflatten(1, (-1, 4))
        lost = padded.abs().argsort(dim=2)[..., :2]
        return padded.scatter(2, lost, 0).flatten(1)[:, : weight.shape[1]].contiguous()
    if format == "block":
        rows, columns = (-(-s // 16) * 16 for s in weight.shape)
        more = (0, columns - weight.shape[1], 0, rows - weight.shape[0])
        return torch.nn.functional.pad(weight, more)
    return weight


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 600),
    st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_a_dense_matrix_comes_back(format, rows, columns, density, dtype, seed):
    weight = suited(format, matrix(rows, columns, density, seed, dtype))
    packed = FORMATS[format].pack(weight)
    packed.validate()
    assert packed.shape == tuple(weight.shape)
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_one_weight_at_every_corner(format):
    for row, column in ((0, 0), (0, 255), (63, 256), (79, 287)):
        weight = torch.zeros(80, 288)
        weight[row, column] = -1.5
        packed = FORMATS[format].pack(weight)
        packed.validate()
        assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_negative_zeros_become_zeros_and_nans_stay(format):
    weight = torch.zeros(16, 32)
    weight[:, ::4] = -0.0
    weight[3, 1] = float("nan")
    weight[4, 1] = 2.0
    weight[4, 2] = -0.0
    packed = FORMATS[format].pack(weight)
    packed.validate()
    found = packed.unpack()
    assert not torch.signbit(found).any()
    assert found.isnan().nonzero().tolist() == [[3, 1]]
    assert found[4].count_nonzero() == 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_by_the_formula(format, dtype):
    weight = suited(format, matrix(128, 512, 0.5, dtype=dtype))
    packed = FORMATS[format].pack(weight)
    rows, columns = weight.shape
    values, item = int(weight.count_nonzero()), weight.element_size()
    formula = {
        "bitmap": values * item + rows * columns // 8 + 8 * rows,
        "nm24": rows * columns // 2 * item + rows * columns // 8,
        "csr": values * (item + 4) + 4 * (rows + 1),
    }
    if format == "strip_u8":
        most = int((weight.unflatten(1, (-1, 256)) != 0).sum(2).max())
        formula[format] = rows * columns // 256 * -(-most // 16) * 16 * (item + 1)
    if format == "block":
        formula[format] = rows * columns * item + rows * columns // 256 * 4 + (rows // 16 + 1) * 8
    assert nbytes(packed) == formula[format]


def test_bitmap_bits_are_those_of_numpy():
    weight = matrix(5, 21, 0.4)
    packed = Bitmap.pack(weight)
    kept = weight.numpy() != 0
    assert np.array_equal(packed.bitmask.numpy(), np.packbits(kept, axis=1, bitorder="little"))
    assert np.array_equal(packed.values.numpy(), weight.numpy()[kept])
    assert packed.row_offsets.tolist() == [0, *np.cumsum(kept.sum(1))[:-1]]


def test_many_rows_are_packed_in_pieces(monkeypatch):
    monkeypatch.setattr("graphprune.kernels.formats.bitmap.ROWS", 7)
    weight = matrix(30, 19, 0.4)
    packed = Bitmap.pack(weight)
    packed.validate()
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize(("slots", "most"), [(128, 2.3), (96, 2.6), (64, 2.9)])
def test_slots_are_ordered_for_the_banks(slots, most):
    """In random order 32 lanes meet 3.3 to 3.5 times at the fullest bank."""
    weight = torch.randn(128, 1024).unflatten(1, (-1, 256))
    kept = weight.abs().topk(slots, dim=2).indices
    weight = torch.zeros_like(weight).scatter(2, kept, weight.gather(2, kept)).flatten(1)
    packed = Strip.pack(weight)
    assert packed.slots == slots
    assert conflicts(packed) < most
    turn = (8 * (torch.arange(64)[:, None] % 8)).to(torch.uint8)
    columns = packed.places.transpose(2, 3).flatten(3) ^ turn
    ascending = columns.sort(3).values ^ turn
    ascending = ascending.unflatten(3, (-1, 16)).transpose(2, 3).contiguous()
    assert conflicts(replace(packed, places=ascending)) > 1.15 * conflicts(packed)


@pytest.mark.parametrize(
    ("change", "field", "offset"),
    [
        (lambda p: replace(p, bitmask=flipped(p.bitmask, 7, 16)), "row_offsets", 3),
        (lambda p: replace(p, bitmask=flipped(p.bitmask, 8, 128)), "bitmask", 8),
        (lambda p: replace(p, bitmask=p.bitmask[:, :2]), "bitmask", None),
        (lambda p: replace(p, bitmask=p.bitmask.int()), "bitmask", None),
        (lambda p: replace(p, row_offsets=p.row_offsets + 1), "row_offsets", 0),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 5, 2**60)), "row_offsets", 5),
        (lambda p: replace(p, values=p.values[:-1]), "compressed", None),
        (lambda p: replace(p, values=p.values.int()), "compressed", None),
        (lambda p: replace(p, shape=(9, 21)), "bitmask", None),
        (lambda p: replace(p, shape=(0, 21)), "shape", None),
    ],
)  # fmt: skip
def test_damaged_bitmaps_are_refused(change, field, offset):
    damaged = change(Bitmap.pack(matrix(10, 21, 0.5)))
    with pytest.raises(FormatError) as error:
        damaged.validate()
    assert (error.value.field, error.value.offset) == (field, offset)


def flipped(bytes_, place, bit):
    """A copy with other bits in one byte."""
    return changed(bytes_, place, int(bytes_.flatten()[place]) ^ bit)


def changed(tensor, place, value):
    copy = tensor.clone()
    copy.view(-1)[place] = value
    return copy


def test_damaged_strips_are_refused():
    weight = matrix(70, 300, 0.3)
    packed = Strip.pack(weight)
    inside = int((packed.values != 0).flatten().to(torch.uint8).argmax())
    other = changed(packed.places, inside, int(packed.places.view(-1)[inside + 1]))
    with pytest.raises(FormatError, match="same place"):
        replace(packed, places=other).validate()
    # The second strip has 44 columns, the second tile 6 rows.
    late = packed.values.numel() // 4  # begins the first strip of columns 256 and on
    with pytest.raises(FormatError, match="outside the matrix") as error:
        replace(packed, places=changed(packed.places, late, 44)).validate()
    assert error.value.offset == late
    with pytest.raises(FormatError, match="outside the matrix"):
        replace(packed, values=changed(packed.values, packed.values.numel() - 1, 1.0)).validate()
    with pytest.raises(FormatError, match="shape"):
        replace(packed, places=packed.places[:1]).validate()


def test_strips_that_overflow_are_refused_by_the_packer():
    weight = torch.zeros(70, 600)
    weight[66, 256:290] = 1
    with pytest.raises(FormatError, match="row 66 has 34 values in the 256 columns from 256 on"):
        Strip.pack(weight, slots=32)
    assert Strip.pack(weight).slots == 48
    for slots in (0, 8, 272):
        with pytest.raises(FormatError, match="multiple of 16"):
            Strip.pack(weight, slots=slots)


def test_groups_that_overflow_are_refused_by_the_packer():
    weight = torch.zeros(3, 10)
    weight[2, 4:7] = 1
    with pytest.raises(FormatError, match="row 2 has more than two values in columns 4 to 7"):
        NM24.pack(weight)


@pytest.mark.parametrize(
    ("change", "field", "offset"),
    [
        (lambda p: replace(p, bitmask=flipped(p.bitmask, 3, 1)), "bitmask", 3),
        (lambda p: replace(p, values=p.values + 1), "compressed", None),
        (lambda p: replace(p, values=p.values[:, :4]), "compressed", None),
    ],
)
def test_damaged_2_4_is_refused(change, field, offset):
    damaged = change(NM24.pack(torch.zeros(3, 12)))
    with pytest.raises(FormatError) as error:
        damaged.validate()
    assert error.value.field == field
    if offset is not None:
        assert error.value.offset == offset


@pytest.mark.parametrize(
    ("change", "field", "offset"),
    [
        (lambda p: replace(p, block_columns=changed(p.block_columns, 1, 3)), "block_columns", 1),
        (lambda p: replace(p, block_columns=changed(p.block_columns, 1, 0)), "block_columns", 1),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 1, 7)), "row_offsets", 1),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 2, 5)), "row_offsets", 2),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 0, 1)), "row_offsets", 0),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 1, 2**63 - 1)), "row_offsets", 1),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 1, -2)), "row_offsets", 1),
        (lambda p: replace(p, shape=(32, 40)), "values", None),
    ],
)
def test_damaged_blocks_are_refused(change, field, offset):
    packed = Block.pack(torch.ones(32, 48))
    with pytest.raises(FormatError) as error:
        change(packed).validate()
    assert (error.value.field, error.value.offset) == (field, offset)


@pytest.mark.parametrize(
    ("change", "field", "offset"),
    [
        (lambda p: replace(p, columns=changed(p.columns, 2, 9)), "columns", 2),
        (lambda p: replace(p, columns=changed(p.columns, 2, 1)), "columns", 2),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 1, 99)), "row_offsets", 1),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 3, 26)), "row_offsets", 3),
        (lambda p: replace(p, values=p.values[1:]), "columns", None),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 1, 2**31 - 1)), "row_offsets", 1),
        (lambda p: replace(p, row_offsets=changed(p.row_offsets, 2, -2)), "row_offsets", 2),
    ],
)
def test_damaged_csr_is_refused(change, field, offset):
    packed = CSR.pack(torch.ones(3, 9))
    with pytest.raises(FormatError) as error:
        change(packed).validate()
    assert (error.value.field, error.value.offset) == (field, offset)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_no_matrix_are_refused(format):
    with pytest.raises(FormatError, match="dimensions"):
        FORMATS[format].pack(torch.zeros(4))
    with pytest.raises(FormatError, match="floating-point"):
        FORMATS[format].pack(torch.zeros(16, 16, dtype=torch.int32))


@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_packed_and_dense_weights(format, tmp_path):
    weight = suited(format, matrix(40, 300, 0.3))
    file = tmp_path / "weights.safetensors"
    save(file, {"a.weight": FORMATS[format].pack(weight), "a.bias": weight[:, 0]}, {"more": "x"})
    found = dict(load(file))
    assert type(found["a.weight"]) is FORMATS[format]
    assert torch.equal(found["a.weight"].unpack(), weight)
    assert torch.equal(found["a.bias"], weight[:, 0])


def test_bitmaps_lie_in_files_as_compressed_tensors_has_them(tmp_path):
    weight = matrix(4, 13, 0.5, dtype=torch.bfloat16)
    save(tmp_path / "w.safetensors", {"layer.weight": Bitmap.pack(weight)})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "layer.weight.shape": (torch.int64, (2,)),
        "layer.weight.compressed": (torch.bfloat16, (int(weight.count_nonzero()),)),
        "layer.weight.bitmask": (torch.uint8, (4, 2)),
        "layer.weight.row_offsets": (torch.int64, (4,)),
    }


@pytest.mark.parametrize(
    ("parts", "metadata", "message"),
    [
        ({"w.shape": torch.tensor([2, 2])}, {KEY: '{"w": "bitmap"}'}, "w.compressed: not in"),
        ({}, {KEY: '{"w": "bitmap"}'}, "w.shape: not in"),
        ({"w.shape": torch.tensor([2])}, {KEY: '{"w": "csr"}'}, "w.shape"),
        ({}, {KEY: '{"w": "zip"}'}, "'zip' is unknown"),
        ({}, {KEY: "["}, "no JSON"),
        ({}, {KEY: "[]"}, "no table"),
    ],
)
def test_damaged_files_are_refused(parts, metadata, message, tmp_path):
    save_file({"x": torch.zeros(1), **parts}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(FormatError, match=message):
        dict(load(tmp_path / "w.safetensors"))


def test_a_damaged_weight_is_named(tmp_path):
    packed = Bitmap.pack(matrix(10, 21, 0.5))
    parts = {f"w.{n}": t for n, t in packed.tensors().items()}
    parts["w.row_offsets"] = changed(packed.row_offsets, 3, 1000)
    parts["w.shape"] = torch.tensor(packed.shape)
    save_file(parts, tmp_path / "w.safetensors", {KEY: '{"w": "bitmap"}'})
    with pytest.raises(FormatError, match=r"w\.row_offsets\[3\]: 1000 instead of"):
        dict(load(tmp_path / "w.safetensors"))


def test_names_that_collide_are_refused(tmp_path):
    packed = Bitmap.pack(matrix(4, 4, 0.5))
    with pytest.raises(FormatError, match="two tensors have this name"):
        save(tmp_path / "w", {"w": packed, "w.bitmask": torch.zeros(1)})
