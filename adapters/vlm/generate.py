"""Hooks around a model with a head: what it does before it generates, and the loss of the tokens that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.adapters.contract import PREPARE_CACHE, arguments, cache_of, members, terms, words
from tokred.adapters.kv.generate import prompt_length
from tokred.adapters.swap import Hook, Standin
from tokred.adapters.vlm.taps import in_flight

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig

    from tokred.adapters.vlm.hooks import VisualSettings

PROMPT = "_tokred_prompt"


class CachePreparer(Standin):
    """Stands in for how a generating model prepares its cache: bad calls are refused before anything runs,
    and the cache learns how long the prompt is, so that drafts are told apart from it."""

    def __init__(self, model: nn.Module, settings: VisualSettings) -> None:
        self.model = model
        self.settings = settings

    def __call__(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        name = self.settings.methods[0].name
        chunk = words.CHUNK.part(generation_config)
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} hands over the prompt in pieces, of which {name} would see one at a "
                "time: leave it out, or call tokred.remove(model) first"
            )
        kind = words.CACHE_KIND.part(generation_config)
        if kind not in (None, *terms.GROWING.names, "dynamic_full", *terms.OFFLOADED.names):
            static = "has rows for every token of the prompt, and"
            why = static if terms.STATIC.lower() in str(kind) else "is not known to hold prompts of which"
            raise ValueError(
                f"cache_implementation={kind!r} {why} {name} leaves fewer: leave it out (a DynamicCache), or call "
                "tokred.remove(model) first"
            )
        refuse(cache_of(model_kwargs))
        host = type(self.model)
        out = getattr(host, PREPARE_CACHE)(self.model, generation_config, model_kwargs, *args, **kwargs)
        cache, length = cache_of(model_kwargs), prompt_length(generation_config, model_kwargs)
        if cache is not None and length is not None:
            cache.__dict__[PROMPT] = length
        return out


def refuse(cache: Cache | None) -> None:
    """Refuse caches that cannot hold fewer rows.

    Raises:
        ValueError: with what would work.
    """
    if cache is None:
        return
    kinds = {type(layer).__name__ for layer in words.LAYERS.part(cache, [])}
    static = sorted(k for k in kinds if k.startswith(terms.STATIC))
    if static or not words.LAYERS.on(cache):
        raise ValueError(
            f"a {type(cache).__name__} has rows for every token of the prompt, and pruned prompts have fewer: leave "
            "cache_implementation out (a DynamicCache), or call tokred.remove(model) first"
        )


class EnterLoss(Hook):
    """Hook before the forward of the model with a head: labels wait until it is known which tokens are left."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = words.LABELS.of(given)
        in_flight.done = in_flight.labels = None
        if labels is None:
            return None
        if not self.settings.by_visual:
            name = self.settings.methods[-1].name
            raise ValueError(
                f"labels need the last layer's states of all tokens, and {name} leaves some of the prompt's out: call "
                "tokred.remove(model) first"
            )
        if not (isinstance(words.KEPT_LOGITS.of(given, 0), int) and words.KEPT_LOGITS.of(given, 0) == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep out")
        if words.LATER_LABELS.of(given) is not None:
            raise ValueError(
                f"{words.LATER_LABELS.name} have a column for every token of the prompt, of which some leave: give "
                "labels alone, or call tokred.remove(model) first"
            )
        # The host would compare its few logits with all labels, and refuse.
        in_flight.labels = labels
        return (), {**given, words.LABELS.key(given): None}


class LeaveLoss(Hook):
    """Hook after that forward: the loss of the tokens that are left, with their labels."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        labels, forward = in_flight.labels, in_flight.done
        in_flight.labels = in_flight.done = None
        if labels is None or output is None:
            return None
        columns, valid = (None, None) if forward is None else (forward.loss_columns(), forward.loss_valid())
        if columns is not None and valid is not None:
            labels = labels.gather(1, columns).masked_fill(~valid, -100)
        logits = words.LOGITS.at(output) if isinstance(output, dict) else output[0]
        text, function = members.TEXT_OF.need(words.CONFIG.need(module))(), members.LOSS_OF.need(module)
        given = {words.LOGITS: logits, words.LABELS: labels, words.VOCABULARY: words.VOCABULARY.need(text)}
        # The host hands on what its forward does not name, such as the number of tokens of all accumulated batches.
        more = {name: value for name, value in kwargs.items() if name not in self.names}
        loss = function(**{**more, **arguments(function, given)})
        if not isinstance(output, dict):
            return (loss, *output)
        words.LOSS.put(output, loss)
        return output
