"""transformers: decoder-only language models, alone or inside a model with vision, whose caches may lose rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import (
    attention_of,
    cache_argument,
    exchanges_attention,
    members,
    set_attention,
    terms,
    words,
)
from tokred.adapters.host import Host, State
from tokred.adapters.kv.latents import makes_latents
from tokred.adapters.kv.reasons import LOSES, ROWS, SHARED, layer_kinds, odd_layers, own_cache, without_cache
from tokred.adapters.kv.sharing import owners
from tokred.adapters.kv.supplies import norms, projection, supplies
from tokred.adapters.swap import host_class
from tokred.core.learned import Facts
from tokred.core.method import Method
from tokred.errors import NothingRecordedError, UnsupportedModelError
from tokred.kv.report import CacheReport

if TYPE_CHECKING:
    from tokred.adapters.kv.hooks import CacheSettings
    from tokred.adapters.kv.rehearsal import Rehearsal
    from tokred.kv.policy import CachePolicy

# Attentions that repeat heads in an order of their own, behind their cache, and cannot be tried beforehand.
_OTHER_HEADS = ("JetMoeAttention",)
Refuse = Callable[[str], UnsupportedModelError]  # of a model, for a reason
# What a hard limit reads.
_BYTES = "the bytes of all layers"
# What rows of latents have none of, because each head has its own.
_OF_HEADS = frozenset({"v", "projection", "rope", "rotation", "again"})
_ROWS = "rows that are keys and values themselves"


@dataclass
class CacheHost(Host):
    """A language model whose cache a policy can act on.

    Attributes:
        family: for messages, such as ``"transformers LlamaForCausalLM"``.
        model: the module that the user gave, or a part of it; generates, where it can.
        decoder: the module whose forward takes the cache.
        config: of the decoder.
        attentions: name and attention module of each layer that keeps rows, by layer, in order.
        compressed: layers that attend to everything; the others have a sliding window, and bounded caches already.
        supplies: what sites hand over.
        norms: by layer, the decoder layer and the module that reads the stream after its attention, or None.
        readers: layers without rows of their own, by layer: name, attention module, and the compressed layer whose rows
            they attend to.
        latents: whether rows are latents, of which the keys and values of all heads are made.
        states: layers without rows: they keep a state of one size, or nothing.
        rows: keys and values of each kind of compressed layers, without numbers, where a rehearsal showed them.
        note: what a user should know.
    """

    family: str
    model: nn.Module
    decoder: nn.Module
    config: Any
    attentions: dict[int, tuple[str, nn.Module]]
    compressed: tuple[int, ...]
    supplies: frozenset[str]
    norms: dict[int, tuple[nn.Module, nn.Module] | None] = field(default_factory=dict)
    readers: dict[int, tuple[str, nn.Module, int]] = field(default_factory=dict)
    latents: bool = False
    states: int = 0
    rows: tuple[tuple[Tensor, Tensor], ...] = ()
    note: str = ""
    stage: str = "cache"

    windowless: ClassVar[str] = "{family} has no windows to choose from"

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and attention module of each compressed layer."""
        return [self.attentions[i] for i in self.compressed]

    @property
    def depth(self) -> int:
        """Number of compressed layers."""
        return len(self.compressed)

    @property
    def how(self) -> str:
        """How methods run here, for the table of support."""
        sliding = len(self.attentions) - self.depth
        kinds = (
            (sliding, "sliding-window layers"), (self.states, "without rows"),
            (len(self.readers), "that read another's rows"),
        )  # fmt: skip
        others = [f"{n} {what}" for n, what in kinds if n]
        more = f" ({', '.join(others)} stay as they are)" if others else ""
        return f"{self.family}, cache of {self.depth} layers{more}"

    def model_facts(self) -> Facts:
        """Facts of the decoder, from which a policy builds its module."""
        cls = host_class(self.decoder)
        heads = int(words.HEADS.need(self.config))
        widths = {int(words.HEAD_WIDTH.part(attention) or 0) for _, attention in self.blocks}
        return Facts(
            model=f"{cls.__module__}.{cls.__qualname__}",
            depth=self.depth,
            width=int(words.WIDTH.need(self.config)),
            heads=heads,
            key_heads=self.rows[0][0].shape[1] if self.rows else int(words.KEY_HEADS.part(self.config) or heads),
            head_width=widths.pop() if len(widths) == 1 else 0,
        )

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            ValueError: its parameters do not fit the model, or ``expose`` is given.
        """
        self.check_stage(method)
        if expose not in ("auto", "none"):
            raise ValueError(f"expose is for methods of blocks; a cache policy takes 'auto' alone, got {expose!r}")
        from tokred.adapters.kv import front
        from tokred.kv.policy import CachePolicy

        self.check_reads(method)
        method.check(self.depth)
        if isinstance(method, CachePolicy):
            method.fits(self.model_facts)
            front.check_front(self, method)
            for keys, values in self.rows:
                method.parts.store.check(keys, values)

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """Inputs that the method reads and this host cannot supply; a limit of bytes wants to count all layers."""
        from tokred.kv.policy import CachePolicy

        one: Method = method if isinstance(method, Method) else method()
        counts = (self.states or self.readers) and isinstance(one, CachePolicy) and one.parts.when.chunk
        # A store that looks at queries divides their channels by those of the keys that it holds.
        direct = isinstance(one, CachePolicy) and ("q" in one.parts.store.reads or one.parts.fate.rewrites)
        more = {_BYTES: counts, _ROWS: self.latents and direct}
        return super().missing(one) | frozenset(name for name, wanted in more.items() if wanted)

    def hint(self, method: Method) -> str:
        """The end of a refusal: what a limit does not know of, or what the store can do without."""
        from tokred.kv.policy import CachePolicy

        missing = self.missing(method)
        if self.latents and missing & (_OF_HEADS | {_ROWS}):
            return ": its cache holds latents, of which each head makes keys and values of its own"
        if _BYTES not in missing:
            return method.hint(missing) if isinstance(method, CachePolicy) else ""
        if self.readers:
            return ": layers that read another's rows keep them until the forward ends, whatever has been evicted"
        return f": {self.states} of its layers keep states, whose size is not known before the first forward"

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> State:
        """Register the attention function, and hang the hooks on the decoder. :meth:`check` has passed."""
        from tokred.adapters.kv import generate, hooks
        from tokred.adapters.kv.attention import PREFIX, register
        from tokred.kv.policy import CachePolicy

        assert isinstance(method, CachePolicy)  # the stage's only kind of method
        implementation = attention_of(self.config).removeprefix(PREFIX)
        chosen = tuple(i for i in self.compressed if where is None or where(*self.attentions[i]))
        method.check_places(len(chosen), self.depth)
        settings = self._hang(method, chosen, implementation, changes)
        changes.after(self.decoder, hooks.LeaveDecoder(settings), with_kwargs=True)
        # Its undo gives the model its own attention back, also where the model is freed without its patch.
        changes.swap(self.model, generate.body, settings)
        set_attention(self.config, register(implementation))
        return settings

    def _hang(
        self, policy: CachePolicy, chosen: tuple[int, ...], implementation: str, changes: Changes
    ) -> CacheSettings:
        """Hang hooks in front of the decoder and of its attention modules, which share the settings that are returned.

        Args:
            policy: to act.
            chosen: layers that it acts on.
            implementation: the attention that the model has.
            changes: take the hooks.
        """
        from tokred.adapters.kv import hooks
        from tokred.adapters.kv.front import Front
        from tokred.adapters.kv.rope import layer_type_of

        settings = hooks.CacheSettings(policy, self.config, chosen, implementation)
        front = Front(self, policy) if policy.closes else None
        enter = hooks.EnterDecoder(settings, hooks.argument_names(self.decoder), front)
        changes.before(self.decoder, enter, with_kwargs=True)
        embedding = words.ROTARY.part(self.decoder) if "rotation" in self.supplies else None
        lenders = {owner for _, _, owner in self.readers.values()}
        for _, attention, owner in self.readers.values():
            changes.before(attention, hooks.EnterReader(settings, owner), with_kwargs=True)
        for i, (_, attention) in self.attentions.items():
            layer_type = None if embedding is None else layer_type_of(embedding, attention)
            hook = hooks.EnterAttention(
                settings, i, projection(attention), embedding, layer_type, i in lenders, self.latents
            )
            changes.before(attention, hook, with_kwargs=True)
        if "stream" in policy.reads:
            for i in chosen:
                both = self.norms[i]
                assert both is not None  # supplied for all or for none
                changes.before(both[0], hooks.EnterLayer(i), with_kwargs=True)
                changes.before(both[1], hooks.EnterNorm())
        return settings

    def report(self, state: CacheSettings, methods: Sequence[Method]) -> CacheReport:
        """Slots, rows and bytes of every layer of the cache that ran last, as it is or was when it was freed."""
        if not state.last:
            raise NothingRecordedError("nothing is recorded: run one forward of the patched model with a cache first")
        return CacheReport(self.family, state.policy, state.last)


def match(
    model: nn.Module, *, decodes: bool = False, bounded: bool = False, states: bool = True, loses: str = LOSES
) -> CacheHost | None:
    """The host record of a decoder-only language model of transformers; None when ``model`` is none.

    Args:
        model: to be looked at.
        decodes: whether it is known to be one, so that its attention need not say so.
        bounded: whether one is welcome of which all layers have a sliding window, so that none loses rows to a policy.
        states: whether one is welcome of which some layers keep a state of their own instead of rows, or none at all.
        loses: what it has to run with, for the message.

    Raises:
        UnsupportedModelError: it is one, but its cache cannot lose rows rightly; the message says why.
    """
    cls: Any = host_class(model)
    names = [c.__name__ for c in cls.__mro__] if cls.__module__.startswith("transformers.") else []
    if not terms.PRETRAINED.among(names):
        return None
    config: Any = words.CONFIG.part(model)
    if config is None:
        return None
    name, refuse = cls.__name__, partial(refusal, cls.__name__, loses=loses)
    if not (decodes or _decodes(model, config)):
        if _sees_ahead(model, config):
            raise refuse(
                "the tokens of its prompt see one another in both directions, which the masks of evicted rows do not "
                "know; methods for its visual tokens run, such as 'divprune'"
            )
        why = without_cache(model)
        if why:
            raise refuse(why)
        return None
    if words.BOTH.part(config, False):
        raise refuse("it is an encoder with a decoder, and no cross-attention of a known kind")
    from tokred.adapters.kv.rehearsal import Rehearsal

    # A model with vision keeps what describes its decoder in a configuration of its own, inside.
    text = text_of(config)
    kinds = layer_kinds(text)
    odd = odd_layers(kinds, beside=states)
    if odd:
        raise refuse(odd)
    modules, sources = _attentions(model, text), owners(kinds, text)
    found = {i: one for i, one in modules.items() if i >= len(kinds) or kinds[i] in ROWS}
    decoder = decoder_of(model, found) if found else model
    rehearsal = Rehearsal(text, words.ROTARY.part(decoder))
    # Some models use the attention function and do not say so.
    if not found or not (exchanges_attention(model) or all(rehearsal.heard(m) for _, m in found.values())):
        raise refuse(
            "its attention cannot be exchanged (it has no attention back-end), so a policy would never be asked"
        )
    latents = bool(words.LATENTS.part(text))
    if latents and not all(makes_latents(m) for _, m in found.values()):
        raise refuse("its cache holds latents, and its attention does not say how keys are made of them")
    own = own_cache(model)
    if own:
        raise refuse(own)
    _check_attentions(refuse, kinds, found, rehearsal)
    compressed = _full_layers(refuse, kinds, bounded)
    unknown = [i for i, kind in enumerate(kinds) if kind == SHARED and not (i in sources and i in modules)]
    if unknown:
        raise refuse(f"layer {unknown[0]} attends to the keys and values of an earlier layer, and no telling which")
    behind = norms(decoder, found)
    supplied = supplies(decoder, found, compressed, rehearsal) - (_OF_HEADS if latents else frozenset())
    if all(pair is not None for pair in behind.values()):
        supplied.add("stream")
    readers = {i: (*modules[i], owner) for i, owner in sources.items() if owner in compressed}
    return CacheHost(
        family=f"transformers {name}",
        model=model,
        decoder=decoder,
        config=text,
        attentions=found,
        compressed=compressed,
        supplies=frozenset(supplied),
        norms=behind,
        rows=rehearsal.rows(found[i][1] for i in compressed or found),
        readers=readers,
        latents=latents,
        states=len(kinds) - len(found) - kinds.count(SHARED),
    )


def text_of(config: Any) -> Any:
    """The configuration of the decoder, in that of a model with vision or by itself."""
    return members.TEXT_OF.need(config)(**{words.OF_DECODER.name: True})


def refusal(name: str, why: str, loses: str = LOSES) -> UnsupportedModelError:
    return UnsupportedModelError(f"transformers' {name} cannot run with {loses}: {why}")


def _decodes(model: Any, config: Any) -> bool:
    """True for a decoder: its forward takes a cache, itself or in the model inside, and its attention is causal."""
    if not _takes_cache(model):
        return False
    if words.DECODER.part(config, False) or words.BOTH.part(config, False):
        return True
    kinds = [words.CAUSAL.need(m) for m in model.modules() if words.CAUSAL.on(m) and words.LAYER_INDEX.on(m)]
    # Encoders that could be made decoders take a cache too; attention that does not say which is taken for causal.
    return any(kinds) if kinds else members.GENERATE.on(model)


def _takes_cache(model: Any) -> bool:
    return cache_argument(host_class(model).forward) is not None


def _sees_ahead(model: Any, config: Any) -> bool:
    """True for a model that generates but reads its prompt in both directions (PaliGemma), so that it is not causal."""
    ahead = words.AHEAD.part(text_of(config))
    return bool(ahead) and _takes_cache(model) and bool(members.CAN_GENERATE.need(model)())


def _attentions(model: Any, text: Any) -> dict[int, tuple[str, nn.Module]]:
    """Attention modules of the decoder, by layer."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = words.LAYER_INDEX.part(module)
        if (
            (terms.ATTENTION.name in (kind := host_class(module).__name__) or kind in terms.LATENT_ATTENTION.names)
            and isinstance(index, int)
            and name.rpartition(".")[2] not in members.CROSS_ATTENTION.names
            and words.CONFIG.part(module) is text
        ):
            found[index] = (name, module)
    return {i: found[i] for i in sorted(found)}


