"""More instructions: what is left of the operator families, in the forms that models use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from properties.operators import instruction

# One value in, one out; every dimension may be pruned or not. `n` is the last dimension.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "movedim": lambda x: x.movedim(0, -1).movedim(-1, 0),
    "mT": lambda x: x.mT,
    "squeeze": lambda x: x.unsqueeze(-2).squeeze(-2),
    "squeeze all": lambda x: x.unsqueeze(-2).squeeze(),
    "squeeze none": lambda x: x.squeeze(-1),
    "bits": lambda x: x.view(torch.int32) / 2**31,
    "hstack": lambda x: torch.hstack((x, x.cos())),
    "vstack": lambda x: torch.vstack((x, x.cos())),
    "expand_as": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "broadcast": lambda x: x.amax(-1, keepdim=True).broadcast_to(x.shape) - x,
    "tile": lambda x: x.tile(2),
    "tensor_split": lambda x: torch.cat(x.tensor_split(3, -1)[::-1], -1),
    "narrow": lambda x: x.narrow(-1, 1, x.shape[-1] - 1),
    "narrow from the end": lambda x: x.narrow(-1, -2, 2),
    "reshape_as": lambda x: x.flatten().reshape_as(x),
    "take along": lambda x: x.take_along_dim(x.argmax(-1, keepdim=True), -1),
    "take one": lambda x: x.take_along_dim(x.mean(-2, True).argmax(-1, keepdim=True), -1),
    "interleaved": lambda x: torch.stack((x[..., ::2], x[..., 1::2]), -1).flatten(-2),
    "evens and odds": lambda x: torch.cat((x[..., ::2], x[..., 1::2]), -1),
    "halves": lambda x: torch.stack(x.chunk(2, -1), -2).sum(-2),
    "roll twice": lambda x: x.roll((1, 2), (-1, -2)),
    "flip twice": lambda x: x.flip(-1, -2),
    "reflect": lambda x: F.pad(x, (1, 1) * (x.dim() - 2), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 0) * (x.dim() - 2), "replicate"),
    "circular": lambda x: F.pad(x, (1, 1) * (x.dim() - 2), "circular"),
    "crop": lambda x: F.pad(x, (-1, 0)),
    "shift": lambda x: F.pad(x, (0, 0, 1, 0))[..., :-1, :],
    "diff": lambda x: x.diff(dim=-1),
    "triu": lambda x: x.triu(1),
    "diagonal": lambda x: (x.mT @ x).diagonal(dim1=-2, dim2=-1),
    "gram": lambda x: x.mT @ x,
    "outer": lambda x: x.unsqueeze(-1) * x.unsqueeze(-2),
    "cdist": lambda x: torch.cdist(x, x.flip(-2)),
    "cosine": lambda x: F.cosine_similarity(x, x.cos(), dim=-1),
    "baddbmm": lambda x: torch.baddbmm(x, x @ x.mT, x) if x.dim() == 3 else x,
    "tensordot": lambda x: torch.tensordot(x, x, ([0], [0])),
    "std": lambda x: x.std(-1),
    "std_mean": lambda x: torch.cat([s.unsqueeze(-1) for s in torch.std_mean(x, -1)], -1),
    "var_mean": lambda x: x - torch.var_mean(x, -1, keepdim=True)[1],
    "aminmax": lambda x: x - torch.aminmax(x, dim=-1, keepdim=True).min,
    "median": lambda x: x.median(-1).values,
    "l1": lambda x: x.norm(1, -1),
    "max norm": lambda x: torch.linalg.vector_norm(x, float("inf"), -1, True) + x,
    "min norm": lambda x: torch.linalg.vector_norm(x, float("-inf"), -1, True) + x,
    "cumprod": lambda x: x.cumprod(-1),
    "cummax": lambda x: x.cummax(-1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "any": lambda x: (x > 1).any(-1, keepdim=True) * x,
    "all": lambda x: torch.where((x < 1).all(-1, keepdim=True), x, 0.5),
    "count": lambda x: (x > 0).sum(-1, keepdim=True) * x,
    "argmin": lambda x: F.one_hot(x.argmin(-1), x.shape[-1]).to(x.dtype) + x,
    "amax mask": lambda x: (x == x.amax(-1, keepdim=True)).to(x.dtype) * x,
    "top mask": lambda x: torch.where(x >= x.topk(2, -1).values[..., -1:], x, 0.0),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(-1, x.topk(2, -1).indices, x[..., :2]),
    "index_fill": lambda x: x.index_fill(-1, torch.tensor([0, 1]), 2.0),
    "index_add": lambda x: x.index_add(-1, torch.tensor([1, 0]), x[..., :2]),
    "index_put": lambda x: x.clone().index_put((torch.tensor([0]),), x[:1] * 2),
    "fancy": lambda x: x[..., torch.tensor([1, 0, 1])],
    "causal": lambda x: torch.where(
        torch.arange(x.shape[-2])[:, None] >= torch.arange(x.shape[-1]), x, 0.0
    ),
    "ramp": lambda x: x * torch.linspace(0, 1, x.shape[-1]),
    "counted": lambda x: x + torch.arange(x.shape[-1]),
    "eye": lambda x: x @ torch.eye(x.shape[-1]),
    "ones": lambda x: x + torch.ones(x.shape[-1]) * torch.full_like(x, 0.5),
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j
    ).flatten(-2),
    "fft": lambda x: torch.fft.rfft(x, dim=-1).abs(),
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x.cos(), x.sin(), value=0.5),
    "pow": lambda x: x.abs().pow(1.5) + 2**-x,
    "logaddexp": lambda x: torch.logaddexp(x, x.cos()),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "float": lambda x: x.double().float(),
    "log1p": lambda x: x.abs().log1p(),
    "reciprocal": lambda x: 1 / x.cosh(),
    "clamp_by": lambda x: x.clamp(max=x.mean(-1, keepdim=True)),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "fold": lambda x: F.fold(F.unfold(x, 2), x.shape[-2:], 2),
    "channels last": lambda x: x.movedim(1, -1),
    "grid": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), x.shape, align_corners=False),
        align_corners=False,
    ),
    "response norm": lambda x: F.local_response_norm(x, 3),
    "opaque": lambda x: torch.linalg.matrix_exp(x[..., :2, :2].tanh()),
}  # fmt: skip


@instruction
def form(step, x, name):
    return FORMS[name](x)


@instruction
def prelu(step, x):
    return step.module(lambda: nn.PReLU(x.shape[1]))(x)


@instruction
def weight_norm(step, x, out):
    make = nn.utils.parametrizations.weight_norm
    return step.module(lambda: make(nn.Linear(x.shape[-1], out)))(x)


@instruction
def two_sided(step, a, b, out):
    """A bilinear form per output."""
    return step.module(lambda: nn.Bilinear(a.shape[-1], b.shape[-1], out))(a, b)


@instruction
def cell(step, x, kind, hidden):
    """Some steps of a cell, written as a loop over dimension 1."""
    make = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[kind]
    run = step.module(lambda: make(x.shape[-1], hidden))
    state: Any = None
    for i in range(min(3, x.shape[1])):
        state = run(x[:, i], state)
    return state[0] if kind == "lstm" else state


@instruction
def projected(step, x, hidden, out):
    """An LSTM with projections; its last state."""
    make = lambda: nn.LSTM(x.shape[-1], hidden, batch_first=True, proj_size=out)  # noqa: E731
    return step.module(make)(x)[1][0].squeeze(0)


@instruction
def multihead(step, x, heads):
    """torch's own attention module."""
    make = lambda: nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)  # noqa: E731
    return step.module(make)(x, x, x, need_weights=False)[0]


