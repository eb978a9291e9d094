"""Prompts that a model continues with the most likely tokens, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.text.tokenising import begin_token
from graphprune.quality.perplexity import logits_of

PROMPTS = ("Water boils when", "The old man opened the door and")
"""One of facts and one of a story: neither suits one model or one text."""

TOKENS = 24


def prompt_tokens(tokenizer: Any, prompt: str) -> Tensor:
    """Return the tokens of a prompt, with the begin-of-text token that the tokenizer adds.

    Args:
        tokenizer: of transformers.
        prompt: what the model is asked to continue.

    Returns:
        int64 ``[1, length]``.
    """
    ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    begin = begin_token(tokenizer)
    return torch.tensor([ids if begin is None else [begin, *ids]], dtype=torch.long)


def complete(model: Callable[..., Any], tokenizer: Any, start: Tensor, tokens: int) -> str:
    """Continue a prompt with the most likely tokens.

    Args:
        model: has transformers' ``generate``, or is called with ``input_ids=[1, length]``.
        tokenizer: of transformers.
        start: see `prompt_tokens`.
        tokens: how many at most; fewer where the text ends.

    Raises:
        RuntimeError, GraphPruneError: the model can't be run on it; whatever ``generate`` raises.
    """
    able = getattr(model, "can_generate", None)
    with torch.inference_mode():
        if able is not None and able():
            found = _generated(model, start, tokens)
        else:
            found = _continued(model, start, tokens, getattr(tokenizer, "eos_token_id", None))
    new = found[0, start.shape[1] :].tolist()
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _generated(model: Any, start: Tensor, tokens: int) -> Tensor:
    config = model.generation_config
    ends = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else ends
    found = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
    )
    return torch.as_tensor(found)


def _continued(model: Callable[..., Any], start: Tensor, tokens: int, end: int | None) -> Tensor:
    for _ in range(tokens):
        token = logits_of(model, start)[:, -1:].argmax(-1)
        start = torch.cat([start, token], dim=1)
        if int(token) == end:
            break
    return start
