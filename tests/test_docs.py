"""What docs/ shows is what happens."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import graphprune as gp
from graphprune.pipeline.compiler import compile
from graphprune.recipe.recipe import Recipe
from wheel import run

ROOT = Path(__file__).parents[1]
DOCS = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
"""A link inside the documentation: the file, and the heading."""


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)


def without_code(path):
    """The text of a page without what stands between fences or backticks."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path):
    """What a page's headings are linked by; of equal ones the later are numbered."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        name = slug(heading)
        earlier = sum(one == name or re.fullmatch(rf"{re.escape(name)}-\d+", one) is not None
                      for one in found)  # fmt: skip
        found.append(f"{name}-{earlier}" if earlier else name)
    return found


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def test_a_model_of_ones_own(tmp_path):
    (code,) = blocks("docs/your-own-model.md", "python")
    (tmp_path / "tagger.py").write_text(code)
    source = f"{tmp_path}/tagger.py:build"
    torch.manual_seed(3)
    dense = gp.load(source)
    weights = {n: torch.randn(s) / 8 for n, s in dense.parameters.items() if n in dense.trainable}
    save_file(weights, tmp_path / "tagger.safetensors")
    report = compile(source, {"remove": {"ffn": 0.5}}, tmp_path / "slim",
                     weights=tmp_path / "tagger.safetensors")  # fmt: skip
    assert report.kept == {"ffn": (48, 96)}
    slim = torch.export.load(tmp_path / "slim" / "model.pt2")
    assert slim.state_dict["head.weight"].shape == (12, 48)
    ranges = [(r.lower, r.upper) for r in slim.range_constraints.values()]
    assert (2, 512) in ranges
    tokens, scale = torch.randint(0, 1000, (3, 40)), torch.ones(3, 1, 1)
    assert slim.module()(tokens, scale=scale)["scores"].shape == (3, 40, 12)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/choosing-what-to-prune.md",
        "docs/depth.md",
        "docs/streaming.md",
        "docs/recipes.md",
    ],
)
def test_recipes_parse(name):
    for block in blocks(name, "yaml"):
        Recipe.parse(yaml.safe_load(block))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """To a file that is there, and to a heading of it."""
    for target, anchor in LINK.findall(without_code(path)):
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{target}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    """By following links."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            links = [target for target, _ in LINK.findall(without_code(page)) if target]
            waiting += [(page.parent / target).resolve() for target in links]
    assert set(DOCS) <= reached


def test_anchors_are_those_of_github():
    assert slug("LoRAPrune") == "loraprune"
    assert slug("What a `run` of it *costs*, and why?") == "what-a-run-of-it-costs-and-why"
    assert slug("[Data](data.md) & text") == "data--text"


@pytest.mark.skipif(not importlib.util.find_spec("material"), reason="needs graphprune[docs]")
def test_the_site_is_built_without_a_warning(tmp_path):
    """Every link and anchor leads somewhere there, too."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "tools" / "site.yml"]
    run(*build, "-d", tmp_path / "site")
    assert (tmp_path / "site" / "tutorials" / "first-model" / "index.html").exists()
