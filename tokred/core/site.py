"""``Site``: one place in a host where tokens may be reduced, and what a method can read there.

An adapter fills a site lazily: a value may be a tensor or a function that makes it, called at most once and only if the
method asks. Without any host a site is simply built by hand, which is how methods are tested::

    tokred.ToMe(r=2).reduce(tokred.Site(x=x, k=k, prefix=1))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.learned import Learned
from tokred.core.sampling import lazily, pair
from tokred.core.schedules import whole
from tokred.errors import MissingInputError

Stage = Literal["block", "attention", "cache", "projector", "layer", "experts"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # models are patched, and reports are read, in this order
Lazy = Tensor | Callable[[], Tensor | None] | None

# What a method may declare in ``reads``; the shapes are those of the properties below. ``attention`` is
# ``column_scores``; ``queries`` means that the host lets the attention's queries be reduced alone, ``heads`` that it
# shows what each head answers and can leave heads out, ``carried`` that ``rows`` and ``notes`` go on from layer to
# layer, ``module`` that it holds a module of the method's own (tokred.core.learned), ``gates`` that its attention
# weighs keys by soft decisions, ``entry`` that tokens may leave before a block, as it is given them,
# ``frame_motion`` that ``motion`` is that of the pixels of a clip's frames. Six are for
# caches, see tokred.kv.site: the output projection, the rotary embedding, its angles alone (``rotation``, where it may
# turn a part of the channels), the stream around the attention, (``hidden``) what the attention is given, and
# (``again``) that tokens may be computed again whose rows have left.
# ``guidance`` is for denoisers, see tokred.diffusion.site: what it did to each token in the step before. The last ones
# are for vision-language models, see tokred.vlm.before_llm: the tower's features and the attention of its other
# layers, the projector, and rows of the attention of the decoder layer that comes and of the one that has run;
# ``calibration``: that a bias for each pair of tokens can be added in all layers; ``sound``: tokens of what is heard
# between the frames of a clip, and what their encoder attends to. ``router`` is for layers of experts, see
# tokred.core.experts: what it says of each token, and whom it chose.
READS = (
    "x", "q", "k", "v", "class_attention", "attention", "queries", "heads", "carried", "module", "gates", "transform",
    "grid", "frames", "motion", "text", "projection", "rope", "rotation", "stream", "guidance", "tower", "tower_layers",
    "project", "rows", "rows_before", "hidden", "calibration", "pixels", "entry", "again", "frame_motion", "sound",
    "router",
)  # fmt: skip


class Site:
    """One place of a host, and all that is known there.

    Args:
        x: ``(B, N, C)`` tokens of the residual stream.
        q, k, v: ``(B, H, N, D)`` queries, keys (``(B, Hk, N, D)``) and values of this layer's attention.
        class_attention: ``(B, H, N)`` or ``(B, N)``, the class token's attention after softmax. Made from ``q`` and
            ``k`` (and ``bias``) when it is not given.
        attention: this layer's attention, see :class:`tokred.core.attention.Attention`, or what makes it; None: made
            from ``q``, ``k``, ``bias``, ``scale`` and ``mask``. Where ``k`` is given before rotary embedding, this has
            the keys as they are used.
        bias: ``(B, N)`` or ``(B, H, N)``, what attention adds to the logits of each key (log of the sizes, padding).
        scale: factor of the attention's logits; None: ``D ** -0.5``.
        transform: a pair ``(B, N, C)``, the normalised input of the attention and what its value and output
            projections make of each token alone.
        sizes: ``(B, N)`` float32, how many original tokens each stands for; None: one each.
        mask: ``(B, N)`` bool, False on padding; None: every token is real. Methods of uneven counts want padding behind
            the real tokens, as they leave it; :func:`tokred.encoder.padding.reduce_each` asks about it wherever it is.
        prefix, suffix: leading and trailing tokens that are never reduced (class, distillation, register, detection).
        grid: ``(Hg, Wg)`` of the original patches, or None.
        positions: ``(B, N)`` int64, where each token stood in the original sequence (protected tokens included); None:
            nothing has moved yet.
        length: tokens before the first block, protected ones included; None: those of this site.
        frames: frames of a video, or None. Its tokens are flattened time first, then rows, then columns.
        motion: ``(B, N)`` how much each token moves, see :func:`tokred.encoder.motion.frame_motion`; values of
            protected tokens are not looked at.
        pixels: ``(B, N, F)`` of the original patches, protected tokens aside, as the model is given them.
        text: text tokens that guide a reduction, or None.
        class_token: whether the first token is a class token, or how many of the first are one together, which looks
            where they do on average; None: where there is a prefix, the first is.
        layer, depth: which layer this is, of how many.
        step: which call of the same layer this is (denoising step, decoding step).
        totals: ``(B,)`` int64, real tokens of each sample before the first block; None: ``length`` each.
        answers: ``(B, H, N, D)`` what each head of the attention gives, before the output projection.
        alive: ``(B, H)`` bool, False on heads that have been left out; None: all are there. A method may set it; heads
            that it leaves out add nothing in the layers that follow.
        learned: what a method with weights is given: its module and the soft decisions so far; None: nothing.
        rows: state of a method for every token, ``(B, N)`` each, from the layers before; a method may change it, and
            what it leaves travels with the tokens (a slot goes on with that of its representative).
        notes: state of a method for every sample, ``(B, ...)`` each, likewise.
    """

    def __init__(
        self,
        *,
        x: Lazy = None,
        q: Lazy = None,
        k: Lazy = None,
        v: Lazy = None,
        class_attention: Lazy = None,
        attention: Attention | Callable[[], Attention | None] | None = None,
        bias: Lazy = None,
        scale: float | None = None,
        transform: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | None = None,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        prefix: int = 0,
        suffix: int = 0,
        grid: tuple[int, int] | None = None,
        positions: Tensor | None = None,
        length: int | None = None,
        frames: int | None = None,
        motion: Lazy = None,
        pixels: Lazy = None,
        text: Lazy = None,
        class_token: bool | int | None = None,
        layer: int = 0,
        depth: int = 1,
        step: int = 0,
        totals: Tensor | None = None,
        answers: Lazy = None,
        alive: Tensor | None = None,
        learned: Learned | None = None,
        rows: dict[str, Tensor] | None = None,
        notes: dict[str, Tensor] | None = None,
    ) -> None:
        self._values: dict[str, Lazy] = {
            "x": x, "q": q, "k": k, "v": v, "class_attention": class_attention, "bias": bias, "text": text,
            "motion": motion, "answers": answers, "pixels": pixels,
        }  # fmt: skip
        self._attention = attention
        self._transform = transform
        self.scale = scale
        self.sizes = sizes
        self.mask = mask
        self.prefix = prefix
        self.suffix = suffix
        self._grid = grid
        self._positions = positions
        self.moved = positions is not None
        self._length = length
        self.frames = frames
        self.class_rows = int(prefix > 0 if class_token is None else class_token)
        self.layer = layer
        self.depth = depth
        self.step = step
        self.totals = totals
        self.alive = alive
        self.learned = Learned() if learned is None else learned
        self.rows: dict[str, Tensor] = {} if rows is None else rows
        self.notes: dict[str, Tensor] = {} if notes is None else notes

    def _find(self, name: str) -> Tensor | None:
        value = self._values[name]
        if callable(value) and not isinstance(value, Tensor):
            value = value()
            self._values[name] = value
        return value

    def _get(self, name: str) -> Tensor:
        value = self._find(name)
        if value is None:
            have = ", ".join(k for k, v in self._values.items() if v is not None) or "nothing"
            raise MissingInputError(f"this site does not supply {name!r}; it supplies {have}")
        return value

    @property
    def x(self) -> Tensor:
        """``(B, N, C)`` tokens."""
        return self._get("x")

    @property
    def q(self) -> Tensor:
        """``(B, H, N, D)`` queries."""
        return self._get("q")

    @property
    def k(self) -> Tensor:
        """``(B, Hk, N, D)`` keys."""
        return self._get("k")

    @property
    def v(self) -> Tensor:
        """``(B, Hk, N, D)`` values."""
        return self._get("v")

    @property
    def answers(self) -> Tensor:
        """``(B, H, N, D)`` what each head of the attention gives, before the output projection."""
        return self._get("answers")

    @property
    def motion(self) -> Tensor:
        """``(B, N)`` how much each token moves."""
        return self._get("motion")

    @property
    def pixels(self) -> Tensor:
        """``(B, N, F)`` float32: pixels of the original patches, protected tokens aside, channel after channel."""
        return self._get("pixels")

    @property
    def text(self) -> Tensor:
        """Text tokens that guide the reduction."""
        return self._get("text")

    @property
    def grid(self) -> tuple[int, int]:
        """``(Hg, Wg)`` of the original patches.

        Raises:
            MissingInputError: they form no known grid.
        """
        if self._grid is None:
            why = "give images of a regular grid, no patch of which is hidden by a mask"
            raise MissingInputError(f"this site does not know the grid of its patches: {why}")
        return self._grid

    @property
    def positions(self) -> Tensor:
        """``(B, N)`` int64: where each token stood in the original sequence, protected tokens included."""
        if self._positions is None:
            b, n = self.shape
            self._positions = torch.arange(n, device=self.device).expand(b, -1)
        return self._positions

    @property
    def length(self) -> int:
        """Tokens of the original sequence, protected ones included."""
        return self.shape[1] if self._length is None else whole(self._length)

    @property
    def transform(self) -> tuple[Tensor, Tensor]:
        """Two tensors ``(B, N, C)``: the attention's normalised input, and its value and output projections of it.

        Raises:
            MissingInputError: the host does not supply them.
        """
        found = self._transform() if callable(self._transform) else self._transform
        if found is None:
            raise MissingInputError("this site does not supply 'transform'")
        self._transform = found
        return found

    @property
    def class_token(self) -> bool:
        """True if the first token is a class token by itself."""
        return self.class_rows == 1

    @property
    def class_attention(self) -> Tensor:
        """``(B, N)`` float32: the class token's attention to every token, mean over heads and over its rows.

        Raises:
            MissingInputError: neither it nor queries and keys are at hand.
        """
        if self._values["class_attention"] is None:
            rows = max(1, self.class_rows)
            found = self.attention.columns(rows=slice(0, rows))
            self._values["class_attention"] = found / rows if rows > 1 else found
        scores = self._get("class_attention")
        return scores.float().mean(1) if scores.ndim == 3 else scores.float()

    @property
    def attention(self) -> Attention:
        """This layer's attention: columns, page rank, what it makes of other values. Padding does not vote.

        Raises:
            MissingInputError: queries or keys are not at hand.
        """
        made = self._attention() if callable(self._attention) else self._attention
        if made is None:
            q, k, bias = self._get("q"), self._get("k"), self._find("bias")
            return Attention(q, k, bias=bias, scale=self.scale, mask=self.mask, votes=self.mask)
        self._attention = made
        return made

    def column_scores(self, weight: Tensor | None = None, *, rows: slice | None = None) -> Tensor:
        """``(B, H, N)`` float32: how much of :attr:`attention` every token receives, see :meth:`Attention.columns`."""
        return self.attention.columns(weight, rows)

    def sample(self, i: int, rows: Tensor) -> Site:
        """Some tokens of one sample, as if nothing else were in the batch.

        Args:
            i: which sample.
            rows: ``(M,)`` int64, its tokens, protected ones included.
        """
        made = {name: lazily(self, name, i, rows) for name, value in self._values.items() if value is not None}

        def known(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[i : i + 1].index_select(1, rows)

        transform = None if self._transform is None else lambda: pair(known, self.transform)
        hidden = rows.shape[0] < self.shape[1]
        # Pixels are those of the whole grid, which what is left does not form any more.
        if "pixels" in made:
            made["pixels"] = lambda: None if hidden else self.pixels[i : i + 1]
        own = None if self._attention is None else lambda: self.attention.sample(i, rows)
        return Site(
            **made,  # type: ignore[arg-type]
            attention=own,
            scale=self.scale,
            transform=transform,
            sizes=known(self.sizes),
            prefix=self.prefix,
            suffix=self.suffix,
            positions=known(self.positions) if self.moved or hidden else None,
            grid=None if hidden else self._grid,
            frames=None if hidden else self.frames,
            length=self._length if self.totals is None else int(self.totals[i]),
            class_token=self.class_rows,
            layer=self.layer,
            depth=self.depth,
            step=self.step,
            alive=None if self.alive is None else self.alive[i : i + 1],
            learned=Learned(self.learned.module),
            rows={name: state[i : i + 1].index_select(1, rows) for name, state in self.rows.items()},
            notes={name: state[i : i + 1] for name, state in self.notes.items()},
        )

    def among(self, rows: Tensor, mask: Tensor | None = None) -> Site:
        """The attention among some of the tokens alone: each of its rows is renormalised over them.

        Args:
            rows: ``(B, M)`` int64, the tokens, protected ones included.
            mask: ``(B, M)`` bool, False on padding; None: all are real.

        Returns:
            A site with queries and keys of these tokens.

        Raises:
            MissingInputError: queries or keys are not at hand.
        """
        some = self.attention.among(rows, mask)
        return Site(
            q=some.q,
            k=some.k,
            attention=some,
            mask=mask,
            prefix=self.prefix,
            suffix=self.suffix,
            class_token=self.class_rows,
            layer=self.layer,
            depth=self.depth,
            step=self.step,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``, from the first tensor that the site has at hand."""
        for name in ("x", "k", "q", "v"):
            if self._values[name] is not None:
                t = self._get(name)
                return _samples(t), whole(t.shape[-2])
        scores = self._get("class_attention")
        return _samples(scores), whole(scores.shape[-1])

    @property
    def device(self) -> torch.device:
        """Device of the site's tensors."""
        for name in ("x", "k", "q", "v", "class_attention"):
            if self._values[name] is not None:
                return self._get(name).device
        raise MissingInputError("this site supplies no tensor")


def _samples(x: Tensor) -> int:
    """``B``: a number under ``torch.jit.trace``; any number under ``torch.export``, where a batch may be left open."""
    b: Any = x.shape[0]
    found: int = whole(b) if isinstance(b, Tensor) else b
    return found
