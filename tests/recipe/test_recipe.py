"""Recipes: what parses, what it means, and what each mistake is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from graphprune.errors import RecipeError
from graphprune.files.yaml import read_yaml
from graphprune.options import parse_number
from graphprune.passes.masks.allocations import OWL, Sensitivity
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.recipe.recipe import Recipe
from graphprune.solvers import NM, Unstructured

FULL = """
target: {params: 0.7}
score: {name: magnitude, norm: l1}
aggregate: mean
normalize: max
uniform: false
align: {ffn: 64, "*": 8}
exclude: ["model.layers.0.*"]
include: "model.layers.*"
minimum: 25%
calibration: {text: corpus.txt, windows: 4, length: 64}
rounds: 3
seed: 7
formats: [hf, onnx, pt2]
verify: {dtype: float64, tolerance: 1e-9}
native: require
"""


def fail(data: object) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (0.25, 0.25),
        ("1/3", 1 / 3),
        ("25%", 0.25),
        ("12.5 %", 0.125),
        ("1e-3", 0.001),
        (64, 64),
        ("64", 64),
        ("100M", 100_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5k", 500),
        ("134_515_008", 134_515_008),
    ],
)
def test_numbers(written: object, number: float) -> None:
    assert parse_number(written) == number
    assert type(parse_number(written)) is type(number)


@pytest.mark.parametrize("written", ["", "a", "1/0", "1/", "%", "5X", True, None, [1]])
def test_what_is_not_a_number(written: object) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(written)


def test_every_key_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL)
    recipe = Recipe.load(path)
    assert recipe.target == {"params": 0.7}
    assert recipe.score.model_dump() == {"name": "magnitude", "norm": "l1"}
    assert recipe.align == {"ffn": 64, "*": 8}
    assert recipe.include == ("model.layers.*",)
    assert recipe.minimum == 0.25
    assert recipe.verify.tolerance == 1e-9
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_defaults() -> None:
    recipe = Recipe.parse({"remove": {"ffn": "1/4", "*": 0}})
    assert recipe.remove == {"ffn": 0.25, "*": 0}
    assert (recipe.score.name, recipe.uniform, recipe.align) == ("auto", True, {"*": 1})
    assert (recipe.formats, recipe.native, recipe.rounds) == (("hf",), "prefer", 1)
    assert yaml.safe_load(recipe.to_yaml()) == {"remove": {"ffn": 0.25, "*": 0.0}}


def test_shorthands() -> None:
    recipe = Recipe.parse(
        {"target": {"params": 0.5}, "score": "taylor", "align": 64, "formats": "pt2"}
    )
    assert (recipe.score.name, recipe.align, recipe.formats) == ("taylor", {"*": 64}, ("pt2",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"remov": {"ffn": 0.2}}, "unknown key 'remov'; did you mean 'remove'?"),
        ({"calibration": {"window": 3}}, "'calibration.window'; did you mean 'windows'?"),
        ({"score": {"nam": "magnitude"}}, "in 'score.name': Field required"),
        ({"score": {"name": "magnitude", "nrm": "l1"}}, "no option 'nrm'; did you mean 'norm'?"),
        ({"score": "magntude"}, "unknown score 'magntude'; did you mean 'magnitude'?"),
        (
            {"score": {"name": "random", "norm": "l1"}},
            "'random' has no option 'norm'; the valid ones are seed",
        ),
        ({"formats": ["onx"]}, "unknown format 'onx'; did you mean 'onnx'?"),
        ({"formats": []}, "in 'formats'"),
        ({"align": {"fn": 64}}, "in 'align.fn': unknown role 'fn'; did you mean 'ffn'?"),
        ({"align": 0}, "in 'align.*'"),
        ({"minimum": 0}, "neither a number of units"),
        ({"aggregate": "su"}, "in 'aggregate': 'su' is not 'sum', 'mean', 'max', 'prod' or 'last'"),
        ({"calibration": {"length": 1}}, "in 'calibration.length'"),
        ({"rounds": 0}, "in 'rounds'"),
        ({"verify": {"tolerance": -1}}, "in 'verify.tolerance'"),
    ],
)
def test_mistakes_beside_the_goal(data: dict[str, object], message: str) -> None:
    text = fail({"remove": {"ffn": 0.25}, **data})
    assert message in text
    assert len(text.splitlines()) <= 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {},
            "exactly one of remove, target, shape, plan, or sparsify, or steps; this one has none",
        ),
        (
            {"remove": {"ffn": 0.1}, "target": {"params": 0.7}},
            "this one has remove and target",
        ),
        ({"remove": {"ffn": 0.1}, "plan": "p.json"}, "this one has remove and plan"),
        ({"remove": {}}, "in 'remove'"),
        ({"remove": {"fnn": 0.1}}, "in 'remove.fnn': unknown role 'fnn'; did you mean 'ffn'?"),
        ({"remove": {"zzz": 0.1}}, "the valid ones are ffn, hidden, heads"),
        ({"remove": {"ffn": 1}}, "is not a fraction to remove"),
        ({"remove": {"ffn": -0.1}}, "is not a fraction to remove"),
        ({"remove": {"ffn": "nan"}}, "is not a fraction to remove"),
        ({"remove": {"heads": 0.1, "kv_heads": 0.2}}, "name the same role"),
        ({"target": {"param": 0.7}}, "unknown budget 'param'; did you mean 'params'?"),
        ({"target": {"params": 0}}, "it must be positive"),
        ({"target": {"params": 1.5}}, "nor a whole number"),
        ({"target": {"params": 0.7, "macs": 0.5}}, "in 'target'"),
        ({"shape": {"hiden": 64}}, "did you mean 'hidden'?"),
        ({"shape": {"hidden": 0}}, "in 'shape.hidden'"),
        ({"shape": {"hidden": 0.5}}, "in 'shape.hidden'"),
        (None, "it is empty"),
        ([1], "it is list"),
    ],
)
def test_mistakes_in_the_goal(data: object, message: str) -> None:
    assert message in fail(data)


def test_several_mistakes_are_told_at_once() -> None:
    text = fail({"remove": {"ffn": 0.25}, "sed": 1, "rounds": 0})
    assert "did you mean 'seed'" in text
    assert "in 'rounds'" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("remove: {ffn: 0.25", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "a key is given twice"),
        ("[1]: 2\n", "not valid YAML"),
        ("remove: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_files_that_are_not_yaml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_yaml(path)
    assert caught.value.where == str(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="can't be read"):
        read_yaml(tmp_path / "binary.yaml")


def test_flags_alone() -> None:
    recipe = Recipe.from_flags(None, {"remove": ["ffn=1/4,heads=0.5", "layers=2%"], "seed": 3})
    assert recipe.remove == {"ffn": 0.25, "heads": 0.5, "layers": 0.02}
    assert recipe.seed == 3


def test_a_flag_wins_over_the_file_and_a_goal_replaces_the_goal(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{remove: {ffn: 0.25}, seed: 1, rounds: 2, calibration: {windows: 3}}")
    flags = {"target": ["params=100M"], "seed": 5, "exclude": [], "text": "a.txt"}
    recipe = Recipe.from_flags(path, flags)
    assert (recipe.remove, recipe.target) == (None, {"params": 100_000_000})
    assert (recipe.seed, recipe.rounds, recipe.exclude) == (5, 2, ())
    assert (recipe.calibration.text, recipe.calibration.windows) == (("a.txt",), 3)


def test_mistakes_in_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content in ("", "[1]", "remov: {ffn: 0.1}"):
        path.write_text(content)
        with pytest.raises(RecipeError) as caught:
            Recipe.from_flags(path, {"seed": 1})
        assert caught.value.where == str(path)


@pytest.mark.parametrize("word", ["ffn", "=0.5", "ffn=", "", "ffn=0.1,ffn=0.2"])
def test_flags_that_are_not_pairs(word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_flags(None, {"remove": [word]})
    assert caught.value.where == "--remove"


def test_masks_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
remove: {ffn: 0.25}
sparsify:
  method: sparsegpt
  sparsity: 50%
  damping: 1e-2
  bits: 4
  budget: {name: owl, spread: 0.1, per: weight}
  exclude: "*.0.*"
  keep_zeros: true
  held: bfloat16
"""
    )
    recipe = Recipe.load(path)
    section = recipe.sparsify
    assert section is not None
    assert section.solver() == SparseGPT(damping=0.01, bits=4)
    assert section.wanted() == Unstructured(0.5)
    assert section.budget.built() == OWL(spread=0.1, per="weight")
    assert (section.exclude, section.include, section.held) == (("*.0.*",), None, "bfloat16")
    assert (section.bits, section.keep_zeros, recipe.removes) == (4, True, True)
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_masks_by_their_names() -> None:
    def section(data: object) -> Any:
        return Recipe.parse({"sparsify": data}).sparsify

    assert section({"method": "ria", "pattern": " 2 : 4 "}).wanted() == NM(2, 4)
    assert section({"method": "ria", "pattern": "2:4"}).solver() == RIA()
    swapped = section({"method": "dsnot", "sparsity": 0.5, "first": "alps", "cycles": 3})
    assert swapped.solver() == DSnoT(first=ALPS(), cycles=3)
    first = {"method": "wanda", "group": "layer"}
    swapped = section({"method": "dsnot", "sparsity": 0.5, "first": first})
    assert swapped.solver() == DSnoT(first=Wanda(group="layer"))
    budget = {"name": "sensitivity", "levels": 3, "solver": "ria"}
    dealt = section({"method": "wanda", "sparsity": 0.5, "budget": budget})
    assert dealt.budget.built() == Sensitivity(levels=3, solver=RIA())
    assert not section({"method": "magnitude", "sparsity": 0.5, "budget": "global"}).needs_data
    assert section({"method": "magnitude", "sparsity": 0.5, "budget": "owl"}).needs_data


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("wanda", "give one of sparsity (50%) and pattern ('2:4'); this has neither"),
        ({"method": "wanda", "sparsity": 0.5, "pattern": "2:4"}, "this has both"),
        ({"sparsity": 0.5}, "in 'sparsify.method': Field required"),
        ({"method": "wand", "sparsity": 0.5}, "unknown method 'wand'; did you mean 'wanda'?"),
        ({"method": "wanda", "sparsty": 0.5}, "no option 'sparsty'; did you mean 'sparsity'?"),
        (
            {"method": "sparsegpt", "sparsity": 0.5, "dampng": 0.1},
            "method 'sparsegpt' has no option 'dampng'; did you mean 'damping'?",
        ),
        ({"method": "wanda", "sparsity": 0.5, "bits": 4}, "only sparsegpt quantises"),
        (
            {"method": "sparsegpt", "sparsity": 0.5, "bits": "four"},
            "option 'bits' of method 'sparsegpt': input should be a valid integer",
        ),
        ({"method": "sparsegpt", "sparsity": 0.5, "damping": 2}, "a damping from 0 to 1"),
        ({"method": "wanda", "sparsity": 0.5, "group": "column"}, "should be 'layer' or 'row'"),
        ({"method": "wanda", "sparsity": 1}, "is not a fraction to remove"),
        ({"method": "wanda", "pattern": 124}, 'put it in quotes, "2:4"'),
        ({"method": "wanda", "pattern": "4:2"}, "keeps n of every m weights, with 1 <= n < m"),
        ({"method": "wanda", "pattern": "0:4"}, "keeps n of every m weights, with 1 <= n < m"),
        ({"method": "wanda", "pattern": "2/4"}, "n:m for n weights kept of every m"),
        ({"method": "ria", "pattern": "2:4", "budget": "owl"}, "a pattern fixes that of each"),
        ({"method": "ria", "sparsity": 0.5, "budget": "owls"}, "did you mean 'owl'?"),
        (
            {"method": "ria", "sparsity": 0.5, "budget": {"name": "owl", "spred": 0.1}},
            "budget 'owl' has no option 'spred'; did you mean 'spread'?",
        ),
        (
            {"method": "ria", "sparsity": 0.5, "budget": {"name": "uniform", "spread": 0.1}},
            "budget 'uniform' has no options",
        ),
        ({"method": "ria", "sparsity": 0.5, "budget": {"name": "owl", "spread": 2}}, "a spread"),
        ({"method": "dsnot", "sparsity": 0.5, "first": "wnda"}, "did you mean 'wanda'?"),
        ({"method": "dsnot", "sparsity": 0.5, "first": {"cycles": 3}}, "{method: name, ...}"),
        (
            {"method": "dsnot", "sparsity": 0.5, "first": {"method": "sparsegpt", "bits": 4}},
            "'bits' would have no effect",
        ),
    ],
)
def test_mistakes_in_the_masks(section: object, message: str) -> None:
    assert message in fail({"sparsify": section})


