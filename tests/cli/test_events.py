"""`--events`, and errors as JSON."""

from __future__ import annotations

import json

import pytest

from graphprune.cli.events import read

FLAGS = ("--remove", "ffn=0.25", "--score", "magnitude", "--format", "pt2")


def test_events_are_json_lines_with_stages_and_the_result(run, dense, tmp_path):
    file = tmp_path / "events.jsonl"
    result = run("compile", dense, "-o", tmp_path / "slim.pt2", *FLAGS, "--events", file, "--json")
    assert result.code == 0, result.err
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["event"] for one in (events[0], events[-2], events[-1])] == [
        "begun",
        "result",
        "ended",
    ]
    assert events[0]["command"] == "compile"
    stages = [one["stage"] for one in events if one["event"] == "stage"]
    assert {"loading and tracing", "verifying", "measuring"} <= set(stages)
    assert events[-2]["report"] == json.loads(result.out)
    times = [one["seconds"] for one in events]
    assert times == sorted(times)


def test_a_failure_is_the_last_event(run, dense, tmp_path):
    file = tmp_path / "events.jsonl"
    flags = ("--remove", "nothing=0.5", "--events", file)
    assert run("compile", dense, "-o", tmp_path / "slim", *flags).code == 1
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["event"] == "failed"
    assert "unknown role 'nothing'" in last["error"]["what"]
    assert last["error"]["exit_code"] == 1


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        ("verifying", {"stage": "verifying"}),
        ("repairing weights: 3 of 12", {"stage": "repairing weights", "done": 3, "of": 12}),
        (
            "training: step 1,003 of 2,000, loss 2.1034, about 4 min left",
            {"stage": "training", "done": 1003, "of": 2000, "loss": 2.1034},
        ),
        ("training: step 3 of 9, loss -0.5.", {"stage": "training", "done": 3, "of": 9,
                                               "loss": -0.5}),
    ],
)  # fmt: skip
def test_a_stage_says_how_far_it_is(stage, found):
    assert read(stage) == {**found, "text": stage}


def test_an_error_is_json_too(run, dense, tmp_path):
    flags = ("--remove", "fnn=0.5", "--json")
    result = run("compile", dense, "-o", tmp_path / "slim", *flags)
    assert result.code == 1
    error = json.loads(result.out)["error"]
    assert error["kind"] == "RecipeError"
    assert "unknown role 'fnn'" in error["what"]
    assert error["exit_code"] == 1
    assert error["notes"] == []
    assert "error: " in result.err


def test_a_condition_that_holds_is_json_with_its_exit_code(run, dense, tmp_path):
    flags = (*FLAGS, "--fail-if", "parameters>10", "--json")
    result = run("compile", dense, "-o", tmp_path / "slim.pt2", *flags)
    assert result.code == 3
    error = json.loads(result.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("ConditionError", 3)


def test_events_need_a_place_that_can_be_written(run, dense, tmp_path):
    flags = ("--events", tmp_path / "missing" / "events.jsonl")
    result = run("compile", dense, "-o", tmp_path / "slim.pt2", *FLAGS, *flags)
    assert result.code == 1
    assert "the events can't be written" in result.err
