"""What the tools that print the tables of docs/ share: their command line, and Markdown."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from _bootstrap import ROOT, reexecute


def main(program: str, description: str, document: str, text: Callable[[], str]) -> int:
    """Print, write or check a document; return the exit status.

    Args:
        program: of the command line.
        description: likewise.
        document: where its output is kept, relative to the checkout.
        text: makes it; called with graphprune and tests/ importable.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"such as {document}")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail where FILE differs")
    options = parser.parse_args()
    if not importlib.util.find_spec("graphprune") or not importlib.util.find_spec("torch"):
        reexecute()
    sys.path.append(str(ROOT / "tests"))
    found = text()
    if options.write:
        options.write.write_text(found, encoding="utf-8")
    elif options.check:
        if not options.check.is_file() or options.check.read_text(encoding="utf-8") != found:
            print(f"{options.check} is out of date: run {program} --write {document}",
                  file=sys.stderr)  # fmt: skip
            return 1
    else:
        print(found, end="")
    return 0


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |\n"
                   for line in lines)  # fmt: skip
