"""Records of features: made by call-through wrappers of the feature getters, and found again for features that a
forward is given. Those may have been made outside of it (``generate`` does so), and on the way wrappers of modules move
them to other devices or rebuild the object that they came in."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tokred.adapters.contract import members, parameters_at_hand, words
from tokred.adapters.swap import Standin
from tokred.adapters.vlm.taps import Call, Record, in_flight, tapped
from tokred.adapters.vlm.tower.film import located
from tokred.errors import BypassedError, NothingRemovedWarning
from tokred.vlm.clips import Runs, said

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from tokred.adapters.vlm.hooks import VisualSettings

# Outputs of feature getters, and the tensors in them, to their records.
_KNOWN: MutableMapping[object, Record] = WeakIdKeyDictionary()
# Channels that tell tokens apart.
_CHANNELS = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Getter(Standin):
    """Stands in for a feature getter of one model; an object on the instance, so that models copy and pickle.

    Args:
        core: the model.
        name: of the method.
        modality: "image" or "video".
        describe: makes the record: ``describe(core, arguments, output, tap, modality)``.
    """

    def __init__(self, core: nn.Module, name: str, modality: str, describe: Callable[..., Record | None]) -> None:
        self.core = core
        self.name = name
        self.modality = modality
        self.describe = describe

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(getattr(type(self.core), self.name)).parameters.values())[1:]
        return inspect.Signature(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = partial(getattr(type(self.core), self.name), self.core, *args, **kwargs)
        if in_flight.tap is not None:
            # Getters call each other (videos by way of images): these are the outer one's features, not others.
            return call()
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        with tapped(self.core, given, self.modality) as tap:
            output = call()
        if words.FEATURES.on(output):
            record = self.describe(self.core, given, output, tap, self.modality)
            if record is not None and tap.film is not None:
                record.shots = located(tap.film, record.pictures)
            run = in_flight.core
            if run is not None and run.module is self.core:
                run.call.records[self.modality] = record
            else:
                remember(self.core, self.modality, output, record)
        return output


def remember(core: nn.Module, modality: str, output: BaseModelOutputWithPooling, record: Record | None) -> None:
    """Note what a feature getter gave; the last one of each thread is known by its values too."""
    if record is None:
        return
    features = list(words.FEATURES.need(output))
    for key in (output, words.FEATURES.need(output), *features[:1]):
        if isinstance(key, Tensor) or key is output:
            _KNOWN[key] = record
    record.marks = marks(_entering(core, record, features), _dtype(core)) if features else None
    if in_flight.last is None:
        in_flight.last = weakref.WeakKeyDictionary()
    in_flight.last.setdefault(core, {})[modality] = record


def _entering(core: PreTrainedModel, record: Record, features: list[Tensor]) -> Tensor:
    """``(T, C)`` the features as they enter the prompt, and the newline where the forward puts it behind them."""
    rows = torch.cat([one.flatten(0, -2) for one in features])
    if sum(p.tokens for p in record.pictures) == len(rows):
        return rows
    with parameters_at_hand(core):
        newline: Tensor = members.NEWLINE.need(core)
        # Without it, embeddings that hold it are refused as unknown.
        return rows if newline.is_meta else torch.cat([rows, newline.detach()[None].to(rows)])


def record_of(core: nn.Module, modality: str, output: BaseModelOutputWithPooling) -> Record | None:
    """The record of features that a forward was given; None where the patched model did not make them.

    Args:
        core: the model with vision.
        modality: of the features.
        output: what holds them, with ``pooler_output``.
    """
    features = list(words.FEATURES.need(output))
    for key in (output, words.FEATURES.need(output), *features[:1]):
        if (isinstance(key, Tensor) or key is output) and key in _KNOWN:
            found: Record = _KNOWN[key]
            return found
    record = last_record(core, modality)
    if record is None or record.marks is None or not features:
        return None
    given = marks(torch.cat([one.flatten(0, -2) for one in features]), _dtype(core))
    fits = len(given) % len(record.marks) == 0 and bool(torch.isin(given, record.marks.to(given.device)).all())
    return record if fits else None


def last_record(core: nn.Module, modality: str) -> Record | None:
    """The record of the features that this thread made last."""
    return None if in_flight.last is None else in_flight.last.get(core, {}).get(modality)


def marks(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``(...,)`` int64: a number for each row of ``(..., C)``, by its bits in ``dtype``: the same one for like rows."""
    rows = rows.detach()[..., :_CHANNELS].to(dtype).contiguous()
    bits = rows.view(_BITS[dtype.itemsize]).long()
    # Powers of an odd number, modulo 2^64.
    weights = torch.full((bits.shape[-1],), 6364136223846793005, device=rows.device).cumprod(0)
    return (bits * weights).sum(-1)


def _dtype(core: PreTrainedModel) -> torch.dtype:
    """The type in which features stand among the embeddings."""
    found: torch.dtype = members.EMBED.need(core)().weight.dtype
    return found


# Rows of the word embeddings that are looked at together.
_BLOCK = 4096


