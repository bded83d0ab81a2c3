"""The site of vision-language models before the language model: visual tokens on their way into it.

It can be built by hand, which is how methods are tested; every value may be a tensor or a function that makes it. The
site inside the language model is :class:`tokred.vlm.in_llm.LayerSite`.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.checks import check_choice
from tokred.core.method import Parameters
from tokred.core.place import Place, PlacedMethod
from tokred.core.reduction import Reduction
from tokred.core.site import Lazy, Site, Stage
from tokred.errors import MissingInputError
from tokred.kernels.dispatch import without_autocast
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.tiles import Tiles

if TYPE_CHECKING:
    from tokred.vlm.shots import Shots


@dataclass(frozen=True)
class Tile:
    """The part of an image that a site is, where a host cuts images into tiles.

    Attributes:
        index: of this tile, the whole image first where the host adds one.
        count: tiles of the image, the whole image counted.
        is_global: whether it is the whole image at low resolution.
    """

    index: int = 0
    count: int = 1
    is_global: bool = True


class VisualSite(Site):
    """Visual tokens of one image, or of several of one shape, on their way into the language model.

    Args:
        x: ``(B, N, C)`` features as they would enter the language model.
        tower: ``(B, N, Ct)`` the tower's patch features before the projector, in the order of ``x``.
        q, k: ``(B, H, P + T, D)`` queries and keys of the tower's layer whose features are used, ``P`` class tokens
            first, then its ``T`` patches; the attributes are those of the class tokens and of the ``N`` tokens alone.
        patches: ``(N,)`` int64 which of the tower's patches the tokens are, where the host cuts some away: attention is
            shared out over all of them, as in the tower; None: all, in order.
        prefix: those class tokens; ``x`` has none.
        layer_heads: gives ``(q, k)`` of another layer of the tower, by its index.
        received: ``(B, H, N)`` what every token receives in the tower's attention, where a token is several patches, so
            that queries and keys are not those of tokens; None: made from ``q`` and ``k``.
        text: ``(B, T, C)`` embeddings of the prompt's text in the language model's space.
        text_mask: ``(B, T)`` bool, False on padding; None: all real.
        tile: which part of the image this is; None: all of it.
        sample, image: for each of the ``B`` which sample of the batch it belongs to, and which image of it; the
            attributes are ``samples`` and ``image``.
        tiles: how all tiles of the image lie, where it is cut into several; None: it is not.
        whole: gives the class token's attention ``(B, H, N)`` to the tile that shows the whole image, by layer.
        project: the projector, from ``(B, N, Ct)`` to ``(B, N, C)``, where it acts on tokens one by one.
        shots: gives what became of the frames of each clip in the tower, see :mod:`tokred.vlm.shots`.
        more: see :class:`tokred.Site`.
    """

    def __init__(
        self,
        *,
        x: Lazy = None,
        tower: Lazy = None,
        received: Lazy = None,
        patches: Tensor | None = None,
        layer_heads: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        text_mask: Tensor | None = None,
        tile: Tile | None = None,
        sample: tuple[int, ...] | None = None,
        image: tuple[int, ...] | None = None,
        tiles: Tiles | None = None,
        whole: Callable[[int], Tensor] | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
        shots: Callable[[], tuple[Shots, ...]] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(x=x, **more)
        self._values["tower"] = tower
        self._values["received"] = received
        self.patches = patches
        self._layer_heads = layer_heads
        self.text_mask = text_mask
        self.tile = Tile() if tile is None else tile
        b = self.shape[0]
        self.samples = tuple(range(b)) if sample is None else sample
        self.image = (0,) * b if image is None else image
        self.tiles = tiles
        self._whole = whole
        self.project = project
        self._shots = shots

    @property
    def shots(self) -> tuple[Shots, ...]:
        """Frames of each of the ``B`` clips, and what became of them inside the tower, with scores of the tokens left.

        Raises:
            MissingInputError: the host does not supply it.
        """
        if self._shots is None:
            raise MissingInputError("this site does not supply 'shots', the frames that are left behind the tower")
        return self._shots()

    @property
    def known_grid(self) -> tuple[int, int] | None:
        """The grid, or None where the tokens form none."""
        return self._grid

    @property
    def tower(self) -> Tensor:
        """``(B, N, Ct)`` the tower's patch features before the projector."""
        return self._get("tower")

    @property
    def q(self) -> Tensor:
        """``(B, H, P + N, D)`` queries of the tower, of class tokens and tokens."""
        return self._own(self._get("q"))

    @property
    def k(self) -> Tensor:
        """``(B, H, P + N, D)`` keys of the tower, of class tokens and tokens."""
        return self._own(self._get("k"))

    @property
    def class_attention(self) -> Tensor:
        """``(B, N)`` float32: the class token's attention to every patch, mean over heads; shares of the whole row."""
        return self.class_attention_heads.mean(1)

    @property
    def class_attention_heads(self) -> Tensor:
        """``(B, H, N)`` float32: the same for each head.

        Raises:
            MissingInputError: the tower has no class token, or its attention is not at hand.
        """
        found = self._find("class_attention")
        if found is None:
            self._need_class()
            found = self.of_tokens(self.attention.columns(rows=slice(0, 1)))
            self._values["class_attention"] = found
        return (found if found.ndim == 3 else found.unsqueeze(1)).float()

    def layer_class_attention(self, layer: int) -> Tensor:
        """``(B, H, N)`` float32: the class token's attention in another layer of the tower.

        Args:
            layer: 0 is the first; negative counts from the last.

        Raises:
            MissingInputError: as :attr:`class_attention_heads`.
        """
        self._need_class()
        attention = Attention(*self.tower_heads(layer), scale=self.scale)
        return self.of_tokens(attention.columns(rows=slice(0, 1)))

    def layer_heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(B, H, P + N, D)`` queries and keys of another layer of the tower; see :meth:`layer_class_attention`."""
        q, k = self.tower_heads(layer)
        return self._own(q), self._own(k)

    def tower_heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(B, H, P + T, D)`` the same of all of the tower's patches; :meth:`of_tokens` takes out the tokens'."""
        if self._layer_heads is None:
            raise MissingInputError("this site does not supply 'tower_layers', the attention of other tower layers")
        return self._layer_heads(layer)

    def whole_attention(self, layer: int) -> Tensor:
        """``(B, H, N)`` float32: the class token's attention to the tile that shows the whole image.

        Args:
            layer: of the tower, as :meth:`layer_class_attention` has it.

        Raises:
            MissingInputError: the host does not supply it.
        """
        if self._whole is None:
            raise MissingInputError("this site does not supply the attention to the whole image's tile")
        return self._whole(layer)

    def column_scores(self, weight: Tensor | None = None, *, rows: slice | None = None) -> Tensor:
        """``(B, H, N)`` float32: how much of the tower's attention every patch receives, see
        :meth:`tokred.Site.column_scores`; all queries vote, class tokens included unless ``weight`` says otherwise."""
        if weight is None and rows is None:
            given = self._find("received")
            if given is not None:
                return given.float()
        return self.of_tokens(self.attention.columns(weight, rows))

    def of_tokens(self, scores: Tensor) -> Tensor:
        """``(..., P + T)`` of class tokens and the tower's patches, to ``(..., N)`` of the tokens."""
        scores = scores[..., self.prefix :]
        return scores if self.patches is None else scores[..., self.patches]

    def keep(self, chosen: Tensor, mask: Tensor | None = None) -> Reduction:
        """The reduction that keeps ``chosen``, ``(B, M)`` ascending indices of ``x``; ``mask`` False on padding."""
        return Reduction.keep(chosen, self.shape[1], mask)

    def _own(self, heads: Tensor) -> Tensor:
        if self.patches is None:
            return heads
        return torch.cat([heads[:, :, : self.prefix], heads[:, :, self.prefix :][:, :, self.patches]], 2)

    def _need_class(self) -> None:
        if self.prefix == 0 or not self.class_token:
            raise MissingInputError(
                "the vision tower has no class token, so there is no 'class_attention': take the attention's columns "
                "(site.column_scores()) instead"
            )


