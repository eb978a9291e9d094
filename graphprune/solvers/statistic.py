"""Statistics of what a layer reads, collected batch by batch in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch
from torch import Tensor

from graphprune.errors import CalibrationError
from graphprune.solvers.precision import exact, finite

T = TypeVar("T")

# Half of a product x.T @ x is enough. Strips this wide still run at the speed of a large product;
# in wide layers narrower ones would read the activations too often.
STRIP, WIDE = 128, 192


@dataclass(eq=False)
class Norms:
    """Sum and sum of squares of every feature.

    Attributes:
        features: width of the layer's input.
        device: where the sums are held.
        tokens: vectors seen.
        sums: [features], float64, sum of x.
        squares: [features], float64, sum of x².
    """

    features: int
    device: torch.device | str = "cpu"
    tokens: int = field(default=0, init=False)
    sums: Tensor = field(init=False)
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.features, dtype=torch.float64, device=self.device)
        self.squares = torch.zeros_like(self.sums)

    def add(self, x: Tensor, where: str = "") -> None:
        """Count the vectors of x.

        Args:
            x: [..., features]; narrower types are widened to float32.
            where: the operator and the sample, for the message.

        Raises:
            CalibrationError: a value is NaN, infinite, or too large to square. Nothing is counted.
        """
        rows = _rows(x, self.features, torch.float32, where)
        squares = rows.square().sum(0, dtype=torch.float64)
        if not finite(squares):
            _check(x, torch.float32, where)
        self.sums += rows.sum(0, dtype=torch.float64).to(self.device)
        self.squares += squares.to(self.device)
        self.tokens += rows.shape[0]

    def merge(self, other: Self) -> None:
        """Count what `other` has counted; in float64, so that the order hardly matters."""
        _same(self.features, other.features)
        self.sums += other.sums.to(self.device)
        self.squares += other.squares.to(self.device)
        self.tokens += other.tokens

    def totals(self) -> dict[str, Tensor]:
        """What processes add up, by name."""
        return {"tokens": torch.tensor(self.tokens), "sums": self.sums, "squares": self.squares}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from other sums, those of all processes for instance."""
        self.tokens = int(totals["tokens"])
        self.sums, self.squares = totals["sums"], totals["squares"]

    @property
    def silent(self) -> bool:
        """No token came, or all of them were zero: there is nothing to weigh with."""
        return self.tokens == 0 or not bool(self.squares.any())

    @property
    def norms(self) -> Tensor:
        """[features], float64: root mean square of every feature, its l2 norm over √tokens."""
        return (self.squares / max(self.tokens, 1)).sqrt()

    @property
    def means(self) -> Tensor:
        """[features], float64."""
        return self.sums / max(self.tokens, 1)

    @property
    def variances(self) -> Tensor:
        """[features], float64: mean squared distance from the mean."""
        return (self.squares / max(self.tokens, 1) - self.means.square()).clamp_min(0)


@dataclass(eq=False)
class SecondMoment:
    """H = sum of x xᵀ over the tokens: the Hessian of a linear layer's squared output error.

    What calls of `add` bring is summed in float64 and rounded once, when somebody looks: the order
    of samples, and how processes share them, then make no difference (but for one number in some
    hundred millions, by its last bit). In float32 they would, and a mask tips at less.

    Attributes:
        features: width of the layer's input.
        device: where the sums are held.
        dtype: float32 or float64, of the products.
        tokens: vectors seen.
    """

    features: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    tokens: int = field(default=0, init=False)
    _sum: Tensor | None = field(default=None, init=False, repr=False)
    _rounded: Tensor | None = field(default=None, init=False, repr=False)
    _derived: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"a second moment can't be summed in {self.dtype}")

    @property
    def products(self) -> Tensor:
        """[features, features], sum of x xᵀ, of which only the lower triangle counts."""
        if self._rounded is None:
            self._rounded = self._wide().to(self.dtype)
            self._sum = None  # not two of the largest tensors there are
        return self._rounded

    @products.setter
    def products(self, products: Tensor) -> None:
        self._sum, self._rounded = None, products
        self._derived.clear()

    def _wide(self) -> Tensor:
        """The sum as it goes on, in float64."""
        if self._sum is None:
            size = (self.features, self.features)
            self._sum = (
                torch.zeros(size, dtype=torch.float64, device=self.device)
                if self._rounded is None
                else self._rounded.double()
            )
        return self._sum

    def add(self, x: Tensor, where: str = "") -> None:
        """Count the vectors of x; see `Norms.add`."""
        rows = _rows(x, self.features, self.dtype, where)
        flat = rows.reshape(-1)
        if not math.isfinite(float(flat.dot(flat))):  # of which every square is a part
            _check(x, self.dtype, where)
        rows = rows.to(self.device)
        with exact():
            add_lower(self._begun(), rows, rows)
        self.tokens += rows.shape[0]

    def merge(self, other: Self) -> None:
        """Count what `other` has counted, of another process for instance."""
        _same(self.features, other.features)
        theirs = other.products if other._sum is None else other._sum
        self._begun().add_(theirs.to(self.device))
        self.tokens += other.tokens

    def _begun(self) -> Tensor:
        """The sum, about to change."""
        wide, self._rounded = self._wide(), None
        self._derived.clear()
        return wide

    def totals(self) -> dict[str, Tensor]:
        """What processes add up; see `Norms.totals`."""
        return {"tokens": torch.tensor(self.tokens), "products": self._wide()}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from other sums; see `Norms.take`."""
        self.products = totals["products"]
        self._sum, self._rounded = self._rounded, None
        self.tokens = int(totals["tokens"])

    @property
    def silent(self) -> bool:
        """No token came, or all of them were zero: there is nothing to weigh with."""
        return self.tokens == 0 or not bool(self.products.diagonal().any())

    @property
    def hessian(self) -> Tensor:
        """[features, features], a new tensor: sum of x xᵀ over tokens, divided by their number."""
        return mirrored(self.products).div_(max(self.tokens, 1))

    @property
    def norms(self) -> Tensor:
        """[features], float64: root mean square of every feature."""
        return (self.products.diagonal().double() / max(self.tokens, 1)).sqrt()

    def derived(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once: layers that read one value share one factor.

        It is forgotten at the next `add` or `merge`, and goes with the statistic.
        """
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]


