"""DoViT: patches whose class a small head is sure of stop early, and stand behind the last block as they were then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_count, check_flags, check_integer, check_number, check_share
from tokred.core.learned import Facts, linear, norm
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import whole
from tokred.core.selection import highest
from tokred.core.site import Site
from tokred.encoder.method import Staged, Where
from tokred.errors import UnsupportedModelError
from tokred.kernels.dispatch import traced, without_autocast
from tokred.learn.losses import check_classes

Batch = Literal["pad", "max", "mean"]
ALIVE, GONE, NUMBER, MAP = "dovit.alive", "dovit.gone", "dovit.number", "dovit.map"


@register("dovit")
@dataclass(frozen=True)
class DoViT(Staged):
    """Dynamic token-pass: before some blocks, a head foretells the class of every patch, and those it is sure of stop.

    Patches that have stopped run through no further block; behind the last one they stand in their places, each as it
    was. The class token goes on with the mean of their content. Tokens stop in training, too, where the heads learn by
    the labels of the pixels. Untrained, the choice is a random one.

    Args:
        classes: outputs of a head.
        confidence: a patch stops whose largest probability is above this, in (0, 1]; one number, or one a decision. At
            1 nothing stops, and no head learns. While it learns let it fall from 1: ``[schedule.confidence]``.
        at: the blocks before which it is decided, counted from 0; None: at 1/6, 5/12 and 2/3 of the depth.
        hidden: channels of a head between its two layers.
        agg_rate: the class token takes the stopped ones in where these are a larger share than this of all; 1: never.
        detach: the heads do not teach the model.
        batching: how samples that keep different numbers stand together: ``"pad"``, where none sees what another keeps;
            ``"max"``: as many tokens as the one that keeps most, and what it is least sure of fills the others up;
            ``"mean"``: as many as they keep on average, so that some stop that should not (the released code).
        ignore: class of pixels that do not count.
        weight: of the loss of the heads, which are summed.

    Source: Dynamic Token-Pass Transformers for Semantic Segmentation, WACV 2024.
    """

    summary: ClassVar[str] = "patches that a trained head is sure of stop before some blocks, and come back at the end"
    source: ClassVar[str] = "WACV 2024 (arXiv 2308.01944)"
    example: ClassVar[Parameters] = {"classes": 2, "confidence": 0.55, "at": (1,)}
    nothing: ClassVar[Parameters | None] = {"confidence": 1.0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"
    uneven: ClassVar[bool] = True
    by_mask: ClassVar[bool] = True
    # What has stopped is summed up in the class token, which no sample that is asked alone could hand on.
    sums: ClassVar[bool] = True
    twelfths: ClassVar[tuple[int, ...]] = (2, 5, 8)

    classes: int = 150
    confidence: float | Sequence[float] = 0.96
    at: Sequence[int] | None = None
    hidden: int = 256
    agg_rate: float = 0.1
    detach: bool = False
    batching: Batch = "pad"
    ignore: int = -100
    weight: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(detach=self.detach)
        check_choice(self.batching, "batching", get_args(Batch))
        check_share(self.agg_rate, "agg_rate", zero=True)
        check_count(self.classes, "classes", 2)
        check_count(self.hidden, "hidden", 1)
        check_integer(self.ignore, "ignore")
        if check_number(self.weight, "weight") < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight!r}")
        if isinstance(self.confidence, list | tuple):
            object.__setattr__(self, "confidence", tuple(self.confidence))
        if not self.limits:
            raise ValueError("confidence must be a number, or one for every decision, got none")
        for limit in self.limits:
            check_share(limit, "confidence")
        if self.at is not None:
            if not self.at:
                raise ValueError(f"at must be rising numbers of blocks, the first at least 1, got {self.at!r}")
            if len(self.limits) not in (1, len(self.at)):
                raise ValueError(f"confidence has {len(self.limits)} numbers, but at has {len(self.at)} blocks")

    @property
    def limits(self) -> tuple[float, ...]:
        """The confidences: one, or one a decision."""
        return self.confidence if isinstance(self.confidence, tuple) else (self.confidence,)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, how patches stand, what they carry from decision to decision, and the module."""
        return frozenset({"x", "grid", "carried", "module"})

    def joins(self, depth: int) -> int | None:
        return depth

    def check(self, depth: int) -> None:
        """Every block of ``at`` is there, with its confidence."""
        super().check(depth)
        if len(self.limits) not in (1, len(self.places(depth))):
            raise ValueError(
                f"confidence has {len(self.limits)} numbers, but it is decided before {len(self.places(depth))} blocks"
            )

    def tokens(self, n: int, place: Place) -> int:
        """At most all of them: the count depends on the image."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """At each decision, unless no patch can ever stop."""
        stage = self.stage_of(place.layer, place.depth)
        return stage is not None and place.free(n) > 0 and min(self.limits) < 1

    def module(self, facts: Facts) -> nn.Module:
        """A head for every decision."""
        return Heads(facts.width, len(self.places(facts.depth)), self.hidden, self.classes)

    def reduce(self, site: Site) -> Reduction:
        """Foretell the classes, and let go of what is sure."""
        module, stage = self.its_module(site, Heads), self.stage_of(site.layer, site.depth)
        b, n = site.shape
        if stage is None:
            return Reduction.identity((b,), n, site.device)
        free = slice(site.prefix, n - site.suffix)
        sure = self._learn(site, module, stage, free) if module.training else None
        with torch.no_grad():
            if sure is None:
                sure = module(stage, site.x[:, free]).softmax(-1).amax(-1)
            before, there = site.rows.get(ALIVE), site.mask
            alive = torch.ones(b, n, dtype=torch.bool, device=site.device) if before is None else before
            real = torch.ones_like(sure, dtype=torch.bool) if there is None else there[:, free]
            limit = self.limits[stage if len(self.limits) > 1 else 0]
            on = alive[:, free] & real & ~(sure > limit)
            protected = torch.ones(b, 1, dtype=torch.bool, device=site.device)
            site.rows[ALIVE] = torch.cat([protected.expand(-1, site.prefix), on, protected.expand(-1, site.suffix)], 1)
            stays = self.stays(on, sure, real, site.prefix + site.suffix)
        return self._stop(site, stays, real & ~stays)

    def _learn(self, site: Site, module: Heads, stage: int, free: slice) -> Tensor:
        """Guess the classes of all patches, those that have stopped too; ``(B, M)`` how sure it is of those at hand."""
        x, at = site.x, site.positions
        known = site.notes.get(MAP)
        if known is not None:
            # Padding repeats positions; what comes of it is kept nowhere.
            rows = at if site.mask is None else at.masked_fill(~site.mask, site.length)
            x = F.pad(known, (0, 0, 0, 1)).scatter(1, rows.unsqueeze(-1).expand_as(x), x)[:, : site.length]
        site.notes[MAP] = x
        patches = x[:, site.prefix : x.shape[1] - site.suffix]
        guess = module(stage, patches.detach() if self.detach else patches)
        high, wide = map(whole, site.grid)
        site.learned.guesses.append(guess.unflatten(1, (high, wide)))
        found: Tensor = guess.detach().softmax(-1).amax(-1)
        return found.gather(1, at[:, free] - site.prefix)

    def stays(self, on: Tensor, sure: Tensor, real: Tensor, protected: int) -> Tensor:
        """``(B, M)`` bool: the patches that stay in the sequence, by :attr:`batching`; one at least, or protected ones.

        Args:
            on: bool, patches that have not stopped.
            sure: how sure the head is of each.
            real: bool, False on padding.
            protected: other tokens, which stay.
        """
        if self.batching == "pad":
            if protected:
                return on
            least = sure.masked_fill(~real, torch.inf).argmin(1, keepdim=True)
            return on | (~on.any(1, keepdim=True) & torch.zeros_like(on).scatter(1, least, True))
        if traced():
            raise UnsupportedModelError(
                f"batching={self.batching!r} asks how many tokens stay, as no compiled model can: take batching='pad'"
            )
        count = on.sum(1)
        m = max(int(count.max() if self.batching == "max" else count.double().mean()), 0 if protected else 1)
        fill = -sure if self.batching == "max" else torch.zeros_like(sure)
        score = torch.where(on, 1.0, fill).masked_fill(~real, -torch.inf)
        rows, _ = highest(score, m)
        return torch.zeros_like(on).scatter(1, rows, True) & real

    def _stop(self, site: Site, stays: Tensor, gone: Tensor) -> Reduction:
        """Those that stay, and the class token with the mean of all that have stopped so far."""
        b, n = site.shape
        place = torch.arange(site.prefix, n - site.suffix, device=site.device).expand(b, -1)
        lead = self._aggregated(site, gone)
        with torch.no_grad():
            if site.mask is None and lead is None and not traced() and not bool(gone.any()):
                return Reduction.identity((b,), n, site.device)
            rows, mask = pack(place, stays)
            kept, mask = with_protected(rows, mask, n, site.prefix, site.suffix)
        same = Reduction.keep(kept, n, mask=mask)
        return Stopped(same.representative, same.source, same.target, n, mask=mask, mode="keep", first=lead)

    def _aggregated(self, site: Site, gone: Tensor) -> Tensor | None:
        """``(B, C)`` the class token with the mean of what has stopped, where that is enough; None: there is none."""
        if not site.class_token or self.agg_rate == 1:
            return None
        x, n = site.x, site.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        free = wide[:, site.prefix : n - site.suffix]
        total, number = (free * gone.unsqueeze(-1)).sum(1), gone.sum(1, keepdim=True).to(wide.dtype)
        if GONE in site.notes:
            total, number = total + site.notes[GONE], number + site.notes[NUMBER]
        site.notes[GONE], site.notes[NUMBER] = total, number
        first = wide[:, 0]
        mixed = (total / number.clamp_min(1) + first) / 2
        enough = number > self.agg_rate * site.length
        if not traced() and not bool(enough.any()):
            return None
        return torch.where(enough, mixed, first).to(x.dtype)

    def compare(self, guesses: Sequence[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss of the heads: the sum over the decisions of the cross-entropy of all pixels.

        Args:
            guesses: ``(B, h, w, K)`` a decision.
            targets: ``(B, H, W)`` integers, to whose size the guesses are resized; or ``(B,)``, the class of all
                patches of an image (ours).

        Returns:
            ``{"heads": scalar}``, float32.

        Raises:
            ValueError: the targets have another shape, or are of other classes.
        """
        b, _, _, k = guesses[0].shape
        t = torch.as_tensor(targets).to(guesses[0].device)
        if t.is_floating_point() or t.dtype == torch.bool or t.ndim not in (1, 3) or len(t) != b:
            raise ValueError(
                f"targets of dovit must be (B, H, W) integers, or (B,) for whole images, for B = {b} and K = {k}, got "
                f"{tuple(t.shape)} {t.dtype}"
            )
        check_classes(t, k, "dovit", self.ignore)
        total = guesses[0].new_zeros(())
        for guess in guesses:
            logits, label = guess.permute(0, 3, 1, 2), t
            if t.ndim == 1:
                label = t.view(-1, 1, 1).expand(-1, *logits.shape[2:])
            elif tuple(t.shape[1:]) != tuple(logits.shape[2:]):
                logits = F.interpolate(logits, tuple(t.shape[1:]), mode="bilinear", align_corners=False)
            one = F.cross_entropy(logits, label, ignore_index=self.ignore, reduction="sum")
            # A batch of nothing but pixels that do not count has no loss, rather than none that is a number.
            total = total + one / (label != self.ignore).sum().clamp_min(1)
        return {"heads": self.weight * total}


