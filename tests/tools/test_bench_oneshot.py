"""The plain implementation that `tools/bench oneshot` compares with does what the papers say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from solvers.oracle import damped, smallest, surgery

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import _bench_oneshot_billion as billion  # type: ignore[import-not-found]
import _bench_oneshot_plain as plain  # type: ignore[import-not-found]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = torch.randint(50, (5, 16), generator=torch.Generator().manual_seed(1))


def read(model, layer):
    """The rows that a layer reads."""
    found = []
    hook = layer.register_forward_hook(lambda module, args, output: found.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return found[0].flatten(0, 1)


def test_sparsegpt_is_optimal_brain_surgery(model):
    layer = model.model.layers[0].mlp.up_proj
    weight, hessian = layer.weight.detach().clone(), damped(read(model, layer))
    plain.prune(model, TOKENS, "sparsegpt", 0.5)
    count = weight.numel() // 2 + 1  # it takes what is at the threshold too
    wanted, kept = surgery(
        weight, hessian, step=24, choose=lambda j, scores: ~smallest(scores, count)
    )
    found = layer.weight.detach().numpy()
    assert np.array_equal(found != 0, kept)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_wanda_takes_the_lowest_of_every_row(model):
    layer = model.model.layers[0].mlp.up_proj
    weight, x = layer.weight.detach().clone(), read(model, layer)
    plain.prune(model, TOKENS, "wanda", 0.5)
    scores = weight.abs() * x.norm(dim=0)
    kept = scores >= scores.sort(dim=1).values[:, 12:13]
    assert torch.equal(layer.weight.detach(), weight * kept)


def test_later_blocks_read_what_pruned_ones_give(model):
    plain.prune(model, TOKENS, "wanda", 0.5)
    layer = model.model.layers[1].self_attn.q_proj
    torch.manual_seed(0)
    before = LlamaForCausalLM(model.config).eval()  # the dense weights again
    weight = before.model.layers[1].self_attn.q_proj.weight.detach()
    scores = weight.abs() * read(model, layer).norm(dim=0)
    kept = scores >= scores.sort(dim=1).values[:, 12:13]
    assert torch.equal(layer.weight.detach(), weight * kept)


def test_the_large_model_is_a_checkpoint(tmp_path, monkeypatch):
    small = {"HIDDEN": 16, "LAYERS": 2, "VOCABULARY": 30}
    for name, value in small.items():
        monkeypatch.setattr(billion, name, value)
    monkeypatch.setattr(billion, "SHAPES", {"mlp.up_proj": (8, 16)})
    billion.write(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.hidden_size, config.num_hidden_layers) == (2048, 16)
    names = set()
    for file in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                assert opened.get_tensor(name).dtype == torch.bfloat16
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"} < names
    assert len(names) == 2 + 2 * 3
