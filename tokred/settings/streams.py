"""``tokred.stream``: a model with vision in front of a running video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_number
from tokred.core.method import Method
from tokred.errors import UnsupportedModelError
from tokred.kv.policy import CachePolicy
from tokred.patch import parts_of
from tokred.settings.given import MethodLike, several
from tokred.vlm.before_llm import ProjectorMethod
from tokred.vlm.tools.reuse import Reuse

if TYPE_CHECKING:
    from tokred.adapters.vlm.streams.stream import Stream

# What a method takes of the tower's attention, which is not whole where features are used again.
_OF_TOWER = frozenset({"q", "k", "class_attention", "attention", "tower_layers"})


def stream(
    model: nn.Module,
    method: MethodLike | None = None,
    *,
    prompt: str | Tensor | Sequence[int] = (),
    reuse: Reuse | float | None = None,
    tokenizer: Any = None,
    seconds: float = 1.0,
    positions: str | None = None,
    **parameters: Any,
) -> Stream:
    """A stream: frames of a running video go in one by one, and it answers questions at any time.

    What is held is bounded by the methods: one of the stage ``projector`` leaves some tokens of each frame, and must be
    causal (``"streamingtom"``, ``"stc"``) or one for single images (``"divprune"``); a policy of the stage ``cache``
    says what becomes of old frames, and must go on while frames come (``every=1``, ``turns=True``) or evict nothing.
    Where it has ``sinks``, the prompt is among them.

    The model is touched only while it looks or answers, so that several streams, with other settings, can share it.

    Args:
        model: with vision, of transformers: LLaVA-OneVision, LLaVA-NeXT-Video, LLaVA, InternVL, Qwen2-VL, Qwen2.5-VL.
        method: as :func:`tokred.apply` takes it, such as ``"streamingtom budget=50 + streamingtom_cache"``; None:
            every token stays, and memory grows.
        prompt: the text before the first frame, with all that the chat's form wants there: ids, or text with a
            tokenizer.
        reuse: features of the tower that are used again between reference frames: a share, or
            :class:`tokred.vlm.Reuse`; None: every frame goes through the whole tower.
        tokenizer: of transformers, for prompts and questions as text; None: they come as ids.
        seconds: between two frames, for models whose positions are times (Qwen2.5-VL).
        positions: ``"contiguous"``: the prompt (and other first rows that a policy keeps) moves up behind frames that
            have left, as if the video had begun with the oldest that is remembered; ``"video"``: it stays, and its
            distance grows; None: the former where it can be.
        parameters: of the method, where it is given by name.

    Returns:
        A :class:`~tokred.adapters.vlm.streams.stream.Stream` with ``frame(pixels)``, ``ask(question)``, ``report()``,
        ``nbytes`` and ``len``.

    Raises:
        UnsupportedModelError: the model takes no frames one by one; the message says why.
        MissingInputError: the method reads what this model does not supply.
        TypeError, ValueError, UnknownMethodError: a method or an option is wrong.

    Example:
        >>> stream = tokred.stream(model, "stc budget=60 + streaming_llm budget=4096", prompt=before, tokenizer=tok)
        >>> for pixels in camera:
        ...     stream.frame(pixels)
        >>> stream.ask("What has just happened?").text
    """
    from tokred.adapters.vlm.memory.host import match_projector
    from tokred.adapters.vlm.streams.families import looks_of
    from tokred.adapters.vlm.streams.given import as_ids, module_of
    from tokred.adapters.vlm.streams.parts import Parts
    from tokred.adapters.vlm.streams.stream import Stream
    from tokred.adapters.vlm.streams.tower import TowerReuse

    host = match_projector(module_of(model))
    if host is None or host.core is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model with vision of transformers, so that it cannot watch a stream"
        )
    looks = looks_of(host.core)
    if not check_number(seconds, "seconds") > 0:
        raise ValueError(f"seconds must be above 0, got {seconds!r}")
    how = Reuse(reuse) if isinstance(reuse, int | float) and not isinstance(reuse, bool) else reuse
    if how is not None and not isinstance(how, Reuse):
        raise TypeError(f"reuse must be a share in [0, 1), tokred.vlm.Reuse(...) or None, got {reuse!r}")
    _check_free(model, how is not None)
    ids = as_ids(prompt, "prompt", tokenizer) if not isinstance(prompt, tuple) or prompt else torch.empty(0).long()
    first, policy = None, None
    for one in [] if method is None else several(method, parameters):
        if isinstance(one, CachePolicy):
            policy = _with_prompt(one, len(ids))
        else:
            first = _causal(one, how)
            host.check(one)
    if method is None and parameters:
        raise TypeError(f"{', '.join(parameters)}: parameters go with a method's name")
    cache_host = _cache_host(model, policy)
    tower = None if how is None else TowerReuse.of(how, host.core, host.facts)
    front = _front(cache_host, policy, positions, looks.axes)
    free = partial(_check_free, model, how is not None)  # once more at every frame: the model is anybody's in between
    return Stream(Parts(host, cache_host, looks, first, policy, tower, tokenizer, float(seconds), free, front), ids)


def _front(cache_host: Any, policy: CachePolicy | None, positions: str | None, axes: bool) -> Any:
    """The :class:`~tokred.adapters.kv.front.Front` that moves the prompt up; None: it stays.

    Raises:
        ValueError: it is to be moved, and cannot, or ``positions`` is something else.
    """
    from tokred.adapters.kv.front import Front, why_no_front

    if positions is not None:
        check_choice(positions, "positions", ("contiguous", "video"))
    if positions == "video":
        return None
    if policy is None:
        why = "no policy of the cache lets frames leave"
    elif axes:
        why = "tokens stand in several axes, of which time alone grows, by one or a few a frame"
    else:
        why = why_no_front(cache_host, policy)
    if why and positions == "contiguous":
        raise ValueError(f"positions='contiguous' moves the prompt behind frames that have left: {why}")
    return None if why else Front(cache_host, policy)  # type: ignore[arg-type]


def _cache_host(model: nn.Module, policy: CachePolicy | None) -> Any:
    """The host record of the language model inside, which has checked the policy."""
    from tokred.adapters.kv.host import match

    found = match(model, decodes=True, bounded=policy is None)
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no cache that a stream could go on from")
    if policy is not None:
        found.check(policy)
    return found


def _check_free(model: nn.Module, tower: bool) -> None:
    """Refuse a model on which something acts that a stream would pass by.

    Raises:
        ValueError: naming it.
    """
    stages = {"projector", "layer", "cache"} | ({"block"} if tower else set())
    taken = [part.method.name for part in parts_of(model) if part.method.stage in stages]
    if taken:
        raise ValueError(
            f"the model is patched with {', '.join(taken)}, and a stream has its own methods: call "
            "tokred.remove(model), and give them to tokred.stream"
        )
    # Inside a model the tower's tokens are there again behind it; of a tower that was patched alone they are not.
    short = [part.method.name for part in parts_of(model) if getattr(part.state, "restore", "") == "none"]
    if short:
        raise ValueError(
            f"{', '.join(short)} acts on the vision tower alone, which then puts out fewer tokens than the model "
            "around it takes: call tokred.remove on the tower, and tokred.apply on the whole model"
        )


def _causal(method: Method, reuse: Reuse | None) -> ProjectorMethod:
    """The method, for frames as they come.

    Raises:
        ValueError: it cannot act on them.
    """
    from tokred.adapters.vlm.streams.looked import objection

    why = objection(method)
    if why:
        raise ValueError(f"{method.name!r} cannot act on a stream: it {why}")
    reads = sorted(method.reads & _OF_TOWER)
    if reuse is not None and reuse.share > 0 and reads:
        raise ValueError(
            f"{method.name!r} reads {', '.join(reads)} of the tower, whose queries are not all there where features "
            "are used again: take a method that reads features alone, such as 'stc', or leave reuse out"
        )
    assert isinstance(method, ProjectorMethod)  # of its stage
    return method


def _with_prompt(policy: CachePolicy, length: int) -> CachePolicy:
    """The policy, for frames as they come, with the prompt among the first rows that never leave.

    Raises:
        ValueError: it acts once, at the end of a prompt that a stream never comes to, or on a share of it.
    """
    parts = policy.parts
    if not parts.budget.full:
        if parts.budget.shares:
            raise ValueError(
                f"{policy.name!r} keeps a share of the tokens, and a stream has no end: give budget as tokens or bytes"
            )
        if not (parts.when.every or parts.when.turns):
            raise ValueError(
                f"{policy.name!r} acts at the end of a prompt alone, which a stream never comes to: give every=1 or "
                "turns=True where it has them, or tokred.kv.When(turns=True)"
            )
        if parts.score.repeats is not None:
            raise ValueError(f"{policy.name!r} reads the prompt again, and frames are not kept")
    known = {f.name for f in dataclasses.fields(policy) if f.init}
    if "sinks" in known and policy.sinks < length:  # type: ignore[attr-defined]
        changes: dict[str, Any] = {"sinks": length}
        return dataclasses.replace(policy, **changes)
    return policy
