"""Data made to take all memory, and files that are not what their names say."""

from __future__ import annotations

import io
import json
import resource
import struct
import wave
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from calibration.helpers import gradient, pixels, samples
from graphprune.calibration.sources.arrays import read_arrays
from graphprune.calibration.sources.audio import load_audio
from graphprune.calibration.sources.contents import File
from graphprune.calibration.sources.datasets import read_dataset
from graphprune.calibration.sources.kinds import kind_of
from graphprune.calibration.sources.read import read
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.text.read import read_text
from graphprune.errors import LoadError


def peak():
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def npy_header(shape, descr="<f4"):
    header = io.BytesIO()
    values = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, values)
    return header.getvalue()


def zip_file(path, parts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw)


def test_arrays_are_counted_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("graphprune.calibration.sources.array_headers.LARGEST", 1 << 20)
    zip_file(tmp_path / "a.npz", {"x.npy": npy_header((1 << 23,)) + bytes(1 << 25)})
    zip_file(tmp_path / "two.npz", {f"{n}.npy": npy_header((1 << 17,)) + bytes(1 << 19)
                                    for n in "abc"})  # fmt: skip
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy_header((1 << 38,)))
        file.truncate(file.tell() + (1 << 40))
    save_file({"x": torch.zeros(1 << 19)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("unpacked"))
    for name in ("a.npz", "two.npz", "a.npy", "a.safetensors"):
        with pytest.raises(LoadError, match=r"and 1,048,576 is the limit") as caught:
            read_arrays(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"x.npy": npy_header((1 << 40,)) + bytes(64)}, "doesn't have the size that it says"),
        ({"x.npy": npy_header((2,)) + bytes(64)}, "doesn't have the size that it says"),
        ({"x.npy": npy_header((-4,)) + bytes(64)}, r"its shape is \(-4,\)"),
        ({"x.npy": npy_header((4,), "<U1000000") + bytes(64)}, "holds no numbers"),
        ({"x.npy": npy_header((4,), "<c16") + bytes(64)}, "holds no numbers"),
        ({"x.npy": b"\x93NUMPY\x09\x00" + bytes(64)}, "version 9.0"),
        ({"x.npy": b""}, "can't be read"),
        ({f"{i}.npy": npy_header((1,)) + bytes(4) for i in range(1001)}, "more than 1000 parts"),
    ],
)
def test_archives_that_lie(tmp_path, parts, message):
    zip_file(tmp_path / "a.npz", parts)
    with pytest.raises(LoadError, match=message):
        read_arrays(tmp_path / "a.npz")


def test_a_header_that_python_would_choke_on(tmp_path):
    header = b"{'descr': " + b"-" * 9000 + b"1, 'fortran_order': False, 'shape': (1,)}\n"
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    (tmp_path / "a.npy").write_bytes(raw)
    with pytest.raises(LoadError, match="can't be read"):
        read_arrays(tmp_path / "a.npy")


def test_of_many_token_ids_the_first_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("graphprune.calibration.sources.array_headers.READ", 100)
    ids = np.arange(3000, dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids.reshape(100, 30))
    save_file({"x": torch.from_numpy(ids.astype("i4"))}, tmp_path / "a.safetensors")
    assert read_arrays(tmp_path / "a.npy")[""].tolist() == list(range(100))
    assert read_arrays(tmp_path / "b.npy")[""].tolist() == ids[:90].reshape(3, 30).tolist()
    assert read_arrays(tmp_path / "a.safetensors")["x"].tolist() == list(range(100))


