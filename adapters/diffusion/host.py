"""The host record of diffusers' denoisers: which sub-layers attend to the tokens of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import members, terms, words
from tokred.adapters.diffusion import registries
from tokred.adapters.diffusion.clips import EnterClip
from tokred.adapters.diffusion.families import BLOCKS, DENOISERS, LISTS, OTHERS, SUBLAYERS, Denoiser, known_as
from tokred.adapters.diffusion.rotary import EnterPacked
from tokred.adapters.diffusion.session import EnterBlock, EnterDenoiser, LeaveBlock, LeaveDenoiser, Session
from tokred.adapters.diffusion.sublayers import Kind, Spot
from tokred.adapters.diffusion.sublayers import body as sublayer_body
from tokred.adapters.host import Host
from tokred.adapters.swap import argument_names, check_entrance, host_class, unchanged
from tokred.adapters.watch import Watch, hang
from tokred.core.method import Method
from tokred.diffusion.method import AttentionMethod
from tokred.diffusion.report import DenoiserReport, SublayerReport
from tokred.errors import NothingRecordedError, UnsupportedModelError


@dataclass
class Block:
    """A transformer block, or an attention without one.

    Attributes:
        name: in the denoiser.
        module: the block.
        sublayers: name, module and kind of each; of a block whose MLP runs beside its attention, the block is the last.
        alone: the attention has no block around it.
        first: where text and image attend together, the text stands first.
    """

    name: str
    module: nn.Module
    sublayers: list[tuple[str, nn.Module, Kind]]
    alone: bool
    first: bool = False


@dataclass
class DenoiserHost(Host):
    """A denoiser that can be patched.

    Attributes:
        family: for messages, such as ``"diffusers UNet2DConditionModel"``.
        model: the denoiser.
        parts: its blocks.
        record: of its class.
        kind: name of the class in :data:`DENOISERS`, of which the model's may be a subclass.
        patch_size: rows of the sample that a token stands for at the finest resolution that there is.
        patch_frames: frames of the sample that a token stands for.
        supplies: what sites hand over.
    """

    family: str
    model: nn.Module
    parts: list[Block]
    record: Denoiser
    kind: str
    patch_size: int = 1
    patch_frames: int = 1
    supplies: frozenset[str] = frozenset({"x", "grid"})
    stage: str = "attention"
    note: str = ""

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of each block."""
        return [(part.name, part.module) for part in self.parts]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.parts)

    @property
    def how(self) -> str:
        """How methods run here, for the table of support."""
        return f"{self.family}, around the sub-layers of {self.depth} blocks"

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            TypeError: it acts at this one, and is none of its methods.
            UnsupportedModelError: a sub-layer cannot be patched.
            ValueError: its parameters do not fit the model, or ``expose`` is given.
        """
        self.check_stage(method)
        if not isinstance(method, AttentionMethod):
            base = "tokred.diffusion.method.AttentionMethod"
            raise TypeError(f"{method.name!r} acts in denoisers and has to derive from {base}")
        if expose != "auto":
            raise ValueError(f"expose is for methods of blocks; a denoiser keeps its tokens, got {expose!r}")
        self.check_reads(method)
        for part in self.parts:
            for name, module, _ in part.sublayers:
                check_entrance(module, name)
        method.check(self.depth)

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> Session:
        """Hang hooks on the denoiser and its blocks, exchange classes of sub-layers. :meth:`check` has passed."""
        assert isinstance(method, AttentionMethod)
        session = Session(method, self.depth, self.family, self.patch_size, self.kind)
        sites: dict[str, str] = {}
        changes.before(self.model, self._entering(session), with_kwargs=True)
        changes.after(self.model, LeaveDenoiser(session))
        for i, part in enumerate(self.parts):
            if where is not None and not where(part.name, part.module):
                continue
            if not part.alone:
                changes.before(part.module, EnterBlock(session, i), with_kwargs=True)
                changes.after(part.module, LeaveBlock(session, i))
            for name, module, kind in part.sublayers:
                spot = Spot(session, i, kind, part.alone, name, argument_names(module), part.first, str(len(sites)))
                sites[spot.site] = name
                changes.swap(module, sublayer_body, spot)
                # By class, not by model, and other models may be of this one: it stays there when this patch goes.
                registries.enter(module)
        session.watch = Watch(self.family, sites)
        changes.swap(self.model, unchanged, session)
        hang(self.model, session.watch, changes)
        return session

    def report(self, state: Session, methods: Sequence[Method]) -> DenoiserReport:
        """The tokens that every sub-layer ran on."""
        if not state.records:
            raise NothingRecordedError(
                "nothing is recorded: run one forward of the patched denoiser first (compiled ones keep no record)"
            )
        rows = tuple(SublayerReport(*state.records[key], key[0]) for key in sorted(state.records))
        return DenoiserReport(self.family, state.method, rows)

    def _entering(self, session: Session) -> EnterDenoiser:
        names, sample = argument_names(self.model), self.record.sample
        if self.record.packed:
            return EnterPacked(session, names, sample)
        if self.record.frames:
            return EnterClip(session, names, sample, self.record.frames, self.patch_frames)
        return EnterDenoiser(session, names, sample)


def part_of(pipe: Any) -> nn.Module | None:
    """The denoiser of a diffusers pipeline; None for anything else.

    Raises:
        UnsupportedModelError: a pipeline without a denoiser, or with two.
    """
    if known_as(type(pipe), terms.PIPELINE.names) is None:
        return None
    if all(isinstance(word.part(pipe), nn.Module) for word in (members.TRANSFORMER, members.SECOND)):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has two denoisers: give it pipe.transformer and pipe.transformer_2 one by one"
        )
    for word in (members.UNET, members.TRANSFORMER, members.SECOND):
        found = word.part(pipe)
        if isinstance(found, nn.Module):
            return found
    have = ", ".join(members.COMPONENTS.need(pipe)) or "nothing"
    raise UnsupportedModelError(f"{type(pipe).__name__} has no denoiser (unet or transformer); it has {have}")


def match(model: nn.Module) -> DenoiserHost | None:
    """The host record of a denoiser of diffusers; None when ``model`` is none.

    Raises:
        UnsupportedModelError: it is one, but its attention cannot run on fewer tokens; the message says why.
    """
    cls = host_class(model)
    mine = [c.__name__ for c in cls.__mro__ if c.__module__.startswith("diffusers.")]
    if not terms.MIXIN.among(mine):
        return None
    known = known_as(cls, DENOISERS)
    if known is None:
        # VAEs, ControlNets and even a part of UNets are a ModelMixin too. Only a class that may be a denoiser is
        # refused; inside the others the search goes on.
        if mine[0] == OTHERS.part or not any(word in mine[0] for word in OTHERS.denoisers):
            return None
        raise UnsupportedModelError(
            f"diffusers' {cls.__name__} is not among the denoisers that tokred knows ({', '.join(DENOISERS)})"
        )
    _same_forward(cls, known, "the model")
    record = DENOISERS[known]
    parts = _parts(model, record.loose)
    _check_blocks(model, parts)
    if not parts:
        raise UnsupportedModelError(
            f"diffusers' {cls.__name__} has no attention here over the tokens of the image alone, which could run on "
            f"fewer of them (looked for {', '.join(BLOCKS)} and plain self-attention)"
        )
    high, deep = _patches(words.CONFIG.part(model), record)
    supplies = {"x", "grid", "q", "k", "v"} | ({"frames"} if record.frames else {"guidance"})
    return DenoiserHost(f"diffusers {cls.__name__}", model, parts, record, known, high, deep, frozenset(supplies))


def _same_forward(cls: type[nn.Module], known: str, where: str) -> None:
    """Refuse a subclass that does something else in its forward than the class that is known.

    Raises:
        UnsupportedModelError: it does.
    """
    base: Any = next(c for c in cls.__mro__ if c.__name__ == known and c.__module__.startswith("diffusers."))
    if cls.forward is not base.forward:
        raise UnsupportedModelError(
            f"{where} is a {cls.__name__}, which changes the forward of diffusers' {known}: tokred knows that one alone"
        )


def _check_blocks(model: nn.Module, parts: list[Block]) -> None:
    """Refuse blocks that would run as they are without a word, because their class is not known.

    Raises:
        UnsupportedModelError: naming one.
    """
    found = [f"{part.name}." for part in parts if not part.alone]
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.rpartition(".")[2] not in LISTS:
            continue
        for child, block in module.named_children():
            prefix = f"{name}.{child}."
            # Wrappers of other libraries hold the block that is known.
            if any(part.startswith(prefix) or prefix.startswith(part) for part in found):
                continue
            if any(terms.ATTENTION.name in host_class(inner).__name__ for inner in block.modules()):
                raise UnsupportedModelError(
                    f"{prefix[:-1]} is a {host_class(block).__name__}, which is none of the blocks that tokred knows "
                    f"({', '.join(BLOCKS)})"
                )


def _patches(config: Any, record: Denoiser) -> tuple[int, int]:
    """Rows and frames of the sample that a token stands for."""
    if record.packed:
        return 2, 1
    size = words.PATCH.part(config) or 1
    deep, high = (size[0], size[1]) if isinstance(size, list | tuple) else (words.PATCH_IN_TIME.part(config) or 1, size)
    return int(high), int(deep)


def _parts(model: nn.Module, loose: bool) -> list[Block]:
    found: list[Block] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        cls = host_class(module)
        kind = known_as(cls, BLOCKS)
        if kind is not None:
            _same_forward(cls, kind, name)
            inside.append(name)
            layout = BLOCKS[kind]
            subs: list[tuple[str, nn.Module, Kind]] = [
                (f"{name}.{sub}", getattr(module, sub), what)
                for sub, what in layout.sublayers
                if isinstance(getattr(module, sub, None), nn.Module)
            ]
            for sub, part, _ in subs:
                base = known_as(host_class(part), SUBLAYERS)
                if base is not None:
                    _same_forward(host_class(part), base, sub)
            # Its MLP is no module of its own, so the block itself is swapped; it comes last, because the survey takes
            # what the sub-layers before it leave over for the cost of the MLP.
            if layout.parallel:
                subs.append((name, module, "parallel"))
            found.append(Block(name, module, subs, False, layout.first))
        elif loose and (base := known_as(cls, terms.ATTENTION.names)) and _plain(module):
            _same_forward(cls, base, name)
            found.append(Block(name, module, [(name, module, "attention")], True))
    return found


def _plain(module: Any) -> bool:
    """Self-attention over the image alone: nothing of a text is added to its keys."""
    cross = words.CROSS.part(module, False)
    return not cross and words.ADDED.part(module) is None and not words.CROSS_ONLY.need(module)
