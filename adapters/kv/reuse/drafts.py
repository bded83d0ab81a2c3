"""Drafts of the model itself over a few rows of its cache, verified over all of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import cache_kwargs, host_object, members, words
from tokred.adapters.kv.cache import TokCache, layers_of, set_states, states_of
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError
from tokred.kernels.gather_rows import gather_rows
from tokred.kv.drafting import DraftRows
from tokred.kv.engine import Clock, Engine, Layer
from tokred.kv.policy import CachePolicy
from tokred.kv.site import CacheSite

if TYPE_CHECKING:
    from tokred.adapters.kv.hooks import CacheSettings

CacheLayerMixin: Any = host_object("base of cache layers")


class Drafted(NamedTuple):
    """A generation with drafts: its text, and how many of them stand in it.

    Attributes:
        sequences: ``[1, N + n]`` int64, prompt and new tokens.
        forwards: of the model over all rows, the prompt's counted.
        drafts: tokens that were drafted, each by a forward over few rows.
        accepted: those of them that stand in the text.
        choices: how often the rows were chosen, the first time counted.
    """

    sequences: Tensor
    forwards: int
    drafts: int
    accepted: int
    choices: int


class Listening(Engine):
    """An engine that keeps the queries of the last forward.

    Attributes:
        asked: ``[1, H, M, D]`` by compressed layer.
    """

    def __init__(self, policy: CachePolicy, depth: int) -> None:
        super().__init__(policy, depth)
        self.asked: dict[int, Tensor] = {}

    def watches(self, clock: Clock, after: int) -> bool:
        """Always, since queries are told to those who look."""
        return True

    def observe(self, layer: Layer, site: CacheSite, before: int) -> None:
        self.asked[layer.index] = site.q
        if super().watches(layer.clock, before):
            super().observe(layer, site, before)
        else:
            layer.settle(site)


@members.under_each_name
class DraftLayer(CacheLayerMixin):  # type: ignore[misc]
    """A few rows of a layer, and behind them those of the tokens that are drafted.

    Args:
        rule: which.
        room: tokens that are drafted.

    Attributes:
        chosen: ``[1, Hk, budget]`` int64, of all rows those that stood here when they were chosen.
        seen: tokens of the whole cache, and those that are drafted.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, rule: DraftRows, room: int) -> None:
        super().__init__()
        self.rule, self.room = rule, room
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: rows are chosen before the first token comes."""

    def choose(self, q: Tensor, keys: Tensor, values: Tensor, seen: int) -> None:
        """Hold the rows that ``q`` ``[1, H, D]`` asks for, of all ``[1, Hk, n, D]`` of ``seen`` tokens."""
        self.chosen = self.rule.select(q, keys)
        self._both = []
        for x in (keys, values):
            drafts = x.new_empty(*x.shape[:2], self.room, x.shape[3])
            self._both.append(torch.cat([gather_rows(x, self.chosen), drafts], 2))
        self.since, self._drafted, self.seen = 0, 0, seen

    def follow(self, keys: Tensor, values: Tensor) -> None:
        """Take in rows ``[1, Hk, n, D]`` of tokens that stand in the text now, and forget all drafts."""
        count = keys.shape[2]
        places = torch.tensor(self.rule.places(self.since, count), device=keys.device)
        for held, new in zip(self._both, (keys, values), strict=True):
            held.index_copy_(2, places, new)
        self.seen += count - self._drafted
        self.since, self._drafted = self.since + count, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add drafted tokens; returns all rows that are attended to."""
        begin, count = self.rule.budget + self._drafted, key_states.shape[2]
        for held, new in zip(self._both, (key_states, value_states), strict=True):
            held[:, :, begin : begin + count] = new
        self._drafted, self.seen = self._drafted + count, self.seen + count
        keys, values = (x[:, :, : begin + count] for x in self._both)
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        rows = self.rule.budget + self._drafted
        return rows + query_length, self.seen - rows

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a draft is taken back as a whole")


