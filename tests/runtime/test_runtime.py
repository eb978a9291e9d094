"""Deployment sessions against plain ONNX Runtime, and what they refuse."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import graphprune as gp
from graphprune.errors import EvaluationError
from graphprune.ir.onnx.ort import open_raw
from graphprune.runtime.sessions import TensorType, session
from onnx_graphs import graph, weights, written

SHAPES = {"x": (2, 5, 4), "mask": (2, 5)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``(x @ w) * mask`` and the mask itself; batch and length are open."""
    model = graph(
        """ g (float[batch, length, 4] x, bool[batch, length] mask)
            => (float[batch, length, 3] y, bool[batch, length] same, float z) {
          p = MatMul(x, w)
          m = Cast<to = 1>(mask)
          u = Unsqueeze(m, last)
          y = Mul(p, u)
          same = Not(mask)
          z = ReduceMax<keepdims = 0>(y)
        }""",
        w=weights(4, 3),
        last=np.array([2]),
    )
    return written(model, tmp_path_factory.mktemp("runtime"))


def inputs() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal(SHAPES["x"]).astype(np.float32),
        "mask": rng.integers(0, 2, SHAPES["mask"]).astype(bool),
    }


def plain(path: Path, feeds: dict[str, Any]) -> list[Any]:
    raw = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[Any] = raw.run(None, feeds)
    return found


@pytest.mark.parametrize("bind", [True, False])
@pytest.mark.parametrize("kind", [np.ndarray, torch.Tensor])
def test_values_are_those_of_onnx_runtime(path: Path, bind: bool, kind: type) -> None:
    feeds = inputs()
    given = feeds if kind is np.ndarray else {n: torch.from_numpy(v) for n, v in feeds.items()}
    model = session(path, threads=1, bind=bind, example=given)
    found = model(**given)
    assert list(found) == ["y", "same", "z"]
    assert all(isinstance(value, kind) for value in found.values())
    for value, expected in zip(found.values(), plain(path, feeds), strict=True):
        assert str(value.dtype).endswith(str(expected.dtype))
        np.testing.assert_array_equal(np.asarray(value), expected)


def test_one_tensor_among_arrays_makes_tensors(path: Path) -> None:
    feeds = inputs()
    found = session(path)(x=torch.from_numpy(feeds["x"]).requires_grad_(), mask=feeds["mask"])
    np.testing.assert_array_equal(found["y"].numpy(), plain(path, feeds)[0])


def test_memory_is_read_in_place_in_any_order(path: Path) -> None:
    feeds = inputs()
    turned = np.asfortranarray(feeds["x"])
    model = session(path)
    first = model(x=turned, mask=feeds["mask"])["y"]
    np.testing.assert_allclose(first, plain(path, feeds)[0], rtol=1e-6)
    feeds["x"] *= 2
    np.testing.assert_allclose(model(**feeds)["y"], 2 * first, rtol=1e-6)


def test_outputs_outlive_session_and_inputs_and_later_calls(path: Path) -> None:
    model, feeds = session(path), inputs()
    expected = plain(path, feeds)[0]
    found = model(**feeds)["y"]
    model(x=feeds["x"] + 1, mask=feeds["mask"])
    del model, feeds
    gc.collect()
    np.testing.assert_array_equal(found, expected)
    found[:] = 0  # they are the caller's


def test_an_input_that_is_an_output_and_a_constant_one(tmp_path: Path) -> None:
    model = graph("g (float[n] x) => (float[n] x, float[2] w) {}", w=np.ones(2, np.float32))
    opened = session(written(model, tmp_path))
    given = np.arange(3, dtype=np.float32)
    found = opened(x=given)
    for value in found.values():
        value += 5
    assert given.tolist() == [0, 1, 2]
    assert opened(x=given)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_empty_inputs(path: Path, shape: tuple[int, ...]) -> None:
    feeds = {"x": np.zeros(shape, np.float32), "mask": np.zeros(shape[:2], bool)}
    found = session(path)(**{n: torch.from_numpy(v) for n, v in feeds.items()})
    for value, expected in zip(found.values(), plain(path, feeds), strict=True):
        np.testing.assert_array_equal(value.numpy(), expected)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.UINT8, np.uint8),
    ],
)
def test_types(tmp_path: Path, number: int, dtype: Any) -> None:
    helper = onnx.helper
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [value("x", number, [2, 3])],
        [value("y", number, [3, 2])],
        [onnx.numpy_helper.from_array(np.array([3, 2]), "s")],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    given = np.arange(6).reshape(2, 3).astype(dtype)
    opened = session(written(model, tmp_path))
    found = opened(x=given)["y"]
    assert found.dtype == given.dtype
    np.testing.assert_array_equal(found, given.reshape(3, 2))
    assert opened.inputs["x"] == TensorType(given.dtype.name, (2, 3))


