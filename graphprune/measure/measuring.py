"""Measuring a slim language model beside its dense one, as far as it can be done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.measured import evaluation_windows, measured_texts
from graphprune.calibration.sources.kinds import kind_of
from graphprune.calibration.sources.section import Calibration
from graphprune.calibration.tokens import tokenizer_for, tokenizer_of
from graphprune.ir.torch.program import Program
from graphprune.measure.completions import PROMPTS, TOKENS, complete, prompt_tokens
from graphprune.measure.remarks import quality_remarks
from graphprune.quality.attempts import attempted
from graphprune.quality.compare import Pair, compare
from graphprune.quality.perplexity import NoPerplexityError, Perplexity, perplexity
from graphprune.quality.result import Completion, Quality

Model = Callable[..., Any]


@dataclass(frozen=True)
class Measured:
    """What was found of two models.

    Attributes:
        pairs: by text, what both made of it.
        completions: of both.
        notes: what couldn't be measured, and why.
        windows: of the first text, int64 ``[count, length]``; None where there is none.
    """

    pairs: dict[str, Pair]
    completions: tuple[Completion, ...] = ()
    notes: tuple[str, ...] = ()
    windows: Tensor | None = None

    @property
    def dense(self) -> dict[str, Perplexity]:
        """The dense model's perplexities, by text."""
        return {text: pair.dense for text, pair in self.pairs.items()}

    @property
    def slim(self) -> dict[str, Perplexity]:
        """The slim model's perplexities, by text."""
        return {text: pair.slim for text, pair in self.pairs.items()}

    @property
    def quality(self) -> Quality | None:
        """Both beside each other; None where nothing was found."""
        if not self.pairs and not self.completions:
            return None
        texts = {text: pair.comparison for text, pair in self.pairs.items()}
        return Quality(texts, self.completions)


def unmeasurable(program: BaseProgram, wanted: Calibration) -> str | None:
    """Why a model has no perplexity, as far as its inputs and its tokenizer tell; None if it may.

    Args:
        program: the dense model.
        wanted: the section of the recipe.

    Raises:
        LoadError: the tokenizer can't be opened.
    """
    if not program.is_causal:
        return "not a causal language model"
    if tokenizer_for(program, wanted) is None and not any(
        kind_of(text) == "records"
        for text in wanted.text or ()  # they may hold token ids
    ):
        return "the checkpoint has no tokenizer"
    return None


def measure_quality(
    program: BaseProgram,
    models: tuple[Model, Model],
    wanted: Calibration,
    seed: int,
    tell: Callable[[str], None],
    *,
    needed: bool = False,
) -> Measured:
    """Measure both models on all texts of a recipe.

    Args:
        program: the dense one; see `unmeasurable`.
        models: both, called with ``input_ids``.
        wanted: the section of the recipe.
        seed: of the draws.
        tell: told of each text.
        needed: whether a failure is an error and no note.

    Raises:
        EvaluationError: something that is needed can't be measured.
    """
    pairs: dict[str, Pair] = {}
    notes: list[str] = []
    first = None
    tokenizer = tokenizer_for(program, wanted)
    texts: Sequence[Any] = ()
    with attempted("quality", notes, needed):
        texts = measured_texts(program, wanted)
    for text in texts:
        if tokenizer is None and not text.strict:
            continue
        tell(f"measuring quality on {text.source}")
        with attempted(f"quality on {text.source}", notes, needed):
            windows = evaluation_windows(program, wanted, seed, text)
            first = windows if first is None else first
            try:
                pairs[text.source] = compare(*models, windows)
            except NoPerplexityError as error:
                if needed:
                    raise
                return Measured({}, notes=(f"no perplexity: {error.why}",), windows=first)
    completions: tuple[Completion, ...] = ()
    if tokenizer is not None:
        tell("completing prompts")
        with attempted("completions", notes, caught=(Exception,)):  # generate is anybody's code
            completions = completed([program], models, tokenizer)
    return Measured(pairs, completions, tuple(notes), first)


@dataclass(frozen=True)
class Read:
    """What models made of the same windows.

    Attributes:
        perplexities: by model and text.
        quality: of two models beside each other; of one, its completions.
        notes: what couldn't be measured, and what there is to say.
    """

    perplexities: dict[str, dict[str, Perplexity]]
    quality: Quality | None = None
    notes: tuple[str, ...] = ()


def measure_on(
    programs: Mapping[str, Program],
    models: Mapping[str, Model],
    windows: Mapping[str, Tensor],
    tell: Callable[[str], None],
) -> Read:
    """Measure one model, or two of which the first is the dense one.

    Args:
        programs: by name.
        models: by name, called with ``input_ids``; others are ignored.
        windows: by text, int64 ``[count, length]``.
        tell: told of each text.

    Raises:
        EvaluationError: one is no causal language model, or the tokens aren't of its vocabulary.
    """
    if not programs:
        return Read({})
    names = list(programs)
    found: dict[str, dict[str, Perplexity]] = {name: {} for name in names}
    texts = {}
    for text, tokens in windows.items():
        tell(f"measuring quality on {text}")
        if len(names) == 1:
            found[names[0]][text] = perplexity(models[names[0]], tokens)
            continue
        pair = compare(models[names[0]], models[names[1]], tokens)
        found[names[0]][text], found[names[1]][text] = pair.dense, pair.slim
        texts[text] = pair.comparison
    notes: list[str] = []
    completions: tuple[Completion, ...] = ()
    tokenizer = next((t for p in programs.values() if (t := tokenizer_of(p)) is not None), None)
    if tokenizer is not None:
        tell("completing prompts")
        with attempted("completions", notes, caught=(Exception,)):  # generate is anybody's code
            completions = completed(list(programs.values()), [models[n] for n in names], tokenizer)
    quality = Quality(texts, completions)
    remarks = quality_remarks(found[names[0]], found[names[-1]], quality)
    return Read(found, quality, (*remarks, *notes))


def completed(
    programs: Sequence[BaseProgram], models: Sequence[Model], tokenizer: Any
) -> tuple[Completion, ...]:
    """Continue prompts with one or two models.

    Args:
        programs: say how long the text may become.
        models: one, or the dense and the slim one.
        tokenizer: of both.

    Raises:
        RuntimeError, GraphPruneError: a model can't be run.
    """
    found = []
    longest = min(p.default_window() for p in programs)
    for prompt in PROMPTS:
        start = prompt_tokens(tokenizer, prompt)
        tokens = min(TOKENS, longest - start.shape[1])
        if tokens > 0:
            texts = [complete(model, tokenizer, start, tokens) for model in models]
            found.append(Completion(prompt, *texts))
    return tuple(found)
