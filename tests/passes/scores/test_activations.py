"""Scores of activations against forward hooks and loops in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphprune as gp
from graphprune.analysis.structure import Structure
from graphprune.errors import PlanError
from graphprune.frontends.tracing.trace import trace
from graphprune.ir.torch.program import Program
from graphprune.passes.scores import get_score
from graphprune.passes.scores.flap import Fluctuation
from graphprune.passes.selection.select import select
from graphprune.passes.shared.score import Inputs
from streaming.oracle import traced
from zoo import mixtures


@pytest.fixture(scope="module")
def llama(make_llama) -> Program:
    return make_llama(layers=2)


@pytest.fixture(scope="module")
def gpt2() -> Program:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=32, use_cache=False
    )
    model = GPT2LMHeadModel(config).eval()
    return trace(model, kwargs={"input_ids": torch.randint(0, 96, (2, 7))})


def tokens_of(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 96, (count, 9), generator=torch.Generator().manual_seed(3))


def of_role(program: Program, role: str) -> list[Structure]:
    found = [s for s in program.structures if s.role == role and s.prunable]
    assert found
    return found


def reads(program: Program, names: list[str], samples: Any) -> dict[str, list[np.ndarray]]:
    """Module to what it reads of each sample, ``[tokens, features]`` in float64."""
    module = copy.deepcopy(program.module).double()
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for name, seen in found.items():
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach().flatten(0, -2).numpy())
        )
    with torch.no_grad():
        for sample in samples:
            module(sample[None])
    return found


def weight_of(program: Program, name: str) -> np.ndarray:
    """``[out, in]`` in float64."""
    weight = program.weights[f"{name}.weight"].detach().double().numpy()
    return weight.T if "c_" in name else weight


def minitron(samples: list[np.ndarray], weight: np.ndarray) -> list[float]:
    """For each column the square of its score."""
    del weight
    return [sum(np.abs(x[:, j]).mean() ** 2 for x in samples) for j in range(samples[0].shape[1])]


def wanda_sp(samples: list[np.ndarray], weight: np.ndarray) -> list[float]:
    x = np.concatenate(samples)
    return [
        np.abs(weight[:, j]).mean() * math.sqrt((x[:, j] ** 2).mean()) for j in range(x.shape[1])
    ]


def wifv(samples: list[np.ndarray], weight: np.ndarray) -> list[float]:
    x = np.concatenate(samples)
    return [
        ((x[:, j] - x[:, j].mean()) ** 2).mean() * (weight[:, j] ** 2).sum()
        for j in range(x.shape[1])
    ]


def standard(values: list[float]) -> np.ndarray:
    return (np.array(values) - np.mean(values)) / np.std(values)


def joined(name: str, columns: list[float], units: list[list[int]], squared: bool) -> list[float]:
    """From columns to units, as the papers do it."""
    if name == "minitron":
        return [math.sqrt(sum(columns[j] for j in unit)) for unit in units]
    if name == "wanda-sp":
        return [sum(columns[j] for j in unit) for unit in units]
    z = standard([c**2 for c in columns] if squared else columns)
    return [float(np.mean([z[j] for j in unit])) for unit in units]


COLUMNS = {"minitron": minitron, "wanda-sp": wanda_sp, "flap": wifv}


def expect(
    program: Program, name: str, module: str, units: list[list[int]], squared: bool = False
) -> list[float]:
    samples = reads(program, [module], tokens_of())[module]
    columns = COLUMNS[name](samples, weight_of(program, module))
    return joined(name, columns, units, squared)


def close(found: np.ndarray, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COLUMNS)
def test_ffn(llama: Program, gpt2: Program, name: str) -> None:
    for program, path in (
        (llama, "model.layers.{}.mlp.down_proj"),
        (gpt2, "transformer.h.{}.mlp.c_proj"),
    ):
        structures = of_role(program, "ffn")
        found = get_score(name).score(program, structures, Inputs(tokens_of()))
        for layer, structure in enumerate(structures):
            units = [[u] for u in range(structure.size)]
            close(found[structure.name], [expect(program, name, path.format(layer), units)])


@pytest.mark.parametrize("name", COLUMNS)
def test_heads(llama: Program, gpt2: Program, name: str) -> None:
    """Six query heads of two groups, each with eight channels; FLAP squares what attention has."""
    structures = of_role(llama, "kv_heads")
    found = get_score(name).score(llama, structures, Inputs(tokens_of()))
    groups = [list(range(24 * g, 24 * g + 24)) for g in range(2)]
    for layer, structure in enumerate(structures):
        path = f"model.layers.{layer}.self_attn.o_proj"
        close(found[structure.name], [expect(llama, name, path, groups, squared=True)])
    structures = of_role(llama, "query_heads")
    found = get_score(name).score(llama, structures, Inputs(tokens_of()))
    heads = [list(range(8 * h, 8 * h + 8)) for h in range(6)]
    for layer, structure in enumerate(structures):
        path = f"model.layers.{layer}.self_attn.o_proj"
        expected = np.reshape(expect(llama, name, path, heads, squared=True), (1, 2, 3))
        close(found[structure.name], expected)
    structures = of_role(gpt2, "kv_heads")
    found = get_score(name).score(gpt2, structures, Inputs(tokens_of()))
    heads = [list(range(6 * h, 6 * h + 6)) for h in range(4)]
    for layer, structure in enumerate(structures):
        path = f"transformer.h.{layer}.attn.c_proj"
        close(found[structure.name], [expect(gpt2, name, path, heads, squared=True)])


def test_hidden_channels(llama: Program) -> None:
    """Minitron counts each norm's output once; the others count every weight that reads it."""
    (structure,) = of_role(llama, "hidden")
    units = [[u] for u in range(structure.size)]
    first = [
        f"model.layers.{n}.{part}"
        for n in range(2)
        for part in ("self_attn.q_proj", "mlp.gate_proj")
    ]
    found = get_score("minitron").score(llama, [structure], Inputs(tokens_of()))[structure.name]
    close(found, [expect(llama, "minitron", path, units) for path in first])
    every = [
        f"model.layers.{n}.{part}"
        for n in range(2)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    ]
    for name in ("wanda-sp", "flap"):
        found = get_score(name).score(llama, [structure], Inputs(tokens_of()))[structure.name]
        close(found, [expect(llama, name, path, units) for path in every])


