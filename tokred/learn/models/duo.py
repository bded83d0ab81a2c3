"""Duo-LLM: a language model with a big and a small MLP in every layer, of which each token takes one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_flags, check_number
from tokred.learn.models import blocks
from tokred.learn.models.blocks import Answer, Cache, SwiGLU, begin, started

BIG, SMALL, SKIP = 0, 1, 2
MOST = 12  # layers whose paths may be counted through


@dataclass(frozen=True)
class DuoConfig:
    """A Duo-LLM.

    Args:
        vocabulary: number of words.
        width, heads, key_heads: of the layers.
        big, small: inner widths of the two MLPs; in the paper 10240 and 640.
        layers: their number.
        skip: a third choice, no MLP at all.
        target: share of tokens and layers that are to run big, over all of them together.
        budget: weight of the square of the distance to it.
        deviation: of the first weights.

    Raises:
        ValueError: a value is out of range; the message names it.

    Source: Duo-LLM, 2024 (arXiv 2410.10846). The mixed output of soft choices and the router's form are ours.
    """

    vocabulary: int
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    big: int = 256
    small: int = 16
    layers: int = 6
    skip: bool = False
    target: float = 0.5
    budget: float = 1.0
    deviation: float = 0.02

    def __post_init__(self) -> None:
        blocks.check_sizes(self, "big", "small", "layers")
        if self.small >= self.big:
            raise ValueError(f"small must be below big, got small={self.small} and big={self.big}")
        check_flags(skip=self.skip)
        if not 0 <= check_number(self.target, "target") <= 1:
            raise ValueError(f"target must lie in [0, 1], got {self.target!r}")
        if check_number(self.budget, "budget") < 0 or check_number(self.deviation, "deviation") <= 0:
            raise ValueError(
                f"budget must be at least 0 and deviation above 0, got {self.budget!r} and {self.deviation!r}"
            )

    @property
    def choices(self) -> int:
        """Number of choices of a token in a layer."""
        return 3 if self.skip else 2


def budget_loss(big: Tensor, target: float, among: Tensor | None = None) -> Tensor:
    """``(mean p_big - target)^2``, one budget for all layers and tokens.

    Args:
        big: ``(L, B, N)`` share of the big MLP, in 0..1.
        target: in [0, 1].
        among: ``(B, N)`` bool, tokens that count; None: all.
    """
    big = big.float()
    mean = big.mean() if among is None else (big * among).sum() / (among.sum() * big.shape[0]).clamp(min=1)
    return (mean - target).square()


class Layer(blocks.Layer):
    """Attention that all tokens share, and an MLP of their choice."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__(config.width, config.heads, config.key_heads)
        self.big, self.small = SwiGLU(config.width, config.big), SwiGLU(config.width, config.small)
        self.router = nn.Linear(config.width, config.choices, bias=False)

    def mixed(self, h: Tensor, shares: Tensor) -> Tensor:
        """``(B, N, C)`` outputs of both MLPs by the shares ``(B, N, 2 or 3)``; no MLP gives nothing."""
        shares = shares.to(h.dtype)
        return shares[..., BIG, None] * self.big(h) + shares[..., SMALL, None] * self.small(h)  # type: ignore[no-any-return]

    def routed(self, h: Tensor, choice: Tensor) -> Tensor:
        """``(B, N, C)``: each MLP runs on the tokens that chose it alone, by ``(B, N)`` int64."""
        flat, out = h.flatten(0, 1), h.new_zeros(h.shape).flatten(0, 1)
        for number, mlp in ((BIG, self.big), (SMALL, self.small)):
            rows = (choice.flatten() == number).nonzero().flatten()
            if rows.numel():
                out = out.index_copy(0, rows, mlp(flat[rows]).to(out.dtype))
        return out.view_as(h)


