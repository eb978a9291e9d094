"""Greedy generation with an ONNX decoder whose key-value cache stays in ONNX Runtime.

A decoder, as ``--format onnx-decoder`` writes it, takes the keys and values of earlier tokens as
inputs (``past_key_values.0.key``) and returns them with those of the new tokens appended
(``present.0.key``). What a step returns is handed to the next one as it is, on the device where it
was computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import EvaluationError, LoadError
from graphprune.ir.onnx.ort import Provider, open_raw

PAST = "past_key_values."
PRESENT = "present."

Tokens = NDArray[np.int64]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]] | Tokens,
    max_new_tokens: int = 20,
    *,
    attention_mask: Tokens | None = None,
    eos_token_id: int | Collection[int] | None = None,
    pad_token_id: int = 0,
) -> Tokens:
    """Continue prompts with the most likely tokens.

    Args:
        model: the path of a decoder, its ``onnxruntime.InferenceSession``, or a `Decoder`.
        prompts: token ids, one sequence per row; shorter ones are padded on the left.
        max_new_tokens: how many tokens to append at most.
        attention_mask: int64 ``[batch, length]``, 0 for padding, where `prompts` is an array that
            has been padded (on the left) already.
        eos_token_id: a sequence ends after one of these; None for no such token.
        pad_token_id: what short prompts begin with and what follows an end.

    Returns:
        int64 ``[batch, length + new]``, prompts included. Fewer tokens than allowed are new where
        all sequences have ended.

    Raises:
        LoadError: the model has no key-value cache.
        EvaluationError: there is no prompt, or the model can't take it.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    ids, mask = _padded(prompts, attention_mask, pad_token_id)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    decoder.reset()
    ended = np.zeros(len(ids), dtype=bool)
    new = ids
    for _ in range(max_new_tokens):
        chosen = decoder.step(new, mask)[:, -1].argmax(-1)
        new = np.where(ended, pad_token_id, chosen).astype(np.int64)[:, None]
        ids = np.concatenate([ids, new], axis=1)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        ended |= np.isin(new[:, 0], ends)
        if ended.all():
            break
    return ids


class Decoder:
    """A decoder with the keys and values of the tokens that it has read.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        length: how many tokens have been read since the last `reset`, padding included.
    """

    def __init__(
        self,
        model: Any,
        *,
        threads: int = 0,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        """Open a decoder.

        Args:
            model: its path, or a session.
            threads: within an operator, for a path; 0 leaves it to ONNX Runtime.
            providers: for a path, see `graphprune.runtime.session`.

        Raises:
            LoadError: the file is missing or not ONNX, or has no key-value cache.
        """
        opened = not isinstance(model, str | Path)
        self.session = model if opened else open_raw(model, threads, providers, spin=True)
        inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self._past = [entry for name, entry in inputs.items() if name.startswith(PAST)]
        self._takes_positions = "position_ids" in inputs
        if not has_cache(self.session):
            raise LoadError(
                "the model has no key-value cache",
                where=str(model) if isinstance(model, str | Path) else None,
                why=f"its inputs are {', '.join(inputs)}",
                hint="write it with format onnx-decoder",
            )
        gpu = self.session.get_providers()[0] == "CUDAExecutionProvider"
        self._device = "cuda" if gpu else "cpu"
        self._cache: list[Any] = []
        self.length = 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache = []
        self.length = 0

    def step(self, input_ids: Tokens, attention_mask: Tokens | None = None) -> NDArray[Any]:
        """Read tokens.

        Args:
            input_ids: ``[batch, new]``, any number of new tokens: a prompt, a part of one, or the
                token that was chosen last.
            attention_mask: ``[batch, length + new]``, 0 where a token, old or new, is padding;
                None where none is. Positions are counted from the first other token.

        Returns:
            The logits for what follows each new token, ``[batch, new, vocabulary]``, in the dtype
            that the model computes in.

        Raises:
            EvaluationError: the shapes don't fit, or ONNX Runtime can't take the tokens (ids or
                positions that the model doesn't have).
        """
        total = self.length + input_ids.shape[1]
        shape = (input_ids.shape[0], total)
        mask = np.ones(shape, np.int64) if attention_mask is None else attention_mask
        if mask.shape != shape:
            raise EvaluationError(
                "the attention mask doesn't fit the tokens",
                why=f"its shape is {mask.shape} instead of {shape}, earlier tokens included",
            )
        binding = self.session.io_binding()
        feeds = {"input_ids": input_ids, "attention_mask": mask}
        if self._takes_positions:
            feeds["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, self.length :]
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=np.int64))
        past = self._cache or self._nothing(len(input_ids))
        for entry, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(entry.name, value)
        binding.bind_output("logits", "cpu")
        for entry in self._past:
            binding.bind_output(PRESENT + entry.name.removeprefix(PAST), self._device)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has a class of its own for every code
            raise EvaluationError(
                "ONNX Runtime can't continue the tokens",
                where=f"{len(input_ids)} sequences, tokens {self.length} to {total}",
                why=" ".join(str(error).split())[:300],
                hint="token ids and the length must be within what the model was made for",
            ) from error
        logits, *self._cache = binding.get_outputs()
        self.length = total
        return np.asarray(logits.numpy())

    def _nothing(self, batch: int) -> list[Any]:
        """Keys and values of no tokens."""
        import onnxruntime

        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, entry.shape[1], 0, entry.shape[3]], types[entry.type], self._device
            )
            for entry in self._past
        ]


def has_cache(session: Any) -> bool:
    """Whether a session's model is a decoder that takes keys and values and returns them."""
    past = [e.name for e in session.get_inputs() if e.name.startswith(PAST)]
    outputs = {entry.name for entry in session.get_outputs()}
    present = {PRESENT + name.removeprefix(PAST) for name in past}
    return bool(past) and {"logits", *present} <= outputs


def _padded(
    prompts: Sequence[Sequence[int]] | Tokens, mask: Tokens | None, pad: int
) -> tuple[Tokens, Tokens]:
    """Prompts as an array padded on the left, with its mask."""
    rows = [np.asarray(row, dtype=np.int64) for row in prompts]
    longest = max((len(row) for row in rows), default=0)
    if any(len(row) == 0 for row in rows) or not rows:
        raise EvaluationError("there is nothing to continue", why="a prompt is empty")
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    own = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        own[i, longest - len(row) :] = 1
    if mask is None:
        return ids, own
    if np.shape(mask) != ids.shape:
        raise EvaluationError(
            "the attention mask doesn't fit the prompts",
            why=f"its shape is {np.shape(mask)} instead of {ids.shape}",
        )
    mask = np.asarray(mask, dtype=np.int64)
    if not mask[:, -1].all():
        raise EvaluationError(
            "a prompt is padded on the right", hint="pad on the left, or give lists of tokens"
        )
    return ids, mask
