"""Exported programs pruned: valid, dynamic, equal to the masked module, the source untouched."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.frontends.pt2.read import from_exported
from graphprune.integrations.exported_program import prune
from integrations.nets import exported, inputs, switched_off, tagger

REMOVE = {"ffn": 0.5, "heads": 0.25}


@pytest.fixture(scope="module")
def dense():
    return exported()


@pytest.fixture(scope="module")
def plan(dense):
    return gp.select(from_exported(dense), remove=REMOVE)


@pytest.fixture(scope="module")
def slim(dense, plan):
    return prune(dense, plan)


@pytest.fixture(scope="module")
def masked(plan):
    inner, heads = plan.kept_units["up.weight:0"], plan.kept_units["q.weight:0/0"]
    assert (len(inner), len(heads)) == (24, 3)
    return switched_off(tagger(), inner, heads)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 7), (3, 11), (1, 1)])
def test_it_equals_the_masked_module(slim, masked, sizes):
    args = inputs(*sizes, seed=5)
    close(slim.module()(*args), masked(*args))


def test_it_is_a_valid_program_with_the_same_interface(dense, slim):
    slim.validate()
    assert slim.graph_signature.user_inputs == ("input", "scale")
    assert slim.range_constraints == dense.range_constraints
    shapes = {name: tuple(t.shape) for name, t in slim.state_dict.items()}
    assert shapes["up.weight"] == (24, 32)
    assert shapes["q.weight"] == (24, 32)
    assert shapes["o.weight"] == (32, 24)
    tied = slim.state_dict["embed.weight"], slim.state_dict["head.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_the_source_is_not_changed():
    dense = exported()
    text, names = str(dense), [node.name for node in dense.graph.nodes]
    state = {name: tensor.clone() for name, tensor in dense.state_dict.items()}
    assert "relu_" in text  # in place, which the analysis exchanges in a copy
    prune(dense, remove=REMOVE)
    assert str(dense) == text
    assert [node.name for node in dense.graph.nodes] == names
    for name, tensor in dense.state_dict.items():
        assert torch.equal(tensor, state[name])
    args = inputs(3, 5)
    dense.validate()
    close(dense.module()(*args), tagger()(*args))


def test_it_survives_a_file(slim, masked):
    file = io.BytesIO()
    torch.export.save(slim, file)
    file.seek(0)
    loaded = torch.export.load(file)
    args = inputs(3, 9)
    close(loaded.module()(*args), masked(*args))


def test_it_exports_to_onnx(slim, masked, tmp_path):
    torch.onnx.export(slim, dynamo=True, verbose=False).save(tmp_path / "slim.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "slim.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input", "scale"]
    args = inputs(3, 11)
    (found,) = session.run(None, {"input": args[0].numpy(), "scale": args[1].numpy()})
    np.testing.assert_allclose(found, masked(*args).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("goal", [REMOVE, {"remove": REMOVE}], ids=["settings", "data"])
def test_goals_mean_the_same(dense, slim, goal):
    found = prune(dense, goal) if "remove" in goal else prune(dense, remove=goal)
    for name, tensor in slim.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor), name


def test_a_recipe_from_a_file(dense, slim, tmp_path):
    (tmp_path / "recipe.yaml").write_text("remove: {ffn: 0.9, heads: 0.25}\n")
    found = prune(dense, tmp_path / "recipe.yaml", remove=REMOVE)  # settings win
    assert torch.equal(found.state_dict["up.weight"], slim.state_dict["up.weight"])


def test_a_decomposed_program(dense, masked):
    found = prune(dense.run_decompositions(), remove=REMOVE)
    assert "linear" not in str(found.graph)
    args = inputs(3, 5)
    close(found.module()(*args), masked(*args))


def test_without_example_inputs(dense, masked):
    file = io.BytesIO()
    torch.export.save(dense, file)
    file.seek(0)
    bare = torch.export.load(file)
    bare.example_inputs = None
    args = inputs(3, 5)
    close(prune(bare, remove=REMOVE).module()(*args), masked(*args))


def test_pruned_twice(slim):
    twice = prune(slim, remove={"ffn": 0.5})
    assert twice.state_dict["up.weight"].shape == (12, 32)


class Branching(nn.Module):
    """A branch on data, and a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        x = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_and_mutated_buffers(sign):
    torch.manual_seed(0)
    module = Branching().eval()
    dense = torch.export.export(
        module, (torch.rand(3, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    plan = gp.select(from_exported(dense), remove={"ffn": 0.5})
    runnable = prune(dense, plan).module()
    assert runnable.up.weight.shape == (8, 8)
    x = sign * torch.rand(5, 8)
    found = runnable(x)
    assert runnable.calls == 1
    gone = torch.ones(16, dtype=torch.bool)
    gone[list(plan.kept_units["up.weight:0"])] = False
    with torch.no_grad():
        module.down.weight[:, gone] = 0
    close(found, module(x))


class Transposed(nn.Module):
    """Two weights in one storage that aren't the same matrix."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.down.weight = nn.Parameter(self.up.weight.detach().t())

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_a_transposed_view_is_not_tied():
    torch.manual_seed(0)
    module = Transposed().eval()
    dense = torch.export.export(module, (torch.rand(3, 16),))
    program = from_exported(dense)
    assert not program.aliases
    plan = gp.select(program, remove={"ffn": 0.5})
    kept = list(plan.kept_units["up.weight:0"])
    up, down = module.up.weight[kept], module.down.weight[:, kept]
    x = torch.randn(3, 16)
    close(prune(dense, plan).module()(x), x + (x @ up.T).relu() @ down.T)


def test_errors(dense):
    with pytest.raises(gp.RecipeError, match="exactly one of"):
        prune(dense)
    with pytest.raises(gp.RecipeError, match="unknown key 'removed'"):
        prune(dense, removed={"ffn": 0.5})
    with pytest.raises(gp.RecipeError, match="leaves nothing to choose"):
        prune(dense, gp.Plan("", {}), remove={"ffn": 0.5})
    with pytest.raises(gp.PlanError):
        prune(dense, gp.Plan("of another model", {}))


def test_a_wrong_rewrite_is_refused(dense, plan, monkeypatch):
    from graphprune.rewrite import weights

    right = weights.indices
    monkeypatch.setattr(weights, "indices", lambda e, keep: (right(e, keep) + 1) % e.size)
    with pytest.raises(gp.VerifyError):
        prune(dense, plan)
    prune(dense, plan, check=False)


def test_batches_may_be_as_large_as_before(tmp_path):
    """A depthwise convolution asks whether there are 16 samples, when fake tensors run it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 8, 1),
    ).eval()  # fmt: skip
    program = gp.trace(net, (torch.randn(2, 3, 8, 8),))
    plan = gp.select(program, remove={"channels": 0.25})
    slim = gp.apply(program, plan)
    path = tmp_path / "slim.pt2"
    slim.save(path, format="pt2")
    (kept,) = plan.kept_units.values()
    net[2].weight.data[[i for i in range(32) if i not in kept]] = 0
    net[2].bias.data[[i for i in range(32) if i not in kept]] = 0
    x = torch.randn(40, 3, 8, 8)
    close(torch.export.load(path).module()(x), net(x))
    assert program.exported.module()(x).shape == (40, 8, 8, 8)
