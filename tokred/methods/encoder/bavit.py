"""BAViT: a tiny transformer looks at the pixels and says which patches are background, before the model sees any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_count, check_flags, check_integer, check_number, check_share
from tokred.core.learned import Facts, InFloat32
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import bounds, pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept_ceil, whole
from tokred.core.selection import highest, largest, protected_rows
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where
from tokred.encoder.padding import reduce_each
from tokred.errors import MissingInputError
from tokred.kernels.dispatch import without_autocast

Mode = Literal["threshold", "ratio", "partial"]


@register("bavit")
@dataclass(frozen=True)
class BAViT(BlockMethod):
    """Background-aware tokens: a small classifier of patches, and what it calls background never enters the blocks.

    The classifier sees pixels alone, so it learns beside the model, from maps or boxes of what is foreground, and the
    model may go on as it is, or learn further on what is left. Untrained, its choice is a random one.

    Args:
        mode: ``"threshold"``: a patch stays whose probability of foreground is at least ``theta``; ``"ratio"``: the
            share ``rho`` with the highest probability stays; ``"partial"``: as ``"threshold"``, and of the background
            the share ``beta`` with the highest.
        theta: probability, in [0, 1].
        rho: share that stays, rounded up, in (0, 1].
        beta: share of the background that stays, rounded down, in [0, 1].
        dilate: rings of patches around the foreground that stay with it; None: 1 for ``"threshold"``, else 0.
        min_keep: patches that stay at least.
        layers, dim, heads: size of the classifier.
        tau: a patch is foreground whose share of foreground pixels is above this, in [0, 1).
        background: class of the map that is none.
        ignore: class of pixels that count as background; patches of nothing else do not count.
        balance: weigh the two classes alike in the loss, whatever their numbers in the batch.
        weight: of the loss.

    Source: Token Pruning using a Lightweight Background Aware Vision Transformer, 2024; size and positions of the
        classifier, dilation, ties and the least number are ours, since neither text nor code of these was at hand.
    """

    summary: ClassVar[str] = "a small trained transformer drops background patches before the first block"
    source: ClassVar[str] = "NeurIPS 2024 workshop FITML (arXiv 2410.09324)"
    example: ClassVar[Parameters] = {"mode": "ratio", "rho": 0.6, "dim": 12}
    nothing: ClassVar[Parameters | None] = {"theta": 0.0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "before"
    uneven: ClassVar[bool] = True

    mode: Mode = "threshold"
    theta: float = 0.5
    rho: float = 0.7
    beta: float = 0.25
    dilate: int | None = None
    min_keep: int = 1
    layers: int = 2
    dim: int = 192
    heads: int = 3
    tau: float = 0.0
    background: int = 0
    ignore: int = -100
    balance: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self.mode, "mode", get_args(Mode))
        check_flags(balance=self.balance)
        check_share(self.rho, "rho")
        for name in ("theta", "beta"):
            check_share(getattr(self, name), name, zero=True)
        for name in ("min_keep", "layers", "dim", "heads"):
            check_count(getattr(self, name), name, 1)
        for name in ("background", "ignore"):
            check_integer(getattr(self, name), name)
        if not 0 <= check_number(self.tau, "tau") < 1:
            raise ValueError(f"tau must lie in [0, 1), got {self.tau!r}")
        if check_number(self.weight, "weight") < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight!r}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads={self.heads}, got {self.dim}")
        if self.dilate is not None:
            check_count(self.dilate, "dilate")
            if self.dilate and self.mode == "ratio":
                raise ValueError(f"mode='ratio' keeps a fixed number, so dilate must be 0 or None, got {self.dilate}")

    @property
    def reads(self) -> frozenset[str]:
        """The pixels, how patches stand, the module, and that tokens may leave before the first block."""
        return frozenset({"x", "pixels", "grid", "module", "entry"})

    @property
    def rings(self) -> int:
        """Rings of patches around the foreground that stay with it."""
        return int(self.mode == "threshold") if self.dilate is None else self.dilate

    @property
    def idle(self) -> bool:
        """True where no patch can ever leave."""
        if self.mode == "ratio":
            return self.rho == 1
        return self.theta == 0 or (self.mode == "partial" and self.beta == 1)

    def tokens(self, n: int, place: Place) -> int:
        """The share ``rho`` of the patches; by probability at most all of them, as the image decides."""
        free = place.free(n)
        if place.layer or self.mode != "ratio" or free < 1:
            return n
        return n - free + self._fixed(free)

    def acts(self, n: int, place: Place) -> bool:
        """True before the first block."""
        return place.layer == 0 and not self.idle and place.free(n) > self.min_keep

    def module(self, facts: Facts) -> nn.Module:
        """The classifier.

        Raises:
            MissingInputError: the host's patches are none that lie side by side.
        """
        if not facts.pixels:
            raise MissingInputError(f"bavit looks at pixels, and the patches of {facts} do not lie side by side")
        return Foreground(facts.pixels, self.layers, self.dim, self.heads)

    def reduce(self, site: Site) -> Reduction:
        """Classify the patches, and keep the foreground, in its order."""
        module = self.its_module(site, Foreground)
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        rows, columns = map(whole, site.grid)  # traced sides are tensors
        # Once nothing of it learns any more, the model may learn on without labels of patches.
        learns = module.training and any(p.requires_grad for p in module.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            logits = module(site.pixels, (rows, columns))
        if learns:
            site.learned.guesses.append(logits.view(b, rows, columns, 2))
        with torch.no_grad():
            score = logits.softmax(-1)[..., 1]
            if self.mode == "ratio":
                left, _ = highest(score, self._fixed(rows * columns))
                lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
                return Reduction.keep(torch.cat([lead, left + site.prefix, tail], 1), n)
            stays = self.stays(score, (rows, columns))
            fewest, most = bounds(stays.sum(1), rows * columns)
            if fewest == rows * columns:
                return Reduction.identity((b,), n, site.device)
            place = torch.arange(site.prefix, n - site.suffix, device=site.device).expand(b, -1)
            left, real = pack(place, stays, (fewest, most))
            kept, mask = with_protected(left, real, n, site.prefix, site.suffix)
        return Reduction.keep(kept, n, mask=mask)

    def stays(self, score: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N)`` bool: which patches stay by ``"threshold"`` or ``"partial"``, at least ``min_keep`` of each image.

        Args:
            score: ``(B, N)`` probability of foreground.
            grid: rows and columns of the patches.
        """
        b, n = score.shape
        kept = score >= self.theta
        if self.rings:
            near = kept.float().view(b, 1, *grid)
            kept = F.max_pool2d(near, 2 * self.rings + 1, 1, self.rings).view(b, n) > 0
        if self.mode == "partial" and self.beta > 0:
            count = ((~kept).sum(1, keepdim=True).double() * self.beta + 1e-9).floor()
            kept = kept | largest(score.masked_fill(kept, -1.0), count)
        return kept | largest(score, self.min_keep)

    def _fixed(self, free: int) -> int:
        """How many of so many patches stay by ``"ratio"``."""
        return min(free, max(self.min_keep, kept_ceil(free, self.rho)))

    def compare(self, guesses: Sequence[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss of the classifier: cross-entropy of all patches of the batch.

        Args:
            guesses: ``(B, h, w, 2)``, for background and foreground.
            targets: ``(B, H, W)`` integers, a class for every pixel of the images as the model is given them, or for
                every patch (of boxes: :func:`boxed`).

        Returns:
            ``{"foreground": scalar}``, float32.

        Raises:
            ValueError: the targets have another shape.
        """
        (logits,) = guesses
        b, h, w, _ = logits.shape
        t = torch.as_tensor(targets).to(logits.device)
        whole_numbers = not t.is_floating_point() and t.dtype != torch.bool
        if not whole_numbers or t.ndim != 3 or len(t) != b or t.shape[1] % h or t.shape[2] % w or 0 in t.shape:
            raise ValueError(
                f"targets of bavit must be (B, H, W) integers, the class of every pixel or patch, for B = {b} and "
                f"{h} x {w} patches, got {tuple(t.shape)} {t.dtype}"
            )
        cover, known = coverage(t, (t.shape[1] // h, t.shape[2] // w), self.background, self.ignore)
        label = (cover > self.tau).long()[known]
        each = F.cross_entropy(logits[known], label, reduction="none")
        if self.balance:
            count = torch.bincount(label, minlength=2).clamp_min(1)
            each = each * (len(label) / (2 * count))[label]
        # A batch of nothing but pixels that do not count has no loss, rather than none that is a number.
        return {"foreground": self.weight * each.sum() / max(1, len(label))}


def coverage(pixels: Tensor, patch: tuple[int, int], background: int = 0, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """``(B, h, w)`` float32 share of each patch that is not background, and bool: patches not wholly to be ignored.

    Args:
        pixels: ``(B, H, W)`` int classes.
        patch: height and width, by which these can be divided.
        background: class that is none.
        ignore: class of pixels that count as background.
    """
    thing = ((pixels != background) & (pixels != ignore)).float()
    known = (pixels != ignore).float()
    return F.avg_pool2d(thing, patch), F.avg_pool2d(known, patch) > 0


def boxed(boxes: Sequence[Tensor], size: tuple[int, int], patch: int | tuple[int, int]) -> Tensor:
    """``(B, h, w)`` int64: 1 for patches that a box touches, else 0.

    Args:
        boxes: for each image ``(M, 4)``: left, top, right and bottom in pixels of the image as the model is given it,
            right and bottom not included.
        size: height and width of the images.
        patch: of a patch.

    Raises:
        ValueError: a box has another shape, or ends before it begins.
    """
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    h, w = -(-size[0] // high), -(-size[1] // wide)
    found = torch.zeros(len(boxes), h, w, dtype=torch.int64)
    for image, some in zip(found, boxes, strict=True):
        some = torch.as_tensor(some, dtype=torch.float64).reshape(-1, 4) if len(some) == 0 else torch.as_tensor(some)
        if some.ndim != 2 or some.shape[1] != 4 or bool((some[:, 2:] < some[:, :2]).any()):
            raise ValueError(f"boxes must be (M, 4) each: left, top, right, bottom, got {some.tolist()}")
        for left, top, right, bottom in some.double().tolist():
            first = max(0, int(top // high)), max(0, int(left // wide))
            last = max(0, int(-(-bottom // high))), max(0, int(-(-right // wide)))
            image[first[0] : last[0], first[1] : last[1]] = 1
    return found


class Foreground(InFloat32):
    """A small vision transformer without class token that says of every patch whether it is foreground; in float32.

    Args:
        pixels: numbers ``F`` of a patch.
        layers, width, heads: its size.
        grid: rows and columns that its position embeddings are made for; resized to others.
    """

    def __init__(
        self, pixels: int, layers: int = 2, width: int = 192, heads: int = 3, grid: tuple[int, int] = (14, 14)
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.places = nn.Parameter(torch.empty(1, width, *grid))
        nn.init.trunc_normal_(self.places, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 2)

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, 2)`` float32 logits, of background and of foreground, of patches ``(B, N, F)`` on a grid."""
        if pixels.shape[-1] != self.embed.in_features:
            raise ValueError(
                f"the classifier of bavit was made for patches of {self.embed.in_features} numbers, but these have "
                f"{pixels.shape[-1]}: apply bavit anew, or give a module of a model with the same patches"
            )
        with without_autocast(pixels):
            x = self.embed(pixels.float()) + self._places(grid)
            for block in self.blocks:
                x = block(x)
            logits: Tensor = self.head(self.norm(x))
            return logits

    def _places(self, grid: tuple[int, int]) -> Tensor:
        if tuple(self.places.shape[2:]) == grid:
            return self.places.flatten(2).mT
        return F.interpolate(self.places, grid, mode="bicubic", align_corners=False).flatten(2).mT

    def cost(self, n: int) -> int:
        """Multiply-adds for ``n`` patches of one image."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.endswith("weight") and p.ndim == 2)
        return n * matrices + len(self.blocks) * 2 * n * n * self.embed.out_features


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP four times as wide.

    Args:
        width: channels ``C``.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` of ``(B, N, C)``."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        more: Tensor = self.narrow(F.gelu(self.wide(self.after(x))))
        return x + more
