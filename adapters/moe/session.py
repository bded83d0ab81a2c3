"""State that the patched layers of experts of one model share, and what runs inside them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.host import State
from tokred.adapters.passes import check_not_mapped
from tokred.adapters.records import Records
from tokred.adapters.swap import SETTINGS, Hook
from tokred.adapters.watch import Watch
from tokred.core.experts import ExpertMethod, ExpertSite, Routing
from tokred.errors import UnsupportedModelError


class Record(NamedTuple):
    """Routing of one layer in the last forward, on the device until a report asks.

    Attributes:
        asked: ``(T, k)`` int64, the router's choice.
        ids, kept: as the method left it.
        experts: their number.
    """

    asked: Tensor
    ids: Tensor
    kept: Tensor
    experts: int


class Running(threading.local):
    """State of the forward that each thread runs: several may use one model.

    Attributes:
        mask: of padding.
        shape: samples, and tokens of each, in the layer of experts at hand.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.shape = (1, 0)


class Session(State):
    """State of one decoder. Copies and pickles start without a record.

    Args:
        method: what decides.
        depth: number of layers of experts.
        family: for messages.
    """

    stage = "experts"

    def __init__(self, method: ExpertMethod, depth: int, family: str) -> None:
        self.method, self.depth, self.family = method, depth, family
        self.watch = Watch()
        self._forget()

    def _forget(self) -> None:
        self.running = Running()
        self.records: Records[int, Record] = Records()  # of the layers of the last forward

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("running", "records")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def real(self) -> Tensor | None:
        """``(T,)`` bool, the tokens that are no padding; None: nothing is known of padding."""
        (b, n), mask = self.running.shape, self.running.mask
        if mask is None or mask.shape[0] != b or mask.shape[1] < n:
            return None
        return mask[:, mask.shape[1] - n :].reshape(-1).bool()


class EnterDecoder(Hook):
    """Before a forward of the decoder: notes which tokens are padding."""

    def __init__(self, session: Session, names: tuple[str, ...]) -> None:
        self.session, self.names = session, names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        check_not_mapped()
        mask = words.ATTENTION_MASK.of(given)
        # masks of other shapes were made by the user or for a static cache; padding cannot be read from them
        padded = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        again = module.training and torch.is_grad_enabled() and bool(words.CHECKPOINTS.part(module, False))
        if padded is not None and again and not bool(padded.all()):
            raise UnsupportedModelError(
                "gradient checkpointing runs layers of experts again behind the forward, where it is not known any "
                "more which tokens were padding: turn it off, or give batches without padding"
            )
        self.session.running.mask = None if again else padded
        if not torch.compiler.is_compiling():
            self.session.records.begin()


class EnterLayer(Hook):
    """Before a layer of experts, which flattens its tokens: notes how many samples of how many tokens they are."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if states is not None:
            n = states.shape[0]
            self.session.running.shape = (1, n) if states.ndim == 2 else (n, states.shape[1])


class Routed(Hook):
    """Behind a router: the method's routing instead of the router's. Dropped pairs get the expert -1 and no weight.

    Args:
        session: shared by all layers.
        layer: among those of experts.
        normalised: whether the weights of a token sum to one.
    """

    def __init__(self, session: Session, layer: int, normalised: bool) -> None:
        self.session, self.layer, self.normalised = session, layer, normalised

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        session = self.session
        if not _is_routing(output):
            raise UnsupportedModelError(
                f"the router of layer {self.layer} of {session.family} gave no logits, weights and ids: tokred does "
                "not know this version of it"
            )
        logits, weights, ids = output
        if session.method.spares(ids.shape[1], logits.shape[1]):
            routing = Routing(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            b, n = session.running.shape
            # a router that is called by itself has tokens of which no layer told
            samples, real = (b, session.real()) if b * n == ids.shape[0] else (1, None)
            site = ExpertSite(logits, ids, samples=samples, real=real, layer=self.layer, depth=session.depth)
            routing = session.method.route(site)
            weights = weighed(site, weights, routing, self.normalised)
        if not torch.compiler.is_compiling():
            session.records.put(self.layer, Record(ids, routing.ids, routing.kept, logits.shape[1]))
        return logits, weights, torch.where(routing.kept, routing.ids, -1)


def _is_routing(output: Any) -> bool:
    """True for ``(T, E)`` logits, ``(T, k)`` weights and as many ids."""
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(x, Tensor) for x in output):
        return False
    logits, weights, ids = output
    whole = not ids.is_floating_point() and logits.is_floating_point() and logits.ndim == ids.ndim == 2
    return bool(whole and weights.shape == ids.shape and logits.shape[0] == ids.shape[0])


def weighed(site: ExpertSite, weights: Tensor, routing: Routing, normalised: bool) -> Tensor:
    """``(T, k)`` weights of a routing. Tokens whose experts are the host's keep the host's, bit for bit.

    Args:
        site: the layer.
        weights: ``(T, k)`` as the host made them.
        routing: the method's.
        normalised: whether those of a token sum to one.
    """
    same = (routing.kept & (routing.ids == site.ids)).all(1, keepdim=True)
    own = site.scores.gather(1, routing.ids) * routing.kept
    if normalised:
        own = own / own.sum(1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    return torch.where(same, weights, own.to(weights.dtype))


@dataclass
class Spot:
    """The experts of one layer.

    Attributes:
        session: shared by all layers.
        layer: among those of experts.
        site: by which the watch knows it.
    """

    session: Session
    layer: int
    site: str


def body(host: Any) -> dict[str, Any]:
    """The methods of patched experts."""

    def forward(self: nn.Module, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        spot: Spot = self.__dict__[SETTINGS]
        spot.session.watch.ran(spot.site)
        return on_pairs(lambda *given: host.forward(self, *given), states, ids, weights)

    return {"forward": forward}


def on_pairs(forward: Callable[..., Tensor], states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts' output for the pairs that are left: the host's own forward on one row for each.

    Args:
        forward: the host's, of ``(S, C)`` states, ``(S, k)`` ids and ``(S, k)`` weights.
        states: ``(T, C)``.
        ids: ``(T, k)`` int64, -1 on dropped pairs.
        weights: ``(T, k)``, zero on dropped pairs.
    """
    kept = ids >= 0
    if torch.compiler.is_compiling():  # whose shapes do not depend on values: dropped pairs run with no weight
        return forward(states, ids.clamp(min=0), weights)
    # the one look at values here; the host's own loop over experts has as many as there are experts
    rows, places = kept.nonzero(as_tuple=True)
    if rows.shape[0] == ids.numel():
        return forward(states, ids, weights)
    pairs = states.new_zeros(ids.numel(), states.shape[1], dtype=torch.float32)
    if rows.shape[0]:
        one = (states[rows], ids[rows, places].unsqueeze(1), weights[rows, places].unsqueeze(1))
        # in place of an atomic sum, whose order would differ from run to run on a GPU
        pairs = pairs.index_copy(0, rows * ids.shape[1] + places, forward(*one).float())
    return pairs.view(*ids.shape, -1).sum(1).to(states.dtype)
