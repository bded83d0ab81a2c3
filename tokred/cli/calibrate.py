"""``tokred calibrate``: a file of what a model's queries are like, for cache policies that need one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tokred.cli.options import MODEL, check_device, complete_model, type_of
from tokred.core.folders import check_file


def calibrate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, autocompletion=complete_model)],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text file, a folder of them, a table, or noise.")],
    file: Annotated[Path, typer.Option("-o", "--out", help="File to write, such as queries.safetensors.")],
    method: Annotated[
        str,
        typer.Option("-m", "--method", metavar="SETTING", help="triattention, or 'lukv score=...' with its settings."),
    ] = "triattention",
    tokens: Annotated[int, typer.Option(min=1, help="Of the text, at most.")] = 32768,
    length: Annotated[int, typer.Option(min=8, help="Tokens that are read at once, at most.")] = 2048,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the choice of passages.")] = 0,
) -> None:
    """Make the file that the cache policies triattention and lukv need: once a language model, from any coherent text.

    \b
    Examples:
      tokred calibrate hf:path/to/a/llama book.txt -o queries.safetensors
      tokred calibrate hf:path/to/a/llama book.txt -o queries.safetensors --tokens 100000 --length 4096
      tokred calibrate hf:path/to/a/llama folder/of/texts -o queries.safetensors --seed 1
      tokred calibrate hf:path/to/a/llama texts.jsonl -o queries.safetensors --device cuda --dtype bfloat16
      tokred calibrate hf:path/to/a/llama book.txt -o curves.safetensors -m "lukv score=window" --tokens 16384
      tokred bench hf:path/to/a/llama --data book.txt -m "triattention stats=queries.safetensors budget=256"

    The file says which model it is of; policies refuse it on another.
    """
    import tokred
    from tokred.bench import sources
    from tokred.cli.console import refusing, written
    from tokred.core.settings import parse_setting

    with refusing():
        place = check_device(device)
        named, parameters = parse_setting(method)
        made = tokred.make(named, **parameters)
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"--out {file} is no file in a folder that is there")
        check_file(file)
        source = sources.model(model, sources.Options(None, None, None, dtype=type_of(dtype)))
        if source.kind != "language model":
            raise ValueError(f"{model} is of kind {source.kind}, and calibrate is for language models")
        given = sources.data(source, text, sources.Wanted(max(1, tokens // length), 1, length, 0, seed, (), None, None))
        ready = source.model.to(place)
        batches = ({"input_ids": batch["input_ids"].to(place)} for batch in given.batches)
        found = tokred.calibrate(ready, batches, file, method=made)
    print(f"tokred: {found.about['tokens']} tokens of {given.name}", file=sys.stderr)
    written([file])
