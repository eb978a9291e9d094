"""Comparing a written decoder with what the module behind it generates."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from graphprune.errors import EmitError, GraphPruneError
from graphprune.rewrite.module.compare import rounding
from graphprune.runtime.generation import Decoder

# ONNX Runtime's kernels round differently; relative to the largest logit.
TOLERANCE = 1e-4
NEW = 8
"""Tokens to generate."""
LONGEST_WINDOW = 1024
"""Prompts are longer than a sliding window, unless it is longer than this: they take time."""


def check(module: PreTrainedModel, file: Path) -> None:
    """Let both generate after two prompts of different lengths, padded on the left.

    ONNX Runtime reads the tokens that the module chose, one at a time, so that what follows a tie
    is compared too. Where the logits of each step are equal, so are the tokens. Then it reads the
    prompts in two parts, and one of them alone.

    Raises:
        EmitError: a logit differs by more than rounding does, or one of the two can't run.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return
    ids, mask = _prompts(module)
    tokens, logits = _generated(module, ids, mask)
    length, tolerance = ids.shape[1], max(TOLERANCE, rounding(module))
    ones = np.ones((2, tokens.shape[1] - length), np.int64)
    masks = np.concatenate([mask.cpu().numpy(), ones], axis=1)
    try:
        decoder = Decoder(file, providers=["cpu"])
        for i, wanted in enumerate(logits):
            start, end = (decoder.length, length + i)
            found = decoder.step(tokens[:, start:end], masks[:, :end])
            _compare(found[:, -1], wanted, tolerance, f"token {i + 1} after the prompts")
        decoder.reset()
        for end in (length - 1, length):
            found = decoder.step(tokens[:, decoder.length : end], masks[:, :end])
        _compare(found[:, -1], logits[0], tolerance, "the prompts read in two parts")
        decoder.reset()
        found = decoder.step(tokens[:1, :length])
        _compare(found[:, -1], logits[0][:1], tolerance, "one prompt alone")
    except EmitError:
        raise
    except GraphPruneError as error:
        raise EmitError(
            "ONNX Runtime can't run the decoder",
            where=type(module).__name__,
            why=error.why or error.what,
            hint='ask for format "onnx": a graph without a cache',
        ) from error


def _prompts(module: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, the second row with padding, and their mask."""
    layers: Sequence[Any] = DynamicCache(config=module.config).layers
    windows = [w for layer in layers if (w := getattr(layer, "sliding_window", None))]
    length = max([7, *(w + 3 for w in windows if w <= LONGEST_WINDOW)])
    embedding: Any = module.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.to(module.device), mask.to(module.device)


def _generated(
    module: Any, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[NDArray[np.int64], list[NDArray[np.float32]]]:
    """Greedily, with the cache: tokens with the prompts, and the logits of each step."""
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        found: Any = module.generate(ids, attention_mask=mask, generation_config=config)
    except Exception as error:  # whatever a model's code says
        raise EmitError(
            "the slim model can't generate",
            where=type(module).__name__,
            why=" ".join(str(error).split())[:300],
        ) from error
    return found.sequences.cpu().numpy(), [x.float().cpu().numpy() for x in found.logits]


def _compare(
    found: NDArray[Any], wanted: NDArray[np.float32], tolerance: float, where: str
) -> None:
    scale = max(1.0, float(np.abs(wanted).max()))
    error = float(np.abs(found.astype(np.float32) - wanted).max())
    if not error <= tolerance * scale:
        raise EmitError(
            "ONNX Runtime gives other logits than the slim model generates by",
            where=where,
            why=f"the largest difference is {error:.3g} at a scale of {scale:.3g}",
            hint='please report this; format "onnx" is not affected',
        )
