"""Writing a slim model as a Hugging Face checkpoint.

The native form is an ordinary checkpoint of the original class with another config. Where no
config can express the slim model, the self-contained form brings its code along (see `pruned`).
Either counts only after a fresh process has opened it and computed the same outputs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig

from graphprune.checkpoints import self_contained
from graphprune.checkpoints.own_code import auto_class, is_own
from graphprune.checkpoints.patch import Patch, apply_patch, difference, named_tensors
from graphprune.checkpoints.writing import write_weights
from graphprune.emit.companions import copy_code, copy_companions
from graphprune.emit.expected import Expected
from graphprune.errors import EmitError
from graphprune.files import replacing
from graphprune.files.refusals import temporary_folder
from graphprune.files.streams import opened
from graphprune.rewrite.config.builds import build_on_meta, quiet
from graphprune.rewrite.config.config import SolvedConfig, solve_config
from graphprune.rewrite.module import reload
from graphprune.rewrite.module.compare import evaluating

PLAN = "graphprune_plan.json"


@quiet()
def precheck(slim: Any) -> list[str]:
    """Say why the slim model cannot have the native form; needs no weights.

    Returns:
        Nothing if its config can express all shapes. The outputs may still differ, where a class
        computes a factor from a size; `save` notices that.

    Raises:
        EmitError: The program doesn't come from a Hugging Face model.
    """
    return list(_solve(slim).problems)


@quiet()
def save(slim: Any, path: str | Path) -> None:
    """Write a slim model as a Hugging Face checkpoint; a directory at `path` is replaced.

    Args:
        slim: A :class:`graphprune.rewrite.slim.Slim` whose program has a source.
        path: The directory.

    Raises:
        EmitError: Neither form gives the slim model's outputs, or writing failed. Nothing is left
            behind then.
    """
    solved = _solve(slim)
    with evaluating(slim.module):  # as a loaded model is
        expected = Expected.of(slim)
    with replacing(Path(path)) as directory:
        job = Job(slim, solved, directory, expected)
        _write(job)
        if slim.program.source.path is not None:
            source = slim.program.source
            copy_companions(Path(source.path), directory)
            if source.trust:
                copy_code(Path(source.path), directory)
        (directory / PLAN).write_text(slim.plan.to_json() + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        slim: The slim model.
        solved: Its native config, if there is one.
        directory: Where the checkpoint is built.
        expected: What it has to compute.
    """

    slim: Any
    solved: SolvedConfig
    directory: Path
    expected: Expected

    @property
    def model_class(self) -> type[nn.Module]:
        """The transformers class, not resized."""
        return self_contained.original_class(self.slim.program.source.model_class)

    @property
    def attention(self) -> str | None:
        """The attention implementation of the slim module, which decides about rounding.

        None for transformers' own choice, which depends on what the parts of a model support.
        """
        found: str | None = self.slim.program.source.config._attn_implementation
        return None if found == "sdpa" else found


def _solve(slim: Any) -> SolvedConfig:
    source = slim.program.source
    if source is None:
        raise EmitError(
            "There is no Hugging Face form of this model.",
            why="it was not loaded from a Hugging Face checkpoint",
            hint='ask for format "pt2" or "onnx"',
        )
    if slim.lost_branches:
        raise EmitError(
            "There is no Hugging Face form of a layer without its attention or its MLP.",
            where=", ".join(slim.lost_branches),
            why="the class builds every layer with both",
            hint='ask for format "pt2" or "onnx", or remove whole layers',
        )
    return solve_config(
        self_contained.plain(source.config, source.model_class),
        self_contained.original_class(source.model_class),
        {name: shape for name, shape in slim.shapes.items() if name not in slim.idle_buffers},
        slim.dropped_layers(),
        slim.size_hints(),
    )


def _write(job: Job) -> None:
    """Write the first form that gives the right outputs.

    Raises:
        EmitError: There is none.
    """
    reasons: list[str] = []
    for form in (_write_native, _write_self_contained):
        shutil.rmtree(job.directory, ignore_errors=True)
        job.directory.mkdir()
        trouble = form(job)
        if not trouble:
            return
        reasons += [f"{form.__name__.removeprefix('_write_')} form: {text}" for text in trouble]
    raise EmitError(
        "No Hugging Face checkpoint gives the outputs of the slim model.",
        where=str(job.slim.program.source.path or job.model_class.__name__),
        why="\n    ".join(reasons),
        hint='ask for format "pt2" or "onnx", or for uniform sizes over the layers',
    )


