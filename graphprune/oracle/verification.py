"""Proof by computation that a slim model equals the masked one.

`verify` runs both on the same inputs, in float64 where that fits, and compares every output. It
runs the dense model too: inputs that don't reach what was removed would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.errors import VerifyError
from graphprune.ir.torch.interpreter import (
    GraphRunner,
    Inputs,
    flat_inputs,
    input_names,
    output_names,
)
from graphprune.ir.torch.memory import affordable_dtype
from graphprune.ir.torch.random_inputs import random_inputs
from graphprune.oracle.masked import MaskedInterpreter

if TYPE_CHECKING:
    from graphprune.ir.torch.program import Program
    from graphprune.plan.plan import Plan

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}

_OTHER_SCALE = 4.0
"""Inputs that are so many times larger or smaller than random ones are tried as well."""


class SlimModel(Protocol):
    """What is read of a slim model; `graphprune.Slim` has it."""

    @property
    def exported(self) -> ExportedProgram:
        """Its graph, parameters as placeholders."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Its tensors, by the names in the graph's signature."""


@dataclass(frozen=True)
class Certificate:
    """The outcome of a comparison.

    Attributes:
        passed: every output of the slim model equals the masked model's within the tolerance.
        max_abs_error: largest difference, over all outputs and inputs.
        max_rel_error: largest difference in parts of the largest value of its output.
        dense_difference: largest difference between the masked and the dense model. 0 means that
            the inputs show no effect of pruning, so that passing says little.
        dtype: what both were computed in, "float64".
        tolerance: the difference allowed, in parts of max(1, largest value of the output).
        outputs: names of the outputs compared.
        inputs: what they were run on.
        failed_output: the first output that failed; None where all passed.
        problem: what is wrong with it.
        steps: at how many quantisation steps the slim model was compared, and went on with the
            masked model's numbers. See `graphprune.oracle.verification_steps`.
        drift: of quantised models, the largest difference of outputs where the slim model goes on
            with its own numbers, so that rounding adds up. It isn't judged.
        hint: what to do where not all passed.
    """

    passed: bool
    max_abs_error: float
    max_rel_error: float
    dense_difference: float
    dtype: str
    tolerance: float
    outputs: tuple[str, ...]
    inputs: str
    failed_output: str | None = None
    problem: str | None = None
    steps: int = 0
    drift: float = 0.0
    hint: str | None = None

    @classmethod
    def of(cls, differences: Sequence[Difference], **facts: Any) -> Certificate:
        """The outcome of some comparisons; `facts` are the attributes that they don't hold."""
        failed = next((d for d in differences if d.problem is not None), None)
        return cls(
            passed=failed is None,
            max_abs_error=max((d.error for d in differences), default=0.0),
            max_rel_error=max((d.error / (d.scale or 1.0) for d in differences), default=0.0),
            failed_output=failed.output if failed else None,
            problem=failed.problem if failed else None,
            **facts,
        )

    def raise_if_failed(self) -> None:
        """Do nothing for a certificate that passed.

        Raises:
            VerifyError: it didn't; the message says which output and why.
        """
        if self.passed:
            return
        raise VerifyError(
            "the slim model does not compute what the masked model computes",
            where=f"output {self.failed_output} ({self.dtype}, {self.inputs})",
            why=self.problem,
            hint=self.hint
            or "nothing should be written; report it with the plan file, and leave structures out "
            "of the plan (exclude=) to find the one that is handled wrongly",
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output is from what it should be.

    Attributes:
        output: its name.
        error: largest absolute difference among finite values.
        scale: largest absolute value that is expected.
        problem: why the difference isn't acceptable, or None.
    """

    output: str
    error: float
    scale: float
    problem: str | None = None


def verify(
    program: Program,
    plan: Plan,
    slim: SlimModel,
    inputs: Inputs | Sequence[Inputs] | None = None,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Certificate:
    """Compare a slim model with the masked one.

    Args:
        program: the dense program.
        plan: what was applied to it.
        slim: the result.
        inputs: (args, kwargs), or a list of such; None for random ones, see `random_inputs`.
        dtype: float64 or float32; None for float64 where memory allows it.
        tolerance: the difference allowed, in parts of max(1, largest value of the output); None
            for 1e-9 in float64 and 1e-4 in float32.
        seed: of the random inputs.

    Returns:
        A certificate, passed or not.

    Raises:
        PlanError: the plan doesn't belong to the program.
        VerifyError: the inputs don't have the form of the example.
    """
    dtype = dtype or affordable_dtype(program)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    check = _Check(
        names=output_names(program.exported),
        dense=GraphRunner(program.exported, program.weights, dtype, program.aliases),
        masked=MaskedInterpreter(program, plan.bind(program), dtype),
        slim=GraphRunner(slim.exported, slim.weights, dtype, {}),
        tolerance=tolerance,
    )
    cases, how = _cases(program, inputs, check.dense, seed)
    found = [d for case in cases for d in check.run(case)]
    return Certificate.of(
        found,
        dense_difference=check.effect,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=tolerance,
        outputs=tuple(check.names),
        inputs=f"{how}: {_describe(program, cases[0])}",
    )


@dataclass(slots=True)
class _Check:
    """Three models side by side; `effect` is how far pruning has moved any output so far."""

    names: list[str]
    dense: GraphRunner
    masked: MaskedInterpreter
    slim: GraphRunner
    tolerance: float
    effect: float = 0.0

    def run(self, case: Inputs) -> list[Difference]:
        """One difference per output."""
        original, expected = self.dense.outputs(case), self.masked.outputs(case)
        effects = compare(self.names, original, expected, self.tolerance)
        self.effect = max([self.effect, *(d.error for d in effects)])
        try:
            actual = self.slim.outputs(case)
        except Exception as error:  # whatever a wrong graph raises is a failure, not a crash
            reason = f"the slim graph doesn't run: {type(error).__name__}: {error}"
            return [Difference(n, torch.inf, 0.0, reason) for n in self.names]
        differences = compare(self.names, expected, actual, self.tolerance)
        for i, d in enumerate(differences):
            if spoilt(original[i], expected[i]):
                place = _first_nonfinite(self.masked, self.dense, case)
                reason = f"pruning makes it NaN or infinite, first at {place}"
                differences[i] = replace(d, problem=reason)
            elif len(actual) == len(expected) and spoilt(expected[i], actual[i]):
                place = _first_nonfinite(self.slim, self.masked, case)
                reason = f"the slim model makes it NaN or infinite, first at {place}"
                differences[i] = replace(d, problem=reason)
        return differences


def compare(
    names: Sequence[str],
    expected: Sequence[Any],
    actual: Sequence[Any],
    tolerance: float,
    floor: float = 1.0,
) -> list[Difference]:
    """Compare flat outputs one by one.

    Args:
        names: of the outputs.
        expected: the masked model's; tensors of any dtype, or plain values.
        actual: the slim model's.
        tolerance: the difference allowed, in parts of max(`floor`, largest value expected).
        floor: outputs below it, such as probabilities of many classes, count as if they were as
            large; of float32, rounding in larger numbers before them may have a part in them.

    Returns:
        One difference per output.
    """
    if len(actual) != len(names):
        reason = f"{len(actual)} outputs instead of {len(names)}"
        return [Difference(n, torch.inf, 0.0, reason) for n in names]
    return [
        _difference(n, e, a, tolerance, floor)
        for n, e, a in zip(names, expected, actual, strict=True)
    ]


def _difference(
    name: str, expected: Any, actual: Any, tolerance: float, floor: float
) -> Difference:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = type(expected) is type(actual) and expected == actual
        return Difference(name, 0.0, 0.0, None if same else f"{actual!r} instead of {expected!r}")
    if expected.shape != actual.shape:
        reason = f"its shape is {list(actual.shape)} instead of {list(expected.shape)}"
        return Difference(name, torch.inf, 0.0, reason)
    e, a = _real(expected), _real(actual)
    finite = e.isfinite() & a.isfinite()
    error, scale = (float(x[finite].abs().amax()) if finite.any() else 0.0 for x in (e - a, e))
    allowed = tolerance * max(floor, scale)
    problem = None
    if not (finite | (e == a) | (e.isnan() & a.isnan())).all():
        problem = "NaN or infinity on one side only"
    elif e.numel() and not finite.any():
        problem = "it has no finite value to compare; give inputs that suit the model"
    elif error > allowed:
        problem = f"it differs by {error:.3g}, where {allowed:.3g} is allowed"
    return Difference(name, error, scale, problem)


def _real(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def spoilt(before: Any, after: Any) -> bool:
    """Whether values that were finite are not so any more."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.shape != after.shape:
        return False
    return bool((before.isfinite() & ~after.isfinite()).any())


def _first_nonfinite(model: GraphRunner, reference: GraphRunner, case: Inputs) -> str:
    """The first value of `model` that isn't finite and whose namesake in `reference` is."""
    for runner in (model, reference):
        runner.watch = True
        runner.outputs(case)
        runner.watch = False
    return next((n for n in model.nonfinite if n not in reference.nonfinite), "its inputs")


def _cases(
    program: Program, inputs: Inputs | Sequence[Inputs] | None, dense: GraphRunner, seed: int
) -> tuple[list[Inputs], str]:
    """What to run on, and how it was chosen."""
    if inputs is not None:
        single = isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], dict)
        cases: Any = [inputs] if single else list(inputs)
        return cases, f"{len(cases)} given"
    drawn = random_inputs(program, seed)
    try:
        outputs = dense.outputs(drawn)
        suits = all(x.isfinite().all() for x in outputs if isinstance(x, Tensor))
    except Exception:  # inputs that depend on each other can't be drawn one by one
        suits = False
    leaves = pytree.tree_leaves(program.example)
    if suits or not leaves or any(isinstance(x, Tensor) and x.is_meta for x in leaves):
        like = _at_scale_of(program.example, drawn)
        if like is None:
            return [drawn], f"random, seed {seed}"
        return [drawn, like], f"random, seed {seed}, of unit scale and of the example's"
    return [program.example], "the example's, since the model fails on random ones"


def _at_scale_of(example: Inputs, drawn: Inputs) -> Inputs | None:
    """`drawn` in the size of the example's floating inputs; None where that is no other one.

    A net for inputs of size 100 may do next to nothing on those of size one.
    """
    old, spec = pytree.tree_flatten(drawn)
    new = [_rescaled(*pair) for pair in zip(pytree.tree_leaves(example), old, strict=False)]
    if len(new) != len(old) or all(a is b for a, b in zip(new, old, strict=True)):
        return None
    found: Inputs = pytree.tree_unflatten(new, spec)
    return found


def _rescaled(example: Any, drawn: Any) -> Any:
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.is_meta:
        return drawn
    scale = float(example.double().square().mean().sqrt()) if example.numel() else 0.0
    near = 1 / _OTHER_SCALE <= scale <= _OTHER_SCALE
    return drawn if near or not 0 < scale < math.inf else drawn * scale


def _describe(program: Program, case: Inputs) -> str:
    leaves = flat_inputs(program.exported, case)
    return ", ".join(
        f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        for name, x in zip(input_names(program.exported), leaves, strict=True)
        if isinstance(x, Tensor)
    )
