"""Data that a run will read, looked at before a model is loaded: is it there, and of which kind?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graphprune.calibration.sources.amounts import (
    GENERAL,
    MEASURED,
    REPAIRS,
    SCORES,
    WEIGHTS,
    Amount,
)
from graphprune.calibration.sources.kinds import (
    AUDIO,
    IMAGES,
    WORDS,
    Kind,
    check_options,
    kind_of,
    within,
)
from graphprune.calibration.sources.section import Calibration, Part
from graphprune.calibration.text.read import (
    OWN_TEXTS,
    SELF,
    opened,
    read_lines,
    read_text,
    too_short,
)
from graphprune.errors import LoadError
from graphprune.files.paths import file_of, usable
from graphprune.preflight.known import Known
from graphprune.preflight.readers import calibrates
from graphprune.recipe.named import AUTO
from graphprune.recipe.recipe import Recipe
from graphprune.recipe.selection import Selection


def check_data(recipe: Recipe, known: Known) -> None:
    """See that the data and the text of a recipe are there, of a kind that suits, and long enough.

    Args:
        recipe: the recipe; something reads whatever it gives.
        known: what is known of the model.

    Raises:
        LoadError: they aren't, or text needs a tokenizer that isn't there.
        RecipeError: an option means nothing for this kind of data.
    """
    wanted = recipe.calibration
    calibrated = calibrates(recipe)
    if wanted.tokenizer is not None:
        _check_tokenizer(wanted.tokenizer)
    tokenised = []
    for source, section in _sources(wanted):
        kind = _checked(source, section)
        if known.causal and kind in ("images", "audio"):
            raise LoadError(
                f"the model doesn't read {WORDS[kind]}",
                where=source,
                why="it is a language model, and reads token ids",
                hint="give a text, or token ids",
            )
        tokenised += [source] if kind in ("text", "records") else []
    if not known.causal or known.weightless:
        return
    defaults = calibrated and wanted.data is None
    if (tokenised or defaults) and wanted.tokenizer is None and known.tokenizer is False:
        raise without_tokenizer(recipe, str(known.directory))
    if calibrated and isinstance(wanted.data, str):
        share = GENERAL if wanted.general is None else wanted.general
        own = max(1, round((wanted.windows or 1) * (1 - share)))  # what isn't general text at most
        _check_length(recipe, wanted.data, own, _calibrated_on(recipe), known)
    for text in wanted.text or ():
        _check_length(recipe, text, wanted.windows or 1, MEASURED, known)


def without_tokenizer(recipe: Recipe, where: str | None) -> LoadError:
    """The error of a language model whose text nothing can make tokens of."""
    ways = [
        "save the tokenizer with the checkpoint",
        "name its directory with calibration.tokenizer",
        "give token ids as data",
    ]
    if recipe.selections:
        ways.append("choose a score without data: --score magnitude")
    return LoadError(
        "text needs a tokenizer, and the model has none",
        where=where,
        why="a language model is scored on text, since magnitudes alone would ruin it"
        if any(s.score.name == AUTO for s in recipe.selections)
        else None,
        hint=f"{', '.join(ways[:-1])}, or {ways[-1]}",
    )


def _sources(wanted: Calibration) -> Iterator[tuple[str, Calibration]]:
    """Every source that is named, with the options that are for it."""
    if isinstance(wanted.data, dict):
        for part in wanted.data.values():
            yield part.source, wanted.model_copy(update=_own(part))
    elif wanted.data is not None:
        yield wanted.data, wanted
    for text in wanted.text or ():
        yield text, wanted if wanted.data is None else Calibration()


def _own(part: Part) -> dict[str, object]:
    return {"data": part.source, "field": part.field, "split": part.split}


def _checked(source: str, wanted: Calibration) -> Kind | None:
    """The kind of a source that can be read; None for what the model writes itself.

    Raises:
        LoadError: it is missing, empty, or not what its name says.
    """
    if source == SELF:
        return None
    kind = kind_of(source)
    check_options(kind, wanted)
    path = Path(source)
    if kind == "function":
        code = file_of(source)
        if code.suffix == ".py" and not code.is_file():
            raise LoadError("no such file", where=str(code), hint="give path/to/file.py:function")
    elif kind == "text":
        if source not in OWN_TEXTS:
            read_text(source)
    elif kind == "records":
        with opened(path):
            pass
        if path.suffix.lower() != ".json" and not read_lines(path, wanted.field):
            raise LoadError("the text file is empty", where=source)
    elif kind in ("images", "audio"):
        suffixes = IMAGES if kind == "images" else AUDIO
        with opened(within(path, suffixes)[0] if path.is_dir() else path):
            pass
    elif kind == "arrays":
        with opened(path) as file:
            if not file.read(1):
                raise LoadError("the file is empty", where=source)
    return kind


def _check_tokenizer(directory: str) -> None:
    from graphprune.calibration.text.read import has_tokenizer

    path = usable(directory)
    if not path.is_dir():
        raise LoadError("no such directory of a tokenizer", where=directory)
    if not has_tokenizer(path):
        raise LoadError("the directory has no tokenizer", where=directory)


def _calibrated_on(recipe: Recipe) -> Amount:
    """Calibration windows that are as short as this recipe's can be."""
    if recipe.masks_on_data and not recipe.removes:
        return WEIGHTS
    surgery = any(
        isinstance(one.options, Selection)
        and one.options.score.name in (AUTO, "obs")
        and one.round.of == 1
        for one in recipe.passes
    )
    return REPAIRS if recipe.repairs_on_data or surgery else SCORES


def _check_length(recipe: Recipe, source: str, windows: int, amount: Amount, known: Known) -> None:
    """Refuse a text that can't fill so many windows.

    Only what is certain without the model: tokens are counted by its tokenizer's own file, or else
    no more of them than bytes are assumed.
    """
    wanted = recipe.calibration
    if wanted.length is None and known.window is None:
        return
    length = wanted.length or min(amount.tokens, known.window or amount.tokens)
    needed = windows * length
    if source in (*OWN_TEXTS, SELF) or kind_of(source) != "text":
        return
    text = read_text(source)
    if len(text) > 8 * needed:
        return
    tokens = _tokens(text, wanted, known)
    if tokens < needed:
        raise too_short(tokens, windows, length, source)


def _tokens(text: str, wanted: Calibration, known: Known) -> int:
    """How many tokens a short text has, or could have at most."""
    folder = wanted.tokenizer or known.directory
    file = Path(folder) / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        return len(text.encode("utf-8"))
    from tokenizers import Tokenizer

    try:
        return len(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)
    except Exception:  # it raises nothing else; what is wrong with the file is told when it is used
        return len(text.encode("utf-8"))
