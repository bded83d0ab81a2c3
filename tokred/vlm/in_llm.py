"""Inside the language model: the site at the input of one decoder layer, and the base of methods that act there.

A site can be built by hand, which is how methods are tested; every value may be a tensor or a function that makes it.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.place import Place, PlacedMethod
from tokred.core.reduction import Reduction
from tokred.core.selection import best_among
from tokred.core.site import Lazy, Site, Stage
from tokred.errors import MissingInputError
from tokred.kernels.dispatch import without_autocast
from tokred.vlm.tools.layers import check_depth as check_depth
from tokred.vlm.tools.layers import check_layer as check_layer

Of = Literal["before", "own"]


class Prompt(NamedTuple):
    """The prompt as it enters the language model, whatever left since.

    Attributes:
        embeds: ``(B, W, C)`` embeddings, image features among them.
        visual: ``(B, W)`` bool, visual tokens.
        text: ``(B, W)`` bool, real tokens of the prompt that are not.
        columns: ``(B, L)`` int64, which of the ``W`` each column of the site is.
    """

    embeds: Tensor
    visual: Tensor
    text: Tensor
    columns: Tensor


class LayerSite(Site):
    """All tokens at the input of one decoder layer.

    A method answers with a reduction of the ``L`` columns; what is not visual has to stay (:meth:`keep_visual` sees to
    it).

    Args:
        x: ``(B, L, C)`` hidden states that enter the layer.
        visual: ``(B, L)`` bool, the visual tokens that are still there; None (a language model alone): none is
            protected, see :attr:`free`.
        mask: ``(B, L)`` bool, False on padding and filler.
        counts: visual tokens of each sample here.
        initial: and before the first layer.
        real: tokens of each sample here, padding aside.
        image: ``(B, L)`` int64, which image of its sample a visual token belongs to; None: all the first.
        image_initial: gives the visual tokens of each sample's image of that number, before the first layer.
        moment: gives ``(B, L, 2)`` int64, frame and place in the frame of every visual token, see :attr:`moment`; None:
            pictures are images.
        place: gives ``(B, L, 2)`` float32, row and column of every visual token in its own image, both in [0, 1], or
            None where they are not known. None: the site says nothing about places, see :attr:`placed`.
        ends: for each sample whether the prompt's last token is visual; it stays whatever a method says, since what
            follows is told from it.
        aligned: whether there is no padding behind the prompt.
        end: columns from here on are no part of the prompt (drafts that wait for verification); None: there are none.
        prompt: embeddings of the prompt, see :class:`Prompt`.
        stream: a pair ``(B, L, C)``: what entered the layer before, and what left the norm behind its attention.
        own, before: causal :class:`tokred.core.attention.Attention` of this layer before it runs, and of the layer
            before, or what makes it; keys of earlier turns stand before those of the ``L`` columns.
        more: see :class:`tokred.Site`; ``v`` is this layer's.
    """

    def __init__(
        self,
        *,
        x: Lazy = None,
        visual: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
        initial: tuple[int, ...] | None = None,
        real: tuple[int, ...] | None = None,
        image: Lazy = None,
        image_initial: Callable[[int], tuple[int, ...]] | None = None,
        moment: Lazy = None,
        place: Callable[[], Tensor | None] | None = None,
        ends: tuple[bool, ...] | None = None,
        aligned: bool | None = None,
        end: int | None = None,
        prompt: Prompt | Callable[[], Prompt] | None = None,
        stream: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor] | None] | None = None,
        own: Attention | Callable[[], Attention] | None = None,
        before: Attention | Callable[[], Attention] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(x=x, attention=own, **more)
        b, n = self.shape
        self.visual = torch.zeros(b, n, dtype=torch.bool, device=self.device) if visual is None else visual
        self.counts = tuple(self.visual.sum(1).tolist()) if counts is None else counts
        self.initial = self.counts if initial is None else initial
        if real is None:
            real = (n,) * b if self.mask is None else tuple(self.mask.sum(1).tolist())
        self.real = real
        self._image = image
        self._image_initial = image_initial
        self._moment = moment
        self._place = place
        self._ends = ends
        self._aligned = aligned
        self.end = n if end is None else end
        self._heads: dict[str, Any] = {"own": own, "before": before}
        self._extras: dict[str, Any] = {"prompt": prompt, "stream": stream}

    @property
    def prompt(self) -> Prompt:
        """Embeddings of the prompt.

        Raises:
            MissingInputError: the host does not supply them.
        """
        return self._extra("prompt")  # type: ignore[no-any-return]

    @property
    def stream(self) -> tuple[Tensor, Tensor]:
        """Input of the layer before, and output of the norm behind its attention, ``(B, L, C)`` each.

        Raises:
            MissingInputError: the host does not supply them.
        """
        return self._extra("stream")  # type: ignore[no-any-return]

    def _extra(self, name: str) -> Any:
        found = self._extras[name]
        if callable(found):
            found = self._extras[name] = found()
        if found is None:
            raise MissingInputError(f"this site does not supply {name!r}")
        return found

    @property
    def image(self) -> Tensor:
        """``(B, L)`` int64: which image of its sample each visual token belongs to."""
        if self._image is None:
            return torch.zeros_like(self.visual, dtype=torch.long)
        if not isinstance(self._image, Tensor):
            self._image = self._image()
        assert self._image is not None  # a function that makes it does
        return self._image

    @property
    def moment(self) -> Tensor:
        """``(B, L, 2)`` int64: the frame of its clip that each visual token is of, and which place of that frame it is;
        those of an image, and such as are of no frame, are of frame 0, each at a place of its own."""
        if self._moment is None:
            place = torch.arange(self.visual.shape[1], device=self.device).expand_as(self.visual)
            self._moment = torch.stack([torch.zeros_like(place), place], -1)
        if not isinstance(self._moment, Tensor):
            self._moment = self._moment()
        assert self._moment is not None  # a function that makes it does
        return self._moment

    def image_counts(self, i: int) -> tuple[int, ...]:
        """Visual tokens of image ``i`` of each sample, before the first layer."""
        if self._image_initial is not None:
            return self._image_initial(i)
        return tuple((self.visual & (self.image == i)).sum(1).tolist())

    @property
    def placed(self) -> bool:
        """True if the site can tell whether :attr:`place` is known; one made by hand need not be able to."""
        return self._place is not None

    @property
    def place(self) -> Tensor | None:
        """``(B, L, 2)`` float32: row and column of every visual token in its image, in [0, 1]; None: not known."""
        return None if self._place is None else self._place()

    @property
    def newest(self) -> Tensor:
        """``(B, L)`` int64: how many real tokens of the prompt come after each column; ``L`` on others than those."""
        n = self.shape[1]
        real = (torch.arange(n, device=self.device) < self.end).expand(self.shape)
        if self.mask is not None:
            real = real & self.mask
        after = real.long().flip(1).cumsum(1).flip(1) - 1
        return torch.where(real, after, n)

    @property
    def aligned(self) -> bool:
        """True if every sample's last token of the prompt stands in its last column (no padding behind)."""
        if self._aligned is None:
            self._aligned = self.mask is None or bool(self.mask[:, self.end - 1].all())
        return self._aligned

    @property
    def last(self) -> Tensor:
        """``(B, L)`` bool: the prompt's last token, where it is visual."""
        return self.visual & (self.newest == 0)

    @property
    def ends(self) -> tuple[bool, ...]:
        """For each sample whether the prompt's last token is visual."""
        if self._ends is None:
            self._ends = tuple(self.last.any(1).tolist())
        return self._ends

    @property
    def text_rows(self) -> Tensor:
        """``(B, L)`` bool: real tokens of the prompt that are not visual."""
        rows = ~self.visual
        if self.mask is not None:
            rows = rows & self.mask
        if self.end < rows.shape[1]:
            rows = rows & (torch.arange(rows.shape[1], device=rows.device) < self.end)
        return rows

    @property
    def attention(self) -> Attention:
        """The attention of this layer, before it runs."""
        return self.attention_of("own")

    def attention_of(self, of: Of = "own") -> Attention:
        """Attention of this layer before it runs (``"own"``), or of the layer that has just run (``"before"``).

        Raises:
            MissingInputError: the host does not supply it, or there is no layer before.
            ValueError: it was made by hand, and is not causal.
        """
        found = self._heads[of]
        if found is None:
            raise MissingInputError(f"this site does not supply the attention rows of {of!r}")
        if callable(found):
            found = self._heads[of] = found()
        if not found.causal:
            raise ValueError(f"attention of a decoder layer is causal: make {of!r} with Attention(..., causal=True)")
        return found  # type: ignore[no-any-return]

    def row_scores(
        self,
        rows: int | Tensor = 1,
        *,
        of: Of = "own",
        heads: Literal["mean", "none", "max", "sum"] = "mean",
        group: str = "none",
    ) -> Tensor:
        """Attention of some query rows, mean over these rows; softmax over all earlier tokens, text included.

        Args:
            rows: so many of the prompt's last tokens (1: the last), or ``(B, L)`` bool or float weights of the rows;
                rows of padding do not vote. Weighted rows give their weighted mean.
            of: ``"before"``: the layer that has just run (FastV); ``"own"``: this layer, before it runs (PyramidDrop).
            heads: reduction over the heads.
            group: reduction over the query heads of one key head that comes first ("sum", "mean", "max"), see
                :meth:`Attention.columns`.

        Returns:
            ``(B, L)`` float32, or ``(B, H, L)`` for ``heads="none"``; zero on padding.

        Raises:
            MissingInputError: see :meth:`attention_of`.
            ValueError: ``rows`` names none or more than there are.
        """
        source = self.attention_of(of)
        first, weight = self._rows(rows)
        # Columns of earlier turns take part in the softmax, but none of them can leave.
        scores = source.columns(weight, slice(first, self.end), group)[..., source.offset :]
        if heads == "mean":
            return scores.mean(1)
        if heads == "sum":
            return scores.sum(1)
        return scores.amax(1) if heads == "max" else scores

    def _rows(self, rows: int | Tensor) -> tuple[int, Tensor | None]:
        """The first query row that is needed, and the weights ``(B, M)`` of the rows from there on."""
        if isinstance(rows, int):
            if not 1 <= rows <= self.end:
                raise ValueError(f"rows must name 1 to {self.end} of the last tokens, got {rows}")
            if self.mask is None or (rows == 1 and self.aligned):
                return self.end - rows, torch.full((rows,), 1 / rows, device=self.device)
            given = (self.newest < rows).float()
        else:
            given = rows.float()
        if self.mask is not None:
            given = given * self.mask
        total = given.sum(1, keepdim=True)
        used = (given != 0).any(0).nonzero()
        if not len(used):
            raise ValueError("rows names no token")
        first = int(used[0])
        return first, (given / total.clamp_min(torch.finfo(torch.float32).tiny))[:, first : self.end]

    # ------------------------------------------------------------------ answers

    def best_visual(self, scores: Tensor, counts: tuple[int, ...] | int) -> Tensor:
        """``(B, L)`` bool: the visual tokens of each sample with the highest scores, ties to the lower column.

        Args:
            scores: ``(B, L)`` float.
            counts: how many, one number or one a sample.
        """
        return self.best(scores, self.visual, (counts,) * len(self.counts) if isinstance(counts, int) else counts)

    def best(self, scores: Tensor, among: Tensor, counts: tuple[int, ...]) -> Tensor:
        """``(B, L)`` bool: the ``counts`` highest scores of each sample ``among`` some columns ``(B, L)``, ties to the
        lower one; the prompt's last token comes first."""
        scores = scores.float()
        if any(self.ends):
            scores = scores.masked_fill(self.last & among, torch.inf)
        return best_among(scores, among, counts)

    def keep_visual(self, chosen: Tensor, counts: tuple[int, ...] | None = None) -> Reduction:
        """The reduction that keeps the ``chosen`` visual tokens, and everything that is not visual.

        Args:
            chosen: ``(B, L)`` bool.
            counts: how many are chosen in each sample, where that is known; spares a wait for the device.
        """
        return self.keep_columns(chosen | ~self.visual, None if counts is None else self._dropped(counts))

    def keep_columns(self, kept: Tensor, dropped: tuple[int, ...] | None = None) -> Reduction:
        """The reduction that keeps the ``kept`` columns ``(B, L)`` in their order, right-aligned.

        Args:
            kept: bool.
            dropped: how many columns are dropped in each sample, where that is known.
        """
        b, n = kept.shape
        lost = tuple((n - kept.sum(1)).tolist()) if dropped is None else dropped
        least = min(lost) if lost else 0
        if least == 0 and max(lost, default=0) == 0:
            return Reduction.identity((b,), n, kept.device)
        order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, least:]
        return Reduction.keep(order, n, None if max(lost) == least else kept.gather(1, order))

    def with_last(self, step: Reduction) -> Reduction:
        """``step``, with the prompt's last token where it is visual and would have left."""
        stands = torch.zeros_like(self.visual, dtype=torch.long)
        real = torch.ones_like(step.representative) if step.mask is None else step.mask.long()
        stands = stands.scatter_reduce(1, step.representative, real, "amax") > 0
        lost = self.last & ~stands
        gone = lost.any(1, keepdim=True)
        if step.trivial or not bool(gone.any()):
            return step
        column = lost.long().argmax(1, keepdim=True)
        mask = torch.cat([torch.ones_like(real) if step.mask is None else real, gone.long()], 1).bool()
        target = step.target.masked_fill((step.source == column) & gone, -1)
        rows = torch.cat([step.representative, column], 1)
        return dataclasses.replace(step, representative=rows, target=target, mask=mask, complete=False)

    def _dropped(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(0, have - left) for have, left in zip(self.counts, counts, strict=True))


