"""Recurrent layers and cells: the hidden state is one axis, whatever the number of layers.

The gates are stacked in one weight, ``gates * hidden``. States of removed units stay zero if they
begin at zero, so that nothing here depends on which units exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.axes import Dims, Expr, concat, product
from graphprune.ops.context import Context, Minimum, Operand, Operator, RuleError
from graphprune.ops.families.pointwise import RANDOM

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def layers(ctx: Context, op: Operator) -> list[Dims]:
    """lstm, gru, rnn_tanh, rnn_relu over padded sequences.

    The state ``[layers * directions, batch, hidden]`` is one tensor, so all layers and both
    directions keep the same hidden units. With projections (LSTM) the output has its own axis.
    """
    if "batch_sizes" in op.arguments:
        raise RuleError("packed sequences")
    x = op["input"].dims
    time = 1 if op["batch_first"] and len(x) == 3 else 0
    ctx.freeze(x[time], "each step continues from the last")
    state, memory = _states(op["hx"])
    for begin in (state, memory or ()):
        for a, b in zip(begin[1:-1], x[1 - time : 2 - time], strict=False):
            ctx.unify(a, b)  # the batch
    hidden = (memory or state)[-1]
    if op.get("train") and op.get("dropout"):
        ctx.freeze(state[-1], RANDOM)
    projected = hidden.size != state[-1].size
    if projected:  # torch tells projections from none by comparing the two sizes
        ctx.typing.minima.append(Minimum(hidden, state[-1].size + 1, above=state[-1]))
    else:
        ctx.unify(state[-1], hidden)
    directions = 2 if op["bidirectional"] else 1
    each = (2 if op["has_biases"] else 0) + (3 if projected else 2)
    parameters = [p.dims for p in op["params"]]
    runs = op["num_layers"] * directions
    if len(parameters) != runs * each:
        raise RuleError(f"{len(parameters)} parameters for {runs} runs of {each}")
    out = concat([state[-1]] * directions)
    gates = GATES[op.name.rpartition(".")[2]]
    for run in range(runs):
        inside = x[-1] if run < directions else out
        given = parameters[run * each : (run + 1) * each]
        _cell(ctx, x[:-1], inside, (state[-1], hidden), given, gates)
    results: list[Dims] = [(*x[:-1], out), state]
    return [*results, memory] if memory else results


def cell(ctx: Context, op: Operator) -> list[Dims]:
    """lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell: one step of one layer."""
    x = op["input"].dims
    state, memory = _states(op["hx"])
    for begin in (state, memory or state):
        for a, b in zip(begin, (*x[:-1], state[-1]), strict=True):
            ctx.unify(a, b)
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    given = [op[n].dims for n in names if isinstance(op.get(n), Operand)]
    gates = GATES[op.name.rpartition(".")[2].removesuffix("_cell")]
    _cell(ctx, x[:-1], x[-1], (state[-1], state[-1]), given, gates)
    return [state, memory] if memory is not None else [state]


def _states(given: Operand | Sequence[Operand]) -> tuple[Dims, Dims | None]:
    """The state, and the memory of an LSTM."""
    given = [given] if isinstance(given, Operand) else given
    return given[0].dims, given[1].dims if len(given) > 1 else None


def _cell(
    ctx: Context,
    batch: Dims,
    inside: Expr,
    states: tuple[Expr, Expr],
    parameters: Sequence[Dims],
    gates: int,
) -> None:
    """The weights of one layer in one direction.

    Args:
        ctx: inference at the operator.
        batch: the axes that the layer is applied along.
        inside: its input's features.
        states: what it hands on, and its hidden units.
        parameters: ``[gates * hidden, in]``, ``[gates * hidden, out]``, biases ``[gates *
            hidden]`` if there are any, and a projection ``[out, hidden]`` if there is one.
        gates: number of gates.
    """
    out, hidden = states
    stacked = product((ctx.fresh(gates, "the gates of a recurrent layer"), hidden))
    for weight, source in zip(parameters[:2], (inside, out), strict=True):
        ctx.unify(weight[0], stacked)
        ctx.unify(weight[1], source)
        ctx.macs((*batch, *weight))
    for extra in parameters[2:]:
        if len(extra) == 1:
            ctx.unify(extra[0], stacked)
        else:
            ctx.unify(extra[0], out)
            ctx.unify(extra[1], hidden)
            ctx.macs((*batch, *extra))
    ctx.hint(hidden, "state")
    ctx.hint(out, "state")
