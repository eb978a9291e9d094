"""Complaints about recurrent layers (structured.md, section 3 D): cut gate by gate, in place."""

import pytest
import torch
from torch import nn

import graphprune as gp
from regressions.hand import gone, kept, plan_of, structure_at, verified
from zoo.case import randomise


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(5, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_34_hidden_units_are_cut_out_of_every_gate(kind, gates):
    module = randomise(Tagger(kind))
    x = torch.randn(2, 6, 5)
    program = gp.trace(module, (x,))
    units = gone(7, 1, 4, 5)
    plan = plan_of(program, (structure_at(program, "head.weight", 1), units))
    slim = verified(program, plan)
    stacked = [gate * 7 + u for gate in range(gates) for u in units]
    assert kept(program, plan, "body.weight_ih_l0") == [stacked, [*range(5)]]
    assert kept(program, plan, "body.weight_hh_l0") == [stacked, units]
    assert kept(program, plan, "body.bias_ih_l0") == [stacked]
    by_hand = kind(5, 4, batch_first=True)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            cut = getattr(module.body, name)[stacked]
            parameter.copy_(cut[:, units] if "hh" in name and cut.dim() == 2 else cut)
        wanted = by_hand(x)[0] @ module.head.weight[:, units].T + module.head.bias
        torch.testing.assert_close(slim.module(x), wanted)
    assert type(slim.module.body) is kind
    assert slim.module.body.hidden_size == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_tracing_says_nothing_of_the_list_that_torch_keeps_of_weights(kind, recwarn):
    gp.trace(randomise(Tagger(kind)), (torch.randn(2, 6, 5),))
    gp.trace(kind(5, 7).eval(), (torch.randn(2, 6, 5),))
    assert not [w for w in recwarn if "assigned during export" in str(w.message)]


def test_a_tensor_that_the_model_assigns_is_still_warned_of():
    class Stateful(Tagger):
        def forward(self, x):
            self.last = x * 2
            return super().forward(self.last)

    with pytest.warns(UserWarning, match=r"self\.last.* assigned during export"):
        gp.trace(randomise(Stateful(nn.GRU)), (torch.randn(2, 6, 5),))
