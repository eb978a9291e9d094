"""The model card of a checkpoint: what it was made from, what it costs, and how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from graphprune._version import __version__

CARD_FILE = "README.md"

_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
"""What a card keeps of that of the model it was made from."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
_PATH = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+([^\s/\\]+)")

Data = Mapping[str, Any]


def model_card(report: Data, config: Data, source: Path | None) -> str:
    """The text of a README.md with its metadata.

    Nothing of it depends on the machine: files are named without the folders they lie in, and no
    latency is told.

    Args:
        report: what ``report.json`` holds.
        config: what the ``config.json`` of the checkpoint holds.
        source: the directory of the dense checkpoint, whose own card is carried on.
    """
    from huggingface_hub import ModelCard, ModelCardData

    before = carried(source)
    base = base_model(str(report["source"]), source) or before.get("base_model")
    kept = {name: before[name] for name in _CARRIED if before.get(name)}
    tags = before.get("tags")
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        tags=[*(tags if isinstance(tags, list) else ()), "graphprune", "pruned"],
        ignore_metadata_errors=True,
        **kept,
    )
    body = "\n\n".join(_parts(report, config, base))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def base_model(given: str, directory: Path | None) -> str | None:
    """The hub id of the dense model; None where it isn't known to have one.

    Args:
        given: the source as it was given.
        directory: where it lies.
    """
    cached = _CACHED.search(f"{directory or given}/")
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    found = _REPOSITORY.fullmatch(given)
    return given if found and not os.path.exists(given) else None


def carried(source: Path | None) -> dict[str, Any]:
    """The metadata of a checkpoint's own card; empty where it has none that can be read."""
    if source is None:
        return {}
    try:
        text = (source / CARD_FILE).read_text(encoding="utf-8")
        _, head, _ = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
        found = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _parts(report: Data, config: Data, base: object) -> Iterator[str]:
    name = base if isinstance(base, str) else Path(str(report["source"])).name
    yield f"# {name}, pruned"
    before, after = report["before"], report["after"]
    told = [
        f"{100 * (1 - after[key] / before[key]):.1f} % fewer {what}"
        for key, what in (("parameters", "parameters"), ("macs", "multiply-accumulates"))
        if before.get(key) and after.get(key) is not None and after[key] != before[key]
    ]
    masks = report.get("masks") or {}
    if masks.get("sparsity_of_model"):
        told.append(f"{100 * masks['sparsity_of_model']:.1f} % of all weights zero")
    link = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else f"`{name}`"
    made = f"Made from {link} by graphprune {__version__}"
    yield f"{made}: {', '.join(told)}." if told else f"{made}."
    yield from _metrics(report)
    yield f"## How to load it\n\n```python\n{_loading(config)}```"
    if report.get("max_abs_error") is not None:
        yield (
            "## Verified\n\nThe outputs match those of the masked dense model within "
            f"{report['max_abs_error']:.1e} ({report['verified_in']})."
        )
    if report.get("recipe"):
        yield f"## Recipe\n\n```yaml\n{recipe_of(str(report['recipe']))}```"
    if report.get("notes"):
        lines = "\n".join(f"* {_plain(note)}" for note in report["notes"])
        yield f"## What to know\n\n{lines}"


def _metrics(report: Data) -> Iterator[str]:
    """Both models by text."""
    sides = [report[side].get("perplexities") or {} for side in ("before", "after")]
    if not all(sides):
        return
    texts = (report.get("quality") or {}).get("texts") or {}
    lines = [
        "| text | dense | pruned | ratio | top-1 agreement | KL, nats |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for text, one in sides[0].items():
        other, own = sides[1][text], texts.get(text) or {}
        cells = [
            _plain(text).replace("|", "\\|"),
            f"{one['value']:.2f}",
            f"{other['value']:.2f}",
            *(_number(own.get(key), form) for key, form in _FORMS.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(sides[0].values()))
    windows = f"{first['windows']} windows of {first['length']} tokens of each text"
    yield "## Perplexity\n\n" + "\n".join([*lines, "", f"Measured on {windows}."])


_FORMS = {"ratio": "{:.3f}", "agreement": "{:.1%}", "kl": "{:.3f}"}


def _number(found: Data | None, form: str) -> str:
    return "–" if not found else form.format(found["value"])


def _loading(config: Data) -> str:
    """Code that loads the checkpoint."""
    own = config.get("auto_map")
    if isinstance(own, dict) and own:
        auto = next(name for name in [*(n for n in own if n != "AutoConfig"), "AutoModel"])
        return (
            f"from transformers import {auto}\n\n"
            "# No configuration can hold these shapes: the checkpoint brings a small class of its "
            "own.\n"
            f'model = {auto}.from_pretrained("REPOSITORY", trust_remote_code=True)\n'
        )
    name = (config.get("architectures") or ["AutoModel"])[0]
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("REPOSITORY")\n'


def recipe_of(text: str) -> str:
    """A recipe for other people's eyes: without comments, and files without their folders."""
    return yaml.safe_dump(_without_folders(yaml.safe_load(text)), sort_keys=False)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return _plain(value) if isinstance(value, str) else value


def _plain(text: object) -> str:
    """Text with every absolute path cut down to the name of the file."""
    return _PATH.sub(r"\1", str(text))