@dataclass(eq=False)
class Moments(SecondMoment):
    """A second moment with the sum of x, for what works about the mean.

    Attributes:
        sums: [features], float64, sum of x.
    """

    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums = torch.zeros(self.features, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, where: str = "") -> None:
        """Count the vectors of x; see `Norms.add`."""
        super().add(x, where)
        rows = _rows(x, self.features, self.dtype, where)
        self.sums += rows.sum(0).to(self.device)

    def merge(self, other: Self) -> None:
        """Count what `other` has counted, of another process for instance."""
        super().merge(other)
        self.sums += other.sums.to(self.device)

    def totals(self) -> dict[str, Tensor]:
        """What processes add up; see `Norms.totals`."""
        return {**super().totals(), "sums": self.sums}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on from other sums; see `Norms.take`."""
        super().take(totals)
        self.sums = totals["sums"]

    @property
    def means(self) -> Tensor:
        """[features], float64."""
        return self.sums / max(self.tokens, 1)

    @property
    def variances(self) -> Tensor:
        """[features], float64: mean squared distance from the mean."""
        return (self.norms.square() - self.means.square()).clamp_min(0)

    def centred(self) -> SecondMoment:
        """That of x minus its mean, in float64: what a layer with a bias is fitted by."""
        result = SecondMoment(self.features, self.device, torch.float64)
        mean = self.means
        result.products = self.products.double() - self.tokens * torch.outer(mean, mean)
        result.products.diagonal().clamp_(min=0)
        result.tokens = self.tokens
        return result


Statistic = Norms | SecondMoment


def add_lower(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, which is symmetric, to the lower triangle of `sums` (and to some of above).

    Args:
        sums: [features, features], in the type of the rows or a wider one.
        left: [tokens, features].
        right: [tokens, features].
    """
    strip = STRIP if len(sums) < 1024 else WIDE
    end = 0
    for part, x in zip(torch.split(sums, strip), torch.split(left, strip, 1), strict=True):
        end += len(part)
        if part.dtype == x.dtype:
            part[:, :end].addmm_(x.T, right[:, :end])
        else:
            part[:, :end] += x.T @ right[:, :end]


def mirrored(lower: Tensor) -> Tensor:
    """A new symmetric matrix from the lower triangle of one."""
    full = lower.tril()
    full += full.tril(-1).T
    return full


def _rows(x: Tensor, features: int, dtype: torch.dtype, where: str) -> Tensor:
    """The vectors of x in the type of the sums."""
    if x.ndim == 0 or x.shape[-1] != features:
        raise CalibrationError(
            f"activations of shape {list(x.shape)} do not end in {features} features",
            where=where or None,
        )
    return x.detach().reshape(-1, features).to(dtype)


def _check(x: Tensor, dtype: torch.dtype, where: str) -> None:
    """Refuse x if the squares of some feature have no sum in `dtype`; all of them may have none."""
    rows = x.detach().reshape(-1, x.shape[-1])
    bad = ~torch.isfinite(rows)
    if bad.any():
        token, feature = bad.nonzero()[0].tolist()
        raise CalibrationError(
            f"{int(bad.sum())} of {bad.numel()} activations are NaN or infinite",
            where=where or None,
            why=f"the first is feature {feature} of token {token}",
            hint="leave this sample out, or run the model in a wider type",
        )
    if not finite(rows.to(dtype).square().sum(0)):
        raise CalibrationError(
            "activations are too large to square",
            where=where or None,
            why=f"the largest is {float(rows.abs().max()):.3g}, and sums are held in {dtype}",
            hint="collect in float64",
        )


def _same(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise CalibrationError(f"statistics of {ours} and {theirs} features can't be merged")