def test_text_is_copied(tmp_path: Path) -> None:
    model = graph("g (string[n] x) => (string[n] y) { y = Identity(x) }")
    opened = session(written(model, tmp_path))
    assert opened(x=np.array(["a", "bc"]))["y"].tolist() == ["a", "bc"]
    assert str(opened.inputs["x"]) == "tensor(string) [n]"
    with pytest.raises(EvaluationError, match="no example input"):
        opened.latency()


def test_what_a_session_says_of_itself(path: Path) -> None:
    model = session(path, threads=2)
    assert model.inputs == {
        "x": TensorType("float32", ("batch", "length", 4)),
        "mask": TensorType("bool", ("batch", "length")),
    }
    assert model.outputs["z"] == TensorType("float32", ())
    assert (model.threads, model.providers) == (2, ("CPUExecutionProvider",))
    assert str(model.inputs["x"]) == "float32 [batch, length, 4]"


def test_threads_of_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert session(path).threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert session(path).threads >= 1


def test_latency(path: Path) -> None:
    model = session(path, threads=1, example=inputs())
    latency = model.latency(repeats=7)
    assert 0 < latency.quartiles[0] <= latency.seconds <= latency.quartiles[1]
    assert (latency.repeats, latency.threads, latency.runtime) == (7, 1, "onnxruntime")
    assert session(path).latency(repeats=3).seconds > 0  # on made-up inputs


def test_warm_up_runs_on_the_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        gp.runtime.Session, "__call__", lambda self, /, **given: calls.append(given)
    )
    feeds = inputs()
    session(path, warm_up=3, example=feeds)
    assert [list(call) for call in calls] == [["x", "mask"]] * 3
    calls.clear()
    session(path, warm_up=3)  # sizes are open, and nothing is known of them
    session(path, warm_up=0, example=feeds)
    assert calls == []


def test_fixed_sizes_need_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(graph("g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }"), tmp_path)
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        gp.runtime.Session, "__call__", lambda self, /, **given: calls.append(given["x"].shape)
    )
    session(file, warm_up=2)
    assert calls == [(2, 3)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "mask is missing"),
        ({"masks": np.ones(2)}, "there is no input masks"),
        ({"x": np.zeros((2, 5, 4))}, r"x is float64 \[2, 5, 4\] instead of float32"),
        ({"x": np.zeros((2, 5, 3), np.float32)}, r"x is float32 \[2, 5, 3\] instead of float32"),
        ({"x": np.zeros((5, 4), np.float32)}, r"x is float32 \[5, 4\] instead"),
        ({"x": torch.zeros(2, 5, 4, dtype=torch.bfloat16)}, "x is bfloat16"),
        ({"x": torch.zeros(2, 5, 4, device="meta")}, "x is on meta"),
        ({"x": [[1.0]]}, "neither a numpy array nor a torch tensor"),
        ({"mask": np.ones((2, 6), bool)}, "can't run the model on these inputs"),
    ],
)
@pytest.mark.parametrize("bind", [True, False])
def test_wrong_inputs(path: Path, change: dict[str, Any], message: str, bind: bool) -> None:
    given = {n: v for n, v in (inputs() | change).items() if v is not None}
    with pytest.raises(gp.LoadError, match=message):
        session(path, bind=bind)(**given)
    with pytest.raises(gp.LoadError, match=message):
        session(path, bind=bind, example=given)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(gp.LoadError, match="does not exist"):
        session(tmp_path / "none.onnx")
    with pytest.raises(gp.LoadError, match="does not exist"):
        session(tmp_path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07garbage")
    with pytest.raises(gp.LoadError, match="can't open"):
        session(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ["tpu"]}, "no provider 'tpu'"),
        ({"providers": [("NoSuchExecutionProvider", {})]}, "no provider"),
        ({"providers": []}, "at least one provider"),
        ({"threads": 0}, "at least one thread"),
    ],
)
def test_wrong_options(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(gp.LoadError, match=message):
        session(path, **options)


@pytest.mark.parametrize("provider", ["cpu", "CPUExecutionProvider", ("CPU", {})])
def test_names_of_providers(path: Path, provider: Any) -> None:
    assert session(path, providers=[provider]).providers == ("CPUExecutionProvider",)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(gp.LoadError, match="CUDAExecutionProvider doesn't start"):
        session(path, providers=["cuda", "cpu"])
    assert session(path).providers == ("CPUExecutionProvider",)  # nobody has insisted


def test_without_onnx_runtime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(gp.LoadError, match="not installed"):
        open_raw(path, 1)


def test_what_the_documentation_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = graph(
        """ g (int64[batch, length] input_ids, int64[batch, length] attention_mask)
            => (int64[batch, length] y) { y = Mul(input_ids, attention_mask) }"""
    )
    written(model, tmp_path, "slim.onnx")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    np.testing.assert_array_equal(names["outputs"]["y"], names["inputs"]["input_ids"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "int64 [batch, length]"
    assert second.endswith(") 1")


def test_the_import_is_lazy() -> None:
    code = (
        "import sys, graphprune as gp; gp.runtime.session; "
        "assert not {'torch', 'onnxruntime', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(gp.__file__).parents[1])
