"""The laws on stores: rows of a cache in a form of their own, of which not rows but bytes are fewer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.adapters.contract import cache_name
from tokred.adapters.swap import host_class
from tokred.core.registry import methods
from tokred.doctor.caches import generated
from tokred.doctor.laws import COMMON, BrokenLawError, Case, check_close, largest, one_line
from tokred.errors import MissingInputError
from tokred.kv.keeping import Keeping
from tokred.kv.stores import Store

# Models of each kind: rows alone, windows, a cap on the logits, sinks, layers that keep a state.
KINDS = ("llama", "gemma3", "gemma2", "gpt_oss", "qwen3_5")
LENGTH, BATCH = 288, 1  # tokens of which the newest, that formats leave alone, are few
BACK = 3  # tokens that are taken back, fewer than formats leave alone


def formats() -> Iterator[str]:
    """Names of all methods that evict nothing and hold rows in a form of their own."""
    return (name for name in methods if issubclass(methods.get(name), Keeping))


def crops(family: str) -> bool:
    """True if all layers of a tiny model keep all rows, so that the host's own cache takes tokens back."""
    from tokred.adapters.tiny import kv

    options = kv.FAMILIES[family].options
    return not any("layer" in name and name != "num_hidden_layers" for name in options)


def _run(model: nn.Module) -> list[Tensor]:
    """Logits of some steps after a prompt that is long enough for codes to take fewer bytes than they cost at first."""
    from tokred.adapters.tiny import kv

    return generated(model, {"input_ids": kv.prompt(LENGTH, BATCH)})[0]


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes of all slots had they been kept as they came, and of what is held."""
    report: Any = next(part for part in tokred.report(model).parts if part.stage == "cache")
    return sum(row.dense_bytes for row in report.layers), sum(row.bytes for row in report.layers)


def alone(name: str, case: Case) -> Case:
    """The case of one format on a tiny language model, by what its class calls ``example`` and ``nothing``."""
    cls: Any = methods.get(name)
    nothing = [] if cls.nothing is None else [tokred.make(name, **cls.nothing)]
    found = dataclasses.replace(
        case, family=f"{name} on {case.family}", run=_run, longer=None, nothing=nothing,
        reducing=[tokred.make(name, **cls.example)], counts=held, laws={"fewer": check_held},
    )  # fmt: skip
    found.__dict__["model"] = case.model
    return found


def together(case: Case) -> Case:
    """The case of all formats on a tiny language model: a law holds if it does for each."""
    first = alone(next(formats()), case)
    laws = {"nothing": COMMON["nothing"], "fewer": check_held, "removed": COMMON["removed"]}
    if "cropped" in case.laws:
        laws["cropped"] = check_cropped
    each: dict[str, Callable[[Case], None]] = {law: partial(_each, law, check, case) for law, check in laws.items()}
    return dataclasses.replace(first, family=f"formats on {case.family}", laws=each)


def _each(law: str, check: Callable[[Case], None], plain: Case, case: Case) -> None:
    """Check a law with every format, and name the one that breaks it; ``plain`` is the model's case without any."""
    for name in formats():
        one = alone(name, plain)
        one.__dict__.update(model=case.model, before=case.before)
        if law == "nothing" and not one.nothing:
            continue
        try:
            check(one)
        except MissingInputError:
            continue  # it reads what this kind does not have, and says so when it is applied
        except Exception as error:  # whatever breaks in a host is what a report has to say
            why = str(error) if isinstance(error, BrokenLawError) else one_line(error)
            raise BrokenLawError(f"{name}: {why}") from error


def store_of(case: Case) -> Store:
    """The store of a case's method."""
    method: Any = case.reducing[0]
    store: Store = method.parts.store
    return store


def check_held(case: Case) -> None:
    """A store that says its rows are smaller holds fewer bytes, one that searches finds all where it may, and what is
    generated is finite."""
    check_found(case)
    model = case.build()
    tokred.apply(model, case.reducing)
    after = case.run(model)
    if not all(bool(one.isfinite().all()) for one in after):
        raise BrokenLawError("the output is not finite")
    rows = torch.empty(1, 1, 0, 16)
    if store_of(case).row_bytes(rows, rows) >= Store.row_bytes(store_of(case), rows, rows):
        return
    dense, left = held(model)
    if not left < dense:
        raise BrokenLawError(f"{left} bytes are held, and as they come the rows would take {dense}")
    if largest(after, case.before) == 0:
        raise BrokenLawError("rows are said to be held in fewer bytes, but the output is the unpatched one")


def check_found(case: Case) -> None:
    """A search that finds every row is the model's own attention, up to rounding."""
    method: Any = case.reducing[0]
    if method.everything is None:
        return
    model = case.build()
    tokred.apply(model, tokred.make(method.name, **method.everything))
    check_close(case.run(model), case.before, "every row was to be found, and the logits")


def check_cropped(case: Case) -> None:
    """With nothing to remove, tokens that were taken back are as if they had never come; and any store that can take
    tokens back goes on after that."""
    model = case.build()
    theirs = _gone_on(model, False)
    can = "crop" in store_of(case).can
    if case.nothing and can:
        tokred.apply(model, case.nothing)
        check_close([_gone_on(model, True)], [theirs], "after a crop the logits")
        tokred.remove(model)
    tokred.apply(model, case.reducing)
    if can and not bool(_gone_on(model, True).isfinite().all()):
        raise BrokenLawError("after a crop the output is not finite")


def _gone_on(model: Any, crop: bool) -> Tensor:
    """``[B, 2, V]`` logits of two tokens after a prompt; with ``crop``, others have come and gone before them."""
    from tokred.adapters.tiny import kv

    name = cache_name(host_class(model).forward)
    ids, later = kv.prompt(LENGTH, BATCH), kv.prompt(BACK + 2, BATCH, seed=2)
    cache: Any = None
    if tokred.patched(model):
        cache = tokred.kv_cache(model)
    out = model(ids, **{name: cache}, use_cache=True)
    cache = next(value for value in out.values() if hasattr(value, "layers"))
    if crop:
        model(later[:, :BACK], **{name: cache})
        cache.crop(-BACK)
    logits: Tensor = model(later[:, BACK:], **{name: cache}).logits
    return logits
