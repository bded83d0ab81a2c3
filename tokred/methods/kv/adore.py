"""ADORE: a trained controller releases tokens of the cache, and rebuilds released ones that matter again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share, is_count
from tokred.core.learned import Facts, Learned
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kernels.dispatch import without_autocast
from tokred.kv.budgets import Uniform
from tokred.kv.parts import Score, When
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.release import Controller, lesson
from tokred.kv.site import CacheSite
from tokred.kv.stores import Rectangle

# Of the forward that is running, for all layers: importance of all tokens, states in training, weights of attention.
_SIGMA, _STATES, _WEIGHTS = "importance", "states", "weights"
# Of a cache: what has been made of all tokens' states, and the newest state.
_THEN, _STATE = "judged", "state"


@dataclass(frozen=True)
class Released(Score):
    """The importance of tokens for the newest one, as a controller judges by embeddings alone; for all layers the same.

    Args:
        returns: released tokens that are rebuilt before each generated token.
        positives: of a query in training; a number, or a share of its past.
        size, hidden: channels of the controller.

    Source: Zhang et al., ADORE, Findings of ACL 2024 (arXiv 2407.02328), section 3.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"module", "again"})
    accumulates: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    why_no_chunks: ClassVar[str | None] = "it rebuilds tokens, for which a limit has no room"

    returns: int = 8
    positives: float | int = 192
    size: int = 128
    hidden: int = 128

    @property
    def needs(self) -> frozenset[str]:
        """Module and rows that come again; lessons are about attention."""
        return self.reads | {"q", "k"}

    def module(self, facts: Facts) -> Controller:
        """A new controller, the same for the same sizes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Controller(facts.width, self.size, self.hidden)

    def foresee(self, learned: Learned, x: Tensor, notes: dict[str, Any], real: Tensor | None) -> Tensor:
        found, training = learned.module, learned.training
        assert isinstance(found, Controller)  # the host supplies what is read
        with torch.set_grad_enabled(training), without_autocast(x):
            states, last = found.read(x.detach(), notes.get(_STATE), real)
        with torch.no_grad(), without_autocast(x):
            then = found.then(states.detach())
            if _THEN in notes:
                then = torch.cat([notes[_THEN], then], 1)
            sigma = found.importance(last.detach()[:, None], then)[:, 0]
        notes[_THEN], notes[_STATE] = then, last.detach()
        learned.shared[_SIGMA] = sigma
        if training:
            learned.shared[_STATES] = states
        return sigma

    def observe(self, site: CacheSite) -> None:
        """In training: add up the attention of all layers, and leave the loss behind the last."""
        shared = site.learned.shared
        if _STATES not in shared:
            return
        states, q, k = shared[_STATES], site.q.float(), site.k.float()
        m, n = q.shape[2], k.shape[2]
        if n != m:
            raise ValueError("the controller learns from whole texts: give each to the model at once, without a cache")
        at = torch.arange(n, device=q.device)
        past = (at < at[:, None])[None]
        real = None if site.padding is None else site.padding.mask
        seen = past if real is None else past & real[:, None] & real[:, :, None]
        own = past | torch.eye(n, dtype=torch.bool, device=q.device)
        visible = own if real is None else own & real[:, None]
        weights = torch.zeros(q.shape[0], n, n, device=q.device)
        groups = q.shape[1] // k.shape[1]
        assert site.scale is not None  # since it was made
        for h in range(q.shape[1]):  # one head's pairs at a time are enough
            logits = q[:, h] @ k[:, h // groups].mT * site.scale
            if site.softcap:
                logits = torch.tanh(logits / site.softcap) * site.softcap
            logits = logits.masked_fill(~visible, -torch.inf)
            if site.sinks is not None:
                sink = site.sinks[h].float().expand(len(logits), n, 1)
                logits = torch.cat([logits, sink], -1)
            weights += logits.softmax(-1).nan_to_num(0.0)[..., :n]
        # A mean of all layers and heads orders keys as their sum does.
        shared[_WEIGHTS] = shared[_WEIGHTS] + weights if _WEIGHTS in shared else weights
        if site.layer == site.depth - 1:
            found = site.learned.module
            assert isinstance(found, Controller)
            with torch.enable_grad(), without_autocast(q):
                site.learned.losses["labels"] = lesson(found, states, shared[_WEIGHTS], seen, self.positives)

    def __call__(self, site: CacheSite) -> Tensor:
        """The importance that was judged before this forward."""
        sigma: Tensor = site.learned.shared[_SIGMA]
        b, heads, n = site.extent
        if site.slots is None:
            return sigma[:, None, :n].expand(b, heads, n)
        slots = site.slots.long().clamp(max=sigma.shape[1] - 1).expand(b, heads, n)
        return sigma[:, None].expand(-1, heads, -1).gather(2, slots)


@register("adore")
@dataclass(frozen=True)
class ADORE(CachePolicy):
    """A controller judges by embeddings which tokens stay in all layers, and brings released ones back for a while.

    The controller is trained once a model. Without training its choices are noise: train first, or apply what
    ``tokred.load`` gives. The model itself is not trained for it, as the paper does.

    Args:
        budget: past tokens that stay beside the newest one; or a share of the prompt's, the newest counted.
        rebuild: released tokens that are computed again before each generated token.
        sinks: first tokens, which are never released.
        positives: tokens that are to be kept of a query in training; None: as many as stay.
        size, hidden: channels of the controller's states, and inside of its judgement.

    Source: Zhang et al., ADORE, Findings of ACL 2024 (arXiv 2407.02328), section 3.
    """

    summary: ClassVar[str] = "tokens released and rebuilt as a trained controller says"
    source: ClassVar[str] = "Zhang et al., Findings of ACL 2024 (arXiv 2407.02328)"
    example: ClassVar[Parameters] = {"budget": 8, "rebuild": 2, "size": 8, "hidden": 8}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: float | int = 192
    rebuild: int = 8
    sinks: int = 0
    positives: int | None = None
    size: int = 128
    hidden: int = 128

    def __post_init__(self) -> None:
        if not is_count(self.budget, 1):
            check_share(self.budget, "budget, where it is no whole number of tokens,")
        for name, least in (("rebuild", 0), ("sinks", 0), ("size", 1), ("hidden", 1)):
            check_count(getattr(self, name), name, least)
        if self.positives is not None:
            check_count(self.positives, "positives", 1)
        if is_count(self.budget, 1) and self.sinks > self.budget:
            raise ValueError(f"a budget of {self.budget} tokens cannot hold the {self.sinks} first ones")

    @property
    def parts(self) -> Parts:
        """The controller's judgement, a number of rows, and every token generated."""
        wanted = self.budget if self.positives is None else self.positives
        amount = self.budget if isinstance(self.budget, float) else self.budget + 1
        score = Released(self.rebuild, wanted, self.size, self.hidden)
        return Parts(score, Uniform(amount), when=When(every=1), sinks=self.sinks, recent=1, store=Rectangle())

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Unless everything is to stay."""
        return self.budget != 1.0 or not isinstance(self.budget, float)
