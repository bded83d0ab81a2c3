"""``tokred tune``: find the method, the amount and the schedule that suit a model, on the user's data and machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokred.cli.bench import metric_of, plot_hint, stem
from tokred.cli.console import INTERRUPTED
from tokred.cli.options import (
    Better,
    DataName,
    Device,
    DType,
    Json,
    MetricName,
    Model,
    Size,
    Threads,
    check_device,
    one_model,
    type_of,
)
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    from tokred.tuning import Tuned


def tune_command(
    model: Model = None,
    data: DataName = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--method",
            metavar="METHOD",
            help="Without its amount: tome, or 'tome metric=x'. [default: usual ones]",
        ),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="At least so many times as fast.")] = None,
    loss: Annotated[float | None, typer.Option(help="At most so much lost, in the metric's units.")] = None,
    memory: Annotated[float | None, typer.Option(help="At most this share of the cache's bytes.")] = None,
    metric: MetricName = None,
    better: Better = "higher",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try at most.")] = 150,
    samples: Annotated[int, typer.Option(min=1, help="To search on at most; as many or more are held out.")] = 400,
    search: Annotated[str, typer.Option(help="auto, optuna or greedy.")] = "auto",
    count: Annotated[
        int | None, typer.Option(min=1, help="At most so many images, windows, ... [default: 5 x samples]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of a forward. [default: 16 images, else 1]")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window of text, at most.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Times that finalists are timed.")] = 15,
    size: Size = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the division of the samples, and of the search.")] = 0,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No trained weights.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the setting, the search and the plot.")] = Path(
        "tokred-tune"
    ),
    as_json: Json = False,
) -> None:
    """Find the method, the amount and the schedule over the layers that suit your model, on this machine.

    Give one goal: --speedup, --loss or --memory. Some samples are searched on; the table that is printed was measured
    on others, beside the best constant setting and a random choice at equal measured time.

    \b
    Examples:
      tokred tune --speedup 2                                        the embedded model, offline
      tokred tune deit_small_patch16_224 --data photos --speedup 1.5
      tokred tune deit_small_patch16_224 --data photos --loss 0.01 -m tome -m "tome metric=x"
      tokred tune hf:path/to/a/llama --data book.txt --memory 0.25

    \b
    Leaves in the folder tune-MODEL: tokred.json, which tokred.load and tokred.apply take; tuned.json, all that was
    found; tuned.png; and tune.jsonl, from which the same command goes on. Exit status 1: nothing meets the goal, and
    the nearest setting was kept.
    """
    import tokred
    from tokred.bench import sources
    from tokred.cli.console import refusing, set_threads, written
    from tokred.tuning.goal import goal

    set_threads(threads)
    with refusing():
        goal(speedup, loss, memory)
        check_folder(folder)
        name = one_model(model, None, "embedded")
        assert name is not None  # there is a default
        place = check_device(device)
        scored = None if metric is None else metric_of(metric)
        source = sources.model(name, sources.Options(size, None, None, random_weights, dtype=type_of(dtype)))
        wanted = sources.Wanted(count or 5 * samples, batch, length, 0, seed, (), None, size)
        given = sources.data(source, data, wanted)
        target = folder / f"tune-{stem(name)}"
    for line in (*given.notes, *plot_hint()):
        print(f"tokred: {line}", file=sys.stderr)
    try:
        with refusing():
            found: Tuned = tokred.tune(
                given.model,
                given.batches,
                scored or given.metric,
                speedup=speedup,
                loss=loss,
                memory=memory,
                methods=methods,
                trials=trials,
                samples=samples,
                search=search,  # type: ignore[arg-type]
                seed=seed,
                out=target,
                run=given.run,
                better=better,  # type: ignore[arg-type]
                rounds=rounds,
                device=place,
                name=name,
                **given.options,
            )
    except KeyboardInterrupt:
        print(f"tokred: interrupted; the same command goes on from {target}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    found.save(target)
    files = [target / "tokred.json", target / "tuned.json"]
    # Before the plot: whatever drawing fails by, the search is not lost.
    print(json.dumps(document(found, given.name), indent=2) if as_json else f"{found}\nData: {given.name}.", flush=True)
    if not plot_hint():
        files.append(found.plot(target / "tuned.png"))
    if not as_json:
        written(files)
    if not found.met:
        raise typer.Exit(1)


def document(found: Tuned, data: str) -> dict[str, Any]:
    """The result as one JSON document."""
    plain = {"kind": found.goal.kind, "value": found.goal.value}
    fields = {k: v for k, v in asdict(found).items() if k not in ("method", "goal")}
    return {"setting": found.setting, "method": found.method.to_dict(), "goal": plain, "data": data, **fields}
