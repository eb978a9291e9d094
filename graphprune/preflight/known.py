"""What a source says of its model before it is loaded: kind, tokenizer, limits and shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graphprune.calibration.text.read import has_tokenizer
from graphprune.checkpoints.config import WINDOWS
from graphprune.checkpoints.given import FILES, configuration
from graphprune.checkpoints.shards import INDEX, SINGLE, has_weights, stored_shapes
from graphprune.files.paths import is_factory, usable

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
"""How transformers calls the classes of models that continue a text."""


@dataclass(frozen=True)
class Known:
    """What can be told of a source without torch, and where nothing can be told, None.

    Attributes:
        onnx: whether it is an ONNX file.
        directory: of the checkpoint, if it is one that is here.
        remote: whether it is a checkpoint of the hub.
    """

    onnx: bool = False
    directory: Path | None = None
    remote: bool = False

    @classmethod
    def of(cls, source: object) -> Known:
        """Look at a source, which `graphprune.checkpoints.given.check_source` has let pass."""
        if not isinstance(source, str | Path) or is_factory(source):
            return cls()
        path = usable(source)
        if path.suffix in FILES:
            return cls(onnx=path.suffix == ".onnx")
        return cls(directory=path) if path.is_dir() else cls(remote=True)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The data of the configuration; none without a checkpoint.

        Raises:
            LoadError: see `configuration`.
        """
        return {} if self.directory is None else configuration(self.directory)

    @property
    def causal(self) -> bool | None:
        """Whether the model is a causal language model that reads text alone."""
        if self.onnx:
            return False
        named = [name for name in self.config.get("architectures") or [] if _CAUSAL.search(name)]
        other = self.config.get("is_encoder_decoder") or any(
            key.endswith("_config") and key not in ("text_config", "quantization_config")
            for key in self.config
        )
        return True if named and not other else None

    @property
    def weightless(self) -> bool:
        """Whether it is a checkpoint that has a configuration and no weights, as for planning."""
        return self.directory is not None and not has_weights(self.directory)

    @property
    def tokenizer(self) -> bool | None:
        """Whether a tokenizer lies with the model."""
        if self.onnx:
            return False
        return None if self.directory is None else has_tokenizer(self.directory)

    @property
    def window(self) -> int | None:
        """The most tokens that the model takes, if its configuration says so."""
        text = self.config.get("text_config")
        found = text if isinstance(text, dict) else self.config
        limits = [v for name in WINDOWS if isinstance(v := found.get(name), int) and v > 0]
        return min(limits, default=None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in a checkpoint's files, by name, from their headers.

        Raises:
            LoadError: see `graphprune.checkpoints.shards.stored_names`.
        """
        folder = self.directory
        if folder is None or not any((folder / name).is_file() for name in (SINGLE, INDEX)):
            return {}
        return stored_shapes(folder)
