"""Caches that are used again: ``save_cache``, ``load_cache``, ``blend``, ``share_prefix`` and ``draft``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.core.checks import check_count
from tokred.core.method import from_dict
from tokred.errors import NothingRecordedError, TokredError
from tokred.patch import part_at


def save_cache(model: nn.Module, cache: Any, path: str | Path) -> Path:
    """Write a cache into a file, with all that goes on from it: rows as they are held, positions, the policy's state.

    Coded rows are written as codes. A fingerprint of the model goes along, and the policy. Tokens are not written:
    ``generate`` is given all of them again, as with the cache in memory.

    Args:
        model: that has filled the cache; patched with the policy that the cache belongs to, or with none.
        cache: of :func:`tokred.kv_cache`, of ``generate``, or a ``DynamicCache`` where the model has no policy.
        path: of the file; folders are made. A file that is there is replaced when the new one is complete.

    Returns:
        The path, for :func:`load_cache`.

    Raises:
        TypeError, ValueError: it is no such cache, or of another policy than the model has.
        TokredError: the policy's store holds what no file can.
        OSError: it cannot be written; a file that was there is as it was.
        ImportError: safetensors is not installed.
    """
    from tokred.adapters.kv.reuse import saved

    place = _Place(model)
    place.check(cache)
    return saved.write(path, cache, place.about(cache))


def load_cache(model: nn.Module, path: str | Path) -> Any:
    """The cache that :func:`save_cache` wrote; ``generate`` goes on from it exactly as from the one in memory.

    Args:
        model: the same as then, with the same policy, on any device.
        path: of the file.

    Returns:
        A cache of the kind that was saved, on the model's device.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no cache of tokred, of another format, another model or another policy; the message has both.
        ImportError: safetensors is not installed.
    """
    from tokred.adapters.kv.reuse import saved

    place, file = _Place(model), saved.Saved(path, "held")
    file.check_model(place.fingerprint)
    known = file.known
    file.check("policy", place.policy, _said(place.policy), _said(known.get("policy")))
    file.check("learned", place.learned, f"one with weights {place.learned}", f"one with weights {known['learned']}")
    file.check("compressed", place.compressed, f"one on layers {place.compressed}", f"one on {known['compressed']}")
    cache = place.empty(known["layout"])
    file.fill(cache, place.devices)
    return cache


def blend(
    model: nn.Module,
    parts: Sequence[Any],
    *,
    recompute: float | Sequence[float] = 0.15,
    check_layers: Sequence[int] = (1,),
    measure: str = "key",
    fresh_at_check: bool = False,
) -> Any:
    """One cache of several chunks that were computed apart, of which a share is computed again (CacheBlend).

    Keys move to their new positions. Layers before the first check layer are computed for all tokens; there the tokens
    whose rows differ most from the stored ones are chosen, and from there on only these are computed, each seeing all
    rows up to its own. The question is no part: ``generate`` computes it, and the cache serves others too.

    Args:
        model: that has computed the chunks. With a policy on it the cache is the policy's, which acts at the end of
            the forward that follows.
        parts: in order; a :class:`tokred.ChunkStore`'s chunks, and between them token ids ``[1, n]`` or ``[n]`` of
            which nothing is stored, such as separators. These are always computed.
        recompute: share of the stored tokens that is computed again, 0 to 1; or one for each check layer, none larger
            than the one before.
        check_layers: layers in which rows are compared, ascending, from 1 on.
        measure: what is compared: ``"key"``, ``"value"`` or ``"both"``; or ``"foreseen"``: nothing is, and before the
            first layer those tokens are chosen that depended on the text before when their chunk was stored, see
            ``against`` of :class:`tokred.ChunkStore`.
        fresh_at_check: chosen tokens attend, in a check layer, to fresh rows of all tokens instead of those that stay.

    Returns:
        A :class:`~tokred.adapters.kv.reuse.blend.Blended`: ``cache``, ``ids`` of all tokens, ``rows`` and ``share``.

    Raises:
        TypeError, ValueError: a part is neither a chunk nor token ids, or of another model; an option is wrong; the
            policy counts what earlier tokens attended to.
        UnsupportedModelError: the model's caches cannot be joined; the message says why.

    Source: Yao et al., CacheBlend, EuroSys 2025 (arXiv 2405.16444).

    Example:
        >>> made = tokred.blend(model, [store.add(a), store.add(b)])
        >>> model.generate(torch.cat([made.ids, question], 1), **tokred.cache_kwargs(made.cache))
    """
    from tokred.adapters.kv.reuse.blend import join
    from tokred.kv.blend import Blend

    how = Blend(recompute, check_layers, measure, fresh_at_check)
    part, between = part_at(model, "cache"), part_at(model, "layer")
    if between is not None:
        name = between.method.name
        raise ValueError(f"{name!r} removes tokens between layers, where chunks have all of them: remove it first")
    if part is not None:
        _check_blends(part.method)
    return join(model, parts, how, None if part is None else part.state)


def _check_blends(policy: Any) -> None:
    """Refuse a policy to which the forwards that were saved would have told something.

    Raises:
        ValueError: naming what it would have to see.
    """
    parts = policy.parts
    if parts.budget.full and not parts.store.reads & {"q"}:
        return
    why = ""
    if parts.score.numbers or parts.store.reads & {"q"}:
        why = "counts what every token of the prompt attended to"
    elif parts.score.repeats is not None:
        why = "reads the prompt again"
    elif parts.when.chunk:
        why = "reads the prompt in chunks, under a limit"
    elif "stream" in parts.budget.reads or parts.score.needs & {"hidden", "again"}:
        why = "reads what goes through the layers"
    if why:
        raise ValueError(
            f"{policy.name or 'the policy'} {why}, and most tokens of a blend are not computed: take one that scores "
            "rows by keys, values or the newest queries, such as 'snapkv'"
        )


def share_prefix(model: nn.Module, prefix: Any) -> Any:
    """A cache for a batch of prompts that begin alike: what they have in common is held once, and attended to once.

    The prefix is computed as a single sample. Later tokens attend to it with the queries of the whole batch as one, and
    to their own sample's tokens; both are joined by their log-sum-exp (RelayAttention), which is the attention over all
    of them. What the model's policy did to the prefix, all samples share; behind it every token is kept.

    Args:
        model: patched with a policy that is done when the prompt is (one that keeps all does it:
            ``tokred.apply(model, "snapkv", budget=1.0)``).
        prefix: token ids ``[1, P]`` or ``[P]``, or a cache of one sample, which can be shared again and again.

    Returns:
        A cache. Give ``generate`` whole prompts ``[B, P + n]``, padded between the prefix and their own tokens.

    Raises:
        NothingRecordedError: the model has no policy.
        TypeError, ValueError: the prefix is of several samples or another policy's, or the policy goes on evicting,
            merges rows, or keeps to a limit.
        UnsupportedModelError: some layers keep other things than rows.

    Source: Zhu et al., RelayAttention, ACL 2024 (arXiv 2402.14808).

    Example:
        >>> cache = tokred.share_prefix(model, system)
        >>> model.generate(prompts, **tokred.cache_kwargs(cache))
    """
    from tokred.adapters.kv.cache import TokCache
    from tokred.adapters.kv.reuse.chunks import tokens
    from tokred.adapters.kv.reuse.shared import shared

    place = _Place(model)
    _check_done(place.acting("its attention is its own").method, "a prefix is shared as it is")
    cache = prefix
    if isinstance(prefix, Tensor):
        from tokred.adapters.contract import cache_kwargs

        cache = place.state.cache()
        ids = tokens(prefix, "prefix").to(place.devices[0])
        with torch.no_grad():
            place.host.decoder(ids, use_cache=True, **cache_kwargs(cache))
    else:
        place.check(cache)
    assert isinstance(cache, TokCache)  # made here, or checked
    return shared(cache, place.state.cache())


def draft(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    budget: int = 4096,
    start: int = 16,
    gamma: int = 4,
) -> Any:
    """Greedy text, drafted by the model itself over few rows of its cache, and verified over all of them.

    ``gamma`` tokens are drafted over ``budget`` rows of each head: the first, those that the last query asked for most
    when they were chosen, and the newest. One forward over all rows then says how many of them are right. What comes
    out is the text that greedy generation gives, whatever the budget.

    Args:
        model: patched with a policy that is done when the prompt is (one that keeps all does it:
            ``tokred.apply(model, "snapkv", budget=1.0)``).
        input_ids: ``[1, N]`` or ``[N]``, one prompt.
        max_new_tokens: at most so many, and none behind one that ends a text.
        budget: rows of a head that drafts are made over, no more than the policy leaves of the prompt.
        start: first rows, always among them.
        gamma: tokens of a draft.

    Returns:
        A :class:`~tokred.adapters.kv.reuse.drafts.Drafted`: ``sequences``, and how much was drafted and accepted.

    Raises:
        NothingRecordedError: the model has no policy.
        TypeError, ValueError: a number is out of range, or the policy goes on evicting, merges rows, keeps to a limit
            or holds them in another form.
        UnsupportedModelError: layers keep other things than rows of tokens, or share them.

    Source: the draft cache of Wu et al., TokenSwift, ICML 2025 (arXiv 2502.18890). Its heads that draft without the
    model, its n-grams and its penalty are no part of this.

    Example:
        >>> tokred.draft(model, ids, max_new_tokens=256, budget=1024).sequences
    """
    from tokred.adapters.contract import words
    from tokred.adapters.kv.reuse.chunks import tokens
    from tokred.adapters.kv.reuse.drafts import Drafter
    from tokred.errors import UnsupportedModelError
    from tokred.kv.drafting import DraftRows
    from tokred.kv.stores import Flat, Rectangle

    for name, value in (("max_new_tokens", max_new_tokens), ("gamma", gamma)):
        check_count(value, name, 1)
    rule = DraftRows(budget, start)
    if rule.room <= gamma:
        raise ValueError(f"budget must be more than start={start} and gamma={gamma} together, got {budget}")
    place = _Place(model)
    policy: Any = place.acting("a draft has no rows to choose from").method
    _check_done(policy, "a draft chooses among rows that stay")
    store = policy.parts.store
    if not isinstance(store, Flat | Rectangle):
        raise ValueError(f"drafts choose rows as they came, and the store {store.name!r} holds them in another form")
    if place.host.readers or place.host.latents:
        what = "latents" if place.host.latents else "rows that other layers attend to"
        raise UnsupportedModelError(f"this {type(model).__name__} keeps {what}, of which a draft cannot choose")
    ids = tokens(input_ids, "input_ids").to(place.devices[0])
    if budget > ids.shape[1]:
        raise ValueError(
            f"budget is {budget}, but the prompt has {ids.shape[1]} tokens: choose fewer, or just generate"
        )
    found = words.ENDS.part(words.SETTINGS.part(model))
    ends = [found] if isinstance(found, int) else found or []
    with torch.no_grad():
        return Drafter(model, place.state, rule, gamma).run(ids, max_new_tokens, ends)


def _check_done(policy: Any, wanted: str) -> None:
    """Refuse a policy that is not done with the prompt, where ``wanted`` says what that is needed for.

    Raises:
        ValueError: naming what it would do.
    """
    parts = policy.parts
    why = ""
    if parts.when.chunk:
        why = "keeps to a limit, for which rows may go at any time"
    elif not parts.budget.full and (parts.when.every or parts.when.turns):
        why = "goes on evicting when the prompt is over"
    elif parts.store.searches and "module" in parts.store.reads:
        why = "searches rows that its network has read, which are those of one cache alone"
    elif parts.store.searches:
        # Rows are read as a rectangle, past the store that would have chosen among them.
        why = "chooses rows anew for every token"
    if why:
        raise ValueError(f"{policy.name or 'the policy'} {why}, and {wanted}: take one that is done with the prompt")


class _Place:
    """A model as far as its caches go: the decoder, and the policy that acts on it."""

    def __init__(self, model: nn.Module) -> None:
        from tokred.adapters.kv.host import match

        self.part = part_at(model, "cache")
        self.host: Any = match(model if self.part is None else self.part.module, bounded=self.part is None)
        if self.host is None:
            raise TypeError(f"model must be a language model of transformers, got a {type(model).__name__}")

    def acting(self, lack: str) -> Any:
        """The patch's part that is the policy.

        Args:
            lack: of a model without one, for the message.

        Raises:
            NothingRecordedError: there is none.
        """
        if self.part is None:
            raise NothingRecordedError(
                f"the model is not patched with a policy for its cache, and without one {lack}: call "
                "tokred.apply(model, ...) first; tokred.apply(model, 'snapkv', budget=1.0) keeps everything"
            )
        return self.part

    @property
    def state(self) -> Any:
        return None if self.part is None else self.part.state

    @property
    def policy(self) -> dict[str, Any] | None:
        """The policy as plain values, as a file holds them."""
        return None if self.part is None else json.loads(json.dumps(self.part.method.to_dict()))

    @property
    def learned(self) -> str:
        """A digest of the policy's weights; empty where it has none."""
        from tokred.adapters.kv.reuse.fingerprint import numbers

        module = None if self.state is None else self.state.module
        return "" if module is None else numbers(module.state_dict().values())

    @property
    def compressed(self) -> list[int]:
        return [] if self.state is None else list(self.state.compressed)

    @property
    def fingerprint(self) -> dict[str, str]:
        from tokred.adapters.kv.reuse.fingerprint import fingerprint

        return fingerprint(self.host.decoder, self.host.config)

    @property
    def devices(self) -> list[torch.device]:
        """Of the layers of a cache."""
        from tokred.adapters.kv.reuse.layers import devices

        return devices(self.host)

    def check(self, cache: Any) -> None:
        from tokred.adapters.kv.cache import TokCache
        from tokred.adapters.kv.reuse.shared import holds_prefix

        engine = cache.engine if isinstance(cache, TokCache) else None
        if engine is not None and holds_prefix(cache):
            raise ValueError("the cache shares a prefix with others: save or share the prefix's own cache")
        if self.part is None:
            if engine is not None:
                raise ValueError(f"the cache belongs to {engine.policy!r}, and the model has no policy: apply it first")
            from tokred.adapters.kv.reuse.layers import check_plain

            check_plain(cache)
        elif engine is None:
            raise TypeError(
                f"the model has the policy {self.part.method!r}, and this {type(cache).__name__} belongs to none: give "
                "a cache of tokred.kv_cache(model) or of generate"
            )
        elif engine.policy != self.part.method:
            raise ValueError(f"the cache belongs to {engine.policy!r}, the model is patched with {self.part.method!r}")

    def about(self, cache: Any) -> dict[str, Any]:
        from tokred.adapters.kv.cache import layout_of

        return {
            "model": self.fingerprint,
            "policy": self.policy,
            "learned": self.learned,
            "compressed": self.compressed,
            "layout": "auto" if self.part is None else layout_of(cache),
        }

    def empty(self, layout: str) -> Any:
        from tokred.adapters.kv.reuse.layers import plain_cache

        return plain_cache(self.host.config) if self.state is None else self.state.cache(layout)


def _said(policy: dict[str, Any] | None) -> str:
    """A policy in a message."""
    if policy is None:
        return "a model without a policy"
    try:
        return f"the policy {from_dict(policy)!r}"
    except (TypeError, ValueError, LookupError, TokredError):
        return f"the policy {policy}"
