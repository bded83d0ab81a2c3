"""The same rows for every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.kv.parts import Budget, check_amount


@dataclass(frozen=True)
class Uniform(Budget):
    """The same number of rows in every layer and head.

    Args:
        amount: a share in (0, 1], tokens, or bytes of the whole cache of a sample.
    """

    name: ClassVar[str] = "uniform"

    amount: float | int | str = 0.5

    @property
    def shorthand(self) -> float | int | str:
        """The form in which users write it where any budget can be given."""
        return self.amount

    def __post_init__(self) -> None:
        check_amount(self.amount)
