"""Import paths of tokred 0.1 that have moved: they still import, with a :class:`tokred.MovedWarning`.

A name of the old path is looked up in the module, or the modules, that hold it now. To be removed in tokred 0.4.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tokred.errors import MovedWarning

# Old module -> the modules that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "tokred.arms": ("tokred.bench.arms",),
    "tokred.data": ("tokred.bench.data",),
    "tokred.data.model": ("tokred.bench.data.model",),
    "tokred.demo": ("tokred.bench.demo",),
    "tokred.denoise": (
        "tokred.diffusion.site",
        "tokred.diffusion.method",
    ),
    "tokred.embedded": ("tokred.bench.embedded",),
    "tokred.environment": ("tokred.core.environment",),
    "tokred.explaining": ("tokred.analysis.explain",),
    "tokred.grid": ("tokred.diffusion.grid",),
    "tokred.hosts": (
        "tokred.adapters",
        "tokred.patch",
        "tokred.api",
        "tokred.kv.report",
        "tokred.diffusion.report",
    ),
    "tokred.importance": (
        "tokred.encoder.importance",
        "tokred.analysis.contributions",
    ),
    "tokred.kv.scores": ("tokred.kv",),
    "tokred.kv.scores.column_sum": (
        "tokred.methods.kv.h2o",
        "tokred.methods.kv.observed_attention",
    ),
    "tokred.kv.scores.critical": ("tokred.methods.kv.criticalkv",),
    "tokred.kv.scores.expected": ("tokred.methods.kv.expected_attention",),
    "tokred.kv.scores.gumbel": ("tokred.methods.kv.keyformer",),
    "tokred.kv.scores.key_difference": ("tokred.methods.kv.keydiff",),
    "tokred.kv.scores.key_norm": ("tokred.methods.kv.knorm",),
    "tokred.kv.scores.lag_relative": ("tokred.methods.kv.lagkv",),
    "tokred.kv.scores.last_query": ("tokred.methods.kv.tova",),
    "tokred.kv.scores.random": ("tokred.methods.kv.random_evict",),
    "tokred.kv.scores.recency": ("tokred.methods.kv.streaming_llm",),
    "tokred.kv.scores.reconstruction": ("tokred.methods.kv.kvzip",),
    "tokred.kv.scores.spread": ("tokred.methods.kv.cake",),
    "tokred.kv.scores.window": ("tokred.methods.kv.snapkv", "tokred.methods.kv.rpc", "tokred.kv.pooling"),
    "tokred.kv.session": ("tokred.kv.engine",),
    "tokred.matching": ("tokred.core.matching",),
    "tokred.method": (
        "tokred.core.method",
        "tokred.encoder.method",
    ),
    "tokred.motion": ("tokred.encoder.motion",),
    "tokred.outputs": ("tokred.bench.results",),
    "tokred.padding": ("tokred.encoder.padding",),
    "tokred.pages": ("tokred.analysis.viz.pages",),
    "tokred.photos": ("tokred.bench.images",),
    "tokred.plots": ("tokred.bench.plots",),
    "tokred.probe": ("tokred.bench.probe",),
    "tokred.propagation": ("tokred.analysis.tsp_layer",),
    "tokred.ragged": ("tokred.core.ragged",),
    "tokred.reduction": ("tokred.core.reduction",),
    "tokred.registry": ("tokred.core.registry",),
    "tokred.rollout": (
        "tokred.analysis.contributions",
        "tokred.encoder.importance",
    ),
    "tokred.schedules": (
        "tokred.core.schedules",
        "tokred.core.checks",
    ),
    "tokred.selection": ("tokred.core.selection",),
    "tokred.site": ("tokred.core.site",),
    "tokred.soft": ("tokred.core.soft",),
    "tokred.stages": ("tokred.analysis.viz.recording",),
    "tokred.subjects": ("tokred.bench.models",),
    "tokred.tables": ("tokred.cli.tables",),
    "tokred.tiles": ("tokred.core.tiles",),
    "tokred.timing": ("tokred.bench.timing",),
    "tokred.versions": ("tokred.core.versions",),
    "tokred.vlm.budget": ("tokred.vlm.tools.budget",),
    "tokred.vlm.cluster": ("tokred.vlm.tools.cluster",),
    "tokred.vlm.complexity": ("tokred.vlm.tools.complexity",),
    "tokred.vlm.greedy": ("tokred.vlm.tools.greedy",),
    "tokred.vlm.layer_site": ("tokred.vlm.in_llm",),
    "tokred.vlm.layered": ("tokred.vlm.in_llm",),
    "tokred.vlm.overlap": ("tokred.core.overlap",),
    "tokred.vlm.parts": ("tokred.vlm.tools.samples",),
    "tokred.vlm.places": ("tokred.vlm.tools.places",),
    "tokred.vlm.projector": ("tokred.vlm.before_llm",),
    "tokred.vlm.scores": ("tokred.vlm.tools.scores",),
    "tokred.vlm.shuffle": ("tokred.vlm.tools.shuffle",),
    "tokred.vlm.site": ("tokred.vlm.before_llm",),
    "tokred.vlm.stitch": ("tokred.vlm.tools.stitch",),
    "tokred.vlm.tiles": ("tokred.vlm.tools.tiles",),
    "tokred.vlm.transport": ("tokred.vlm.tools.transport",),
}
# Names that are others now, by old module.
RENAMED = {"tokred.denoise": {"Place": "SublayerPlace"}, "tokred.vlm.layer_site": {"Heads": "Attention"}}


class _Old(ModuleType):
    """A module under its old name: it hands on the names of the modules that replace it."""

    def __getattr__(self, name: str) -> Any:
        # Import machinery and pickle ask for dunder names; those of another module would mislead them.
        if not name.startswith("__"):
            name = RENAMED.get(self.__name__, {}).get(name, name)
            for target in MOVED[self.__name__]:
                module = importlib.import_module(target)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class Finder:
    """Finds modules under their old names. It is asked last, so that a module that exists is never hidden."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a module that has moved; None for any other."""
        if name not in MOVED:
            return None
        inside = any(other.startswith(f"{name}.") for other in MOVED)  # only a package's modules are looked for
        return ModuleSpec(name, cls(), is_package=inside)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An old module, which hands out the names of the new ones."""
        return _Old(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, where the import stands."""
        now = " and ".join(MOVED[module.__name__])
        # Frames of the import machinery are not counted, so this is the line with the import.
        warnings.warn(f"{module.__name__} has moved to {now}", MovedWarning, stacklevel=2)


def install() -> None:
    """Let old import paths be found, once."""
    if not any(f is Finder for f in sys.meta_path):
        sys.meta_path.append(Finder)
