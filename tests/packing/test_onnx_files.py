"""Packed ONNX files: the same outputs with our library, without it, and in the reference."""

import contextlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import graphprune as gp
from graphprune.errors import EmitError, LoadError
from graphprune.kernels import native
from graphprune.kernels.choose import Table
from graphprune.packing import onnx_timing, pack

OPSET = 20


def sparse(*shape, zeros=0.7):
    drawn = np.random.default_rng(sum(shape))
    weight = drawn.standard_normal(shape).astype(np.float32)
    weight[drawn.random(shape) < zeros] = 0
    return weight


WEIGHTS = {
    "first": sparse(300, 201),
    "second": sparse(77, 201),
    "second_bias": sparse(77, zeros=0),
    "third": sparse(77, 33),
    "dense": sparse(33, 9, zeros=0),
}


def build(path, opset=OPSET, weights=WEIGHTS, nodes=None, shape=("m", 9)):
    """Products of every kind that can be packed: MatMul, Gemm either way round, with a bias."""
    nodes = nodes or [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "size"], ["c"]),
        helper.make_node("Gemm", ["c", "second", "second_bias"], ["d"], name="two", transB=1),
        helper.make_node("Gemm", ["d", "third"], ["e"], name="three"),
        helper.make_node("MatMul", ["e", "dense"], ["y"], name="four"),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            *(numpy_helper.from_array(w, n) for n, w in weights.items()),
            numpy_helper.from_array(np.array([-1, 201]), "size"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "dense.onnx")


