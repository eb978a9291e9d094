"""What is added to the product of each weight."""

from __future__ import annotations

from collections.abc import Iterable

from graphprune.analysis.program import BaseProgram
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.streaming.core.sites import Site
from graphprune.streaming.onnx.biases import onnx_biases
from graphprune.streaming.torch.biases import torch_biases


def biases(program: BaseProgram, sites: Iterable[Site]) -> dict[str, str]:
    """The biases of linear layers and convolutions that nothing else reads.

    Args:
        program: a traced program, or an ONNX model.
        sites: where weights are applied.

    Returns:
        Canonical name of a weight to that of its bias, a parameter with one number per output.
    """
    if isinstance(program, OnnxProgram):
        return onnx_biases(program, sites)
    assert isinstance(program, Program)  # there is no third kind
    return torch_biases(program, sites)
