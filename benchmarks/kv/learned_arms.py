"""Arms of ``kv/learned``: what has learned and what has not, at as many rows of a prompt read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokred
from benchmarks.kv import lessons
from benchmarks.kv.lessons import RECENT, SINKS
from tokred import kv
from tokred.bench.arms import BASE, Arm
from tokred.methods.kv.kvzap import Foretold


@dataclass(frozen=True)
class Learned(Arm):
    """One way of holding a prompt.

    Attributes:
        weights: folder of what it has learned; None: nothing.
        single: whether tokens behind the prompt come one at a time, as they have to where each is to search.
        read: whether the prompt is read by the patched model, and not handed over.
    """

    weights: Path | None = None
    single: bool = False
    read: bool = False


def threshold(folder: Path, share: float) -> float:
    """The threshold at which KVzap keeps a share of the rows of held-out lessons, as noted beside its weights."""
    noted = json.loads((folder / lessons.THRESHOLDS).read_text("utf8"))
    return float(noted[f"{share:g}"])


def arms(shares: Sequence[float], folder: Path, names: Sequence[str] | None = None) -> list[Learned]:
    """The unpatched model, and every method at every share of the prompt; ``names`` leaves others out.

    Raises:
        ValueError: a name is of no method that takes part, with the weights of the folder.
    """
    found = [Learned(BASE, "", None)]
    for share in shares:
        rows, text = int(share * lessons.PROMPT), f"budget={share:g}"
        fixed = rows - SINKS - RECENT
        plain = {
            "random_evict": {"sinks": SINKS, "recent": RECENT},
            "snapkv": {"window": RECENT},
            "expected_attention": {},
            "kvzip": {},
        }
        found += [Learned(n, text, tokred.make(n, budget=share, **given)) for n, given in plain.items()]
        outliers = max(1, rows // 60)
        near = tokred.KVPolicy(score=kv.Reconstruction(), budget=kv.Global(share), sinks=SINKS, recent=RECENT)
        found.append(Learned("kvzip", f"{text} recent", near))
        searched = tokred.make("tokenselect", budget=fixed, sinks=SINKS, recent=RECENT, theta=2.0, positions="true")
        found.append(Learned("tokenselect", text, searched, single=True))
        whole = 8 * (outliers + 2)
        shadow = tokred.make(
            "shadowkv", budget=max(8, (rows - whole) // 8 * 8), outliers=outliers, local=2, rank=160, offload=False
        )
        found.append(Learned("shadowkv", text, shadow, single=True))
        mean = tokred.make("fastcache", factor=round(1 / share), residual=True)
        found.append(Learned("fastcache", f"{text} untrained", mean))
        found += _trained(share, rows, text, folder)
    there = dict.fromkeys(arm.name for arm in found)
    unknown = [name for name in names or () if name not in there]
    if unknown:
        raise ValueError(f"names must be among {', '.join(there)} (weights are in {folder}); got {', '.join(unknown)}")
    return [arm for arm in found if names is None or arm.name in (*names, BASE)]


def _trained(share: float, rows: int, text: str, folder: Path) -> Iterator[Learned]:
    """Those whose weights are there."""
    if (at := folder / "kvzap").exists():
        given = tokred.load(at)
        hidden = given.hidden  # type: ignore[attr-defined]
        tau = threshold(at, share)
        yield Learned(
            "kvzap", text, tokred.make("kvzap", hidden=hidden, tau=tau, sinks=SINKS, recent=RECENT), weights=at
        )
        score = Foretold(hidden=hidden, sinks=SINKS)
        even = tokred.KVPolicy(score=score, budget=kv.Global(share), sinks=SINKS, recent=RECENT)
        yield Learned("kvzap", f"{text} even", even, weights=at)
    if (at := folder / "tokenbutler").exists():
        own = tokred.load(at).to_dict()["parameters"]
        butler = tokred.make("tokenbutler", **{**own, "keep": rows - SINKS, "several": True})
        yield Learned("tokenbutler", text, butler, weights=at)
    if (at := folder / "adore").exists():
        own = tokred.load(at).to_dict()["parameters"]
        adore = tokred.make("adore", **{**own, "budget": rows - 1 - own["rebuild"], "sinks": SINKS})
        yield Learned("adore", text, adore, weights=at, single=True, read=True)
    if (at := folder / f"fastcache-{round(1 / share)}").exists():
        yield Learned("fastcache", text, tokred.load(at), weights=at)
