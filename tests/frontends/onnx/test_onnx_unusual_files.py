"""Files that are odd and right: types, links, weights read and cut in pieces; and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphprune as gp
from cli.helpers import tree
from graphprune.frontends.onnx.load import load_onnx
from graphprune.ir.onnx import files as onnx_files
from graphprune.ir.onnx import tensors as onnx_tensors
from graphprune.rewrite.slim_onnx import SlimOnnx
from onnx_graphs import graph, initialisers, planned, run, weights, written
from plan_files import units

KEEP = [0, 2, 3, 6]
A, C = weights(50, 8), weights(8, 3)
X = weights(4, 50, seed=9)
BODY = "h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, c)"
CAST = "p = Cast<to = 1>(a)  h = MatMul(x, p)  r = Relu(h)  y = MatMul(r, c)"
TEXT = f"g (float[N,50] x) => (float[N,3] y) {{ {BODY} }}"


def expected(file, a=A, x=X):
    """What the slim file of such a model has to compute, from its plan."""
    plan = json.loads(Path(f"{file}.graphprune_plan.json").read_text())
    (kept,) = (units(entry["kept"]) for entry in plan["structures"].values())
    return np.maximum(x @ a[:, kept], 0) @ C[kept]


def compiled(model, folder, **feeds):
    """The first output of the slim file of a model, and the file."""
    file, out = written(model, folder), folder / "out" / "slim.onnx"
    gp.compile(file, {"remove": {"*": 0.5}}, out)
    return run(out, **feeds), out


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "int4", "uint4"]
)
def test_narrow_types(tmp_path, dtype, outside):
    narrow = (A * 3).astype(getattr(ml_dtypes, dtype))
    text = f"g (float[N,50] x) => (float[N,3] y) {{ {CAST} }}"
    model = graph(text, 23, 11, a=numpy_helper.from_array(narrow, "a"), c=C)
    if outside:
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="w",
                  size_threshold=0)  # fmt: skip
        model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    (found,), out = compiled(model, tmp_path, x=X)
    wanted = expected(out, narrow.astype(np.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    before = {t.name: t.data_type for t in model.graph.initializer}
    assert {t.name: t.data_type for t in onnx.load(out).graph.initializer} == before


def test_no_inputs(tmp_path):
    file = written(graph(f"g () => (float[4,3] y) {{ {BODY} }}", x=X, a=A, c=C), tmp_path)
    program = load_onnx(file)
    slim = SlimOnnx(program, planned(program, {("a", 1): KEEP}))
    slim.save(tmp_path / "slim.onnx")
    gp.verify(program, slim.plan, slim).raise_if_failed()
    (found,) = run(tmp_path / "slim.onnx")
    np.testing.assert_allclose(found, np.maximum(X @ A[:, KEEP], 0) @ C[KEEP], rtol=1e-4, atol=1e-5)


def test_a_weight_without_elements(tmp_path):
    head = "g (float[N,50] x) => (float[N,3] y, float[N,0] z)"
    model = graph(f"{head} {{ {BODY}  z = MatMul(r, e) }}", a=A, c=C, e=C[:, :0])
    (found, empty), out = compiled(model, tmp_path, x=X)
    assert empty.shape == (4, 0)
    assert initialisers(onnx.load(out))["e"].shape == (4, 0)
    np.testing.assert_allclose(found, expected(out), rtol=1e-4, atol=1e-5)


def test_an_output_that_is_a_sequence(tmp_path):
    """Its elements have other shapes, and are compared all the same."""
    head = "g (float[N,50] x) => (float[N,3] y, seq(float[P,Q]) s)"
    model = graph(f"{head} {{ {BODY}  t = ReduceSum(y)  s = SequenceConstruct(y, t) }}", a=A, c=C)
    (found, both), out = compiled(model, tmp_path, x=X)
    np.testing.assert_allclose(found, expected(out), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[1].sum(), found.sum(), rtol=1e-4)


def test_an_input_that_is_a_sequence(tmp_path):
    """What it doesn't reach can be cut, and is compared on values of one's own."""
    head = "g (float[N,50] x, seq(float[P,Q]) s) => (float[N,3] y, float[P,Q] z)"
    body = f"{BODY}  i = Constant<value_int = 1>()  z = SequenceAt(s, i)"
    program = load_onnx(written(graph(f"{head} {{ {body} }}", a=A, c=C), tmp_path))
    plan = planned(program, {("a", 1): KEEP})
    slim = SlimOnnx(program, plan)
    slim.save(tmp_path / "slim.onnx")
    feeds = {"x": X, "s": [C, A]}
    certificate = gp.verify(program, plan, slim, feeds)
    assert certificate.passed
    assert certificate.dense_difference > 1
    found, same = run(tmp_path / "slim.onnx", **feeds)
    np.testing.assert_allclose(found, np.maximum(X @ A[:, KEEP], 0) @ C[KEEP], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, A)


def test_text(tmp_path):
    """Of an input and of a constant; it is handed on."""
    head = "g (float[N,50] x, string[N] s) => (float[N,3] y, string[N] t, string[2] u)"
    words = numpy_helper.from_array(np.array(["one", "two"], dtype=object), "v")
    model = graph(f"{head} {{ {BODY}  t = Identity(s)  u = Identity(v) }}", a=A, c=C, v=words)
    names = np.array(["a", "bc", "", "d"], dtype=object)
    (found, same, constant), out = compiled(model, tmp_path, x=X, s=names)
    assert (list(same), list(constant)) == (list(names), ["one", "two"])
    np.testing.assert_allclose(found, expected(out), rtol=1e-4, atol=1e-5)


def test_text_that_differs_is_found(tmp_path):
    head = "g (float[N,50] x) => (float[N,3] y, string[2] u)"
    text = f"{head} {{ {BODY}  u = Identity(v) }}"

    def of(word):
        words = numpy_helper.from_array(np.array([word, "two"], dtype=object))
        return load_onnx(written(graph(text, a=A, c=C, v=words), tmp_path, f"{word}.onnx"))

    program, other = of("a"), of("b")
    plan = planned(program, {("a", 1): KEEP})
    SlimOnnx(other, planned(other, {("a", 1): KEEP})).save(tmp_path / "slim.onnx")
    certificate = gp.verify(program, plan, tmp_path / "slim.onnx")
    assert certificate.failed_output == "u"


def external(folder, model=None, location="w.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model or graph(TEXT, a=A, c=C), folder / "dense.onnx", save_as_external_data=True,
              location=location, size_threshold=0)  # fmt: skip
    return folder / "dense.onnx"


def linked_blobs(root):
    """As the Hugging Face hub lays it out: both files are links into a folder of blobs."""
    file, snapshot = external(root / "blobs"), root / "snapshots" / "1" / "onnx"
    snapshot.mkdir(parents=True)
    for old, blob, new in (("dense.onnx", "0a", "model.onnx"), ("w.bin", "0b", "w.bin")):
        (file.parent / old).rename(file.parent / blob)
        (snapshot / new).symlink_to(f"../../../blobs/{blob}")
    return snapshot / "model.onnx"


def linked_data(root):
    """The data is a link to a file below."""
    file = external(root)
    (root / "sub").mkdir()
    (root / "w.bin").rename(root / "sub" / "data")
    (root / "w.bin").symlink_to("sub/data")
    return file


def linked_folder(root):
    file = external(root / "real")
    (root / "link").symlink_to("real")
    return root / "link" / file.name


def linked_model(root):
    """Only the model is a link; its data lies where it is named, beside the link."""
    file = external(root / "real")
    (root / "w.bin").write_bytes((root / "real" / "w.bin").read_bytes())
    (root / "dense.onnx").symlink_to("real/dense.onnx")
    return root / file.name


@pytest.mark.parametrize("make", [linked_blobs, linked_data, linked_folder, linked_model])
def test_links_that_stay(tmp_path, make):
    file, out = make(tmp_path / "in"), tmp_path / "out" / "slim.onnx"
    before = tree(tmp_path / "in")
    gp.compile(file, {"remove": {"*": 0.5}}, out)
    np.testing.assert_allclose(run(out, x=X)[0], expected(out), rtol=1e-4, atol=1e-5)
    assert tree(tmp_path / "in") == before
    plain = gp.load(written(graph(TEXT, a=A, c=C), tmp_path))
    assert gp.load(file).fingerprint == plain.fingerprint


def test_a_link_is_not_followed_when_written_over(tmp_path):
    """Neither the blob behind the link nor its neighbour is the output."""
    file = linked_blobs(tmp_path)
    program = load_onnx(file)
    slim = SlimOnnx(program, planned(program, {("a", 1): KEEP}))
    for name in ("0a", "0b"):
        with pytest.raises(gp.EmitError, match="source itself"):
            slim.save(tmp_path / "blobs" / name)


def test_data_in_the_attribute_of_a_constant(tmp_path):
    file = external(tmp_path)
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "a")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["a"], value=tensor))
    model.graph.initializer.remove(tensor)
    (found,), out = compiled(model, tmp_path, x=X)
    np.testing.assert_allclose(found, expected(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_are_cut_in_pieces(tmp_path, monkeypatch, dtype):
    """A few rows at a time, along both dimensions, from a mapped file, which stays as it is."""
    monkeypatch.setattr(onnx_tensors, "PIECE", 64)
    monkeypatch.setattr(onnx_tensors, "MAPPED_ABOVE", 0)
    up, down = weights(50, 16).astype(dtype), weights(16, 12).astype(dtype)
    last = weights(12, 3).astype(dtype)
    text = """g (float[N,50] x) => (float[N,3] y) {
        p = Cast<to = 1>(a)  q = Cast<to = 1>(b)  s = Cast<to = 1>(c)
        h = MatMul(x, p)  i = MatMul(h, q)  y = MatMul(i, s) }"""
    arrays = {n: numpy_helper.from_array(w, n) for n, w in (("a", up), ("b", down), ("c", last))}
    file = external(tmp_path / "in", graph(text, **arrays))
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}
    program = load_onnx(file)
    for weight in map(program.weights.__getitem__, "abc"):
        weight.fill_(0)  # a copy, or a private page
    rows, columns = [0, 3, 4, 11, 15], [1, 2, 7, 10]
    plan = planned(program, {("a", 1): rows, ("b", 1): columns})
    SlimOnnx(program, plan).save(tmp_path / "slim.onnx")
    found = initialisers(onnx.load(tmp_path / "slim.onnx"))
    np.testing.assert_array_equal(found["a"], up[:, rows])
    np.testing.assert_array_equal(found["b"], down[np.ix_(rows, columns)])
    np.testing.assert_array_equal(found["c"], last[columns])
    assert gp.verify(program, plan, tmp_path / "slim.onnx").passed
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before


@pytest.mark.parametrize("outside", [False, True])
def test_large_weights_stay_in_a_second_file(tmp_path, monkeypatch, outside):
    monkeypatch.setattr(onnx_files, "STREAMED_ABOVE", 100)
    model = graph(TEXT, a=A, c=C)
    file = external(tmp_path / "in", model) if outside else written(model, tmp_path)
    out = tmp_path / "out" / "slim.onnx"
    gp.compile(file, {"remove": {"*": 0.5}}, out)
    assert len(list(out.parent.glob("slim.onnx.*.data"))) == outside
    np.testing.assert_allclose(run(out, x=X)[0], expected(out), rtol=1e-4, atol=1e-5)


def test_the_source_stays_if_it_lies_in_the_output(tmp_path):
    """A file in the directory of an older output is the data of the source."""
    (tmp_path / "folder").mkdir()
    file = external(tmp_path, location="folder/model.onnx.data")
    (tmp_path / "folder" / "graphprune_plan.json").touch()  # as if it were an older output
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(gp.EmitError, match="source itself"):
        gp.compile(file, {"remove": {"*": 0.5}}, tmp_path / "folder", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("used", [False, True], ids=["somebody's", "the source's"])
def test_a_data_file_that_exists_is_not_written_over(tmp_path, monkeypatch, used):
    """Ours has a name of its own."""
    monkeypatch.setattr(onnx_files, "STREAMED_ABOVE", 100)
    file, out = (
        external(tmp_path, location="slim.onnx.data" if used else "weights.bin"),
        tmp_path / "slim.onnx",
    )
    if not used:
        (tmp_path / "slim.onnx.data").write_text("somebody's")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(2):
        gp.compile(file, {"remove": {"*": 0.5}}, out, overwrite=True)
        assert {p: p.read_bytes() for p in before} == before
    np.testing.assert_allclose(run(out, x=X)[0], expected(out), rtol=1e-4, atol=1e-5)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["temporary", "output", "rename"])
def test_a_full_disk(tmp_path, monkeypatch, where):
    """While the models to compare are written, the result, or it is put in its place."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    file, out = external(tmp_path / "in"), tmp_path / "slim.onnx"
    save = onnx_files.ir.save

    def some(model, path, **options):
        save(model, path, **options)
        if path.is_relative_to(scratch) is (where == "temporary"):
            path.write_bytes(path.read_bytes()[:100])
            full()

    if where == "rename":
        monkeypatch.setattr("graphprune.files.placing.move_new", full)
    else:
        monkeypatch.setattr(onnx_files.ir, "save", some)
    before = tree(tmp_path)
    with pytest.raises(gp.EmitError, match="No space left on device"):
        gp.compile(file, {"remove": {"*": 0.5}}, out)
    assert tree(tmp_path) == before


def test_a_limit_on_the_size_of_files(tmp_path):
    """The system's own refusal, in a process of its own."""
    up, down = weights(600, 400), weights(400, 3)
    file = external(tmp_path / "in", graph(TEXT.replace("50", "600"), a=up, c=down))
    (tmp_path / "scratch").mkdir()
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from graphprune.cli.app import main; main()", "compile", str(file),
         "-o", str(tmp_path / "slim.onnx"), "--remove", "*=0.5"],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch"),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "TMPDIR" in done.stderr
    assert done.stderr.count("error: ") == 1
    left = [name for name in tree(tmp_path) if name != "scratch/.ses"]  # ONNX Runtime's own
    assert left == before
