"""``tokred bench``: quality, speed and memory of methods on the user's own model and data."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokred.cli.console import INTERRUPTED
from tokred.cli.options import (
    Better,
    DataName,
    Device,
    DType,
    Json,
    Methods,
    MetricNames,
    Model,
    OldModel,
    Size,
    Threads,
    check_device,
    one_model,
    settings,
    type_of,
)
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    from tokred.bench.sources import Data, Source
    from tokred.bench.table import Benchmark

# Tokens of an answer, where none are asked for: a few words, or a recording's text.
ANSWER = {"vision-language model": 16, "speech": 128}


def bench_command(
    model: Model = None,
    data: DataName = None,
    methods: Methods = None,
    old: OldModel = None,
    metric: MetricNames = None,
    read: Annotated[
        str | None, typer.Option(help="What metrics get: features, or a module. [default: the output]")
    ] = None,
    better: Better = "higher",
    shares: Annotated[
        str, typer.Option(help="Of the work, or the cache: amounts of methods named without settings.")
    ] = "0.75,0.5",
    baselines: Annotated[bool, typer.Option(help="Measure random choice and down-sampling at equal work too.")] = True,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="For pipelines, as often as needed.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="At most so many images, windows, questions, ...")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of a forward. [default: 16 images, else 1]")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window of text, at most.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each pair is at least timed.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a pipeline. [default: its own]")] = None,
    new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = None,
    size: Size = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a fine-tuned model of timm's.")] = None,
    classes: Annotated[int | None, typer.Option("--num-classes", min=1, help="Of its head.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples and the order of the rows.")] = 0,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No trained weights: speed only.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Rows as tasks of Ray: local, or the address of a cluster such as auto.")
    ] = None,
    ray_workers: Annotated[int | None, typer.Option(min=1, help="Rows at a time with --ray local.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for table and plot.")] = Path("tokred-bench"),
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is in the table already.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw quality against speed beside the table.")] = True,
    as_json: Json = False,
) -> None:
    """Measure methods on your model and data: quality, speed and memory, each row beside the unpatched model.

    MODEL may be an encoder, a model of images and text, a language model, a vision-language model, Whisper, a pipeline
    of diffusers or a denoiser; it is recognised. Methods that act together stand with " + " between. A method named
    without settings is set to shares of the model's multiply-adds (of caches: of the bytes), so that points of equal
    cost stand beside each other. Where no method is named, a few that suit the model are measured.

    \b
    Encoders: a folder of images, with a folder for each class or without.
      tokred bench                                                   the embedded model, offline
      tokred bench deit_small_patch16_224 --data photos -m "tome r=13" -m "evit kappa=0.7"
      tokred bench vit_base_patch16_224 --data imagenet/val -m tome --device cuda --dtype bfloat16 --batch 256
      tokred bench vit_small_patch16_224 --checkpoint mine.pth --data photos --workers 4
      tokred bench vit_small_patch16_224 --data photos --metric probe,cosine --read features -m tome
      tokred bench open_clip:ViT-B-32/openai --data photos           zero-shot, by the folders' names
      tokred bench deit_small_patch16_224 --random-weights -m tome   speed alone
    Language models: perplexity of a text behind a prompt whose cache is reduced.
      tokred bench hf:path/to/a/llama --data book.txt -m "snapkv budget=0.25" -m "kvzip budget=0.25"
    Vision-language models: questions about pictures (columns image, question, answer).
      tokred bench hf:path/to/a/llava --data vqa.jsonl -m "divprune budget=64 + snapkv budget=0.5"
    Whisper: recordings, with NAME.txt beside NAME.wav.
      tokred bench hf:path/to/whisper --data recordings -m "pitome ratio=0.9"
    Pipelines: images against those of the unpatched model with the same seed.
      tokred bench path/to/a/pipeline --prompt "a red fox in the snow" -m "tomesd ratio=0.5" --steps 20
    Anything else: functions that make the model and yield batches.
      tokred bench mine.py:model --data mine.py:batches --metric mine.py:score -m "tome r=8"

    \b
    Leaves in the folder bench-MODEL.csv, a row a number, and bench-MODEL.png. Rows are written when they are measured:
    after Ctrl-C the same command goes on with those that are missing.
    """
    import tokred
    from tokred.bench import sources
    from tokred.bench.sources import amounts
    from tokred.cli.console import out, refusing, set_threads, written

    set_threads(threads)
    with refusing():
        name = one_model(model, old, "embedded")
        assert name is not None  # there is a default
        check_folder(folder)
        typed = settings(methods, placed=True)
        wanted_shares = parse_shares(shares)
        place = check_device(device)
        scored = None if metric is None else metrics_of(metric)
        options = sources.Options(size, checkpoint, classes, random_weights, dtype=type_of(dtype))
        source = sources.model(name, options)
        wanted = sources.Wanted(count, batch, length, workers, seed, tuple(prompts or ()), steps, size)
        given = sources.data(source, data, wanted)
        chosen, left = amounts.chosen(source, typed, wanted_shares)
        table = table_path(folder, name, force)
    for line in (*given.notes, *left, *(plot_hint() if plot else [])):
        print(f"tokred: {line}", file=sys.stderr)
    extra = dict(given.options)
    if given.run == "generate":
        extra["max_new_tokens"] = new_tokens or ANSWER.get(source.kind, 32)
    try:
        with refusing():
            result = tokred.benchmark(
                given.model,
                [parts if len(parts) > 1 else parts[0] for parts in chosen],
                given.batches,
                scored or given.metric,
                run=given.run,
                read=read,
                out=table,
                baselines=baselines,
                better=better,  # type: ignore[arg-type]
                rounds=rounds,
                device=place,
                name=name,
                seed=seed,
                ray=ray,
                workers=ray_workers,
                **extra,
            )
    except KeyboardInterrupt:
        there = f"the rows so far are in {table}: the same command goes on" if table.exists() else "no row was measured"
        print(f"tokred: interrupted; {there}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    files = [table, *(plotted(result, table) if plot else [])]
    if as_json:
        print(json.dumps(document(result, source, given, table), indent=2))
    else:
        show(result, given, out)
        written(files)
    if len(result.measured) < 2:
        raise typer.Exit(1)


def show(result: Benchmark, given: Data, out: Any) -> None:
    """The table: in colour on a terminal, as plain text of 80 columns elsewhere."""
    from tokred.cli import tables

    about = [f"Data: {given.name}.", *(f"Note: {note}." for note in given.notes)]
    lines = [line for text in about for line in textwrap.wrap(text, 80)]
    if not out.is_terminal:
        print("\n".join([str(result), *lines]))
        return
    out.print(tables.coloured(result, max(60, min(out.width, 80))), soft_wrap=True)
    out.print("\n".join(lines), highlight=False, markup=False)


def document(result: Benchmark, source: Source, given: Data, table: Path) -> dict[str, Any]:
    """The result as one JSON document."""
    return {
        "model": source.name,
        "kind": source.kind,
        "weights": source.weights,
        "data": given.name,
        "run": given.run,
        "stage": result.stage,
        "metric": result.metric,
        "metrics": list(result.metrics),
        "better": result.better,
        "summary": result.summary,
        "notes": given.notes,
        "table": str(table),
        "rows": result.rows,
    }


def plot_hint() -> list[str]:
    """A line where a plot cannot be drawn, said before anything is measured."""
    missing = [name for name in ("matplotlib", "pandas") if importlib.util.find_spec(name) is None]
    return (
        [f"no plot will be drawn, for lack of {' and '.join(missing)}: pip install 'tokred[bench]'"] if missing else []
    )


def plotted(result: Benchmark, table: Path) -> list[Path]:
    """The plot beside the table; none where the libraries are missing, or nothing is to be drawn."""
    if plot_hint() or len(result.measured) < 2:
        return []
    return [result.plot(table.with_suffix(".png"))]


def table_path(folder: Path, name: str, force: bool) -> Path:
    """The table's file in a folder that can be written; with ``force`` an older one is removed.

    Raises:
        OSError: the folder cannot be made or written.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"bench-{stem(name)}.csv"
    if force:
        table.unlink(missing_ok=True)
    return table


