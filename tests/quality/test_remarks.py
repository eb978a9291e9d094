"""What a report says of its numbers, after the work and before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.frontends import load_traced
from graphprune.measure.remarks import quality_remarks
from graphprune.quality.perplexity import Perplexity
from graphprune.quality.result import Comparison, Estimate, Quality
from quality.helpers import save_model


def said(*, trained: bool = False, **perplexities: tuple[float, float]) -> tuple[str, ...]:
    """The remarks on texts with these perplexities, dense and slim."""
    dense, slim = (
        {text: Perplexity(pair[i], 8, 2, 96, (0.0, 0.0)) for text, pair in perplexities.items()}
        for i in range(2)
    )
    texts = {
        text: Comparison(2, 8, 14, Estimate(after / before))
        for text, (before, after) in perplexities.items()
    }
    return quality_remarks(dense, slim, Quality(texts), trained=trained)


def test_a_perplexity_far_above_the_dense_one_is_said() -> None:
    assert said(a=(20, 29), b=(30, 44)) == ()
    (note,) = said(a=(20, 31), b=(30, 44))
    assert note == (
        "the perplexity on a rose from 20 to 31, 1.55 times the dense model's: remove less, or "
        "train the slim model before it is used"
    )
    (note,) = said(trained=True, a=(20, 31))
    assert note.endswith("or train the slim model for longer before it is used")


def test_texts_that_fare_differently_are_named() -> None:
    assert said(a=(20, 22), b=(20, 29)) == ()
    first, second = said(wiki=(20, 22), code=(20, 60), more=(20, 30))
    assert first.startswith("the perplexity on code rose from 20 to 60, 3 times")
    assert second.startswith(
        "what was removed costs much more on code (3 times the dense perplexity) than on wiki "
        "(1.1 times)"
    )
    assert "{self: 0.5, FILE: 0.5}" in second


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nearly all of it is vocabulary, as with small models of many languages."""
    path = tmp_path_factory.mktemp("model") / "heavy"
    return save_model(path, vocab_size=600, num_hidden_layers=1, tie_word_embeddings=True)


def counts(path: Path) -> tuple[int, int, int]:
    """Parameters of all, of the vocabulary, and of one channel of the ffn."""
    model = LlamaForCausalLM.from_pretrained(path)
    total = sum(p.numel() for p in model.parameters())
    return total, model.model.embed_tokens.weight.numel(), 3 * model.config.hidden_size


def test_a_deep_cut_is_said_before_and_after(
    heavy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_traced(str(heavy))
    total, vocabulary, channel = counts(heavy)
    budget = total - 40 * channel  # of 48 channels
    recipe = {"target": {"params": budget}, "score": "magnitude", "include": ["*mlp*"]}
    told: list[str] = []
    report = gp.compile(program, recipe, dry_run=True, progress=told.append)
    kept, size = report.kept["ffn"]
    (note,) = [note for note in report.notes if "takes" in note]
    assert note.startswith(
        f"params={budget} takes {100 * (1 - kept / size):.0f} % of ffn, since "
        f"model.embed_tokens.weight, {100 * vocabulary / total:.0f} % of the parameters, stays "
        "whole: params=0."
    )
    milder = float(note.split("whole: params=")[1].split(" ")[0])
    assert told.index(note) < told.index("selecting")
    # What it names instead takes half.
    again = gp.compile(program, recipe | {"target": {"params": milder}}, dry_run=True)
    kept, size = again.kept["ffn"]
    assert 0.35 * size < size - kept <= 0.5 * size
    assert not any("takes" in one for one in again.notes)
    with pytest.raises(SystemExit):
        cli.main(["compile", str(heavy), "--target", f"params={budget}", "--score", "magnitude",
                  "--include", "*mlp*", "--dry-run"])  # fmt: skip
    captured = capsys.readouterr()
    assert f"note: {note}\n" in captured.err
    assert f"note: params={budget} takes" in captured.out


def test_only_budgets_are_told_what_they_take(heavy: Path) -> None:
    told: list[str] = []
    recipe = {"remove": {"ffn": 0.9}, "score": "magnitude"}
    report = gp.compile(heavy, recipe, dry_run=True, progress=told.append)
    assert not any("takes" in one for one in (*report.notes, *told))


def test_budgets_of_other_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = torch.nn.Sequential(
        torch.nn.Conv2d(3, 400, 3), torch.nn.ReLU(), torch.nn.Conv2d(400, 4, 3)
    ).eval()
    recipe = {"target": {"macs": 0.3}}
    report = gp.compile(vision, recipe, dry_run=True, formats=["pt2"],
                        example=(torch.zeros(1, 3, 8, 8),))  # fmt: skip
    kept, size = report.kept["channels"]
    assert report.notes[0].startswith(f"macs=0.3 takes {100 * (1 - kept / size):.0f} % of channels")