def _write_native(job: Job) -> list[str]:
    """Write config and weights; return what is wrong with them."""
    if job.solved.problems:
        return list(job.solved.problems)
    _write_weights(job, build_on_meta(job.model_class, job.solved.config))
    trouble = ""
    candidates = list(job.solved.candidates())
    for config in candidates:
        config.save_pretrained(job.directory)
        if len(candidates) > 1:  # only the one that is right is worth a process of its own
            try:
                wrong = job.expected.deviation_of(_load(job))
            except Exception as error:  # whatever a model's code says to odd sizes
                wrong = f"the model can't be loaded or run: {error}"
            if wrong is not None:
                trouble = trouble or wrong
                continue
        if not is_own(job.model_class):
            return reopen(job, job.model_class.__module__, job.model_class.__name__, trust=False)
        copy_code(Path(job.slim.program.source.path), job.directory)
        return reopen(job, "transformers", auto_class(config, job.model_class), trust=True)
    return [trouble]


def _write_self_contained(job: Job) -> list[str]:
    """Write config with patch, modelling file and weights; return what is wrong with them."""
    if not isinstance(job.slim.module, job.model_class):
        return ["the slim module is a graph, not a resized instance of the original class"]
    if is_own(job.model_class):
        return ["the class is in the checkpoint's own code, which only its config can resize"]
    config, patch = _patched(job)
    blank = build_on_meta(job.model_class, config)
    apply_patch(blank, patch)
    shutil.rmtree(job.directory)
    job.directory.mkdir()
    _write_weights(job, blank)
    annotated = self_contained.annotate(config, job.model_class, patch)
    annotated.save_pretrained(job.directory)
    source = self_contained.modelling_source(job.model_class)
    (job.directory / f"{self_contained.FILE}.py").write_text(source, encoding="utf-8")
    return reopen(job, "transformers", next(iter(annotated.auto_map)), trust=True)


def _patched(job: Job) -> tuple[PretrainedConfig, Patch]:
    """Return the config to build the original class from, and what to change then.

    A config that gives the right shapes and wrong outputs is the better start: the patch holds
    only the factors and buffers that the class computes otherwise.
    """
    if not job.solved.problems:
        config = job.solved.config
        _write_weights(job, build_on_meta(job.model_class, config))
        config.save_pretrained(job.directory)
        idle = job.slim.idle_buffers
        return config, difference(_load(job), job.slim.module, idle=idle)
    blank = build_on_meta(job.model_class, job.solved.config)
    apply_patch(blank, Patch(dropped=job.solved.dropped))
    patch = difference(blank, job.slim.module, self_contained.changed_buffers(job.slim))
    return job.solved.config, replace(patch, dropped=job.solved.dropped)


def _load(job: Job) -> nn.Module:
    """Open the native form in this process."""
    options = {"attn_implementation": job.attention} if job.attention else {}
    model: nn.Module = job.model_class.from_pretrained(  # type: ignore[attr-defined]
        job.directory, dtype="auto", local_files_only=True, **options
    )
    return model


def _write_weights(job: Job, blank: nn.Module) -> None:
    """Write every tensor that transformers stores for a model like `blank`, ties once."""
    tied = set(getattr(blank, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(blank, "_keys_to_ignore_on_save", None) or ())
    names = [name for name in blank.state_dict() if name not in tied | ignored]
    own = dict(named_tensors(job.slim.module))

    def tensor(name: str) -> torch.Tensor:
        # Buffers that no graph reads are known to the module only.
        found: torch.Tensor = job.slim.weights[name] if name in job.slim.weights else own[name]
        return found

    write_weights(job.directory, names, tensor)


def reopen(job: Job, module: str, name: str, *, trust: bool) -> list[str]:
    """Open the checkpoint in a fresh process and return what is wrong with it."""
    with temporary_folder() as scratch:
        inputs, found = scratch / "inputs.pt", scratch / "outputs.safetensors"
        request = {
            "directory": str(job.directory.resolve()),
            "module": module,
            "class": name,
            "trust_remote_code": trust,
            "attention": job.attention,
            "dtype": job.expected.dtype_name,
            "whole": job.expected.whole,
            "inputs": str(inputs),
            "outputs": str(found),
        }
        with opened(inputs) as stream:
            torch.save(job.expected.inputs, stream)
        (scratch / "request.json").write_text(json.dumps(request))
        # -P keeps the working directory off the path; modelling code is cached, and then gone.
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(scratch / "modules"),
        }
        done = subprocess.run(
            [sys.executable, "-P", reload.__file__, str(scratch / "request.json")],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return [f"transformers cannot open it: {lines[-1]}"]
        answer = json.loads((scratch / "answer.json").read_text())
        trouble = [
            f"transformers finds {kind} weights: {', '.join(answer[kind])}"
            for kind in ("missing", "unexpected", "mismatched")
            if answer[kind]
        ]
        wrong = job.expected.deviation(load_file(found))
    return trouble + ([wrong] if wrong else [])
