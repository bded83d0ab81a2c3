"""Caches: over a text, the tokens whose rows each layer and head still holds, after the prompt and after the answer."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred import adapters, api
from tokred.adapters.contract import cache_kwargs
from tokred.analysis.viz.drawing import Axis, Drawing, Page, answered, table
from tokred.analysis.viz.settings import Several, settings
from tokred.analysis.viz.spelled import pieces_of
from tokred.errors import MissingInputError

MOMENTS = ("after the prompt", "after the answer")


@dataclass(frozen=True)
class CacheRun:
    """One policy on a text.

    Attributes:
        label: the setting.
        held: for each of :data:`MOMENTS` ``(L, S)`` int32, how many heads of a layer hold the row of each token; ``S``
            is the prompt's length at first, and then that of prompt and answer, without the answer's last token, of
            which a cache has no row yet.
        heads: key/value heads of each layer.
        said: tokens of the answer, as text.
        answer: the whole of it.
    """

    label: str
    held: tuple[Tensor, Tensor]
    heads: tuple[int, ...]
    said: tuple[str, ...]
    answer: str

    def share(self, moment: int = 0) -> Tensor:
        """``(S,)`` float32 in 0..1: the heads of all layers that hold each token, of all."""
        return self.held[moment].sum(0).float() / sum(self.heads)


@dataclass(frozen=True)
class CacheDrawing(Drawing):
    """Policies on a text: what is left of it in the cache, and what the model then answers.

    Attributes:
        family: of the model.
        pieces: the prompt's tokens, as text.
        answer: of the unpatched model.
        runs: one a setting.
    """

    heading: ClassVar[str] = "What the cache still holds"

    family: str
    pieces: tuple[str, ...]
    answer: str
    runs: tuple[CacheRun, ...]

    @property
    def depth(self) -> int:
        """Layers of the cache."""
        return len(self.runs[0].heads)

    def page(self) -> Page:
        """The text for each setting, shaded, with a slider over the layers and one over the two moments."""
        layers = ("all layers", *(f"layer {i + 1} of {self.depth}" for i in range(self.depth)))
        data = {
            "pieces": self.pieces,
            "runs": [
                {
                    "said": run.said[:-1],
                    "heads": run.heads,
                    "length": [held.shape[1] for held in run.held],
                    "held": [_packed(held, run.heads) for held in run.held],
                }
                for run in self.runs
            ],
        }
        figures = "\n".join(self._figure(m, run) for m, run in enumerate(self.runs))
        heads = [
            "layer",
            *(f"{run.label}: rows {moment}" for run in self.runs for moment in MOMENTS),
        ]
        rows = [
            [str(i + 1), *(f"{int(held[i].sum())} of {n * held.shape[1]}" for held, n in self._layer(i))]
            for i in range(self.depth)
        ]
        body = f"""<section>
<p class="answer"><b>Answer of the unpatched model</b> {html.escape(self.answer)}</p>
<div class="methods reading">
{figures}
</div>
{table(heads, rows)}
</section>"""
        intro = (
            f"{self.family}: a prompt of {len(self.pieces)} tokens, {self.depth} layers of "
            f"{_numbers(self.runs[0].heads)} key/value heads.",
            "A token is the fainter, the fewer heads still hold its row; one that is struck through is held by none. "
            "Tokens of the answer are underlined. A token that was merged into another counts as gone. Point at one to "
            "see which layers hold it. Arrow keys move the layer, with Shift the moment; on a text they go from token "
            "to token.",
        )
        scale = (
            '<p class="controls">no head <span class="scale" role="img" aria-label="from faint to full"></span> all</p>'
        )
        return Page(intro, (Axis("Layer", layers), Axis("Moment", MOMENTS)), scale, body, data, "text")

    def figure(self) -> Any:
        """The text, shaded by the share of heads that hold each token after the prompt, and a map of layers by tokens;
        one column a setting."""
        from tokred.analysis.viz.typeset import draw_cache

        return draw_cache(self)

    def _layer(self, i: int) -> list[tuple[Tensor, int]]:
        return [(held, run.heads[i]) for run in self.runs for held in run.held]

    def _figure(self, m: int, run: CacheRun) -> str:
        label = html.escape(run.label)
        return f"""<figure>
