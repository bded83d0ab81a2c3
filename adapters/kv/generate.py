"""Generation of a patched model, before it begins: it gets a cache that knows the plan, or refuses what would fail."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred.adapters.contract import (
    LATER_CHUNKS,
    PREPARE_CACHE,
    cache_of,
    generation_cache_name,
    goes_on_in_chunks,
    mask_length,
    members,
    terms,
    words,
)
from tokred.adapters.followed import followed
from tokred.adapters.kv.hooks import CacheSettings
from tokred.adapters.swap import SETTINGS
from tokred.kv.stores.store import missing


def body(host: Any) -> dict[str, Any]:
    """Methods of the subclass that a model is given: how caches are prepared, and what goes along with it."""
    original = getattr(host, PREPARE_CACHE, None)
    if original is None:
        return followed(host)

    def prepare(
        self: nn.Module,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        settings: CacheSettings | None = self.__dict__.get(SETTINGS)  # None: removed since
        if settings is not None and (
            words.CACHED.need(generation_config) is not False or cache_of(model_kwargs) is not None
        ):
            if settings.crosses:
                _refuse_crossing(settings, generation_config, generation_mode)
            else:
                name = generation_cache_name(model_kwargs, self)
                _prepare(settings, generation_config, model_kwargs, name, generation_mode, max_cache_length)
        return original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    prepare.__name__ = PREPARE_CACHE
    return {**followed(host), PREPARE_CACHE: prepare}


def _prepare(
    settings: CacheSettings, config: Any, model_kwargs: dict[str, Any], name: str, mode: Any, longest: int
) -> None:
    assisted = _assisted(mode)
    given = cache_of(model_kwargs)
    _refuse(settings, config, assisted, given)
    cache = settings.cache() if given is None else settings.adopt(given)
    if given is None:
        words.CACHE_KIND.set(config, None)  # one that grows, as ours does: transformers takes no cache beside a wish
    length = prompt_length(config, model_kwargs)
    seen = members.LENGTH.need(cache)()
    words.CHUNK.set(config, _chunk(settings, words.CHUNK.need(config), length, seen))
    if seen == 0:
        engine = cache.engine
        engine.reset()
        engine.prompt = length
        engine.steps = None if length is None else max(longest + 1 - length, 1)
        engine.drafting = assisted
    else:
        cache.engine.drafting = False
    model_kwargs[name] = cache


def _chunk(settings: CacheSettings, asked: int | None, length: int | None, seen: int) -> int | None:
    """Tokens in which the prompt is read; None: in one piece.

    Args:
        asked: by the caller.
        length: tokens of the prompt, earlier turns counted, where that is known.
        seen: those that the cache has seen.

    Raises:
        ValueError: the host would read chunks wrong, and the rest of the prompt does not fit into one.
    """
    limit = settings.policy.parts.when.chunk
    chunk = min(asked or limit, limit) if limit else asked
    if chunk is None or seen == 0 or goes_on_in_chunks():
        return chunk
    if length is not None and 0 < length - seen <= chunk:
        return None
    raise ValueError(
        f"this {LATER_CHUNKS.library} reads wrong in chunks ({LATER_CHUNKS.name}={chunk}) what follows on a cache that "
        f"has seen {seen} tokens; {LATER_CHUNKS.since} mends that. Until then give the model the new tokens but the "
        f"last, at most {chunk} in a forward, and the whole sequence to generate"
    )


def _refuse(settings: CacheSettings, config: Any, assisted: bool, given: Any) -> None:
    """Everything that would go wrong, before anything has changed.

    Raises:
        ValueError: with what cannot go together and what to do.
    """
    name = settings.policy.name or "the policy"
    _refuse_kind(config, name)
    if words.EARLY_EXIT.part(config) is not None:
        raise ValueError(
            f"{words.EARLY_EXIT.name} makes the patched model its own assistant, whose drafts would be rows of its "
            "cache: take prompt_lookup_num_tokens, tokred.draft, or an assistant_model"
        )
    # The assistant knows nothing of the model it assists: only this mark tells that its tokens will be taken back.
    if words.DRAFTS.part(config, False):
        raise ValueError(
            f"an assistant takes back tokens, which {name} may have evicted others for: apply it to the model that is "
            "assisted, and leave the assistant as it is"
        )
    if not assisted:
        return
    if given is not None and members.LENGTH.need(given)() > 0:
        raise ValueError(
            "assisted decoding and prompt lookup feed the whole prompt again, whatever the cache holds: start from an "
            "empty cache, or generate without them"
        )
    parts = settings.policy.parts
    why = missing(parts.store, {"crop": "assisted decoding or prompt lookup"})
    if why:
        raise ValueError(f"{why}, and {parts.store.name!r} cannot")
    later = parts.budget.deferred or parts.score.repeats is not None
    if (parts.when.every or parts.when.turns or later) and not parts.budget.full:
        raise ValueError(
            f"assisted decoding and prompt lookup take back tokens, for which {name} has evicted others by then; they "
            "work with policies that evict once, at the end of the prompt, layer by layer"
        )


def _assisted(mode: Any) -> bool:
    """True for a way of generating that takes drafts back."""
    return str(getattr(mode, "value", mode)) in terms.WITH_DRAFTS.names


def _refuse_kind(config: Any, name: str) -> None:
    if words.CACHE_KIND.need(config) not in (None, *terms.GROWING.names):
        raise ValueError(
            f"cache_implementation={words.CACHE_KIND.need(config)!r} keeps rows that {name} cannot evict: leave it "
            "out, or call tokred.remove(model) first"
        )


def _refuse_crossing(settings: CacheSettings, config: Any, mode: Any) -> None:
    """Everything that would go wrong where rows of an encoder leave.

    Raises:
        ValueError: with what cannot go together and what to do.
    """
    name = settings.policy.name or "the policy"
    _refuse_kind(config, name)
    if _assisted(mode) and not settings.policy.parts.budget.full:
        raise ValueError(
            f"assisted decoding and prompt lookup ask about tokens that are taken back, and {name} would judge the "
            "encoder's rows by them: generate without"
        )


def prompt_length(config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt, padding and earlier turns counted, before anything is generated."""
    mask = words.ATTENTION_MASK.of(model_kwargs)
    if mask is not None:
        return int(mask.shape[1])
    known = mask_length(config)
    if known is not None:
        return known
    positions = words.POSITIONS.of(model_kwargs)
    return None if positions is None else int(positions.shape[-1])
