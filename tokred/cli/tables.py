"""Tables that the command line prints: of a demo, a benchmark, methods, models and their costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import nn

from tokred import api
from tokred.bench import models as subjects
from tokred.core import environment
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_pairs

if TYPE_CHECKING:
    from tokred.bench.demo import Row


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def methods_table() -> Table:
    """Every method: name, stage, what it does, where it is from."""
    table = _table("Methods", "name", "stage", "what it does", "source")
    for name in registered:
        cls = registered.get(name)
        table.add_row(name, cls.stage, cls.summary, cls.source)
    return table


def hosts_table() -> Table:
    """Every host library: the installed version, and what of it can be patched."""
    from tokred.adapters import ADAPTERS, DENOISERS

    table = _table("\nFamilies of models", "library", "installed", "what can be patched")
    for library, module in (ADAPTERS | DENOISERS).items():
        text = (importlib.import_module(module).__doc__ or "").strip().splitlines()[0]
        name, _, families = text.partition(": ")
        package = {"open_clip": "open_clip_torch"}.get(library, library)
        table.add_row(library, environment.version(package) or "no", families if name == library else text)
    return table


def support_table(model: str) -> Table:
    """Methods that run on a model, and why the others do not.

    Raises:
        NoModelError: there is no such model.
    """
    found, _ = subjects.skeleton(model)
    rows = api.supports(found)
    if not any(row.works for row in rows) and len({row.reason for row in rows}) == 1:
        table = _table(f"No method runs on {model}")
        table.add_row(rows[0].reason)
        return table
    table = _table(f"Methods on {model}", "name", "runs", "how, or why not")
    for row in rows:
        table.add_row(row.method, "[green]yes[/]" if row.works else "[red]no[/]", row.reason)
    return table


def flops_table(model: str, method: str | None, settings: Sequence[str], size: int | None) -> tuple[Table, str]:
    """Tokens and multiply-adds block by block, and a line with the sum.

    Raises:
        NoModelError: there is no such model.
        UnknownMethodError, TypeError, ValueError, MissingInputError: method or settings do not fit.
    """
    parameters = parse_pairs(settings)
    if method is None and parameters:
        raise ValueError(f"--set {settings[0]} needs a --method")
    found, shape = subjects.skeleton(model) if size is None else _resized(model, size)
    base = api.flops(found, None, shape)
    cost = base if method is None else api.flops(found, method, shape, **parameters)
    title = " ".join([model, "unpatched" if method is None else f"with {method}", *settings])
    table = _table(title, "block", "tokens", "GMACs")
    for name in ("block", "tokens", "GMACs"):
        next(c for c in table.columns if c.header == name).justify = "right"
    for row in cost.layers:
        table.add_row(str(row.layer), f"{row.tokens_in} -> {row.tokens_out}", f"{row.macs / 1e9:.4f}")
    share = "" if method is None else f", {cost.macs / base.macs:.0%} of {base.gmacs:.3f} unpatched"
    return table, f"{cost.gmacs:.3f} GMACs an image of {'x'.join(map(str, shape[1:]))}{share}"


def _resized(model: str, size: int) -> tuple[nn.Module, tuple[int, int, int, int]]:
    subject = subjects.load("vit_small_patch14_dinov2" if model == "dinov2" else model, size=size, random_weights=True)
    return subject.model, (1, subject.channels, size, size)


def _results(title: str, *columns: str) -> Table:
    """A table of numbers: method and setting on the left, everything else on the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("method", "setting"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _difference(value: float) -> str:
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def _ratio(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def demo_table(rows: Sequence[Row], count: int) -> Table:
    """The table that the demo prints."""
    columns = ("tokens\nleft", "GMACs", "top-1\n%", "diff.\npoints", "images\nper s", "speed-up\n(quartiles)")
    table = _results(f"{count} test images of Fashion-MNIST, every row measured in this run", *columns)
    before = rows[0].arm.name
    for row in rows:
        if row.arm.name != before:
            table.add_section()
        before = row.arm.name
        rate, ratio = row.timing
        base = row.arm.method is None
        table.add_row(
            row.arm.name,
            row.arm.setting or "-",
            str(row.arm.tokens_out),
            f"{row.arm.macs / 1e9:.3f}",
            f"{100 * row.top1:.1f}",
            "-" if base else _difference(100 * row.top1_difference),
            _rate(rate.median),
            "1" if base else _ratio(*ratio),
        )
    return table


def within_chance(rows: Sequence[Row], count: int) -> str:
    """A sentence on how large a difference has to be to mean something: two standard errors, at least two images."""
    widest = max(2 / count, *(2 * row.top1_error for row in rows))
    return (
        f"One image is {100 / count:.2g} points; differences of less than about {100 * widest:.1f} are within chance."
    )


def bench_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table that a benchmark prints; measures that there is nothing of are left out."""
    first = rows[0]
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens\nleft": lambda r: str(r["tokens_out"]),
        "GMACs": lambda r: f"{r['gmacs']:.3g}",
    }
    if "top1" in first:
        shown["top-1\n%"] = lambda r: f"{100 * r['top1']:.1f}"
    shown["cosine"] = lambda r: f"{r['cosine']:.4f}"
    if "saliency_mae" in first:
        shown["saliency\nerror"] = lambda r: f"{r['saliency_mae']:.4f}"
    shown["images\nper s"] = lambda r: _rate(r["images_per_second"])
    shown["speed-up\n(quartiles)"] = lambda r: (
        "1" if r is first else _ratio(r["speedup"], r["speedup_low"], r["speedup_high"])
    )
    shown["forward\nMiB"] = lambda r: f"{r['forward_mib']:.0f}"
    title = f"{first['model']}, {first['input']} px, {first['tokens_in']} tokens, {first['device']}"
    table = _results(title, *shown)
    before = first["method"]
    for row in rows:
        if row["method"] != before:
            table.add_section()
        before = row["method"]
        table.add_row(before, row["setting"] or "-", *(text(row) for text in shown.values()))
    return table
