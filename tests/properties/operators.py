"""What the instructions of a random graph compute: one function per instruction.

Each takes a `Step`, which owns parameters and submodules, then its operand tensors, then constants.
A size in a shape may be ``("B", k)``, which stands for k times the batch of the first input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Step(Protocol):
    """An instruction at its place in a module."""

    batch: Any

    def module(self, make: Callable[[], nn.Module]) -> nn.Module: ...
    def parameter(self, *shape: int) -> Tensor: ...
    def buffer(self, make: Callable[[], Tensor]) -> Tensor: ...
    def of(self, index: int) -> nn.Module: ...
    def tie(self, index: int) -> Tensor: ...
    def layers(self, blocks: Any) -> nn.ModuleList: ...


OPERATORS: dict[str, Callable[..., Any]] = {}


def instruction(f: Callable[..., Any]) -> Callable[..., Any]:
    OPERATORS[f.__name__.rstrip("_")] = f
    return f


def sizes(step: Step, given: Any) -> list[Any]:
    return [step.batch * n[1] if isinstance(n, tuple) else n for n in given]


# Parameters and what multiplies by them.


@instruction
def param(step, *shape):
    return step.parameter(*shape)


@instruction
def buffer(step, *shape):
    return step.buffer(lambda: torch.randn(*shape))


@instruction
def linear(step, x, out, bias=True):
    return step.module(lambda: nn.Linear(x.shape[-1], out, bias))(x)


@instruction
def reuse(step, x, index):
    """The module of another instruction, on another value."""
    return step.of(index)(x)


@instruction
def tied(step, x, index):
    """The weight of another instruction, under a name of its own, one way round or the other."""
    w = step.tie(index)
    return F.linear(x, w) if x.shape[-1] == w.shape[1] else x @ w


@instruction
def embedding(step, ids, rows, dim):
    return step.module(lambda: nn.Embedding(rows, dim))(ids)


@instruction
def conv(step, x, out, kernel, groups=1, stride=1):
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()]
    return step.module(lambda: kind(x.shape[1], out, kernel, stride, kernel // 2, groups=groups))(x)


@instruction
def conv_transpose(step, x, out, kernel, groups=1):
    kind = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d}[x.dim()]
    return step.module(lambda: kind(x.shape[1], out, kernel, groups=groups))(x)


@instruction
def bilinear(step, x, out):
    """A raw weight ``[out, in]`` used through einsum."""
    return torch.einsum("...i,oi->...o", x, step.parameter(out, x.shape[-1]))


@instruction
def layers(step, x, *blocks):
    """Blocks of a module list, each a list of instructions whose value 0 is its input."""
    for block in step.layers(blocks):
        x = block(x)
    return x


# Contractions of values.


@instruction
def matmul(step, a, b):
    return a @ b


@instruction
def einsum(step, a, b, equation):
    return torch.einsum(equation, a, b)


@instruction
def sdpa(step, q, k, v, causal=False, grouped=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


# Moving data.


@instruction
def shrunk(step, x, factor):
    return x * factor


@instruction
def reshape(step, x, *shape):
    return x.reshape(sizes(step, shape))


@instruction
def flatten(step, x, start, end):
    return x.flatten(start, end)


@instruction
def unflatten(step, x, dim, *shape):
    return x.unflatten(dim, shape)


@instruction
def permute(step, x, *order):
    return x.permute(order)


@instruction
def transpose(step, x, a, b):
    return x.transpose(a, b)


@instruction
def unsqueeze(step, x, dim):
    return x.unsqueeze(dim)


@instruction
def squeeze(step, x, dim):
    return x.squeeze(dim)


@instruction
def expand(step, x, *shape):
    return x.expand(sizes(step, shape))


@instruction
def repeat(step, x, *times):
    return x.repeat(times)


@instruction
def repeat_interleave(step, x, times, dim):
    return x.repeat_interleave(times, dim)


@instruction
def cat(step, *args):
    return torch.cat(args[:-1], args[-1])


@instruction
def stack(step, *args):
    return torch.stack(args[:-1], args[-1])


@instruction
def split(step, x, parts, dim):
    return x.split(parts, dim)


@instruction
def chunk(step, x, n, dim):
    return x.chunk(n, dim)


@instruction
def unbind(step, x, dim):
    return x.unbind(dim)


@instruction
def get(step, values, index):
    return values[index]


@instruction
def slice_(step, x, dim, start, stop, stride=1):
    return x[(slice(None),) * dim + (slice(start, stop, stride),)]


@instruction
def select(step, x, dim, index):
    return x.select(dim, index)


@instruction
def pad(step, x, amounts, mode="constant", value=0.0):
    return F.pad(x, amounts, mode, value) if mode == "constant" else F.pad(x, amounts, mode)


@instruction
def take(step, x, dim, places):
    """A constant re-indexing."""
    return x.index_select(dim, step.buffer(lambda: torch.tensor(places)))


@instruction
def flip(step, x, dim):
    return x.flip(dim)


@instruction
def roll(step, x, shift, dim):
    return x.roll(shift, dim)


@instruction
def pixel_shuffle(step, x, r):
    return F.pixel_shuffle(x, r)


@instruction
def pixel_unshuffle(step, x, r):
    return F.pixel_unshuffle(x, r)


# Elementwise and along a dimension.

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "cos": torch.cos,
    "neg": torch.neg,
    "abs": torch.abs,
    "softplus": F.softplus,
    "square": torch.square,
    "plus one": lambda x: x + 1,
    "one minus": lambda x: 1 - x,
    "half": lambda x: x / 2,
    "contiguous": lambda x: x.contiguous(),
    "positive": lambda x: torch.where(x > 0, x, 0.1 * x),
    "clamp": lambda x: x.clamp(-1, 1),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "maximum": torch.maximum,
    "div": lambda a, b: a / (1 + b.abs()),
    "where": lambda a, b: torch.where(a > 0, a, b),
}
REDUCE: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
    "logsumexp": torch.logsumexp,
    "var": lambda x, dim, keepdim: x.var(dim, correction=0, keepdim=keepdim),
    "norm": lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim),
    "max": lambda x, dim, keepdim: x.max(dim[0], keepdim).values,
    "prod": lambda x, dim, keepdim: x.prod(dim[0], keepdim),
}
ALONG: dict[str, Callable[..., Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "cumsum": torch.cumsum,
    "normalize": lambda x, dim: F.normalize(x, dim=dim),
    "sort": lambda x, dim: x.sort(dim).values,
}


@instruction
def unary(step, x, name):
    return UNARY[name](x)


@instruction
def binary(step, a, b, name):
    return BINARY[name](a, b)


@instruction
def reduce(step, x, name, dims, keepdim=False):
    return REDUCE[name](x, dim=dims, keepdim=keepdim)


@instruction
def along(step, x, name, dim):
    return ALONG[name](x, dim=dim)


@instruction
def topk(step, x, k, dim):
    return x.topk(k, dim).values


@instruction
def tril(step, x):
    return x.tril()


@instruction
def glu(step, x, dim):
    return F.glu(x, dim)


@instruction
def layer_norm(step, x, n=1, affine=True):
    return step.module(lambda: nn.LayerNorm(x.shape[-n:], elementwise_affine=affine))(x)


@instruction
def rms_norm(step, x):
    return step.module(lambda: nn.RMSNorm(x.shape[-1], eps=1e-6))(x)


@instruction
def rms_by_hand(step, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * step.parameter(x.shape[-1])


@instruction
def group_norm(step, x, groups):
    return step.module(lambda: nn.GroupNorm(groups, x.shape[1]))(x)


@instruction
def batch_norm(step, x):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()]
    return step.module(lambda: kind(x.shape[1]))(x)


@instruction
def instance_norm(step, x):
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d}[x.dim()]
    return step.module(lambda: kind(x.shape[1], affine=True))(x)


@instruction
def pool(step, x, name):
    rank = x.dim() - 2
    function = {
        ("avg", 1): lambda x: F.avg_pool1d(x, 2, ceil_mode=True),
        ("avg", 2): lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
        ("max", 1): lambda x: F.max_pool1d(x, 3, 1, 1),
        ("max", 2): lambda x: F.max_pool2d(x, 3, 1, 1),
        ("adaptive", 1): lambda x: F.adaptive_avg_pool1d(x, 1),
        ("adaptive", 2): lambda x: F.adaptive_avg_pool2d(x, 1),
        ("upsample", 1): lambda x: F.interpolate(x, scale_factor=2),
        ("upsample", 2): lambda x: F.interpolate(x, scale_factor=2),
    }[name, rank]
    return function(x)
