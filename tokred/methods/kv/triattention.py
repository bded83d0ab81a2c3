"""TriAttention: keys scored by what queries around a known centre will give them, further and further on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_choice
from tokred.core.learned import Facts
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import statistics
from tokred.kv.budgets import Generated, Uniform
from tokred.kv.parts import Budget, Score, When, check_count
from tokred.kv.preset import Preset
from tokred.kv.site import CacheSite

COMMAND = "tokred calibrate MODEL TEXT -o FILE"
KIND = "queries"
NOTES = ("turn_count", "turn_sum", "turn_length", "turn_frequencies")
_PROMPT = "prompt"


class Centres(NamedTuple):
    """Statistics of unrotated queries, one complex number a pair of channels that turns together.

    Attributes:
        centre: ``[B or 1, H, D/2, 2]`` float32, their mean, real and imaginary part.
        length: ``[B or 1, H, D/2]`` float32, the mean of their lengths.
    """

    centre: Tensor
    length: Tensor


@dataclass(frozen=True)
class Trigonometric(Score):
    """The mean logit that a key gets from queries to come, at distances that double, as a series of cosines.

    Queries of a head lie around a centre before they are rotated; where they do not, the key's length alone counts. No
    query and no attention is read, and a score costs a product of the key with one vector.

    Args:
        stats: the file with the centres, see :func:`tokred.calibrate`; "prompt": those of the prompt's own queries.
        offset_max: the farthest of the distances 1, 2, 4, ...
        offsets: "mean" or "max" over the distances.
        zscore: scores of each query head are shifted and scaled, over the rows that may go, before heads are compared.
        generated: only rows that were generated may go.
        least: tokens that a prompt needs, with "prompt".

    Source: Mao et al., TriAttention, ICML 2026 (arXiv 2604.04921), equations 5 to 8; rotated keys are read as they are,
    since their own positions cancel (ours).
    """

    name: ClassVar[str] = "trigonometric"
    why_no_chunks: ClassVar[str | None] = "its score judges generated rows alone"

    stats: str | None = None
    offset_max: int = 1 << 16
    offsets: str = "mean"
    zscore: bool = True
    generated: bool = True
    least: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", None if self.stats is None else statistics.file_name(self.stats, "stats"))
        check_count(self.offset_max, "offset_max", 1)
        check_choice(self.offsets, "offsets", ("mean", "max"))
        check_count(self.least, "least", 1)

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.stats == _PROMPT

    @property
    def needs(self) -> frozenset[str]:
        """Keys and the rotary embedding; queries only where the statistics are theirs."""
        return frozenset({"k", "rope", *(("q",) if self.stats == _PROMPT else ())})

    def note_bytes(self, heads: int, width: int) -> int:
        """Bytes of the statistics of a prompt."""
        return 4 * (1 + heads * width // 2 * 3 + width // 2) if self.stats == _PROMPT else 0

    def fits(self, facts: Callable[[], Facts]) -> None:
        """Refuse to go without statistics, and statistics of another model.

        Raises:
            ValueError, FileNotFoundError: with the command that makes them, or with both models.
        """
        if self.stats is None:
            raise ValueError(
                f"triattention needs statistics of the model's queries: make them with {COMMAND}, and give stats=FILE "
                "(or stats='prompt', for those of each prompt, of which nothing has been measured)"
            )
        if self.stats != _PROMPT:
            statistics.check_model(self.stats, self._file().facts, facts())

    def observe(self, site: CacheSite) -> None:
        """Add the queries of a prompt to its statistics."""
        if self.stats != _PROMPT or site.generated:
            return
        q = site.rope.unrotate(site.q).float()
        real = q.new_ones(q.shape[0], q.shape[2])
        if site.padding is not None:
            real = site.padding.mask[:, -q.shape[2] :].float()
        pairs, weight = torch.stack(q.chunk(2, -1), -1), real[:, None, :, None]
        frequencies = site.rope.turns()[0].expand(q.shape[0], -1)
        new = (
            real.sum(1),
            (pairs * weight.unsqueeze(-1)).sum(2),
            (pairs.norm(dim=-1) * weight).sum(2),
            frequencies,
        )
        if NOTES[0] in site.notes:
            sums = [site.notes[name] + t for name, t in zip(NOTES[:3], new[:3], strict=True)]
            new = (sums[0], sums[1], sums[2], frequencies)
        site.notes.update(zip(NOTES, new, strict=True))

    def __call__(self, site: CacheSite) -> Tensor:
        """The largest over the query heads of a key.

        Raises:
            ValueError: the statistics are of another rotary embedding, or the prompt is too short for some.
        """
        frequencies, factor = site.rope.turns()
        known = self._centres(site, frequencies)
        b, heads, _ = site.extent
        keys = torch.stack(site.k.float().chunk(2, -1), -1)  # [B, Hk, K, D/2, 2]
        group = known.centre.shape[1] // heads
        centre = known.centre.view(-1, heads, group, *known.centre.shape[2:])
        spread = known.length.view(-1, heads, group, known.length.shape[2]) - centre.norm(dim=-1)
        rest = factor * torch.einsum("bhgf,bhkf->bhgk", spread.expand(b, -1, -1, -1), keys.norm(dim=-1))
        found = None
        for turned in self._ahead(site, centre, frequencies):
            logits = factor * torch.einsum("bhgfc,bhkfc->bhgk", turned.expand(b, -1, -1, -1, -1), keys)
            found = logits if found is None else torch.maximum(found, logits)
        assert found is not None  # there is one distance at least
        return self._compared(site, found + rest).amax(2)

    def _ahead(self, site: CacheSite, centre: Tensor, frequencies: Tensor) -> list[Tensor]:
        """Centres ``[B or 1, Hk, G, D/2, 2]`` turned to the distances ahead: each, or their mean."""
        far = 2.0 ** torch.arange(self.offset_max.bit_length(), dtype=torch.float64)
        # In double precision: a turn of a hundred thousand positions leaves float32 no digits behind the point.
        now = torch.tensor(sorted(set(site.lengths)), dtype=torch.float64)
        angle = (now[:, None] + far)[..., None] * frequencies.double().cpu()
        turn = torch.stack([angle.cos(), angle.sin()], -1)  # [N, F, D/2, 2]
        turn = turn.mean(1, keepdim=True) if self.offsets == "mean" else turn
        if len(now) > 1:
            turn = turn[torch.tensor([sorted(set(site.lengths)).index(n) for n in site.lengths])]
        re, im = turn.float().to(centre.device)[:, None, None].unbind(-1)  # [B or 1, 1, 1, F, D/2]
        a, c = centre.unsqueeze(3).unbind(-1)
        both = torch.stack([a * re - c * im, a * im + c * re], -1)
        return list(both.unbind(3))

    def _compared(self, site: CacheSite, score: Tensor) -> Tensor:
        """``[B, Hk, G, K]`` shifted and scaled over the rows that may go."""
        if not self.zscore:
            return score
        may = torch.ones_like(score[:, :, 0], dtype=torch.bool)
        if self.generated:
            may = may & (site.token >= site.column(site.prompt))
        if site.real is not None:
            may = may & site.real
        weight = may.unsqueeze(2).float()
        count = weight.sum(-1, keepdim=True).clamp(min=1)
        mean = (score * weight).sum(-1, keepdim=True) / count
        deviation = (((score - mean) * weight).square().sum(-1, keepdim=True) / count).sqrt()
        return (score - mean) / deviation.clamp(min=1e-6)

    def _centres(self, site: CacheSite, frequencies: Tensor) -> Centres:
        if self.stats == _PROMPT:
            if NOTES[0] not in site.notes or (site.shape[0] and int(site.notes[NOTES[0]].min()) < self.least):
                raise ValueError(
                    f"stats='prompt' needs prompts of at least {self.least} tokens, and had one of "
                    f"{min(site.prompt)}: make statistics of the model with {COMMAND}"
                )
            count, total, length, _ = (site.notes[name] for name in NOTES)
            return Centres(total / count[:, None, None, None], length / count[:, None, None])
        file = self._file()
        if file.facts.depth != site.depth:
            raise ValueError(
                f"the statistics in {self.stats} are of {file.facts.depth} layers, the policy acts on {site.depth}: "
                "apply it without where="
            )
        known, device = file.tensors["frequencies"][site.layer], site.device
        if known.shape != frequencies.shape or not torch.allclose(known, frequencies.cpu(), rtol=1e-4, atol=1e-9):
            raise ValueError(
                f"the statistics in {self.stats} were made on a {file.facts.model} with another rotary embedding than "
                f"this model's: make new ones with {COMMAND}"
            )
        return Centres(*(file.tensors[name][site.layer][None].to(device) for name in ("centre", "length")))

    def _file(self) -> statistics.Statistics:
        if self.stats is None:
            raise ValueError(f"triattention needs statistics of the model's queries: make them with {COMMAND}")
        return statistics.read(self.stats, KIND, COMMAND)


@register("triattention")
@dataclass(frozen=True)
class TriAttention(Preset):
    """While tokens are generated, rows go whose keys a typical query to come would pass by; the prompt stays.

    Args:
        stats: a file that ``tokred calibrate`` made for the model; "prompt": from each prompt's own queries.
        budget: generated rows that stay.
        every: generated tokens between evictions.
        prompt: "keep" it, or let it "compete": then ``budget`` counts its rows too.
        offset_max, offsets, zscore, least: of the score, see :class:`Trigonometric`.
        sinks: first tokens that stay.
        recent: newest tokens that stay; 128 is what the authors' plugin for serving keeps.

    Source: Mao et al., TriAttention, ICML 2026 (arXiv 2604.04921), section 4; each layer and head for itself.
    """

    summary: ClassVar[str] = "while tokens are generated: keys that typical queries to come would pass by"
    source: ClassVar[str] = "Mao et al., ICML 2026 (arXiv 2604.04921)"
    example: ClassVar[Parameters] = {"stats": "prompt", "least": 1, "budget": 2, "every": 2, "recent": 1}
    nothing: ClassVar[Parameters | None] = None

    stats: str | None = None
    budget: int = 2048
    every: int = 128
    prompt: str = "keep"
    offset_max: int = 1 << 16
    offsets: str = "mean"
    zscore: bool = True
    least: int = 256
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", None if self.stats is None else statistics.file_name(self.stats, "stats"))
        check_choice(self.prompt, "prompt", ("keep", "compete"))
        check_count(self.budget, "budget", 1)
        check_count(self.every, "every", 1)
        super().__post_init__()

    def make_score(self) -> Score:
        keep = self.prompt == "keep"
        return Trigonometric(self.stats, self.offset_max, self.offsets, self.zscore, keep, self.least)

    def make_budget(self) -> Budget:
        return Generated(self.budget) if self.prompt == "keep" else Uniform(self.budget)

    def make_when(self) -> When:
        return When(prefill=False, every=self.every)

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        """First and newest tokens, and the prompt if it is to stay."""
        found = super().guarded(site, rows)
        return found | (site.token < site.column(site.prompt)) if self.prompt == "keep" else found


def concentration(known: Centres) -> Tensor:
    """``[B or 1, H, D/2]`` in [0, 1]: how near queries lie to their centre; where it is 1, the series says it all."""
    found: Tensor = known.centre.norm(dim=-1) / known.length.clamp(min=math.ulp(0.0))
    return found
