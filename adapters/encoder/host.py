"""``EncoderHost``: what an adapter says of a model: its blocks, what is protected, what can be read, how it pools."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from tokred.adapters.changes import Changes, states_in
from tokred.adapters.contract import words
from tokred.adapters.encoder.block import Recipe, Settings
from tokred.adapters.encoder.block import body as block_body
from tokred.adapters.encoder.model_body import body as model_body
from tokred.adapters.encoder.origin import watch
from tokred.adapters.encoder.running import LayerRecord
from tokred.adapters.encoder.sides import Sides, numbers_of, of_convolution, tiles
from tokred.adapters.encoder.state import Shared
from tokred.adapters.encoder.taps import KeyTap
from tokred.adapters.host import Host
from tokred.adapters.linear import matrices
from tokred.adapters.swap import check_entrance, host_class
from tokred.adapters.watch import Watch, hang
from tokred.core.learned import Facts
from tokred.core.method import Method
from tokred.core.place import Place
from tokred.encoder.method import BlockMethod
from tokred.encoder.report import BlockReport, LayerReport, place
from tokred.errors import UnsupportedModelError


class BlockCost(NamedTuple):
    """Multiply-adds of one block for each token, in the attention's and the MLP's matrices, and for each ``pair``."""

    attention: int
    mlp: int
    pair: int

    def macs(self, before: int, after: int, middle: bool) -> int:
        """Multiply-adds at ``before`` tokens entering and ``after`` leaving, reduced in the middle or at the end."""
        return before * self.attention + before * before * self.pair + (after if middle else before) * self.mlp


@dataclass
class EncoderHost(Host):
    """A model that can be patched.

    Attributes:
        family: for messages and tables, such as ``"timm VisionTransformer"``.
        model: the module that holds the blocks; the model that the user gave, or a part of it.
        blocks: dotted name within ``model`` and block, in order.
        recipe: how the blocks are run.
        prefix, suffix: tokens that are never reduced.
        supplies: what sites hand over.
        pooled: whether the model's head looks at all tokens (mean, attention pooling), so that the last block gives
            them back at full length unless the user says otherwise.
        full: ``"last"`` or ``"all"`` where something outside the blocks counts on the original positions (a dense head,
            a decoder of masked patches, position embeddings added between blocks), so that the last or every block has
            to give full length back, whatever the method and the user say; else ``"none"``.
        grid: patches in rows and columns (of one frame), where the model knows.
        frames: of a video, whose tokens stand frame after frame; None: it is none, or tokens stand otherwise.
        key_norms: for each block the sub-module whose output is the keys before rotary embedding, or None.
        key_heads: heads that those outputs still have to be split into, or None.
        tokens: number of tokens for an input shape.
        outside_macs: multiply-adds outside the blocks for an input shape.
        origin: module whose output the tokens are made of, by which the model's forwards are told apart; None: it is
            outside the model.
        layout: how the patches stand, given that module, its inputs and its output.
        pools: whether the head of the model pools over all tokens as it is now; None: it cannot change.
        own: a subclass that is the user's changes what is done with the tokens, so that nobody here knows what reads
            them, and every block gives full length back unless the user says otherwise.
        note: what a user should know about this family.
        class_rows: so many of the first tokens are the class token together, where there is one.
        padded: whether batches are padded from the start, so that tokens vanish with any method.
    """

    family: str
    model: nn.Module
    blocks: list[tuple[str, nn.Module]]
    recipe: Recipe
    prefix: int
    supplies: frozenset[str]
    pooled: bool
    tokens: Callable[[tuple[int, ...]], int]
    outside_macs: Callable[[tuple[int, ...]], int]
    suffix: int = 0
    grid: tuple[int, int] | None = None
    frames: int | None = None
    full: str = "none"
    origin: nn.Module | None = None
    layout: Callable[[nn.Module, Any, Any], Sides | None] | None = of_convolution
    pools: Callable[[Any], bool] | None = None
    key_norms: list[nn.Module | None] = field(default_factory=list)
    key_heads: int | None = None
    own: bool = False
    note: str = ""
    padded: bool = False
    class_rows: int = 1
    stage: str = "block"

    @property
    def class_token(self) -> int:
        """Number of tokens in front whose attention is the class token's; 0: there is none."""
        return self.class_rows if "class_attention" in self.supplies else 0

    @property
    def how(self) -> str:
        """How methods run here, for the table of support."""
        return f"{self.family}, reduced {place(self.where)}"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def where(self) -> str:
        """``"mid"``: tokens are reduced between attention and MLP; ``"end"``: after the block; ``"inside"``: within a
        block, which gives full length back."""
        return "mid" if self.recipe.split else "end"

    def middle(self, method: BlockMethod | None) -> bool:
        """True where the MLP of a block runs on the reduced tokens already."""
        return self.recipe.split and (method is None or method.where != "end")

    @property
    def offered(self) -> frozenset[str]:
        """Names of everything that sites, and the way of running blocks, hand over."""
        found = self.supplies | self.recipe.supplies
        if self.layout is of_convolution and tiles(self.origin) is not None:
            found |= {"pixels"}
        if self.pooled or self.full != "none":
            # What reads all tokens would read those that are only softly gone as well.
            found -= {"module", "gates"}
        return found

    def model_facts(self) -> Facts:
        """Facts from which a method with weights builds its module.

        Raises:
            UnsupportedModelError: the number of heads or the width cannot be told.
        """
        name, block = self.blocks[0]
        holders = (h for module in block.modules() for h in (module, words.CONFIG.part(module)))
        heads = next((h for h in map(words.QUERY_HEADS.part, holders) if isinstance(h, int)), None)
        # What queries are made of; blocks that fuse their matrices begin with the one that makes them, too.
        found = [
            (wide, any(part in words.IN_BLOCK.names for part in path.split("."))) for path, wide, _ in matrices(block)
        ]
        wide = [width for width, inside in found if inside] or [width for width, _ in found]
        if heads is None or not wide:
            lacks = "how many heads its attention has" if heads is None else "how wide its tokens are"
            raise UnsupportedModelError(
                f"a method with weights cannot be built for {self.family}: {name} does not say {lacks}"
            )
        cls = host_class(self.model)
        model = f"{cls.__module__}.{cls.__qualname__}"
        pixels = numbers_of(self.origin) if self.layout is of_convolution else 0
        return Facts(model, self.depth, wide[0], heads, self.prefix, self.suffix, pixels=pixels)

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        missing = super().missing(method)
        # Rows and columns alone do not place the tokens of a video.
        one: Method = method if isinstance(method, Method) else method()
        if not one.gradients:
            # Its tokens really leave while it learns, so that none is there only softly.
            missing -= self.recipe.supplies & {"module"}
        if self.frames is not None and "frames" not in one.reads and not (isinstance(one, BlockMethod) and one.clips):
            missing |= one.reads & {"grid"}
        return missing

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the host cannot supply what the method reads, or has no sites of its stage.
            TypeError: the method does not say what methods of this stage have to.
            ValueError: the method's parameters do not fit the depth, or ``expose`` does not fit the model.
        """
        self.check_stage(method)
        if not isinstance(method, BlockMethod):
            raise TypeError(f"{method.name!r} acts in blocks and has to derive from tokred.BlockMethod")
        self.exposure(method, expose)
        self.check_reads(method)
        for name, block in self.blocks:
            check_entrance(block, name)
        method.check(self.depth)

    def cost(self, block: nn.Module) -> BlockCost:
        """Count the matrices of a block."""
        attention = mlp = width = 0
        for name, wide, high in matrices(block):
            if any(part in words.IN_BLOCK.names for part in name.split(".")):
                attention, width = attention + wide * high, width or wide
            else:
                mlp += wide * high
        vectors = ((name.lower(), p) for name, p in block.named_parameters() if p.ndim == 1)
        norms = (p for name, p in vectors if "norm" in name or "ln_" in name)
        width = next((p.shape[0] for p in norms), width)
        for module in block.modules():
            width = words.ATTENTION_WIDTH.part(module, width)
        # Of two attentions with half of the channels each, both read all values.
        fused = [3 if words.DIFFERENTIAL.on(module) else 2 for module in block.modules() if words.FUSED.on(module)]
        return BlockCost(attention, mlp, (sum(fused) or 2) * int(width))

    def plan(self, method: BlockMethod | None, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """For each block: tokens that enter, tokens that leave, and multiply-adds of one sample."""
        n, rows = self.tokens(shape), []
        for layer in range(self.depth):
            place = Place(layer, self.depth, self.prefix, self.suffix)
            if method is not None and layer == method.joins(self.depth):
                n = self.tokens(shape)
            after = n if method is None else method.tokens(n, place)
            entering = after if method is not None and method.where == "before" else n
            rows.append((n, after, self.spent(layer, entering, after, method)))
            n = after
        return rows

    def spent(self, layer: int, before: int, after: int, method: BlockMethod | None) -> int:
        """Multiply-adds of one sample in a block whose attention ``before`` tokens enter, ``after`` of which leave."""
        return self.cost(self.blocks[layer][1]).macs(before, after, self.middle(method))

    def counted(self, layer: int, record: LayerRecord, method: BlockMethod) -> tuple[int, int]:
        """Multiply-adds of one sample in a block of the last forward: as it ran, and unpatched."""
        cost, n = self.cost(self.blocks[layer][1]), record.state.length
        before = min(record.tokens_in, record.tokens_out) if method.where == "before" else record.tokens_in
        return cost.macs(before, record.tokens_out, self.middle(method)), cost.macs(n, n, True)

    def exposure(self, method: BlockMethod, expose: str) -> str:
        """Which blocks return full length: ``"none"``, ``"last"`` or ``"all"``.

        Raises:
            ValueError: ``expose`` would let something count on positions that are not there.
        """
        order = ("none", "last", "all")
        # What comes back behind the last block is wanted there, whatever reads it.
        full = "last" if method.joins(self.depth) == self.depth and self.full == "none" else self.full
        if expose == "auto":
            # A head that pools over everything wants merged tokens back at full length, which also weights them by
            # size; where tokens were dropped it pools over those that are left, unless padding stands among them.
            expose = "last" if self.pooled and (method.uneven or not method.drops) else "none"
            if self.own and not {"module", "gates"} & method.reads:
                expose = "all"
            return max(expose, full, key=order.index)
        if order.index(expose) < order.index(full):
            raise ValueError(f"{self.family} reads tokens by their position: expose must be {full!r}, got {expose!r}")
        return expose

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> Shared:
        """Exchange the classes of the blocks. :meth:`check` has passed."""
        assert isinstance(method, BlockMethod)  # check() saw to it
        expose = self.exposure(method, expose)
        shared = Shared(method, self.depth, self.prefix, self.suffix, expose, drops=method.drops or self.padded)
        self.begin(shared, changes)
        shared.class_token = self.class_token
        shared.watch = Watch(self.family, {str(i): name for i, (name, _) in enumerate(self.blocks)})
        norms = self.key_norms or [None] * self.depth
        for layer, ((name, block), norm) in enumerate(zip(self.blocks, norms, strict=True)):
            tap = None
            if norm is not None:
                tap = KeyTap(self.key_heads)
                changes.after(norm, tap)
            active = where is None or bool(where(name, block))
            # Blocks that `where` leaves out are exchanged as well: the state of the tokens has to come through them.
            changes.swap(block, block_body, Settings(shared, layer, name, self.recipe, tap, active))
        changes.swap(self.model, model_body, shared)
        hang(self.model, shared.watch, changes)
        return shared

    def begin(self, shared: Shared, changes: Changes) -> None:
        """Hang the hook by which the first block knows how its tokens stand."""
        watch(self, shared, changes)

    def report(self, state: Shared, methods: Sequence[Method]) -> BlockReport:
        """Tokens, multiply-adds and sizes of every block."""
        host = self.choose(state.windows)
        state.last()
        rows, total, full = [], 0, 0
        for layer, (name, _) in enumerate(host.blocks):
            before, after, tokens = record = state.records[layer]
            macs, unpatched = host.counted(layer, record, state.method)
            total, full = total + macs, full + unpatched
            mean, largest = (1.0, 1.0) if tokens.size is None else (float(tokens.size.mean()), float(tokens.size.max()))
            rows.append(LayerReport(layer, before, after, macs, mean, largest, unpatched, name))
        return BlockReport(host.family, state.method, host.where, tuple(rows), total, full)


def rewritten(model: nn.Module, library: str, *names: str) -> bool:
    """True for a subclass of one's own whose forward, or another function of these names, is not the library's."""
    cls = host_class(model)
    known = next(c for c in cls.__mro__ if c.__module__.startswith((f"{library}.", "tokred.")))
    return any(getattr(cls, n, None) is not getattr(known, n, None) for n in ("forward", *names))


def module_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-adds of a copy of ``module`` on the meta device, for an input of this shape."""
    from torch.utils.flop_counter import FlopCounterMode

    dtype = next((p.dtype for p in module.parameters()), None)
    copied = copy.deepcopy(module).requires_grad_(False).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(torch.empty(*shape, device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2


def argument_names(block: nn.Module) -> tuple[str, ...]:
    """Names of what the block's forward takes after the tokens."""
    parameters = list(inspect.signature(host_class(block).forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def shared_of(model: nn.Module) -> list[tuple[str, nn.Module, Shared]]:
    """The patched encoders of ``model``: name, module, and what its blocks share."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module, state) for module, state in states_in(model) if isinstance(state, Shared)]
