"""The section ``sparsify`` of a recipe: which weights become zero, one by one, and by which method.

The options of a method are the fields of its class, so that there is one list of them. They are
looked up when a recipe has the section: that imports torch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from graphprune.errors import RecipeError
from graphprune.options import Data, bare, listed, nearest, removed_fraction
from graphprune.passes.masks import ALLOCATIONS, METHODS, allocation, method

if TYPE_CHECKING:
    from graphprune.passes.masks.allocations import Budget
    from graphprune.solvers import Pattern, Solver


def _pattern(value: object) -> object:
    """Reads ``n:m``, of which n weights are kept."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(
            f'{value} is not a pattern: YAML takes n:m for a number; put it in quotes, "2:4"'
        )
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(value))
    if match is None:
        raise ValueError(
            f"{value!r} is not a pattern; write n:m for n weights kept of every m, such as 2:4"
        )
    kept, of = int(match[1]), int(match[2])
    if not 0 < kept < of:
        raise ValueError(
            f"'{kept}:{of}' is not a pattern: n:m keeps n of every m weights, with 1 <= n < m"
        )
    return f"{kept}:{of}"


class LayerBudget(Data):
    """How the sparsity is dealt to the layers.

    Attributes:
        name: ``uniform``, ``owl`` (more density for layers with more outliers), ``sensitivity``
            (the least sum of errors), ``global`` (one threshold of magnitude), or that of another
            package. The options of `graphprune.passes.masks.allocations.OWL` and the others are
            further keys.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(ALLOCATIONS.known)]

    @model_validator(mode="after")
    def _options(self) -> Self:
        if self.model_extra or self.name != "uniform":
            self.built()
        return self

    def built(self) -> Budget:
        """It as an argument of `graphprune.sparsify`.

        Raises:
            ValueError: an option is unknown or has a wrong value.
        """
        return allocation(self.name, self.model_extra or {})


class Sparsify(Data):
    """Which single weights become zero. One of sparsity and pattern is given.

    Attributes:
        method: ``magnitude``, ``wanda``, ``ria``, ``sparsegpt``, ``alps``, ``dsnot``, or that of
            another package. Its options (the fields of its class, see `graphprune.passes.masks`)
            are further keys: ``damping: 0.02`` or ``bits: 4`` for sparsegpt, ``first: ria`` for
            dsnot.
        sparsity: Fraction of the weights that goes, over all layers that are treated.
        pattern: ``n:m``: n weights are kept of every m along the inputs.
        balance: ``strip``: equal counts in every 256 inputs of an output, which is what the format
            `strip_u8` stores without padding; sparsities are multiples of 6.25 % then.
        budget: How the sparsity is dealt to the layers; a bare name stands for ``{name: ...}``.
        include: Globs of parameters: treat these only.
        exclude: Globs of parameters to leave alone.
        keep_zeros: Weights that are zero stay zero, and count as removed.
        reference: Run the dense model along, and have what writes into residual streams make up
            for what they lack.
        errors: Tell the error of every layer also where the method doesn't need what that takes:
            for wanda and ria the second moments of what layers read.
        held: dtype in which activations wait for the next layer.
        offload: whether they wait in files beside the output instead of in memory.
    """

    model_config = ConfigDict(extra="allow")

    method: Annotated[str, AfterValidator(METHODS.known)]
    sparsity: Annotated[float, BeforeValidator(removed_fraction)] | None = None
    pattern: Annotated[str, BeforeValidator(_pattern)] | None = None
    balance: Literal["none", "strip"] = "none"
    budget: Annotated[LayerBudget, bare("name")] = LayerBudget(name="uniform")
    include: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] | None = None
    exclude: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    keep_zeros: bool = False
    reference: bool = False
    errors: bool = True
    held: Literal["float32", "bfloat16", "float16"] = "float32"
    offload: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        options = self.model_extra or {}
        for option in options:
            if option not in self._options():
                valid = sorted({*self._options(), *type(self).model_fields} - {"method"})
                if option == "bits":
                    raise ValueError("only sparsegpt quantises: 'bits' goes with no other method")
                raise ValueError(
                    f"method '{self.method}' has no option '{option}'; {nearest(option, valid)}"
                )
        if (self.sparsity is None) == (self.pattern is None):
            found = "neither" if self.sparsity is None else "both"
            raise ValueError(f"give one of sparsity (50%) and pattern ('2:4'); this has {found}")
        if self.balance == "strip":
            self._balanced()
        if self.pattern is not None and self.budget.name != "uniform":
            raise ValueError(
                f"budget '{self.budget.name}' deals a sparsity to the layers, and a pattern fixes "
                "that of each; give sparsity, or leave the budget out"
            )
        self.solver()
        return self

    def _balanced(self) -> None:
        if self.sparsity is None or self.budget.name != "uniform":
            raise ValueError("balance: strip takes a sparsity, which is that of every strip")
        if getattr(self.solver(), "permute", False):
            raise ValueError("balance: strip has columns in their order; leave permute off")
        try:
            self.wanted()
        except RecipeError as error:
            raise ValueError(f"{error.what}: {error.why}; {error.hint}") from error

    def _options(self) -> tuple[str, ...]:
        return METHODS.options(self.method)

    @property
    def needs_data(self) -> bool:
        """Whether anything but the weights matters."""
        dealt = ALLOCATIONS.needs_data(self.budget.name)
        return METHODS.needs_data(self.method) or dealt or self.reference

    def solver(self) -> Solver:
        """The solver with its options.

        Raises:
            ValueError: an option is unknown or has a wrong value.
        """
        return method(self.method, self.model_extra or {})

    def wanted(self) -> Pattern:
        """What masks may be."""
        from graphprune.solvers import NM, Unstructured, strips

        if self.pattern is None:
            assert self.sparsity is not None
            if self.balance == "strip":
                return strips(self.sparsity)
            return Unstructured(self.sparsity)
        kept, of = self.pattern.split(":")
        return NM(int(kept), int(of))

    @property
    def bits(self) -> int | None:
        """Bits that kept weights are rounded to; None leaves them as they are."""
        found: int | None = getattr(self.solver(), "bits", None)
        return found
