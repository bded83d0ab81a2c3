"""``tokred train``: a method's weights, and the model's where the recipe says so, learnt from labelled samples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokred.cli.options import DataName, Device, Json, Model, Size, Threads, check_device, one_model
from tokred.core.folders import check_folder

if TYPE_CHECKING:
    from tokred.learn import Step
    from tokred.learn.training import Samples


def train_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a recipe of tokred by its name.")],
    model: Model = None,
    data: DataName = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for what is learnt, and to go on from.")] = Path(
        "tokred-train"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step, instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws, instead of the recipe's.")] = None,
    held: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the samples that is held out.")] = 0.2,
    count: Annotated[int | None, typer.Option(min=1, help="At most so many samples. [default: 1000]")] = None,
    every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: one at the end.")] = 100,
    until: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps, to go on another time.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Do not go on from the folder's checkpoint.")] = False,
    precision: Annotated[str, typer.Option(help="no, or bf16 for mixed precision.")] = "no",
    size: Size = None,
    device: Device = "cpu",
    threads: Threads = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No trained weights.")] = False,
    as_json: Json = False,
) -> None:
    """Train a method with weights by a recipe, on labelled images, over accelerate.

    Needs pip install 'tokred[train]'. The same command goes on where it was stopped, and ends with the weights that it
    would have had without the stop. In several processes: accelerate launch -m tokred train ...

    \b
    Examples:
      tokred train cropr                                       the embedded model, offline
      tokred train mine.toml deit_small_patch16_224 --data photos --out trained --device cuda --precision bf16
      tokred train dynamicvit --steps 40 --seed 1 --every 10
      tokred train mine.toml mine.py:model --data mine.py:samples --held 0.1

    \b
    --data may be a function that returns a data set with items by number, pairs of a tensor and a label. Leaves in the
    folder tokred.json and weights.safetensors, which tokred.load takes; model.safetensors where the model's own weights
    were trained; train.jsonl, a line a step; and the checkpoint.
    """
    from tokred.cli.console import progress, refusing, set_threads, written
    from tokred.learn import recipe as read

    set_threads(threads)
    with refusing():
        given = read(recipe)
        changed: dict[str, Any] = {"steps": steps, "batch": batch, "seed": seed}
        given = dataclasses.replace(given, **{name: value for name, value in changed.items() if value is not None})
        if precision not in ("no", "bf16"):
            raise ValueError(f"--precision must be no or bf16, got {precision!r}")
        place = check_device(device)
        check_folder(folder)
        accelerator = _accelerator(place, precision)
        name = one_model(model, None, "embedded")
        assert name is not None  # there is a default
        found, samples, kept, label = _ready(name, data, size, random_weights, count, held, given.seed)
    quiet = not accelerator.is_main_process
    rows: list[tuple[str, float | None, float]] = []
    with refusing(), contextlib.ExitStack() as stack:
        from tokred.learn.training import accuracy, train

        move = _nothing if quiet else stack.enter_context(progress(given.steps, f"train {given.method}"))
        if kept is not None:
            rows.append(("as it was", accuracy(found.to(accelerator.device).eval(), kept), 1.0))

        def each(step: int, gave: Step) -> None:
            move()

        done = train(
            found, samples, given, folder, every=every, resume=not anew, accelerator=accelerator, until=until, each=each
        )
        top1 = None if kept is None else accuracy(done.model, kept)
        if kept is None:
            done.model(samples.batch([0])[0])
        report: Any = done.report
        rows.append((str(_method(done.model)), top1, report.macs / report.macs_unpatched))
    if quiet:
        return
    if as_json:
        last = done.steps[-1]
        document = {
            "data": label,
            "steps": len(done.steps),
            "begun": done.begun,
            "loss": last.loss,
            "terms": last.terms,
            "rows": [{"setting": setting, "top1": hits, "work": work} for setting, hits, work in rows],
            "folder": str(folder),
        }
        print(json.dumps(document, indent=2))
        return
    for setting, hits, work in rows:
        shown = "" if hits is None else f"top-1 {hits:.4f}  "
        print(f"{setting:60} {shown}work of the blocks {work:.1%}")
    print(f"Data: {label}. Steps {done.begun} to {len(done.steps)} of {given.steps}; loss {done.steps[-1].loss:.4f}.")
    written([folder / "tokred.json"])


def _nothing() -> None:
    """Only the main process shows how far it is."""


def _method(model: Any) -> Any:
    import tokred

    return tokred.patched(model)[0]


def _accelerator(device: str, precision: str) -> Any:
    from tokred.learn.training.run import needs

    return needs("accelerate").Accelerator(cpu=device == "cpu", mixed_precision=precision)


def _ready(
    name: str, spec: str | None, size: int | None, random_weights: bool, count: int | None, held: float, seed: int
) -> tuple[Any, Samples, Samples | None, str]:
    """The model, samples to train on, samples that are held out, and the name of the data.

    Raises:
        ValueError: the samples have no labels, or cannot be asked for by number.
    """
    import torch
    from torch.utils.data import Subset

    from tokred.bench import sources
    from tokred.bench.sources import made
    from tokred.learn.training import Samples

    source = sources.model(name, sources.Options(size, None, None, random_weights))
    if spec is not None and ":" in spec and not spec.startswith("hfds:") and not Path(spec).exists():
        found, model, collate, label = made.call(spec), source.model, None, spec
        if not (hasattr(found, "__len__") and hasattr(found, "__getitem__")):
            raise ValueError(f"--data {spec} must return a data set with items by number, got {type(found).__name__}")
    else:
        given = sources.data(source, spec, sources.Wanted(count, None, 1024, 0, seed, (), None, size))
        if not given.labelled or given.metric != "top1" or given.model is not source.model:
            raise ValueError(f"{given.name} has no labels that fit the head of {name}: train needs labelled images")
        found, collate, model, label = given.batches.dataset, given.batches.collate_fn, given.model, given.name
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    out = int(held * len(order))
    parts = [Subset(found, rows) for rows in (order[out:], order[:out])]
    return model, Samples(parts[0], collate), Samples(parts[1], collate) if out else None, label
