"""Arguments of a decoder with a policy: their tokens and padding, and what is refused before a forward begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.adapters.kv.masks import MaskSpec

if TYPE_CHECKING:
    from tokred.adapters.kv.cache import TokCache


def padding_in(mask: Any) -> Any:
    """The caller's padding mask ``[B, L]``, or None, in what a decoder is given.

    A model that lets tokens of an image see one another makes the masks of its decoder, one for each kind of layer, by
    our mask function; each of them has the padding.

    Raises:
        ValueError: it is a mask for each pair of tokens.
    """
    made = list(mask.values()) if isinstance(mask, dict) else []
    if made and all(isinstance(one, MaskSpec) for one in made):
        return made[0].key_mask
    if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim != 2):
        raise ValueError(
            "a cache with a policy makes its own masks from the rows it holds: give attention_mask as [B, L] with "
            "zeros on padding, or none, instead of a mask for each pair of tokens (or use_cache=False)"
        )
    return mask


def tokens_of(given: dict[str, Any]) -> Tensor | None:
    """Tokens of a forward: ids ``[B, M]``, or embeddings ``[B, M, C]``."""
    ids: Tensor | None = words.INPUT_IDS.of(given)
    return words.EMBEDS.of(given) if ids is None else ids


def count_new(given: dict[str, Any]) -> tuple[int, int]:
    """Samples and new tokens of a forward."""
    new = tokens_of(given)
    return (1, 0) if new is None else (int(new.shape[0]), int(new.shape[1]))


def check_samples(given: dict[str, Any]) -> None:
    if count_new(given)[0] == 0:
        raise ValueError("input_ids (or inputs_embeds) holds no samples: a cache takes batches of at least one")


def check_chunk(given: dict[str, Any], chunk: int) -> None:
    new = count_new(given)[1] if chunk else 0
    if new > chunk:
        raise ValueError(
            f"a forward of {new} tokens does not fit the limit, which has room for chunk={chunk}: give the prompt in "
            "chunks, or let generate do so"
        )


def check_length(mask: Any, given: dict[str, Any], cache: TokCache) -> None:
    new = tokens_of(given)
    if mask is None or new is None:
        return
    seen = members.LENGTH.need(cache)()
    wanted = seen + new.shape[1]
    if mask.shape[1] < wanted:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but the cache has seen {seen} and "
            f"{new.shape[1]} come: give the mask of all {wanted}, evicted ones included"
        )
