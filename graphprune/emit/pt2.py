"""Writing a slim program as a ``.pt2`` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphprune.files import replacing
from graphprune.files.streams import opened

if TYPE_CHECKING:
    from graphprune.rewrite.slim import Slim


def save(slim: Slim, path: Path) -> None:
    """Write `slim` with ``torch.export.save``; it can be opened by any torch of that version.

    Raises:
        EmitError: writing failed; nothing is left behind.
    """
    with replacing(path) as temporary, opened(temporary) as stream:
        torch.export.save(slim.exported, stream)
