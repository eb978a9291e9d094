"""What docs/adding-an-operator.md shows, and the package that its reader would make of it."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding-an-operator.md"


def blocks(language):
    """The code of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def module():
    """The code of mylib/pruning.py: two torch operators, their rules, those of an ONNX one."""
    operator, rule, means, _, onnx, _ = blocks("python")
    return "\n\n".join((operator, rule, means, onnx))


def torch_example():
    """The code that tests the two torch operators, after that of the module."""
    return blocks("python")[3]


def onnx_example():
    """The code that tests the ONNX operator, after that of the module."""
    return blocks("python")[5]


def points():
    """The entry points that the guide registers, by name."""
    found = {}
    for block in blocks("toml"):
        found |= tomllib.loads(block)["project"]["entry-points"]["graphprune.ops"]
    return found


def build_kernels(folder):
    """Compile the ONNX operator's kernel to kernels.so; whether there is a compiler."""
    if shutil.which("g++") is None:
        return False
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-I", ROOT / "kernels" / "native"]
    source, target = ROOT / "tests" / "ops" / "head_means.cpp", folder / "kernels.so"
    subprocess.run(["g++", *map(str, flags), str(source), "-o", str(target)], check=True)
    return True
