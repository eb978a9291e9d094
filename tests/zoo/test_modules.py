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

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)


@every_case
def test_together(case: Case):
    program = case.trace()
    assert prunable_sizes(program) == dict(case.roles)
    assert prunable_fraction(program) == pytest.approx(case.fraction, abs=5e-5)
    reasons = frozen_reasons(program)
    assert reasons.keys() == case.frozen.keys()
    for place, reason in case.frozen.items():
        assert reason in reasons[place]
    check_module(check(program, {"*": 0.5}), same_class=case.same_class)


@pytest.mark.slow
@every_case
def test_alone(case: Case):
    program = case.trace()
    for role in case.roles:
        check(program, {role: 0.5})