class Duo(nn.Module):
    """A language model with two MLPs a layer.

    Args:
        config: see :class:`DuoConfig`.
    """

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        started(self, config.deviation)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        route: Literal["random", "soft", "hard"] | None = None,
        temperature: float = 1.0,
        choices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Answer:
        """Logits of the next words.

        Args:
            ids: ``(B, N)`` int64.
            mask: ``(B, N)`` bool, False on padding; None: there is none.
            cache: of the tokens before, extended; None: there are none.
            route: ``"random"``, stage 1, every choice as likely; ``"soft"``, stage 2, a mixture by the router's
                softmax; ``"hard"``, its best choice alone; None: soft in training, else hard.
            temperature: by which the router's logits are multiplied: it rises in stage 2, towards hard choices.
            choices: ``(L, B, N)`` int64 to be taken instead of any routing: 0 big, 1 small, 2 skip.
            generator: of random choices, on the device of ``ids``.

        Raises:
            ValueError: an argument does not fit.
        """
        route = route or ("soft" if self.training else "hard")
        check_choice(route, "route", ("random", "soft", "hard"))
        if check_number(temperature, "temperature") <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self._check(choices, ids)
        tokens = begin(ids, mask, cache)
        x = self.embedding(ids)
        big, depths = [], torch.zeros_like(ids)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x, _ = layer.seen(x, tokens, i, cache)
            h = layer.norm_mlp(x)
            shares = (layer.router(h).float() * temperature).softmax(-1)
            big.append(shares[..., BIG])
            if choices is None and route == "soft":
                x = x + layer.mixed(h, shares)
                choice = shares.argmax(-1)
            else:
                choice = self._choice(shares, route, generator) if choices is None else choices[i]
                x = x + layer.routed(h, choice)
            depths = depths + (choice == BIG)
        losses = {}
        if self.training and route == "soft" and choices is None:
            losses["budget"] = self.config.budget * budget_loss(torch.stack(big), self.config.target, tokens.real)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return Answer(logits, losses, depths * tokens.real)

    def _choice(self, shares: Tensor, route: str, generator: torch.Generator | None) -> Tensor:
        if route == "hard":
            return shares.argmax(-1)
        size, device = shares.shape[:2], shares.device
        return torch.randint(self.config.choices, size, device=device, generator=generator)

    def _check(self, choices: Tensor | None, ids: Tensor) -> None:
        if choices is None:
            return
        size = (self.config.layers, *ids.shape)
        if tuple(choices.shape) != size or choices.is_floating_point():
            raise ValueError(f"choices must be {size} int64, got {tuple(choices.shape)} {choices.dtype}")
        if bool(((choices < 0) | (choices >= self.config.choices)).any()):
            raise ValueError(f"choices must lie in [0, {self.config.choices})")

    def generate(self, ids: Tensor, steps: int, mask: Tensor | None = None) -> Tensor:
        """``(B, N + steps)`` ids, the most probable word after the other, with a cache."""
        return blocks.written(partial(self, route="hard"), ids, steps, mask)


class Path(NamedTuple):
    """A choice in every layer, and what it costs.

    Attributes:
        choices: of each layer, 0 big, 1 small, 2 skip.
        loss: of the word that came.
    """

    choices: tuple[int, ...]
    loss: float


def paths(layers: int, choices: int = 2, big: int | None = None) -> list[tuple[int, ...]]:
    """All choices of so many layers; those with ``big`` big ones alone where that is given.

    Raises:
        ValueError: there would be too many.
    """
    if layers > MOST:
        raise ValueError(f"the paths of at most {MOST} layers are counted through, got {layers}")
    every = itertools.product(range(choices), repeat=layers)
    return [one for one in every if big is None or one.count(BIG) == big]


@torch.no_grad()
def oracle(
    model: Duo,
    ids: Tensor,
    word: int,
    big: int | None = None,
    batch: int = 256,
    each: Callable[[Path], None] | None = None,
) -> Path:
    """The path of the last token of a text with the lowest loss of the word that came next, out of all.

    It knows the answer: a bound for analysis, and no method. The tokens before run as the model's router has it.

    Args:
        model: of at most 12 layers.
        ids: ``(N,)`` int64.
        word: that comes next.
        big: number of layers that are to run big; None: any.
        batch: paths at a time.
        each: called with every path.

    Raises:
        ValueError: the model is too deep, or no path has so many big layers.
    """
    c = model.config
    found = paths(c.layers, c.choices, big)
    if not found:
        raise ValueError(f"no path of {c.layers} layers has big={big} big ones")
    before = _taken(model, ids)
    best: Path | None = None
    for first in range(0, len(found), batch):
        some = found[first : first + batch]
        choices = before.unsqueeze(1).repeat(1, len(some), 1)
        choices[:, :, -1] = torch.tensor(some, device=ids.device).transpose(0, 1)
        logits = model(ids.expand(len(some), -1), choices=choices).logits[:, -1].float()
        losses = F.cross_entropy(logits, torch.full((len(some),), word, device=ids.device), reduction="none")
        for path, loss in zip(some, losses.tolist(), strict=True):
            one = Path(path, loss)
            best = one if best is None or loss < best.loss else best
            if each is not None:
                each(one)
    assert best is not None  # there was a path
    return best


def _taken(model: Duo, ids: Tensor) -> Tensor:
    """``(L, N)`` the router's hard choices for one text."""
    chosen: list[Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda m, a, out: chosen.append(out[0].argmax(-1)))  # type: ignore[union-attr]
        for layer in model.layers
    ]
    try:
        model(ids.unsqueeze(0), route="hard")
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(chosen)
