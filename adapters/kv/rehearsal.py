"""An attention module, tried without weights and numbers: whether it hands its cache's rows to the attention function.

A module of the same class is made on the device ``meta`` and called once. What cannot be tried is taken to be right:
the attention function itself refuses what does not fit, in the first forward.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import arguments, cache_argument, host_object, members, set_attention, words
from tokred.adapters.kv.latents import makes_latents
from tokred.adapters.kv.rope import layer_type_of
from tokred.adapters.swap import host_class

_NAME = "tokred:rehearsal"
_WATCH = "tokred_rehearsal"
_TOKENS = 3


class _LookedError(Exception):
    """A module looked into a mask."""


class _Mask:
    """A stand-in for a mask: a module that looks into it would make a mask of its own."""

    def __getattr__(self, name: str) -> Any:
        raise _LookedError(name)

    def __getitem__(self, index: Any) -> Any:
        raise _LookedError(index)

    def __radd__(self, other: Any) -> Any:
        raise _LookedError("+")


class _Heard:
    """A record of what a module did with its cache, and of what the attention function got."""

    def __init__(self) -> None:
        self.rows: tuple[Tensor, Tensor] | None = None
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.turned = self.biased = False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as they came, noted: the method of a cache that attention modules call."""
        self.rows = keys, values
        return keys, values


for _name in members.LENGTH.names:
    setattr(_Heard, _name, lambda self, *args: 0)  # some ask how much there is before they add to it


class _Turn(Tensor):
    """A table of cosines that notes whether rows are rotated by it."""

    heard: _Heard

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in args:
            if isinstance(x, _Turn):
                x.heard.turned = True
        plain = [x.as_subclass(Tensor) if isinstance(x, _Turn) else x for x in args]
        return func(*plain, **(kwargs or {}))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    heard: _Heard = options[_WATCH]
    heard.calls.append((key, value))
    heard.biased |= words.EXTRA_BIAS.of(options) is not None
    b, h, n, _ = query.shape
    return query.new_zeros(b, n, h, value.shape[-1]), None


