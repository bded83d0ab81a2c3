"""``tokred list`` and ``tokred flops``: questions about a model that nothing has to run for."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from tokred.cli.options import Json, Methods, Model, OldModel, one_model, settings, single


def list_command(model: Model = None, old: OldModel = None, as_json: Json = False) -> None:
    """List methods and families of models, one line each; or what runs on one model, and why the rest does not.

    Of a model nothing but its configuration is read, or downloaded.

    \b
    Examples:
      tokred list
      tokred list vit_base_patch16_224
      tokred list hf:facebook/dinov2-small
      tokred list hf:path/to/a/llama                 policies for its cache
      tokred list path/to/a/pipeline                 methods for its denoiser
      tokred list open_clip:ViT-B-32
      tokred list my_code.py:build                   a model that a function makes
      tokred list swin_tiny_patch4_window7_224       says why not
    """
    from tokred.cli import tables
    from tokred.cli.console import out, refusing

    with refusing():
        name = one_model(model, old, None)
        if name is None:
            if as_json:
                print(json.dumps(tables.methods_rows(), indent=2))
                return
            out.print(tables.methods_table())
            out.print(tables.hosts_table())
            return
        source, rows = tables.support(name)
    if as_json:
        found = [row._asdict() for row in rows]
        print(json.dumps({"model": name, "kind": source.kind, "methods": found}, indent=2))
        return
    out.print(tables.support_table(source, rows))


def flops_command(
    model: Model = None,
    methods: Methods = None,
    old: OldModel = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images. [default: the model's]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count tokens and multiply-adds of an encoder, block by block, without running anything.

    \b
    Examples:
      tokred flops deit_small_patch16_224
      tokred flops deit_small_patch16_224 -m "tome r=13"
      tokred flops vit_base_patch16_224 -m "tome r=(16, -1)" -m "evit kappa=0.7 blocks=(3, 6, 9)"
      tokred flops hf:path/to/whisper -m "pitome ratio=0.9"
      tokred flops -m "tome r=13" --json
    """
    from tokred.cli import tables
    from tokred.cli.console import out, refusing

    with refusing():
        name = one_model(model, old, "embedded")
        assert name is not None  # there is a default
        chosen = [single(parts, "flops") for parts in settings(methods)]
        counted = tables.count(name, chosen, size)
    if as_json:
        print(json.dumps([tables.cost_record(name, one) for one in counted], indent=2))
        return
    for one in counted:
        table, total = tables.cost_table(name, one)
        out.print(table)
        print(total)
        for line in one.notes:
            print(line, file=sys.stderr)


def as_record(value: Any) -> Any:
    """A value for JSON: what has no form there as text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
