"""The loop: micro-batches, one step of the optimiser, zeros filled in, progress saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.options import Training
from graphprune.training.core.order import Order
from graphprune.training.core.processes import Processes
from graphprune.training.core.samples import Feed, Samples
from graphprune.training.core.watch import Stop, Watch
from graphprune.training.events import Events
from graphprune.training.model.objective import Objective
from graphprune.training.model.trainable import Trainable
from graphprune.training.state import Saved

BETAS = (0.9, 0.95)

_REWARMED = 2
"""Steps in which the learning rate rises where a run goes on from another."""


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        step: steps that are done.
        steps: of the whole run.
        loss: mean over the tokens of the last step.
        tokens: that were trained on so far.
        seconds: since this process began.
        left: seconds until the end, about.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float
    left: float


class Beside(Protocol):
    """Something that takes part in a run: gates that are learned, shares of domains that change.

    All that it depends on is a function of the run's options, of the step and of what is saved, so
    that an interrupted run goes on to the same bits. Every process has its own, which are alike.
    """

    def identity(self) -> Any:
        """What it is, as JSON values: a run with another one can't go on from a saved state."""

    def attach(self, run: Run) -> None:
        """Join a run whose first step is still to come; it may exchange what the run has.

        Raises:
            TrainingError: they don't fit.
        """

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser changes beside the weights. Names are no weight's.

        Their gradients are means over the tokens of a step, and no limit is set to them.
        """

    def groups(self) -> Sequence[dict[str, Any]]:
        """The optimiser's groups of these parameters.

        Each has its highest learning rate as "peak", which rises and falls as that of the weights.
        """

    def tensors(self) -> Mapping[str, Tensor]:
        """What else is saved, and read back in place. Names are no parameter's."""

    def before(self, step: int) -> None:
        """Called when the gradients of a step are there, those of the weights limited already.

        Args:
            step: from 0.
        """

    def after(self, step: int) -> None:
        """Called when a step is taken, and zeros are filled in."""