def test_numbers_that_no_model_reads(tmp_path):
    save_file({"x": torch.tensor([2**63], dtype=torch.uint64)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadError, match="too large"):
        read_arrays(tmp_path / "a.safetensors")
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        save_file({"x": torch.zeros(3).to(dtype)}, tmp_path / "a.safetensors")
        with pytest.raises(LoadError, match="holds no numbers"):
            read_arrays(tmp_path / "a.safetensors")


def test_a_long_line_is_read_as_far_as_it_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("graphprune.calibration.text.read.READ", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab " * 100_000}) + "\nno JSON")
    assert read_text(tmp_path / "a.jsonl") == ("ab " * 1000)[:1000]
    (tmp_path / "b.jsonl").write_text(json.dumps(list(range(50_000))))
    assert read(str(tmp_path / "b.jsonl"), Calibration()).stream.tolist() == list(range(1000))
    for name in (
        "graphprune.calibration.text.read.LINE",
        "graphprune.calibration.sources.read.LINE",
    ):
        monkeypatch.setattr(name, 1 << 20)
    (tmp_path / "c.jsonl").write_text('"a"\n"' + "b" * (1 << 20))
    (tmp_path / "c.json").write_text('["' + "b" * (1 << 20))
    monkeypatch.setattr("graphprune.calibration.text.read.READ", 1 << 24)
    for name, place in (("c.jsonl", "c.jsonl:2"), ("c.json", "c.json")):
        with pytest.raises(LoadError, match="has more than 1 MiB") as caught:
            read(str(tmp_path / name), Calibration())
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"a\\ud800b"', "half a character"),
        ('{"text": "\\udfff"}', "half a character"),
        ('{"\\ud800": "a"}', r"its entries are \\ud800; name one"),
        ("[" * 10_000, "nested too deeply"),
        ("1" * 5000, "thousands of digits"),
        ("{" + ", ".join(f'"key{i}": 0' for i in range(5000)) + "}", "and 4980 more"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'"good"\n{line}\n')
    with pytest.raises(LoadError, match=message) as caught:
        read(str(tmp_path / "a.jsonl"), Calibration())
    assert "a.jsonl:2" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_a_pair_of_halves_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('"\\ud83d\\ude00"')
    assert read(str(tmp_path / "a.jsonl"), Calibration()).text == "\U0001f600"


def png_header(width, height):
    def chunk(kind, raw):
        return struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )


def test_images_are_measured_by_their_headers(tmp_path):
    for width, height in ((9000, 9000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "a.png").write_bytes(png_header(width, height))
        with pytest.raises(LoadError, match=r"a\.png") as caught:
            samples(pixels(), data=str(tmp_path / "a.png"))
        assert "too large" in str(caught.value) or "can't be read" in str(caught.value)


def test_a_long_image_is_not_scaled_to_a_longer_one(tmp_path):
    Image.new("RGB", (1, 20_000)).save(tmp_path / "long.png")
    wanted = {"data": str(tmp_path / "long.png"), "size": 224}
    before = peak()
    with pytest.raises(LoadError, match=r"224 x 4480000 pixels when 1 x 20000") as caught:
        samples(pixels(), **wanted)
    assert "long.png" in str(caught.value)
    assert peak() - before < 1 << 28
    Image.fromarray(gradient(40, 30)).save(tmp_path / "long.png")
    assert samples(pixels(), **wanted).data.shape == (1, 3, 8, 12)


@pytest.mark.parametrize("form", ["EPS", "GIF", "PPM", "TGA", "ICNS", "PDF", "PCX"])
def test_pillow_opens_five_formats_whatever_a_file_is_called(tmp_path, form):
    made = io.BytesIO()
    Image.fromarray(gradient(16, 16)).resize((16, 16)).save(made, form)
    (tmp_path / "a.png").write_bytes(made.getvalue())
    with pytest.raises(LoadError, match="none of PNG, JPEG, WEBP, BMP, TIFF"):
        samples(pixels(), data=str(tmp_path / "a.png"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_five_formats_are_read(tmp_path, form):
    picture = Image.fromarray(gradient(12, 8))
    options = {"save_all": True, "append_images": [picture] * 3} if form in ("WEBP", "TIFF") else {}
    picture.save(tmp_path / f"a.{form.lower()}", form, **options)
    assert samples(pixels(), data=str(tmp_path / f"a.{form.lower()}")).data.shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("name", "hint"), [("a.gif", "save it as PNG"), ("a.txt.gz", "unpack it"),
                       ("a.parquet", "jsonl"), ("a.mp3", "wav")]
)  # fmt: skip
def test_files_that_would_be_taken_for_text(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(LoadError, match="files are not read") as caught:
        kind_of(str(tmp_path / name))
    assert hint in str(caught.value)


def wav(channels=1, bits=16, rate=16_000, claimed=None, raw=bytes(64)):
    size = len(raw) if claimed is None else claimed
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame % 2**32, frame % 2**16, bits)
    inside = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + raw
    return b"RIFF" + struct.pack("<I", min(len(inside) + size, 2**32 - 1)) + inside


class Source:
    path = None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (wav(channels=65_535), "65535 channels, and 64 are the limit"),
        (wav(bits=64), "8 bytes each, and 1 to 4 are read"),
        (wav(bits=60_000), "7500 bytes each"),
        (wav(claimed=2**32 - 100), "samples of 1 channels are needed"),
        (wav(claimed=2**24), "the file ends too early"),
        (wav(rate=2**32 - 1), "another rate"),
        (wav()[:20], "can't be read"),
    ],
)
def test_recordings_are_measured_by_their_headers(tmp_path, monkeypatch, raw, message):
    from graphprune.analysis.signature import Input

    given = Input("input_values", (None, None), torch.float32)
    monkeypatch.setattr("graphprune.calibration.sources.audio.open_extractor", lambda *_: Source())
    (tmp_path / "a.wav").write_bytes(raw)
    for content in (tmp_path / "a.wav", raw):
        before = peak()
        with pytest.raises(LoadError, match=message):
            load_audio([File("a.wav", content)], 1, pixels(), [given], None)
        assert peak() - before < 1 << 28


def test_the_library_writes_what_the_header_of_the_test_says():
    with wave.open(io.BytesIO(wav(channels=2)), "rb") as recording:
        assert recording.getparams()[:4] == (2, 2, 16_000, 16)


def save_stream(folder, table, compression=None):
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(folder / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    return folder / "a.arrow"


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_data_sets_are_refused(tmp_path, compression):
    text = pa.array(["a" * 100] * 1000)
    for column in (text, text.dictionary_encode()):
        table = pa.table({"text": column})
        save_stream(tmp_path, table, compression)
        with pytest.raises(LoadError, match="the data set is compressed"):
            read_dataset(tmp_path, None, None)
    save_stream(tmp_path, pa.table({"text": text}))
    assert len(read_dataset(tmp_path, None, None).text) == 1000 * 102 - 2


def test_damaged_rows_are_not_followed(tmp_path):
    file = save_stream(tmp_path, pa.table({"text": ["hello", "world"] * 100}))
    raw = file.read_bytes()
    at = raw.index(struct.pack("<ii", 5, 10))
    file.write_bytes(raw[: at + 4] + struct.pack("<i", 2**31 - 1) + raw[at + 8 :])
    with pytest.raises(LoadError, match="damaged") as caught:
        read_dataset(tmp_path, None, None)
    assert "column text, rows 0 to 63" in str(caught.value)
    file.write_bytes(raw.replace(b"helloworld", b"\xff" * 10, 1))
    with pytest.raises(LoadError, match="damaged"):
        read_dataset(tmp_path, None, None)
