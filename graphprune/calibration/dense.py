"""The dense model's own perplexity, before anything is pruned: nonsense stops the run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.program import BaseProgram, GraphFormat
from graphprune.analysis.signature import token_input
from graphprune.calibration.fit import check_ids, with_all_inputs
from graphprune.calibration.text.frequencies import limit
from graphprune.errors import CalibrationError, EvaluationError
from graphprune.exclusive import alone
from graphprune.ir.onnx.ort import onnx_session
from graphprune.ir.onnx.program import OnnxProgram
from graphprune.ir.torch.program import Program
from graphprune.quality.perplexity import NoPerplexityError, Perplexity, perplexity

WINDOWS, LENGTH = 4, 512
"""How much text is enough to tell a language model from a broken one."""

_WRONG = (
    "likely a tokenizer that isn't the model's, a damaged or half-loaded checkpoint, or a version "
    "of a library under which the model computes something else"
)


def check_dense(program: BaseProgram, windows: Any) -> Perplexity | None:
    """The perplexity of a dense language model on a few calibration windows.

    Args:
        program: the dense model, with weights.
        windows: token windows ``[count, length]``, or what `Samples.data` holds; the first
            `WINDOWS` of them are used, at most `LENGTH` tokens of each.

    Returns:
        The perplexity; None where there is none to measure: for models that aren't causal language
        models, data that is no token windows, and ONNX models without ONNX Runtime.

    Raises:
        CalibrationError: it is far above that of a model that knows how often each token occurs
            and no more (see `graphprune.calibration.text.frequencies`), or no number.
        LoadError: the tokens are outside of the model's vocabulary.
    """
    if isinstance(windows, Mapping):
        windows = windows.get("input_ids")
    if windows is None or isinstance(windows, list | tuple) or getattr(windows, "ndim", 0) != 2:
        return None
    tokens = torch.as_tensor(windows)[:WINDOWS, :LENGTH]
    if tokens.is_floating_point() or tokens.shape[1] < 2:
        return None
    given = token_input(program.signature())
    if given is None:
        return None
    check_ids(tokens, given, "the calibration windows")
    try:
        with alone(), _MODELS[program.format](program) as model:
            if model is None:
                return None
            found = perplexity(model, tokens.to(torch.int64))
    except NoPerplexityError:
        return None
    except EvaluationError as error:
        if "not a number" not in error.what:
            raise
        raise _nonsense(f"its logits are not finite: {_WRONG}") from error
    most = limit(tokens[:, 1:], found.vocabulary)
    if math.fsum(found.losses) / found.windows > most:
        raise _nonsense(
            f"its perplexity on {found.windows} windows of {found.length} tokens is "
            f"{found.value:.4g}, and its vocabulary has {found.vocabulary}; by how often each "
            f"token occurs in them, it should be below {math.exp(most):.4g}: {_WRONG}"
        )
    return found


@contextlib.contextmanager
def _traced(program: Program) -> Iterator[Callable[..., Any] | None]:
    """A model as a function of token ids, if it may be a causal language model."""
    yield program.as_module() if program.is_causal else None


@contextlib.contextmanager
def _onnx(program: OnnxProgram) -> Iterator[Callable[..., Any] | None]:
    """The same of a file."""
    inputs = program.signature()
    if find_spec("onnxruntime") is None or not any(i.name == "input_ids" for i in inputs):
        yield None
        return
    with program.file() as file:
        session = onnx_session(file, mapped=True)

        def model(input_ids: Tensor) -> Tensor:
            filled = with_all_inputs(program, inputs, input_ids)
            assert isinstance(filled, Mapping)
            feeds = {i.name: filled[i.name].to(i.dtype).numpy() for i in inputs}
            return torch.from_numpy(session.run(None, feeds)[0])

        yield model


_Opened = AbstractContextManager[Callable[..., Any] | None]
_MODELS: Mapping[GraphFormat, Callable[[Any], _Opened]] = {"torch": _traced, "onnx": _onnx}


def _nonsense(why: str) -> CalibrationError:
    return CalibrationError(
        "the dense model makes no sense of the calibration text",
        why=why,
        hint="evaluate it first: graphprune eval MODEL --text FILE",
    )