def stem(name: str) -> str:
    """A model's name as part of a file's: of a path the last folder."""
    last = name.rstrip("/").rpartition("/")[2] if "/" in name and not name.startswith("open_clip:") else name
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in last).strip("_") or "model"


def parse_shares(text: str) -> list[float]:
    """``"0.7,0.5"`` as numbers.

    Raises:
        ValueError: it is no list of numbers between 0 and 1.
    """
    try:
        found = [float(s) for s in text.split(",") if s.strip()]
    except ValueError as error:
        raise ValueError(f"--shares is a list of numbers such as 0.7,0.5, got {text!r}") from error
    if not found or not all(0 < s < 1 for s in found):
        raise ValueError(f"--shares must lie between 0 and 1, got {text!r}")
    return found


def metrics_of(text: str) -> Any:
    """One metric, or a list of several with commas between.

    Raises:
        NoModelError, ValueError: as :func:`metric_of`.
    """
    found = [metric_of(part.strip()) for part in text.split(",")]
    return found if len(found) > 1 else found[0]


def metric_of(text: str) -> Any:
    """A ready metric's name, or the user's own function.

    Raises:
        NoModelError: there is no such function.
        ValueError: it cannot be called.
    """
    if ":" not in text:
        return text
    from tokred.bench.sources import made

    found = made.target(text)
    if not callable(found):
        raise ValueError(f"--metric {text} is {type(found).__name__}, not a function of (output, batch)")
    return found
