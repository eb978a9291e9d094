"""Progress of a training run on disk, from which it goes on to the same bits.

A directory holds `manifest.json` and a folder for each of the last two saved steps, with the raw
weights and the optimiser's moments as safetensors. The manifest is replaced last, so that an
interruption at any moment leaves a directory that a run can go on from. There is no state of random
numbers: the order of the data and every draw are functions of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from graphprune.errors import LoadError
from graphprune.files import replacing, write_text
from graphprune.streaming.core.checkpoint import read_manifest
from graphprune.training.core.processes import Processes, local

VERSION = 2
_MANIFEST = "manifest.json"
_SHARE = 1 / 20
_KEPT = 2
_MORE = "more/"

_DIFFERENCES = {
    "version": "it was written by another version",
    "base": "the model has other weights, or computes something else",
    "teacher": "the teacher is another",
    "masks": "the masks are others",
    "data": "the data are others",
    "training": "the options are others",
    "callbacks": "what is pruned or learned beside the weights, or when, is another",
    "processes": "it was begun by another number of processes",
}


@dataclass
class Saved:
    """Where a training run saves its progress.

    Attributes:
        directory: made if it doesn't exist.
        identity: what the run is, as JSON values; a run that is another can't go on.
        everyone: the processes; only the first writes what all of them have.
        sharded: whether each process has weights of its own.
        every: steps between two saves; None saves where that takes at most a twentieth of the time.
    """

    directory: Path
    identity: Mapping[str, Any]
    everyone: Processes
    sharded: bool = False
    every: int | None = None
    _steps: list[int] = field(default_factory=list, init=False, repr=False)
    _since: float = field(default=0.0, init=False, repr=False)
    _took: float = field(default=0.0, init=False, repr=False)

    def begin(self, *, resume: bool) -> dict[str, Any] | None:
        """Open the directory.

        Args:
            resume: go on from what it holds, or begin if it holds nothing.

        Returns:
            What the run remembered at its last saved step; None at the start.

        Raises:
            LoadError: it belongs to another run or is damaged, or holds one and `resume` is off.
        """
        self._since = time.monotonic()
        manifest = self.directory / _MANIFEST
        if not manifest.exists():
            if self.directory.exists() and any(
                not p.name.startswith((".", "step-")) for p in self.directory.iterdir()
            ):
                raise LoadError(
                    "the directory holds something else than an interrupted run",
                    where=str(self.directory),
                    hint="choose an empty directory",
                )
            return None
        if not resume:
            raise LoadError(
                "the directory holds a run already",
                where=str(self.directory),
                hint="resume it, remove it or choose another one",
            )
        found = read_manifest(manifest, _fits)
        for key, wanted in self.identity.items():
            if found["identity"].get(key) != wanted:
                raise LoadError(
                    "the directory belongs to another run",
                    where=str(self.directory),
                    why=_DIFFERENCES.get(key, f"its {key} is another"),
                    hint="resume with what the run was begun with, or choose another directory",
                )
        self._steps = list(found["steps"])
        return dict(found["run"])

    def due(self, step: int) -> bool:
        """Whether to save after a step; the first process decides for all."""
        if self.every is not None:
            return step % self.every == 0
        mine = time.monotonic() - self._since >= self._took / _SHARE
        asked = float(mine) if self.everyone.rank == 0 else 0.0
        return self.everyone.total(asked)[0] > 0

    def save(
        self,
        run: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the state after a step.

        Args:
            run: what the run wants to remember, as JSON values; its "step" is the next step.
            parameters: raw parameters by name.
            optimizer: with their moments.
            more: what else there is to save.
        """
        begun = time.monotonic()
        step = int(run["step"])
        if self.sharded or self.everyone.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(step)) as temporary:
                also = {f"{_MORE}{name}": value for name, value in (more or {}).items()}
                save_file({**_tensors(parameters, optimizer), **also}, temporary)
        self.everyone.wait()
        if self.everyone.rank == 0:
            self._steps = [*(s for s in self._steps if s != step), step][-_KEPT:]
            content = {"identity": dict(self.identity), "steps": self._steps, "run": dict(run)}
            write_text(self.directory / _MANIFEST, json.dumps(content, indent=1) + "\n")
            for old in self.directory.glob("step-*"):
                if old.name not in {self._folder(s).name for s in self._steps}:
                    shutil.rmtree(old, ignore_errors=True)
        self._since = time.monotonic()
        self._took = self._since - begun

    def load(
        self, run: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: Optimizer
    ) -> dict[str, Tensor]:
        """Take weights and moments of a saved step.

        Returns:
            What else was saved.

        Raises:
            LoadError: they are missing or damaged.
        """
        path = self._file(int(run["step"]))
        try:
            found = load_file(path)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    local(parameter).copy_(found[f"weight/{name}"])
                    _restore(name, parameter, found, optimizer)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise self.damaged(run, error) from error
        return {n.removeprefix(_MORE): t for n, t in found.items() if n.startswith(_MORE)}

    def damaged(self, run: Mapping[str, Any], error: Exception) -> LoadError:
        """The error of a saved step that can't be read."""
        return LoadError(
            "the saved training state is damaged",
            where=str(self._file(int(run["step"]))),
            why=str(error),
            hint="remove the directory and begin again",
        )

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:06}"

    def _file(self, step: int) -> Path:
        folder = self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"process-{self.everyone.rank if self.sharded else 0}.safetensors"


def _tensors(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Raw weights, and all that an optimiser remembers of them."""
    found = {}
    for name, parameter in parameters.items():
        found[f"weight/{name}"] = local(parameter).detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = local(torch.as_tensor(value)).detach().cpu().contiguous()
    return found


def _restore(
    name: str, parameter: Tensor, found: Mapping[str, Tensor], optimizer: Optimizer
) -> None:
    """An optimiser's memory of one parameter; none where it had none."""
    state = optimizer.state[parameter]
    for label, value in found.items():
        key, _, owner = label.partition("/")
        if owner != name or key in ("weight", _MORE[:-1]):
            continue
        if value.dim() == 0:
            fused = bool(optimizer.defaults.get("fused"))
            state[key] = value.clone().to(parameter.device if fused else "cpu")
            continue
        state[key] = torch.zeros_like(parameter)
        local(state[key]).copy_(value)
    if not state:
        del optimizer.state[parameter]


def _fits(found: Any) -> bool:
    whole = isinstance(found["identity"], dict) and type(found["run"]["step"]) is int
    return whole and isinstance(found["steps"], list)
