"""Mixture-of-Recursions: a language model whose shared layers run as often on each token as its routers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice, check_number
from tokred.kernels.gather_rows import gather_rows
from tokred.learn.models.blocks import Answer, Block, Cache, Rows, Tokens, begin, check_sizes, started, written
from tokred.learn.models.choice import (
    balance_loss,
    capacities,
    check_capacity,
    moved,
    selection_loss,
    some_of,
    top,
    used,
    z_loss,
)

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
Select = Literal["top_k", "threshold"]
Tying = Literal["average", "stepwise", "lower", "upper"]


@dataclass(frozen=True)
class MoRConfig:
    """A Mixture-of-Recursions.

    Args:
        vocabulary: number of words.
        width, heads, key_heads, inner: of the layers.
        layers: ``L``, as many as run on a token that takes every recursion.
        recursions: ``R``, how often the shared layers run at most; it divides ``L``, or ``L - 2`` with layers of their
            own at both ends (``middle_``).
        sharing: which layers have one set of weights: ``"cycle"``, those of a stack that is run ``R`` times;
            ``"sequence"``, each ``R`` in a row; ``"middle_cycle"`` and ``"middle_sequence"``, the same between a first
            and a last layer of their own.
        route: ``"expert"``, each recursion takes its share of the tokens; ``"token"``, each token takes its depth.
        capacity: share of the tokens that each recursion takes, not increasing; None: ``(R - r) / R``.
        router: ``"linear"``, or ``"mlp"`` with a layer of twice the width, which the released code also has by the
            name ``"wide_mlp"``.
        gate: what the output of a recursion is multiplied by, of the router's logit: ``"sigmoid"``, ``"tanh"``,
            ``"none"``, or of all depths' logits ``"softmax"``; None: ``"sigmoid"`` by experts, ``"softmax"`` by tokens.
        alpha: factor of the gate; None: 0.1, of a softmax 1.
        update: ``"add"``, a token is ``x + gate * f(x)`` behind a recursion; ``"replace"``, ``gate * f(x)``, which with
            all capacities 1 and no gate is a plain recursive transformer (``f`` has residuals of its own). By tokens
            states between recursions are replaced in any case.
        sampling: how a threshold for inference is learned, by experts: ``"aux_loss"``, the router itself by the
            selection; ``"aux_router"``, a second one on detached states; ``"none"``, no inference.
        coefficient: weight of that loss.
        balancing: by tokens: ``"loss"``, a term of weight ``balance``; ``"loss_free"``, a bias for the choice alone,
            moved by ``step`` in each forward in training.
        balance, step: see there.
        z: weight of the square of the logits' size; 0: no such term.
        kv: ``"cache"``, a recursion attends to the tokens that it runs on; ``"share"``, to keys and values of all
            tokens, which recursion 0 made.
        temperature: divides what a router reads.
        deviation: of the first weights.

    Raises:
        ValueError: a value is out of range, or does not go with the others; the message names it.

    Source: Mixture-of-Recursions, NeurIPS 2025 (arXiv 2507.10524). Inference by a threshold, the stop of a loop that no
        token is left in, and padding are ours.
    """

    vocabulary: int
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    inner: int = 128
    layers: int = 8
    recursions: int = 3
    sharing: Sharing = "middle_cycle"
    route: Literal["expert", "token"] = "expert"
    capacity: tuple[float, ...] | None = None
    router: Literal["linear", "mlp", "wide_mlp"] = "linear"
    gate: Literal["sigmoid", "tanh", "none", "softmax"] | None = None
    alpha: float | None = None
    update: Literal["add", "replace"] = "add"
    sampling: Literal["aux_loss", "aux_router", "none"] = "aux_loss"
    coefficient: float = 0.001
    balancing: Literal["loss", "loss_free"] = "loss"
    balance: float = 0.1
    step: float = 0.001
    z: float = 0.0
    kv: Literal["cache", "share"] = "cache"
    temperature: float = 1.0
    deviation: float = 0.02

    def __post_init__(self) -> None:
        check_sizes(self, "inner", "layers", "recursions")
        check_choice(self.sharing, "sharing", ("cycle", "sequence", "middle_cycle", "middle_sequence"))
        between = self.layers - 2 * self.own_ends
        if between < 1 or between % self.recursions:
            raise ValueError(
                f"recursions must divide the {between} shared layers (layers={self.layers}, sharing={self.sharing!r}), "
                f"got recursions={self.recursions}"
            )
        check_choice(self.route, "route", ("expert", "token"))
        check_choice(self.router, "router", ("linear", "mlp", "wide_mlp"))
        gates = ("sigmoid", "tanh", "none") if self.route == "expert" else ("sigmoid", "softmax")
        if self.gate is not None:
            check_choice(self.gate, f"gate with route={self.route!r}", gates)
        check_choice(self.update, "update", ("add", "replace"))
        check_choice(self.sampling, "sampling", ("aux_loss", "aux_router", "none"))
        check_choice(self.balancing, "balancing", ("loss", "loss_free"))
        check_choice(self.kv, "kv", ("cache", "share"))
        for name in ("coefficient", "balance", "step", "z"):
            if check_number(getattr(self, name), name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name in ("temperature", "deviation"):
            if check_number(getattr(self, name), name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.alpha is not None:
            check_number(self.alpha, "alpha")
        if self.capacity is not None:
            object.__setattr__(self, "capacity", tuple(self.capacity))  # of a list, as files have it
            check_capacity(self.shares, self.recursions, self.kv)

    @property
    def own_ends(self) -> bool:
        """True if the first and the last layer are shared with none."""
        return self.sharing.startswith("middle")

    @property
    def shares(self) -> tuple[float, ...]:
        """Capacity of each recursion."""
        return capacities(self.recursions) if self.capacity is None else self.capacity

    @property
    def gated(self) -> str:
        """Gate in use."""
        return self.gate or ("sigmoid" if self.route == "expert" else "softmax")

    @property
    def factor(self) -> float:
        """Factor of the gate in use."""
        return self.alpha if self.alpha is not None else 1.0 if self.gated == "softmax" else 0.1

    @property
    def weights_of(self) -> tuple[int, ...]:
        """For each shared layer that runs, in order, the number of the one whose weights it has."""
        between = self.layers - 2 * self.own_ends
        depth = between // self.recursions
        if self.sharing.endswith("sequence"):
            return tuple(i // self.recursions for i in range(between))
        return tuple(i % depth for i in range(between))


class Router(nn.Module):
    """Logits of tokens, from their states."""

    def __init__(self, config: MoRConfig, out: int) -> None:
        super().__init__()
        width = config.width
        self.temperature = config.temperature
        self.layers = (
            nn.Sequential(nn.Linear(width, out, bias=False))
            if config.router == "linear"
            else nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, C)`` to ``(B, M, out)`` float32."""
        return self.layers(x / self.temperature).float()  # type: ignore[no-any-return]


