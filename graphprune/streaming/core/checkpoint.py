"""Progress of a streamed run on disk: new weights after every group, and held activations.

A directory holds `manifest.json`, one `group-N.safetensors` per treated group and the activations
of one barrier. The manifest is replaced last, so that an interruption at any moment leaves a
directory that a run can go on from. Where activations are older than the weights, or left out, the
samples run through the graph again with the saved weights up to the group that is next.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphprune.analysis.digest import flat_elements, raw_bytes, weights_digest
from graphprune.analysis.program import BaseProgram
from graphprune.calibration.batches import Batch
from graphprune.checkpoints.weights import map_checkpoint
from graphprune.checkpoints.writing import DTYPES, write_weights
from graphprune.errors import LoadError
from graphprune.files import replacing, write_text
from graphprune.streaming.core.sites import Group
from graphprune.streaming.core.weights import damaged

VERSION = 1
_MANIFEST = "manifest.json"
_RECORD = "record"
_SHARE = 1 / 20
"""Elements of every weight that identify a checkpoint."""


@dataclass
class State:
    """Where a run saves its progress.

    Attributes:
        directory: made if it doesn't exist.
        recipe: text that says what the treatment does; a run with another one can't go on.
        resume: go on from what the directory holds, or begin if it holds nothing.
        every: activations are saved after every so many groups; 0 saves weights only, None saves
            activations where that takes at most a twentieth of the time since the last time.
    """

    directory: Path
    recipe: str = ""
    resume: bool = False
    every: int | None = None
    _identity: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _done: int = field(default=0, init=False, repr=False)
    _activations: int | None = field(default=None, init=False, repr=False)
    _since: float = field(default=0.0, init=False, repr=False)
    _took: float = field(default=0.0, init=False, repr=False)

    def begin(
        self,
        program: BaseProgram,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        settings: Mapping[str, str],
    ) -> int:
        """Open the directory.

        Returns:
            The number of groups that are done already.

        Raises:
            LoadError: it belongs to another run or is damaged, or holds one and `resume` is off.
        """
        self.directory = Path(self.directory)
        self._identity = {
            "version": VERSION,
            "program": program.fingerprint,
            "graph": _graph_digest(program),
            "weights": weights_digest(program),
            "samples": _samples_digest(batches),
            "recipe": self.recipe,
            "groups": [list(g.parameters) for g in groups],
            **settings,
        }
        manifest = self.directory / _MANIFEST
        if not manifest.exists():
            if {*self.directory.glob("*")} - {*self._torn()}:
                raise LoadError(
                    "the directory holds something else than an interrupted run",
                    where=str(self.directory),
                    hint="choose an empty directory",
                )
            self._write()
            return 0
        if not self.resume:
            raise LoadError(
                "the directory holds a run already",
                where=str(self.directory),
                hint="resume it, remove it or choose another one",
            )
        found = read_manifest(manifest, _fits)
        self._check(found)
        self._done, self._activations = found["done"], found["activations"]
        return self._done

    def weights_file(self, index: int) -> Path:
        """The file of a group's new weights."""
        return self.directory / f"group-{index:05}.safetensors"

    def save_weights(self, index: int, weights: Mapping[str, Tensor], record: Any = None) -> Path:
        """Write the new weights of a group, and what the treatment wants to remember, as JSON."""
        path = self.weights_file(index)
        with replacing(path) as temporary:
            metadata = {_RECORD: json.dumps(record)}
            save_file({n: t.cpu() for n, t in weights.items()}, temporary, metadata)
        return path

    def record_of(self, index: int) -> Any:
        """What the treatment remembered of a group.

        Raises:
            LoadError: the file is missing or damaged.
        """
        path = self.weights_file(index)
        try:
            with safe_open(path, framework="pt") as opened:
                return json.loads((opened.metadata() or {})[_RECORD])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise damaged(path, error) from error

    def commit(self, index: int, values: Callable[[], Sequence[Mapping[str, Any]]] | None) -> None:
        """Say that a group is done; its weights are saved already.

        Args:
            index: the group's.
            values: gives what samples hold at its barrier; None if that can't be gone on from.
        """
        old = self._activations
        if values is not None and self._due(index):
            begun = time.monotonic()
            with replacing(self._activations_of(index)) as temporary:
                _write_values(temporary, values())
            self._activations = index
            self._since = time.monotonic()
            self._took = self._since - begun
        self._done = index + 1
        self._write()
        if old is not None and old != self._activations:
            shutil.rmtree(self._activations_of(old), ignore_errors=True)

    def _due(self, index: int) -> bool:
        """Whether to save activations after a group."""
        if self.every is None:
            return time.monotonic() - self._since >= self._took / _SHARE
        return self.every > 0 and (index + 1) % self.every == 0

    def load_values(self) -> tuple[int, list[dict[str, Any]]] | None:
        """The group after which activations were saved, and what was held; None if none were.

        Raises:
            LoadError: they are damaged.
        """
        if self._activations is None:
            return None
        return self._activations, _read_values(self._activations_of(self._activations))

    def finish(self) -> None:
        """Drop activations: all groups are done."""
        self._activations = None
        self._write()
        for left in (*self.directory.glob("activations-*"), *self._torn()):
            shutil.rmtree(left, ignore_errors=True)

    def _torn(self) -> list[Path]:
        """What a process that was killed while it wrote has left behind."""
        kinds = (".activations-*", ".group-*", f".{_MANIFEST}.*")
        return [path for kind in kinds for path in self.directory.glob(kind)]

    def _activations_of(self, index: int) -> Path:
        return self.directory / f"activations-{index:05}"

    def _write(self) -> None:
        progress = {"done": self._done, "activations": self._activations}
        write_text(
            self.directory / _MANIFEST, json.dumps({**self._identity, **progress}, indent=1) + "\n"
        )

    def _check(self, found: Mapping[str, Any]) -> None:
        for key, wanted in self._identity.items():
            if found.get(key) != wanted:
                raise LoadError(
                    "the directory belongs to another run",
                    where=str(self.directory),
                    why=_DIFFERENCES.get(key, f"its {key} is {found.get(key)}, not {wanted}"),
                    hint="resume with what the run was begun with, or choose another directory",
                )


