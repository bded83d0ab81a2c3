"""``Keeping``: a policy that evicts nothing, and holds rows in a form of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.kv.budgets import Uniform
from tokred.kv.parts import Score
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.site import CacheSite
from tokred.kv.stores import Store


@dataclass(frozen=True)
class _Alike(Score):
    """No row before another: nobody asks."""

    def __call__(self, site: CacheSite) -> Tensor:
        return torch.zeros(site.extent, device=site.device)


@dataclass(frozen=True)
class Keeping(CachePolicy):
    """Base of formats under the name of their paper. A subclass has the fields of its store, and says which that is.

    To evict rows as well, give the store to a policy that does: ``tokred.apply(model, "snapkv", store="kivi")``.

    Attributes:
        form: the store's class.
        everything: settings by which each query is searched for and yet finds every row; None: there are none.
    """

    drops: ClassVar[bool] = False
    nothing: ClassVar[Parameters | None] = None
    everything: ClassVar[Parameters | None] = None
    form: ClassVar[type[Store]]

    def __post_init__(self) -> None:
        self.made()  # which refuses what does not fit

    def made(self) -> Store:
        """The store."""
        return self.form(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init})

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Bytes, unless the settings are those that round nothing."""
        exact = type(self).nothing
        return exact is None or any(getattr(self, name) != value for name, value in exact.items())

    @property
    def parts(self) -> Parts:
        """All rows, in the store."""
        return Parts(_Alike(), Uniform(1.0), store=self.made())
