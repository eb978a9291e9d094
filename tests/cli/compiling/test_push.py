"""`--push-to` against a stand-in for the hub, and the card that goes with it."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from cli.helpers import check_failure
from cli.hub import TOKEN, Hub

FLAGS = ("--remove", "ffn=0.25", "--score", "magnitude")
CARD = """---
license: other
license_name: small-licence
license_link: LICENSE
language: [en]
datasets: [someone/letters]
pipeline_tag: text-generation
tags: [letters, tiny]
base_model: someone/older
---
# Small
"""


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def carded(dense, tmp_path):
    source = tmp_path / "in" / "carded"
    shutil.copytree(dense, source)
    (source / "README.md").write_text(CARD)
    return source


def test_a_checkpoint_has_a_card(run, carded, text, tmp_path):
    out = tmp_path / "slim"
    result = run("compile", carded, "-o", out, *FLAGS, "--text", text)
    assert result.code == 0, result.err
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/older"
    assert (data["license"], data["license_name"]) == ("other", "small-licence")
    assert data["language"] == ["en"]
    assert data["datasets"] == ["someone/letters"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["letters", "tiny", "graphprune", "pruned"]
    assert data["library_name"] == "transformers"
    body = card.text
    report = json.loads((out / "report.json").read_text())
    for name, one in report["before"]["perplexities"].items():
        after = report["after"]["perplexities"][name]
        shown = name.rpartition("/")[2]
        assert f"| {shown} | {one['value']:.2f} | {after['value']:.2f} |" in body
    assert 'LlamaForCausalLM.from_pretrained("REPOSITORY")' in body
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["remove"] == {"ffn": 0.25}
    assert recipe["calibration"]["text"] == ["text.txt"]
    assert str(tmp_path) not in body
    assert str(text.parent) not in body


def test_a_card_without_one_before_it(run, dense, tmp_path):
    out = tmp_path / "slim"
    assert run("compile", dense, "-o", out, *FLAGS).code == 0
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["graphprune", "pruned"]}


def test_what_was_written_is_pushed_as_one_commit(run, hub, dense, tmp_path):
    out = tmp_path / "slim"
    result = run("compile", dense, "-o", out, *FLAGS, "--push-to", "team/slim")
    assert result.code == 0, result.err
    assert f"pushed to {hub.url}/team/slim" in " ".join(result.err.split())
    pushed = hub.files["team/slim"]
    local = {path.name for path in out.iterdir()}
    assert set(pushed) == local - {"report.json", "report.html", "recipe.yaml"}
    for name, content in pushed.items():
        assert content == (out / name).read_bytes()
    assert sum("/commit/" in one for one in hub.asked) == 1


def refused(run, dense, tmp_path, repository, *flags):
    out = tmp_path / "out" / "slim"
    flags = flags or ("-o", out, *FLAGS)
    result = run("compile", dense, *flags, "--push-to", repository)
    assert not (tmp_path / "out").exists()
    assert "loading and tracing" not in result.err
    return result


@pytest.mark.parametrize(
    ("repository", "message"),
    [("a/b/c", "no name of a repository"), ("someone/..", "no name"), ("other/slim", "to other")],
)
def test_a_wrong_name_is_refused_before_the_work(run, hub, dense, tmp_path, repository, message):
    check_failure(refused(run, dense, tmp_path, repository), message)
    assert hub.files == {}


def test_a_wrong_token_is_refused_before_the_work(run, hub, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    check_failure(
        refused(run, dense, tmp_path, "someone/slim"), "the hub refused", "Invalid user token"
    )


def test_without_a_token_it_is_refused_before_the_work(run, hub, dense, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    check_failure(refused(run, dense, tmp_path, "someone/slim"), "nobody is logged in")
    assert hub.asked == []


def test_offline_it_is_refused_before_the_work(run, hub, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_failure(refused(run, dense, tmp_path, "someone/slim"), "nothing can be pushed offline")


def test_only_checkpoints_are_pushed(run, hub, dense, tmp_path):
    file = ("-o", tmp_path / "out" / "slim.pt2", *FLAGS)
    check_failure(refused(run, dense, tmp_path, "someone/slim", *file), "only a Hugging Face")
    assert hub.asked == []


def test_a_run_that_fails_pushes_nothing(run, hub, dense, tmp_path):
    out = tmp_path / "slim"
    flags = ("--fail-if", "parameters>10", "--push-to", "someone/slim")
    assert run("compile", dense, "-o", out, *FLAGS, *flags).code == 3
    assert hub.files == {}
    assert not out.exists()
