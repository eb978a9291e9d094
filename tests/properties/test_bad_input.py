"""Changed plans, recipes, data and ONNX files: understood as they are, or refused in words."""

from __future__ import annotations

import json
import random

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

import graphprune as gp
from graphprune.calibration.sources.contents import Text
from graphprune.calibration.sources.read import read
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import GraphPruneError
from graphprune.recipe.recipe import Recipe
from onnx_graphs import graph, weights, written
from plan_files import units
from properties.mutations import changed_bytes, changed_data, changed_model, json_text

RECIPES = [yaml.safe_load(text) for text in (
    """
    names: {"*.up_proj.weight:0": mine}
    remove: {ffn: 0.25, "*.a:0": 1/3}
    score: {name: magnitude, norm: l1}
    align: {ffn: 64, "*": 8}
    exclude: ["model.layers.0.*"]
    minimum: 25%
    calibration: {text: a.txt, windows: 4, length: 64, mean: [0.5], std: [0.5, 0.5], size: 64}
    rounds: 3
    seed: 7
    formats: [hf, onnx, pt2]
    verify: {dtype: float64, tolerance: 1.0e-9}
    """,
    "{target: {params: 0.7}, aggregate: mean, uniform: false}",
    "{sparsify: {method: sparsegpt, sparsity: 50%, bits: 4, budget: {name: owl, spread: 0.1}}}",
    "{shape: {ffn: 64}, sparsify: {method: dsnot, pattern: '2:4', first: {method: ria}}}",
)]  # fmt: skip


def mlp():
    text = "g (float[N,50] x) => (float[N,3] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
    return graph(text, a=weights(50, 8), c=weights(8, 3))


def convolutions():
    text = """g (float[N,3,8,8] x) => (float[N,4] y) {
        h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)  r = Relu(h)
        p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm<transB=1>(f, c, d) }"""
    return graph(text, w=weights(8, 3, 3, 3), b=weights(8), c=weights(4, 8), d=weights(4))


def heads():
    text = """g (int64[N,L] x) => (float[N,L,12] y) {
        e = Gather(t, x)  q = MatMul(e, a)  r = Reshape(q, into)
        u = Transpose<perm=[0,2,1,3]>(r)  v = Transpose<perm=[0,2,1,3]>(u)
        w = Reshape(v, back)  y = MatMul(w, c) }"""
    into, back = np.array([0, 0, 2, 4]), np.array([0, 0, 8])
    return graph(text, t=weights(20, 16), a=weights(16, 8), c=weights(8, 12), into=into, back=back)


def branches():
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in "xy")
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])

    def branch(operator, name):
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8])
        return helper.make_graph([helper.make_node(operator, ["x"], [name])], name, [], [made])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Relu", "p"), else_branch=branch("Neg", "q")
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(
        helper.make_graph([node], "g", [x, flag], [y]), opset_imports=opsets, ir_version=8
    )


MODELS = [make() for make in (mlp, convolutions, heads, branches)]


def outcome(action):
    """What an action gives; None where it is refused in words that don't blame us."""
    try:
        return action()
    except GraphPruneError as error:
        if "report this" in str(error):
            pytest.fail(str(error))
        return None


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return gp.load(str(written(mlp(), tmp_path_factory.mktemp("plan"))))


def test_changed_plans(program):
    (structure,) = (s for s in program.structures if s.prunable)
    plan = gp.Plan(program.fingerprint, {structure.name: (0, 2, 5)}, {structure.name: 8})
    data = json.loads(plan.to_json())
    read_back = 0
    for seed in range(400):
        rng = random.Random(seed)
        text = json_text(changed_data(data, rng), rng)
        found = outcome(lambda text=text: gp.Plan.from_json(text, "plan.json"))
        if found is None or outcome(lambda found=found: found.bind(program)) is None:
            continue
        said = json.loads(text)
        assert set(said) == {"schema", "fingerprint", "structures"}
        assert said["schema"] == 2
        for name, entry in said["structures"].items():
            assert set(entry) <= {"role", "size", "count", "kept", "parameters", "scores"}
            assert entry.get("size", 8) == 8
            assert repr(entry["count"]) == repr(len(found.kept_units[name]))  # 1, not True or 1.0
            assert list(found.kept_units[name]) == units(entry["kept"])
        assert set(found.kept_units) == set(said["structures"])
        read_back += 1
    assert 0 < read_back < 100


@pytest.mark.parametrize("seed", range(40))
def test_changed_recipes(tmp_path, seed):
    rng = random.Random(seed)
    data = changed_data(rng.choice(RECIPES), rng)
    text = json.dumps(data).encode()
    if rng.random() < 0.5:
        text = yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        text = changed_bytes(text, rng)
    (tmp_path / "a.yaml").write_bytes(text)
    recipe = outcome(lambda: Recipe.load(tmp_path / "a.yaml"))
    if recipe is not None:
        assert set(yaml.safe_load(text)) == recipe.model_fields_set
        assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.npy", "a.npz", "a.txt"])
def test_changed_data(tmp_path, name, seed):
    rng = random.Random(seed)
    file = tmp_path / name
    if name.endswith("npy"):
        np.save(file, np.arange(12).reshape(3, 4))
    elif name.endswith("npz"):
        np.savez(file, a=np.arange(12).reshape(3, 4), b=np.zeros((3, 2), "f4"))
    else:
        records = [{"text": "one two"}, {"text": "drei vier \u00e9"}]
        lines = [json_text(changed_data(one, rng), rng) for one in records]
        file.write_bytes(b"\n".join(lines) if name == "a.jsonl" else lines[0])
    file.write_bytes(changed_bytes(file.read_bytes(), rng) if rng.random() < 0.8 else
                     file.read_bytes())  # fmt: skip
    found = outcome(lambda: read(str(file), Calibration()))
    if isinstance(found, Text):
        assert found.text.encode("utf-8").strip()


@pytest.mark.parametrize("seed", range(60))
def test_changed_models(tmp_path, seed):
    rng = random.Random(seed)
    model = changed_model(rng.choice(MODELS), rng)
    raw = model.SerializeToString()
    source, output = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(changed_bytes(raw, rng) if rng.random() < 0.1 else raw)
    program = outcome(lambda: gp.load(str(source)))
    if program is None:
        return
    recipe = {"sparsify": {"method": "magnitude", "sparsity": 0.5}}
    if any(s.prunable for s in program.structures):
        recipe = {"remove": {"*": 0.5}}
    if outcome(lambda: gp.compile(source, recipe, output)) is not None:
        onnx.checker.check_model(str(output), full_check=True)
