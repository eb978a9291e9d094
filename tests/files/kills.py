"""Processes that die at every step of their work with files, and what is in place afterwards."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from graphprune.emit.target import Target
from graphprune.files import recover
from graphprune.recipe.recipe import Recipe

_CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.copyfile", "graphprune.rename",
}  # fmt: skip

Act = Callable[[], object]
"""Something that writes an output."""

Content = dict[str, str]
"""Files by their names, as digests of what they hold."""


class Ended(NamedTuple):
    """How a process has ended, and the steps that it has taken."""

    status: int
    steps: int


def attempt(act: Act, folder: Path, at: int = -1, number: int = 0) -> Ended:
    """Do something in a process of its own that gets a signal right before one of its steps."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command line does
            _watch(str(folder), at, number, writer)
            act()
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        steps = len(pipe.read())
    _, waited = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(waited), steps)


def compiled(slim: Any, output: Path, *formats: str) -> Act:
    """What `compile` does once it knows what to write."""
    recipe = Recipe.parse({"remove": {"*": 0.5}, "score": "magnitude", "formats": formats})

    def act() -> None:
        with Target.of(output, recipe, True, {}).claimed() as target, target.staging() as staged:
            for form in target.formats:
                slim.save(staged / target.name(form), form)
            slim.plan.save(staged / target.name("plan"))
            (staged / target.name("recipe")).write_text(f"{output.name}: {formats}")
            text = slim.plan.to_json().upper()  # the report has times
            (staged / target.name("report")).write_text(text, encoding="utf-8")

    return act


def every_step(
    make: Callable[[str, Path], Act],
    name: str,
    tmp_path: Path,
    number: int,
    overwrite: bool,
    **options: Any,
) -> int:
    """Check an output of two versions, `make`'s "older" and "newer"."""
    template, folder = tmp_path / "template", tmp_path / "folder"
    template.mkdir()
    if overwrite:
        make("older", template / name)()

    def older() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)

    return check_every_step(make("newer", folder / name), folder / name, older, number, **options)


def visible(folder: Path) -> Content:
    """What a look at a folder finds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(folder))
    }


def hidden(folder: Path) -> list[str]:
    """What it doesn't find."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in found if _hidden(path))


def check_every_step(
    act: Act,
    output: Path,
    older: Callable[[], object],
    number: int,
    *,
    every: int = 1,
    gap: bool = False,
) -> int:
    """Kill a process at its steps, one by one, and look each time.

    Args:
        act: writes `output`; the same bytes every time.
        output: the only thing in its folder.
        older: puts there what was there before.
        number: of the signal.
        every: steps of which one is tried.
        gap: for a moment nothing may be in place, if it is put right afterwards.

    Returns:
        How many steps there are.
    """
    folder = output.parent
    older()
    before = visible(folder)
    ended = attempt(act, folder)
    assert ended.status == 0
    after = visible(folder)
    assert hidden(folder) == []
    assert before != after
    for step in range(0, ended.steps, every):
        older()
        assert visible(folder) == before
        died = attempt(act, folder, step, number)
        assert died.status == (-signal.SIGKILL if number == signal.SIGKILL else 143), step
        if not (gap and not visible(folder)):
            _check_no_mix(visible(folder), before, after, output)
        if number == signal.SIGTERM:
            assert hidden(folder) == [], step
        recover(output)
        assert hidden(folder) == [], step
        assert visible(folder) in (before, after), step
        if step % 7 == 0:  # and the next run ends as if nothing had been
            assert attempt(act, folder).status == 0, step
            assert visible(folder) == after, step
            assert hidden(folder) == [], step
    return ended.steps


def _check_no_mix(found: Content, before: Content, after: Content, output: Path) -> None:
    """The model is the older or the newer one; what is beside it is its own, or isn't there."""
    inside = [n for n in before | after if n == output.name or n.startswith(f"{output.name}/")]
    model = {name: found[name] for name in inside if name in found}
    owner = next(s for s in (before, after) if model == {n: s[n] for n in inside if n in s})
    for name, digest in found.items():
        other = after if owner is before else before
        own = owner.get(name) == digest
        # A second file under a name that the model doesn't know is no part of anything.
        assert own or (name.endswith(".data") and name not in owner and other[name] == digest)
    for name in owner:
        assert name in found or not name.endswith(".data")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _watch(folder: str, at: int, number: int, writer: int) -> None:
    """Count steps, one byte each, and send the signal before one of them."""
    step = -1

    def see(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal step
        if not _changes(event, arguments, folder):
            return
        step += 1
        os.write(writer, b".")
        if step == at:
            os.kill(os.getpid(), number)

    sys.addaudithook(see)


def _changes(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and _names([path], folder)
    if event not in _CHANGES:
        return False
    # In a directory that is removed, names are relative to a descriptor.
    within = any(isinstance(a, int) and a > 2 for a in arguments[1:])
    return within or _names(arguments, folder)


def _names(arguments: tuple[object, ...] | list[object], folder: str) -> bool:
    paths: Iterator[str] = (
        os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)
    )
    return any(path.startswith(folder) for path in paths)