class MoR(nn.Module):
    """A language model of shared layers. In training recursions take their shares, in evaluation all above a threshold.

    Args:
        config: see :class:`MoRConfig`.
    """

    bias: Tensor

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        made = 1 + max(c.weights_of)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.key_heads, c.inner) for _ in range(made))
        ends = 2 if c.own_ends else 0
        self.ends = nn.ModuleList(Block(c.width, c.heads, c.key_heads, c.inner) for _ in range(ends))
        by_token = c.route == "token"
        self.routers = nn.ModuleList(
            Router(c, c.recursions if by_token else 1) for _ in range(1 if by_token else c.recursions)
        )
        second = c.recursions if not by_token and c.sampling == "aux_router" else 0
        self.deciders = nn.ModuleList(Router(c, 1) for _ in range(second))
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        # saved with the weights: a bias that starts anew at a resumption would send tokens elsewhere
        self.register_buffer("bias", torch.zeros(c.recursions))
        started(self, c.deviation)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        select: Select | None = None,
        capacity: Sequence[float] | None = None,
    ) -> Answer:
        """Logits of the next words.

        Args:
            ids: ``(B, N)`` int64.
            mask: ``(B, N)`` bool, False on padding, which no recursion takes; None: there is none.
            cache: of the tokens before, extended; None: there are none.
            select: by experts: ``"top_k"``, each recursion's share of the best, which looks at the whole text;
                ``"threshold"``, what the router says of each token alone; None: the first in training.
            capacity: shares for this forward instead of the configuration's, such as
                :func:`tokred.learn.models.choice.warmed` gives.

        Raises:
            ValueError: an argument does not fit, or the model has no threshold.
        """
        c = self.config
        select = select or ("top_k" if self.training else "threshold")
        check_choice(select, "select", ("top_k", "threshold"))
        shares = c.shares if capacity is None else tuple(capacity)
        check_capacity(shares, c.recursions, c.kv)
        if c.route == "expert":
            if select == "top_k" and cache is not None:
                raise ValueError("select='top_k' chooses among all tokens of a text: it cannot go on from a cache")
            if select == "threshold" and c.sampling == "none" and shares[-1] < 1:
                raise ValueError("a model with sampling='none' learns no threshold: give select='top_k'")
        tokens = begin(ids, mask, cache)
        x = self.embedding(ids)
        if c.own_ends:
            x, _ = self.ends[0](x, tokens, 0, cache)
        if c.route == "expert":
            x, depths, losses = self._by_experts(x, tokens, cache, select, shares)
        else:
            x, depths, losses = self._by_tokens(x, tokens, cache)
        if c.own_ends:
            x, _ = self.ends[1](x, tokens, len(c.weights_of) + 1, cache)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return Answer(logits, losses, depths)

    def generate(self, ids: Tensor, steps: int, mask: Tensor | None = None) -> Tensor:
        """``(B, N + steps)`` ids, the most probable word after the other, with a cache."""
        return written(partial(self, select="threshold"), ids, steps, mask)

    @torch.no_grad()
    def tie(self, stack: Sequence[nn.Module], how: Tying = "average") -> None:
        """Take over the weights of ``L`` trained blocks.

        Args:
            stack: such as the ``blocks`` of a model with ``recursions=1`` and ``sharing="cycle"``.
            how: ``"average"``, of the layers that share weights; ``"lower"`` and ``"upper"``, the first and the last
                ones; ``"stepwise"``, evenly spaced ones.

        Raises:
            ValueError: the stack has another depth.
        """
        check_choice(how, "how", ("average", "stepwise", "lower", "upper"))
        if len(stack) != self.config.layers:
            raise ValueError(f"stack must have {self.config.layers} blocks, got {len(stack)}")
        between = list(stack)
        if self.config.own_ends:
            for end, given in zip(self.ends, (between[0], between[-1]), strict=True):
                end.load_state_dict(given.state_dict())
            between = between[1:-1]
        made, n = len(self.blocks), len(between)
        for i, block in enumerate(self.blocks):
            among = {
                "average": [at for at, own in enumerate(self.config.weights_of) if own == i],
                "stepwise": [round(i * (n - 1) / max(made - 1, 1))],
                "lower": [i],
                "upper": [n - made + i],
            }[how]
            states = [between[at].state_dict() for at in among]
            block.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})

    # ------------------------------------------------------------------ recursions

    def _recursion(self, r: int, h: Tensor, tokens: Tokens, cache: Cache | None, first: list[Rows]) -> Tensor:
        """``(B, M, C)`` states behind the shared layers; ``first`` has the rows of recursion 0, which fills it."""
        depth = len(self.config.weights_of) // self.config.recursions
        for j in range(depth):
            at = r * depth + j
            shared = first[j] if r and self.config.kv == "share" else None
            h, rows = self.blocks[self.config.weights_of[at]](h, tokens, at + 1, cache, shared)
            if r == 0:
                first.append(rows)
        return h

    def _gate(self, logits: Tensor) -> Tensor | None:
        if self.config.gated == "none":
            return None
        found = logits.sigmoid() if self.config.gated == "sigmoid" else logits.tanh()
        return self.config.factor * found

    def _by_experts(
        self, x: Tensor, tokens: Tokens, cache: Cache | None, select: Select, shares: Sequence[float]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Each recursion takes some of the tokens that the one before took."""
        c, lengths = self.config, tokens.real.sum(1)
        at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        real, depths = tokens.real, torch.zeros_like(tokens.ids)
        losses = {"router": x.new_zeros((), dtype=torch.float32)} if self.training else {}
        first: list[Rows] = []
        for r in range(c.recursions):
            h = gather_rows(x, at)
            logits = self.routers[r](h).squeeze(2)
            decided = self.deciders[r](h.detach()).squeeze(2) if len(self.deciders) else logits
            if select == "top_k":
                chosen = top(logits, real, lengths, shares[r])
            else:
                # where all are to go on, no threshold was learned
                chosen = some_of(real if shares[r] >= 1 else real & (decided > 0))
            if self.training and c.sampling != "none":
                losses["router"] = losses["router"] + c.coefficient * selection_loss(decided, chosen.mask, real)
            if self.training and c.z:
                losses["z"] = losses.get("z", 0) + c.z * z_loss(logits.unsqueeze(2), real)
            if chosen.at.shape[1] == 0:
                break
            gate = self._gate(logits.gather(1, chosen.at))
            at, real = at.gather(1, chosen.at), chosen.real
            run = partial(self._recursion, r, tokens=tokens.some(at, real), cache=cache, first=first)
            gate = None if gate is None else gate.to(x.dtype)
            x = moved(x, at, real, gate, run, c.update == "add")
            depths = depths.scatter_add(1, at, real.long())
        return x, depths, losses

    def _by_tokens(self, x: Tensor, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Each token takes its depth beforehand."""
        c, real = self.config, tokens.real
        logits = self.routers[0](x)
        shares = c.factor * (logits.softmax(-1) if c.gated == "softmax" else logits.sigmoid())
        free = c.balancing == "loss_free"
        depth = (shares.detach() + (self.bias if free else 0)).argmax(-1)
        losses: dict[str, Tensor] = {}
        if self.training and free:
            with torch.no_grad():
                self.bias += c.step * (1 / c.recursions - used(depth, real, c.recursions)).sign()
        elif self.training:
            losses["balance"] = c.balance * balance_loss(shares, depth, real)
        if self.training and c.z:
            losses["z"] = c.z * z_loss(logits, real)
        state = x
        first: list[Rows] = []
        for r in range(c.recursions):
            chosen = some_of(real & (depth >= r))
            if chosen.at.shape[1] == 0:
                break
            run = partial(self._recursion, r, tokens=tokens.some(chosen.at, chosen.real), cache=cache, first=first)
            state = moved(state, chosen.at, chosen.real, None, run, add=False)
        # a token whose depth is reached stays as it is, so that this is behind the last recursion of each
        share = shares.gather(2, depth.unsqueeze(2)).to(x.dtype)
        return torch.where(real.unsqueeze(2), x + share * state, x), (depth + 1) * real, losses
