"""Checkpoints with code of their own: it runs where ``--trust`` says so, and nobody is asked.

Every piece of code makes a file when it runs, the canary.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.calibration.text.read import load_tokenizer
from graphprune.cli import app as cli
from graphprune.frontends.hf.load import checkpoint_class

CONFIG = """
from transformers import PretrainedConfig

open({canary!r}, "w").close()
print("noise on stdout")


class OwnConfig(PretrainedConfig):
    model_type = "graphprune-own"

    def __init__(self, hidden_size=16, intermediate_size=32, vocab_size=20, **kwargs):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

open({canary!r}, "w").close()


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        x = self.embed(input_ids)
        x = x + self.down(torch.relu(self.up(x)))
        return CausalLMOutput(logits=self.head(x))
"""
SIDE = """
open({canary!r}, "w").close()
raise RuntimeError("this has been run")
"""
SHAPES = {"embed": (20, 16), "up": (32, 16), "down": (16, 32), "head": (20, 16)}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of the test's own for the code that transformers imports."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def own(tmp_path: Path, canary: Path) -> Path:
    """A checkpoint whose configuration and model are its own code."""
    folder = tmp_path / f"own_{tmp_path.name.replace('-', '_')}"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIG.format(canary=str(canary)))
    (folder / "modeling_own.py").write_text(MODEL.format(canary=str(canary)))
    torch.manual_seed(0)
    weights = {f"{n}.weight": torch.randn(s) for n, s in SHAPES.items()}
    biases = {f"{n}.bias": torch.randn(s[0]) for n, s in SHAPES.items() if n != "embed"}
    save_file(weights | biases, folder / "model.safetensors", metadata={"format": "pt"})
    data = {
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
        "model_type": "graphprune-own",
    }
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved_llama(tmp_path / "llama", vocab_size=32)


def saved_llama(folder: Path, vocab_size: int) -> Path:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def changed(folder: Path, file: str = "config.json", **entries: object) -> Path:
    path = folder / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | entries))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_code_does_not_run_on_a_yes(
    own: Path, canary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody, or `yes`, agrees to whatever is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    code, out, err = run(capsys, "inspect", own, "--json")
    assert code == 1
    assert json.loads(out)["error"]["kind"] == "LoadError"
    assert err.count("error: ") == 1
    assert "configuration_own.py, modeling_own.py" in err
    assert "--trust" in err
    assert not canary.exists()
    assert sys.stdin.read() == "y\n" * 10


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "compile": lambda own, tmp: ("compile", own, "-o", tmp / "out", "--remove", "ffn=0.5"),
    "eval": lambda own, tmp: ("eval", own),
    "pack": lambda own, tmp: ("pack", own, "-o", tmp / "out"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code(
    name: str, own: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *COMMANDS[name](own, tmp_path))
    assert (code, out) == (1, "")
    assert "it wasn't run" in err
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_python_does_not_run_code(own: Path, canary: Path) -> None:
    with pytest.raises(gp.LoadError, match="it wasn't run"):
        gp.load(own)
    with pytest.raises(gp.LoadError, match="it wasn't run"):
        gp.runtime.model(own)
    assert not canary.exists()


def test_a_class_of_its_own_for_a_known_configuration(llama: Path, canary: Path) -> None:
    (llama / "modeling_own.py").write_text(SIDE.format(canary=str(canary)))
    entries = {"AutoModelForCausalLM": "modeling_own.Special"}
    changed(llama, architectures=["Special"], auto_map=entries)
    with pytest.raises(gp.LoadError) as caught:
        gp.load(llama)
    assert "modeling_own.py" in str(caught.value)
    assert not canary.exists()


def test_code_that_nothing_needs_is_left_alone(llama: Path, canary: Path) -> None:
    """transformers has both classes: the checkpoint opens as usual."""
    (llama / "modeling_own.py").write_text(SIDE.format(canary=str(canary)))
    entries = {k: "modeling_own.X" for k in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    changed(llama, auto_map=entries)
    config, model_class = checkpoint_class(llama)
    assert model_class is LlamaForCausalLM
    assert not hasattr(config, "auto_map")
    assert not canary.exists()


def test_trusted_code_runs(own: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", own, "--json", "--trust")
    assert code == 0, err
    roles = {s["role"]: s["size"] for s in json.loads(out)["structures"] if s["prunable"]}
    assert roles["ffn"] == 32
    assert canary.exists()


def test_a_teacher_is_trusted_as_the_source_is(
    own: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, ids = saved_llama(tmp_path / "student", vocab_size=20), tmp_path / "ids.npy"
    model = LlamaForCausalLM.from_pretrained(student)
    model.lm_head.weight.data *= 100  # sure of what comes next
    model.save_pretrained(student)
    begun = torch.arange(8)[:, None]
    np.save(ids, model.generate(begun, max_new_tokens=5, do_sample=False, eos_token_id=None))
    words = ("recover", student, "--teacher", own, "--data", ids, "--tokens", 48, "--batch", 4)
    code, out, err = run(capsys, *words, "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "it wasn't run" in err
    assert "--trust" in err
    assert "reading" not in err  # before anything takes long
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, *words, "-o", tmp_path / "out", "--trust")
    assert code == 0, err
    assert canary.exists()


@pytest.mark.slow  # two more processes import transformers
def test_trusted_code_works_from_end_to_end(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = tmp_path / "slim"
    flags = ("--remove", "ffn=0.5", "--score", "magnitude", "--repair", "none", "--trust")
    code, _, err = run(capsys, "compile", own, "-o", slim, *flags)
    assert code == 0, err
    assert run(capsys, "verify", slim)[0] == 1
    assert run(capsys, "verify", slim, "--trust")[0] == 0
    # A fresh process with plain transformers; and what it computes, by hand.
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(m(torch.arange(20)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, slim, tmp_path / "y.pt"], check=True)
    plan = gp.Plan.load(slim / "graphprune_plan.json")
    kept = torch.tensor([int(str(unit)) for unit in plan.kept_units["up.weight:0"]])
    weights = gp.load(own, trust=True).weights
    x = weights["embed.weight"]
    up = nn.functional.linear(x, weights["up.weight"][kept], weights["up.bias"][kept]).relu()
    x = x + nn.functional.linear(up, weights["down.weight"][:, kept], weights["down.bias"])
    y = nn.functional.linear(x, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(torch.load(tmp_path / "y.pt")[0], y)


ELSEWHERE = ["evil/repository--modeling_own.OwnModel", "../outside.OwnModel", "absent.OwnModel"]


@pytest.mark.parametrize("reference", ELSEWHERE)
def test_trusted_code_lies_in_the_directory(reference: str, own: Path, canary: Path) -> None:
    """Code that can't be read beside the checkpoint isn't what was trusted."""
    (own.parent / "outside.py").write_text(SIDE.format(canary=str(canary)))
    for kind in ("AutoConfig", "AutoModelForCausalLM"):
        entries = json.loads((own / "config.json").read_text())["auto_map"]
        folder = changed(own, auto_map=entries | {kind: reference})
        with pytest.raises(gp.LoadError, match="isn't in its directory"):
            gp.load(folder, trust=True)
        changed(own, auto_map=entries)


def test_the_code_of_a_tokenizer_does_not_run(llama: Path, canary: Path) -> None:
    (llama / "tokenization_own.py").write_text(SIDE.format(canary=str(canary)))
    entries = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    changed(llama, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=entries)
    changed(llama, model_type="graphprune-none")
    with pytest.raises(gp.LoadError) as caught:
        load_tokenizer(llama)
    assert "tokenization_own.py" in str(caught.value)
    assert not canary.exists()
    with pytest.raises(gp.LoadError, match="this has been run"):
        load_tokenizer(llama, trust=True)
    assert canary.exists()


@pytest.mark.parametrize("kind", ["image processor", "feature extractor"])
def test_the_code_of_a_processor_does_not_run(kind: str, tmp_path: Path, canary: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    from graphprune.checkpoints.own_code import open_part

    auto = AutoImageProcessor if kind == "image processor" else AutoFeatureExtractor
    (tmp_path / "processing_own.py").write_text(SIDE.format(canary=str(canary)))
    changed(tmp_path, "preprocessor_config.json", auto_map={auto.__name__: "processing_own.Own"})
    with pytest.raises(gp.LoadError) as caught:
        open_part(auto, tmp_path, f"the {kind}", trust=False)
    assert "processing_own.py" in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernels_are_fetched(key: str, llama: Path) -> None:
    """A configuration can name a repository, whose code would compute the attention."""
    changed(llama, **{key: "evil/kernels"})
    config, _ = checkpoint_class(llama)
    assert config._attn_implementation is None
    assert "evil" not in config.to_json_string()


def test_nested_configurations_name_no_code() -> None:
    from transformers import LlavaConfig

    from graphprune.checkpoints.own_code import without_code, without_kernels

    config = LlavaConfig(
        text_config={"model_type": "llama", "auto_map": {"AutoModel": "a--b.C"}},
        vision_config={"model_type": "clip_vision_model", "attn_implementation": "evil/kernels"},
    )
    assert config.text_config.auto_map
    config = without_kernels(without_code(config))
    assert not hasattr(config.text_config, "auto_map")
    assert config.vision_config._attn_implementation is None


def test_pickled_weights_are_not_opened(
    llama: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bait:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(canary), "w")

    (llama / "model.safetensors").unlink()
    torch.save({"x": Bait()}, llama / "pytorch_model.bin")
    gp.load(llama)
    flags = ("--remove", "ffn=0.5", "-o", tmp_path / "out")
    code, out, err = run(capsys, "compile", llama, *flags)
    assert (code, out) == (1, "")
    assert "pytorch_model.bin" in err
    assert "safetensors" in err
    assert not canary.exists()
