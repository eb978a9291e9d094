"""The built-in text: what is in it, what is not, and that it does not change unnoticed."""

import hashlib
import re
from importlib.resources import files
from pathlib import Path

import pytest

from graphprune.calibration.text.builtin import builtin_text, documents, kinds, sorted_documents
from graphprune.calibration.text.read import read_text
from graphprune.errors import LoadError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDER = files("graphprune.calibration.text.builtin")

# Measurements depend on every character. Whoever changes a text writes the new sums here, and
# measures again what was calibrated on it.
SUMS = {
    "prose": "1bc15a8211099b176b9a6e0f0e0b2ac7421b89a563fc07ac0e86e5120b84e62a",
    "dialogue": "d0d4a5b65f55f6da2de58435e75aabb84f6ad1d349e8b6a7d0c32df1b0637e96",
    "encyclopaedia": "040e2766738fa5c154a701ff465189cd58c47154c30d7cdf28432780cd60fcd3",
    "code": "6a9db6ad64db8e256b06124a8201ea5f7429c92ef60ddbf367ce594a74b76f44",
    "manuals": "4ed49dacf37b529443bb1e5c97220f2b9e5bdbeba5c91853a7058011f9e116df",
    "mathematics": "6d0ff5111ee3da891b2172352c6d231bb3a49eaaac20d4ae31b8eb8811f995df",
    "news": "10b56ed315eff255a9c9ddc4d5411ac630c55cd17ec2cf01e530948fa38fc188",
    "lists": "9b27cc0a6f73aef58380e442c98afb56171748356c06fa22b6f7ab339d4af13e",
}


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text, length=8):
    found = words(text)
    return {tuple(found[at : at + length]) for at in range(len(found) - length + 1)}


@pytest.fixture(scope="module")
def own_runs():
    return set().union(*(runs(text) for _, text in sorted_documents()))


@pytest.mark.parametrize("kind", kinds())
def test_texts_are_those_that_were_measured(kind):
    raw = FOLDER.joinpath(f"{kind}.txt").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(raw).hexdigest() == SUMS[kind]


def test_there_is_enough_of_each_kind():
    assert len(kinds()) == len(set(kinds())) == 8
    sizes = {kind: len(builtin_text(kind)) for kind in kinds()}
    assert all(size > 12_000 for size in sizes.values()), sizes
    assert max(sizes.values()) < len(read_text()) / 4, sizes


def test_builtin_is_every_document_once():
    text = read_text("builtin")
    assert text == builtin_text() == "\n\n".join(text for _, text in sorted_documents())
    every = [document for kind in kinds() for document in documents(kind).values()]
    assert sorted(every) == sorted(document for _, document in sorted_documents())
    assert all(document in text for document in every)


def test_a_document_is_its_file_without_the_names():
    for kind in kinds():
        raw = FOLDER.joinpath(f"{kind}.txt").read_text(encoding="utf-8")
        lines = [line for line in raw.splitlines() if line and not line.startswith("@@@@")]
        assert lines == [line for line in builtin_text(kind).splitlines() if line]


def test_an_unknown_kind_is_refused():
    with pytest.raises(LoadError, match="no such kind"):
        builtin_text("poetry")


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_kinds_are_mixed_evenly(share):
    """Of each kind, so much stands in the first part of the text as the part is of the whole."""
    limit, seen = share * len(read_text()), 0
    before = dict.fromkeys(kinds(), 0)
    for kind, text in sorted_documents():
        before[kind] += max(0, min(len(text), int(limit) - seen))
        seen += len(text) + 2
    for kind, size in before.items():
        whole = sum(len(text) for text in documents(kind).values())
        longest = max(len(text) for text in documents(kind).values())
        assert abs(size - share * whole) <= 1.5 * longest, kind


def test_every_kind_begins_at_once():
    assert [kind for kind, _ in sorted_documents()[: len(kinds())]] == list(kinds())


def test_texts_are_clean():
    boilerplate = r"project gutenberg|\betext|\be-?book|transcriber|www\.|all rights reserved"
    for kind in kinds():
        for name, text in documents(kind).items():
            assert text.replace("\n", "").replace("\t", "").isprintable(), name
            assert not any(line != line.rstrip() for line in text.splitlines()), name
            assert text == text.strip("\n"), name
            assert "\ufffd" not in text, name
            assert not re.search(boilerplate, text, re.IGNORECASE), name
            assert "shakespeare" not in text.lower(), name


def test_no_paragraph_comes_twice():
    seen = {}
    for kind in kinds():
        for name, text in documents(kind).items():
            for paragraph in text.split("\n\n"):
                if len(paragraph) > 40:
                    assert paragraph not in seen, (name, seen.get(paragraph), paragraph)
                    seen[paragraph] = name


@pytest.mark.parametrize(
    "path", ["tinyshakespeare.txt", "wikitext-2/valid.txt", "wikitext-2/test.txt"]
)
def test_nothing_is_evaluated_on_that_was_calibrated_on(path, own_runs):
    if not (DATA / path).is_file():
        pytest.skip(f"needs {path}")
    assert not own_runs & runs((DATA / path).read_text(encoding="utf-8"))


def test_help_is_another_text(own_runs):
    assert not own_runs & runs(read_text("help"))


def test_sources_are_named():
    sources = FOLDER.joinpath("SOURCES.md").read_text(encoding="utf-8")
    for kind, name in re.findall(r"`(\w+)\.txt`: ([\w-]+) \|", sources):
        assert name in documents(kind)
