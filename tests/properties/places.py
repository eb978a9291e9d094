"""More instructions: places as values (top-k, gather, routing), recurrent layers, made weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from properties.operators import instruction


@instruction
def gates(step, x, k):
    """The k largest of the last dimension, zero elsewhere."""
    values, places = x.topk(k, -1)
    return torch.zeros_like(x).scatter(-1, places, values)


@instruction
def bank(step, x, scores, k, width):
    """Tokens ``[tokens, in]`` through the weights of their k best experts, in turn."""
    weights = step.parameter(scores.shape[-1], x.shape[-1], width)
    values, places = scores.topk(k, -1)
    y = torch.einsum("ti,tkio->tko", x, weights[places])
    return (y * values.softmax(-1).unsqueeze(-1)).sum(1)


@instruction
def gather_best(step, x, k, dim):
    """The values at the places of the k largest, looked up."""
    return x.cos().gather(dim, x.topk(k, dim).indices)


@instruction
def one_hot_best(step, x):
    return F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) * x


@instruction
def best_row(step, x):
    """The row of a table that the largest of the last dimension points to."""
    return step.module(lambda: nn.Embedding(x.shape[-1], 6))(x.argmax(-1))


@instruction
def positions(step, x):
    """A learnt vector per place, added."""
    table = step.module(lambda: nn.Embedding(x.shape[-2], x.shape[-1]))
    return x + table(torch.arange(x.shape[-2]))


@instruction
def ordered(step, x, dim):
    return x.gather(dim, x.argsort(dim, descending=True, stable=True))


@instruction
def recurrent(step, x, kind, hidden, layers=1, bidirectional=False):
    make = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
    return step.module(
        lambda: make(x.shape[-1], hidden, layers, batch_first=True, bidirectional=bidirectional)
    )(x)[0]


@instruction
def affine(step, x, out):
    """A product and a bias in one operator, with a weight that lies the other way round."""
    return torch.addmm(step.parameter(out + x.shape[1], out)[x.shape[1]:].mean(0), x,
                       step.parameter(out + x.shape[1], out)[: x.shape[1]])  # fmt: skip


@instruction
def scaled(step, x, *shape):
    """A learnt scale of one number."""
    return x * step.parameter(*shape)


@instruction
def standardised_conv(step, x, out, kernel):
    """Weights without mean and of unit variance over what each output sums."""
    w = step.parameter(out, x.shape[1], kernel, kernel)
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, correction=0) + 1)
    return F.conv2d(x, w, padding=kernel // 2)


@instruction
def weight_normed(step, x, out):
    w = step.parameter(out, x.shape[-1])
    return F.linear(x, w / (1 + w.norm(dim=1, keepdim=True)))


@instruction
def linear_by(step, x, w):
    """A linear whose weight is a value."""
    return F.linear(x, w)


@instruction
def biased_sdpa(step, q, k, v):
    """Attention with a learnt bias per head."""
    bias = step.parameter(q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@instruction
def in_place(step, x):
    y = x * 2
    y.relu_()
    y += 1
    y.mul_(0.5)
    return y


@instruction
def overwritten(step, x, dim, start, stop):
    """Some places of a dimension set from others."""
    y = x.clone()
    y.narrow(dim, start, stop - start).mul_(2)
    return y


@instruction
def masked(step, x, other):
    return x.masked_fill(other > 0.5, -1.0)


@instruction
def dotted(step, a, b):
    """einsum with an ellipsis and an implied result."""
    return torch.einsum("...i,...i", a, b)


@instruction
def diagonal_scale(step, x):
    """A product with a diagonal matrix that is made from a parameter."""
    return x @ torch.diag_embed(step.parameter(x.shape[-1]))
