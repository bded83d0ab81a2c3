"""The gain that a method could bring a denoiser at some size, before anything is patched or run."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from tokred.core.method import Method
from tokred.diffusion.method import AttentionMethod
from tokred.errors import NothingRemovedWarning, TokredWarning

# Below this there is nothing that matching, gathers and scatters would not take back.
LITTLE = 1.05


class Level(NamedTuple):
    """Sub-layers of one kind on one grid.

    Attributes:
        role: ``"self"``, ``"cross"`` or ``"mlp"``.
        tokens: of the image.
        left: tokens (with methods of keys and values: keys) under the method.
        sublayers: how many.
        share: of the denoiser's multiply-adds, unpatched.
    """

    role: str
    tokens: int
    left: int
    sublayers: int
    share: float


class Explanation(NamedTuple):
    """Multiply-adds of one forward of a denoiser at batch 1, without and with a method.

    Attributes:
        family: of the denoiser.
        method: that was asked about.
        size: rows and columns of the sample (the latent); of a clip: frames, rows and columns.
        levels: finest first.
        macs: of the whole denoiser, unpatched.
        reduced: of the whole denoiser under the method; the method's own work is not counted.
    """

    family: str
    method: Method
    size: tuple[int, ...]
    levels: tuple[Level, ...]
    macs: int
    reduced: int

    @property
    def attention_share(self) -> float:
        """Self-attention's share of the multiply-adds, projections included."""
        return sum(level.share for level in self.levels if level.role == "self")

    @property
    def ceiling(self) -> float:
        """The speed-up if time went with multiply-adds and the method's own work were free. Attention with small heads
        takes more time than its multiply-adds say: there more may be gained."""
        return self.macs / self.reduced

    @property
    def idle(self) -> bool:
        """True if nothing is reduced at this size."""
        return all(level.left == level.tokens for level in self.levels)

    @property
    def warning(self) -> str:
        """A reason why this is not worth it, or an empty text."""
        if self.ceiling >= LITTLE:
            return ""
        nothing = self.idle
        reason = "nothing is reduced at this size" if nothing else "this can gain less than 5 %"
        advice = getattr(self.method, "advice", "")
        return f"{reason} (ceiling {self.ceiling:.2f}x)" + (f"; {advice}" if nothing and advice else "")

    def __str__(self) -> str:
        head = f"{self.method} on {self.family}, sample {' x '.join(map(str, self.size))}"
        lines = [head, f"{'sub-layer':>9} {'count':>6} {'tokens':>16} {'of the work':>12}"]
        for level in self.levels:
            tokens = f"{level.tokens} -> {level.left}"
            lines.append(f"{level.role:>9} {level.sublayers:>6} {tokens:>16} {level.share:>12.1%}")
        lines.append(
            f"self-attention: {self.attention_share:.1%} of {self.macs / 1e9:.1f} GMACs; "
            f"under the method: {self.reduced / 1e9:.1f} GMACs; ceiling of the speed-up: {self.ceiling:.2f}x"
        )
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines)


def explain(model: Any, method: str | Method, size: int | tuple[int, ...], **parameters: Any) -> Explanation:
    """Tokens by resolution, attention's share of the work, and the ceiling of the speed-up, before anything is patched.

    Nothing is computed but shapes. Warns where the ceiling is under 5 %.

    Args:
        model: a denoiser or a pipeline of diffusers; it is not changed.
        method: a method of the stage ``attention``, or its name.
        size: of the image in pixels for a pipeline, of the sample (the latent) for a denoiser; a number,
            ``(height, width)``, or for a clip ``(frames, height, width)``.
        parameters: the method's, when it is given by name.

    Raises:
        UnsupportedModelError, MissingInputError: as :func:`tokred.apply`.
        ValueError: the size is not positive or has frames where it should not, or the method's parameters do not fit
            the grids there.
    """
    from tokred import adapters
    from tokred.api import make

    chosen = make(method, **parameters)
    host = adapters.find_for(model, chosen)
    if not isinstance(chosen, AttentionMethod):
        raise ValueError(
            f"explain is about denoisers, and {chosen.name!r} acts at stage {chosen.stage!r}: see tokred.flops"
        )
    host.check(chosen)
    found = _explained(host, chosen, _size(model, host, size))
    if found.warning:
        warnings.warn(found.warning, NothingRemovedWarning if found.idle else TokredWarning, stacklevel=2)
    return found


def _explained(host: Any, method: AttentionMethod, size: tuple[int, ...]) -> Explanation:
    from tokred.adapters.diffusion.survey import survey

    counted = survey(host, method, size)
    levels: dict[tuple[int, str, int], list[int]] = {}
    for spot, macs in zip(counted.spots, counted.spot_macs, strict=True):
        levels.setdefault((spot.tokens, spot.role, spot.left), []).append(macs)
    order = {"self": 0, "cross": 1, "mlp": 2}
    rows = tuple(
        Level(role, tokens, left, len(macs), sum(macs) / counted.macs)
        for (tokens, role, left), macs in sorted(levels.items(), key=lambda item: (-item[0][0], order[item[0][1]]))
    )
    return Explanation(host.family, method, size, rows, counted.macs, counted.reduced)


def _size(model: Any, host: Any, size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Size of the sample, from pixels and frames where a pipeline is asked about."""
    from tokred.adapters.diffusion.geometry import sample_size

    given = (size, size) if isinstance(size, int) else tuple(size)
    pixels = getattr(model, "vae_scale_factor_spatial", getattr(model, "vae_scale_factor", 1))
    frames = getattr(model, "vae_scale_factor_temporal", 1)
    return sample_size(given, int(pixels), int(frames) if host.record.frames else 0)
