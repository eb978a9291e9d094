"""An environment that holds the built wheel, and not the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("graphprune", "kernels", "passes")


def install(folder: Path) -> Path:
    """Build the wheel and install it into a new environment in a folder; return its programs'."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(*pip, *build, copy_of_checkout(folder / "checkout"))
    (wheel,) = folder.glob("graphprune-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    purelib = Path(sysconfig.get_path("purelib", "venv", base))
    # The dependencies come from where the tests run. A folder named in a .pth file is searched
    # last, and its own .pth files, such as the hook of an editable install, are not read.
    places = [place for place in sys.path if Path(place).name == "site-packages"]
    (purelib / "dependencies.pth").write_text("".join(f"{place}\n" for place in places))
    programs = Path(sysconfig.get_path("scripts", "venv", base))
    python = programs / "python"
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed", wheel)
    return programs


def copy_of_checkout(target: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in the checkout."""
    for name in TOPS:
        ignore = shutil.ignore_patterns("__pycache__", "_native*.so")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def run(*command: object, cwd: Path | None = None, **given: str) -> str:
    """Run a program with some variables; return what it printed, and show it if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **given}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
