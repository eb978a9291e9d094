"""More instructions: other names of operators, random numbers, writing in place, complex values.

torch defines most of these operators by others, so each has to be as prunable as its definition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from properties.operators import instruction

# One value in, one out, along the last dimension where there is a choice.
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "multiply": lambda x: torch.multiply(x, x.cos()),
    "divide": lambda x: torch.divide(x, 1 + x.abs()),
    "true_divide": lambda x: torch.true_divide(x, 2),
    "subtract": lambda x: torch.subtract(x, x.cos()),
    "negative": torch.negative,
    "absolute": torch.absolute,
    "fix": lambda x: torch.fix(3 * x),
    "greater": lambda x: torch.greater(x, 0.5) * x,
    "less_equal": lambda x: torch.less_equal(x, x.cos()) * x,
    "not_equal": lambda x: x.relu().not_equal(0) * x,
    "expit": torch.special.expit,
    "special softmax": lambda x: torch.special.softmax(x, -1),
    "special log_softmax": lambda x: torch.special.log_softmax(x, -1),
    "special logsumexp": lambda x: torch.special.logsumexp(x, -1),
    "special erfc": torch.special.erfc,
    "ndtr": torch.special.ndtr,
    "xlogy": lambda x: torch.special.xlogy(x, 1 + x.abs()),
    "arcsinh": torch.arcsinh,
    "arctan": torch.arctan,
    "arctan2": lambda x: torch.arctan2(x, 1 + x.abs()),
    "logsigmoid": F.logsigmoid,
    "moveaxis": lambda x: x.moveaxis(0, -1).cos().moveaxis(-1, 0),
    "moveaxis one way": lambda x: x.moveaxis(-1, 1),
    "swapdims": lambda x: x.swapdims(-1, -2),
    "hsplit": lambda x: torch.cat(x.hsplit(2)[::-1], 1),
    "hsplit at": lambda x: x.hsplit([1, 3])[1],
    "dsplit": lambda x: torch.cat(x.dsplit(2)[::-1], 2),
    "vecdot": lambda x: torch.linalg.vecdot(x, x.cos()),
    "inner": lambda x: torch.inner(x, x.cos()),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(-2)),
    "unfold": lambda x: x.unfold(-1, 2, 2),
    "overlapping unfold": lambda x: x.unfold(-1, 2, 1).sum(-1),
    "unfold of rows": lambda x: x.unfold(-2, 2, 1).mT,
    "ravel": lambda x: x.ravel().reshape_as(x),
    "dstack": lambda x: torch.dstack((x, x.cos())),
    "column_stack": lambda x: torch.column_stack((x, x.cos())),
    "nanmean": lambda x: x.nanmean(-1, keepdim=True) * x,
    "nansum": lambda x: x.nansum(-1, keepdim=True) * x,
    "isclose": lambda x: torch.isclose(x, x.cos(), atol=0.5) * x,
    "count_nonzero": lambda x: x.relu().count_nonzero(-1).unsqueeze(-1) * x,
    "dist": lambda x: torch.dist(x, x.cos()) * x,
    "multi_dot": lambda x: torch.linalg.multi_dot((x.flatten(0, -2).T, x.flatten(0, -2))),
    "trapezoid": torch.trapezoid,
    "rot90": lambda x: x.rot90(2, (-2, -1)),
    "mse": lambda x: F.mse_loss(x, x.cos(), reduction="none"),
    "huber": lambda x: F.huber_loss(x, x.cos(), reduction="none"),
    "smooth l1": lambda x: F.smooth_l1_loss(x, x.cos(), reduction="none"),
    "linalg norm": lambda x: torch.linalg.norm(x, dim=-1),
    "hardshrink": F.hardshrink,
    "mish": F.mish,
    "celu": F.celu,
    "tanhshrink": F.tanhshrink,
    "frac": torch.frac,
    "remainder": lambda x: x.remainder(2.5),
    # Sizes that may be told, though they follow from others.
    "told size": lambda x: x.repeat_interleave(2, dim=-1, output_size=2 * x.shape[-1]),
    "told size of rows": lambda x: x.repeat_interleave(3, dim=-2, output_size=3 * x.shape[-2]),
    "told sizes": lambda x: x.split([1, x.shape[-1] - 1], -1)[1],
    "told minimum": lambda x: x.new_zeros(x.shape).scatter_add(
        -1, F.one_hot(x.argmax(-1), x.shape[-1]), x
    ),
    # Complex numbers.
    "turned": lambda x: torch.view_as_real(_pairs(x) * _angles(x)).flatten(-2),
    "real part": lambda x: _pairs(x).real,
    "absolute of complex": lambda x: torch.complex(x, x.cos()).abs(),
    "conjugate": lambda x: (torch.complex(x, x.cos()) * torch.complex(x.sin(), x).conj()).imag,
    "of rows in Fourier space": lambda x: torch.fft.irfft(
        torch.fft.rfft(x, dim=1) * 0.5j, n=x.shape[1], dim=1
    ),
    # Writing in place.
    "set slice": lambda x: _written(x, lambda y: y[..., 1:].copy_(x[..., :-1])),
    "set by index": lambda x: _written(x, lambda y: y.__setitem__((..., 0), 1.0)),
    "add to slice": lambda x: _written(x, lambda y: y[..., :2].add_(x[..., -2:])),
    "scale a row": lambda x: _written(x, lambda y: y[:, 0].mul_(3.0)),
    "set every other": lambda x: _written(x, lambda y: y[..., ::2].copy_(x[..., ::2].cos())),
    "fill where": lambda x: _written(x, lambda y: y.masked_fill_(y > 0.5, 0.25)),
    "zero half": lambda x: _written(x, lambda y: y.chunk(2, -1)[0].zero_()),
}

# Random numbers, of whole values, of parts of them and of places.
NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + torch.randn(x.shape[-1]),
    "rand of rows": lambda x: x * torch.rand(x.shape[-2], 1),
    "noise of a scalar": lambda x: x * (1 + 0.1 * torch.randn(())),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "dropout in use": lambda x: F.dropout(x, 0.5, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "normal_": lambda x: x + torch.empty_like(x).normal_(0.0, 0.1),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "shuffled rows": lambda x: x[:, torch.randperm(x.shape[1])],
    "twice": lambda x: x + torch.randn_like(x) * torch.randn_like(x[..., :1]),
    "and nothing of it": lambda x: x + 0 * torch.randn_like(x),
}


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _angles(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    return torch.polar(torch.ones_like(angle), angle)


def _written(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    y = x * 2
    write(y)
    return y


@instruction
def spelled(step, x, name):
    return SPELLINGS[name](x)


@instruction
def noisy(step, x, name):
    return NOISE[name](x)
