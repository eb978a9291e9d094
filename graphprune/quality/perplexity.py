"""Measurements: perplexity, latency, size on disk, number of parameters.

A number comes with the conditions it was taken under (window length and count, repeats, threads).
One that would be nonsense, such as that of a model that looks ahead, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graphprune.errors import EvaluationError, LoadError
from graphprune.ir.onnx.ort import example_feeds, onnx_session
from graphprune.quality.timing import Latency, in_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

_BATCH_TOKENS = 1024

_BATCH_LOGITS = 1 << 26
"""Logits of a batch, where a vocabulary is so large that it isn't `_BATCH_TOKENS` that limit it."""


class NoPerplexityError(EvaluationError):
    """The model is no causal language model."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a causal language model.

    Attributes:
        value: ``exp`` of the mean negative log-likelihood (nats) of a token.
        length: Tokens in a window; its first token is context only.
        windows: Number of windows.
        vocabulary: Number of classes; a model that knows nothing has this perplexity.
        losses: Mean negative log-likelihood (nats) of a token, of each window: what two models
            are compared by in pairs.
    """

    value: float
    length: int
    windows: int
    vocabulary: int
    losses: tuple[float, ...]

    @property
    def meaningful(self) -> bool:
        """Whether the model does better than guessing."""
        return self.value < self.vocabulary


def perplexity(model: Callable[..., Any], windows: torch.Tensor) -> Perplexity:
    """Measures the perplexity of a causal language model.

    Args:
        model: Called with ``input_ids=[batch, length]``; returns logits
            ``[batch, length, vocabulary]`` or an object that has them as ``.logits``.
        windows: int64 token windows ``[count, length]``, of two tokens or more.

    Raises:
        NoPerplexityError: The model is no causal language model.
        EvaluationError: The tokens are not of its vocabulary, or a logit is NaN.
    """
    import torch

    losses: list[float] = []
    with torch.inference_mode():
        vocabulary = check_causal(model, windows)
        for batch in batches(windows, vocabulary):
            losses += window_losses(logits_of(model, batch), batch)
    return perplexity_of(losses, windows, vocabulary)


