"""What a user calls: apply, remove, applied, supports, report, trace, flops, list_methods."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from tokred import hosts, learn
from tokred.core.method import Method
from tokred.core.reduction import Reduction
from tokred.core.registry import methods as registered
from tokred.core.site import Stage
from tokred.errors import NothingRecordedError, NothingRemovedWarning
from tokred.hosts import CacheReport, DenoiserReport
from tokred.learn import store
from tokred.patch import ATTRIBUTE, Part, Patch, patches_of
from tokred.vlm.report import VisualReport

if TYPE_CHECKING:
    from tokred.adapters.encoder.host import Host

ModelT = TypeVar("ModelT")  # a module, or a pipeline that holds one
MethodLike = str | Method | Sequence[str | Method]
Expose = Literal["auto", "none", "last", "all"]
Windows = Literal["auto", "global", "windowed", "all"]


def list_methods(pattern: str = "*", *, stage: Stage | None = None, model: nn.Module | None = None) -> list[str]:
    """The names of the methods, in the order of the alphabet.

    Args:
        pattern: shell-style, such as ``"*merge*"``; without a wildcard, the names that contain it.
        stage: only methods that act there: ``"block"``, ``"attention"``, ``"projector"``, ``"layer"``, ``"cache"``.
        model: only methods that run on this model, as :func:`supports` says.

    Raises:
        ValueError: there is no such stage.
    """
    if stage is not None and stage not in hosts.STAGES:
        raise ValueError(f"stage is {stage!r}; allowed are {', '.join(map(repr, hosts.STAGES))}")
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    names = [name for name in registered if fnmatch.fnmatchcase(name, pattern.lower())]
    if stage is not None:
        names = [name for name in names if any(m.stage == stage for m in registered.get(name)().members)]
    if model is not None:
        runs = {row.method for row in supports(model) if row.works}
        names = [name for name in names if name in runs]
    return names


def make(method: str | Method, **parameters: Any) -> Method:
    """The method object of a name and its parameters.

    Raises:
        UnknownMethodError: no method has this name; the message has the nearest ones.
        TypeError: a parameter that the method does not have; the message has those that it has.
    """
    if isinstance(method, Method):
        if parameters:
            raise TypeError(
                f"{type(method).__name__} already has its parameters; {', '.join(parameters)} cannot be given beside it"
            )
        return method
    if not isinstance(method, str):
        raise TypeError(f"a method is a name or a Method object, got {method!r}")
    cls = registered.get(method)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    unknown = [p for p in parameters if p not in known]
    if unknown:
        why = "".join(f"; {method!r} has {cls.lacks[p]}" for p in unknown if p in cls.lacks)
        raise TypeError(f"{method!r} has no parameter {', '.join(map(repr, unknown))}; it has {', '.join(known)}{why}")
    return cls(**parameters)


def _several(method: MethodLike, parameters: dict[str, Any]) -> list[Method]:
    """The methods of a call, one a stage, in the order of the stages."""
    if isinstance(method, str | Method):
        return hosts.compose(make(method, **parameters).members)
    made = [one for m in method for one in make(m).members]
    if made and parameters:
        raise TypeError("parameters go with a single method's name; build the methods of a list as objects")
    return hosts.compose(made)


def _find(model: nn.Module) -> Host:
    return hosts.find(model)  # type: ignore[no-any-return]


def apply(
    model: ModelT,
    method: MethodLike,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    expose: Expose = "auto",
    windows: Windows = "auto",
    module: nn.Module | None = None,
    **parameters: Any,
) -> ModelT:
    """Patch ``model`` in place so that it runs with fewer tokens.

    Everything is checked first; on an error the model is as it was. Applying again replaces the patch before. Where
    nothing can be removed, and no parameter that was given says so (``r=0``), a :class:`tokred.NothingRemovedWarning`
    names the parameter to give.

    Args:
        model: a supported model, a module that holds one (a classifier around a backbone), or a pipeline of
            diffusers, whose denoiser is patched.
        method: a method's name, with its parameters as keywords; a method object; or a list of them.
        where: ``where(name, block) -> bool`` restricts the method to some blocks. None: all.
        expose: which blocks return the full length again: ``"auto"`` the last one where the model's head pools over all
            tokens, ``"none"``, ``"last"``, or ``"all"`` (for hooks that read every block; costs time).
        windows: for models whose attention runs in windows (SAM, ViTDet): reduce inside the blocks of ``"global"``
            attention, inside each window of the ``"windowed"`` ones, or in ``"all"``. ``"auto"``: the global ones,
            where there are any.
        module: the weights of a method that has some, such as ``tokred.modules(model)`` gave before; None: those that
            the method was loaded with by :func:`load`, else new ones.
        parameters: the method's, when it is given by name.

    Returns:
        The same model, for chaining.

    Raises:
        UnsupportedModelError: no part of the model can be reduced rightly; the message says why.
        MissingInputError: the method reads what this model does not supply.
        UnknownMethodError, TypeError, ValueError: the method or a parameter is wrong.
    """
    from tokred.adapters.encoder.host import unpatch

    chosen = _several(method, parameters)
    if expose not in ("auto", "none", "last", "all"):
        raise ValueError(f"expose is {expose!r}; allowed are 'auto', 'none', 'last', 'all'")
    found = [(hosts.find_for(model, m).choose(windows), m) for m in chosen]
    for host, one in found:
        host.check(one, expose)
        if where is not None and not any(where(name, block) for name, block in host.blocks):
            raise ValueError(f"where selects none of the {host.depth} blocks ({host.blocks[0][0]}, ...)")
        layers = None if where is None else [i for i, named in enumerate(host.blocks) if where(*named)]
        idle = one.why_idle(host.depth, layers)
        if idle is not None and not idle.meant and idle.parameter not in parameters:
            warnings.warn(idle.text, NothingRemovedWarning, stacklevel=2)
    taker = learn.chosen(chosen, module)
    built = [
        learn.build(one, lambda h=host: h.facts(), module if one is taker else None, like=host.model)
        for host, one in found
    ]
    target = hosts.module_of(model)
    unpatch(target)
    patch = Patch()
    target.__dict__[ATTRIBUTE] = patch
    for (host, one), own in zip(found, built, strict=True):
        host.patch(one, where, expose, patch)
        if own is not None:
            patch.modules[one.name] = host.model.__dict__["_tokred"].module = own
        patch.parts.append(Part(one, host.family, host.model))
    return model


def remove(model: ModelT) -> ModelT:
    """Take every patch off ``model``: classes, forwards and hooks are those it had. Harmless without one."""
    from tokred.adapters.encoder.host import unpatch

    unpatch(hosts.module_of(model))
    return model


def patched(model: Any) -> list[Method]:
    """The methods that ``model`` or a part of it is patched with, in the order of their stages; empty without a patch.

    Args:
        model: a module, or a pipeline of diffusers.
    """
    return hosts.patched_with(model)


@contextlib.contextmanager
def applied(model: ModelT, method: MethodLike, **options: Any) -> Iterator[ModelT]:
    """``with tokred.applied(model, "tome", r=16)``: patched inside, as it was outside."""
    before = hosts.patched_with(model)
    if before:
        raise ValueError(f"the model is already patched with {before[0]!r}; call tokred.remove(model) first")
    apply(model, method, **options)
    try:
        yield model
    finally:
        remove(model)


class Support(NamedTuple):
    """Whether a method runs on a model, and if not, what is missing."""

    method: str
    works: bool
    reason: str


def supports(model: nn.Module) -> list[Support]:
    """For every method: does it run on this model, and if not, why.

    Never raises for an unsupported model: the reason stands in every row.
    """
    rows = hosts.reasons(model)
    return [Support(name, host is not None, reason or host.how) for name, (host, reason) in rows.items()]


def place(where: str) -> str:
    """Words for where tokens are reduced."""
    return "inside each block" if where == "inside" else f"at the {where} of each block"


class LayerReport(NamedTuple):
    """One block of the last forward."""

    layer: int
    tokens_in: int
    tokens_out: int
    macs: int
    mean_size: float
    largest_size: float


class Report(NamedTuple):
    """The last forward of a patched model. ``macs`` counts the blocks, for one sample."""

    family: str
    method: Method
    where: str
    layers: tuple[LayerReport, ...]
    macs: int
    macs_unpatched: int

    def __str__(self) -> str:
        lines = [
            f"{self.method} on {self.family} (reduced {place(self.where)})",
            f"{'block':>5} {'tokens':>12} {'GMACs':>8} {'mean size':>10} {'largest':>8}",
        ]
        for row in self.layers:
            tokens = f"{row.tokens_in} -> {row.tokens_out}"
            lines.append(
                f"{row.layer:>5} {tokens:>12} {row.macs / 1e9:>8.3f} {row.mean_size:>10.2f} {row.largest_size:>8.0f}"
            )
        share = self.macs / self.macs_unpatched
        lines.append(f"blocks: {self.macs / 1e9:.3f} of {self.macs_unpatched / 1e9:.3f} GMACs a sample ({share:.0%})")
        return "\n".join(lines)


def report(model: nn.Module) -> Report | CacheReport | DenoiserReport | VisualReport:
    """Tokens, multiply-adds and token sizes per block, of the last forward of a patched model.

    With a policy for the cache: slots, rows and bytes of each layer's cache after the last forward. Of a denoiser:
    the tokens that each sub-layer ran on. Of a model with vision: the tokens at every decoder layer's input, with the
    reports of its tower and its cache where these are patched too.

    Raises:
        NothingRecordedError: the model is not patched, or no uncompiled forward has run since.
    """
    from tokred.adapters.encoder.host import shared_of

    blocks = bool(shared_of(hosts.module_of(model)))
    if hosts.visual_settings(model) is not None:
        cached = any(m.stage == "cache" for m in hosts.patched_with(model))
        more = (*([_block_report(model)] if blocks else []), *([hosts.cache_report(model)] if cached else []))
        return hosts.visual_report(model)._replace(more=more)
    if not blocks and hosts.patched_with(model):
        return hosts.stage_report(model)
    return _block_report(model)


def _block_report(model: nn.Module) -> Report:
    shared = _shared(model)
    host = _find(model).choose(shared.windows)
    shared.last()
    rows, total, full = [], 0, 0
    for layer in range(host.depth):
        before, after, state = shared.records[layer]
        macs, unpatched = host.counted(layer, shared.records[layer], shared.method)
        total, full = total + macs, full + unpatched
        mean, largest = (1.0, 1.0) if state.size is None else (float(state.size.mean()), float(state.size.max()))
        rows.append(LayerReport(layer, before, after, macs, mean, largest))
    return Report(host.family, shared.method, host.where, tuple(rows), total, full)


def trace(model: nn.Module) -> Reduction:
    """What became of every token in the last forward: all blocks' reductions as one, for drawing and un-merging.

    Raises:
        NothingRecordedError: as :func:`report`.
    """
    shared = _shared(model)
    state = shared.last()
    total: Reduction | None = state.composed()
    total = Reduction.identity((1,), state.length) if total is None else total
    return state.with_gate(total)


def modules(model: Any) -> dict[str, nn.Module]:
    """The modules with weights that the methods on ``model`` bring along, by the methods' names; empty without any.

    They are no part of the model: not in its ``state_dict()``, ``parameters()`` or ``modules()``. Its ``to()``,
    ``train()`` and ``eval()`` take them along.
    """
    return {k: v for _, patch in patches_of(hosts.module_of(model)) for k, v in patch.modules.items()}


def parameters(model: Any) -> Iterator[nn.Parameter]:
    """What the methods on ``model`` learn, for an optimiser, beside ``model.parameters()``."""
    for module in modules(model).values():
        yield from module.parameters()


def losses(model: Any) -> dict[str, Tensor]:
    """The terms that methods add to the loss, of the last forward in training: scalars, by method and name.

    Raises:
        NothingRecordedError: no method with weights acts, or the last forward was none in training.
    """
    from tokred.adapters.encoder.host import shared_of

    states = [shared for _, _, shared in shared_of(hosts.module_of(model)) if shared.module is not None]
    if not states:
        raise NothingRecordedError("no method with weights acts on the model: there are no losses of one")
    if any(state.losses is None for state in states):
        raise NothingRecordedError(
            "the last forward was none in training: call model.train() and run one (uncompiled) forward first"
        )
    return {f"{s.method.name}.{name}": term for s in states for name, term in s.losses.items()}


def save(model: Any, folder: str | Path) -> Path:
    """Write the methods on ``model``, their parameters and weights into ``folder``, for :func:`load`.

    ``where``, ``expose`` and ``windows`` are not kept: give them again.

    Raises:
        NothingRecordedError: the model is not patched.
        ImportError: there are weights, and safetensors is not installed.
    """
    from tokred import __version__

    own = modules(model)
    parts = [part for _, patch in patches_of(hosts.module_of(model)) for part in patch.parts]
    if not parts:
        raise NothingRecordedError("the model is not patched, so there is no setting to save: call tokred.apply first")
    entries = []
    for part in parts:
        made = own.get(part.method.name)
        facts = None if made is None else hosts.find(part.module, part.method.stage).facts()
        entries.append(store.Entry(part.method, made, facts))
    return store.write(folder, entries, __version__)


def load(folder: str | Path) -> Method | list[Method]:
    """The method that :func:`save` wrote, with its weights, for ``tokred.apply(model, tokred.load(folder))``.

    Returns:
        A method; a list where several acted.

    Raises:
        FileNotFoundError, ValueError, UnknownMethodError, ImportError: the folder cannot be read here; the message says
            why.
    """
    found = store.read(folder)
    return found[0] if len(found) == 1 else found


def _shared(model: nn.Module) -> Any:
    from tokred.adapters.encoder.host import shared_of

    found = shared_of(model)
    if not found:
        other = hosts.patched_with(model)
        raise NothingRecordedError(
            f"{other[0].name!r} acts at stage {other[0].stage!r}, which leaves no trace of blocks"
            if other
            else "the model is not patched: call tokred.apply(model, ...) first"
        )
    return found[0][2]


class LayerFlops(NamedTuple):
    """One block, counted beforehand."""

    layer: int
    tokens_in: int
    tokens_out: int
    macs: int


class Flops(NamedTuple):
    """Multiply-adds of one sample, counted without running anything. Papers' "GFLOPs" are ``macs / 1e9``."""

    macs: int
    layers: tuple[LayerFlops, ...]
    outside: int

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block."""
        return [row.tokens_out for row in self.layers]

    @property
    def gmacs(self) -> float:
        """``macs`` in units of 1e9."""
        return self.macs / 1e9


def flops(
    model: nn.Module,
    method: str | Method | None,
    shape: Sequence[int],
    *,
    windows: Windows = "auto",
    **parameters: Any,
) -> Flops:
    """Multiply-adds of one sample under ``method``, before anything runs.

    Counts the matrices and the attention of every block at the tokens it sees, the patch embedding and the classifier;
    norms, activations and the method's own work are left out, as in the literature.

    Args:
        model: a supported model, patched or not; it is not changed.
        method: a method or its name; None counts the model as it is without any.
        shape: of the input, such as ``(1, 3, 224, 224)`` or ``(3, 224, 224)``; the batch is ignored.
        windows: as for :func:`apply`.
        parameters: the method's, when it is given by name.

    Raises:
        MissingInputError, UnsupportedModelError, ValueError: as :func:`apply`.
    """
    chosen = None if method is None else make(method, **parameters)
    if chosen is not None and chosen.stage != "block":
        raise ValueError(
            f"flops counts the blocks of an encoder, and {chosen.name!r} acts at stage {chosen.stage!r}: "
            "tokred.report(model) has the rows and bytes of a cache after a forward"
        )
    host = _find(model).choose(windows)
    if chosen is not None:
        host.check(chosen)
    rows = [LayerFlops(layer, *row) for layer, row in enumerate(host.plan(chosen, tuple(shape)))]
    outside = host.outside_macs(tuple(shape))
    return Flops(sum(row.macs for row in rows) + outside, tuple(rows), outside)