class Drafter:
    """A model with a cache of all rows, and one of few.

    Args:
        model: that makes logits; patched.
        settings: of its policy.
        rule: which rows drafts are made over.
        gamma: tokens of a draft.
    """

    def __init__(self, model: nn.Module, settings: CacheSettings, rule: DraftRows, gamma: int) -> None:
        self.model, self.settings, self.rule, self.gamma = model, settings, rule, gamma
        self.full: TokCache = settings.cache()
        self.engine = Listening(settings.policy, len(settings.compressed))
        self.full.engine = self.engine
        for layer in self._ours:
            layer.engine = self.engine
        self.few: TokCache = settings.cache()
        self.forwards = self.drafts = self.accepted = self.choices = 0

    @property
    def _ours(self) -> list[TokLayer]:
        return [layer for layer in layers_of(self.full) if isinstance(layer, TokLayer)]

    def run(self, ids: Tensor, count: int, ends: Sequence[int]) -> Drafted:
        """Greedy text of up to ``count`` tokens behind ``ids`` ``[1, N]``, up to one of ``ends``."""
        self.engine.prompt, self.engine.steps = ids.shape[1], count
        said = self._likeliest(ids, self.full, newest=True)
        self.forwards, self.engine.drafting = 1, True
        self._check()
        self._choose(-1)
        while len(said) < count and not {*said} & {*ends}:
            said += self._round(said[-1], min(self.gamma, count - len(said) - 1), ids.device)
        said = said[:count]
        end = next((i for i, token in enumerate(said) if token in ends), len(said))
        text = torch.cat([ids, ids.new_tensor([said[: end + 1]])], 1)
        return Drafted(text, self.forwards, self.drafts, self.accepted, self.choices)

    def _round(self, last: int, length: int, device: torch.device) -> list[int]:
        """The next tokens behind ``last``: of a draft of ``length`` those that the model says too, and one more."""
        draft = [last]
        for _ in range(length):
            draft += self._likeliest(torch.tensor([draft[-1:]], device=device), self.few)
        others = [layer for layer in layers_of(self.full) if not isinstance(layer, TokLayer)]
        before = states_of(others)
        said = self._likeliest(torch.tensor([draft], device=device), self.full)
        right = next((i for i, (a, b) in enumerate(zip(draft[1:], said, strict=False)) if a != b), length)
        self._take_back(others, before, right + 1, length - right)
        self.forwards, self.drafts, self.accepted = self.forwards + 1, self.drafts + length, self.accepted + right
        self._follow(right + 1, right)
        return said[: right + 1]

    def _likeliest(self, ids: Tensor, cache: TokCache, *, newest: bool = False) -> list[int]:
        """The likeliest token behind each of ``ids`` ``[1, M]``, or behind the ``newest`` alone."""
        kept, given = words.KEPT_LOGITS, {words.CACHED.name: True, **cache_kwargs(cache)}
        if newest and kept.among(inspect.signature(host_class(self.model).forward).parameters):
            kept.put(given, 1)
        out = self.model(ids, **given)
        logits: Tensor = words.LOGITS.need(out)[0]
        return (logits[-1:] if newest else logits).argmax(-1).tolist()

    def _take_back(self, others: list[Any], before: Any, kept: int, gone: int) -> None:
        """Let the newest ``gone`` tokens go from all layers, ``kept`` of the last forward's being left."""
        if not gone:
            return
        for layer in self._ours:
            layer.crop(-gone)
        # A window has pushed rows out for them: it goes back to what it was, and takes in again what is left.
        came = [(words.KEYS.need(x)[:, :, -kept - gone :], words.VALUES.need(x)[:, :, -kept - gone :]) for x in others]
        set_states(others, before)
        for layer, (keys, values) in zip(others, came, strict=True):
            members.UPDATE.need(layer)(keys[:, :, :kept], values[:, :, :kept])

    def _check(self) -> None:
        """Refuse, once the prompt has been read, what rows cannot be chosen of.

        Raises:
            UnsupportedModelError: layers keep other things than rows of all tokens or of a window.
            ValueError: rows stand for several tokens, or heads have different numbers of them; a window is shorter than
                a draft.
        """
        for i, layer in enumerate(layers_of(self.full)):
            if isinstance(layer, TokLayer):
                if layer.weights is not None or layer.ragged or not layer.shelf.complete:
                    what = "stand for several tokens" if layer.weights is not None else "differ in number between heads"
                    raise ValueError(f"rows of layer {i} {what}, which a draft cannot choose of: take another policy")
            elif words.KEYS.part(layer) is None or not members.SLIDES.part(layer, False):
                raise UnsupportedModelError(
                    f"layer {i} ({type(layer).__name__}) cannot take drafts back: it keeps no rows of tokens"
                )
            elif int(words.WINDOW.part(layer, 0)) <= self.gamma + 1:
                raise ValueError(f"gamma is {self.gamma}, but layer {i} has a window of {words.WINDOW.part(layer)}")

    def _choose(self, at: int) -> None:
        """Choose rows anew by the query ``at`` of the last forward."""
        layers, seen = layers_of(self.few), self._ours[0].seen
        for i, layer in enumerate(layers_of(self.full)):
            if isinstance(layer, TokLayer):
                held = layers[i]
                if not isinstance(held, DraftLayer):
                    held = layers[i] = DraftLayer(self.rule, self.gamma + 1)
                keys, values = layer.newest
                held.choose(self.engine.asked[layer.index][:, :, at], keys, values, seen)
        self.choices += 1
        self._lend()

    def _follow(self, count: int, at: int) -> None:
        """Let the few rows have the newest ``count`` of all, or be chosen anew by the query ``at``."""
        ours = [layer for layer in layers_of(self.few) if isinstance(layer, DraftLayer)]
        if self.rule.due(ours[0].since):
            self._choose(at)
            return
        for held, layer in zip(ours, self._ours, strict=True):
            keys, values = layer.newest
            held.follow(keys[:, :, -count:], values[:, :, -count:])
        self._lend()

    def _lend(self) -> None:
        """Let layers with windows, which are short, begin drafts with the rows that they have."""
        layers = layers_of(self.few)
        for i, layer in enumerate(layers_of(self.full)):
            if not isinstance(layer, TokLayer):
                layers[i] = copy.copy(layer)
