"""The criterion, from elements to units, by numbers that were worked out by hand."""

import numpy as np
import pytest
import torch

from graphprune.passes.loraprune.criterion import estimated, importance
from graphprune.passes.loraprune.members import Member, members_of
from loraprune.nets import FFN, HEADS, LAYERS, OWNERS, SIZE, program, spans, structure_of

W = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
A = torch.tensor([[[0.1, 0.2]]], dtype=torch.float64)
B = torch.tensor([[[0.3], [-0.4]]], dtype=torch.float64)
SCALE = 2.0


def test_a_gradient_is_estimated_by_those_of_its_adapter():
    da = torch.tensor([[[0.02, -0.01]]], dtype=torch.float64)
    db = torch.tensor([[[0.05], [0.03]]], dtype=torch.float64)
    gradient = estimated(A, B, da, db)[0]
    effective = W + SCALE * (B @ A)[0]
    found = importance(gradient, effective)
    close = {"rtol": 0, "atol": 1e-12}
    wanted = torch.tensor([[0.01, 0.0075], [-0.0056, 0.0103]], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted, **close)
    wanted = torch.tensor([[1.06, -1.88], [0.42, 2.84]], dtype=torch.float64)
    torch.testing.assert_close(effective, wanted, **close)
    right = torch.tensor([[0.0106, 0.0141], [0.002352, 0.029252]], dtype=torch.float64)
    torch.testing.assert_close(found, right, **close)
    rows, columns = found.sum(1).numpy(), found.sum(0).numpy()
    assert rows == pytest.approx([0.0247, 0.031604])
    assert columns == pytest.approx([0.012952, 0.043352])
    member = Member("units", 0, np.array([[0, 1]]), (2,))
    assert member.shares(rows) == pytest.approx([0.61578902, 0.78791077], abs=1e-6)
    assert member.shares(columns) == pytest.approx([0.2862608, 0.95815151], abs=1e-6)


def test_it_is_the_change_of_the_product_in_a_step_of_gradient_descent():
    g = torch.tensor([[0.2, -0.1], [0.05, 0.4]], dtype=torch.float64)
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    (g * (W + SCALE * (b @ a)[0])).sum().backward()
    assert a.grad.flatten().tolist() == pytest.approx([0.08, -0.38])
    assert b.grad.flatten().tolist() == pytest.approx([0.0, 0.17])
    found = estimated(A, B, a.grad, b.grad)
    right = torch.tensor([[0.024, -0.114], [-0.0286, 0.2506]], dtype=torch.float64)
    torch.testing.assert_close(found[0], right, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, B @ A - (B - b.grad) @ (A - a.grad), rtol=0, atol=1e-12)


def test_of_a_new_adapter_only_what_its_random_half_spans_is_seen():
    g = torch.randn(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = torch.randn(1, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(1, 5, 3, dtype=torch.float64)
    found = estimated(a, zero, torch.zeros_like(a), SCALE * g @ a.mT)
    torch.testing.assert_close(found, SCALE * g @ a.mT @ a)


def test_a_member_of_nothing_but_zeros_has_shares_of_zero():
    member = Member("units", 0, np.array([[0, 1]]), (2,))
    assert member.shares(np.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("role", ["kv_heads", "ffn"])
def test_query_heads_belong_to_their_key_value_head(role):
    """LoRAPrune's code gives a key projection as many heads as queries have, of a wrong size."""
    net = program()
    for layer in range(LAYERS):
        name = structure_of(net, layer, role)
        places = spans(layer)[role]
        found = members_of(net, [net.by_name[name]], {weight for weight, _, _ in places})
        assert found.keys() == {weight for weight, _, _ in places}
        for weight, dim, units in places:
            (member,) = found[weight]
            assert (member.structure, member.dim) == (name, dim)
            owners = [next(i for i, u in enumerate(units) if at in u)
                      for at in range(sum(map(len, units)))]  # fmt: skip
            assert member.index.tolist() == [owners]
    heads = members_of(net, [net.by_name[structure_of(net, 0, "kv_heads")]],
                       {"lm.model.layers.0.self_attn.q_proj.weight"})  # fmt: skip
    (member,) = heads["lm.model.layers.0.self_attn.q_proj.weight"]
    assert member.index[0, ::SIZE].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (member.shape, HEADS, FFN) == ((OWNERS,), 8, 12)
