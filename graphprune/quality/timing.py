"""Wall-clock time of calls, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FEWEST, USUAL, MOST = 3, 9, 200
SECONDS_ENOUGH = 0.5
SECONDS_TOO_MUCH = 10.0


@dataclass(frozen=True)
class Latency:
    """Time of one call.

    Attributes:
        seconds: Median over the repeats, after warm-up.
        quartiles: First and third quartile, in seconds; far from the median on a busy machine.
        repeats: Calls measured.
        threads: Threads within an operator.
        runtime: ``torch`` or ``onnxruntime``.
        macs: Multiply-accumulates of the call; None where nobody has counted.
    """

    seconds: float
    quartiles: tuple[float, float]
    repeats: int
    threads: int
    runtime: str
    macs: int | None = None

    @property
    def milliseconds(self) -> float:
        """The median in milliseconds."""
        return self.seconds * 1000


@dataclass(frozen=True)
class Speedup:
    """How much faster one model is than another, against how much less it computes.

    Attributes:
        time: Time of the first model's call divided by the second's.
        macs: Likewise multiply-accumulates: the speed-up if nothing else took time.
        share: ``time / macs``, the share of that ideal speed-up which is reached. Above 1 where
            the smaller tensors fit a cache that the larger ones don't.
    """

    time: float
    macs: float
    share: float


def speedup(dense: Latency | None, slim: Latency | None) -> Speedup | None:
    """The speed-up between two latencies; None where a time or a count is missing."""
    if dense is None or slim is None or not dense.macs or not slim.macs or not slim.seconds:
        return None
    time_ratio, macs_ratio = dense.seconds / slim.seconds, dense.macs / slim.macs
    return Speedup(time_ratio, macs_ratio, time_ratio / macs_ratio)


def in_words(one: Speedup) -> str:
    """A speed-up as people say it: "1.40x faster with 1.43x fewer MACs"."""
    time = _ratio(one.time, "faster", "slower") or "as fast as before"
    macs = _ratio(one.macs, "fewer MACs", "more MACs") or "as many MACs"
    return f"{time} with {macs}"


def _ratio(value: float, above: str, below: str) -> str:
    """A ratio as a number of at least 1 and a word; "" where it rounds to 1."""
    larger, word = (value, above) if value >= 1 else (1 / value, below)
    text = f"{larger:.2f}x"
    return "" if text == "1.00x" else f"{text} {word}"


def in_turns(
    calls: Sequence[Callable[[], object]], repeats: int | None, threads: int, runtime: str
) -> list[Latency]:
    """Times calls in turns, so that whatever else the machine does disturbs them alike.

    One call of each warms up. Slow models get fewer repeats, though never fewer than three.

    Args:
        calls: What to time.
        repeats: Turns; None for nine, or as many as it takes to measure for half a second.
        threads: Of the runtime, for the result.
        runtime: Likewise its name.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for number in range(MOST if repeats is None else repeats):
        spent = time.perf_counter() - began
        if number >= FEWEST and spent > SECONDS_TOO_MUCH:
            break
        if repeats is None and number >= USUAL and spent > SECONDS_ENOUGH:
            break
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [_latency(taken, threads, runtime) for taken in times]


def _latency(taken: list[float], threads: int, runtime: str) -> Latency:
    first, median, third = (
        statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else taken * 3
    )
    return Latency(median, (first, third), len(taken), threads, runtime)
