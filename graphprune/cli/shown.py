"""What commands print on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(result: RenderableType) -> None:
    """Print on stdout; text, which may be JSON, without wrapping or markup."""
    if isinstance(result, str):
        sys.stdout.write(result)
        return
    from rich.console import Console

    console = Console()
    # A pipe has no width of its own, and rich would wrap at 80 columns.
    console.width = console.width if console.is_terminal else max(console.width, 160)
    console.print(result)
