"""One's own code on the command line: `module:factory` and `file.py:factory`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import graphprune as gp
from cli.helpers import Result, check_failure, compile_broken, tree
from graphprune.errors import LoadError

NETS = """
import torch
from torch import nn

from widths import INNER  # beside this file


class Net(nn.Module):
    def __init__(self, inner=INNER):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, inner), nn.ReLU(), nn.Linear(inner, 3)

    def forward(self, x, *, scale=None):
        y = self.down(self.act(self.up(x)))
        return y if scale is None else {"y": y * scale, "parts": [y.sum(-1)]}


class WithExample(Net):
    def example_inputs(self):
        return (torch.zeros(4, 6),)


class Keyed(Net):
    example_inputs = {"x": torch.zeros(4, 6), "scale": torch.ones(4, 1)}


def seeded(kind=Net):
    torch.manual_seed(0)
    return kind().eval()


print("noise that must not reach stdout")


def plain():
    print("more noise")
    return seeded(), (torch.zeros(4, 6),)


def keyword():
    return seeded(), (torch.zeros(4, 6),), {"scale": torch.ones(4, 1)}


def ranged():
    batch = torch.export.Dim("batch", min=2, max=32)
    return seeded(), (torch.zeros(4, 6),), None, {"x": {0: batch}}


def program():
    import graphprune as gp

    return gp.trace(seeded(), (torch.zeros(4, 6),))


def own_example():
    return seeded(WithExample)


def own_keywords():
    return seeded(Keyed)


def wrapped():
    return nn.DataParallel(torch.compile(seeded())), (torch.zeros(4, 6),)


def meta():
    with torch.device("meta"):
        model = Net().eval()
    return model, (torch.zeros(4, 6, device="meta"),)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=40,
                    num_attention_heads=2, num_key_value_heads=2)
    ).eval()


ready = (seeded(), (torch.zeros(4, 6),))
number = 7


def training():
    return Net(), (torch.zeros(4, 6),)


def bare():
    return seeded()


def listed():
    return [seeded(), (torch.zeros(4, 6),)]


def no_tuple():
    return seeded(), torch.zeros(4, 6)


def asks(size):
    return seeded()


def raises():
    return undefined_name


