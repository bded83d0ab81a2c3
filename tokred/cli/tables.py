"""Tables that the command line prints: of a demo, a benchmark, methods, models and their costs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from tokred import api
from tokred.bench import sources
from tokred.bench.sources import Source
from tokred.core import environment
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting

if TYPE_CHECKING:
    from tokred.bench.table import Benchmark


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.min_width = min(len(title), 80)  # a title is folded at the table's width
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


def methods_rows() -> list[dict[str, str]]:
    """Every method as a record."""
    found = [(name, registered.get(name)) for name in registered]
    return [{"name": n, "stage": c.stage, "summary": c.summary, "source": c.source} for n, c in found]


def support(model: str) -> tuple[Source, list[api.Support]]:
    """A model without weights, and which methods run on it.

    Raises:
        NoModelError: there is no such model.
    """
    source = sources.skeleton(model)
    return source, api.supports(source.module)


def support_table(source: Source, rows: Sequence[api.Support]) -> Table:
    """Methods that run on a model, and why the others do not."""
    model = f"{source.name} ({source.kind})"
    if not any(row.works for row in rows) and len({row.reason for row in rows}) == 1:
        table = _table(f"No method runs on {model}")
        table.add_row(rows[0].reason)
        return table
    table = _table(f"Methods on {model}", "name", "runs", "how, or why not")
    for row in rows:
        table.add_row(row.method, "[green]yes[/]" if row.works else "[red]no[/]", row.reason)
    return table


class Counted(NamedTuple):
    """The costs of a model under a setting (empty: as it is), beside those of the model as it is."""

    setting: str
    shape: tuple[int, ...]
    cost: api.Flops
    base: api.Flops
    notes: tuple[str, ...] = ()


def count(model: str, settings: Sequence[str], size: int | None) -> list[Counted]:
    """Multiply-adds of a model as it is, or under each of some settings.

    Raises:
        NoModelError: there is no such model.
        UnknownMethodError, TypeError, ValueError, MissingInputError: it is no encoder, or a setting does not fit.
    """
    source = sources.skeleton(model, size)
    if source.kind in ("denoiser", "pipeline"):
        raise ValueError(f"{model} is a {source.kind}: `tokred explain {model}` counts it; flops is for encoders")
    if source.kind == "language model":
        raise ValueError(
            f"{model} is a language model, whose caches shrink: `tokred bench {model}` measures bytes, time and "
            "perplexity, `tokred list` says which methods run; flops is for encoders"
        )
    made = [(text, api.make(name, **given)) for text, (name, given) in ((t, parse_setting(t)) for t in settings)]
    for text, method in made:
        if method.stage != "block":
            raise ValueError(
                f"flops counts the blocks of encoders, and {text.split()[0]!r} acts at stage {method.stage!r}: "
                f"`tokred bench {model} -m {text!r}` measures it"
            )
    if source.shape is None:
        raise ValueError(f"nothing says how large an input of {model} is ({source.kind}); tokred.flops takes a shape")
    base = api.flops(source.module, None, source.shape)
    if not made:
        return [Counted("", source.shape, base, base)]
    found = []
    for text, method in made:
        cost = api.flops(source.module, method, source.shape)
        found.append(Counted(text, source.shape, cost, base, tuple(_capped(text, cost))))
    return found


def _capped(text: str, cost: api.Flops) -> list[str]:
    """A note where fewer tokens than asked for could be removed."""
    r = parse_setting(text)[1].get("r")
    short = [row for row in cost.layers if isinstance(r, int) and row.tokens_in - row.tokens_out < r]
    if not short:
        return []
    first = short[0]
    return [f"{text}: from block {first.layer} on fewer tokens than r={r} are removed, for lack of tokens"]


def cost_record(model: str, one: Counted) -> dict[str, Any]:
    """A count as a record for JSON."""
    return {
        "model": model,
        "setting": one.setting,
        "shape": list(one.shape),
        "macs": one.cost.macs,
        "macs_unpatched": one.base.macs,
        "blocks": [row._asdict() for row in one.cost.layers],
    }


def cost_table(model: str, one: Counted) -> tuple[Table, str]:
    """Tokens and multiply-adds block by block, and a line with the sum."""
    table = _table(f"{model} {f'with {one.setting}' if one.setting else 'unpatched'}", "block", "tokens", "GMACs")
    for name in ("block", "tokens", "GMACs"):
        next(c for c in table.columns if c.header == name).justify = "right"
    for row in one.cost.layers:
        table.add_row(str(row.layer), f"{row.tokens_in} -> {row.tokens_out}", f"{row.macs / 1e9:.4f}")
    share = f", {one.cost.macs / one.base.macs:.0%} of {one.base.gmacs:.3f} unpatched" if one.setting else ""
    unit = "an image" if len(one.shape) == 4 else "an input"
    return table, f"{one.cost.gmacs:.3f} GMACs {unit} of {'x'.join(map(str, one.shape[1:]))}{share}"


def coloured(result: Benchmark, width: int) -> Text:
    """The table of a benchmark as text in colour: baselines dim, rows that were not measured red."""
    dim = {f"{row['method']} {row['setting']}".strip() for row in result.rows if row["baseline"]}
    lines = []
    for line in result.text(width).splitlines():
        style = "dim" if any(line.startswith(label[:25]) for label in dim) else ""
        style = "red" if ": not measured." in line else "bold" if line.startswith("unpatched") else style
        lines.append(Text(line, style))
    return Text("\n").join(lines)
