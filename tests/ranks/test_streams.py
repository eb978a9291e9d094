"""Processes that share the samples find what one finds alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import graphprune as gp
from graphprune.passes.masks import Magnitude
from graphprune.ranks.dealing import deal
from graphprune.solvers import Unstructured
from ranks.nets import mixtral, windows
from ranks.workers import JOBS, shared
from training.gloo import together

SOME = ("sparsegpt", "one window", "ragged", "experts", "units")
"""Of three processes: seven windows, one window, padding, experts that samples miss, a plan."""

alone = cache(lambda job: JOBS[job]())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder with what two processes have found."""
    folder = tmp_path_factory.mktemp("two")
    together(shared, folder, tuple(JOBS))
    return folder


def check(folder, world, job):
    """Compare what processes have found with what this one does; each of them has the same."""
    first, *others = (load_file(folder / f"{job}-{rank}.safetensors") for rank in range(world))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    assert first.keys() == alone(job).keys()
    for name, own in alone(job).items():
        if name.startswith("plan "):
            assert torch.equal(first[name], own), name
            continue
        assert torch.equal(first[name] != 0, own != 0), name
        distance = float((first[name].double() - own.double()).norm())
        assert distance <= 1e-5 * float(own.double().norm()), name


@pytest.mark.parametrize("job", JOBS)
def test_two_processes(found, job):
    check(found, 2, job)


def test_three_processes(tmp_path):
    together(shared, tmp_path, SOME, world=3)
    for job in SOME:
        check(tmp_path, 3, job)


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
