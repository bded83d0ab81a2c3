"""``Method``: what every token-reduction method is: validated parameters, a declaration, and ``reduce(site)``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from tokred.core.learned import Facts, Weights
from tokred.core.origin import Origin
from tokred.core.reduction import Reduction
from tokred.core.schedules import Constant, Inflect, PerLayer
from tokred.core.settings import call
from tokred.core.site import READS, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

Parameters = Mapping[str, Any]  # by their names


class Idle(NamedTuple):
    """The reason why a method never removes anything.

    Attributes:
        parameter: that decides it; empty where no single one does.
        text: in words.
        meant: whether the parameter was set to something that removes nothing, rather than left as it is by default.
    """

    parameter: str
    text: str
    meant: bool


class Method(ABC):
    """Base of all methods: subclasses are frozen dataclasses of their parameters.

    A method derives from the base of its stage (:class:`tokred.BlockMethod` and its like), is registered on its own
    line by ``@tokred.register("name")`` and states in class attributes what a host has to do for it; it never asks
    which host it runs on.

    Attributes:
        name: the registered name.
        stage: where it acts, one of the six stages.
        summary: one line for ``tokred list``.
        source: paper and section.
        lacks: parameters that other methods have and this one cannot have, with the reason.
        usual: where the defaults remove nothing, the parameter that has to be given, at a usual value, or ``...``
            where no value is usual.
        example: settings that remove something on a small model (some 26 tokens, three or four layers). With the next
            ones they are how tests, ``tokred doctor`` and benchmarks find a method.
        nothing: settings that never remove anything; None where there are none.
        gradients: whether gradients pass through the decision; where they do not, bases record none around it.
        loaded: what :meth:`module` is loaded with when the method is applied; None: it starts anew. No parameter, so
            ``dataclasses.replace`` leaves it behind.
        origin: where it was saved, and how it was applied there; None: it was not loaded. No parameter either.
        version: raised when a parameter changes meaning, so that stored settings can be read.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage]
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    lacks: ClassVar[Mapping[str, str]] = {}
    usual: ClassVar[Parameters] = {}
    example: ClassVar[Parameters] = {}
    nothing: ClassVar[Parameters | None] = None
    gradients: ClassVar[bool] = False
    version: ClassVar[int] = 1
    loaded: Weights | None = None
    origin: Origin | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Names of the attributes that :meth:`reduce` takes from the site; may depend on the parameters."""
        return frozenset({"x"})

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods of single stages that this one is made of; itself, unless it acts at several stages."""
        return (self,)

    def module(self, facts: Facts) -> nn.Module | None:
        """A new module with the weights that this method learns, for one model; None: it has none.

        The host holds it and hands it to :meth:`reduce` as ``site.learned.module``; such a method reads ``"module"``.
        """
        return None

    def compare(self, guesses: Sequence[Tensor], targets: Any) -> dict[str, Tensor]:
        """Terms of the training loss, scalars by name, from what the method said of the targets of a batch.

        Args:
            guesses: ``site.learned.guesses`` of all layers of one forward, in their order.
            targets: of the same batch, as the user gave them.
        """
        return {}

    def recording(self) -> AbstractContextManager[Any]:
        """Around a decision: gradients are recorded only where :attr:`gradients` says that they pass."""
        return nullcontext() if self.gradients else torch.no_grad()

    @abstractmethod
    def reduce(self, site: Site) -> Reduction:
        """Decide, at one site, what becomes of its tokens."""

    def check(self, depth: int) -> None:  # noqa: B027 - most methods fit every depth
        """Refuse a model of ``depth`` layers that the parameters do not fit.

        Raises:
            ValueError: for example, a schedule is longer than the model is deep.
        """

    @abstractmethod
    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """True if these settings remove something from some input of a model.

        Args:
            depth: of the model.
            layers: where the method may act; None: everywhere.
        """

    def why_idle(self, depth: int, layers: Iterable[int] | None = None) -> Idle | None:
        """The reason why nothing is ever removed, and what to give; None where these settings remove something.

        Args:
            depth: of the model.
            layers: where the method may act; None: everywhere.
        """
        places = tuple(range(depth) if layers is None else layers)
        if self.removes(depth, places):
            return None
        for name, value in self._defaults().items():
            if value is ... or self._would_remove(name, value, depth, places):
                such = "" if value is ... else f", such as tokred.apply(model, {self.name!r}, {name}={_shown(value)})"
                text = f"{self.name} removes nothing at {name}={_shown(getattr(self, name))}: give {name}=...{such}"
                return Idle(name, text, getattr(self, name) != getattr(type(self)(), name))
        where = "" if len(places) == depth else f" in the {len(places)} chosen"
        return Idle("", f"{self.name} removes nothing{where} of {depth} layers at these settings: {self}", False)

    def _would_remove(self, name: str, value: Any, depth: int, places: tuple[int, ...]) -> bool:
        try:
            other = dataclasses.replace(self, **{name: value})  # type: ignore[type-var]
        except (TypeError, ValueError):
            return False  # does not go with the other parameters
        return other.removes(depth, places)

    def _defaults(self) -> dict[str, Any]:
        """Values to propose instead: the usual ones, and defaults that the parameters differ from."""
        known = {f.name: f for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        if any(f.default is dataclasses.MISSING for f in known.values()):
            return {}
        usual = type(self)()
        found = {name: getattr(usual, name) for name in known}
        return {**{n: v for n, v in found.items() if v != getattr(self, n)}, **self.usual}

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values: ``{"method": name, "version": 1, "parameters": {...}}``."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return {"method": self.name, "version": self.version, "parameters": values}

    def __repr__(self) -> str:
        """The call that makes it, with what differs from the defaults: ``ToMe(r=13)``."""
        return call(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            # ``dataclass`` writes one of its own into every class that has none in itself.
            cls.__repr__ = Method.__repr__  # type: ignore[method-assign]
        declared = cls.__dict__.get("reads")
        if isinstance(declared, frozenset) and not declared <= set(READS):
            raise TypeError(f"{cls.__name__}.reads names {sorted(declared - set(READS))}; known are {READS}")


def _shown(value: Any) -> str:
    """A parameter as users write it."""
    plain = _plain(value)
    return repr(plain.get("amount", plain) if isinstance(plain, dict) else plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, Inflect):
        return {"inflect": [value.value, value.inflect]}
    if isinstance(value, PerLayer):
        return list(value.values)
    return list(value) if isinstance(value, tuple) else value


def from_dict(settings: Mapping[str, Any]) -> Method:
    """The method that :meth:`Method.to_dict` wrote down.

    Raises:
        UnknownMethodError: no such method is registered.
        TypeError: the settings are no mapping with a name under ``"method"`` and a mapping under ``"parameters"``.
        ValueError: the settings were written by a newer version of the method.
    """
    from tokred.core.registry import methods

    if not isinstance(settings, Mapping) or not isinstance(settings.get("method"), str):
        raise TypeError(f'settings are {{"method": name, "parameters": {{...}}}}, as to_dict() gives, got {settings!r}')
    given = settings.get("parameters", {})
    if not isinstance(given, Mapping):
        raise TypeError(f"the parameters of {settings['method']!r} must be a mapping by their names, got {given!r}")
    cls = methods.get(settings["method"])
    if settings.get("version", 1) > cls.version:
        raise ValueError(
            f"settings of {settings['method']!r} have version {settings['version']}, "
            f"this tokred reads up to {cls.version}"
        )
    values = dict(given)
    for key, value in values.items():
        if isinstance(value, dict) and set(value) == {"inflect"}:
            values[key] = tuple(value["inflect"])
    return cls(**values)
