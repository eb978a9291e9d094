"""Recipes from files: what can't be read, and what would take too much to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune.errors import RecipeError
from graphprune.options import parse_number
from graphprune.recipe.recipe import Recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40)
)


def load(path: Path, text: str | bytes) -> Recipe:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with all aliases it has more than 100,000 values"),
        ("a: &a [*a]", "a value contains itself"),
        ("a: &a {b: *a}", "a value contains itself"),
        ("[" * 1_000, "nested too deeply"),
        ("- " * 10_000, "nested too deeply"),
        ("a: 2020-13-45", "'2020-13-45' can't be read as timestamp"),
        ("a: 0x_", "'0x_' can't be read as int"),
        (f"a: {'1' * 5000}", "can't be read as int"),
        ("a: !!bool x", "'x' can't be read as bool"),
        ("a: !!timestamp x", "'x' can't be read as timestamp"),
        ("a: !!float ''", "'' can't be read as float"),
        ('a: "\\UFFFFFFFF"', "an escape in it stands for no character"),
        ('remove: {"\\ud800": 0.5}', "half a character"),
        ("remove: {ffn: 0.5}\nremove: {ffn: 0.25}", "a key is given twice"),
        ("remove: {ffn: 0.5, ffn: 0.25}", "a key is given twice"),
        (b"remove: \xff", "can't be read"),
        ("#" * (1 << 20) + "\n", "more than 1,048,576 bytes"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path / "a.yaml", text)
    assert "a.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_and_merged_keys(tmp_path: Path) -> None:
    text = "remove: {ffn: &share 0.25, heads: *share}\nverify: {<<: {dtype: auto}, dtype: float64}"
    recipe = load(tmp_path / "a.yaml", text)
    assert recipe.remove == {"ffn": 0.25, "heads": 0.25}
    assert recipe.verify.dtype == "float64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"seed: {10**30}", "less than 9223372036854775808"),
        ("rounds: 1000000000", "1000"),
        ("minimum: .inf", "neither a number of units"),
        ("minimum: .nan", "in 'minimum'"),
        (f"calibration: {{windows: {10**30}}}", "calibration.windows"),
        ("calibration: {size: 1e9}", "calibration.size"),
    ],
)
def test_numbers_that_nothing_can_be_done_with(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "a.yaml", f"remove: {{ffn: 0.5}}\n{text}")


@pytest.mark.parametrize("written", ["1e999999999%", "1e-999999999", "1e400%", "9" * 5000])
def test_numbers_that_would_be_written_out(written: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(written)


def test_a_million_mistakes_are_told_in_a_few_words() -> None:
    with pytest.raises(RecipeError, match="and 19990 more") as caught:
        Recipe.parse({f"key{i}": i for i in range(20_000)})
    assert len(str(caught.value)) < 6000
