"""What model cards say of where a model comes from, and what they leave out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from graphprune.provenance.card import base_model, carried, model_card, recipe_of

SNAPSHOT = Path("/cache/hub/models--team--small-1/snapshots/0123456789abcdef")


@pytest.mark.parametrize(
    ("given", "directory", "found"),
    [
        ("team/small-1", None, "team/small-1"),
        ("team/small-1", SNAPSHOT, "team/small-1"),
        (str(SNAPSHOT), SNAPSHOT, "team/small-1"),
        ("/models/small", Path("/models/small"), None),
        ("small", Path("small"), None),
        ("a/b/c", None, None),
    ],
)
def test_the_base_model_is_a_hub_id(given, directory, found):
    assert base_model(given, directory) == found


def test_a_folder_of_that_form_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "team" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model("team/small", None) is None


@pytest.mark.parametrize("text", ["", "# no head\n", "---\n- a\n---\n", "---\n{: x\n---\n"])
def test_a_card_that_says_nothing_carries_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert carried(tmp_path) == {}


def test_a_recipe_for_others_has_no_folders():
    text = (
        "# graphprune compile /home/me/model RECIPE -o OTHER\n"
        "remove: {'model.layers.[0-3].*/ffn': 0.25}\n"
        "calibration: {data: {builtin: {source: builtin}, "
        "/home/me/a.txt: {source: /home/me/a.txt}}, text: [/home/me/b.txt, help]}\n"
    )
    found = yaml.safe_load(recipe_of(text))
    assert found["remove"] == {"model.layers.[0-3].*/ffn": 0.25}
    assert found["calibration"] == {
        "data": {"builtin": {"source": "builtin"}, "a.txt": {"source": "a.txt"}},
        "text": ["b.txt", "help"],
    }


def test_a_self_contained_checkpoint_says_how_it_loads(tmp_path):
    side = {"parameters": 100, "macs": None, "perplexities": {}}
    report = {
        "source": "team/small",
        "before": side,
        "after": side | {"parameters": 75},
        "notes": ["see /home/me/notes.txt | and https://example.org/a/b"],
        "recipe": "remove: {ffn: 0.25}\n",
        "max_abs_error": 1e-12,
        "verified_in": "float64",
    }
    own = {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}
    text = model_card(report, {"auto_map": own}, None)
    assert 'AutoModelForCausalLM.from_pretrained("REPOSITORY", trust_remote_code=True)' in text
    assert "25.0 % fewer parameters" in text
    assert "[team/small](https://huggingface.co/team/small)" in text
    assert "* see notes.txt | and https://example.org/a/b" in text
    assert "within 1.0e-12 (float64)" in text
    assert ModelCard(text).data.base_model == "team/small"
