"""Names of devices, what is refused before work starts, and what an estimate says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.errors import RecipeError
from graphprune.pipeline.before.estimate import Estimate
from graphprune.placement import CPU, Placement, find_device, present
from graphprune.placement.graphs import moved_graphs
from graphprune.recipe.recipe import Recipe
from graphprune.solvers.precision import exact_everywhere
from graphprune.streaming import find_sites
from graphprune.streaming.budget import working_bytes
from streaming.oracle import traced
from zoo import decoders


def nobody(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)


def test_the_processor_where_there_is_nothing_else(monkeypatch):
    nobody(monkeypatch)
    assert find_device("auto") == CPU
    assert find_device("cpu") == CPU
    assert not Placement.of("auto", memory=10).away  # of a device that isn't there


def test_names(monkeypatch):
    two_gpus(monkeypatch)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    names = ("auto", "cuda", "cuda:1")
    assert [str(find_device(name)) for name in names] == ["cuda:0", "cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(find_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cuda", "finds no cuda device"),
        ("cuda:1", "finds no cuda device"),
        ("mps", "no float64"),
        ("meta", "can't compute on meta"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, name, why):
    nobody(monkeypatch)
    with pytest.raises(RecipeError, match=f"there is no device {name}") as refused:
        Placement.of(name)
    assert why in str(refused.value.why)
    assert refused.value.hint == "leave device out, or write cpu"


def test_a_number_too_high_is_refused(monkeypatch):
    two_gpus(monkeypatch)
    with pytest.raises(RecipeError, match="cuda:2") as refused:
        find_device("cuda:2")
    assert refused.value.why == "there are 2 of that kind, counted from 0"


def test_a_limit_needs_a_device():
    with pytest.raises(RecipeError, match="memory limits what is taken of a device"):
        Placement.of("cpu", memory=10)


def test_recipes():
    recipe = Recipe.parse({"remove": {"ffn": 0.5}, "device": "cuda:1", "memory": "20G"})
    assert (recipe.device, recipe.memory) == ("cuda:1", 20 * 10**9)
    flags = {"device": "cpu", "memory": "1.5G", "remove": ["ffn=0.5"]}
    assert Recipe.from_flags(None, flags).memory == 15 * 10**8
    with pytest.raises(RecipeError, match="write auto, cpu, cuda or cuda:1"):
        Recipe.parse({"remove": {"ffn": 0.5}, "device": "GPU 1"})


def test_a_compilation_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    nobody(monkeypatch)
    told = []
    program, _ = traced(decoders.llama_gqa_4)
    with pytest.raises(RecipeError, match="there is no device cuda"):
        gp.compile(
            program, {"remove": {"ffn": 0.5}}, tmp_path / "slim.pt2", device="cuda",
            progress=told.append,
        )  # fmt: skip
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_on_device_ends_with_its_block():
    with gp.on_device("cpu") as inside:
        assert present() is inside
    assert present() == Placement()


def test_tf32_is_off_inside_and_as_before_behind():
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32"
        with exact_everywhere():
            assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
        assert [kind.fp32_precision for kind in kinds] == ["tf32", "tf32"]
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def test_graphs_inside_operators_make_their_tensors_elsewhere():
    class Made(torch.nn.Module):
        def forward(self, x):
            return x + torch.arange(3) + torch.zeros(3, device="cpu")

    graph = torch.export.export(Made(), (torch.ones(3),)).module()
    moved = moved_graphs(graph, torch.device("meta"))
    assert moved(torch.ones(3, device="meta")).device.type == "meta"
    assert torch.equal(graph(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))


def test_the_estimate_counts_passes_and_memory_by_device():
    program, _ = traced(decoders.llama_gqa_4)
    recipe = Recipe.parse({
        "sparsify": {"method": "sparsegpt", "sparsity": 0.5, "budget": "owl"},
        "calibration": {"windows": 4, "length": 16},
    })  # fmt: skip
    found = Estimate.of(recipe, program, Placement())
    assert found is not None
    assert (found.passes, found.samples, found.tokens) == (2, 8, 8 * 16)
    waiting = 2 * 4 * 4 * 16 * 32  # two values of 32 channels for each token, in float32
    working = working_bytes(program, find_sites(program))
    assert found.memory == waiting + working
    away = Estimate.of(recipe, program, Placement(torch.device("cuda", 0), memory=working))
    assert away is not None
    assert away.devices == {"cuda:0": working}
    assert away.memory == waiting  # nothing is left for it on the device
    assert "2 times (128 tokens in all)" in str(away)
    assert "MB of cuda:0" in str(away)
    assert Estimate.of(Recipe.parse({"remove": {"ffn": 0.5}, "score": "magnitude"}), program,
                       Placement()) is None  # fmt: skip


def test_a_dry_run_has_the_estimate_too():
    program, _ = traced(decoders.llama_gqa_4)
    recipe = {"sparsify": {"method": "wanda", "sparsity": 0.5},
              "calibration": {"windows": 4, "length": 16}}  # fmt: skip
    report = gp.compile(program, recipe, dry_run=True)
    assert report.forecast is not None
    assert report.forecast.estimate is not None
    assert "goes through the model once (64 tokens in all)" in report.forecast.estimate


@pytest.mark.parametrize(
    ("training", "windows"),
    # The teacher once, and a gradient as much as three passes.
    [({}, 4 * 4), ({"epochs": 2}, 2 * 4 * 4), ({"tokens": 32}, 2 * 4),
     ({"steps": 3, "batch": 2}, 6 * 4), ({"loss": "ce", "epochs": 0.5}, 2 * 3)],
)  # fmt: skip
def test_a_training_takes_what_it_asks_for(training: dict[str, Any], windows: int):
    program, _ = traced(decoders.llama_gqa_4)
    recipe = Recipe.parse({
        "remove": {"ffn": 0.5}, "score": "magnitude", "recover": training,
        "calibration": {"windows": 4, "length": 16},
    })  # fmt: skip
    found = Estimate.of(recipe, program, Placement())
    assert found is not None
    assert (found.samples, found.tokens) == (windows, windows * 16)
    assert found.memory >= 16 * sum(p.numel() for p in program.module.parameters())
