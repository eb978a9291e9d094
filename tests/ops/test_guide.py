"""docs/adding-an-operator.md does what it says: its package is installed, its examples are run."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import graphprune as gp
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.ops import registry
from graphprune.report.operators import operators
from op_guide import blocks, build_kernels, module, onnx_example, points, torch_example
from pass_guide import install as install_package


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs the guide's package, its code changed; returns the names that the code defines."""

    def with_code(*changes, kernels=False):
        code = module()
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        package, _ = install_package(tmp_path, {"pruning": code}, {"graphprune.ops": points()})
        if kernels and not build_kernels(package):
            pytest.skip("no C++ compiler")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        for name in ("mylib", "mylib.pruning"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(registry, "OPERATORS", registry.OPERATORS.copy())
        from mylib import pruning  # type: ignore[import-not-found]

        return vars(pruning)

    return with_code


def run(code, names):
    """Run an example of the guide behind the code of the package; what it defines."""
    torch.manual_seed(0)
    namespace = {"gp": gp, "torch": torch, "np": np, **names}
    exec(code, namespace)
    return namespace


def test_torch_operators(install):
    found = run(torch_example(), install())
    program, slim = found["program"], found["slim"]
    assert not program.typing.opaque
    sizes = {s.size for s in program.structures if s.prunable}
    assert sizes == {4, 3}  # heads, and dims within
    assert slim.shapes["out.weight"] == (3, 2)
    x = torch.randn(7, 6)
    with torch.no_grad():
        assert slim.exported.module()(x).shape == (7, 3)


def test_onnx_operator(install, tmp_path):
    """The slim file computes what numpy does with the rows and columns that stay."""
    found = run(onnx_example(), install(kernels=True))
    program, plan = found["program"], found["plan"]
    assert not program.typing.opaque
    assert {s.size for s in program.structures if s.prunable} == {4, 3}
    found["slim"].save(tmp_path / "slim.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(tmp_path / "mylib" / "kernels.so"))
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx", options)
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    (result,) = session.run(None, {"x": x})
    heads, dims = plan.kept_units["out:0"], plan.kept_units["a:1/1"]  # what each head keeps
    assert (len(heads), {len(kept) for kept in dims}) == (2, {2})
    w = {name: tensor.double().numpy() for name, tensor in program.weights.items()}
    wide = (x @ w["a"] + w["a_bias"]).reshape(7, 4, 3)
    means = np.stack([wide[:, head, list(dims[head])].mean(-1) for head in heads], axis=-1)
    expected = means @ w["out"][list(heads)] + w["out_bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_ten_lines():
    rule = blocks("python")[1].split("\n\n\n")[1]
    assert rule.startswith("def scaled_add_axes")
    assert len(rule.strip().splitlines()) <= 10


@pytest.mark.parametrize(
    ("example", "change", "kernels"),
    [
        (torch_example, (", head_means_masked)", ")"), False),
        (onnx_example, ("    masked=onnx_head_means_masked,\n", ""), True),
    ],
)
def test_without_the_masked_formula_the_difference_is_noticed(install, example, change, kernels):
    names = install(change, kernels=kernels)
    with pytest.raises(VerifyError):
        run(example(), names)


def test_without_the_size_rule_the_difference_is_noticed(install):
    names = install(("head_means_axes, head_means_sizes,", "head_means_axes, None,"))
    with pytest.raises(GraphPruneError, match="wrong shape") as caught:
        run(torch_example(), names)
    assert caught.value.where.startswith("head_means mylib::head_means")


def test_an_onnx_operator_whose_shapes_are_unknown_is_frozen(install):
    names = install(("    shapes=onnx_head_means_shapes,\n", ""))
    code = onnx_example().partition("plan =")[0]
    program = run(code, names)["program"]
    assert "depends on data" in program.frozen()["a", 1]


def test_a_library_that_is_no_library_is_named(install, tmp_path):
    names = install()
    (tmp_path / "mylib" / "kernels.so").write_text("nothing")
    with pytest.raises(GraphPruneError, match="ONNX Runtime can't") as caught:
        run(onnx_example(), names)
    assert "kernels.so" in str(caught.value)


def test_they_are_listed_with_their_rules(install):
    install()
    found = operators()
    rules = {
        name.removeprefix("mylib."): [
            kind for kind in ("axes", "sizes", "masked", "shapes") if getattr(known, kind)
        ]
        for name, known in found.items()
        if name.startswith("mylib.")
    }
    assert rules == {
        "scaled_add": ["axes"],
        "head_means": ["axes", "sizes", "masked"],
        "HeadMeans": ["axes", "sizes", "masked", "shapes"],
    }
    assert Path(found["mylib.HeadMeans"].library).name == "kernels.so"
