"""``BlockMethod``: the base of methods that act in the blocks of an encoder, and what many of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import nn

from tokred.core.checks import check_choice, check_flags, is_count
from tokred.core.matching import mergeable
from tokred.core.method import Parameters
from tokred.core.place import Place, PlacedMethod
from tokred.core.schedules import ScheduleLike, schedule
from tokred.core.site import Site, Stage
from tokred.encoder.metric import METRICS, Metric
from tokred.errors import MissingInputError

Where = Literal["before", "mid", "end", "queries"]
M = TypeVar("M", bound=nn.Module)


class BlockMethod(PlacedMethod):
    """Base of all methods of the stage ``block``; subclasses are frozen dataclasses of their parameters.

    Attributes:
        drops: whether tokens can vanish (rather than live on in another), which decides how outputs are restored.
        where: the place in a block that suits the method: ``"mid"``, between attention and MLP (hosts whose blocks
            cannot be split reduce at their end); ``"before"``, at its entry, where there is no attention yet;
            ``"end"``, after the block; ``"queries"``, inside the attention, whose queries are reduced while keys and
            values stay complete.
        uneven: whether samples of one batch may keep different numbers, told apart by the mask of the reduction.
        by_mask: whether :meth:`reduce` decides on batches that are padded from the start, by the mask of the site;
            where not, hosts of such batches ask it about each sample alone.
        clips: whether a method that reads the grid goes on with it frame after frame where the tokens are a video's.
        sums: whether what comes out of the last block is summed over all blocks, for which all samples of a batch have
            to be asked together.
    """

    stage: ClassVar[Stage] = "block"
    drops: ClassVar[bool] = False
    where: ClassVar[Where] = "mid"
    uneven: ClassVar[bool] = False
    by_mask: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    sums: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the parameters; bases of several ones call one another."""

    def joins(self, depth: int) -> int | None:
        """The block, of ``depth``, before which tokens that left come back, as they were when they left; ``depth``:
        behind the last one. None may leave behind the one before it, or in it. None: none comes back."""
        return None

    @property
    def proportional(self) -> bool:
        """True if attention adds the log of each token's size (proportional attention)."""
        return False

    def its_module(self, site: Site, kind: type[M], use: str = "") -> M:
        """The module of a site.

        Args:
            site: that is to supply it.
            kind: its class.
            use: what the method does with it, for the error; empty: it decides by it.

        Raises:
            MissingInputError: the site supplies none, or another one.
        """
        module = site.learned.module
        if not isinstance(module, kind):
            raise MissingInputError(
                f"this site does not supply 'module', {use or f'by which {self.name} decides'}: give "
                f"learned=Learned(module), with the module that {type(self).__name__}.module makes"
            )
        return module


@dataclass(frozen=True)
class Scheduled(BlockMethod):
    """Base of methods that remove ``r`` tokens in every block.

    Args:
        r: tokens removed per block: an integer, a pair ``(r, inflect)``, or a list with one entry a block.
    """

    usual: ClassVar[Parameters] = {"r": 8}
    example: ClassVar[Parameters] = {"r": 4}
    nothing: ClassVar[Parameters | None] = {"r": 0}

    r: ScheduleLike = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "r", schedule(self.r))

    def check(self, depth: int) -> None:
        """A list may not be longer than the model is deep."""
        schedule(self.r).check(depth)

    def most(self, n: int, place: Place) -> int:
        """How many of ``n`` tokens can go in one block: half of the unprotected ones, as pairs merge."""
        return mergeable(n, place.prefix, place.suffix)

    def tokens(self, n: int, place: Place) -> int:
        """``n`` less this block's ``r``, capped."""
        return n - min(schedule(self.r).at(place.layer, place.depth), self.most(n, place))


class Compared(BlockMethod):
    """Base of methods that compare tokens by a metric; a subclass has the two fields, where its order puts them."""

    metric: Metric
    prop_attn: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.metric, "metric", METRICS)
        check_flags(prop_attn=self.prop_attn)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what is compared."""
        return frozenset({"x", self.metric})

    @property
    def proportional(self) -> bool:
        return self.prop_attn


class Staged(BlockMethod):
    """Base of methods that decide before some blocks, at the end of those before them; a subclass has the field, where
    its order puts it.

    Attributes:
        twelfths: of the depth, where it is decided unless ``at`` says so.
        at: numbers of blocks, counted from 0; None: by ``twelfths``.
    """

    twelfths: ClassVar[tuple[int, ...]]
    at: Sequence[int] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at is not None:
            given: object = self.at
            if not isinstance(given, list | tuple):
                raise TypeError(f"at must be a list of blocks, got {self.at!r}")
            at = tuple(self.at)
            if not all(is_count(i, 1) for i in at) or sorted(set(at)) != list(at):
                raise ValueError(f"at must be rising numbers of blocks, the first at least 1, got {self.at!r}")
            object.__setattr__(self, "at", at)

    def places(self, depth: int) -> tuple[int, ...]:
        """The blocks before which it is decided."""
        if self.at is not None:
            return tuple(self.at)
        return tuple(sorted({max(1, depth * i // 12) for i in self.twelfths} & set(range(1, depth))))

    def check(self, depth: int) -> None:
        """Every block of ``at`` is there."""
        if self.at is not None and any(i >= depth for i in self.at):
            raise ValueError(f"at is {list(self.at)}, but the model has {depth} blocks (0 to {depth - 1})")

    def stage_of(self, layer: int, depth: int) -> int | None:
        """Which decision, from 0, is taken at the end of block ``layer``; None: none is."""
        places = self.places(depth)
        return places.index(layer + 1) if layer + 1 in places else None
