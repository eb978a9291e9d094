"""Fresh processes that have imported transformers already, for checkpoints that are opened again.

Saving a checkpoint opens it in a process of its own, and so do tests. Most of the time of such a
process goes by while it imports transformers. Here one that has done nothing else waits, and does
each job in a copy of itself: see `fresh_server`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.rewrite.module import reload

SERVER = Path(__file__).with_name("fresh_server.py")
Completed = subprocess.CompletedProcess[str]


class Waiting:
    """A process that starts with the first job, and ends with `close`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Completed:
        """Do what ``python -P`` would.

        Args:
            arguments: of Python: a script, or "-c" and code; and those of that.
            environment: all variables.

        Returns:
            As from `subprocess.run`, what came to stdout in stderr as well.
        """
        if self.process is None or self.process.poll() is not None:
            started = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**started, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"arguments": list(arguments), "environment": dict(environment)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return Completed(list(arguments), answer["status"], "", answer["errors"])

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()


WAITING = Waiting()


def instead_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """`subprocess.run` that has a waiting process open what has been saved."""

    def runs(command: Any, *args: Any, **options: Any) -> Any:
        if isinstance(command, list) and command[1:3] == ["-P", reload.__file__]:
            return WAITING.run(command[2:], options["env"])
        return run(command, *args, **options)

    return runs