def batches(windows: torch.Tensor, vocabulary: int) -> Sequence[torch.Tensor]:
    """Splits windows ``[count, length]`` such that the logits of a batch fit in memory."""
    import torch

    tokens = min(_BATCH_TOKENS, _BATCH_LOGITS // vocabulary)
    return torch.split(windows, max(1, tokens // windows.shape[1]))


def window_losses(logits: torch.Tensor, windows: torch.Tensor) -> list[float]:
    """Returns the mean negative log-likelihood (nats) of a token, of each window.

    Args:
        logits: ``[count, length, vocabulary]``.
        windows: int64 ``[count, length]``.
    """
    import torch

    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    return cast("list[float]", loss.double().view(len(windows), -1).mean(1).tolist())


def perplexity_of(losses: Sequence[float], windows: torch.Tensor, vocabulary: int) -> Perplexity:
    """Returns the perplexity with these losses of windows ``[count, length]``.

    Raises:
        EvaluationError: A loss is not finite.
    """
    count, length = windows.shape
    mean = math.fsum(losses) / count
    if not math.isfinite(mean):
        raise EvaluationError(
            "the perplexity is not a number",
            why="some logits are NaN or infinite",
            hint="check the weights, or evaluate in float32",
        )
    # Past this the value does not fit in a float; the model is broken in any case.
    value = math.exp(min(mean, 700.0))
    return Perplexity(value, length, count, vocabulary, tuple(losses))


def torch_latencies(
    modules: Sequence[Callable[..., object]],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    repeats: int | None = None,
) -> list[Latency]:
    """Measures modules in PyTorch on the same inputs, in turns, without gradients."""
    import torch

    keywords = dict(kwargs or {})
    calls = [partial(module, *args, **keywords) for module in modules]
    with torch.inference_mode():
        return in_turns(calls, repeats, torch.get_num_threads(), "torch")


def onnx_latencies(
    paths: Sequence[str | Path],
    feeds: Mapping[str, np.ndarray[Any, Any]] | Sequence[Mapping[str, Any]] | None = None,
    *,
    length: int = 128,
    repeats: int | None = None,
    threads: int | None = None,
) -> list[Latency]:
    """Measures ONNX files in ONNX Runtime on the CPU, in turns.

    Args:
        paths: The ``.onnx`` files.
        feeds: Inputs by name, for all files or for each; None makes a batch of one from the
            declared shapes.
        length: What made-up inputs have where a dimension after the first is dynamic.
        repeats: Calls to measure; None for nine, or as many as it takes to measure for half a
            second.
        threads: Threads within an operator; None uses as many as PyTorch does.

    Raises:
        LoadError: A file is missing or not ONNX, or ONNX Runtime is not installed.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    each = [feeds] * len(paths) if feeds is None or isinstance(feeds, Mapping) else feeds
    calls = []
    for path, given in zip(paths, each, strict=True):
        session = onnx_session(path, threads)
        inputs = dict(given) if given is not None else example_feeds(session, length)
        calls.append(partial(session.run, None, inputs))
    return in_turns(calls, repeats, threads, "onnxruntime")


def parameters(module: torch.nn.Module) -> int:
    """Counts parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def onnx_parameters(path: str | Path) -> int:
    """Counts the elements of an ONNX file's floating-point initializers, without reading them.

    Raises:
        LoadError: The file is missing or not ONNX.
    """
    import onnx

    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    floating.add(onnx.TensorProto.DOUBLE)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own decoding error has no stable base class
        raise LoadError("the ONNX file can't be read", where=str(path), why=str(error)) from error
    initializers = model.graph.initializer
    return sum(math.prod(entry.dims) for entry in initializers if entry.data_type in floating)


def size_on_disk(path: str | Path) -> int:
    """Returns the bytes of a model's weights.

    Of a checkpoint directory its safetensors files count; of an ONNX file also its external data.

    Raises:
        LoadError: There is nothing at the path, or no ONNX model in an ``.onnx`` file.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not path.is_file():
        raise LoadError("the model does not exist", where=str(path))
    return sum(file.stat().st_size for file in (path, *_data_files(path)))


def _data_files(path: Path) -> list[Path]:
    if path.suffix != ".onnx":
        return []
    from graphprune.ir.onnx.external import data_files

    try:
        return data_files(path)
    except Exception as error:  # as above
        raise LoadError("the ONNX file can't be read", where=str(path), why=str(error)) from error


def check_causal(model: Callable[..., Any], windows: torch.Tensor) -> int:
    """Returns the vocabulary's size, or says why the model has no perplexity over such windows.

    Raises:
        NoPerplexityError: The model is no causal language model.
        EvaluationError: The windows ``[count, length]`` are too short, or of another vocabulary.
    """
    import torch

    count, length = windows.shape
    if count < 1 or length < 2:
        raise EvaluationError(
            "perplexity needs at least one window of two tokens", why=f"got {count} x {length}"
        )
    window = windows[:1]
    shape = logits_of(model, torch.zeros_like(window)).shape  # token 0 is in every vocabulary
    if len(shape) != 3 or shape[1] != window.shape[1]:
        raise NoPerplexityError(
            "the model has no perplexity",
            why=f"for tokens {list(window.shape)} it returns {list(shape)}, "
            "not logits for every token",
        )
    vocabulary = shape[-1]
    for token in (int(windows.max()), int(windows.min())):
        if not 0 <= token < vocabulary:
            raise EvaluationError(
                "the tokens are not this model's",
                why=f"token {token} is outside its vocabulary of {vocabulary}",
                hint="use the tokenizer that belongs to the model",
            )
    logits = logits_of(model, window)
    # A model that sees the token it should predict has a perplexity that means nothing.
    changed = window.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocabulary
    before, after = logits[:, :-1], logits_of(model, changed)[:, :-1]
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise NoPerplexityError(
            "the model has no perplexity",
            why="its logits depend on later tokens, so it is not a causal language model",
        )
    return vocabulary


def logits_of(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    """Returns a model's logits for tokens ``[count, length]``, however it hands them out.

    Raises:
        NoPerplexityError: It returns something else.
    """
    import torch

    result = model(input_ids=tokens)
    logits = getattr(result, "logits", result)
    if not isinstance(logits, torch.Tensor):
        raise NoPerplexityError(
            "the model has no perplexity", why=f"it returns {type(result).__name__}, not logits"
        )
    return logits
