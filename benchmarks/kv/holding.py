"""Caches by the bytes that they hold: methods with one setting left open, and the value of it that a ratio asks for.

A *policy* evicts, a *format* keeps every row in fewer bits, a *product* is a policy with the store of a format. What is
open of a policy and of a product is its budget; of a format that which is not its bits, where there is such a thing,
since bits come in whole numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import tokred
from tokred import kv
from tokred.core.registry import methods

RATIOS = (8, 16, 4, 32, 2)  # the most telling first
CLAIMED = (8, 16)  # ratios that something is claimed of
FORMATS = ("kivi", "mikv", "mustafar", "nsnquant", "oscar", "turbo")
WHOLE = 2048  # tokens of the prompt that steps of settings are made for
OPEN = "solved"  # a setting's value in the text of an arm
SLACK = 0.005  # share of the bytes asked for that may be held more


class Family(NamedTuple):
    """A method of which one setting is open.

    Attributes:
        name: as it is registered.
        setting: as text, ``solved`` in the place of what is open.
        make: a policy from the value of what is open.
        ratios: of the 16-bit cache's bytes to those held; 0: whatever it holds as it is.
        values: what the open setting may be, from few bytes to many; empty: any share; of one: nothing is open.
    """

    name: str
    setting: str
    make: Callable[[float], Any]
    ratios: tuple[int, ...] = RATIOS
    values: tuple[float, ...] = ()

    @property
    def product(self) -> bool:
        """True of a policy whose rows are in a format."""
        return is_product(self.setting)


class Held(NamedTuple):
    """One arm: a family at one ratio.

    Attributes:
        name: of the method.
        setting: as text.
        goal: the ratio; 0 for what holds what it holds, and for the unpatched model.
        method: None for the model as it is.
        value: what the open setting is; None: nothing was open.
    """

    name: str
    setting: str
    goal: int
    method: Any
    value: float | None = None

    @property
    def label(self) -> str:
        """Name, setting and ratio."""
        return f"{self.name} {self.setting}".strip() + f" at {self.goal}:1" * bool(self.goal)


def is_product(setting: str) -> bool:
    """True if the text of an arm's setting names a store."""
    return "store=" in setting


class Round(NamedTuple):
    """Samples of one kind from ``start`` to ``end``, of arms at these ratios.

    Attributes:
        answers: whether one of several numbers is also asked for in a chat, at the ratios :data:`CLAIMED`.
    """

    kind: str
    start: int
    end: int
    goals: tuple[int, ...] = (8, 16, 4, 32, 2, 0)
    answers: bool = False


# In this order: a run that is broken off has some of every kind. Then more where something is claimed.
ROUNDS = (
    Round("prose", 0, 2), Round("several", 0, 2, answers=True), Round("table", 0, 2),
    Round("prose", 2, 4, CLAIMED), Round("several", 2, 4, CLAIMED, True), Round("table", 2, 4, CLAIMED),
    Round("prose", 4, 6, CLAIMED), Round("several", 4, 6, CLAIMED), Round("table", 4, 6, CLAIMED),
    Round("prose", 6, 8, CLAIMED), Round("several", 6, 8, CLAIMED), Round("prose", 8, 10, CLAIMED),
    Round("several", 8, 10, CLAIMED, True), Round("prose", 2, 6), Round("several", 2, 6), Round("table", 2, 6),
)  # fmt: skip
# The first of one sample: settings are solved on it.
SHORT = (
    Round("prose", 0, 1), Round("several", 0, 2, answers=True), Round("prose", 1, 3), Round("several", 2, 4),
    Round("prose", 3, 5), Round("several", 4, 6), Round("prose", 5, 9, CLAIMED), Round("prose", 9, 13, CLAIMED),
    Round("several", 6, 9, CLAIMED), Round("several", 9, 12, CLAIMED),
)  # fmt: skip
AGAIN = tuple(Round("several", i, i + 4, (8,)) for i in range(12, 60, 4))  # behind all others
QUICK = (Round("prose", 0, 1), Round("several", 0, 1, answers=True))


# ---------------------------------------------------------------------------------------------- who takes part

