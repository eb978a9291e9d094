"""Zeros in written files: found under whatever name, and missed when they are gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from graphprune.emit.written import check_written, read_places, read_weights
from graphprune.errors import LoadError, VerifyError


def sparse(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[weight.abs() < 0.5] = 0
    return weight


WEIGHTS = {"a": sparse(6, 4), "b": sparse(4, 6, 1), "c": sparse(6, 4, 2), "k": sparse(3, 5, 3)}
ZEROS = sum(int((w == 0).sum()) for w in WEIGHTS.values())


def onnx_file(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    shape = [1]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """The weights as an exporter may store them."""
    found = {
        "a": WEIGHTS["a"].numpy(),
        "val_1": WEIGHTS["b"].numpy().T,
        "val_2": WEIGHTS["c"].numpy(),
        "k.folded": WEIGHTS["k"].numpy() * np.array([[2.0], [3.0], [0.5]], dtype=np.float32),
        "other": np.ones((6, 4), dtype=np.float32),
    }
    return {**found, **changes}


def test_onnx_weights_are_found_by_their_values(tmp_path: Path) -> None:
    file = onnx_file(tmp_path / "m.onnx", arrays())
    found = check_written(file, "onnx", WEIGHTS, {})
    assert found.zeros == ZEROS
    assert found.places == {"a": "a", "b": "val_1^T", "c": "val_2"}
    for name, weight in read_places(file, found.places).items():
        assert torch.equal(weight, WEIGHTS[name])
    with pytest.raises(LoadError, match="missing"):
        read_places(file, {"a": "nowhere^T"})


def test_onnx_weights_in_two_pieces_still_have_their_zeros(tmp_path: Path) -> None:
    whole = WEIGHTS["c"].numpy()
    parts = arrays(val_2=whole[:2], val_3=whole[2:])
    found = check_written(onnx_file(tmp_path / "m.onnx", parts), "onnx", WEIGHTS, {})
    assert found.zeros == ZEROS
    assert "c" not in found.places


@pytest.mark.parametrize("name", ["a", "val_1", "val_2", "k.folded"])
def test_a_zero_that_onnx_lacks_is_missed(tmp_path: Path, name: str) -> None:
    changed = arrays()[name].copy()
    changed[tuple(np.argwhere(changed == 0)[0])] = 1e-7
    file = onnx_file(tmp_path / "m.onnx", arrays(**{name: changed}))
    with pytest.raises(VerifyError, match="doesn't hold a changed weight"):
        check_written(file, "onnx", WEIGHTS, {})


def test_half_precision_is_found_in_single(tmp_path: Path) -> None:
    weight = WEIGHTS["a"].bfloat16()
    file = onnx_file(tmp_path / "m.onnx", {"val": weight.float().numpy().T})
    assert check_written(file, "onnx-decoder", {"a": weight}, {}).places == {"a": "val^T"}


def test_checkpoints_hold_what_was_to_be_written(tmp_path: Path) -> None:
    stored = {n: w.contiguous() for n, w in WEIGHTS.items() if n != "c"}
    save_file({**stored, "tied.c": WEIGHTS["c"]}, tmp_path / "model.safetensors")
    found = check_written(tmp_path, "hf", WEIGHTS, {"c": ["tied.c"]})
    assert (found.zeros, found.places) == (ZEROS, {})
    with pytest.raises(LoadError, match="missing"):
        check_written(tmp_path, "hf", WEIGHTS, {})
    zero_moved = WEIGHTS["a"].roll(1, 0)
    with pytest.raises(VerifyError, match="as many zeros, and other values"):
        check_written(tmp_path, "hf", {"a": zero_moved}, {})
    fewer = WEIGHTS["a"].clone()
    fewer[fewer == 0] = 1
    with pytest.raises(VerifyError, match="0 were to be written"):
        check_written(tmp_path, "hf", {"a": fewer}, {})


def test_pt2_files_are_read_without_their_graph_being_run(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 6, bias=False)
    module.weight.data = WEIGHTS["a"].clone()
    file = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(module, (torch.ones(2, 4),)), file)
    assert torch.equal(read_weights(file, {"weight": ["weight"]})["weight"], WEIGHTS["a"])
    count = int((WEIGHTS["a"] == 0).sum())
    assert check_written(file, "pt2", {"weight": WEIGHTS["a"]}, {}).zeros == count