_DIFFERENCES = {
    "version": "it was written by another version",
    "program": "the model has other shapes or structures",
    "graph": "the model computes something else",
    "weights": "the model has other weights",
    "samples": "the samples are others",
    "recipe": "the recipe is another",
    "groups": "other weights were to be treated",
}


def read_manifest(path: Path, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """Read what a run has saved of itself.

    Args:
        path: of the JSON file.
        fits: whether its content has what it should have; a KeyError or TypeError says no too.

    Raises:
        LoadError: it hasn't, or can't be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = fits(found)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise LoadError(
            "the manifest of the run is damaged",
            where=str(path),
            hint="remove the directory and begin again",
        )
    return dict(found)


def _fits(found: Any) -> bool:
    return type(found["done"]) is int and type(found["activations"]) in (int, type(None))


def _graph_digest(program: BaseProgram) -> str:
    return hashlib.sha256(program.code().encode()).hexdigest()[:16]


def _samples_digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in batch.leaves():
            if isinstance(leaf, Tensor):
                digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode() + raw_bytes(leaf))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def _write_values(directory: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Write values as tensors, with a description of how they are put together."""
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    description = [
        {name: _described(v, f"{i}:{name}", tensors) for name, v in entry.items()}
        for i, entry in enumerate(values)
    ]
    text = json.dumps(description)
    (directory / "values.json").write_text(text, encoding="utf-8")
    write_weights(directory, tensors, lambda name: tensors[name])


# These are no functions of their callers: one that calls itself is garbage that keeps what it sees,
# here gigabytes of activations, until Python looks for cycles.
def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors by name; they are added to `tensors`."""
    if isinstance(value, Tensor):
        repeated = [d for d in range(value.dim()) if value.stride(d) == 0]
        shown = (slice(0, 1) if d in repeated else slice(None) for d in range(value.dim()))
        once = value[tuple(shown)].cpu()
        found = {"tensor": name, "shape": list(value.shape)}
        if once.dtype not in DTYPES:  # as bytes: the files have no name for it
            found |= {"dtype": str(once.dtype).removeprefix("torch."), "once": list(once.shape)}
            once = flat_elements(once).view(torch.uint8)
        tensors[name] = once
        return found
    if isinstance(value, list | tuple):
        return {"items": [_described(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"value": value}


def _restored(item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_described`."""
    if "tensor" in item:
        once = tensors[item["tensor"]].clone()
        if "dtype" in item:
            once = once.view(getattr(torch, item["dtype"])).view(item["once"])
        return once.expand(item["shape"])
    if "items" in item:
        return tuple(_restored(i, tensors) for i in item["items"])
    if "complex" in item:
        return complex(*item["complex"])
    return item["value"]


def _read_values(directory: Path) -> list[dict[str, Any]]:
    try:
        description = json.loads((directory / "values.json").read_text(encoding="utf-8"))
        tensors = map_checkpoint(directory)
        return [{name: _restored(v, tensors) for name, v in entry.items()} for entry in description]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoadError(
            "the saved activations are damaged",
            where=str(directory),
            why=repr(error),
            hint="remove the directory and begin again",
        ) from error
