"""One token's attention over rows in few bits against that over as many rows in full, layer by layer.

    python -m benchmarks kv/stores --threads 1 --clock cpu --out benchmarks/results/kv.csv --overwrite
    python -m benchmarks kv/stores --store "tight turbo bits=3" --rows 4096
    python -m benchmarks kv/stores --quick

Arms are a layer's cache of ``--rows`` rows with the heads of a published model: ``dense`` as PyTorch's fused attention
reads it, in float32 and in bfloat16, and each store, whose own path attends to its codes; the newest token's row is
appended and settled, as in a step of decoding. ``tight`` in front of a format gives every head codes of its own, and
heads hold from a quarter of ``--rows`` up, as many on average. All arms run in one process, in an order shuffled anew
in each round. ``ratio`` is an arm's time over that of ``dense`` in ``--dtype`` in the same round, ``ratio_bfloat16``
over that in bfloat16: median and quartiles over rounds. ``--clock cpu`` counts the seconds of this process. Where a
store has no path of its own on a device, the figure is that of restoring all rows, and its name says so.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kv.decode import CLOCKS, lengths
from benchmarks.saving import save, saving
from tokred.bench import results, timing
from tokred.core.reduction import Reduction
from tokred.core.registry import parts
from tokred.core.settings import parse_setting
from tokred.kv.stores import Query, Shelf, Store

# Query heads, key/value heads, and numbers of a head.
GEOMETRIES = {"llama-3.2-1b": (32, 8, 64), "llama-3.1-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
STORES = (
    "kivi bits=2", "kivi bits=4", "kivi bits=8", "turbo bits=2", "turbo bits=3", "turbo bits=4",
    "nsnquant pre_rope=False", "mustafar", "tight kivi bits=4", "tight turbo bits=4",
)  # fmt: skip
TIGHT = "tight"


class Arm(NamedTuple):
    """One way of holding rows: ``step`` attends to all of them, and takes one more."""

    method: str
    setting: str
    nbytes: int
    begin: Callable[[], Any]
    step: Callable[[Any], Tensor]


def dense(rows: tuple[Tensor, Tensor], q: Tensor, dtype: torch.dtype) -> Arm:
    """The fused attention of PyTorch."""
    k, v, query = (x.to(dtype) for x in (*rows, q))

    def step(_: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    return Arm("dense", f"type={str(dtype).removeprefix('torch.')}", k.nbytes + v.nbytes, lambda: None, step)


def filled(store: Store, keys: Tensor, values: Tensor, uneven: bool) -> Shelf:
    """A shelf that holds these rows ``[B, Hk, n, D]``; of ``uneven`` ones the newest of each head, half of all."""
    shelf = store.open()
    shelf.append(keys, values)
    shelf.settle(None)
    if uneven:
        b, heads, n, _ = keys.shape
        counts = torch.tensor(lengths(heads, n // 2), device=keys.device)
        slots = torch.arange(n, device=keys.device).expand(b, heads, n).contiguous()
        shelf.take(Reduction.keep(slots, n, slots >= n - counts[:, None]), slots)
    return shelf


def stored(text: str, rows: tuple[Tensor, Tensor], q: Tensor, dtype: torch.dtype) -> Arm:
    """Rows in a store."""
    uneven = text.startswith(f"{TIGHT} ")
    name, given = parse_setting(text.removeprefix(f"{TIGHT} "))
    store: Store = parts.get(name)(**given)
    query, (k, v) = q.to(dtype), (x.to(dtype) for x in rows)
    shelf = (
        filled(store.tight(), *(torch.cat([x, x], 2) for x in (k, v)), True) if uneven else filled(store, k, v, False)
    )
    kept = shelf.snapshot()
    asked = Query(query, None, None, lambda count: None)
    packed = shelf.attend(asked) is not None

    def begin() -> Any:
        shelf.restore(kept)
        return shelf

    def step(held: Any) -> Tensor:
        held.append(k[:, :, -1:], v[:, :, -1:])
        out = held.attend(asked)
        if out is None:
            out = F.scaled_dot_product_attention(query, held.keys, held.values, enable_gqa=True)
        held.settle(None)
        return out  # type: ignore[no-any-return]

    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shelf.tensors}.values())
    path = "" if packed else " path=restored"
    return Arm(TIGHT if uneven else name, text.partition(" ")[2] + path, size, begin, step)


def measure(name: str, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each arm."""
    heads, pairs, width = GEOMETRIES[name]
    generator = torch.Generator(options.device).manual_seed(0)
    shapes = ((pairs, count), (pairs, count), (heads, 1))
    k, v, q = (torch.randn(options.batch, h, n, width, generator=generator, device=options.device) for h, n in shapes)
    dtype = getattr(torch, options.dtype)
    others = {torch.float32, torch.bfloat16} - {dtype}
    found = [dense((k, v), q, dtype), *(dense((k, v), q, other) for other in others)]
    found += [stored(text, (k, v), q, dtype) for text in options.store or STORES]
    state: dict[str, Any] = {}

    @contextlib.contextmanager
    def enter(arm: Arm) -> Iterator[None]:
        state["arm"], state["held"] = arm, arm.begin()
        yield

    def run(_: int) -> None:
        for _ in range(options.steps):
            state["arm"].step(state["held"])

    seconds = timing.paired(
        [lambda arm=arm: enter(arm) for arm in found], run, options.rounds, device=options.device, warmup=2,
        clock=CLOCKS[options.clock],
    )  # fmt: skip
    half = next(i for i, arm in enumerate(found) if arm.setting == "type=bfloat16")
    where = {"model": name, "rows": count, "batch": options.batch, "depth": 1, "moments": options.steps}
    where |= {
        "weights": "random",
        "clock": options.clock,
        "rounds": options.rounds,
        **results.here(options.device, options.dtype),
    }
    table = []
    for arm, times in zip(found, seconds, strict=True):
        row: dict[str, Any] = {"method": arm.method, "setting": arm.setting, **where, "bytes": arm.nbytes}
        row |= results.spread("ms_a_token", [t / options.steps * 1e3 for t in times])
        for metric, dense_one in (("ratio", 0), ("ratio_bfloat16", half)):
            row |= results.spread(metric, [t / base for t, base in zip(times, seconds[dense_one], strict=True)])
        table.append(row)
        print(
            f"{name:<14} {count:>6} rows {arm.method:<9} {arm.setting:<24}{arm.nbytes / 2**20:8.1f} MiB"
            f" {row['ms_a_token']:8.3f} ms {row['ratio']:.3f} of dense"
            f" [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}], {row['ratio_bfloat16']:.3f} of bfloat16",
            flush=True,
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(GEOMETRIES), help="as often as needed; default: all")
    parser.add_argument("--store", action="append", help='such as "tight turbo bits=4"; as often as needed')
    parser.add_argument("--rows", default="8192,32768", help="rows of a head, with commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="one model, 256 rows, two rounds of two tokens")
    saving(parser)
    options = parser.parse_args()
    if options.quick:
        options.model, options.rows, options.rounds, options.steps = ["smollm2-135m"], "256", 2, 2
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        for name in options.model or GEOMETRIES:
            for count in options.rows.split(","):
                save(measure(name, int(count), options), "stores", options)


if __name__ == "__main__":
    main()
