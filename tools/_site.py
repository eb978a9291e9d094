"""What the site needs beside docs/: the README and its like as pages, and the README's order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels-sources.md",
}
"""Pages at the top of the checkout, and what they are called on the site."""


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that lie beside docs/."""
    from mkdocs.structure.files import File

    for name, page in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=_renamed(text, "")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Have links to those pages lead to where they are on the site."""
    up = "../" * page.file.src_uri.count("/")
    return _renamed(markdown, f"{up}../", up)


def on_config(config: Any) -> Any:
    """Take the order of pages, and their groups, from the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = text.partition("## Read on")[2]
    groups: list[dict[str, list[str]]] = []
    seen: set[str] = set()
    for line in re.split(r"\n\n", listed):
        pages = [_place(link) for link in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", line)]
        if not pages and re.fullmatch(r"\w[^*\n:]*", line.strip()):
            groups.append({line.strip().partition(",")[0]: []})
        elif groups:
            (inside,) = groups[-1].values()
            inside += [one for one in dict.fromkeys(pages) if one not in seen]
            seen.update(pages)
    groups[-1][next(iter(groups[-1]))].append(BESIDE["kernels/README.md"])
    config.nav = ["index.md", *(group for group in groups if next(iter(group.values())))]
    return config


def _place(link: str) -> str:
    return BESIDE.get(link, link.removeprefix("docs/"))


def _renamed(text: str, before: str, after: str = "") -> str:
    """Have links to those pages lead to what they are called here."""
    for name, page in BESIDE.items():
        text = text.replace(f"]({before}{name}", f"]({after}{page}")
    return text
