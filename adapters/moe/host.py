"""The host record of transformers' mixtures of experts: which layers have a router that tokred knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import terms, words
from tokred.adapters.host import Host
from tokred.adapters.moe.families import ROUTERS
from tokred.adapters.moe.session import EnterDecoder, EnterLayer, Record, Routed, Session, Spot, body
from tokred.adapters.swap import argument_names, check_entrance, host_class, unchanged
from tokred.adapters.watch import Watch, hang
from tokred.core.experts import ExpertMethod, ExpertsReport, RoutingReport
from tokred.core.method import Method
from tokred.errors import NothingRecordedError, UnsupportedModelError


class Layer(NamedTuple):
    """One layer of experts.

    Attributes:
        name: in the decoder.
        block: router and experts together.
        router: what chooses.
        experts: what runs.
        experts_name: in the decoder.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    experts_name: str


@dataclass
class MixtureHost(Host):
    """A decoder with layers of experts.

    Attributes:
        family: for messages, such as ``"transformers MixtralModel"``.
        model: the decoder.
        layers: those that have experts.
        supplies: what sites hand over.
    """

    family: str
    model: nn.Module
    layers: list[Layer]
    supplies: frozenset[str] = frozenset({"router"})
    stage: str = "experts"

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of each layer of experts."""
        return [(layer.name, layer.block) for layer in self.layers]

    @property
    def depth(self) -> int:
        """Number of layers of experts."""
        return len(self.layers)

    @property
    def how(self) -> str:
        """How methods run here, for the table of support."""
        return f"{self.family}, between router and experts of {self.depth} layers"

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            TypeError: it acts at this one, and is none of its methods.
            UnsupportedModelError: experts cannot be patched, or lie on several devices.
            ValueError: its parameters do not fit the model, or ``expose`` is given.
        """
        self.check_stage(method)
        if not isinstance(method, ExpertMethod):
            raise TypeError(f"{method.name!r} acts on experts and has to derive from tokred.core.experts.ExpertMethod")
        if expose != "auto":
            raise ValueError(f"expose is for methods of blocks; experts keep the stream as it is, got {expose!r}")
        self.check_reads(method)
        spread = words.SPREAD.part(words.CONFIG.part(self.model))
        if spread is not None and words.APART.part(spread, False):
            raise UnsupportedModelError(
                f"the experts of {self.family} lie on several devices (expert parallelism), each of which sees a "
                "part of the pairs: load the model without it"
            )
        for layer in self.layers:
            check_entrance(layer.experts, layer.experts_name)
            # parameters that do not fit the number of experts are refused here, not in the first forward
            method.spares(int(words.CHOSEN_EXPERTS.need(layer.router)), int(words.EXPERT_COUNT.need(layer.router)))
        method.check(self.depth)

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> Session:
        """Hang hooks on decoder, layers and routers; exchange the class of experts. :meth:`check` has passed."""
        assert isinstance(method, ExpertMethod)
        session = Session(method, self.depth, self.family)
        sites: dict[str, str] = {}
        changes.before(self.model, EnterDecoder(session, argument_names(self.model)), with_kwargs=True)
        for i, layer in enumerate(self.layers):
            if where is not None and not where(layer.name, layer.block):
                continue
            spot = Spot(session, i, str(len(sites)))
            sites[spot.site] = layer.experts_name
            changes.before(layer.block, EnterLayer(session), with_kwargs=True)
            # in this order: were the exchange refused, no router would give out experts that nobody knows
            changes.swap(layer.experts, body, spot)
            changes.after(layer.router, Routed(session, i, _normalised(layer.router)))
        session.watch = Watch(self.family, sites)
        changes.swap(self.model, unchanged, session)
        hang(self.model, session.watch, changes)
        return session

    def report(self, state: Session, methods: Sequence[Method]) -> RoutingReport:
        """The pairs of token and expert of every layer."""
        if not state.records:
            raise NothingRecordedError(
                "nothing is recorded: run one forward of the patched model first (compiled ones keep no record)"
            )
        rows = tuple(_row(i, self.layers[i].name, state.records[i]) for i in sorted(state.records))
        return RoutingReport(self.family, state.method, rows)


def _row(layer: int, name: str, record: Record) -> ExpertsReport:
    asked, ids, kept, experts = record
    tokens, per_token = asked.shape

    def largest(sent: Tensor) -> int:
        return int(sent.bincount(minlength=experts).max()) if tokens else 0

    left = int(kept.sum())
    without = int((~kept.any(1)).sum())
    return ExpertsReport(
        layer, name, tokens, tokens * per_token, left, largest(asked.reshape(-1)), largest(ids[kept]), without
    )


def _normalised(router: nn.Module) -> bool:
    kind = _kind(router)
    return kind == "always" or bool(words.NORMALISED.need(router))


def _kind(router: nn.Module) -> str | None:
    """The entry of a router's class in the table; None where it has none."""
    mine = (c.__name__ for c in host_class(router).__mro__ if c.__module__.startswith("transformers."))
    return next((ROUTERS[name] for name in mine if name in ROUTERS), None)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any, Any]]:
    """Layers with a router and experts: name, module, and the two."""
    for name, module in model.named_modules():
        router, experts = words.ROUTER.part(module), words.EXPERTS.part(module)
        if isinstance(router, nn.Module) and isinstance(experts, nn.Module):
            yield name, module, router, experts


def match(model: nn.Module) -> MixtureHost | None:
    """The host record of a decoder with layers of experts; None when ``model`` is none, or holds one further inside.

    Raises:
        UnsupportedModelError: its routers are of no class that tokred knows.
    """
    if not _is_model(model):
        return None
    found = list(_layers(model))
    inner = [name for name, module in model.named_modules() if name and _is_model(module)]
    if not found or any(name.startswith(f"{outer}.") for outer in inner for name, *_ in found):
        return None
    family = f"transformers {host_class(model).__name__}"
    strange = next((router for *_, router, _ in found if _kind(router) is None), None)
    if strange is not None:
        raise UnsupportedModelError(
            f"the routers of {family} are {host_class(strange).__name__}, whose scores are no plain softmax that "
            f"tokred knows (it knows {', '.join(ROUTERS)})"
        )
    layers = [
        Layer(name, block, router, experts, f"{name}.{words.EXPERTS.spelled(block)}".lstrip("."))
        for name, block, router, experts in found
    ]
    return MixtureHost(family, model, layers)


def _is_model(module: nn.Module) -> bool:
    return terms.PRETRAINED.among([c.__name__ for c in host_class(module).__mro__])