# Windows are small, so that a 32nd of the prompt holds them. 2,048 tokens at 32:1 are 64 rows.
_POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("window=16", {"window": 16}),
    "expected_attention": ("", {}),
    "kvzip": ("", {}),
    "adakv": ("score=window-16", {"score": kv.Window(16)}),
    "pyramidkv": ("window=16", {"window": 16}),
    "keydiff": ("turns=False", {"turns": False}),
    "lagkv": ("lag=16", {"lag": 16}),
    "h2o": ("", {}),
    "streaming_llm": ("", {}),
    "random_evict": ("recent=16", {"sinks": 4, "recent": 16}),
    "attention_matching": ("", {}),
    "tova": ("", {}),
    "knorm": ("", {}),
    "criticalkv": ("score=window-16", {"score": kv.Window(16)}),
}
# Refuse without a file or weights of their own, leave the prompt alone, or are made of other methods.
_LEFT_OUT = (
    "kv",
    "limited",
    "rkv",
    "rpc",
    "kvzap",
    "adore",
    "tokenbutler",
    "fastcache",
    "lukv",
    "triattention",
    "duoattention",
    "fastkv",
)
# Of the others that are registered: cost much time, or say what one of the above says.
_NOT_NOW = ("keyformer", "zeromerge", "cake", "squeezeattention", "observed_attention")

_STORES: dict[str, Callable[[], Any]] = {
    "kivi-4": lambda: kv.KIVI(bits=4, residual_length=32),
    "kivi-2": lambda: kv.KIVI(bits=2, residual_length=32),
    "turbo-4": lambda: kv.Turbo(bits=4),
    "turbo-3": lambda: kv.Turbo(bits=3),
    "oscar-4": lambda: kv.Oscar(bits=4, group=64, sinks=4, recent=16, block=16),
    "mikv-2": lambda: kv.MiKV(high=0.2, low=2),
    "mustafar-50": lambda: kv.Mustafar(window=16),
    "nsnquant-2": lambda: kv.NSNQuant(bits=2, window=32),
}
_PRODUCTS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("kvzip", "kivi-4", (8, 16, 32, 4)),
    ("snapkv", "kivi-4", (8, 16, 32, 4)),
    ("expected_attention", "kivi-4", (8, 16, 32, 4)),
    ("adakv", "kivi-4", (8, 16)),
    ("expected_attention", "kivi-2", (8, 16, 32)),
    ("expected_attention", "turbo-4", (8, 16, 32)),
    ("expected_attention", "turbo-3", (8, 16, 32)),
    ("expected_attention", "oscar-4", (8, 16, 32)),
    ("expected_attention", "mikv-2", (8, 16, 32)),
    ("expected_attention", "mustafar-50", (8, 16, 32)),
    ("expected_attention", "nsnquant-2", (8, 16, 32)),
    ("h2o", "kivi-4", (8, 16)),
)


# Of KVzip's own, uneven heads.
_UNEVEN = ("turbo-4", "kivi-4", "nsnquant-2")


def policy(name: str, store: str = "", ratios: tuple[int, ...] = RATIOS) -> Family:
    """A policy, alone or with its rows in a store."""
    text, given = _POLICIES.get(name, ("", {}))
    more = {"store": _STORES[store]()} if store else {}
    setting = " ".join(part for part in (text, f"store={store}" * bool(store), f"budget={OPEN}") if part)
    return Family(name, setting, lambda b: tokred.make(name, budget=b, **given, **more), ratios)


def composed(store: str = "", ratios: tuple[int, ...] = RATIOS) -> Family:
    """The composition that a search found: KVzip's score, all heads and layers together, merged instead of evicted."""
    more = {"store": _STORES[store]()} if store else {}

    def make(budget: float) -> Any:
        return tokred.KVPolicy(score=kv.Reconstruction(), budget=kv.Global(budget), fate=kv.Merge(), **more)

    text = "score=reconstruction fate=merge" + f" store={store}" * bool(store)
    return Family("kv", f"{text} budget=global-{OPEN}", make, ratios)


def even(store: str, ratios: tuple[int, ...]) -> Family:
    """KVzip with as many rows in each head: formats hold uneven heads as a rectangle, with empty rows in it."""

    def make(budget: float) -> Any:
        return tokred.make("kvzip", budget=kv.Uniform(budget), store=_STORES[store]())

    return Family("kvzip", f"store={store} budget=even-{OPEN}", make, ratios)


def uneven(store: str, ratios: tuple[int, ...]) -> Family:
    """KVzip as it is, each head with rows and codes of its own."""

    def make(budget: float) -> Any:
        return tokred.make("kvzip", budget=budget, store=kv.Tight(_STORES[store]()))

    return Family("kvzip", f"store=tight-{store} budget={OPEN}", make, ratios)