class LayerMethod(PlacedMethod):
    """Base of methods at the stage ``layer``: visual tokens leave before some decoder layers.

    ``n`` is always the number of visual tokens of a sample (of the one that has most).

    Attributes:
        visual: whether visual tokens leave, in forwards that bring some; otherwise any token of a prompt may, and ``n``
            counts all of them.
    """

    stage: ClassVar[Stage] = "layer"
    visual: ClassVar[bool] = True
    lacks: ClassVar[Mapping[str, str]] = {
        "positions": (
            "no positions to count anew: tokens that leave inside the language model have been seen at their places "
            "by the layers before, and the others keep theirs; methods of the stage 'projector', such as 'divprune', "
            "take positions='repack'"
        )
    }

    @property
    def evicts(self) -> bool:
        """True if rows of what leaves are freed in the caches of earlier layers too, once the prompt has run."""
        return False

    @abstractmethod
    def choose(self, site: LayerSite) -> Reduction:
        """Decide; called where the method acts. Gradients are recorded where :attr:`gradients` says so."""

    def reduce(self, site: Site) -> Reduction:
        """Keep some of the visual tokens, and all others; the prompt's last token stays, visual or not.

        Raises:
            TypeError: the site is of another stage.
        """
        if not isinstance(site, LayerSite):
            raise TypeError(f"{self.name!r} acts on a LayerSite, got {type(site).__name__}")
        n = max(site.counts if self.visual else site.real, default=0)
        if n == 0 or not self.acts(n, Place(site.layer, site.depth)):
            return Reduction.identity((site.shape[0],), site.shape[1], site.device)
        with self.recording(), without_autocast(site.device):
            step = self.choose(site)
            return site.with_last(step) if any(site.ends) else step
