"""Both sides of `tools/bench train` do the same work."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import _bench_train_sides as sides  # type: ignore[import-not-found]
from _bench_train import PARTS, Settings  # type: ignore[import-not-found]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    windows = torch.randint(50, (6, 12), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(sides, "_windows", lambda settings: windows)
    return Settings(str(tmp_path), windows=2, length=12, steps=2)


class Turns:
    """Counts them."""

    def __init__(self):
        self.count = 0

    def after_step(self):
        self.count += 1


@pytest.mark.parametrize("part", PARTS)
def test_both_train_on_the_same(part, settings):
    ours, theirs = Turns(), Turns()
    first = sides._ours(part, settings, ours)
    second = sides._trainer(part, settings, theirs)
    assert first == pytest.approx(second, rel=1e-3)
    assert ours.count == theirs.count == settings.steps + 1
