"""The scores of units against LoRAPrune's formulas, computed anew in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from graphprune.errors import TrainingError
from graphprune.training import recover
from graphprune.training.core.order import Order
from loraprune.nets import (
    LAYERS,
    Net,
    Watched,
    data,
    halves,
    options,
    program,
    pruner,
    spans,
    structure_of,
    unit_scores,
)

ROLES = ("kv_heads", "ffn")
KEPT = 0.9


def weights():
    return [name for layer in range(LAYERS) for role in ROLES for name, *_ in spans(layer)[role]]


def check_scores(net, found, importances, rtol=1e-9):
    """Compare with averages over steps of what each step shows."""
    for layer in range(LAYERS):
        for role in ROLES:
            wanted = 0
            for elements in importances:
                wanted = KEPT * wanted + (1 - KEPT) * unit_scores(layer, role, elements)
            name = structure_of(net, layer, role)
            np.testing.assert_allclose(found.scores[name], wanted, rtol=rtol)


def test_gradients_of_weights_are_those_of_the_mean_over_tokens_unclipped():
    """Batches of 4 samples, in micro-batches of 3 and 1, whose gradients are cut down a lot."""
    net = program(torch.float64)
    training = options(steps=3, lr=0.0, clip=1e-3, micro_batch=3)
    events = pruner(net, halves(gradient="weight", initial=1.0, final=0.0), training)
    recover(net, data(), training, callbacks=[events])
    order, module, importances = Order(14, 12, 4, 0), Net().double().eval(), []
    for step in range(3):
        ids = data()[order.samples(step)]
        logits = module(ids)[:, :-1].flatten(0, 1)
        module.zero_grad()
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        importances.append({
            name: (module.get_parameter(name).grad * module.get_parameter(name)).abs()
            .detach().numpy() for name in weights()
        })  # fmt: skip
    check_scores(net, events, importances, rtol=1e-6)  # norms compute in float32 at any rate


def test_gradients_of_adapters_stand_for_those_of_weights():
    net = program(torch.float64)
    training = options(steps=8)
    importances = []

    def looked(trainable, step, scale):
        found = {}
        for name in weights():
            adapter, original = trainable.adapter(name), trainable.original(name)
            a, b, da, db, w = (
                x.detach().numpy()
                for x in (adapter.a[0], adapter.b[0], adapter.a.grad[0] * scale,
                          adapter.b.grad[0] * scale, original)
            )  # fmt: skip
            left = 1.0 if adapter.removed is None else ~adapter.removed.numpy()
            found[name] = np.abs((db @ a + b @ da - db @ da) * left * (w + 2.0 * b @ a))
        importances.append(found)

    events = pruner(net, halves(), training)
    recover(net, data(), training, callbacks=[Watched(events, looked)])
    assert events.finished
    assert [e.step for e in events.events][-1] == 8
    check_scores(net, events, importances)


@pytest.mark.parametrize("scale", [1024, 65536])
def test_the_scale_of_a_loss_changes_nothing(scale):
    """With LoRAPrune's code other units go where losses are scaled, as they are in half precision.

    Its estimate has a part of first and one of second order in the gradients.
    """

    def scaled(k):
        def loss(model, ids):
            logits = model(ids)[:, :-1].flatten(0, 1)
            labels = ids[:, 1:].flatten()
            return k * F.cross_entropy(logits, labels, reduction="sum"), k * labels.numel()

        return loss

    net, training = program(), options(precision="float32")
    found = []
    for k in (1, scale):
        events = pruner(net, halves(), training)
        recover(net, data(), training, loss=scaled(k), callbacks=[events])
        found.append(events)
    assert found[0].plan == found[1].plan
    for name, scores in found[0].scores.items():
        assert np.array_equal(scores, found[1].scores[name])


@pytest.mark.parametrize(("what", "value"), [("gradient", float("nan")), ("weight", float("inf"))])
def test_what_is_no_number_is_named(what, value):
    net, training = program(), options()
    name = weights()[3]

    def looked(trainable, step, scale):
        if step == 2:
            with torch.no_grad():
                place = (
                    trainable.adapter(name).b.grad
                    if what == "gradient"
                    else trainable.original(name)
                )
                place.view(-1)[0] = value

    events = Watched(pruner(net, halves(), training), looked)
    with pytest.raises(TrainingError, match=f"a {what} is NaN or infinite") as error:
        recover(net, data(), training, callbacks=[events])
    assert error.value.where == f"{name}, step 2"
