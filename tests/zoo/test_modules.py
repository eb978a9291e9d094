"""Plain PyTorch modules: every prunable role alone and all together, judged by the oracle."""

from __future__ import annotations

import pytest

from zoo.case import (
    Case,
    check,
    check_module,
    frozen_reasons,
    prunable_fraction,
    prunable_sizes,
)
from zoo.expected import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)
def test_module(case: Case):
    program = case.trace()
    found = prunable_sizes(program)
    assert found == dict(case.roles)
    assert prunable_fraction(program) == pytest.approx(case.fraction, abs=5e-5)
    reasons = frozen_reasons(program)
    assert reasons.keys() == case.frozen.keys()
    for place, reason in case.frozen.items():
        assert reason in reasons[place]
    if len(found) > 1:
        for role in found:
            check(program, {role: 0.5})
    check_module(check(program, {"*": 0.5}), same_class=case.same_class)