<figcaption id="caption-{m}"><strong>{label}</strong> <span class="count"></span></figcaption>
<div class="text" data-method="{m}" tabindex="0" role="application" aria-roledescription="text" aria-label="{label}"
 aria-describedby="caption-{m} group-{m}"></div>
<p class="group" id="group-{m}" aria-live="polite"></p>
{answered(self.answer, run.answer)}
</figure>"""


def cache(
    model: Any,
    text: str | Tensor | Sequence[int],
    methods: Several,
    *,
    tokenizer: Any = None,
    tokens: int = 32,
) -> CacheDrawing:
    """Run a language model on a text under each policy, and note which rows of its cache are left.

    Args:
        model: a language model of transformers, unpatched; it is so again afterwards.
        text: the prompt, or its token ids ``(N,)`` or ``(1, N)``.
        methods: policies such as ``"snapkv budget=0.25"``, method objects, or several of them, side by side.
        tokenizer: of the model; without one, ``text`` has to be ids, and tokens are shown by their numbers.
        tokens: to generate, greedily.

    Raises:
        ValueError: there is no text, or a string without a tokenizer; ``tokens`` is less than 1; the model is patched.
        MissingInputError: a method is none of caches.
        UnknownMethodError, TypeError, UnsupportedModelError: as :func:`tokred.apply`.
    """
    ids = _ids(text, tokenizer)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, the answer's first, got {tokens}")
    chosen = settings(methods)
    for label, several in chosen:
        if any(method.stage != "cache" for method in several):
            raise MissingInputError(
                f"viz.cache draws methods of caches (stage 'cache'), and {label!r} acts at stage "
                f"{next(m.stage for m in several if m.stage != 'cache')!r}: tokred.list_methods(stage='cache') has some"
            )
        adapters.find(model, "cache").check(several[0])
    model.eval()
    answer = _generate(model, ids, tokens)
    runs = []
    for label, several in chosen:
        with api.applied(model, several):
            watched = _Watched(api.kv_cache(model))
            said = _generate(model, ids, tokens, **cache_kwargs(watched.cache), logits_processor=[watched])
            runs.append(_run(label, watched, said, tokenizer))
    pieces, family = pieces_of(ids[0].tolist(), tokenizer), adapters.find(model, "cache").family
    return CacheDrawing(family, tuple(pieces), _text(answer, tokenizer), tuple(runs))


class _Watched:
    """A cache of a generation, looked at when its prompt is complete: ``generate`` asks for a token then.

    Args:
        cache: empty.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.first: tuple[Tensor, ...] | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.cache.holds()
        return scores


def _ids(text: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    """``(1, N)`` int64."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text needs its tokenizer: give tokenizer=, or the token ids instead of the text")
        text = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"text must be one text of at least two tokens, got ids of shape {tuple(ids.shape)}")
    return ids


@torch.inference_mode()
def _generate(model: Any, ids: Tensor, tokens: int, **more: Any) -> list[int]:
    """Ids of the greedy answer."""
    given = ids.to(model.device)
    settled = model.generation_config
    stop = settled.eos_token_id[0] if isinstance(settled.eos_token_id, list) else settled.eos_token_id
    if settled.pad_token_id is None and stop is not None:
        more["pad_token_id"] = stop  # transformers would say that it does so
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, **more)
    return [int(i) for i in out[0, ids.shape[1] :]]


def _text(ids: list[int], tokenizer: Any) -> str:
    return (
        " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    )


def _run(label: str, watched: _Watched, said: list[int], tokenizer: Any) -> CacheRun:
    assert watched.first is not None  # generation has asked for a token
    found = [watched.first, watched.cache.holds()]
    before, after = (torch.stack([layer[0].sum(0, dtype=torch.int32) for layer in moment]) for moment in found)
    heads = tuple(layer.shape[1] for layer in watched.first)
    return CacheRun(label, (before, after), heads, tuple(pieces_of(said, tokenizer)), _text(said, tokenizer))


def _packed(held: Tensor, heads: Sequence[int]) -> list[list[int] | None]:
    """Rows of counts, None where all heads hold everything."""
    return [None if bool((row == n).all()) else row.tolist() for row, n in zip(held, heads, strict=True)]


def _numbers(values: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys(str(v) for v in (min(values), max(values))))