def decoder_of(model: Any, found: dict[int, tuple[str, nn.Module]]) -> nn.Module:
    """The innermost pretrained model around the attention modules."""
    first = next(iter(found.values()))[0]
    names = {c.__name__: c for c in host_class(model).__mro__}
    base, inner = terms.PRETRAINED.at(names), model
    for name, module in model.named_modules():
        if isinstance(module, base) and first.startswith(f"{name}." if name else ""):
            inner = module
    return inner  # type: ignore[no-any-return]


def _check_attentions(
    refuse: Refuse, kinds: list[str], found: dict[int, tuple[str, nn.Module]], rehearsal: Rehearsal
) -> None:
    wanted = [i for i, kind in enumerate(kinds) if kind in ROWS]
    if list(found) != wanted:
        raise refuse(f"{len(found)} attention modules are found for the {len(wanted)} layers of its cache")
    for where, module in found.values():
        forward = host_class(module).forward
        parameters = inspect.signature(forward).parameters
        if words.PICTURED.among(parameters):
            raise refuse(f"{where} keeps rows of images, which are no tokens of the text")
        if cache_argument(forward) is None or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise refuse(f"{where} does not hand its arguments on to the attention function")
        sinks = words.SINKS.part(module)
        if sinks is not None and sinks.shape != (words.HEADS.need(words.CONFIG.need(module)),):
            raise refuse(f"{where} has sinks that are not one logit a head")
        why = rehearsal.objection(module)
        if host_class(module).__name__ in _OTHER_HEADS:
            why = "attends to other keys and values than its cache holds"
        if why:
            raise refuse(f"{where} {why}")


def _full_layers(refuse: Refuse, kinds: list[str], bounded: bool) -> tuple[int, ...]:
    """Layers that attend to everything."""
    full = tuple(i for i, kind in enumerate(kinds) if kind in terms.FULL.names)
    if not full and not bounded:
        some = "" if set(kinds) <= set(ROWS) else " that keep rows"
        raise refuse(f"all of its layers{some} have a sliding window, so its cache is bounded already")
    return full
