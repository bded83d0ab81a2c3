"""Where visual tokens stand in a prompt, and which features fill them, however the prompt was given; what cannot be
known is refused, since nothing would leave without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.adapters.vlm.call import Call
from tokred.adapters.vlm.features import Record
from tokred.adapters.vlm.records import last_record, marks, record_of
from tokred.errors import BypassedError

# Rows of the word embeddings that are looked at together.
_BLOCK = 4096


def fill(settings: Any, core: Any, call: Call, given: dict[str, Any]) -> None:
    """Note the modalities of a forward.

    Args:
        settings: of the patched model.
        core: the model with vision.
        call: to be filled.
        given: arguments of ``core``, or of its language model where that is called alone.

    Raises:
        BypassedError: there are visual tokens, or may be, that the methods cannot be told of.
    """
    ids, embeds, outputs = given.get("input_ids"), given.get("inputs_embeds"), given.get("mm_encoder_outputs") or {}
    for _, name in settings.facts.getters:
        token, output = getattr(core.config, f"{name}_token_id", None), outputs.get(name)
        if output is None and name not in call.records:
            continue
        if token is None:
            raise BypassedError(
                f"{settings.family} has no id of the places for its {name} features, {_remedy(settings)}"
            )
        record = call.records.get(name) or record_of(core, name, output)
        if record is None and settings.outer is not None:
            raise BypassedError(
                f"{settings.outer.name!r} did not run: the {name} features that came as mm_encoder_outputs were not "
                f"made by the patched model, so that nothing is known of them: give pixel_values, or features of its "
                f"get_{name}_features after tokred.apply, {_remedy(settings)}"
            )
        if ids is None:
            assert embeds is not None  # one of them is given
            visual = _words(core, embeds, token)
        else:
            visual = ids == token
        call.add(visual, record)
    if embeds is not None and not call.modalities and embeds.shape[1] > 1:
        _fill_merged(settings, core, call, ids, embeds)


def _fill_merged(settings: Any, core: Any, call: Call, ids: Tensor | None, embeds: Tensor) -> None:
    """The caller has merged the features into the embeddings, if there are any."""
    rows = None
    for _, name in settings.facts.getters:
        token, record = getattr(core.config, f"{name}_token_id", None), last_record(core, name)
        if token is None:
            continue
        if rows is None:
            rows = marks(embeds, core.get_input_embeddings().weight.dtype)
        known = record is not None and record.marks is not None and len(record.marks) > 0
        found = torch.isin(rows, record.marks.to(rows.device)) if known and record is not None else None  # type: ignore[union-attr]
        if ids is None:
            visual = found
        else:
            visual = (ids == token).to(embeds.device) & ~_words(core, embeds, token)
            record = record if found is not None and bool((found == visual).all()) else None
        if visual is not None and bool(visual.any()):
            _check_record(settings, name, record)
            call.add(visual, record)
    if ids is None and not _only_words(core, embeds, call):
        some = "some of them are no features that its getters made last" if call.modalities else "no features are known"
        raise BypassedError(
            f"{settings.methods[0].name!r} did not run: the prompt came as inputs_embeds with more than words, and "
            f"{some}, so that visual tokens cannot be told from others: give pixel_values, which the model merges "
            f"itself, or merge what get_image_features of the patched model gave, as it is, {_remedy(settings)}"
        )


def _check_record(settings: Any, name: str, record: Record | None) -> None:
    if record is None and settings.outer is not None:
        raise BypassedError(
            f"{settings.outer.name!r} did not run: the {name} features among the inputs_embeds are not those that "
            f"get_{name}_features of the patched model gave last, so that nothing is known of them: give pixel_values, "
            f"which the model merges itself, {_remedy(settings)}"
        )


def _words(core: Any, embeds: Tensor, token: int) -> Tensor:
    """``(B, L)`` bool: where the embeddings are those of one word."""
    mark = core.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    found: Tensor = (embeds == mark.to(embeds.device)).all(-1)
    return found


def _only_words(core: Any, embeds: Tensor, call: Call) -> bool:
    """Whether everything but the visual tokens that are known, and padding, is a word."""
    table = core.get_input_embeddings()
    rows, dtype = marks(embeds, table.weight.dtype), table.weight.dtype
    left = torch.ones_like(rows, dtype=torch.bool)
    for one in call.modalities:
        left = left & ~one.visual
    if call.mask is not None:
        left = left & call.mask[:, -embeds.shape[1] :].to(left.device).bool()
    for first in range(0, table.num_embeddings, _BLOCK):
        if not bool(left.any()):
            return True
        last = min(first + _BLOCK, table.num_embeddings)
        words = table(torch.arange(first, last, device=embeds.device))
        left = left & ~torch.isin(rows, marks(words.to(embeds.device), dtype))
    return not bool(left.any())


def _remedy(settings: Any) -> str:
    return f"or call tokred.remove(model) to run {settings.family} as it is"
