"""Some tokens of one sample of a site, for :meth:`tokred.Site.sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tokred.core.site import Site


def lazily(site: Site, name: str, i: int, rows: Tensor) -> Callable[[], Tensor | None]:
    """Attributes of ``site`` for some tokens of one sample, made when they are read."""

    def value() -> Tensor | None:
        found = site._find(name)
        if found is None or name == "text":
            return found
        dim = -1 if name in ("class_attention", "bias", "motion") else -2
        return found[i : i + 1].index_select(dim, rows)

    return value


def pair(known: Callable[[Tensor | None], Tensor | None], both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = known(both[0]), known(both[1])
    assert first is not None  # both were given
    assert second is not None
    return first, second
