"""What a recipe gives has to be read by something; told without a model, or with what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import EmitError, GraphPruneError, LoadError, RecipeError
from graphprune.pipeline.compiler import compile
from graphprune.preflight.readers import calibrates, check_read
from graphprune.recipe.recipe import Recipe

FFN = {"remove": {"ffn": 0.5}}
MASKS = {"sparsify": {"method": "magnitude", "sparsity": 0.5}}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (FFN, True),
        ({**FFN, "score": "magnitude"}, False),
        ({**FFN, "score": "magnitude", "repair": "reconstruct"}, True),
        ({**FFN, "score": "taylor"}, True),
        ({"plan": "plan.json"}, False),
        ({"plan": "plan.json", "repair": "reconstruct"}, True),
        (MASKS, False),
        ({"sparsify": {"method": "wanda", "sparsity": 0.5}}, True),
        ({**FFN, **MASKS, "score": "random"}, False),
    ],
)
def test_what_calibrates(recipe: dict[str, Any], expected: bool) -> None:
    assert calibrates(Recipe.parse(recipe)) is expected


@pytest.mark.parametrize(
    ("recipe", "section", "causal", "entry"),
    [
        # A perplexity is measured on text, whatever the score, but of language models only.
        ({**FFN, "score": "magnitude"}, {"text": "a.txt"}, True, None),
        ({**FFN, "score": "magnitude"}, {"text": "a.txt"}, None, None),
        ({**FFN, "score": "magnitude"}, {"text": "a.txt"}, False, "text"),
        ({**FFN, "score": "magnitude"}, {"text": "a.jsonl", "field": "body"}, True, None),
        ({**FFN, "score": "magnitude"}, {"data": "a.txt"}, True, "data"),
        ({**FFN, "score": "magnitude"}, {"data": "none.npz"}, False, "data"),
        ({**FFN, "score": "magnitude"}, {"windows": 4, "length": 32}, True, None),
        ({**FFN, "score": "magnitude"}, {"windows": 4}, False, "windows"),
        ({**FFN, "score": "magnitude"}, {"tokenizer": "here"}, False, "tokenizer"),
        ({**FFN, "score": "magnitude"}, {"size": 64}, None, "size"),
        ({"plan": "plan.json"}, {"data": "a.txt"}, True, "data"),
        (MASKS, {"data": "a.txt"}, True, "data"),
        (FFN, {"data": "a.npz", "text": "b.txt"}, False, "text"),
        (FFN, {"data": "a.npz", "text": "b.txt"}, True, None),
        (FFN, {"text": "b.txt"}, False, "text"),
        (FFN, {"data": "photos", "size": 64, "windows": 8}, False, None),
    ],
)
def test_what_nothing_reads_is_an_error(
    recipe: dict[str, Any], section: dict[str, Any], causal: bool | None, entry: str | None
) -> None:
    settled = Recipe.parse({**recipe, "calibration": section})
    if entry is None:
        check_read(settled, causal)
        return
    with pytest.raises(RecipeError) as caught:
        check_read(settled, causal)
    assert caught.value.what == f"nothing reads calibration.{entry}"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("leave it out")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**MASKS, "repair": "bias"}, "'repair' is about structures"),
        ({**MASKS, "score": "taylor"}, "'score' is about structures"),
        ({**MASKS, "align": 64}, "'align' is about structures"),
        ({**MASKS, "rounds": 2}, "'rounds' is about structures"),
        ({"plan": "p.json", "score": "taylor"}, "'score' says which units go"),
        ({"plan": "p.json", "uniform": False}, "'uniform' says which units go"),
        ({"plan": "p.json", "exclude": ["a.*"]}, "'exclude' says which units go"),
        ({"shape": {"ffn": 8}, "align": 8}, "'align' says nothing to a shape"),
        ({"shape": {"ffn": 8}, "uniform": False}, "'uniform' says nothing to a shape"),
        ({**FFN, "score": "obs", "rounds": 2}, "obs chooses in one round"),
    ],
)
def test_entries_that_mean_nothing_beside_others(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(recipe)


def test_what_is_as_by_default_may_be_written_out() -> None:
    written = {"score": "auto", "uniform": True, "align": 1, "minimum": 1, "repair": "none"}
    Recipe.parse({"plan": "p.json", **written})
    Recipe.parse({**MASKS, **written, "include": [], "rounds": 1})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 24)
        self.down = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"calibration": {"text": "TEXT"}}, RecipeError, "calibration.text"),
        ({"calibration": {"windows": 8}}, RecipeError, "calibration.windows"),
        ({"native": "require", "formats": ["pt2"]}, RecipeError, "native form"),
        ({"calibration": {"data": "nosuch.npy"}}, LoadError, "does not exist"),
    ],
)
def test_of_a_module_it_is_told_before_work(
    tmp_path: Path,
    recipe: dict[str, Any],
    error: type[GraphPruneError],
    message: str,
) -> None:
    (tmp_path / "text.txt").write_text("a text that no model here reads")
    section = {k: v.replace("TEXT", str(tmp_path / "text.txt")) if isinstance(v, str) else v
               for k, v in recipe.get("calibration", {}).items()}  # fmt: skip
    stages: list[str] = []
    with pytest.raises(error, match=message):
        compile(
            Net().eval(),
            {"remove": {"*": 0.5}, **recipe, "calibration": section},
            tmp_path / "slim",
            example=(torch.zeros(2, 6),),
            progress=stages.append,
        )
    assert set(stages) <= {"loading and tracing", "checking weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_example_inputs_go_with_a_module(tmp_path: Path) -> None:
    example = (torch.zeros(2, 6),)
    program = graphprune.trace(Net().eval(), example)
    with pytest.raises(LoadError, match="leave example out"):
        compile(program, {"remove": {"*": 0.5}}, dry_run=True, example=example)
    np.save(tmp_path / "x.npy", np.zeros((2, 6), np.float32))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(LoadError, match="example inputs go with a module"):
        compile(tmp_path / "model.onnx", {"remove": {"*": 0.5}}, dry_run=True, example=example)
    with pytest.raises(EmitError, match="there is no output"):
        compile(program, {"remove": {"*": 0.5}})
