"""The loop: micro-batches, one step of the optimiser, zeros filled in, progress saved."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.training.core.watch import Stop, Watch
from graphprune.training.run import Progress, Run

BETAS = (0.9, 0.95)

_REWARMED = 2
"""Steps in which the learning rate rises where a run goes on from another."""


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
            *(group for one in run.callbacks for group in one.groups()),
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
            everything = {**run.trainable.parameters(), **run.own()}
            run.saved.save(_memory(run, step, watch), everything, optimizer, run.tensors())
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
    place = everyone.rank * -(-len(run.order.samples(step)) // everyone.world)
    for chosen in parts:
        # What is drawn depends on the place in the batch, whichever process has it.
        run.trainable.draw.key = (training.seed, run.order.first + step, place)
        place += len(chosen)
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
    for one in run.callbacks:
        one.on_gradients(step, scale)
    norm = _scale_gradients(parameters, scale, training.clip)
    norm_of_own = _scale_gradients(run.own(), scale, 0.0)
    loss_of_step = total / count
    watch.check_finite(step, loss_of_step, norm + norm_of_own)
    for one in run.callbacks:
        one.before_step(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * _share(run, step)
    if any(group["lr"] for group in optimizer.param_groups):  # it would change -0.0 to 0.0
        optimizer.step()
    run.trainable.held.fill()
    optimizer.zero_grad(set_to_none=True)
    run.losses.append(loss_of_step)
    run.tokens += int(count)
    watch.add(step, loss_of_step)
    changed = [one.after_step(step, optimizer) for one in run.callbacks]
    if any(changed):
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
    parameters = {**run.trainable.parameters(), **run.own()}
    more = run.saved.load(memory, parameters, optimizer)
    try:
        run.restore(int(memory["step"]), more)
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
