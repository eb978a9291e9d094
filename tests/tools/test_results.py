"""The tables of docs/results.md."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from _results_doubts import doubts  # type: ignore[import-not-found]
from _results_rows import WIDTH, Row  # type: ignore[import-not-found]
from _results_table import all_rows, page  # type: ignore[import-not-found]

DOCS = Path(__file__).parents[2] / "docs"


def test_what_is_worse_than_expected_is_told_in_pairs():
    rows = [
        Row(WIDTH, target, method)
        for target in ("a", "b")
        for method in ("flap", "flap + reconstruct", "obs + reconstruct")
    ]
    losses = {
        "a/flap": [1.0, 2.0, 3.0],
        "a/flap + reconstruct": [1.1, 2.2, 3.0],
        "a/obs + reconstruct": [0.5, 1.0, 2.0],
        "b/flap": [1.0, 2.0, 3.0],
        "b/flap + reconstruct": [0.5, 1.0, 2.0],
        "b/obs + reconstruct": [0.8, 1.0, 2.3],
    }
    found = {f"{WIDTH}/{key}": {"losses": value} for key, value in losses.items()}
    (text,) = doubts(rows, found)
    # Differences 0.1, 0.2, 0 and 0.3, 0, 0.3: deviations 0.1 and √0.03, over √3.
    assert text == (
        "Mean losses, compared in pairs (with the standard error): "
        "a, *flap + reconstruct* above *flap* by 0.1000 (0.0577), 3 pairs; "
        "b, *obs + reconstruct* above *flap + reconstruct* by 0.2000 (0.1000), 3 pairs.\n"
    )
    assert doubts(rows[:1], found) == []
    assert doubts(rows, {}) == []


def test_the_document_is_that_of_the_measured_rows():
    found, kernels = (json.loads((DOCS / f"{n}.json").read_text()) for n in ("results", "kernels"))
    assert (DOCS / "results.md").read_text() == page(all_rows(), found, kernels)
