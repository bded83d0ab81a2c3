"""TokenButler: every row stays, and a trained network foretells which of them each head will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("tokenbutler")
@dataclass(frozen=True)
class TokenButler(Keeping):
    """Nothing is forgotten; a network that reads the first layer's input says what later heads attend to.

    The network is trained once a model. Without training its choices are noise: train first, or apply what
    ``tokred.load`` gives.

    Args:
        keep: share of the tokens so far that a query attends to, or how many.
        sinks: first tokens, attended to besides.
        rf: by which factor the network's attention is narrower than the model; the nearest that fits its heads.
        size: channels of foretold queries and keys, even.
        hidden: channels inside of what makes them.
        producer_every: layers from one network to the next, at least 2; 0: there is one.
        share: "query", each query head chooses for itself; "kv_group", those of a key/value head together.
        several: whether each of several tokens at once, such as a prompt's, chooses too; else they attend to all rows.

    Source: Akhauri et al., TokenButler, 2025 (arXiv 2503.07518).
    """

    summary: ClassVar[str] = "rows that a trained network foretells for each head"
    source: ClassVar[str] = "Akhauri et al., 2025 (arXiv 2503.07518)"
    example: ClassVar[Parameters] = {"keep": 0.5, "sinks": 1, "size": 4, "hidden": 16}
    nothing: ClassVar[Parameters | None] = {"keep": 1.0}
    everything: ClassVar[Parameters | None] = {"keep": 1, "sinks": 1 << 20, "size": 4, "hidden": 16}
    form = stores.TokenButler

    keep: float | int = 0.5
    sinks: int = 4
    rf: float = 8
    size: int = 16
    hidden: int = 1024
    producer_every: int = 0
    share: str = "query"
    several: bool = False