def patches(x: np.ndarray, kernel: int) -> np.ndarray:
    """``[positions, channels * kernel²]`` of one image, zeros around it."""
    pad = kernel // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    size = x.shape[1] - kernel + 1
    return np.array(
        [x[:, i : i + kernel, k : k + kernel].reshape(-1) for i in range(size) for k in range(size)]
    )


@pytest.mark.parametrize("name", COLUMNS)
def test_channels(convs: Program, name: str) -> None:
    """A channel is read by a 3 x 3 convolution, and by a linear layer after a flatten."""
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    module = copy.deepcopy(convs.module).double()
    seen: dict[str, list[np.ndarray]] = {"wide": [], "narrow": [], "head": []}
    for path, rows in seen.items():
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].detach()[0].numpy())
        )
    with torch.no_grad():
        for image in images:
            module(image[None].double())
    stem, wide = of_role(convs, "channels")
    found = get_score(name).score(convs, [stem, wide], Inputs(images))

    def row(path: str, kernel: int, units: list[list[int]]) -> list[float]:
        samples = [patches(x, kernel) if x.ndim == 3 else x[None] for x in seen[path]]
        weight = convs.weights[f"{path}.weight"].detach().double().numpy()
        return joined(name, COLUMNS[name](samples, weight.reshape(len(weight), -1)), units, False)

    close(found[wide.name], [row("narrow", 1, [[c] for c in range(40)])])
    nine = [list(range(9 * c, 9 * c + 9)) for c in range(16)]
    four = [list(range(4 * c, 4 * c + 4)) for c in range(16)]
    close(found[stem.name], [row("wide", 3, nine), row("head", 1, four)])


