"""What runs are told apart by."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from graphprune.solvers import NM, Unstructured
from graphprune.streaming.identity import identity


@dataclass(frozen=True)
class Options:
    share: float
    names: tuple[str, ...] = ()


class Plain:
    """An object that prints its address."""

    def __init__(self, share: float) -> None:
        self.share = share


def test_equal_options_are_equal_text() -> None:
    assert identity({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    assert identity(Options(0.5, ("x",))) == identity(Options(0.5, ("x",)))
    assert identity(Plain(0.5)) == identity(Plain(0.5))
    assert identity(np.int64(3)) == identity(3) == "3"
    assert identity(torch.float16) == '"torch.float16"'
    assert identity(torch.arange(4)) == identity(torch.arange(4))
    assert identity(identity) == '{"class":"graphprune.streaming.identity.identity"}'


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Options(0.5), Options(0.25)),
        (Options(0.5), Plain(0.5)),
        (Plain(0.5), Plain(0.25)),
        (Unstructured(0.5), NM(2, 4)),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        ({"a": (1, 2)}, {"a": (2, 1)}),
    ],
)
def test_others_are_told_apart(one: object, other: object) -> None:
    assert identity(one) != identity(other)


def test_another_process_says_the_same() -> None:
    """Sets and hashes of text have another order in each process."""
    code = (
        "from graphprune.streaming.identity import identity\n"
        "print(identity({'set': {'x', 'y', 'z', 'w'}, 'of': frozenset('abc')}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = identity({"set": {"x", "y", "z", "w"}, "of": frozenset("abc")})
    assert ran.stdout.strip() == own
