"""DynamicViT: small networks between the blocks learn which tokens go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice
from tokred.core.learned import Facts, linear, norm
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import Staged, Where
from tokred.encoder.padding import reduce_each
from tokred.kernels.dispatch import without_autocast
from tokred.learn.gates import gumbel_keep
from tokred.learn.losses import Over, ratio_loss


@register("dynamicvit")
@dataclass(frozen=True)
class DynamicViT(Staged):
    """Dynamic token sparsification: before some blocks, a small network says of every token whether it stays.

    In training the decisions are drawn, all tokens stay in the sequence, and attention looks past those that were
    decided against; a loss (``ratio``) holds the share that stays at ``rho``. In inference the tokens with the highest
    scores stay, as many as ``rho`` says. Until it is trained the choice is a random one.

    Args:
        rho: share of the patches that stays at the first stage, its square at the second, and so on.
        at: the blocks before which tokens leave, counted from 0; None: a quarter, half, and three quarters down.
        tau: temperature of the draws.
        ratio_weight: of the loss on the share that stays.
        over: whether every ``"image"`` is held to its share, or the ``"batch"``.

    Source: Rao et al., DynamicViT, NeurIPS 2021, section 3.
    """

    summary: ClassVar[str] = "small trained networks say before some blocks which tokens go on"
    source: ClassVar[str] = "Rao et al., NeurIPS 2021 (arXiv 2106.02034)"
    example: ClassVar[Parameters] = {"rho": 0.6, "at": (1,)}
    nothing: ClassVar[Parameters | None] = {"rho": 1.0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"
    by_mask: ClassVar[bool] = True
    gradients: ClassVar[bool] = True
    twelfths: ClassVar[tuple[int, ...]] = (3, 6, 9)

    rho: float = 0.7
    at: Sequence[int] | None = None
    tau: float = 1.0
    ratio_weight: float = 2.0
    over: Over = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("rho", 0, 1), ("tau", 0, torch.inf), ("ratio_weight", 0, torch.inf)):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            if not fits or (value == 0 and name != "ratio_weight"):
                raise ValueError(f"{name} must be a number above {low} and at most {high}, got {value!r}")
        check_choice(self.over, "over", get_args(Over))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens; the module; and an attention that lets keys be weighed."""
        return frozenset({"x", "module", "gates"})

    def tokens(self, n: int, place: Place) -> int:
        """The share of the patches that entered the model, whose number is reckoned back from those that are left."""
        stage, free = self.stage_of(place.layer, place.depth), place.free(n)
        if stage is None or free <= 0:
            return n
        first = -(-free // self.rho**stage) if stage else free
        return n - free + min(free, self.kept(int(first), stage))

    def kept(self, first: int, stage: int) -> int:
        """How many of ``first`` patches are left after a stage; one at least."""
        return max(1, int(first * self.rho ** (stage + 1) + 1e-9))

    def acts(self, n: int, place: Place) -> bool:
        """At each stage, unless everything is to stay."""
        return self.rho < 1 and place.free(n) > 1 and self.stage_of(place.layer, place.depth) is not None

    def module(self, facts: Facts) -> nn.Module:
        """A predictor for every stage."""
        return Predictors(facts.width, len(self.places(facts.depth)))

    def reduce(self, site: Site) -> Reduction:
        """Draw soft decisions in training, keep the highest scores otherwise."""
        module, stage = self.its_module(site, Predictors), self.stage_of(site.layer, site.depth)
        if stage is None:
            return Reduction.identity((site.shape[0],), site.shape[1], site.device)
        if module.training:
            return self._soft(site, module, stage)
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        free = slice(site.prefix, n - site.suffix)
        k = min(n - site.prefix - site.suffix, self.kept(site.length - site.prefix - site.suffix, stage))
        with torch.no_grad():
            x = site.x[:, free]
            score = module(stage, x, x.new_ones(x.shape[:2]))[..., 0]
            order = ranked(score)[:, :k] + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return Reduction.keep(torch.cat([lead, order, tail], 1), n)

    def _soft(self, site: Site, module: Predictors, stage: int) -> Reduction:
        """A decision for every token, and the loss on their share."""
        n = site.shape[1]
        free = slice(site.prefix, n - site.suffix)
        before, real = site.learned.gate, None if site.mask is None else site.mask[:, free]
        x = site.x[:, free]
        previous = x.new_ones(x.shape[:2], dtype=torch.float32) if before is None else before[:, free].float()
        seen = previous if real is None else previous * real
        drawn = gumbel_keep(module(stage, x, seen), tau=self.tau)
        target = self.rho ** (stage + 1)
        loss = ratio_loss(drawn * previous, target, over=self.over, mask=real)
        site.learned.losses["ratio"] = self.ratio_weight * loss / len(module.stages)
        return Reduction.soft(F.pad(drawn, (site.prefix, site.suffix), value=1.0), "keys")


class Predictors(nn.Module):
    """One predictor a stage.

    Args:
        width: channels of a token.
        stages: how many.
    """

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Predictor(width) for _ in range(stages))

    def forward(self, stage: int, x: Tensor, previous: Tensor) -> Tensor:
        """Log-probabilities from the predictor of one stage, see :class:`Predictor`."""
        said: Tensor = self.stages[stage](x, previous)
        return said


class Predictor(nn.Module):
    """Says of each token how likely it stays, from itself and from the mean of those that are left; in float32.

    Args:
        width: channels ``C`` of a token, an even number, at least 4.

    Source: Rao et al., DynamicViT, NeurIPS 2021, section 3.2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(
                f"a predictor splits the channels in halves: width must be even and at least 4, got {width}"
            )
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """Log-probabilities.

        Args:
            x: ``(B, N, C)`` tokens.
            previous: ``(B, N)`` in 0..1, which of them are left.

        Returns:
            ``(B, N, 2)`` float32 (float64 for float64 input): of staying, and of going.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x):
            local, whole = F.gelu(linear(self.embed, norm(self.norm, x))).chunk(2, -1)
            left = previous.unsqueeze(-1).to(x.dtype)
            mean = (whole * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp_min(1e-6)
            first, *others = self.head
            assert isinstance(first, nn.Linear)  # containers do not tell the types of what is in them
            # What the first layer makes of the mean is the same for all tokens of an image, so it is asked once.
            own, common = first.weight.to(x.dtype).chunk(2, 1)
            y = F.linear(local, own) + F.linear(mean, common, first.bias.to(x.dtype))
            for layer in others:
                y = linear(layer, y) if isinstance(layer, nn.Linear) else layer(y)
            return y.log_softmax(-1)