@dataclass
class Run:
    """A training run: everything that a step needs.

    Attributes:
        objective: the student with its loss, wrapped as the processes need.
        trainable: what trains.
        training: options.
        samples: the data.
        feed: makes what the model is called with.
        order: which samples each step sees.
        everyone: the processes.
        saved: where progress is saved; None for nowhere.
        progress: told after each step.
        events: what else happens; None for nothing.
        beside: what goes along with the weights.
    """

    objective: Objective
    trainable: Trainable
    training: Training
    samples: Samples
    feed: Feed
    order: Order
    everyone: Processes
    saved: Saved | None = None
    progress: Callable[[Progress], None] | None = None
    events: Events | None = None
    beside: Sequence[Beside] = ()
    losses: list[float] = field(default_factory=list)
    tokens: int = 0

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that train beside the weights."""
        return {name: p for one in self.beside for name, p in one.parameters().items()}

    def memory(self) -> dict[str, Tensor]:
        """All tensors that a run goes on from."""
        more = {name: t for one in self.beside for name, t in one.tensors().items()}
        return {**self.trainable.parameters(), **self.own(), **more}


def train(run: Run, stop: Stop | None, *, resume: bool = False) -> None:
    """Train to the end.

    Args:
        run: its weights change.
        stop: tells that a signal came: the state is saved, and training ends early; None for never.
        resume: go on from what is saved.

    Raises:
        TrainingError: the loss is no number or diverges, or nothing in a step counts.
        LoadError: see `Saved.begin`.
    """
    parameters = run.trainable.parameters()
    everything = {**parameters, **run.own()}
    _check_clean(everything)
    peak = run.training.peak
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters.values()), "peak": peak},
            *(group for one in run.beside for group in one.groups()),
        ],
        lr=0.0,
        betas=BETAS,
        weight_decay=0.0,
        fused=_can_fuse(everything),
    )
    watch = Watch(None if run.saved is None else str(run.saved.directory))
    step = _begin(run, optimizer, watch, resume)
    begun, first = time.monotonic(), step
    while step < run.order.steps:
        _step(run, step, parameters, optimizer, watch)
        step += 1
        came = stop is not None and stop.number is not None
        stopped = run.everyone.total(float(came))[0] > 0
        last = step == run.order.steps
        if run.saved is not None and (stopped or last or run.saved.due(step)):
            run.trainable.held.check()
            more = {} if run.events is None else run.events.tensors()
            run.saved.save(_memory(run, step, watch), run.memory(), optimizer, more)
        if run.progress is not None:
            seconds = time.monotonic() - begun
            left = seconds / (step - first) * (run.order.steps - step)
            run.progress(Progress(step, run.order.steps, run.losses[-1], run.tokens, seconds, left))
        if stopped:
            return
    run.trainable.held.check()


def _step(
    run: Run,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    watch: Watch,
) -> None:
    """One step of the optimiser."""
    everyone, training = run.everyone, run.training
    total, count = 0.0, 0.0
    size = run.samples.together or training.micro_batch
    parts = run.order.share(step, everyone.rank, everyone.world, size)
    for number, chosen in enumerate(parts):
        run.trainable.draw.key = (training.seed, run.order.first + step, number, everyone.rank)
        # FSDP gathers weights in each pass, so that every process has one, with samples or without.
        micro = run.feed(run.samples.take(chosen or [0])).to(everyone.device)
        micro = replace(micro, count=len(chosen))
        with autocast(training.precision, everyone.device):
            loss, tokens = run.objective(micro)
        if not chosen:
            loss, tokens = loss * 0.0, tokens * 0.0
        _check_loss(loss, step)
        loss.backward()
        total, count = total + float(loss.detach()), count + float(tokens)
    run.trainable.draw.key = None
    total, count = everyone.total(total, count)
    if not count:
        raise TrainingError(
            "no token of a step counts",
            where=f"step {step + 1}",
            why="all of its labels are -100, or padding",
            hint="give data with labels, or larger batches",
        )
    if training.fsdp:
        scale = everyone.world / count  # gradients are means over processes by now
    else:
        everyone.sum_gradients((*parameters.values(), *run.own().values()))
        scale = 1 / count
    run.trainable.held.fill_gradients()
    if run.events is not None:
        run.events.look(step + 1, scale)
    norm = _scale_gradients(parameters, scale, training.clip)
    norm_beside = _scale_gradients(run.own(), scale, 0.0)
    loss_of_step = total / count
    watch.check_finite(step, loss_of_step, norm + norm_beside)
    for one in run.beside:
        one.before(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * _share(run, step)
    if any(group["lr"] for group in optimizer.param_groups):  # it would change -0.0 to 0.0
        optimizer.step()
    run.trainable.held.fill()
    optimizer.zero_grad(set_to_none=True)
    for one in run.beside:
        one.after(step)
    run.losses.append(loss_of_step)
    run.tokens += int(count)
    watch.add(step, loss_of_step)
    if run.events is not None and run.events.change(step + 1, optimizer):
        watch.restart(step + 1)


def _share(run: Run, step: int) -> float:
    """The share of the highest learning rate that a step has.

    A run that goes on from another has moments to gather first.
    """
    order = run.order
    rising = min(1.0, (step + 1) / _REWARMED) if order.first else 1.0
    return rising * run.training.share(order.first + step, order.whole)


@torch.no_grad()
def _scale_gradients(parameters: Mapping[str, nn.Parameter], scale: float, clip: float) -> float:
    """Make sums of gradients means, and their norm no larger than `clip`; the norm before that."""
    found = [p.grad for p in parameters.values() if p.grad is not None]
    if not found:
        return 0.0
    norm = nn.utils.get_total_norm(found)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    size = float(whole) * scale
    if clip and size > clip:
        scale *= clip / size
    if math.isfinite(scale):
        torch._foreach_mul_(found, scale)
    return size


def _begin(
    run: Run,
    optimizer: torch.optim.Optimizer,
    watch: Watch,
    resume: bool,
) -> int:
    """The step to begin with: the first, or the one after what is saved."""
    memory = None if run.saved is None else run.saved.begin(resume=resume)
    if memory is None:
        return 0
    assert run.saved is not None
    more = run.saved.load(memory, run.memory(), optimizer)
    if run.events is not None:
        try:
            run.events.restore(int(memory["step"]), more)
        except (KeyError, RuntimeError) as error:
            raise run.saved.damaged(memory, error) from error
    run.losses[:] = memory["losses"]
    run.tokens = memory["tokens"]
    watch.restart(memory.get("watched", 0))
    for step, loss in enumerate(run.losses):
        if step >= watch.since:
            watch.add(step, loss)
    return int(memory["step"])


def _memory(run: Run, step: int, watch: Watch) -> dict[str, object]:
    """What the manifest says of a step."""
    losses = list(run.losses)
    return {"step": step, "tokens": run.tokens, "losses": losses, "watched": watch.since}


def _check_clean(parameters: Mapping[str, Tensor]) -> None:
    """No gradient is left over from before: it would change weights that are pruned since."""
    left = [name for name, p in parameters.items() if p.grad is not None]
    assert not left, f"gradients are left over: {left}"


def _check_loss(loss: Tensor, step: int) -> None:
    if not loss.requires_grad:
        raise TrainingError(
            "the loss doesn't depend on the weights that train",
            where=f"step {step + 1}",
            why="the graph, or the loss, has operators without gradients",
            hint="train what the output depends on smoothly, or give another loss",
        )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Products in bfloat16 where that is asked for, or quick."""
    enabled = _has_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _can_fuse(parameters: Mapping[str, Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in parameters.values())
