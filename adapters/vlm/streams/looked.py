"""A frame on its way into the language model: its features, the site that a method sees, and the tokens that stay."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.contract.spelling import parameters
from tokred.adapters.swap import host_class
from tokred.adapters.vlm.families import describe
from tokred.adapters.vlm.layout import Part, clip_of
from tokred.adapters.vlm.sites import Context, Left, Place, check_tower, leave, site_of
from tokred.adapters.vlm.streams.families import Looks
from tokred.adapters.vlm.taps import Record, tapped
from tokred.core.method import Method
from tokred.kernels.dispatch import without_autocast
from tokred.vlm.before_llm import ProjectorMethod, VisualSite
from tokred.vlm.causal import CausalMethod, State


class Features(NamedTuple):
    """Features that the tower and the projector made of a frame.

    Attributes:
        x: ``(1, N, C)`` as they would enter the language model.
        part: how they stand.
        record: of the getter's call.
    """

    x: Tensor
    part: Part
    record: Record


class Looked(NamedTuple):
    """Tokens that are left of a frame.

    Attributes:
        x: ``(1, M, C)``.
        kept: ``(M,)`` int64 ascending, the places that they stand at.
        state: of a causal method, after the frame.
    """

    x: Tensor
    kept: Tensor
    state: State


def features_of(core: nn.Module, looks: Looks, given: dict[str, Any]) -> Features:
    """The features of one frame; taps that are hung on the model note what the method reads."""
    # The class's own getter: what stands in front of it on a patched model is for forwards of prompts.
    getter = getattr(host_class(core), looks.getter)
    pixels = words.VIDEO_PIXELS.of(given)
    if pixels is not None and not words.VIDEO_PIXELS.among(parameters(getter)):
        # Older versions give videos to the getter under the name that images have.
        given = {words.PIXELS.name: pixels}
    with tapped(core, given, looks.modality) as tap:
        output = getter(core, **given)
    model: Any = core
    record = describe(model, given, output, tap, looks.modality)
    assert record is not None  # of the families that take frames
    (picture,) = record.pictures
    if looks.modality == "image":
        picture = clip_of([picture])
    (part,) = picture.parts
    rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in words.FEATURES.need(output)])
    return Features(rows[part.where.offsets(rows.device)][None], part, record)


def look(method: ProjectorMethod | None, state: State, found: Features) -> Looked:
    """Ask the method about a frame.

    Args:
        method: None: everything stays.
        state: of a causal method, after the frame before.
        found: of this frame.
    """
    x = found.x
    b, n = x.shape[:2]
    if method is None:
        return Looked(x, torch.arange(n, device=x.device), state)
    check_tower(method, found.part)
    columns = torch.arange(n, device=x.device)[None]
    # Nothing is told of a text: the question comes later.
    context = Context(x, torch.zeros(b, n, dtype=torch.bool, device=x.device), None, method.reads)
    group = [Place(0, 0, 0, found.part, found.record)]
    site: VisualSite = site_of(group, columns, context)
    if isinstance(method, CausalMethod):
        with method.recording(), without_autocast(x):
            state, step = method.step(state, site)
    else:
        step = method.reduce(site)
    left = leave(Left(None, x, (0,)), group, columns, site, step, "x")
    if left.gone is None:
        return Looked(x, columns[0], state)
    kept = (~left.gone[0]).nonzero().squeeze(1)
    return Looked(left.embeds[:, kept], kept, state)


def objection(method: Method) -> str:
    """Why a method cannot act on frames as they come; empty: it can."""
    if method.stage != "projector":
        return f"acts at stage {method.stage!r}: a stream takes methods of the stages 'projector' and 'cache'"
    reads = method.reads & {"text", "calibration"}
    if "text" in reads:
        return "reads the question, which comes after the frames"
    if reads:
        return "adds biases to the attention of a prompt, which a stream has none of"
    if getattr(method, "clips", False) and not isinstance(method, CausalMethod):
        return (
            "looks at all frames of a clip before it decides about the first: take one that is causal, such as "
            "'streamingtom' or 'stc'"
        )
    return ""