Space = Literal["x", "tower"]

# Settings that let a method run where the tower has no class token, or does not hand its features over.
_LESS = {"attention": "received", "space": "x", "relevance": "none"}


@dataclass(frozen=True)
class ProjectorMethod(PlacedMethod):
    """Base of methods at the stage ``projector``.

    A subclass says how many of ``n`` tokens stay (:meth:`count`) and which (:meth:`choose`).

    Args:
        positions: ``"keep"``: tokens keep the positions that they had in the whole prompt; ``"repack"``: those that are
            left are counted anew, where a host's positions are plain numbers. A keyword of every method.

    Attributes:
        space: the features that are merged: ``"x"``, as they enter the language model, or ``"tower"``: before the
            projector, which then runs on the merged ones, where the host can do that.
        tower_layers: layers of the tower whose attention :meth:`choose` reads beside that of the features' layer.
        joint: whether one budget is shared by all tiles of an image, where a host cuts images into tiles.
    """

    stage: ClassVar[Stage] = "projector"
    joint: ClassVar[bool] = False
    space = "x"

    positions: Literal["keep", "repack"] = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        check_choice(self.positions, "positions", ("keep", "repack"))

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """0-based; negative ones count from the end."""
        return ()

    @property
    def drops(self) -> bool:
        """True where tokens may leave without going into others; False where all are merged into those that stay."""
        return True

    @abstractmethod
    def count(self, n: int) -> int:
        """How many of ``n`` tokens stay; at most so many where it depends on the image.

        Raises:
            ValueError: less than one.
        """

    @abstractmethod
    def choose(self, site: VisualSite) -> Reduction:
        """Decide; called where something is to be decided. Gradients are recorded where :attr:`gradients` says so."""

    def with_budget(self, n: int) -> ProjectorMethod:
        """The same method that leaves ``n`` tokens of an image.

        Raises:
            ValueError: it has no budget to set.
        """
        if not any(f.name == "budget" for f in dataclasses.fields(self)):
            raise ValueError(f"{self.name!r} has no budget that could be set for each image")
        changes: dict[str, Any] = {"budget": n}
        return dataclasses.replace(self, **changes)

    def variants(self) -> Iterator[tuple[str, ProjectorMethod]]:
        """The same method with settings that read less, for hosts that supply less: in words, and made."""
        known = {f.name for f in dataclasses.fields(self)}
        less = {k: v for k, v in _LESS.items() if k in known and getattr(self, k) != v}
        for count in range(1, len(less) + 1):
            for names in itertools.combinations(less, count):
                words = ", ".join(f"{k}={less[k]!r}" for k in names)
                changes: dict[str, Any] = {k: less[k] for k in names}
                yield words, dataclasses.replace(self, **changes)

    def tokens(self, n: int, place: Place) -> int:
        """Protected tokens and :meth:`count` of the others."""
        free = place.free(n)
        return n - free + min(free, self.count(free)) if free > 0 else n

    def reduce(self, site: Site) -> Reduction:
        """Keep, or merge into, some of each image's tokens.

        Raises:
            ValueError: the images of the site are padded.
            MissingInputError: the site lacks something that the method reads.
        """
        b, n = site.shape
        if site.mask is not None:
            raise ValueError("a site of the stage 'projector' has images of one length and no padding")
        if not isinstance(site, VisualSite):
            raise TypeError(f"{self.name!r} acts on a VisualSite, got {type(site).__name__}")
        if n == 0 or not self.acts(n, Place(site.layer, site.depth)):
            return Reduction.identity((b,), n, site.device)
        with self.recording(), without_autocast(site.device):
            return self.choose(site)


@dataclass(frozen=True)
class Budgeted(ProjectorMethod):
    """Base of methods that keep a fixed number or share of each image's tokens, named ``budget``."""

    example: ClassVar[Parameters] = {"budget": 5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)
