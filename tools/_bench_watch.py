"""A command, watched from outside: how much memory it and what it starts take at most."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.02
"""Seconds between two looks."""


@dataclass(frozen=True)
class Watched:
    """What was seen of a command.

    Attributes:
        code: its exit status.
        seconds: wall time.
        memory: bytes of memory that belong to no file, at most, of one of its processes.
        together: the same of all of them at the same time.
        output: what it printed.
    """

    code: int
    seconds: float
    memory: int
    together: int
    output: str


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Watched:
    """Run a command and look at its memory until it ends.

    What counts is what the kernel calls RssAnon and RssShmem: pages that a process has written to
    and that it can't get back from a file. Pages of mapped files don't.

    Args:
        command: program and arguments.
        environment: of the process.
        log: a file for what it prints, errors too.
    """
    begun = time.perf_counter()
    most = together = 0
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=printed, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            found = [own_memory(pid) for pid in family(process.pid)]
            most, together = max(most, *found, 0), max(together, sum(found))
            time.sleep(EVERY)
    seconds = time.perf_counter() - begun
    output = log.read_text(encoding="utf-8", errors="replace")
    return Watched(process.returncode, seconds, most, together, output)


def family(pid: int) -> list[int]:
    """A process, and all that it and its threads have started and that are still there."""
    found = [pid]
    for one in found:
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in file.read_text().split()]
            except OSError:  # it has just ended
                continue
    return found


def own_memory(pid: int) -> int:
    """Bytes of resident memory that belong to no file; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields.get(n, "0").split()[0]) for n in ("RssAnon", "RssShmem"))
