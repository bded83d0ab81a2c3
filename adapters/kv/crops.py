"""Why the newest tokens of a layer cannot be taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokred.kv.stores.store import missing

if TYPE_CHECKING:
    from tokred.adapters.kv.layer import TokLayer


def why_no_crop(layer: TokLayer, count: int) -> str:
    """The reason for which ``count`` of the newest tokens are not there as they were; empty where they are."""
    if not layer.width or count == 0:
        return ""
    if count > layer.seen:
        return f"cannot remove {count} tokens from a cache that has seen {layer.seen}"
    if layer.seen - count < layer.settled:
        return (
            f"cannot crop to {layer.seen - count} tokens: rows were evicted when the cache had seen {layer.settled}; "
            "take cache.snapshot() before, and cache.restore() it"
        )
    if layer.rows or layer.notes:
        return (
            f"cannot crop: {layer.engine.policy.name or 'the policy'} has counted the attention of the tokens that "
            "would go; take cache.snapshot() before, and cache.restore() it"
        )
    why = missing(layer.store, {"crop": "a crop"})
    return f"{why}, and {layer.store.name!r} cannot; take cache.snapshot() before, and restore it" if why else ""
