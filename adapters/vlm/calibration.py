"""A bias on the attention of all layers of a language model: what visual tokens that are left stand for, and how near
the others would have been. See :mod:`tokred.vlm.tools.calibration`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import attention_of, terms, words
from tokred.adapters.vlm.masks import PAIRS, hide, uncut
from tokred.adapters.vlm.tokens.recorded import track_of
from tokred.vlm.tools.calibration import Turns, calibration_bias

if TYPE_CHECKING:
    from tokred.adapters.vlm.families import Facts
    from tokred.adapters.vlm.forward import Forward

KERNELS = (terms.WRITTEN_OUT.name, terms.FUSED_KERNEL.name)


class Rows(NamedTuple):
    """Sizes and positions of the first rows of a cache's layer 0.

    Attributes:
        sizes: ``(B, P)`` float32, tokens that a visual row stands for; 0 on others.
        places: ``(A, B, P)`` int64 positions, one of each axis.
        turns: of the language model, which steps need not ask for again.
    """

    sizes: Tensor
    places: Tensor
    turns: Turns

    def pick(self, index: Tensor) -> Rows:
        """Rows of other samples."""
        index = index.to(self.sizes.device)
        return self._replace(sizes=self.sizes.index_select(0, index), places=self.places.index_select(1, index))

    def cut(self, count: int) -> Rows:
        """Without the newest ``count``."""
        return self._replace(sizes=self.sizes[:, :-count], places=self.places[..., :-count]) if count else self


def supplies_calibration(language: Any, facts: Facts) -> bool:
    """True where a bias for each pair of tokens can be added, and the rotary embedding tells what distances do."""
    # Hosts whose images see all of themselves make masks of their own.
    if facts.outer_masks or attention_of(words.CONFIG.need(language)) not in KERNELS:
        return False
    embedding = words.ROTARY.part(language)
    return isinstance(embedding, nn.Module) and not words.LAYER_TYPE.among(
        inspect.signature(embedding.forward).parameters
    )


def turns_of(language: Any, head_dim: int) -> Turns:
    """How a language model's rotary embedding turns the pairs of a head, and by which axis."""
    embedding = words.ROTARY.need(language)
    device = next((b.device for b in embedding.buffers()), torch.device("cpu"))
    like = torch.zeros(1, 1, 1, device=device)
    rope = words.ROPE.part(words.CONFIG.need(language), {})
    sections = words.AXES.part(embedding) or (rope.get(words.AXES.name) if isinstance(rope, dict) else None)
    one = _table(
        embedding, like, torch.ones(*(() if sections is None else (3,)), 1, 1, dtype=torch.long, device=device)
    )
    if sections is None:
        angles = one[_pairs(one)]
        return Turns(angles, torch.zeros(len(angles), dtype=torch.long), head_dim // 2)
    # Each axis is asked by itself: where the embedding mixes them, pairs of the others stand still.
    single = [_table(embedding, like, torch.eye(3, dtype=torch.long, device=device)[a].view(3, 1, 1)) for a in range(3)]
    if one.ndim == 1:
        turned = torch.stack(single)[:, _pairs(one)]
        return Turns(turned.sum(0), (turned != 0).to(torch.uint8).argmax(0), head_dim // 2)
    angles = one[0, _pairs(one[0])]
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    return Turns(angles, axis, head_dim // 2)


def _table(embedding: Any, like: Tensor, positions: Tensor) -> Tensor:
    """``(R,)`` float32 on the CPU: how far each channel of one token turns, or ``(3, R)`` where axes are left apart."""
    cos, sin = embedding(like, positions)
    found = torch.atan2(sin.float(), cos.float())[..., 0, :].cpu()  # (1, R), or (3, 1, R)
    return found[0] if found.ndim < 3 else found[:, 0]


def _pairs(angles: Tensor) -> slice:
    """One channel of each pair of ``(R,)``: pairs are a channel and its neighbour, or one of each half; where neither
    turns alike, there is one angle a pair."""
    half = len(angles) // 2
    if torch.equal(angles[:half], angles[half:]):
        return slice(half)
    return slice(0, None, 2) if torch.equal(angles[::2], angles[1::2]) else slice(None)


def calibrate(forward: Forward, language: Any, new: dict[str, Any]) -> None:
    """Put the bias into the masks of a forward, and remember the rows that it is about.

    Args:
        forward: whose tokens have left.
        language: the language model.
        new: its arguments; the mask is exchanged.

    Raises:
        ValueError: a policy of the cache evicts rows as well, or the mask is none that a bias fits.
    """
    c = getattr(forward.settings.outer, "calibration", None)
    track = track_of(forward.cache)
    held: Rows | None = None if track is None else track.calibration
    if c is None or (forward.sizes is None and held is None):
        return
    name = forward.settings.methods[0].name
    if hasattr(forward.cache, "engine"):
        raise ValueError(
            f"{name!r} calibrates attention to rows of the cache, of which a policy of the cache evicts some: take one "
            "of the two"
        )
    if forward.slides:
        raise ValueError(f"{name!r} does not go with layers that look back less than the conversation")
    now = _now(forward, new, turns_of(language, _head_dim(language)) if held is None else held.turns)
    forward.calibration = rows = _before(held, forward.past_columns, now)
    # Distances are those of the whole prompt: positions were kept.
    far = (now.places.unsqueeze(-1) - rows.places.unsqueeze(-2)).abs()
    bias = calibration_bias(far, rows.sizes, rows.turns, c).unsqueeze(1)
    words.ATTENTION_MASK.put(new, _with_bias(words.ATTENTION_MASK.of(new), bias, forward))


def _now(forward: Forward, new: dict[str, Any], turns: Turns) -> Rows:
    """This forward's columns."""
    m = forward.embeds.shape[1]
    places = words.POSITIONS.of(new)
    if places is None:
        places = torch.arange(forward.past, forward.past + m, device=forward.device)[None]
    places = places if places.ndim == 3 else places.unsqueeze(0)
    # Some hosts put the plain positions before those of the three axes; text may have one for all axes.
    places = places[1:] if places.shape[0] == 4 else places
    places = places.expand(max(len(places), int(turns.axis.max()) + 1), forward.batch, -1)
    if forward.sizes is None:
        visual = forward.visual
        sizes = torch.zeros(forward.batch, m, device=forward.device) if visual is None else visual.float()
        return Rows(sizes, places, turns)
    packed = forward.packed
    assert packed is not None  # tokens have left
    return Rows(forward.sizes.gather(1, packed.columns) * packed.valid, places, turns)


def _before(held: Rows | None, past: int, now: Rows) -> Rows:
    """All rows: those of earlier forwards, of which the ones that nothing is known of are text, then this one's."""
    a, b, _ = now.places.shape
    known = 0 if held is None else held.sizes.shape[1]
    sizes = [now.sizes.new_zeros(b, past - known), now.sizes]
    places = [now.places.new_zeros(a, b, past - known), now.places]
    if held is not None:
        sizes.insert(0, held.sizes.to(now.sizes.device))
        places.insert(0, held.places.to(now.places.device))
    return Rows(torch.cat(sizes, 1), torch.cat(places, 2), now.turns)


def _with_bias(mask: Any, bias: Tensor, forward: Forward) -> Tensor:
    """``(B, 1, Q, K)`` of the model's type: the mask, and the bias."""
    q, k = bias.shape[-2:]
    if mask is not None and not isinstance(mask, Tensor):
        raise uncut(mask)
    dtype = forward.embeds.dtype
    if mask is None or mask.ndim == 2:
        seen = torch.arange(k, device=bias.device) <= torch.arange(k - q, k, device=bias.device).unsqueeze(1)
        seen = seen.expand(len(bias), 1, -1, -1)
        if forward.mask is not None:
            seen = seen & forward.mask[:, None, None]
        return hide(bias.to(dtype), seen)
    if mask.shape[-1] != k:
        raise ValueError(PAIRS)
    if mask.dtype == torch.bool:
        return hide(bias.to(dtype), mask)
    return (mask + bias).to(dtype).clamp_min(torch.finfo(dtype).min)


def _head_dim(language: Any) -> int:
    config = words.CONFIG.need(language)
    given = words.HEAD_WIDTH.part(config)
    return int(given or words.WIDTH.need(config) // words.HEADS.need(config))
