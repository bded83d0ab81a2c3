"""``Host``: what tokred asks of a model of any stage: can a method run here, patch it, what did it do.

An adapter is a module with ``match(model) -> Host | None``, named in the table of :mod:`tokred.adapters`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from tokred.core.learned import Facts
from tokred.core.method import Method
from tokred.core.report import Report
from tokred.errors import MissingInputError, UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.changes import Changes


class State:
    """Base of what the patched modules of one host share while they run, and what its report is made of.

    Attributes:
        stage: of the host.
        method: that acts.
        module: of the method, where it has weights.
        losses: terms of the training loss, of the last forward in training; None: there was none.
        guesses: what the method said of that forward's targets, see :class:`tokred.core.learned.Learned`.
    """

    stage: ClassVar[str] = ""
    method: Any
    module: nn.Module | None = None
    losses: dict[str, Tensor] | None = None
    guesses: Sequence[Tensor] = ()


class Host(ABC):
    """A model, or a part of one, that methods of one stage can act on.

    Attributes:
        family: for messages, such as ``"timm VisionTransformer"``.
        model: the module that the user gave, or a part of it.
        stage: of the methods.
        supplies: what sites hand over.
        windowless: why there are no windows to choose from.

    Beside these a host has ``blocks``, the names and modules that ``where`` chooses from; ``depth``, how many places
    there are for a method; and ``how``, which says in the table of support in what way methods run.
    """

    family: str
    model: nn.Module
    stage: str
    supplies: frozenset[str]
    windowless: ClassVar[str] = "the attention of {family} does not run in windows"

    @abstractmethod
    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            UnsupportedModelError: something on the model would pass a patch by.
            ValueError: its parameters do not fit the model, or ``expose`` does not.
        """

    def model_facts(self) -> Facts:
        """Facts from which a method with weights builds its module; asked of hosts that supply ``"module"``.

        Raises:
            UnsupportedModelError: it cannot be told.
        """
        raise UnsupportedModelError(f"a method with weights cannot be built for {self.family}: its facts are not known")

    @abstractmethod
    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> State:
        """Let the method act. :meth:`check` has passed; whatever is changed goes through ``changes``."""

    @abstractmethod
    def report(self, state: Any, methods: Sequence[Method]) -> Report:
        """The last forward.

        Args:
            state: that :meth:`patch` returned.
            methods: that act on the model, those of other stages included.

        Raises:
            NothingRecordedError: no (uncompiled) forward has run since the model was patched.
        """

    @property
    def offered(self) -> frozenset[str]:
        """The inputs that a method may read here."""
        return self.supplies

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """Inputs that the method reads and this host cannot supply."""
        one: Method = method if isinstance(method, Method) else method()
        reads = one.reads
        return reads - self.offered

    def check_stage(self, method: Method) -> None:
        """Refuse a method of another stage.

        Raises:
            MissingInputError: it acts at another one.
        """
        if method.stage != self.stage:
            raise MissingInputError(
                f"{method.name!r} acts at stage {method.stage!r}, but {self.family} offers only stage {self.stage!r}"
            )

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
        """The end of a refusal: methods that work here instead, where some are known."""
        return ""

    def choose(self, windows: str) -> Self:
        """This host with the blocks that ``windows`` names.

        Raises:
            ValueError: the model has no windows to choose from.
        """
        if windows != "auto":
            raise ValueError(f"windows is {windows!r}, but {self.windowless.format(family=self.family)}")
        return self
