"""The blocks of a tutorial's page, and what its reader does with each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NAMES = ("first-model", "first-onnx-file", "own-module")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: `bash` for commands, `text` for what they print, others for files.
        text: what stands between the fences.
        file: the name that its first line gives it: to be saved, not run.
    """

    language: str
    text: str
    file: str | None

    @property
    def commands(self) -> tuple[str, ...]:
        """What a shell is given, without what installs packages."""
        lines = self.text.splitlines()
        return tuple(line for line in lines if line and not line.startswith(("#", "pip ")))


def blocks(name: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = (FOLDER / f"{name}.md").read_text("utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), "a block has no language"
    return [Block(language, block, _file(block)) for language, block in found]


def _file(text: str) -> str | None:
    first = text.split("\n", 1)[0]
    named = re.fullmatch(r"# ([\w-]+\.\w+)", first)
    return named[1] if named else None


def check_shown(shown: str, printed: str) -> None:
    """Check that what a page shows was printed: the same words in a line, whatever the numbers."""
    lines = [_words(line) for line in printed.splitlines()]
    for line in shown.splitlines():
        assert _words(line) in lines, f"{line!r} is not in what was printed:\n{printed}"


def _words(line: str) -> list[str]:
    """The words of a line that are no numbers and no units of them."""
    return re.findall(r"(?<![\w.])[A-Za-z][\w/-]*", line)
