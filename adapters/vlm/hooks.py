"""Hooks on a model with vision, its language model and the decoder layers. All are objects, so that patched models copy
and pickle; what they note about a forward in flight is kept by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.cache.generate import prompt_length
from tokred.adapters.cache.hooks import argument_names
from tokred.adapters.swap import Hook
from tokred.adapters.vlm.facts import Facts
from tokred.adapters.vlm.features import RECORD, Part, Record, local
from tokred.adapters.vlm.forward import Call, Forward
from tokred.adapters.vlm.inner import LayerCount
from tokred.adapters.vlm.sites import Modality
from tokred.method import Method

PROMPT = "_tokred_prompt"


class VisualSettings:
    """What the hooks of one patched model share.

    Args:
        facts: of the family.
        config: of the language model.
        depth: decoder layers.
        visual: whether the model has images; a language model alone has none.

    Attributes:
        outer, inner: the methods of ``projector`` and ``layer``.
        projector, layers: the projector, and the list of decoder layers.
        chosen: decoder layers before which the method of ``layer`` may act; None: all.
        last: tokens at every layer's input in the last prefill, of a prompt of ``before``.
    """

    def __init__(self, family: str, facts: Facts, config: Any, depth: int, visual: bool) -> None:
        self.family = family
        self.facts = facts
        self.config = config
        self.depth = depth
        self.visual = visual
        self.outer: Method | None = None
        self.inner: Method | None = None
        self.chosen: frozenset[int] | None = None
        self.projector: nn.Module | None = None
        self.layers: nn.Module | None = None
        self.last: tuple[LayerCount, ...] = ()
        self.before = 0

    @property
    def methods(self) -> list[Method]:
        """Those that act here."""
        return [m for m in (self.outer, self.inner) if m is not None]

    @property
    def by_visual(self) -> bool:
        """Whether the method of ``layer`` acts on visual tokens alone."""
        return bool(getattr(self.inner, "visual", True))

    @property
    def repack(self) -> bool:
        """Whether positions are counted anew after a method of ``projector``."""
        return getattr(self.outer, "positions", "keep") == "repack"

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        """The projector, where it acts on tokens one by one."""
        return self.projector if self.facts.tokenwise else None

    def active(self, layer: int) -> bool:
        """Whether the user lets the method act before this layer."""
        return self.chosen is None or layer in self.chosen

    @staticmethod
    def offsets(part: Part, device: torch.device) -> Tensor:
        """``(N,)`` where the tokens of a part stand, counted from its first."""
        n = torch.arange(part.count, device=device)
        return n if part.skip == 0 else n + n // (part.skip - 1)


class EnterCore(Hook):
    """Before the forward of the model with vision: where visual tokens stand, and the features that go there."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call = Call(mask=_padding(given.get("attention_mask")))
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embeds is None:
            return None
        local.call = (module, call, given, getattr(local, "call", None), self.settings)
        return None


class LeaveCore(Hook):
    """After it, whatever happened."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found = getattr(local, "call", None)
        if found is not None and found[0] is module:
            local.call = found[3]


class EnterLanguage(Hook):
    """Before the language model's forward: tokens leave, with their positions and masks."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        settings = self.settings
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        found = getattr(local, "call", None)
        if found is None or found[4] is not settings:
            call = Call(mask=_padding(given.get("attention_mask")))
        else:
            call = _modalities(settings, *found[:3])
        if given.get("inputs_embeds") is None:
            if given.get("input_ids") is None:
                return None
            given["inputs_embeds"] = module.get_input_embeddings()(given.pop("input_ids"))
        given.pop("input_ids", None)
        cache = given.get("past_key_values")
        if cache is None and self._caches(module, given):
            from transformers.cache_utils import DynamicCache

            cache = given["past_key_values"] = DynamicCache(config=settings.config)
        _refuse(cache)
        if call.end is None:
            call.end = getattr(cache, PROMPT, None)
        forward = Forward(settings, call, given)
        new = forward.prepare(given)
        local.forward = (module, forward, getattr(local, "forward", None), settings.layers)
        return (), new

    def _caches(self, module: nn.Module, given: dict[str, Any]) -> bool:
        use = given.get("use_cache")
        use = getattr(self.settings.config, "use_cache", True) if use is None else use
        return bool(use) and not (module.training and getattr(module, "gradient_checkpointing", False))


