"""Random ONNX graphs under random plans, with inputs of scales from 0.01 to 100.

A long run goes on counting: ``campaign.py --kind onnx``.
"""

from __future__ import annotations

import os
import random

import pytest

from properties.check import Unsuitable
from properties.onnx_check import examine
from properties.onnx_drawing import draw

# A fifth of the graphs of torch: GRAPHPRUNE_GRAPHS=20000 tools/test -k random_onnx_graphs
GRAPHS = int(os.environ.get("GRAPHPRUNE_GRAPHS", "500")) // 5
BATCH = 25


@pytest.mark.parametrize("start", range(0, GRAPHS, BATCH))
def test_random_onnx_graphs(start: int) -> None:
    checked = 0
    for number in range(start, start + BATCH):
        case = draw(random.Random(number))
        try:
            checked += examine(case, number)
        except Unsuitable:
            continue
        except Exception as error:
            raise AssertionError(f"seed {number}") from error
    assert checked, "no plan was tried"