def plain_session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def test_products_become_nodes_of_ours(source, tmp_path):
    found = pack(source, tmp_path / "packed.onnx")
    model = onnx.load(tmp_path / "packed.onnx")
    kinds = [(n.op_type, n.domain) for n in model.graph.node]
    assert kinds.count(("BitmapLinear", "graphprune")) == 3
    assert [e.name for e in found.layers if e.format == "dense"] == ["dense"]
    assert {n.name for n in model.graph.initializer} >= {"first.bitmask", "third.compressed"}
    assert not {"first", "second", "third"} & {n.name for n in model.graph.initializer}
    taken = sum(
        int((w != 0).sum()) * 4 + outs * (-(-ins // 8) + 8)
        for w, outs, ins in (
            (WEIGHTS["first"], 201, 300),
            (WEIGHTS["second"], 77, 201),
            (WEIGHTS["third"], 33, 77),
        )
    )
    assert sum(e.bytes for e in found.layers if e.format == "bitmap") == taken
    size = (tmp_path / "packed.onnx").stat().st_size
    assert size < source.stat().st_size * 0.45


@pytest.mark.parametrize("opset", [13, 14, 15, 17, 18, 20, 21])
def test_outputs_are_the_same_in_all_runtimes(tmp_path, opset):
    source = build(tmp_path / "dense.onnx", opset)
    pack(source, tmp_path / "packed.onnx")
    x = np.random.default_rng(0).standard_normal((2, 5, 300)).astype(np.float32)
    (expected,) = plain_session(source).run(None, {"x": x})
    packed = gp.runtime.session(tmp_path / "packed.onnx")
    outputs = {
        "without the library": plain_session(tmp_path / "packed.onnx").run(None, {"x": x})[0],
        "with it": packed(x=x)["y"],
        "reference": ReferenceEvaluator(str(tmp_path / "packed.onnx")).run(None, {"x": x})[0],
    }
    for name, found in outputs.items():
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max(), name


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_our_kernel_computes_where_it_is_registered(source, tmp_path):
    pack(source, tmp_path / "packed.onnx")
    session = gp.runtime.session(tmp_path / "packed.onnx", warm_up=0)
    before = native.onnxruntime_calls()
    x = np.ones((1, 1, 300), np.float32)
    ours = session(x=x)["y"]
    assert native.onnxruntime_calls() == before + 3
    without = gp.runtime.session(tmp_path / "packed.onnx", warm_up=0, kernels=False)(x=x)["y"]
    assert native.onnxruntime_calls() == before + 3
    assert np.abs(ours - without).max() < 1e-5 * np.abs(ours).max()


def test_without_the_library_the_weights_are_decoded_once(source, tmp_path):
    pack(source, tmp_path / "packed.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "packed.onnx"), options, ["CPUExecutionProvider"])
    kinds = {n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert kinds <= {"MatMul", "Gemm", "FusedGemm", "FusedMatMul", "Relu", "Reshape", "Add"}


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_the_fastest_products_are_measured_and_kept(source, tmp_path):
    table = tmp_path / "cache" / "graphprune" / "kernels.json"
    with contextlib.suppress(EmitError):  # dense products may be faster in so small a model
        pack(source, tmp_path / "one.onnx", format="auto")
    times = json.loads(table.read_text())
    assert len(times) == 3
    assert all(key.startswith("ONNX Runtime") for key in times)
    assert all(set(t) == {"dense", "bitmap"} for t in times.values())
    first, *others = times
    times[first].update(bitmap=1e-9)
    for other in others:
        times[other].update(dense=1e-9)
    table.write_text(json.dumps(times))
    found = pack(source, tmp_path / "two.onnx", format="auto")
    assert [e.format for e in found.layers] == ["bitmap", "dense", "dense", "dense"]
    assert [e.why for e in found.layers[1:3]] == ["a dense product is faster here"] * 2


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_matrices_too_large_for_a_file_are_measured(monkeypatch):
    monkeypatch.setattr(onnx_timing, "INSIDE", 10_000)
    monkeypatch.setattr(onnx_timing, "COLD", 100_000)
    saved = []
    save = onnx.save

    def noted(model, file, **options):
        save(model, file, **options)
        saved.append((file.stat().st_size, options["location"]))

    monkeypatch.setattr(onnx_timing.onnx, "save", noted)
    table = Table(None)
    onnx_timing.faster(torch.from_numpy(sparse(100, 96)), (1,), table)
    assert all(size < 10_000 for size, _ in saved)
    assert [location for _, location in saved] == ["dense.data", "bitmap.data"]
    (times,) = table.times.values()
    assert set(times) == {"dense", "bitmap"}
    assert min(times.values()) > 0


def test_weights_that_others_use_stay(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("MatMul", ["x", "first"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    source = build(tmp_path / "dense.onnx", nodes=nodes, shape=("n", "t", 201))
    with pytest.raises(EmitError, match="no weight becomes smaller"):
        pack(source, tmp_path / "packed.onnx")
    assert not (tmp_path / "packed.onnx").exists()


def test_products_with_factors_stay(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "wide"], ["c"]),
        helper.make_node("Gemm", ["c", "first"], ["y"], alpha=0.5),
    ]
    weights = {**WEIGHTS, "wide": np.array([-1, 300])}
    source = build(tmp_path / "dense.onnx", nodes=nodes, weights=weights, shape=("m", 201))
    with pytest.raises(EmitError, match="no weight becomes smaller"):
        pack(source, tmp_path / "packed.onnx")


def test_what_can_t_be_packed_is_refused(source, tmp_path):
    with pytest.raises(EmitError, match="packed as an ONNX file"):
        pack(source, tmp_path / "packed")
    with pytest.raises(EmitError, match="no format 'csr'"):
        pack(source, tmp_path / "packed.onnx", format="csr")
    old = build(tmp_path / "old.onnx", 12)
    with pytest.raises(EmitError, match="opset 12 can't be packed") as error:
        pack(old, tmp_path / "packed.onnx")
    assert "convert_version" in error.value.hint


def test_large_files_keep_weights_beside_them(source, tmp_path, monkeypatch):
    monkeypatch.setattr("graphprune.packing.onnx.EXTERNAL_ABOVE", 1000)
    pack(source, tmp_path / "out" / "packed.onnx")
    assert len(list((tmp_path / "out").glob("packed.onnx.*.data"))) == 1
    x = np.ones((1, 1, 300), np.float32)
    (expected,) = plain_session(source).run(None, {"x": x})
    found = gp.runtime.session(tmp_path / "out" / "packed.onnx")(x=x)["y"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_in_place_the_old_weights_go(source, tmp_path):
    """Only those of the model: what else has such a name stays."""
    proto = onnx.load(source)
    place, others = tmp_path / "model.onnx", tmp_path / "other.onnx"
    location = "model.onnx.data"
    onnx.save(proto, place, save_as_external_data=True, location=location, size_threshold=0)
    assert (tmp_path / location).is_file()
    onnx.save(onnx.load(source), others)
    (tmp_path / "other.onnx.data").write_text("notes")
    x = np.ones((1, 1, 300), np.float32)
    (expected,) = plain_session(source).run(None, {"x": x})
    for path in (place, others):
        pack(path, path, overwrite=True)
        found = gp.runtime.session(path)(x=x)["y"]
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert not (tmp_path / location).exists()
    assert (tmp_path / "other.onnx.data").read_text() == "notes"


def test_a_packed_file_is_opened_dense(source, tmp_path):
    pack(source, tmp_path / "packed.onnx")
    program = gp.load(tmp_path / "packed.onnx")
    weights = {name: program.weights[name].numpy() for name in program.weights}
    for name in ("first", "third", "dense"):
        assert np.array_equal(weights[name], WEIGHTS[name])
    assert np.array_equal(weights["second"], WEIGHTS["second"].T)
    assert not any("bitmask" in name for name in weights)
    kinds = {(n.domain, n.op_type) for n in program.model.graph.all_nodes()}
    assert kinds == {("", k) for k in ("MatMul", "Relu", "Reshape", "Add")}
    assert not program.model.functions


def test_a_packed_file_is_pruned_as_its_dense_twin(source, tmp_path):
    pack(source, tmp_path / "packed.onnx")
    x = np.random.default_rng(0).standard_normal((2, 5, 300)).astype(np.float32)
    outputs = []
    for name in ("dense", "packed"):
        slim = tmp_path / f"slim-{name}.onnx"
        gp.compile(tmp_path / f"{name}.onnx", {"remove": {"ffn": 0.5}}, slim)
        assert slim.stat().st_size < 0.7 * source.stat().st_size
        outputs.append(plain_session(slim).run(None, {"x": x})[0])
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5 * np.abs(outputs[0]).max()


def test_a_packed_file_is_packed_again(source, tmp_path):
    first = pack(source, tmp_path / "packed.onnx")
    again = pack(tmp_path / "packed.onnx", tmp_path / "again.onnx")
    assert [(e.name, e.format, e.bytes) for e in again.layers] == [
        (e.name, e.format, e.bytes) for e in first.layers
    ]
    x = np.ones((1, 1, 300), np.float32)
    found = [gp.runtime.session(tmp_path / f"{n}.onnx")(x=x)["y"] for n in ("packed", "again")]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("bitmask", lambda a: a ^ 1, "row_offsets"),
        ("row_offsets", lambda a: a + 1, "row_offsets"),
        ("compressed", lambda a: a[:-1], "compressed"),
        ("shape", lambda a: a[:1], "shape"),
        ("shape", lambda a: a[::-1].copy(), "bitmask"),
    ],
)
def test_damaged_parts_are_refused(source, tmp_path, part, change, why):
    pack(source, tmp_path / "packed.onnx")
    model = onnx.load(tmp_path / "packed.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == f"first.{part}":
            array = change(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(LoadError) as error:
        gp.load(tmp_path / "damaged.onnx")
    assert why in str(error.value)


def test_a_weight_that_is_computed_means_what_the_function_says(source, tmp_path):
    pack(source, tmp_path / "packed.onnx")
    model = onnx.load(tmp_path / "packed.onnx")
    node = next(n for n in model.graph.node if n.op_type == "BitmapLinear")
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"
    onnx.save(model, tmp_path / "computed.onnx")
    program = gp.load(tmp_path / "computed.onnx")
    assert "first.bitmask" in program.weights
    assert "second" in program.weights


def test_names_that_are_taken(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["first.bitmask"]),
        helper.make_node("Relu", ["first.bitmask"], ["b"]),
        helper.make_node("Reshape", ["b", "size"], ["second.product"]),
        helper.make_node("Gemm", ["second.product", "second", "second_bias"], ["y"], transB=1),
    ]
    weights = {**WEIGHTS, "first.shape": np.zeros(1, np.float32)}
    source = build(tmp_path / "dense.onnx", nodes=nodes, weights=weights, shape=("m", 77))
    assert len(pack(source, tmp_path / "packed.onnx").layers) == 2
    x = np.ones((1, 2, 300), np.float32)
    (expected,) = plain_session(source).run(None, {"x": x})
    found = gp.runtime.session(tmp_path / "packed.onnx")(x=x)["y"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_old_files_get_the_version_that_has_functions(tmp_path):
    source = build(tmp_path / "dense.onnx", 13)
    model = onnx.load(source)
    model.ir_version = 6
    onnx.save(model, source)
    pack(source, tmp_path / "packed.onnx")
    assert onnx.load(tmp_path / "packed.onnx").ir_version == 8