def fill(settings: VisualSettings, core: PreTrainedModel, call: Call, given: dict[str, Any]) -> None:
    """Note the modalities of a forward.

    Args:
        settings: of the patched model.
        core: the model with vision.
        call: to be filled.
        given: arguments of ``core``, or of its language model where that is called alone.

    Raises:
        BypassedError: there are visual tokens, or may be, that the methods cannot be told of.
    """
    ids, embeds, outputs = words.INPUT_IDS.of(given), words.EMBEDS.of(given), words.ENCODED.of(given) or {}
    for _, name in settings.facts.getters:
        token, output = _place_of(settings, name, core), outputs.get(name)
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
        call.add(visual, record, _runs(settings, name))
    # A single embedding is a decoded token.
    if embeds is not None and not call.modalities and embeds.shape[1] > 1:
        _fill_merged(settings, core, call, ids, embeds)


def _fill_merged(
    settings: VisualSettings, core: PreTrainedModel, call: Call, ids: Tensor | None, embeds: Tensor
) -> None:
    """The caller has merged the features into the embeddings, if there are any."""
    # Where ids come beside, they tell the places, unless the caller left the placeholders' own embeddings there. Else
    # the features are looked for among the rows by their values, as the getters made them last.
    rows = None
    for _, name in settings.facts.getters:
        token, record = _place_of(settings, name, core), last_record(core, name)
        if token is None:
            continue
        if rows is None:
            rows = marks(embeds, members.EMBED.need(core)().weight.dtype)
        known = record is not None and record.marks is not None and len(record.marks) > 0
        found = torch.isin(rows, record.marks.to(rows.device)) if known and record is not None else None  # type: ignore[union-attr]
        if ids is None:
            visual = found
        else:
            visual = (ids == token).to(embeds.device) & ~_words(core, embeds, token)
            record = record if found is not None and bool((found == visual).all()) else None
        if visual is not None and bool(visual.any()):
            _check_record(settings, name, record)
            call.add(visual, record, _runs(settings, name))
    if ids is None and not _only_words(core, embeds, call):
        some = "some of them are no features that its getters made last" if call.modalities else "no features are known"
        raise BypassedError(
            f"{settings.methods[0].name!r} did not run: the prompt came as inputs_embeds with more than words, and "
            f"{some}, so that visual tokens cannot be told from others: give pixel_values, which the model merges "
            f"itself, or merge what get_image_features of the patched model gave, as it is, {_remedy(settings)}"
        )


def _place_of(settings: VisualSettings, modality: str, core: PreTrainedModel) -> Any:
    """The id of the places of one modality's features; None where the model has none."""
    where = "image" if settings.facts.one_place else modality
    return words.MODALITY_TOKENS[where].part(words.CONFIG.need(core))


def _runs(settings: VisualSettings, modality: str) -> Runs | None:
    """Runs of pictures that are clips, as the caller says.

    Raises:
        ValueError: the family takes videos as what they are, or cuts images into tiles with newlines.
    """
    runs = said()
    if runs is not None and not settings.facts.clips:
        videos = any(name == "video" for _, name in settings.facts.getters)
        why = "takes videos as pixel_values_videos" if videos else "cuts images into tiles"
        raise ValueError(
            f"tokred.vlm.clips was given {[list(one) for one in runs]}, but {settings.family} {why}, so that its "
            "images are no frames: leave it out"
        )
    if runs is None and settings.facts.clips and getattr(settings.outer, "clips", False):
        # In the tower an image and a frame look alike: without a word here the method would do nothing, in silence.
        assert settings.outer is not None
        warnings.warn(
            f"{settings.outer.name!r} removes nothing of images, and {settings.family} takes the frames of a video as "
            "images: run it inside tokred.vlm.clips, which says which of them are one clip (1: an image by itself)",
            NothingRemovedWarning,
            stacklevel=2,
        )
    return runs if modality == "image" else None


def _check_record(settings: VisualSettings, name: str, record: Record | None) -> None:
    if record is None and settings.outer is not None:
        raise BypassedError(
            f"{settings.outer.name!r} did not run: the {name} features among the inputs_embeds are not those that "
            f"get_{name}_features of the patched model gave last, so that nothing is known of them: give pixel_values, "
            f"which the model merges itself, {_remedy(settings)}"
        )


def _words(core: PreTrainedModel, embeds: Tensor, token: int) -> Tensor:
    """``(B, L)`` bool: where the embeddings are those of one word."""
    mark = members.EMBED.need(core)()(torch.full((), token, dtype=torch.long, device=embeds.device))
    found: Tensor = (embeds == mark.to(embeds.device)).all(-1)
    return found


def _only_words(core: PreTrainedModel, embeds: Tensor, call: Call) -> bool:
    """True where everything but the visual tokens that are known, and padding, is a word."""
    table = members.EMBED.need(core)()
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


def _remedy(settings: VisualSettings) -> str:
    return f"or call tokred.remove(model) to run {settings.family} as it is"
