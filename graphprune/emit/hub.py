"""Pushing a checkpoint to the Hugging Face hub, once all of it is in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from graphprune.errors import EmitError, RecipeError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PRIVATE = ("report.json", "report.html", "recipe.yaml")
"""What stays here: it names folders and commands of this machine. The card has the rest."""


def check_push(repository: str, formats: Sequence[str], output: Path | None) -> None:
    """Refuse a push that can't work, before the work that it would be for.

    Args:
        repository: ``OWNER/NAME``, or a name of one's own.
        formats: what is written.
        output: where.

    Raises:
        RecipeError: nothing would be pushed, or the name is none.
        EmitError: nobody is logged in, or the hub can't be reached or refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    where = f"--push-to {repository}"
    if output is None or "hf" not in formats:
        raise RecipeError(
            "only a Hugging Face checkpoint can be pushed",
            where=where,
            why="this is a dry run" if output is None else f"this run writes {', '.join(formats)}",
            hint="leave --push-to out, or ask for format hf",
        )
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(
            "this is no name of a repository",
            where=where,
            why=" ".join(str(error).split()),
            hint="write OWNER/NAME",
        ) from error
    api = _api(where)
    with _refused(where):
        me = api.whoami()
    owner = repository.partition("/")[0] if "/" in repository else me.get("name")
    known = {me.get("name"), *(one.get("name") for one in me.get("orgs") or ())}
    if owner not in known:
        raise EmitError(
            f"you can't write to {owner} on the hub",
            where=where,
            why=f"the token is of {', '.join(sorted(name for name in known if name))}",
            hint="name a repository of your own, or log in with another token",
        )


def push(folder: Path, repository: str, tell: Callable[[str], None]) -> str:
    """Upload a checkpoint, with its card, as one commit; the repository is made if need be.

    Args:
        folder: what was written.
        repository: see `check_push`.
        tell: told of the upload.

    Returns:
        Where it is now.

    Raises:
        EmitError: the hub can't be reached or refuses.
    """
    where = f"--push-to {repository}"
    api = _api(where)
    tell(f"pushing to {repository}")
    with _refused(where, f"the output is complete in {folder}; push it with hf upload"):
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Model pruned by graphprune",
            ignore_patterns=list(PRIVATE),
        )
    return str(made)


def _api(where: str) -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise EmitError(
            "nothing can be pushed offline", where=where, hint="unset HF_HUB_OFFLINE, or push later"
        )
    if get_token() is None:
        raise EmitError(
            "nobody is logged in to the hub",
            where=where,
            why="there is no token",
            hint="run hf auth login, or set HF_TOKEN",
        )
    return HfApi()


@contextmanager
def _refused(where: str, hint: str = "check the token and its rights") -> Iterator[None]:
    """Turn what the hub says into an error that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    # What the HTTP library raises, whichever one this version of the hub's client is built on.
    kinds = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        yield
    except kinds as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise EmitError(
            "the hub refused, or can't be reached", where=where, why=why, hint=hint
        ) from error