def redundancy(ratios: tuple[int, ...]) -> Family:
    """The score of R-KV, judging the prompt, which R-KV itself leaves alone until tokens have been generated."""

    def make(budget: float) -> Any:
        return tokred.KVPolicy(score="redundancy", budget=budget, recent=8)

    return Family("kv", f"score=redundancy recent=8 budget={OPEN}", make, ratios)


def formats() -> list[Family]:
    """Every format at the ratios that its bits reach, the rest of the bytes going to rows in full precision."""

    def kivi(bits: int, group: int, ratio: int) -> Family:
        def make(rows: float) -> Any:
            return tokred.make("kivi", bits=bits, group_size=group, residual_length=int(rows))

        steps = tuple(map(float, range(group, WHOLE + 1, group)))
        return Family("kivi", f"bits={bits} group_size={group} residual_length={OPEN}", make, (ratio,), steps)

    def mikv(low: int, ratio: int) -> Family:
        return Family("mikv", f"low={low} high={OPEN}", lambda h: tokred.make("mikv", low=low, high=h), (ratio,))

    def mustafar(share: float) -> Any:
        return tokred.make("mustafar", k_sparsity=1 - share, v_sparsity=1 - share)

    def oscar(bits: int, ratio: int) -> Family:
        def make(rows: float) -> Any:
            return tokred.make("oscar", bits=bits, group=64, sinks=4, recent=int(rows), block=16)

        steps = tuple(map(float, range(16, WHOLE + 1, 16)))
        return Family("oscar", f"bits={bits} group=64 sinks=4 block=16 recent={OPEN}", make, (ratio,), steps)

    def turbo(bits: int, v_bits: int, ratio: int) -> Family:
        def make(_: float) -> Any:
            return tokred.make("turbo", bits=bits, v_bits=v_bits)

        return Family("turbo", f"bits={bits} v_bits={v_bits}", make, (ratio,), (0.0,))

    def nsnquant(bits: int, ratio: int) -> Family:
        return Family("nsnquant", f"bits={bits}", lambda _: tokred.make("nsnquant", bits=bits), (ratio,), (0.0,))

    kept = tuple(i / 64 for i in range(1, 64))
    return [
        kivi(1, 64, 8), oscar(1, 8), turbo(2, 1, 8), Family("mustafar", f"share_kept={OPEN}", mustafar, (8,), kept),
        nsnquant(1, 8), nsnquant(2, 4), kivi(3, 64, 4), mikv(2, 4), oscar(3, 4), turbo(3, 4, 4),
        Family("mustafar", f"share_kept={OPEN}", mustafar, (4, 2), kept),
        kivi(6, 32, 2), mikv(4, 2), oscar(6, 2), turbo(4, 8, 2),
    ]  # fmt: skip


def as_they_are() -> list[Family]:
    """KIVI at each number of bits, at whatever it holds then."""

    def make(bits: int) -> Family:
        return Family("kivi", f"bits={bits} residual_length=32",
                      lambda _: tokred.make("kivi", bits=bits, residual_length=32), (0,), (0.0,))  # fmt: skip

    return [make(bits) for bits in (4, 2, 8, 1, 3, 6, 5, 7)]


def others(known: Iterable[str]) -> list[Family]:
    """Methods for caches that are registered and that nothing above names: by their budget, or as they are."""
    found = []
    for name, cls in methods.of("cache").items():
        if name in {*known, *_LEFT_OUT, *_NOT_NOW}:
            continue
        if "budget" in (cls.nothing or {}):
            found.append(policy(name, ratios=(8, 16)))
        elif not getattr(cls, "drops", True):
            found.append(Family(name, "", lambda _, name=name: tokred.make(name), (0,), (0.0,)))  # type: ignore[misc]
    return found


def families() -> list[Family]:
    """All that take part, the most telling first."""
    # The fits of attention_matching take minutes a round.
    few = dict.fromkeys(("attention_matching", "tova", "knorm", "criticalkv"), (8, 16))
    policies = [policy(name, ratios=few.get(name, RATIOS)) for name in _POLICIES]
    products = [policy(*product) for product in _PRODUCTS]
    four = (8, 16, 32, 4)
    mine = [*(uneven(store, four) for store in _UNEVEN), even("kivi-4", four), composed(), composed("kivi-4", four)]
    return [*products[:3], *policies[:3], *mine, *formats(), *products[3:], *policies[3:], redundancy((8, 16)),
            *others([*_POLICIES, *FORMATS]), *as_they_are()]  # fmt: skip


