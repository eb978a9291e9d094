"""Calibration windows that the dense model writes itself.

A language model that is sampled without truncation draws from its own distribution over all that it
has learned, so that statistics of such windows favour none of its domains. Liu et al.
(arXiv:2305.17888) distil quantised models on them; here they are what pruned weights are fitted to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphprune.analysis.digest import weights_digest
from graphprune.analysis.program import BaseProgram
from graphprune.calibration.text.read import SELF
from graphprune.errors import CalibrationError, LoadError
from graphprune.files import replacing
from graphprune.progress import Part

BATCH = 1 << 15
"""Tokens that are written at a time, which bounds the key-value cache."""

_LARGE = 1 << 24
"""Parameters of a model from which on products in bfloat16 are faster."""

_TENSOR = "tokens"


def generate_windows(
    program: BaseProgram,
    count: int,
    length: int,
    seed: int,
    tell: Callable[[str], None] = lambda stage: None,
) -> Tensor:
    """Sample windows from a language model, at temperature 1 and from its first token on.

    Texts that end early are followed by others, as in training: the end of text is a token like any
    other. Windows are kept in the cache directory, by the model's weights, and read from there when
    the same are asked for again.

    Args:
        program: the dense model, of a checkpoint or a transformers model in memory.
        count: of windows.
        length: tokens in each, with the first one.
        seed: of the draws. Torch's global generator is left as it was.
        tell: told how far it is.

    Returns:
        int64 ``[count, length]``.

    Raises:
        LoadError: the model can't write text.
        CalibrationError: its probabilities are not finite.
    """
    module = _writer(program)
    parts: list[Tensor] = []
    for begin in range(0, count, max(1, BATCH // length)):
        rows = min(count - begin, max(1, BATCH // length))
        path = _cached_at(program, rows, length, seed, len(parts), _is_faster_in_bfloat16(module))
        found = _read(path, (rows, length))
        if found is None:
            title = f"sampling calibration windows {begin + 1} to {begin + rows} of {count}"
            with _precision(module):
                found = _sample(module, rows, length, seed + len(parts), title, tell)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({_TENSOR: found}, temporary)
        parts.append(found)
    return torch.cat(parts)


def can_write(program: BaseProgram) -> bool:
    """Whether a model can write windows: whether it is a language model of transformers."""
    able = getattr(program.module, "can_generate", None)
    return able is not None and program.is_causal and bool(able())


def _writer(program: BaseProgram) -> Any:
    """The module that can write, or the reason why there is none."""
    if not can_write(program):
        raise LoadError(
            "the model can't write its own calibration data",
            where=f"calibration.data: {SELF}",
            why="only language models of transformers that continue a text can",
            hint="give data of the kind that the model reads",
        )
    module: Any = program.module
    if any(parameter.is_meta for parameter in module.parameters()):
        raise LoadError("the model has no weights to write calibration data with")
    return module


def _sample(
    module: Any, rows: int, length: int, seed: int, title: str, tell: Callable[[str], None]
) -> Tensor:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Listener(LogitsProcessor):
        """Changes nothing: it is called once for each token."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] % 64 == 0:
                tell(Part(title, input_ids.shape[1], length, rest=" tokens"))
            return scores

    tell(title)
    first = torch.full((rows, 1), _first_token(module), dtype=torch.int64)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            found = module.generate(
                first,
                attention_mask=torch.ones_like(first),
                logits_processor=LogitsProcessorList([Listener()]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                eos_token_id=None,
                pad_token_id=int(first[0, 0]),
                use_cache=True,
            )
        except RuntimeError as error:  # torch.multinomial: "probability tensor contains inf or nan"
            raise CalibrationError(
                "the model can't write its own calibration data",
                why=" ".join(str(error).split())[:300],
                hint="repair the checkpoint, or give other data",
            ) from error
    assert tuple(found.shape) == (rows, length)
    return torch.as_tensor(found, dtype=torch.int64)


def _first_token(module: Any) -> int:
    """What the model's texts begin with: its begin-of-text token, or what separates its texts."""
    for settings in (module.generation_config, module.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and value >= 0:
                return value
    return 0


def _precision(module: Any) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the processor has instructions for it: samples are as good."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_is_faster_in_bfloat16(module))


def _is_faster_in_bfloat16(module: Any) -> bool:
    found = list(module.parameters())
    single = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in found)
    large = sum(p.numel() for p in found) >= _LARGE  # of others, casts cost more than they save
    return single and large and bool(torch.cpu._is_avx512_bf16_supported())


def _cached_at(
    program: BaseProgram, rows: int, length: int, seed: int, batch: int, coarse: bool
) -> Path:
    facts = f"{program.fingerprint} {weights_digest(program)} {rows} {length} {seed} {batch}"
    facts += " bfloat16" if coarse else ""
    name = hashlib.sha256(facts.encode()).hexdigest()[:24]
    home = os.environ.get("GRAPHPRUNE_CACHE") or Path.home() / ".cache" / "graphprune"
    return Path(home) / "samples" / f"{name}.safetensors"


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Cached windows; None where there are none, or the file is damaged."""
    try:
        found = load_file(path).get(_TENSOR)
    except (OSError, SafetensorError):
        return None
    return found if found is not None and tuple(found.shape) == shape else None
