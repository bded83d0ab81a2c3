"""transformers: text encoders of the BERT family, whose batches are padded.

Padding is dropped before any real token, the first token is protected, and what reads tokens by their position (a
bare model's last hidden states, heads for tokens) gets full length back, a dropped token with its last features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import attention_of, terms, words
from tokred.adapters.encoder.block import Recipe
from tokred.adapters.encoder.host import EncoderHost, argument_names, rewritten
from tokred.adapters.encoder.masks import require, seen, visible
from tokred.adapters.encoder.state import TokenState
from tokred.adapters.encoder.text_tables import ENCODERS, HEADS, TextEncoder
from tokred.adapters.linear import matrices
from tokred.adapters.swap import host_class
from tokred.errors import UnsupportedModelError

LEFT = (
    "the batch is padded on the left, so the class token is not its first: pad on the right "
    "(tokenizer.padding_side = 'right'), or call tokred.remove(model) first"
)


def match(model: Any) -> EncoderHost | None:
    """The host record of a text encoder, alone or under a head; None when ``model`` is none.

    Raises:
        UnsupportedModelError: it cannot run with fewer tokens as it is; the message says why.
    """
    names = [c.__name__ for c in host_class(model).__mro__]
    head = next((n for n in names if n in HEADS), None)
    path, demand = HEADS[head] if head is not None else ("", "last")
    encoder = getattr(model, path) if path else model
    name = next((c.__name__ for c in host_class(encoder).__mro__ if c.__name__ in ENCODERS), None)
    if name is None or words.DECODER.part(words.CONFIG.need(encoder), False):
        return None
    row = ENCODERS[name]
    layers = [(f"{row.layers}.{i}", layer) for i, layer in enumerate(encoder.get_submodule(row.layers))]
    if not layers:
        raise UnsupportedModelError(f"transformers' {name} has no layers")
    kind = attention_of(words.CONFIG.need(encoder))
    if kind not in terms.FUSED_KERNEL.names:
        raise UnsupportedModelError(
            f"{name} runs attn_implementation={kind!r}, where padding cannot follow the tokens; call "
            "model.set_attn_implementation('sdpa') (or load it so) and apply again"
        )
    supplies = {"x", "q", "k", "v", "class_attention"}
    # Within windows the columns of attention do not follow from queries and keys alone.
    if not row.windowed:
        supplies.add("attention")
    return EncoderHost(
        family=f"transformers {name}",
        model=encoder,
        blocks=layers,
        recipe=TextRecipe(row, argument_names(layers[0][1])),
        prefix=1,
        supplies=frozenset(supplies),
        pooled=False,
        own=any(rewritten(m, "transformers") for m in {model, encoder}),
        full="last" if (demand(model) if callable(demand) else demand) == "last" else "none",
        tokens=lambda shape: int(shape[-1]),
        outside_macs=lambda shape: _outside(model, encoder, int(shape[-1])),
        padded=True,
    )


class TextRecipe(Recipe):
    """Layers of text encoders; shapes are ``(B, N)`` of token ids.

    Args:
        row: of the table.
        argument_names: of a layer's forward.
    """

    def __init__(self, row: TextEncoder, argument_names: tuple[str, ...]) -> None:
        super().__init__(False, row.positions, argument_names)
        self.drops_hidden = True
        self.windowed = row.windowed

    def real(self, kwargs: dict[str, Any], x: Tensor) -> Tensor | None:
        """Tokens that some query sees; of a sample that is all padding its first.

        Raises:
            UnsupportedModelError: the mask hides more than padding, or the first token of a sample (in a compiled
                graph, a RuntimeError with the same text).
        """
        mask = words.ATTENTION_MASK.of(kwargs)
        if mask is None:
            return None
        through = seen(mask)
        real = through
        if through.ndim > 2:
            # Windows of positions hide more than padding.
            real = through[:, 0].any(1) if self.windowed else visible(through, len(x), words.ATTENTION_MASK.name)
        real = real.expand(x.shape[0], -1)
        # A sample without a real token, such as one that fills a batch up, is its class token alone.
        first = real[:, :1] | ~real.any(1, keepdim=True)
        require(first, LEFT)
        return torch.cat([first, real[:, 1:]], 1)

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """Rotary tables at the rows that are left; what is padding among them, the state knows."""
        if state.representative is not None and not self.windowed:
            kwargs = {**kwargs, words.ATTENTION_MASK.key(kwargs): None}
        return super().gather(kwargs, state, prefix)


def _outside(model: nn.Module, encoder: nn.Module, n: int) -> int:
    """Multiply-adds of the pooler and the head behind it; those of heads for tokens at full length."""
    inside = next(f"{name}." if name else "" for name, m in model.named_modules() if m is encoder)
    lists = tuple(f"{inside}{n}." for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList))
    total = 0
    for name, wide, high in matrices(model):
        if not name.startswith(lists):
            once = name.startswith(inside) or "Token" not in type(model).__name__
            total += wide * high * (1 if once else n)
    return total
