"""Several sizes at once, against float64 least squares on what the dense layers read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.passes.repair import together
from graphprune.passes.repair.structured import obs
from graphprune.passes.repair.together import Size, Together, can_share, obs_together
from graphprune.streaming import State
from residual import Net, reads


@pytest.fixture(scope="module")
def net() -> tuple[Net, Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    module = Net(80).eval()
    samples = [torch.randn(1, 600, 6) for _ in range(4)]
    return module, gp.trace(module, (samples[0],)), samples


def wide(program: Any) -> list[str]:
    return [s.name for s in program.structures if s.prunable and s.size == 80]


def test_each_size_is_fitted_to_what_the_dense_layers_read(net):
    module, program, samples = net
    first, second = wide(program)
    sizes = [Size({first: keep, second: keep}) for keep in (60, 40, 20)]
    found = obs_together(program, samples, sizes, damping=1e-9)
    for size, one in zip(sizes, found, strict=True):
        for name, layer in ((first, "outs.0"), (second, "outs.1")):
            kept = list(one.plan.kept_units[name])
            assert len(kept) == size.keep[name]
            x = reads(module, layer, samples)
            dense = module.get_submodule(layer).weight.detach().double()
            new = one.program.weights[f"{layer}.weight"].detach().double()
            assert not new[:, [i for i in range(80) if i not in kept]].any()
            best = torch.linalg.lstsq(x[:, kept], x @ dense.T).solution
            lost, least = (
                float((x @ dense.T - x[:, kept] @ w.T).square().sum()) for w in (new[:, kept],
                                                                                best.T)
            )  # fmt: skip
            assert lost == pytest.approx(least, rel=2e-2, abs=1e-6)


def test_one_descent_passes_all_sizes(net):
    _, program, samples = net
    first, _ = wide(program)
    found = obs_together(program, samples, [Size({first: keep}) for keep in (20, 60, 40)])
    small, large, middle = (set(one.plan.kept_units[first]) for one in found)
    assert small < middle < large


def test_a_single_layer_is_chosen_as_by_obs(net):
    """The first layer sees the dense model in both."""
    _, program, samples = net
    first, _ = wide(program)
    (shared,) = obs_together(program, samples, [Size({first: 40})])
    alone = obs(program, samples, {first: 40})
    same = set(shared.plan.kept_units[first]) & set(alone.plan.kept_units[first])
    assert len(same) >= 36  # the local search may exchange a few


def test_sizes_are_taken_up_where_a_run_stopped(net, tmp_path, monkeypatch):
    _, program, samples = net
    first, second = wide(program)
    sizes = [Size({first: keep, second: keep}) for keep in (60, 20)]
    whole = obs_together(program, samples, sizes)

    class Stopped(Exception):
        pass

    def stop(step):
        raise Stopped

    saved = {"folder": tmp_path / "weights"}
    with pytest.raises(Stopped):
        obs_together(program, samples, sizes, progress=stop, state=State(tmp_path / "run"), **saved)
    treated = []
    treat = Together.treat
    monkeypatch.setattr(Together, "treat", lambda self, group, *rest: treated.append(group.index)
                        or treat(self, group, *rest))  # fmt: skip
    state = State(tmp_path / "run", resume=True)
    again = obs_together(program, samples, sizes, state=state, **saved)
    assert treated == [1]  # the first layer was done
    for one, other in zip(whole, again, strict=True):
        assert one.plan.kept_units == other.plan.kept_units
        assert [e.error for e in one.layers] == [e.error for e in other.layers]
        for name in ("outs.0.weight", "outs.1.weight"):
            assert torch.equal(one.program.weights[name], other.program.weights[name])


def test_layers_and_residual_channels_share_nothing(gqa, make_llama):
    roles = {s.role: s for s in gqa.structures if s.prunable}
    ffn, hidden = (next(s for s in gqa.structures if s.role == r) for r in ("ffn", "hidden"))
    assert can_share(gqa, Size({ffn.name: 40}))
    assert not can_share(gqa, Size({hidden.name: 24}))
    assert "layers" in roles
    plan = gp.select(gqa, remove={"layers": 1 / 3})
    assert not can_share(gqa, Size({ffn.name: 40}, plan))


def test_heads_keep_their_own_queries_at_every_size(make_llama):
    program = make_llama(heads=8, kv=2, hidden=64)
    samples = torch.randint(0, 96, (4, 16))
    ragged = [s for s in program.structures if s.role == "query_heads"]
    sizes = [Size({s.name: keep for s in ragged}) for keep in (3, 2, 1)]
    found = obs_together(program, samples, sizes)
    for size, one in zip(sizes, found, strict=True):
        for s in ragged:
            assert np.shape(one.plan.kept_units[s.name]) == (2, size.keep[s.name])
        slim = gp.apply(one.program, one.plan)
        gp.verify(one.program, one.plan, slim).raise_if_failed()


def test_plenty_of_tokens_are_looked_at_as_one(gqa, monkeypatch):
    """With 16 tokens for each input no half is fitted, and nothing else comes out."""
    torch.manual_seed(1)
    windows = torch.randint(0, 96, (24, 64))
    ffn = {s.name: s.size // 2 for s in gqa.structures if s.role == "ffn"}
    halves = []
    gather = together.gathered
    monkeypatch.setattr(together, "gathered", lambda *a: halves.append(a[2]) or gather(*a))
    (one,) = obs_together(gqa, windows, [Size(ffn)])
    assert set(halves) == {1}
    monkeypatch.setattr(together, "PLENTY", 10**9)
    (other,) = obs_together(gqa, windows, [Size(ffn)])
    assert set(halves) == {1, 2}
    assert one.plan.kept_units == other.plan.kept_units
    for before, after in zip(one.layers, other.layers, strict=True):
        assert before.error == pytest.approx(after.error, rel=1e-3)
