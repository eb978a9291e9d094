"""General text: what keeps a model good at all that a text of the user's lacks.

Weights that are fitted to one kind of text lose the others: on SmolLM2-135M less a quarter of every
feed-forward block, WikiText alone cost 1.3 times the perplexity on itself and 3.1 times on plays.
"""

from __future__ import annotations

from graphprune.analysis.program import BaseProgram
from graphprune.calibration.generated import can_write
from graphprune.calibration.sources.section import Part
from graphprune.calibration.text.read import BUILTIN, SELF


def general_parts(program: BaseProgram) -> dict[str, Part]:
    """The sources of general text of a language model: half each, if the model can write."""
    sources = (BUILTIN, SELF) if can_write(program) else (BUILTIN,)
    return {source: Part(source=source) for source in sources}
