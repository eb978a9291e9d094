"""Example inputs for transformers models, from their forward signature and configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim

from graphprune.errors import LoadError

BATCH = 2
LENGTH = 13  # prime, so that it is unlikely to equal a width of the model
DECODER_LENGTH = 7


@dataclass(frozen=True)
class Example:
    """Keyword inputs and which of their dimensions callers may change.

    Attributes:
        inputs: name to tensor.
        dynamic_shapes: name to {dimension: Dim.DYNAMIC or Dim.AUTO}.
    """

    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]


def example_inputs(model: Any, device: str = "cpu") -> Example:
    """Small inputs that `model` accepts.

    Token ids are random within the vocabulary, images and audio have the size that the
    configuration asks for. Encoders of text get an attention mask too; a causal model doesn't
    need one, since padding on the right can't reach the tokens before it.

    Raises:
        LoadError: the model's main input is of an unknown kind.
    """
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    dynamic: dict[str, dict[int, Any]] = {}

    def add(name: str, value: torch.Tensor, *dims: int) -> None:
        inputs[name] = value.to(device, model.dtype if value.is_floating_point() else None)
        dynamic[name] = {d: Dim.AUTO for d in dims}

    def tokens(length: int) -> torch.Tensor:
        vocabulary = model.config.get_text_config().vocab_size
        return torch.randint(0, vocabulary, (BATCH, length), generator=generator)

    if main == "input_ids" or "input_ids" in accepted:
        add("input_ids", tokens(LENGTH), 0, 1)
        if "attention_mask" in accepted and not _is_causal(model):
            add("attention_mask", torch.ones(BATCH, LENGTH, dtype=torch.int64), 0, 1)
    if "pixel_values" in accepted:
        height, width, channels = _image(model.config)
        image = torch.randn(BATCH, channels, height, width, generator=generator)
        add("pixel_values", image, 0)
    if main == "input_features":
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        add("input_features", torch.randn(BATCH, bins, frames, generator=generator), 0)
    if main == "input_values":
        add("input_values", torch.randn(BATCH, 4000, generator=generator), 0)
    if not inputs:
        raise LoadError(
            f"no example input is known for {type(model).__name__}",
            why=f"its main input is {main!r}",
            hint="trace the module with your own example: graphprune.trace(module, args, kwargs)",
        )
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        add("decoder_input_ids", tokens(DECODER_LENGTH), 0, 1)
    return Example(inputs, dynamic)


def _is_causal(model: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from graphprune.checkpoints.self_contained import original_class

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    classes = known if isinstance(known, tuple | list) else (known,)
    return original_class(type(model)) in classes and not model.config.is_encoder_decoder


def _image(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width, getattr(vision, "num_channels", 3)