class Rehearsal:
    """Tries attention modules, each kind once.

    Args:
        config: of the decoder.
        rope: its rotary embedding, or None.
        crosses: whether the modules attend to the states of an encoder.
    """

    def __init__(self, config: Any, rope: nn.Module | None, crosses: bool = False) -> None:
        self.crosses = crosses
        self.config = copy.copy(config)
        set_attention(self.config, _NAME)
        self.rope = rope
        self._known: dict[Any, _Heard | Exception | None] = {}

    def objection(self, attention: nn.Module) -> str:
        """Why evicted rows would not fit the module; empty where nothing speaks against it."""
        heard = self._heard(attention)
        if isinstance(heard, Exception):
            return "makes a mask of its own, which evicted rows do not fit"
        if heard is None or heard.rows is None:
            return ""
        if not heard.calls:
            return "does not use the attention function that a policy acts in"
        if heard.biased:
            return "adds a bias by distance to its logits, which is made for rows without gaps"
        if makes_latents(attention):
            return self._of_latents(attention, heard)
        same = all(
            x.shape[:3] == row.shape[:3] for call in heard.calls for x, row in zip(call, heard.rows, strict=True)
        )
        if len(heard.calls) > 1 or not same:
            return "attends to other keys and values than its cache holds"
        return ""

    def _of_latents(self, attention: nn.Module, heard: _Heard) -> str:
        """Why keys are not made of the rows as those of latents are; empty where they are."""
        assert heard.rows is not None
        latents, rotated = (x.shape for x in heard.rows)
        widths = int(words.LATENTS.need(attention)), int(words.PLAIN_WIDTH.need(attention)) + rotated[3]
        one = latents[1] == rotated[1] == 1 and len(heard.calls) == 1
        if one and widths == (latents[3], heard.calls[0][0].shape[3]):
            return ""
        return "makes keys and values of latents in a way of its own"

    def heard(self, attention: nn.Module) -> bool:
        """True where the rehearsal showed that the module calls the attention function, whatever its model says."""
        found = self._heard(attention)
        return isinstance(found, _Heard) and bool(found.calls)

    def rows(self, attentions: Iterable[nn.Module]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values ``[1, Hk, n, D]`` that modules give their cache, without numbers, each kind once; none of
        those of which it is not known."""
        found = map(self._heard, attentions)
        return tuple({id(x): x.rows for x in found if isinstance(x, _Heard) and x.rows is not None}.values())

    def turns(self, attention: nn.Module) -> bool:
        """True unless the rehearsal showed that the module leaves queries and keys without rotation."""
        heard = self._heard(attention)
        return not isinstance(heard, _Heard) or not heard.calls or heard.turned

    def _heard(self, attention: nn.Module) -> _Heard | Exception | None:
        cls = host_class(attention)
        plain = {k: v for k, v in vars(attention).items() if isinstance(v, bool | int | float | str | None)}
        key = (
            cls,
            tuple(sorted((k, repr(v)) for k, v in plain.items() if k not in (*words.LAYER_INDEX.names, "training"))),
        )
        if key not in self._known:
            self._known[key] = self._try(cls, attention)
        return self._known[key]

    def _try(self, cls: Any, attention: Any) -> _Heard | Exception | None:
        members.REGISTER.need(host_object("registry of attention"))(_NAME, _attention)
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                module = cls(self.config, words.LAYER_INDEX.need(attention))
        except Exception:  # it is made in another way
            try:
                module = self._copied(cls, attention)
            except Exception:  # something in it has no copy
                return None
        try:
            return self._call(module, attention)
        except _LookedError as error:
            return error
        except Exception:  # it takes something else, or has to see numbers
            return None

    def _copied(self, cls: Any, attention: nn.Module) -> Any:
        """A copy of the module that has no weights and no hooks, and asks for our attention."""
        known: dict[int, Any] = {id(words.CONFIG.need(attention)): self.config}
        for x in (*attention.parameters(), *attention.buffers()):
            bare = torch.empty_like(x, device="meta")
            known[id(x)] = nn.Parameter(bare, requires_grad=False) if isinstance(x, nn.Parameter) else bare
        for module in attention.modules():
            for word in members.HOOKS:
                known[id(word.need(module))] = OrderedDict()
        copied = copy.deepcopy(attention, known)
        copied.__class__ = cls
        return copied

    def _call(self, module: Any, attention: nn.Module) -> _Heard | None:
        forward, heard = type(module).forward, _Heard()
        cache = cache_argument(forward)
        names = list(inspect.signature(forward).parameters)[1:]
        if cache is None and not self.crosses:
            return None
        x = torch.empty(1, _TOKENS, words.WIDTH.need(self.config), device="meta")
        more = {
            words.ATTENTION_MASK: _Mask(),
            words.SHARED_ROWS: {},
            words.SOURCE: x if self.crosses else None,
            words.TABLES: self._tables(attention, heard),
            words.POSITIONS: torch.empty(1, _TOKENS, dtype=torch.long, device="meta"),
        }
        given = {**arguments(forward, more), **({} if cache is None else {cache: heard})}
        with torch.no_grad():
            module.eval()(x, **{k: v for k, v in given.items() if k in names}, **{_WATCH: heard})
        return heard

    def _tables(self, attention: nn.Module, heard: _Heard) -> Tensor | tuple[Tensor, ...] | None:
        """Cosines and sines that notice whether they are used."""
        if self.rope is None:
            return None
        extra = layer_type_of(self.rope, attention)
        x, zeros = torch.zeros(1, _TOKENS, 1), torch.zeros(1, _TOKENS, dtype=torch.long)
        more = [] if extra is None else [extra]
        try:
            tables = self.rope(x, zeros, *more)
        except KeyError:  # these layers do not turn
            return None
        except IndexError:  # positions have three axes here
            tables = self.rope(x, zeros.expand(3, 1, _TOKENS), *more)
        several = not isinstance(tables, Tensor)
        turns: tuple[_Turn, ...] = tuple(t.to("meta").as_subclass(_Turn) for t in (tables if several else (tables,)))
        for turn in turns:
            turn.heard = heard
        return turns if several else turns[0]
