"""``BlockMethod``: the base of methods that act in the blocks of an encoder, and what many of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from tokred.core.checks import check_choice
from tokred.core.matching import mergeable
from tokred.core.method import MANY, Method, Parameters
from tokred.core.schedules import ScheduleLike, schedule
from tokred.core.site import Site, Stage
from tokred.encoder.metric import METRICS, Metric

Where = Literal["mid", "end", "queries"]


class Place(NamedTuple):
    """The block that a method is asked about.

    Attributes:
        layer: which block, 0-based.
        depth: of how many.
        prefix: protected tokens in front, such as the class token.
        suffix: protected tokens at the end.
    """

    layer: int
    depth: int
    prefix: int = 0
    suffix: int = 0

    @classmethod
    def of(cls, site: Site) -> Place:
        """The place that a site stands at."""
        return cls(site.layer, site.depth, site.prefix, site.suffix)

    @property
    def protected(self) -> int:
        """Tokens that are never reduced."""
        return self.prefix + self.suffix

    def free(self, n: int) -> int:
        """How many of ``n`` tokens may be reduced."""
        return n - self.prefix - self.suffix


class BlockMethod(Method):
    """Base of all methods of the stage ``block``; subclasses are frozen dataclasses of their parameters.

    Attributes:
        drops: whether tokens can vanish (rather than live on in another), which decides how outputs are restored.
        where: the place in a block that suits the method: ``"mid"``, between attention and MLP (hosts whose blocks
            cannot be split reduce at their end); ``"end"``, after the block; ``"queries"``, inside the attention, whose
            queries are reduced while keys and values stay complete.
        uneven: whether samples of one batch may keep different numbers, told apart by the mask of the reduction.
        by_mask: whether :meth:`reduce` decides on batches that are padded from the start, by the mask of the site;
            where not, hosts of such batches ask it about each sample alone.
        clips: whether a method that reads the grid goes on with it frame after frame where the tokens are a video's.
    """

    stage: ClassVar[Stage] = "block"
    drops: ClassVar[bool] = False
    where: ClassVar[Where] = "mid"
    uneven: ClassVar[bool] = False
    by_mask: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the parameters; bases of several ones call one another."""

    @property
    def proportional(self) -> bool:
        """Whether attention adds the log of each token's size (proportional attention)."""
        return False

    @abstractmethod
    def tokens(self, n: int, place: Place) -> int:
        """How many of ``n`` tokens remain after this block; where the count depends on the image, at most so many."""

    def acts(self, n: int, place: Place) -> bool:
        """Whether :meth:`reduce` is called at this place at all. An adapter that hears no runs the host's own block,
        which makes "nothing to remove" the identity bit for bit; so does a method that answers with
        :meth:`tokred.Reduction.identity`. By default :meth:`tokens` decides; methods whose count depends on the image
        say so here."""
        return self.tokens(n, place) != n

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Whether it acts anywhere on more tokens than any budget in numbers holds."""
        return any(self.acts(MANY, Place(layer, depth)) for layer in (range(depth) if layers is None else layers))


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

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what is compared."""
        return frozenset({"x", self.metric})

    @property
    def proportional(self) -> bool:
        """As ``prop_attn`` says."""
        return self.prop_attn
