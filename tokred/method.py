"""``Method``: what every token-reduction method is: validated parameters, a declaration, and ``reduce(site)``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tokred.reduction import Reduction
from tokred.schedules import Constant, Inflect, PerLayer
from tokred.site import READS, Site, Stage

Where = Literal["mid", "end", "queries"]


class Method(ABC):
    """Base of all methods: subclasses are frozen dataclasses of their parameters.

    A subclass is registered on its own line by ``@tokred.register("name")`` and states in class attributes what a host
    has to do for it; it never asks which host it runs on.

    Attributes:
        name: the registered name.
        stage: where it acts, one of the five stages.
        summary: one line for ``tokred list``.
        source: paper and section.
        drops: whether tokens can vanish (rather than live on in another), which decides how outputs are restored.
        where: the place in a block that suits the method: ``"mid"``, between attention and MLP (hosts whose blocks
            cannot be split reduce at their end); ``"end"``, after the block; ``"queries"``, inside the attention, whose
            queries are reduced while keys and values stay complete.
        uneven: whether samples of one batch may keep different numbers, told apart by the mask of the reduction.
        by_mask: whether :meth:`reduce` decides on batches that are padded from the start, by the mask of the site;
            where not, hosts of such batches ask it about each sample alone.
        clips: whether a method that reads the grid goes on with it frame after frame where the tokens are a video's.
        lacks: parameters that other methods have and this one cannot have, with the reason.
        version: raised when a parameter changes meaning, so that stored settings can be read.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = "block"
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    drops: ClassVar[bool] = False
    where: ClassVar[Where] = "mid"
    uneven: ClassVar[bool] = False
    by_mask: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1

    @property
    def reads(self) -> frozenset[str]:
        """What :meth:`reduce` takes from the site; may depend on the parameters."""
        return frozenset({"x"})

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods of single stages that this one is made of; itself, unless it acts at several stages."""
        return (self,)

    @property
    def proportional(self) -> bool:
        """Whether attention adds the log of each token's size (proportional attention)."""
        return False

    @abstractmethod
    def reduce(self, site: Site) -> Reduction:
        """Decide, at one site, what becomes of its tokens."""

    @abstractmethod
    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """How many of ``n`` tokens remain after this layer; where the count depends on the image, at most so many."""

    def acts(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> bool:
        """Whether :meth:`reduce` is called at this layer at all. An adapter that hears no runs the host's own block,
        which makes "nothing to remove" the identity bit for bit; so does a method that answers with
        :meth:`tokred.Reduction.identity`. By default :meth:`tokens` decides; methods whose count depends on the image
        say so here."""
        return self.tokens(n, layer=layer, depth=depth, prefix=prefix, suffix=suffix) != n

    def check(self, depth: int) -> None:  # noqa: B027 - most methods fit every depth
        """Refuse a model of ``depth`` layers that the parameters do not fit.

        Raises:
            ValueError: for example, a schedule is longer than the model is deep.
        """

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values: ``{"method": name, "version": 1, "parameters": {...}}``."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return {"method": self.name, "version": self.version, "parameters": values}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = cls.__dict__.get("reads")
        if isinstance(declared, frozenset) and not declared <= set(READS):
            raise TypeError(f"{cls.__name__}.reads names {sorted(declared - set(READS))}; known are {READS}")


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


def from_dict(settings: dict[str, Any]) -> Method:
    """The method that :meth:`Method.to_dict` wrote down.

    Raises:
        UnknownMethodError: no such method is registered.
        ValueError: the settings were written by a newer version of the method.
    """
    from tokred.registry import methods

    cls = methods.get(settings["method"])
    if settings.get("version", 1) > cls.version:
        raise ValueError(
            f"settings of {settings['method']!r} have version {settings['version']}, "
            f"this tokred reads up to {cls.version}"
        )
    values = dict(settings["parameters"])
    for key, value in values.items():
        if isinstance(value, dict) and set(value) == {"inflect"}:
            values[key] = tuple(value["inflect"])
    return cls(**values)
