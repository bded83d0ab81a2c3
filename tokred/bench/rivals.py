"""Rivals at equal work: for what every row leaves, a random choice and down-sampling that leave as much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from tokred import api
from tokred.bench.arms import STEPS, Arm, knob, nearest
from tokred.bench.entries import Cost, Entry, work, written
from tokred.core.method import Method
from tokred.core.registry import methods as registered
from tokred.errors import NothingRemovedWarning

SAME = 0.02  # settings whose work differs by less share their baselines
TRIES = 6  # of a bisection in which the model runs as a whole
# Probe: ``probe(methods)`` is their cost on the first batch.
Probe = Callable[[Sequence[Method]], Cost]
# Places where tokens leave -> baselines there; tokens that leave inside a language model might leave before it.
PLACES = {"block": "block", "attention": "attention", "projector": "visual", "layer": "visual", "cache": "cache"}


def _names(place: str, one: Entry) -> tuple[str, ...]:
    """Baselines of a place, random choice first."""
    if place == "block":
        drops = any(getattr(m, "drops", False) for m in one.methods)
        return ("random_prune" if drops else "random"), "downsample"
    return {
        "attention": ("random_latent_prune", "todo"),
        "visual": ("random_visual", "uniform_visual", "downsample_visual"),
        "cache": ("random_evict", "streaming_llm"),
    }[place]


def of_equal_work(found: Sequence[tuple[Entry, Cost]], probe: Probe, pictures: bool = True) -> list[Entry]:
    """For each amount of work among the entries, the baselines of their stages whose work comes nearest.

    Rows that act at several places get baselines that do so too, each as much as the row does there.

    Args:
        found: entries that run, with their costs.
        probe: the cost of methods, measured on the first batch.
        pictures: the model has visual tokens; without any, nothing is known that leaves tokens of its layers at random.
    """
    made: dict[str, Entry] = {}
    done: list[tuple[str, float]] = []
    met: set[tuple[str, float]] = set()
    for one, cost in found:
        share = work(cost)
        places = list(dict.fromkeys(PLACES[m.stage] for m in one.methods))
        if one.baseline or share is None or share >= 1 or ("visual" in places and not pictures):
            continue
        families = [_names(place, one) for place in places]
        for i in range(max(map(len, families))):
            names = [family[min(i, len(family) - 1)] for family in families]
            label = "+".join(names)
            if any(label == other and abs(share - at) < SAME for other, at in done):
                continue
            done.append((label, share))
            members: list[Method] = []
            at = 0.0
            for place, name in zip(places, names, strict=True):
                method, at = _MATCHED[place](name, one, cost, _beside(probe, members))
                members.append(method)
            if (label, at) in met:  # a coarse grid has few sizes: one may be the nearest to several amounts of work
                continue
            met.add((label, at))
            setting = " + ".join(map(_setting, members))
            chosen = Entry(label, setting, tuple(members), True)
            made[chosen.label] = chosen
    present = [one.methods for one, _ in found]
    return [one for one in made.values() if one.methods not in present]


def _setting(method: Method) -> str:
    """The parameters as they are typed, the amount among them though it may be the default."""
    text = written(method)
    amount = next((name for name in ("budget", "ratio") if hasattr(method, name)), None)
    if amount is None or f"{amount}=" in text:
        return text
    return f"{amount}={getattr(method, amount):g} {text}".strip()


def _beside(probe: Probe, members: Sequence[Method]) -> Callable[[Method], Cost]:
    """The cost of a method beside others."""
    others = [*members]
    return lambda method: probe([*others, method])


def _budget(name: str, one: Entry, cost: Cost, probe: Callable[[Method], Cost]) -> tuple[Method, float]:
    """The budget at which a policy's cache has this share of the bytes, and that share."""
    share = cost["bytes"] / cost["dense_bytes"]
    method = api.make(name, budget=_rounded(share))
    held = _held(probe(method))
    if abs(held - share) > SAME / 2 and held < 1 and share < 1:
        # Layers of a sliding window hold what they hold, whatever the budget: the rest goes in proportion.
        method = api.make(name, budget=_rounded(1 - (1 - share) * (1 - share) / (1 - held)))
        held = _held(probe(method))
    return method, held


def _held(cost: Cost) -> float:
    return float(cost["bytes"] / cost["dense_bytes"])


def _rounded(share: float) -> float:
    return min(1.0, max(0.001, round(share, 3)))


def _visual(name: str, one: Entry, cost: Cost, probe: Callable[[Method], Cost]) -> tuple[Method, float]:
    """The budget that leaves as many visual tokens in the mean of all layers, and the tokens that it leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRemovedWarning)
        every = probe(api.make(name, budget=1.0))["visual_mean"]
    method = api.make(name, budget=_rounded(cost["visual_mean"] / every if every else 1.0))
    return method, float(probe(method)["visual_mean"])


def _latents(name: str, one: Entry, cost: Cost, probe: Callable[[Method], Cost]) -> tuple[Method, float]:
    """The setting of a denoiser's baseline whose multiply-adds come nearest, and these."""
    found: list[tuple[float, float, Method]] = []

    def tried(method: Method) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)
            at = float(probe(method)["gmacs"])
        found.append((abs(at - cost["gmacs"]), at, method))
        return at

    whole = cost["gmacs"] / cost["gmacs_share"]
    if name == "todo":
        # The finest attention may stand at a coarser resolution than the sample's.
        depth = next((d for d in range(4) if tried(api.make(name, factors=(1,) * d + (2,))) < whole), 0)
        for factor in (3, 4):
            tried(api.make(name, factors=(1,) * depth + (factor,)))
    else:
        given = [int(m.max_downsample) for m in one.methods if hasattr(m, "max_downsample")]
        levels = given or [1, 2, 4, 8]
        finest = next((f for f in levels if tried(api.make(name, ratio=0.5, max_downsample=f)) < whole), levels[-1])
        low, high = 0.0, 1.0
        for _ in range(TRIES):
            middle = (low + high) / 2
            more = tried(api.make(name, ratio=middle, max_downsample=finest)) > cost["gmacs"]
            low, high = (middle, high) if more else (low, middle)
    _, at, method = min(found, key=lambda one: one[:2])
    return method, at


def _matched(name: str, one: Entry, cost: Cost, probe: Callable[[Method], Cost]) -> tuple[Method, float]:
    """The setting of a baseline whose measured work comes nearest, and that work."""
    parameter, share = knob(name)
    macs = round(1e9 * cost["gmacs"])

    def build(step: int) -> Arm:
        method = api.make(name, **{parameter: step / STEPS if share else step})
        return Arm(name, "", method, macs=round(1e9 * probe(method)["gmacs"]))

    try:
        found = nearest(build, 1, STEPS - 1 if share else max(2, int(cost["tokens_in"]) // 2), macs)
        method, at = found.method, float(found.macs)
    except Exception:
        # No grid, say: it does not fit the model, and its row, which will fail like this one, says why.
        method, at = api.make(name, **registered.get(name).example), 0.0
    assert method is not None
    return method, at


_MATCHED: dict[str, Callable[..., tuple[Method, float]]] = {
    "block": _matched,
    "attention": _latents,
    "visual": _visual,
    "cache": _budget,
}