def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package and its folder as the working directory."""
    folder = tmp_path / "code"
    (folder / "mypackage").mkdir(parents=True)
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "nets.py").write_text(NETS.replace("from widths", "from .widths"))
    (folder / "mypackage" / "widths.py").write_text("INNER = 10\n")
    (folder / "nets.py").write_text(NETS)
    (folder / "widths.py").write_text("INNER = 10\n")
    monkeypatch.chdir(folder)
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] in ("mypackage", "widths")]:
        del sys.modules[name]


SOURCES = ("mypackage.nets:plain", "nets.py:plain")


@pytest.mark.parametrize("source", SOURCES)
def test_compile_inspect_verify_eval(
    run: Callable[..., Result], nets: Path, tmp_path: Path, source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = json.loads(run("inspect", source, "--json").out)
    assert data["params"] == 6 * 10 + 10 + 10 * 3 + 3
    output = tmp_path / "slim"
    result = run("compile", source, "-o", output, "--remove", "ffn=0.5", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)  # nothing of what the factory prints is in it
    assert "noise" in result.err
    assert report["kept"] == {"ffn": [5, 10]}
    companions = ["recipe.yaml", "report.html", "report.json"]
    assert tree(output) == ["graphprune_plan.json", "model.pt2", *companions]
    if source.startswith("nets.py"):
        assert report["source"] == f"{nets}/nets.py:plain"
        monkeypatch.chdir(tmp_path)  # the report knows where it was
    result = run("verify", output, "--trust", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["model.pt2"] < 1e-9
    result = run("eval", output / "model.pt2", "--against", report["source"], "--json")
    assert result.code == 0, result.err
    dense = json.loads(result.out)[report["source"]]
    assert (dense["parameters"], dense["bytes"]) == (103, 412)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("plain", 1),
        ("keyword", 2),
        ("ranged", 1),
        ("program", 1),
        ("own_example", 1),
        ("own_keywords", 2),
        ("wrapped", 1),
        ("ready", 1),
    ],
)
def test_what_a_factory_may_return(
    run: Callable[..., Result], nets: Path, tmp_path: Path, name: str, outputs: int
) -> None:
    output = tmp_path / "slim.pt2"
    result = run("compile", f"nets.py:{name}", "-o", output, "--remove", "ffn=0.5")
    assert result.code == 0, result.err
    slim = torch.export.load(output)
    assert slim.state_dict["up.weight"].shape == (5, 6)
    assert len(slim.graph_signature.user_outputs) == outputs
    if name == "ranged":
        assert [(r.lower, r.upper) for r in slim.range_constraints.values()] == [(2, 32)]


def test_a_transformers_model_needs_no_example_and_can_be_a_checkpoint(
    run: Callable[..., Result], nets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    flags = ("--remove", "ffn=0.5", "--score", "magnitude", "--format", "hf", "--format", "onnx")
    result = run("compile", "nets.py:llama", "-o", output, *flags)
    assert result.code == 0, result.err
    assert json.loads((output / "config.json").read_text())["intermediate_size"] == 12
    assert run("verify", output, "--trust").code == 0


def test_an_onnx_file_as_output(run: Callable[..., Result], nets: Path, tmp_path: Path) -> None:
    output = tmp_path / "slim.onnx"
    result = run("compile", "nets.py:plain", "-o", output, "--remove", "ffn=0.5")
    assert result.code == 0, result.err
    assert run("verify", output, "--trust").code == 0


@pytest.mark.parametrize("name", ["plain", "meta"])
def test_weights_from_a_file(
    run: Callable[..., Result], nets: Path, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(5)
    shapes = {"up.weight": (10, 6), "up.bias": (10,), "down.weight": (3, 10), "down.bias": (3,)}
    weights = {n: torch.randn(s) for n, s in shapes.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    output = tmp_path / "slim"
    flags = ("--remove", "ffn=0.5", "--score", "random")
    result = run("compile", f"nets.py:{name}", "-o", output, *flags, "--weights",
                 tmp_path / "weights.safetensors")  # fmt: skip
    assert result.code == 0, result.err
    plan = gp.Plan.load(output / "graphprune_plan.json")
    kept = torch.tensor(plan.kept_units["up.weight:0"])
    slim = torch.export.load(output / "model.pt2").state_dict
    assert torch.equal(slim["up.weight"], weights["up.weight"][kept])
    assert torch.equal(slim["down.weight"], weights["down.weight"][:, kept])
    assert run("verify", output, "--trust").code == 0  # with the same weights


def test_tied_weights_stay_tied(tmp_path: Path, nets: Path) -> None:
    (nets / "tied.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    m = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()\n"
        "    m[2].weight = m[0].weight\n"
        "    return m, (torch.zeros(2, 4),)\n"
    )
    weight = torch.randn(4, 4)
    weights = {"2.weight": weight, "0.bias": torch.zeros(4), "2.bias": torch.ones(4)}
    save_file(weights, tmp_path / "w.safetensors")
    program = gp.load("tied.py:build", tmp_path / "w.safetensors")
    assert program.aliases == {"2.weight": "0.weight"}
    assert torch.equal(program.weights["0.weight"], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("up.bias"), "lacks a weight"),
        (lambda w: w.update(other=torch.ones(1)), "no such weight"),
        (lambda w: w.update({"up.bias": torch.ones(11)}), "(10,) torch.float32, the file (11,)"),
        (lambda w: w.update({"up.bias": torch.ones(10).half()}), "(10,) torch.float16"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_weights_that_do_not_fit(
    run: Callable[..., Result],
    nets: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    weights = {k: v.clone() for k, v in gp.load("nets.py:plain").weights.items()}
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    flags = ("--remove", "ffn=0.5", "--weights", tmp_path / "w.safetensors")
    check_failure(compile_broken(run, "nets.py:plain", tmp_path, *flags), message, "w.safetensors")


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("mypackage.nuts:plain", ["can't import mypackage.nuts", "No module named"]),
        ("nuts.py:plain", ["no such file", "nuts.py"]),
        ("nets.py:plane", ["no 'plane' in nets.py", "did you mean 'plain'?"]),
        ("nets.py:number", ["it returned int", "graphprune.Program"]),
        ("nets.py:listed", ["it returned list"]),
        ("nets.py:no_tuple", ["it returned (Net, Tensor)"]),
        ("nets.py:bare", ["has no example inputs", "return (module, args)"]),
        ("nets.py:asks", ["the factory raised", "TypeError", "'size'"]),
        ("nets.py:raises", ["the factory raised", "NameError", "nets.py:"]),
        ("nets.py:leaves", ["the factory raised", "SystemExit"]),
        ("nets.py:training", ["training mode", "module.eval()"]),
        ("broken.py:plain", ["can't import broken.py", "SyntaxError", "broken.py:2"]),
        ("exits.py:plain", ["can't import exits.py", "SystemExit"]),
    ],
)
def test_each_mistake_is_one_message_and_leaves_nothing(
    run: Callable[..., Result], nets: Path, tmp_path: Path, source: str, messages: list[str]
) -> None:
    (nets / "broken.py").write_text("x = 1\ndef (:\n")
    (nets / "exits.py").write_text("import sys\nsys.exit(3)\n")
    path = list(sys.path)
    check_failure(compile_broken(run, source, tmp_path), *messages)
    check_failure(run("inspect", source), *messages)
    assert sys.path == path


def test_a_checkpoint_of_what_is_no_transformers_model_is_refused_at_once(
    run: Callable[..., Result], nets: Path, tmp_path: Path
) -> None:
    flags = ("--remove", "ffn=0.5", "--format", "hf")
    result = compile_broken(run, "nets.py:plain", tmp_path, *flags)
    check_failure(result, "only a transformers model", "pt2 or onnx")
    assert "checking weights" not in result.err
    (tmp_path / "x.pt2").touch()
    check_failure(compile_broken(run, tmp_path / "x.pt2", tmp_path, *flags), "only a transformers")


def test_weights_of_their_own_go_with_a_factory_only(tmp_path: Path, nets: Path) -> None:
    for source in (tmp_path, "nobody/nothing", tmp_path / "x.pt2"):
        with pytest.raises(LoadError, match="only the module of a factory"):
            gp.load(source, tmp_path / "w.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(LoadError, match="into a program"):
        gp.load("nets.py:program", tmp_path / "w.safetensors")


def test_the_output_may_not_replace_the_source(
    run: Callable[..., Result], nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the working directory may not be replaced, either
    (nets / "graphprune_plan.json").touch()
    flags = ("--remove", "ffn=0.5", "--overwrite")
    check_failure(run("compile", nets / "nets.py:plain", "-o", nets, *flags), "replace the source")


def test_a_report_runs_no_code(run: Callable[..., Result], nets: Path, tmp_path: Path) -> None:
    """What was compiled may come from elsewhere, with a report that names code beside it."""
    code = nets / "code.py"
    code.write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n{NETS}")
    output = tmp_path / "slim.pt2"
    flags = ("--remove", "ffn=0.5", "--score", "magnitude", "-o", output)
    assert run("compile", f"{code}:plain", *flags).code == 0
    (tmp_path / "canary").unlink()
    check_failure(run("verify", output), "the report names code", "code.py:plain", "--trust")
    assert not (tmp_path / "canary").exists()
    assert run("verify", output, "--source", f"{code}:plain").code == 0
    assert (tmp_path / "canary").exists()
