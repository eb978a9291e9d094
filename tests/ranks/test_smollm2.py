"""Processes that share SmolLM2 find what one finds alone."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from models.cache import model_path
from ranks.compared import compare
from ranks.workers import real, smollm2
from training.gloo import together


@pytest.mark.slow  # prunes 135 million weights three times, and refits as many
def test_masks_units_and_refits(tmp_path):
    model = str(model_path("smollm2"))
    one = tmp_path / "one"
    one.mkdir()
    for name, found in real(model).items():
        save_file(found, one / f"{name}-0.safetensors")
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        together(smollm2, folder, model, world=world, patience=3 * 3600)
        for job in ("masks", "units"):
            compare(folder, world, job, one)
