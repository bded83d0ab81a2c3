"""``Config``: a configuration of transformers as data, so that tables of models import nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# The default of options that a row leaves out.
NONE: Mapping[str, Any] = MappingProxyType({})


class Config(NamedTuple):
    """A configuration: its class, and its options, among which may be configurations."""

    name: str
    options: dict[str, Any]

    def make(self, transformers: Any, **changes: Any) -> Any:
        """The host's object, some of its options replaced."""
        # A copy: configurations keep the lists that they are given, and the host's objects are no data.
        options = copy.deepcopy({k: v for k, v in self.options.items() if k not in changes}) | changes
        values = {k: v.make(transformers) if isinstance(v, Config) else v for k, v in options.items()}
        return getattr(transformers, self.name)(**values)
