"""Programs that can be trained."""

from __future__ import annotations

from graphprune.analysis.program import BaseProgram
from graphprune.errors import PlanError
from graphprune.ir.torch.program import Program, is_traced


def as_traced(program: BaseProgram, name: str) -> Program:
    """The program, if it has gradients.

    Args:
        program: of any format.
        name: of the pass that needs them.

    Raises:
        PlanError: it is an ONNX graph.
    """
    if is_traced(program):
        return program
    raise PlanError(
        f"{name} trains by gradients, which an ONNX graph doesn't have",
        hint=f"compile the PyTorch model with {name} and write ONNX, or leave {name} out",
    )
