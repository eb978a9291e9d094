"""How an output was made: versions, seed, command, and hashes of what was read."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from graphprune._version import __version__

if TYPE_CHECKING:
    from graphprune.report.digests import Digest

LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
"""Packages whose versions matter to what is written."""

_OTHER_BUILDS: Mapping[str, tuple[str, ...]] = {"onnxruntime": ("onnxruntime-gpu",)}

_command: ContextVar[str | None] = ContextVar("command", default=None)


@dataclass(frozen=True)
class Provenance:
    """How an output was made.

    Attributes:
        versions: of graphprune, Python and `LIBRARIES`, as far as they are installed.
        seed: of everything random.
        source: the content of the dense model.
        data: the content of data, texts and plans, by what the recipe calls them; without those
            that have none before they are used.
        samples: by what they were for, the samples that were made of it: one line on them, and
            their SHA-256.
        command: the command line; None where it was a call from Python. It varies, and is no part
            of `as_data`.
        date: UTC, in seconds; likewise.
    """

    versions: Mapping[str, str]
    seed: int
    source: Digest | None = None
    data: Mapping[str, Digest] = field(default_factory=dict)
    samples: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    command: str | None = None
    date: str | None = None

    def as_data(self) -> dict[str, Any]:
        """What is the same in every run that does the same, as plain data."""
        return {k: v for k, v in asdict(self).items() if k not in ("command", "date")}


def versions() -> dict[str, str]:
    """The versions of graphprune, Python and the libraries; nothing is imported for it."""
    found = {"graphprune": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        for package in (name, *_OTHER_BUILDS.get(name, ())):
            try:
                found[name] = version(package)
            except PackageNotFoundError:
                continue
            break
    return found


def now() -> str:
    """The time in UTC, as ISO 8601 has it, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def commanded(arguments: Sequence[str]) -> Iterator[None]:
    """Tell that what is done in the block is done for a command line."""
    token = _command.set(shlex.join(["graphprune", *arguments]))
    try:
        yield
    finally:
        _command.reset(token)


def command() -> str | None:
    """The command line that this is done for; None where there is none."""
    return _command.get()


def varying_apart(data: dict[str, Any]) -> dict[str, Any]:
    """A report's data with all that varies from run to run under the key ``run``.

    Latencies are measured, and outputs and the command name paths; everything else is the same in
    two runs that do the same.
    """
    data = dict(data)
    provenance = data.pop("provenance", None) or {}
    latencies = {}
    for side in ("before", "after"):
        data[side] = dict(data[side])
        latencies[side] = {name: data[side].pop(name) for name in ("torch", "onnxruntime")}
    run = {
        "date": provenance.pop("date", None),
        "command": provenance.pop("command", None),
        "outputs": data.pop("outputs"),
        "seconds": data.pop("seconds"),
        "latency": {**latencies, "speedup": data.pop("speedup")},
    }
    return {**data, "provenance": provenance or None, "run": run}
