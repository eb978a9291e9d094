"""What graphprune raises: one small hierarchy whose messages say what, where, why and what to do.

Every error that a user can cause is a :class:`GraphPruneError`; anything else that escapes is a bug
in graphprune. ``assert`` is kept for our own invariants.
"""

from __future__ import annotations

from typing import ClassVar


class GraphPruneError(Exception):
    """Something that the person who asked can understand and act on.

    Args:
        what: What went wrong, in one sentence.
        where: The node, parameter, file or recipe key concerned; with the model's source line if
            that is known.
        why: The cause.
        hint: What to do about it.
    """

    exit_code: ClassVar[int] = 1
    """Of the command line."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        parts = [("where", self.where), ("why", self.why), ("do", self.hint)]
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in parts if text)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exception.__reduce__ would replay only the positional argument and lose the rest.
        state = {"where": self.where, "why": self.why, "hint": self.hint}
        return (type(self), (self.what,), state)


class LoadError(GraphPruneError):
    """A source (checkpoint, ``.pt2``, text) is missing, truncated or not what it claims to be."""


class TraceError(GraphPruneError):
    """``torch.export`` could not turn the module into a graph."""


class PlanError(GraphPruneError):
    """A plan is impossible, malformed, or belongs to another model."""


class RecipeError(GraphPruneError):
    """A recipe (YAML or command-line flags) cannot be understood or contradicts itself."""


class VerifyError(GraphPruneError):
    """The slim model does not compute what the masked one computes; nothing was written."""


class EvaluationError(GraphPruneError):
    """A measurement asked for has no meaning for this model."""


class CalibrationError(GraphPruneError):
    """Calibration data, or a statistic of it, can't be used."""


class TrainingError(GraphPruneError):
    """Training can't begin, or it stopped before its end; what was saved is still good."""


class EmitError(GraphPruneError):
    """A format cannot hold the slim model, or an output path cannot be written."""


class ConditionError(GraphPruneError):
    """A condition of ``fail_if`` holds; nothing was written."""

    exit_code = 3
