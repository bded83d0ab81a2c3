"""``Supplier``: what the host records of all stages share: telling what a method reads and they cannot hand over."""

from __future__ import annotations

from typing import ClassVar, Self

from tokred.core.method import Method
from tokred.errors import MissingInputError


class Supplier:
    """Base of host records.

    Attributes:
        family: for messages.
        supplies: what sites hand over.
        windowless: why there are no windows to choose from.
    """

    family: str
    supplies: frozenset[str]
    windowless: ClassVar[str] = "the attention of {family} does not run in windows"

    @property
    def offered(self) -> frozenset[str]:
        """What a method may read."""
        return self.supplies

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """What the method reads and this host cannot supply."""
        reads = method.reads if isinstance(method, Method) else method().reads
        return reads - self.offered

    def check_reads(self, method: Method) -> None:
        """Refuse a method that reads what is not there.

        Raises:
            MissingInputError: with what is missing, and what works instead where that is known.
        """
        missing = self.missing(method)
        if missing:
            raise MissingInputError(
                f"{method.name!r} reads {', '.join(sorted(missing))}, which {self.family} does not supply "
                f"(it supplies {', '.join(sorted(self.offered))}){self.hint(method)}"
            )

    def hint(self, method: Method) -> str:
        """What works instead of a method that is refused, as the end of a message."""
        return ""

    def choose(self, windows: str) -> Self:
        """This host with the blocks that ``windows`` names.

        Raises:
            ValueError: the model has no windows to choose from.
        """
        if windows != "auto":
            raise ValueError(f"windows is {windows!r}, but {self.windowless.format(family=self.family)}")
        return self