@dataclass(frozen=True, eq=False)
class Stopped(Reduction):
    """Some tokens stay, and the first of them goes on with other features.

    Attributes:
        first: ``(B, C)``; None: its own.
    """

    first: Tensor | None = None

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """``(B, M, C)``: the tokens that stay, with the features of the first."""
        out = self.gather(x)
        return out if self.first is None else torch.cat([self.first.unsqueeze(1).to(out.dtype), out[:, 1:]], 1)

    def step(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.merge(x, size), self.sizes(size)


class Heads(nn.Module):
    """One head a decision.

    Args:
        width: channels ``C`` of a token.
        stages: how many.
        hidden: channels between its two layers.
        classes: outputs ``K``.
    """

    def __init__(self, width: int, stages: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Head(width, hidden, classes) for _ in range(stages))

    def forward(self, stage: int, x: Tensor) -> Tensor:
        """``(B, N, K)`` float32 logits, see :class:`Head`."""
        said: Tensor = self.stages[stage](x)
        return said


class Head(nn.Module):
    """Foretells the class of every patch from the patch alone, in float32.

    Args:
        width: channels ``C`` of a token.
        hidden: between its two layers.
        classes: outputs ``K``.
    """

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.wide, self.norm, self.classes = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, K)`` float32 (float64 stays) logits of tokens ``(B, N, C)``."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x):
            return linear(self.classes, F.relu(norm(self.norm, linear(self.wide, x))))
