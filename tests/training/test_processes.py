"""Two processes train what one does, with zeros held on their shares."""

import json

import pytest
import torch
from safetensors.torch import load_file

from graphprune.training import Training
from graphprune.training.core.order import Order
from training.gloo import together
from training.nets import Net, labelled, masks
from training.workers import held, train, train_wide, two


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_equal_one(tmp_path, fsdp, kind):
    """Batches of 4, once as 2 + 2; the last one has 2 samples of 14."""
    options = {"train": kind, "loss": "kd+ce", "batch": 4, "lr": 1e-2, "precision": "float32"}
    options |= {"dropout": 0.0, "micro_batch": 2}
    together(two, tmp_path, {**options, "fsdp": fsdp})
    weights = load_file(tmp_path / "two.safetensors")
    losses, zeros, tokens = json.loads((tmp_path / "two.json").read_text())
    one = train({**options, "micro_batch": None})
    assert losses == pytest.approx(one.losses, abs=1e-6)
    assert tokens == one.tokens == 14 * 5
    assert weights.keys() == one.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, one.weights[name], rtol=0, atol=1e-6)
        if name in masks():
            removed = ~masks()[name]
            assert not weight[removed].view(torch.int32).any()
            assert zeros[name] == int(removed.sum())


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_all_that_differs_is_rounding(tmp_path, fsdp, kind):
    """In float64 nothing does, to 1e-12.

    Counts of labels differ among samples, so that processes have different ones; the last step has
    3 samples, which are 2 and 1; the norm of the gradients is cut down in each step.
    """
    options = {**WIDE, "train": kind}
    together(two, tmp_path, {**options, "fsdp": fsdp, "micro_batch": 1}, train_wide)
    weights = load_file(tmp_path / "two.safetensors")
    losses, _, tokens = json.loads((tmp_path / "two.json").read_text())
    one = train_wide(options)
    assert losses == pytest.approx(one.losses, rel=1e-12)
    assert tokens == one.tokens
    for name, weight in weights.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, one.weights[name], rtol=0, atol=1e-12)
    if kind == "full":
        wanted, sizes = plain(Training(**options))
        assert min(sizes) > options["clip"]
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-12)


WIDE = {
    "loss": "kd+ce", "batch": 4, "lr": 1e-2, "precision": "float32", "dropout": 0.0, "clip": 0.05
}  # fmt: skip


def plain(training):
    """Weights, and norms of gradients, by a loop that knows of no micro-batches or processes."""
    torch.manual_seed(0)
    net, teacher = Net().double(), Net().double()
    kept, given = masks(), labelled()
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    order = Order(15, 15, training.batch, training.seed)
    norms = []
    for step in range(-1, order.steps):
        if step >= 0:
            chosen = order.samples(step)
            ids, labels = given["ids"][chosen], given["labels"][chosen][:, 1:]
            counted = labels != -100
            ours, theirs = (model(ids)[:, :-1][counted].log_softmax(-1) for model in (net, teacher))
            entropy = -ours.gather(1, labels[counted][:, None]).mean()
            divergence = (theirs.exp() * (theirs - ours)).sum(1).mean()
            ((entropy + divergence) / 2).backward()
            for name, mask in kept.items():
                parameters[name].grad *= mask
            norms.append(float(sum(p.grad.square().sum() for p in parameters.values())) ** 0.5)
            for parameter in parameters.values():
                parameter.grad *= min(1.0, training.clip / norms[-1])
            optimizer.param_groups[0]["lr"] = training.rate(step, order.steps)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in kept.items():
                parameters[name].masked_fill_(~mask, 0.0)
    return {name: p.detach() for name, p in parameters.items()}, norms


@pytest.mark.parametrize("given", ["before", "after"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_zeros_are_held_in_a_loop_of_ones_own(tmp_path, wrap, given):
    """Hooks on parameters are lost where FSDP exchanges these; masks are filled into its shares."""
    together(held, tmp_path, wrap, given)
    left, zeros = json.loads((tmp_path / "held.json").read_text())
    assert left == {"0.weight": 0, "2.weight": 0}
    assert zeros == {"0.weight": 281, "2.weight": 260}