# Of `short`: scores of each sort and what goes by no score. Every store is under one score, which reads the prompt
# once; kvzip would read it once more for each store.
_FEW = ("snapkv", "kvzip", "expected_attention", "adakv", "h2o", "streaming_llm", "random_evict")
_FEW_RATIOS = (8, 16, 32, 4)


def short() -> list[Family]:
    """A selection for an hour or two of a core: all formats from 4:1 on, policies, and each format under a policy."""
    three = (8, 16, 32)
    products = [*(uneven(store, three) for store in _UNEVEN), even("kivi-4", three), policy("snapkv", "kivi-4", three)]
    products += [policy("expected_attention", store, three) for store in _STORES if store != "turbo-3"]
    alone = [policy(name, ratios=_FEW_RATIOS) for name in _FEW]
    kept = [f._replace(ratios=tuple(r for r in f.ratios if r in _FEW_RATIOS)) for f in formats()]
    return [*products, *alone, composed(ratios=three), *(f for f in kept if f.ratios)]


def again() -> list[Family]:
    """The product that was named, and the policy that it is made of, at 8:1."""
    return [uneven("turbo-4", (8,)), policy("kvzip", ratios=(8,))]


# ---------------------------------------------------------------------------------------------- solving


def solved(held: Callable[[float], int], most: float, guess: float, values: Sequence[float] = ()) -> float | None:
    """The value of a setting at which as much as is allowed is held, and no more.

    Args:
        held: bytes by value; more of one is more of the other.
        most: bytes allowed.
        guess: a share to begin with, where any is allowed.
        values: those that are allowed, in rising order; empty: all shares above 0 up to 1.

    Returns:
        The value; None: the least of them holds more already.
    """
    limit = most * (1 + SLACK)
    if values:
        low, high = -1, len(values)  # values[low] fits, values[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if held(values[middle]) <= limit else (low, middle)
        return values[low] if low >= 0 else None
    points = dict[float, int]()
    value = guess
    for _ in range(8):
        points[value] = size = held(value)
        if size <= limit and (size >= most * (1 - 2 * SLACK) or value >= 1.0):
            break
        value = _next(points, most, limit)
        if value in points:
            break
    return max((x for x, size in points.items() if size <= limit), default=None)


def _next(points: dict[float, int], most: float, limit: float) -> float:
    """The share to try after these: on the line through two of them, between what fits and what does not."""
    low = max((x for x, size in points.items() if size <= limit), default=0.0)
    high = min((x for x, size in points.items() if size > limit), default=1.0)
    near = sorted(points, key=lambda x: abs(points[x] - most))[:2]
    if low in points and high in points:
        near = [low, high]
    if len(near) == 1:
        found = near[0] * most / points[near[0]]
    else:
        a, b = near
        found = a + (b - a) * (most - points[a]) / ((points[b] - points[a]) or 1)
    margin = 0.02 * (high - low)
    return min(max(found, low + margin), high - margin if high in points else 1.0)


def arms(
    family: Family,
    dense: int,
    held: Callable[[Any], int],
    told: Callable[[str], None] = lambda text: None,
    known: Mapping[tuple[str, str, int], float | None] = MappingProxyType({}),
) -> list[Held]:
    """A family at each of its ratios.

    Args:
        family: which.
        dense: bytes of the 16-bit cache.
        held: bytes of a policy's cache.
        told: is given a sentence for each ratio that the family does not reach.
        known: what was solved before, by name, setting and ratio.
    """
    found = []
    for ratio in family.ratios:
        if not ratio:
            found.append(Held(family.name, family.setting, 0, family.make(family.values[0])))
            continue
        key = family.name, family.setting, ratio
        if key in known:
            value = known[key] if len(family.values) != 1 else family.values[0]
        else:
            value = solved(lambda x: held(family.make(x)), dense / ratio, 1 / ratio, family.values)
        if value is None:
            told(f"{family.name} {family.setting} does not hold as little as {ratio}:1")
            continue
        open_ = len(family.values) != 1
        found.append(Held(family.name, family.setting, ratio, family.make(value), value if open_ else None))
    return found
