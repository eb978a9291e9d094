"""The native library for tests: built from the sources where there is a compiler."""

import functools
import os
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

from graphprune.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def extension():
    """How pyproject.toml says to build it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = project["tool"]["setuptools"]["ext-modules"]
    return found


@functools.cache
def build():
    """Compile into a temporary folder; None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="graphprune-native-")
    build.folder = folder  # removed when the process ends
    library = Path(folder.name) / "_native.so"
    made = extension()
    flags = [*made["extra-compile-args"], "-fPIC", "-shared", "-Wall", "-Wextra"]
    sources = [ROOT / source for source in made["sources"]]
    command = [compiler, *flags, *sources, *made["extra-link-args"], "-o", library]
    subprocess.run([str(word) for word in command], check=True)
    return library


@pytest.fixture(scope="module")
def library():
    """The path of a fresh library, which `native` uses meanwhile; else of an installed one."""
    built = build()
    if built is None:
        if not native.available():
            pytest.skip("no C++ compiler, and no native library that was built before")
        yield native.path()
        return
    loaded = built, native.load(built), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "find_library", lambda: loaded)
        yield built