@instruction
def encoder_layer(step, x, heads, width):
    make = lambda: nn.TransformerEncoderLayer(  # noqa: E731
        x.shape[-1], heads, width, batch_first=True, norm_first=width % 2 == 0
    )
    return step.module(make)(x)


@instruction
def bias_table(step, scores, rows):
    """A learnt bias per head and relative position: rows of a table at constant places."""
    n, m = scores.shape[-2:]
    table = step.parameter(rows, scores.shape[1])
    places = step.buffer(lambda: torch.arange(n * m).remainder(rows))
    return scores + table[places].view(n, m, -1).permute(2, 0, 1)


@instruction
def dispatched(step, x, scores, width):
    """A loop over experts, each on all tokens, weighted by its share where it was chosen."""
    n, dim = scores.shape[-1], x.shape[-1]
    up, down = step.parameter(n, 2 * width + dim, dim).split((width, width + dim), 1)
    values, places = scores.softmax(-1).topk(min(2, n), -1)
    share = torch.zeros_like(scores).scatter(-1, places, values)
    y = torch.zeros_like(x)
    for e in range(n):
        hidden = F.silu(x @ up[e].T)
        y = y + share[:, e, None] * (hidden @ down[e][:width])
    return y


@instruction
def lora(step, x, rank, out):
    """A frozen weight and an update of low rank."""
    a, b = step.parameter(rank, x.shape[-1] + out).split((x.shape[-1], out), 1)
    return F.linear(x, step.buffer(lambda: torch.randn(out, x.shape[-1]))) + (x @ a.T) @ b


@instruction
def scan(step, x, state):
    """A state space: a learnt decay per channel and state, one place after the other."""
    decay = step.parameter(x.shape[-1], state)
    h = x[:, 0, :, None] * decay
    ys = []
    for i in range(min(3, x.shape[1])):
        h = h * torch.exp(-decay.exp()) + x[:, i, :, None]
        ys.append(h.sum(-1))
    return torch.stack(ys, 1)
