"""Processes of their own for tests, forked from a server that has imported everything already.

Not from the process that tests, whose threads a fork would leave behind.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from multiprocessing import forkserver, get_context
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.workers", "ranks.workers"])


def together(work, folder: Path, *args, world: int = 2, ends=None, patience=300) -> None:
    """Call ``work(folder, *args)`` in processes that speak over gloo; fail with what one said.

    `work` is a function of a module, which processes can import; `ends` are the codes that the
    processes end with, if not all with 0; `patience` is how many seconds they may take.
    """
    _serve()
    everyone = [
        CONTEXT.Process(target=_one, args=(rank, world, work, folder, args))
        for rank in range(world)
    ]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join(patience)
    said = "\n".join(f.read_text() for f in sorted(folder.glob("error-*")))
    for process in everyone:
        if process.is_alive():
            process.kill()
    assert not said, said
    assert [p.exitcode for p in everyone] == (ends or [0] * world)


def alone(work, *args) -> int | None:
    """Call ``work(*args)`` in a process; how that ended."""
    _serve()
    process = CONTEXT.Process(target=work, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@functools.cache
def _serve() -> None:
    """Start the server where it finds our modules: Python 3.11 doesn't tell it its own path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _one(rank, world, work, folder, args) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    PartialState._reset_state()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
        work(folder, *args)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
