"""transformers: language models of every kind whose caches may lose rows, encoder-decoders among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import members, terms, words
from tokred.adapters.kv import host
from tokred.adapters.kv.rehearsal import Rehearsal
from tokred.adapters.kv.supplies import projection
from tokred.adapters.swap import host_class
from tokred.core.method import Method

if TYPE_CHECKING:
    from tokred.adapters.kv.hooks import CacheSettings
    from tokred.kv.policy import CachePolicy

# What the rows of an encoder cannot give, and what is said of it.
_AGAIN = "a context that can be read again"
_GROWTH = "rows that come one by one"
_DIRECT = "rows that queries came with"
_BYTES = "the bytes of all layers"
_MOVED = "first rows that move up"
_WHY = {
    _AGAIN: "the encoder's tokens are not among those that the decoder reads",
    _GROWTH: "the encoder's rows all come at once",
    _DIRECT: "queries of another sequence meet them, over several forwards",
    _BYTES: "the decoder's own cache is not counted",
    _MOVED: "how far the encoder's rows are from a query is not told by where either stands",
}


class CrossHost(host.CacheHost):
    """An encoder-decoder, of whose cross-attention caches rows may leave."""

    @property
    def how(self) -> str:
        """How methods run here, for the table of support."""
        return f"{self.family}, cross-attention cache of {self.depth} layers (the decoder's own stays as it is)"

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """Inputs that the method reads and the rows of an encoder cannot give."""
        from tokred.kv.policy import CachePolicy

        one: Method = method if isinstance(method, Method) else method()
        found = super().missing(one)
        if not isinstance(one, CachePolicy):
            return found
        parts = one.parts
        wants = {
            _AGAIN: parts.score.repeats is not None, _GROWTH: not parts.when.prefill, _BYTES: bool(parts.when.chunk),
            _MOVED: one.closes, _DIRECT: parts.fate.rewrites or "q" in parts.store.reads,
        }  # fmt: skip
        return found | frozenset(name for name, wanted in wants.items() if wanted)

    def hint(self, method: Method) -> str:
        """The end of a refusal: why it cannot be here."""
        why = [text for name, text in _WHY.items() if name in self.missing(method)]
        return f": {', and '.join(why)}" if why else ""

    def _hang(
        self, policy: CachePolicy, chosen: tuple[int, ...], implementation: str, changes: Changes
    ) -> CacheSettings:
        from tokred.adapters.kv import crossing, hooks

        settings = crossing.CrossSettings(policy, self.config, chosen, implementation, self.depth)
        enter = crossing.EnterDecoder(settings, hooks.argument_names(self.decoder))
        changes.before(self.decoder, enter, with_kwargs=True)
        for i, (_, attention) in self.attentions.items():
            changes.before(attention, crossing.EnterCross(settings, i, projection(attention)), with_kwargs=True)
        return settings


def match(model: nn.Module) -> host.CacheHost | None:
    """The host record of a language model of transformers; None when ``model`` is none.

    Raises:
        UnsupportedModelError: it is one, but its cache cannot lose rows rightly; the message says why.
    """
    cls: Any = host_class(model)
    names = [c.__name__ for c in cls.__mro__] if cls.__module__.startswith("transformers.") else []
    config: Any = words.CONFIG.part(model)
    both = terms.PRETRAINED.among(names) and config is not None and words.BOTH.part(config, False)
    crosses = _crosses(model) if both and members.CAN_GENERATE.need(model)() else {}
    return _of(model, crosses) if crosses else host.match(model)


def _crosses(model: Any) -> dict[int, tuple[str, nn.Module]]:
    """Cross-attentions of the decoder, by layer."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = words.LAYER_INDEX.part(module)
        if name.rpartition(".")[2] in members.CROSS_ATTENTION.names and isinstance(index, int):
            found[index] = (name, module)
    return {i: found[i] for i in sorted(found)}


def _attends(module: nn.Module) -> bool:
    """True for an attention itself, and not for what is around one."""
    inside = (m for m in module.modules() if m is not module)
    return _named(module) and not any(map(_named, inside))


def _named(module: nn.Module) -> bool:
    return terms.ATTENTION.name in host_class(module).__name__


def _of(model: Any, crosses: dict[int, tuple[str, nn.Module]]) -> CrossHost:
    """The record of an encoder-decoder.

    Raises:
        UnsupportedModelError: its cross-attention would not be heard, or adds a bias that rows without gaps fit alone.
    """
    name = host_class(model).__name__
    config = words.CONFIG.part(next(iter(crosses.values()))[1])
    if config is None:
        raise host.refusal(name, "its cross-attention has no configuration that says how it attends")
    rehearsal = Rehearsal(config, None, crosses=True)
    # The encoder shares the configuration, and so is given masks of ours too.
    for where, attention in ((n, m) for n, m in model.named_modules() if _attends(m)):
        why = rehearsal.objection(attention)
        if words.CONFIG.part(attention) is None:
            why = "does not call the attention function, and would look into a mask that stands for one of evicted rows"
        if why:
            raise host.refusal(name, f"{where} {why}")
    for where, attention in crosses.values():
        why = rehearsal.objection(attention)
        if not why and not rehearsal.heard(attention):
            why = "cannot be exchanged (it does not call the attention function), so a policy would never be asked"
        if why:
            raise host.refusal(name, f"{where} {why}")
    supplies = {"q", "k", "v"}
    if all(projection(m) is not None for _, m in crosses.values()):
        supplies.add("projection")
    return CrossHost(
        family=f"transformers {name}",
        model=model,
        decoder=host.decoder_of(model, crosses),
        config=config,
        attentions=crosses,
        compressed=tuple(crosses),
        supplies=frozenset(supplies),
        norms=dict.fromkeys(crosses),
        rows=rehearsal.rows(m for _, m in crosses.values()),
    )
