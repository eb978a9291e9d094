"""Make the checkout's virtual environment, .venv, with nothing but the standard library.

The tools beside this file call it first, so that each of them runs on a machine that has only
Python 3.11 or later. The environment is made once, and brought up to date whenever
pyproject.toml or constraints.txt changes. (Plain syntax only: an older Python may read this file
in order to find the newer one.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)


def ensure_venv() -> Path:
    """Make or update .venv and return the folder that holds its programs.

    Raises:
        SystemExit: No Python will do, or an installation failed; the reason has been printed.
    """
    VENV.mkdir(exist_ok=True)
    with (VENV / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (STAMP.exists() and STAMP.read_text() == _digest()):
            if not (_version(PYTHON) >= OLDEST and _quiet(PYTHON, "-m", "pip", "--version")):
                _create()
            _install()
            STAMP.write_text(_digest())
    return PYTHON.parent


def inside() -> bool:
    """Whether the environment's Python runs this; .venv may be a link to it."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def reexecute() -> None:
    """Start the running script again under .venv's interpreter; does not return.

    Raises:
        SystemExit: It already runs there, so that starting it again would not help.
    """
    ensure_venv()
    if inside():
        raise SystemExit(f"{VENV} lacks something it should have: remove it and try again")
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


def environment() -> dict[str, str]:
    """The environment that the tools run programs in: .venv first, hubs offline."""
    return {
        **os.environ,
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "VIRTUAL_ENV": str(VENV),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _digest() -> str:
    content = hashlib.sha256()
    native = sorted((ROOT / "kernels" / "native").iterdir())  # compiled by the installation
    for file in (ROOT / "pyproject.toml", ROOT / "constraints.txt", *native):
        content.update(file.read_bytes())
    return content.hexdigest()


def _create() -> None:
    """Make an empty environment with the first suitable Python that can."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], OLDEST[1] + 4)]
    found = [sys.executable, *map(shutil.which, [*names, "python3"])]
    suitable = [path for path in found if path and _version(path) >= OLDEST]
    for python in suitable:
        if _quiet(python, "-m", "venv", VENV):
            return
    wanted = ".".join(map(str, OLDEST))
    reason = "none of them can make a venv: install its venv module" if suitable else "none found"
    raise SystemExit(f"graphprune's tools need Python {wanted} or later: {reason}")


def _install() -> None:
    """Install the project, editable, and everything that its tests and checks use."""
    pins = CONSTRAINTS.read_text().splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    _pip(torch)
    if _torch_brings_triton():
        pins = [pin for pin in pins if not pin.startswith("triton==")]
    effective = VENV / "constraints.txt"
    effective.write_text("\n".join(pins) + "\n")
    _pip("--constraint", str(effective), "--editable", f"{ROOT}[cpu,test,dev]")


def _torch_brings_triton() -> bool:
    """Tell a CUDA build of torch, which insists on the triton it was made with."""
    (metadata,) = VENV.glob("lib/*/site-packages/torch-*.dist-info/METADATA")
    return "\nRequires-Dist: triton" in metadata.read_text(encoding="utf-8")


def _pip(*arguments: str) -> None:
    print("pip install", *arguments, file=sys.stderr, flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += arguments
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"pip could not install {arguments[-1]}")


def _version(python: str | Path) -> tuple[int, ...]:
    """Return an interpreter's version, or () if it does not run."""
    try:
        done = subprocess.run([str(python), "-V"], capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return tuple(map(int, re.findall(r"\d+", done.stdout)[:2]))


def _quiet(*command: str | Path) -> bool:
    try:
        return not subprocess.run(list(map(str, command)), capture_output=True).returncode
    except OSError:
        return False