@pytest.mark.parametrize("count", [2, 40])
def test_samples_are_means_of_their_own(llama: Program, count: int) -> None:
    """Minitron's norm is over samples, however many there are: not over all tokens at once."""
    (structure, _) = of_role(llama, "ffn")
    score, given = get_score("minitron"), tokens_of(count)
    both = score.score(llama, [structure], Inputs(given))[structure.name]
    one = score.score(llama, [structure], Inputs(given[: count // 2]))[structure.name]
    other = score.score(llama, [structure], Inputs(given[count // 2 :]))[structure.name]
    np.testing.assert_allclose(both, np.hypot(one, other), rtol=1e-5)


def test_experts() -> None:
    """Every expert is judged by the tokens that chose it; one without any by the usual norm."""
    program, module = traced(mixtures.mixtral)
    structures = [s for s in program.structures if s.role == "ffn" and s.prunable]
    structure = structures[0]
    path = "model.layers.0.mlp.experts"
    ids = torch.tensor([[3, 5]])
    calls: list[Any] = []
    handle = module.get_submodule(path).register_forward_pre_hook(
        lambda _, args: calls.append([a.detach() for a in args])
    )
    with torch.no_grad():
        module(input_ids=ids)
    handle.remove()
    x, chosen = calls[0][:2]
    x = x.reshape(-1, x.shape[-1])
    gate_up = program.weights[f"{path}.gate_up_proj"].detach().double()
    down = program.weights[f"{path}.down_proj"].detach().double().numpy()
    columns: list[Any] = []
    for expert in range(len(gate_up)):
        rows = x.double()[(chosen == expert).any(1)]
        gate, up = (rows @ gate_up[expert].T).chunk(2, dim=-1)
        read = (torch.nn.functional.silu(gate) * up).numpy()
        norms = np.sqrt((read**2).mean(0)) if len(read) else None
        columns.append(norms)
    assert any(c is None for c in columns)
    usual = np.mean([c for c in columns if c is not None])
    expected = np.array(
        [
            np.abs(down[e]).mean(0) * (np.full(down.shape[2], usual) if c is None else c)
            for e, c in enumerate(columns)
        ]
    )
    with pytest.warns(UserWarning, match=r"no token .* reached \d of the 4 parts"):
        found = get_score("wanda-sp").score(program, [structure], Inputs(ids))[structure.name]
    if structure.within is None:
        expected = expected.sum(0)
    close(found, expected[None])


@pytest.mark.parametrize("name", COLUMNS)
def test_an_onnx_graph(name: str, tmp_path: Path) -> None:
    """Its weights are stored as [in, out]."""
    draw = np.random.default_rng(0)
    up, down = (draw.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 3)))
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "up"], ["h"]),
            onnx.helper.make_node("Relu", ["h"], ["r"]),
            onnx.helper.make_node("MatMul", ["r", "down"], ["y"]),
        ],
        "mlp",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 5])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(up, "up"), onnx.numpy_helper.from_array(down, "down")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "mlp.onnx")
    program = gp.load(tmp_path / "mlp.onnx")
    (structure,) = (s for s in program.structures if s.prunable and s.size == 8)
    inputs = [draw.standard_normal((4, 5)).astype(np.float32) for _ in range(3)]
    samples = [{"x": torch.from_numpy(x)} for x in inputs]
    found = get_score(name).score(program, [structure], Inputs(samples))[structure.name]
    read = [np.maximum(x.astype(np.float64) @ up, 0) for x in inputs]
    columns = COLUMNS[name](read, down.T.astype(np.float64))
    close(found, [joined(name, columns, [[u] for u in range(8)], False)])


def test_fluctuation_beside_a_large_mean() -> None:
    """In float32, mean square less squared mean would be off by more than the variance."""
    x = 1000 + torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)) * 0.01
    found = Fluctuation(4)
    for part in x:
        found.add(part)
    expected = x.double().flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(found.variances, expected, rtol=1e-2, atol=0)


def test_flap_ranks_the_layers_together(llama: Program) -> None:
    """Standard scores compare layers whose activations differ in size."""
    program = copy.copy(llama)
    program.weights = dict(llama.weights)
    grown = "model.layers.1.mlp.down_proj.weight"
    program.weights[grown] = program.weights[grown].detach() * 100
    structures = of_role(program, "ffn")
    plan = select(
        program, remove={"ffn": 0.5}, score="flap", uniform=False, calibration=tokens_of()
    )
    scores = get_score("flap").score(program, structures, Inputs(tokens_of()))
    flat = np.concatenate([scores[s.name][0] for s in structures])
    threshold = np.sort(flat)[len(flat) // 2 - 1]
    for structure in structures:
        kept = np.flatnonzero(scores[structure.name][0] > threshold)
        assert plan.kept_units[structure.name] == tuple(kept.tolist())
        assert 0.3 < len(kept) / structure.size < 0.7


def test_what_can_not_be_scored(llama: Program) -> None:
    (stack,) = of_role(llama, "layers")
    ffn = of_role(llama, "ffn")
    inner = of_role(llama, "qk_dim")[0]
    for name in COLUMNS:
        score = get_score(name)
        with pytest.raises(PlanError, match="stack of layers") as caught:
            score.score(llama, [*ffn, stack], Inputs(tokens_of()))
        assert caught.value.where == stack.name
        with pytest.raises(PlanError, match="no weight multiplies by") as caught:
            score.score(llama, [*ffn, inner], Inputs(tokens_of()))
        assert caught.value.where == inner.name
        with pytest.raises(PlanError, match=f"score {name} needs calibration"):
            score.score(llama, ffn, Inputs())
        assert score.score(llama, [], Inputs(tokens_of())) == {}


def test_weights_and_samples_stay_as_they_are(llama: Program) -> None:
    before = {n: w.detach().clone() for n, w in llama.weights.items()}
    tokens = tokens_of()
    for name in COLUMNS:
        get_score(name).score(llama, of_role(llama, "ffn"), Inputs(tokens))
    assert torch.equal(tokens, tokens_of())
    assert all(torch.equal(w, before[n]) for n, w in llama.weights.items())
