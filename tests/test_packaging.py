"""The layout rules that no type checker enforces, and that what is installed works by itself."""

import json
import os
import runpy
import shutil
import sysconfig
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from graphprune.calibration.text.builtin import builtin_text
from op_guide import build_kernels, onnx_example, torch_example
from op_guide import module as operators
from op_guide import points as operator_points
from pass_guide import install as install_guide
from pass_guide import modules, points
from wheel import ROOT, TOPS, install, run


def declared_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["tool"]["setuptools"]["packages"])


def source_folders():
    """Folders of the checkout that hold Python sources, without following the symlinks."""
    for top in TOPS:
        for folder, _, files in os.walk(ROOT / top):
            if any(name.endswith(".py") for name in files):
                yield Path(folder).relative_to(ROOT)


def test_every_source_folder_is_packaged():
    packages = {
        ".".join(folder.parts if folder.parts[0] == "graphprune" else ("graphprune", *folder.parts))
        for folder in source_folders()
    }
    assert packages <= declared_packages(), "list the new folder in pyproject.toml"


def test_every_package_is_a_folder():
    absent = {name for name in declared_packages() if not (ROOT / name.replace(".", "/")).is_dir()}
    assert not absent


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_the_symlinks_point_beside_the_package(name):
    link = ROOT / "graphprune" / name
    assert link.is_symlink()
    assert Path(os.readlink(link)) == Path("..", name)


def test_kernels_stays_a_namespace_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_root_has_no_conftest():
    assert not (ROOT / "conftest.py").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs' folder of an environment that holds the built wheel and not the checkout."""
    return install(tmp_path_factory.mktemp("installed"))


def tiny_llama(folder):
    """Save a random Llama as a checkpoint; return the size of its feed-forward layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return config.intermediate_size


def test_the_wheel_runs_outside_of_the_checkout(installed, tmp_path):
    question = "import graphprune.passes; print(graphprune.passes.__file__)"
    printed = run(installed / "python", "-c", question, cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(installed.parent)
    version = runpy.run_path(str(ROOT / "graphprune" / "_version.py"))["__version__"]
    assert version in run(installed / "graphprune", "--version", cwd=tmp_path)


def test_the_wheel_has_the_built_in_text(installed, tmp_path):
    question = """
from hashlib import sha256
from graphprune.calibration.text.builtin import builtin_text
from importlib.resources import files
assert files("graphprune.calibration.text.builtin").joinpath("SOURCES.md").is_file()
print(sha256(builtin_text().encode()).hexdigest())
"""
    printed = run(installed / "python", "-c", question, cwd=tmp_path)
    assert printed.strip() == sha256(builtin_text().encode()).hexdigest()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_wheel_has_the_native_library(installed, tmp_path):
    question = "from graphprune.kernels import native; print(native.path(), native.variant())"
    library, variant = run(installed / "python", "-c", question, cwd=tmp_path).split()
    assert Path(library).is_relative_to(installed.parent)
    assert variant


def test_the_wheel_compiles_a_checkpoint(installed, tmp_path):
    source, output = tmp_path / "dense", tmp_path / "slim"
    size = tiny_llama(source)
    options = ["--remove", "ffn=0.25", "--score", "magnitude", "--format", "hf"]
    run(installed / "graphprune", "compile", source, "-o", output, *options, cwd=tmp_path)
    slim = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert slim["intermediate_size"] == size * 3 // 4
    assert (output / "model.safetensors").is_file()


@pytest.fixture
def beside(installed):
    """The package of both guides, to passes and to operators, beside the installed wheel."""
    base = {"base": str(installed.parent), "platbase": str(installed.parent)}
    made = install_guide(
        Path(sysconfig.get_path("purelib", "venv", base)),
        {**modules(), "pruning": operators()},
        {**points(), "graphprune.ops": operator_points()},
    )
    build_kernels(made[0])
    yield
    for folder in made:
        shutil.rmtree(folder)


@pytest.mark.usefixtures("beside")
def test_passes_of_another_package_work_together(installed, tmp_path):
    """Every kind of pass of docs/writing-a-pass.md, in an environment of its own."""
    kinds = ("scores", "masks", "allocations", "repairs", "passes")
    assert points().keys() == {f"graphprune.{kind}" for kind in kinds}
    (tmp_path / "net.py").write_text(
        "import numpy, torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    layers = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)\n"
        "    return nn.Sequential(*layers).eval(), (torch.randn(2, 5),)\n"
        "drawn = numpy.random.default_rng(0).random((16, 5), numpy.float32)\n"
        "numpy.savez('data.npz', input=drawn)\n"
    )
    run(installed / "python", "net.py", cwd=tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "steps:\n"
        "- clip: {share: 0.9}\n"
        "- select: {remove: {ffn: 0.25}, score: {name: power, p: 2}}\n"
        "- repair: louder\n"
        "- sparsify: {method: columns, sparsity: 50%, budget: later}\n"
        "calibration: {data: data.npz}\n"
    )
    command = ["compile", "net.py:build", "recipe.yaml", "-o", "slim.pt2"]
    run(installed / "graphprune", *command, cwd=tmp_path)
    report = json.loads((tmp_path / "slim.pt2.report.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in report["passes"]] == ["clip", "select", "repair", "sparsify"]
    assert report["score"] == "power"
    assert report["kept"] == {"ffn": [9, 12]}
    assert report["refits"]["method"] == "louder"
    assert report["masks"]["method"].startswith("columns")
    assert "later" in report["masks"]["asked"]


@pytest.mark.usefixtures("beside")
def test_torch_operators_of_another_package(installed, tmp_path):
    """The two of docs/adding-an-operator.md: one has an axis rule, one needs every rule."""
    model = torch_example().partition("\n\nprogram =")[0]
    (tmp_path / "net.py").write_text(
        f"import torch\nimport mylib.pruning\n{model}\n\ndef build():\n"
        "    torch.manual_seed(0)\n"
        "    return Model().eval(), (torch.randn(5, 6),)\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "{remove: {'out.weight:1': 0.5, 'a.weight:0/1': 0.34}, score: random}"
    )
    command = ["compile", "net.py:build", "recipe.yaml", "-o", "slim.pt2"]
    run(installed / "graphprune", *command, cwd=tmp_path)
    report = json.loads((tmp_path / "slim.pt2.report.json").read_text(encoding="utf-8"))
    assert list(report["kept"].values()) == [[4, 12]]  # 2 of 4 heads, and 2 of 3 in each


@pytest.mark.usefixtures("beside")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_an_onnx_operator_of_another_package(installed, tmp_path):
    """The one of docs/adding-an-operator.md, proved with the kernel of its own library."""
    made = onnx_example().partition("\nprogram =")[0]
    run(installed / "python", "-c", f"import numpy as np\n{made}", cwd=tmp_path)
    (tmp_path / "recipe.yaml").write_text("{remove: {'out:0': 0.5, 'a:1/1': 0.34}, score: random}")
    command = ["compile", "net.onnx", "recipe.yaml", "-o", "slim.onnx"]
    run(installed / "graphprune", *command, cwd=tmp_path)
    report = json.loads((tmp_path / "slim.onnx.report.json").read_text(encoding="utf-8"))
    assert list(report["kept"].values()) == [[4, 12]]  # 2 of 4 heads, and 2 of 3 in each
