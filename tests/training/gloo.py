"""Two processes that speak over gloo, forked from the one that tests so that nothing is imported
again."""

from __future__ import annotations

import os
import traceback
from multiprocessing import get_context
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState


def together(work, folder: Path, *args, world: int = 2) -> None:
    """Call ``work(folder, *args)`` in `world` processes; fail with what one of them said."""
    context = get_context("fork")
    everyone = [
        context.Process(target=_one, args=(rank, world, work, folder, args))
        for rank in range(world)
    ]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join(120)
    said = "\n".join(f.read_text() for f in sorted(folder.glob("error-*")))
    for process in everyone:
        if process.is_alive():
            process.kill()
    assert not said, said
    assert [p.exitcode for p in everyone] == [0] * world


def _one(rank, world, work, folder, args) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    PartialState._reset_state()  # what the process that tests may have found out of itself
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
