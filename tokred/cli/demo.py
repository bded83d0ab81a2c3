"""``tokred demo``: accuracy against speed of a few methods on the embedded model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tokred.cli.console import INTERRUPTED
from tokred.cli.options import Methods, Threads, settings, single


def demo_command(
    quick: Annotated[bool, typer.Option("--quick", help="Two settings a method and 500 images.")] = False,
    images: Annotated[int | None, typer.Option(min=10, help="Test images to classify. [default: 1000]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward.")] = 50,
    methods: Methods = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the order in which methods take turns.")] = 0,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("tokred-demo"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of an earlier run.")] = False,
) -> None:
    """Measure accuracy against speed on the embedded model: offline, in under two minutes on two cores.

    Every row is measured here and now: ToMe and random merging at several r, PiToMe and EViT where they cost as many
    multiply-adds, all on the same batches as the unpatched model, which every speed-up is the ratio to. A method that
    is named without settings is measured at those amounts.

    \b
    Examples:
      tokred demo
      tokred demo --quick --out /tmp/demo
      tokred demo -m tome -m random --images 2000
      tokred demo -m "tome r=4" -m "tome r=8" -m "evit kappa=0.7"
      tokred demo --threads 1

    \b
    Leaves in the folder, without overwriting an earlier run's:
      demo.csv     one row a setting, with device, versions and commit
      demo.png     top-1 against images per second
      merged.png   images with the patches that became one token
    """
    from tokred.bench import demo, embedded
    from tokred.bench import results as outputs
    from tokred.cli import tables
    from tokred.cli.console import out, progress, refusing, set_threads, written

    set_threads(threads)
    with refusing():
        model = embedded.load()
        sample = embedded.sample(images or (500 if quick else 1000))
        if batch > len(sample.labels):
            raise ValueError(f"a batch of {batch} needs as many images, got --images {len(sample.labels)}")
        named = [single(parts, "demo") for parts in settings(methods)] or list(demo.METHODS)
        arms = demo.choose(model, counts=demo.QUICK_COUNTS if quick else demo.COUNTS, methods=named)
        demo.needs()
        paths = outputs.free(folder, demo.FILES, force=force)
    rounds = demo.Rounds(model, arms, sample.images, sample.labels, batch=batch, seed=seed)
    try:
        with progress(demo.ticks(arms, len(sample.labels), batch), "measuring") as tick:
            rounds.run(tick)
    except KeyboardInterrupt:
        print(f"tokred: interrupted after {rounds.images} images", file=sys.stderr)
        if not rounds.images:
            raise typer.Exit(INTERRUPTED) from None
    rows, count = rounds.rows(), rounds.images
    out.print(tables.demo_table(rows, count, out.width))
    print(tables.within_chance(rows, count))
    with refusing():
        demo.save(paths["demo.csv"], rows, count, batch)
        demo.draw(rows, model, sample.images[:count], sample.labels[:count], paths, batch=batch)
    written(list(paths.values()))
    if rounds.interrupted:
        raise typer.Exit(INTERRUPTED)