def test_yaml_takes_a_pattern_without_quotes_for_a_number() -> None:
    assert "put it in quotes" in fail(yaml.safe_load("sparsify: {method: ria, pattern: 2:4}"))


def test_globs_of_structures_need_structures() -> None:
    masks = {"method": "ria", "sparsity": 0.5}
    text = fail({"sparsify": masks, "exclude": "*.0.*"})
    assert "'exclude' is about structures, and this recipe removes none" in text
    assert Recipe.parse({"sparsify": masks, "exclude": "*.0.*", "remove": {"ffn": 0.5}}).exclude


def test_flags_for_masks(tmp_path: Path) -> None:
    def flags(path: Path | None = None, **given: object) -> Any:
        options = {key: given.pop(key) for key in [*given] if key in ("remove", "exclude")}
        return Recipe.from_flags(path, {"sparsify": given, **options})

    alone = flags(method="ria", sparsity="50%", bits=None, exclude=["*.0.*"])
    assert alone.sparsify.model_dump(exclude_unset=True) == {
        "method": "ria",
        "sparsity": 0.5,
        "exclude": ("*.0.*",),
    }
    both = flags(method="ria", sparsity="50%", exclude=["*.0.*"], remove=["ffn=0.5"])
    assert (both.exclude, both.sparsify.exclude) == (("*.0.*",), ())
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsify: {method: sparsegpt, sparsity: 50%, damping: 0.1, keep_zeros: true}")
    changed = flags(path, pattern="1:4").sparsify
    assert (changed.sparsity, changed.pattern, changed.solver()) == (
        None,
        "1:4",
        SparseGPT(damping=0.1),
    )
    other = flags(path, method="wanda", budget="owl").sparsify
    assert (other.solver(), other.keep_zeros, other.budget.name) == (Wanda(), True, "owl")
    assert flags(path).sparsify.solver() == SparseGPT(damping=0.1)
    with pytest.raises(RecipeError, match="no method is given"):
        flags(sparsity="50%", remove=["ffn=0.5"])
