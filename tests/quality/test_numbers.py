"""Every number of a report, and of `graphprune eval`, against one counted from plain logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console, RenderableType
from transformers import AutoTokenizer

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.measure import measuring
from graphprune.measure.compare import measure_sources
from graphprune.quality import perplexity as evaluate
from graphprune.quality.compare import compare
from graphprune.quality.intervals import mean_estimate, ratio_estimate, student
from graphprune.quality.perplexity import NoPerplexityError
from quality.helpers import T, by_hand, expected, greedily, save_model, save_text

COUNT, LENGTH = 8, 24


class Case(NamedTuple):
    dense: Path
    slim: Path
    texts: tuple[str, str]
    ids: tuple[np.ndarray, np.ndarray]
    report: gp.Report


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    dense = save_model(folder / "dense")
    texts = (str(folder / "a.txt"), str(folder / "b.txt"))
    first, second = (save_text(Path(path), 900, seed) for seed, path in enumerate(texts))
    recipe = {
        "remove": {"ffn": 0.5},
        "score": "magnitude",
        "calibration": {"text": list(texts), "windows": COUNT, "length": LENGTH, "draw": "first"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "TOKENS", 24)
        report = gp.compile(dense, recipe, folder / "slim")
    return Case(dense, folder / "slim", texts, (first, second), report)


def check(data: dict[str, Any], case: Case, count: int, length: int) -> None:
    """Compare the sides and the texts of JSON with what is counted here."""
    for text, ids in zip(case.texts, case.ids, strict=True):
        found = data["quality"]["texts"][text]
        wanted = expected(case.dense, case.slim, by_hand(ids, count, length))
        sizes = (found["windows"], found["length"], found["tokens"])
        assert sizes == (count, length, count * (length - 1))
        for side, losses, value in zip(
            (data["before"], data["after"]), wanted["losses"], wanted["perplexities"], strict=True
        ):
            taken = side["perplexities"][text]
            assert taken["losses"] == pytest.approx(losses.tolist(), rel=1e-5)
            assert taken["value"] == pytest.approx(value, rel=1e-5)
            assert (taken["windows"], taken["length"]) == (count, length)
        for name in ("ratio", "agreement", "kl"):
            values = (found[name]["value"], found[name]["low"], found[name]["high"])
            assert values == pytest.approx(wanted[name], rel=2e-4, abs=1e-6), (text, name)


def test_the_report_of_a_compilation(case: Case) -> None:
    data = json.loads((case.slim / "report.json").read_text())
    assert list(data["quality"]["texts"]) == list(case.texts)
    check(data, case, COUNT, LENGTH)
    first = data["before"]["perplexities"][case.texts[0]]
    assert data["before"]["perplexity"] == first  # as earlier reports have it
    assert case.report.before.perplexity is not None
    assert case.report.before.perplexity.value == first["value"]


def test_eval_on_several_texts(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", case.texts[0], "--text", case.texts[1], "--length", "30", "--windows", "6"]
    sources = ["eval", str(case.slim), "--against", str(case.dense)]
    with pytest.raises(SystemExit) as caught:
        cli.main([*sources, *options, "--json"])
    assert caught.value.code == 0
    data = json.loads(capsys.readouterr().out)
    dense, slim = data[str(case.dense)], data[str(case.slim)]
    check({"before": dense, "after": slim, "quality": slim["quality"]}, case, 6, 30)


def test_eval_of_one_model(case: Case) -> None:
    found = measure_sources([str(case.slim)], case.texts, LENGTH, COUNT, lambda stage: None)
    data = json.loads(found.to_json())[str(case.slim)]
    assert list(data["perplexities"]) == list(case.texts)
    out = printed(found.render())
    for text, ids in zip(case.texts, case.ids, strict=True):
        wanted = expected(case.dense, case.slim, by_hand(ids, COUNT, LENGTH))
        assert data["perplexities"][text]["losses"] == pytest.approx(wanted["losses"][1], rel=1e-5)
        assert f"{wanted['perplexities'][1]:,.2f}" in out
    assert data["quality"]["texts"] == {}
    assert "agreement" not in out


def printed(what: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(what)
    return shown.get()


def test_the_table_has_a_row_for_each_text(case: Case) -> None:
    lines = printed(case.report.render()).splitlines()
    (row,) = [line for line in lines if line.startswith(case.texts[1])]
    wanted = expected(case.dense, case.slim, by_hand(case.ids[1], COUNT, LENGTH))
    ratio, low, high = wanted["ratio"]
    assert f"{COUNT} x {LENGTH}" in row
    assert f"{ratio:.3f} ({low:.3f} to {high:.3f})" in row
    assert f"{100 * wanted['agreement'][0]:.1f} % (" in row
    assert f"{wanted['kl'][0]:.3f} (" in row
    for value in wanted["perplexities"]:
        assert f"{value:,.2f}" in row


def test_completions_are_the_most_likely_tokens(case: Case) -> None:
    data = json.loads((case.slim / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(case.dense)
    found = data["quality"]["completions"]
    assert len(found) == 2
    for one in found:
        for side, path in (("dense", case.dense), ("slim", case.slim)):
            new = greedily(path, one["prompt"], 24)
            assert one[side] == tokenizer.decode(new, skip_special_tokens=True)
    assert any(one["dense"] != one["slim"] for one in found)


def test_quantiles_are_those_of_tables() -> None:
    for degrees, value in T.items():
        assert student(degrees) == pytest.approx(value, abs=6e-4)
    assert student(100_000) == pytest.approx(1.95999, abs=1e-5)


def test_intervals_stay_where_the_numbers_are() -> None:
    found = mean_estimate([0.0, 1.0], 0, 1)
    assert (found.value, found.low, found.high) == (0.5, 0, 1)
    single = ratio_estimate([1.0], [1.5])
    assert single.value == pytest.approx(np.exp(0.5))
    assert (single.low, single.high) == (None, None)


def test_a_model_against_itself_is_itself() -> None:
    table = torch.nn.Embedding(11, 11)
    windows = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))
    found = compare(lambda input_ids: table(input_ids), lambda input_ids: table(input_ids), windows)
    comparison = found.comparison
    assert comparison.agreement is not None
    assert comparison.kl is not None
    for estimate, value in ((comparison.ratio, 1), (comparison.agreement, 1), (comparison.kl, 0)):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((value,) * 3)
    alone = evaluate.perplexity(lambda input_ids: table(input_ids), windows)
    assert found.dense == found.slim == alone


def test_models_of_other_vocabularies_have_no_divergence() -> None:
    small, large = torch.nn.Embedding(11, 11), torch.nn.Embedding(13, 13)
    windows = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    found = compare(lambda input_ids: small(input_ids), lambda input_ids: large(input_ids), windows)
    assert found.comparison.agreement is None
    assert found.comparison.kl is None
    assert found.comparison.ratio.value == pytest.approx(found.slim.value / found.dense.value)


def test_classes_that_the_dense_model_excludes_add_nothing() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf])

    def model(scale: float) -> Any:
        return lambda input_ids: (scale * logits[:2].new_tensor([0.0, 1.0, -torch.inf])).expand(
            *input_ids.shape, 3
        )

    found = compare(model(1.0), model(2.0), torch.zeros(2, 4, dtype=torch.long)).comparison
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    q = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum()
    assert found.kl is not None
    assert found.kl.value == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)


def test_a_model_that_looks_ahead_is_not_compared() -> None:
    table = torch.nn.Embedding(11, 11)

    def ahead(input_ids: torch.Tensor) -> torch.Tensor:
        return table(input_ids).sum(1, keepdim=True).expand(-1, input_ids.shape[1], -1)

    with pytest.raises(NoPerplexityError, match="has no perplexity"):
        compare(lambda input_ids: table(input_ids), ahead, torch.arange(8).view(2, 4))
