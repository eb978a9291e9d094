"""What an interrupted run leaves beside its output, and who may go on from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from graphprune.errors import LoadError, PlanError
from graphprune.passes.protocol import Record, State
from graphprune.pipeline.resume import Journal
from graphprune.plan.plan import Plan

CHOSEN = State(
    cast("Any", None),
    Plan("abc", {"x": (0, 2)}),
    records=(Record("select", ("some stay whole",)),),
)
"""What a pass that chooses units has made of a model, which the journal doesn't look at."""

RUN = {"source": "model", "recipe": {"seed": 0, "sparsify": {"sparsity": 0.5}}}


def begun(output: Path, groups: int = 3) -> Journal:
    """A run that has been interrupted after some groups."""
    journal = Journal.open(output, RUN, resume=False, overwrite=False)
    manifest = journal.state("masks").directory / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"done": groups, "activations": None}))
    return journal


def interrupt(journal: Journal, error: BaseException) -> list[str]:
    """The notes that an exception leaves with."""
    with pytest.raises(type(error)) as caught, journal.kept():
        raise error
    return list(getattr(caught.value, "__notes__", ()))


def test_what_has_done_nothing_or_ended_well_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "slim", RUN, resume=False, overwrite=False)
    assert journal.directory == tmp_path / ".slim.state"
    journal.save("1-select", CHOSEN)
    assert interrupt(journal, KeyboardInterrupt()) == []
    assert list(tmp_path.iterdir()) == []
    with begun(tmp_path / "slim").kept():
        assert journal.directory.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), PlanError("no")])
def test_what_was_done_is_kept_and_said(tmp_path: Path, error: BaseException) -> None:
    journal = begun(tmp_path / "slim")
    (note,) = interrupt(journal, error)
    assert "3 groups are done and kept" in note
    assert "run again with --resume" in note
    assert str(journal.directory) in note
    assert Journal.done_in(journal.directory) == "the weights of 3 groups are done"


def test_a_run_goes_on_only_if_it_is_told_to(tmp_path: Path) -> None:
    output = tmp_path / "slim"
    journal = begun(output)
    journal.save("1-select", CHOSEN)
    with pytest.raises(LoadError, match="an interrupted run") as caught:
        Journal.open(output, RUN, resume=False, overwrite=False)
    assert caught.value.why == "the weights of 3 groups are done"
    for overwrite in (False, True):
        again = Journal.open(output, RUN, resume=True, overwrite=overwrite)
        found = again.load("1-select", replace(CHOSEN, plan=Plan("abc", {}), records=()))
        assert found == CHOSEN
        assert again.load("2-repair", CHOSEN) is None
        assert again.state("masks").resume
        assert Journal.done_in(again.directory) == "the weights of 3 groups are done"
    new = Journal.open(output, RUN, resume=False, overwrite=True)
    assert new.load("1-select", CHOSEN) is None
    assert not new.state("masks").resume
    assert Journal.done_in(new.directory) == ""


def test_nothing_to_go_on_from_is_a_beginning(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "slim", RUN, resume=True, overwrite=False)
    assert not journal.resume
    assert journal.load("1-select", CHOSEN) is None
    begun(tmp_path / "other", groups=0)
    again = Journal.open(tmp_path / "other", RUN, resume=True, overwrite=False)
    assert not again.state("masks").resume
    assert not again.state("masks").directory.exists()


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({**RUN, "source": "other"}, 'source was "model", and is "other"'),
        (
            {"source": "model", "recipe": {"seed": 0, "sparsify": {"sparsity": 0.6}}},
            "recipe.sparsify.sparsity was 0.5, and is 0.6",
        ),
        (
            {"source": "model", "recipe": {**RUN["recipe"], "rounds": 2}},  # type: ignore[dict-item]
            "recipe.rounds was not given, and is 2",
        ),
    ],
)
def test_another_run_cannot_go_on(tmp_path: Path, now: dict[str, object], why: str) -> None:
    journal = begun(tmp_path / "slim")
    with pytest.raises(LoadError, match="was another one") as caught:
        Journal.open(tmp_path / "slim", now, resume=True, overwrite=False)
    assert caught.value.why == why
    assert Journal.done_in(journal.directory) == "the weights of 3 groups are done"


def test_a_refusal_of_the_state_is_no_reason_to_resume(tmp_path: Path) -> None:
    journal = begun(tmp_path / "slim")
    refused = LoadError("another run", where=str(journal.directory / "masks"))
    assert interrupt(journal, refused) == []
    assert len(interrupt(journal, LoadError("no text", where="text.txt"))) == 1
    assert Journal.done_in(journal.directory) == "the weights of 3 groups are done"


def test_damage_is_told_to_whoever_resumes(tmp_path: Path) -> None:
    journal = begun(tmp_path / "slim")
    (journal.directory / "masks" / "manifest.json").write_text("{")
    assert Journal.done_in(journal.directory) == "the weights of 1 groups are done"
    (journal.directory / "run.json").write_text("{")
    with pytest.raises(LoadError, match="can't be read"):
        Journal.open(tmp_path / "slim", RUN, resume=True, overwrite=False)


def test_a_damaged_file_of_a_pass_is_told(tmp_path: Path) -> None:
    journal = begun(tmp_path / "slim")
    journal.save("1-select", CHOSEN)
    (journal.directory / "1-select.json").write_text('{"notes": []}')
    again = Journal.open(tmp_path / "slim", RUN, resume=True, overwrite=False)
    with pytest.raises(LoadError, match="is damaged"):
        again.load("1-select", CHOSEN)
