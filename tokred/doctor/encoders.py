"""The laws on encoders: blocks that hand a sequence of tokens, or a map of them, to one another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred import adapters
from tokred.core.reduction import Reduction
from tokred.doctor.attention import LEFT, weighed
from tokred.doctor.laws import BrokenLawError, Case, check_close

REMOVED = 5
Check = Callable[[Case], None]


def counts(model: nn.Module) -> tuple[int, int]:
    """Tokens that come to the first block, and the fewest that leave one: some methods bring them all back."""
    report: Any = tokred.report(model)
    layers = report.layers
    return layers[0].tokens_in, min(layer.tokens_out for layer in layers)


def laws(kind: str) -> dict[str, Check]:
    """Laws of encoders, beyond the common ones.

    Args:
        kind: ``"sequence"``; ``"map"``: blocks that reduce inside, where queries, keys and values are merged, not
            tokens; or ``"divided"``: attention over time and over space.
    """
    if kind == "sequence":
        return {"dropped": partial(check_chain, merging=False), "merged": partial(check_chain, merging=True)}
    return {"merged": check_sizes, **({"dropped": check_map} if kind == "map" else {})}


def _method(merging: bool, r: Any) -> tokred.Method:
    return tokred.make("tome" if merging else "random_prune", r=r)


def check_sizes(case: Case) -> None:
    """The sizes of what is left in the last block sum to what there was."""
    model = case.build()
    tokred.apply(model, "tome", r=[0] * (adapters.find(model).depth - 1) + [REMOVED])
    case.run(model)
    _sizes(tokred.trace(model), merging=True)


def _sizes(step: Reduction, merging: bool) -> Tensor:
    sizes = step.sizes()
    if step.slots != step.length - REMOVED:
        raise BrokenLawError(f"{step.slots} of {step.length} tokens are left instead of {step.length - REMOVED}")
    if merging and not bool((sizes.sum(-1) == step.length).all()):
        raise BrokenLawError(f"the sizes of merged tokens sum to {sizes.sum(-1).tolist()} instead of {step.length}")
    return sizes


def check_chain(case: Case, merging: bool) -> None:
    """Every block after the first, on what is left, equals the host's block on all tokens, those that have left
    weighed with nothing and those that stand for several with the log of their number."""
    model = case.build()
    blocks = [block for _, block in adapters.find(model).blocks]
    tokred.apply(model, _method(merging, [REMOVED]))
    with answers(blocks) as short:
        case.run(model)
    step = tokred.trace(model)
    tokred.remove(model)
    sizes, rows = _sizes(step, merging), step.representative
    bias = sizes.new_full((len(rows), step.length), LEFT).scatter(1, rows, sizes.log())
    # What was merged is put where its representative stood; blocks go on from there.
    handle = blocks[0].register_forward_hook(_Put(rows, picked(short[0], rows))) if merging else None
    try:
        with answers(blocks) as full, weighed([(block, bias, False) for block in blocks[1:]]) as mode:
            case.run(model)
    finally:
        if handle is not None:
            handle.remove()
    if mode.calls < len(blocks) - 1:
        raise BrokenLawError(f"attention was seen in {mode.calls} blocks of {len(blocks) - 1}: nothing to compare with")
    check_close([picked(y, rows) for y in short], [picked(y, rows) for y in full], "the blocks' outputs")


def check_map(case: Case) -> None:
    """A block that reduces inside adds to the tokens that it keeps what the host's block adds to them, the others
    weighed with nothing."""
    model = case.build()
    block = adapters.find(model).blocks[-1][1]
    tokred.apply(model, _method(False, REMOVED))
    entered: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    with answers([block]) as after:
        case.run(model)
    handle.remove()
    step = tokred.trace(model)
    tokred.remove(model)
    _sizes(step, merging=False)
    rows = step.representative
    bias = torch.full((len(rows), step.length), LEFT).scatter(1, rows, 0.0)
    with weighed([(block, bias, False)]):
        whole = first_of(block(entered[0]))
    ours, theirs = (picked(_sequence(y, step.length), rows) for y in (after[0], whole))
    check_close([ours], [theirs], "the block's outputs")


def _sequence(maps: Tensor, tokens: int) -> Tensor:
    """Maps, channels first or last, as ``(B, N, C)``."""
    first = maps.shape[-1] * maps.shape[-2] == tokens
    return maps.flatten(2).transpose(1, 2) if first else maps.flatten(1, 2)


def first_of(out: Any) -> Tensor:
    """The tokens of a block's answer."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def picked(y: Tensor, rows: Tensor) -> Tensor:
    """The rows that are left, of ``(B, N, C)``, or of ``(B, M, C)`` that has no others."""
    return y if y.shape[1] == rows.shape[1] else y.gather(1, rows.unsqueeze(-1).expand(-1, -1, y.shape[-1]))


class _Put:
    """Forward hook: other values for some rows of a block's answer."""

    def __init__(self, rows: Tensor, values: Tensor) -> None:
        self.rows, self.values = rows, values

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        placed = first_of(out).scatter(1, self.rows.unsqueeze(-1).expand_as(self.values), self.values)
        return (placed, *out[1:]) if isinstance(out, tuple) else placed


@contextlib.contextmanager
def answers(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, what each block answers with is noted."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, out: Any) -> None:
        found.append(first_of(out).clone())

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
