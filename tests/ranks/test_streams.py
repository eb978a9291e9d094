"""Processes that share the samples find what one finds alone."""

from __future__ import annotations

import shutil
import signal
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import graphprune as gp
from graphprune.errors import CalibrationError
from graphprune.passes.masks import Magnitude
from graphprune.ranks.dealing import deal
from graphprune.ranks.group import Ranks
from graphprune.solvers import Unstructured
from graphprune.streaming import Group
from graphprune.streaming.sharing import look
from ranks.compared import compare
from ranks.nets import mixtral, windows
from ranks.workers import JOBS, goes_on, one_dies, refuses, shared
from training.gloo import together

SOME = ("sparsegpt", "one window", "ragged", "experts", "units")
"""Of three processes: seven windows, one window, padding, experts that samples miss, a plan."""


@cache
def alone(job):
    """What this process finds."""
    return JOBS[job]()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder with what two processes have found."""
    folder = tmp_path_factory.mktemp("two")
    together(shared, folder, tuple(JOBS))
    return folder


def check(folder, world, job):
    """Compare what processes have found with what this one does."""
    compare(folder, world, job, alone(job))


@pytest.mark.parametrize("job", JOBS)
def test_two_processes(found, job):
    check(found, 2, job)


def test_three_processes(tmp_path):
    together(shared, tmp_path, SOME, world=3)
    for job in SOME:
        check(tmp_path, 3, job)


def test_one_is_killed_and_others_go_on(tmp_path):
    """The other one ends; two processes then end with the same bytes, and one with the same masks.

    The weights of five groups of eight are done.
    """
    whole, begun, two = (tmp_path / name for name in ("whole", "begun", "two"))
    for folder in (whole, begun, two):
        folder.mkdir()
    together(shared, whole, ["sparsegpt"])
    state, one = tmp_path / "state", tmp_path / "copy"
    together(one_dies, begun, state, 4, ends=[0, -signal.SIGKILL])
    assert "another process of this run has ended" in (begun / "said").read_text()
    shutil.copytree(state, one)
    together(goes_on, two, state)
    check(two, 2, "sparsegpt")
    wanted, resumed = (load_file(f / "sparsegpt-0.safetensors") for f in (whole, two))
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)
    goes_on(two, one)  # alone
    check(two, 1, "sparsegpt")


def test_what_one_refuses_all_refuse(tmp_path):
    """The second sample is the second process's; it is named by its number among all."""
    samples = torch.randn(4, 1, 5)
    samples[1] = torch.nan
    together(refuses, tmp_path, list(samples))
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "sample 1" in first


def test_a_statistic_that_is_no_sum_is_refused():
    class Median:
        def add(self, x):
            pass

    group = Group(0, ("up",), ())
    with pytest.raises(CalibrationError, match="can't be added up"):
        look(Ranks(0, 2), group, [Median()], [3])
    assert look(Ranks(), group, [Median()], [3]) == [(3, {})]


def test_one_process_does_miss_an_expert():
    """What the job "experts" is about: of its three windows the first process has one."""
    assert deal([1, 1, 1], 3)[0] == 0
    tokens = []
    for data in (windows(3, 2)[:1], windows(3, 2)):
        seen = []
        gp.sparsify(
            mixtral(),
            data,
            Magnitude(),
            Unstructured(0.5),
            progress=lambda step, seen=seen: seen.append(step.tokens),
        )
        tokens.append([count for group in seen for count in group])
    assert any(all_ and not own for own, all_ in zip(*tokens, strict=True))


@pytest.mark.parametrize(
    ("costs", "hands", "most"),
    [([1] * 7, 3, 3), ([5, 3, 3, 2, 2], 2, 8), ([4], 3, 4), ([], 2, 0), ([9, 1, 1, 1], 2, 9)],
)
def test_dealing(costs, hands, most):
    """The longest hand, worked out by hand."""
    found = deal(costs, hands)
    assert len(found) == len(costs)
    loads = [0] * hands
    for cost, hand in zip(costs, found, strict=True):
        loads[hand] += cost
    assert max(loads) == most


def test_equal_items_go_round():
    assert deal([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
