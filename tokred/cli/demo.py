"""``tokred demo``: accuracy against speed of a few methods on the embedded model."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokred.cli.console import INTERRUPTED
from tokred.cli.options import Methods, Threads, settings, single
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    from tokred.bench.arms import Arm
    from tokred.bench.table import Benchmark


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

    Every row is measured here and now: ToMe and random pruning at several r, PiToMe and EViT where they cost as many
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
      demo.csv     a row a number, with device, versions and commit, written as it is measured
      demo.png     top-1 against speed and against work
      merged.png   images with the patches that became one token
    """
    from tokred.bench import demo, embedded
    from tokred.bench import results as outputs
    from tokred.cli import tables
    from tokred.cli.console import columns, out, refusing, set_threads, written

    set_threads(threads)
    with refusing():
        check_folder(folder)
        model = embedded.load()
        sample = embedded.sample(images or (500 if quick else 1000))
        if batch > len(sample.labels):
            raise ValueError(f"a batch of {batch} needs as many images, got --images {len(sample.labels)}")
        named = [single(parts, "demo") for parts in settings(methods)] or list(demo.METHODS)
        arms = demo.choose(model, counts=demo.QUICK_COUNTS if quick else demo.COUNTS, methods=named)
        demo.needs()
        paths = outputs.free(folder, demo.FILES, force=force)
        table = paths["demo.csv"]
        table.unlink(missing_ok=True)

    def measure(some: list[Arm], progress: bool = True) -> Benchmark:
        return demo.measure(model, some, *sample, table, batch=batch, seed=seed, progress=progress)

    interrupted = False
    try:
        with refusing():
            result = measure(arms)
    except KeyboardInterrupt:
        interrupted, arms = True, demo.measured(table, arms)
        print(f"tokred: interrupted after {len(arms)} rows", file=sys.stderr)
        if len(arms) < 2:
            raise typer.Exit(INTERRUPTED) from None
        result = measure(arms, False)
    width = columns(60, 80)
    out.print(tables.coloured(demo.brief(result), width), soft_wrap=True)
    about = f"Data: {len(sample.labels)} {embedded.NAME}. Every row was measured in this run."
    print("\n".join(textwrap.wrap(about, width)))
    demo.draw(result, model, *sample, paths)
    written(list(paths.values()))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