class LeaveLanguage(Hook):
    """After the language model's forward: the cache is told what left."""

    def __init__(self, settings: VisualSettings) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found = getattr(local, "forward", None)
        if found is None or found[0] is not module:
            return
        _, forward, before, _ = found
        local.forward = before
        if output is None:
            return  # it broke off
        forward.finish(forward.cache)
        if getattr(local, "labels", None) is not None:
            local.done = forward
        if forward.length > 1 and not torch.compiler.is_compiling():
            self.settings.last = forward.tokens()
            self.settings.before = forward.length


def _modalities(settings: VisualSettings, core: Any, call: Call, given: dict[str, Any]) -> Call:
    """Placeholders of the prompt and the features that fill them."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    outputs = given.get("mm_encoder_outputs") or {}
    for _, name in settings.facts.getters:
        output = outputs.get(name)
        if output is None:
            output = call.outputs.get(name)
        token = getattr(core.config, f"{name}_token_id", None)
        if output is None or token is None:
            continue
        if ids is None:
            assert embeds is not None  # EnterCore has seen to it
            mark = core.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
            visual = (embeds == mark).all(-1)
        else:
            visual = ids == token
        record: Record | None = getattr(output, RECORD, None)
        call.modalities.append(Modality(visual, tuple(visual.sum(1).tolist()), record))
    return call


def _padding(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _refuse(cache: Any) -> None:
    """Refuse caches that cannot hold fewer rows.

    Raises:
        ValueError: with what would work.
    """
    if cache is None:
        return
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    static = sorted(k for k in kinds if k.startswith("Static"))
    if static or not hasattr(cache, "layers"):
        raise ValueError(
            f"a {type(cache).__name__} has rows for every token of the prompt, and pruned prompts have fewer: leave "
            "cache_implementation out (a DynamicCache), or call tokred.remove(model) first"
        )


class EnterLoss(Hook):
    """Before the forward of the model with a head: labels wait until it is known which tokens are left."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        local.done, local.labels = None, None
        if labels is None:
            return None
        if not self.settings.by_visual:
            name = self.settings.methods[-1].name
            raise ValueError(
                f"labels need the last layer's states of all tokens, and {name} leaves some of the prompt's out: call "
                "tokred.remove(model) first"
            )
        if not (isinstance(given.get("logits_to_keep", 0), int) and given.get("logits_to_keep", 0) == 0):
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep out")
        local.labels = labels
        return (), {**given, "labels": None}


class LeaveLoss(Hook):
    """After it: the loss of the tokens that are left, with their labels."""

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        labels, forward = getattr(local, "labels", None), getattr(local, "done", None)
        local.labels = local.done = None
        if labels is None or output is None:
            return None
        columns = None if forward is None else forward.loss_columns()
        if forward is not None and columns is not None:
            labels = labels.gather(1, columns).masked_fill(~forward.loss_valid(), -100)
        logits = output["logits"] if isinstance(output, dict) else output[0]
        size = module.config.get_text_config().vocab_size
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=size)
        if not isinstance(output, dict):
            return (loss, *output)
        output["loss"] = loss
        return output


class CachePreparer:
    """Stands in for a generating model's ``_prepare_cache_for_generation``: bad calls are refused before anything runs,
    and the cache learns how long the prompt is, so that drafts are told apart from it."""

    def __init__(self, model: nn.Module, settings: VisualSettings) -> None:
        self.model = model
        self.settings = settings

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        name = self.settings.methods[0].name
        chunk = getattr(generation_config, "prefill_chunk_size", None)
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} hands over the prompt in pieces, of which {name} would see one at a "
                "time: leave it out, or call tokred.remove(model) first"
            )
        kind = getattr(generation_config, "cache_implementation", None)
        if kind not in (None, "dynamic", "dynamic_full", "offloaded"):
            raise ValueError(
                f"cache_implementation={kind!r} has rows for every token of the prompt, and {name} leaves fewer: leave "
                "it out"
            )
        _refuse(model_kwargs.get("past_key_values"))
        host = type(self.model)
        out = host._prepare_cache_for_generation(self.model, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[attr-defined]
        cache, length = model_kwargs.get("past_key_values"), prompt_length(generation_config, model_kwargs)
        if cache is not None and length is not None:
            cache.__dict__[PROMPT] = length
        return out


__all__ = [
    "CachePreparer",
    "EnterCore",
    "EnterLanguage",
    "EnterLoss",
    "LeaveCore",
    "LeaveLanguage",
    "LeaveLoss",
    "VisualSettings",
    "argument_names",
]
