"""The command line: ``tokred demo``, ``bench``, ``viz``, ``list``, ``flops``, ``explain`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tokred import __version__

try:
    import typer
except ImportError as error:  # a script's entry point has no better place to say this
    raise SystemExit(f"tokred's command line needs {error.name}: pip install 'tokred[cli]'") from error

from tokred.cli.console import out, progress, refusing, set_threads, written
from tokred.cli.doctor import doctor_command  # needs typer
from tokred.cli.evaluate import evaluate_app
from tokred.cli.explain import explain_command
from tokred.cli.viz import viz_command

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="tokred",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``tokred`` script."""
    app(prog_name="tokred")


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"tokred {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Token reduction for transformers: one line patches a model, and it runs with fewer tokens.

    \b
    Examples:
      tokred demo                                     accuracy against speed, on this machine, offline
      tokred list                                     methods and families of models, one line each
      tokred list --model deit_small_patch16_224      which methods run on this model
      tokred flops --model deit_small_patch16_224 --method tome --set r=13
      tokred bench --model dinov2                     quality, speed and memory, as CSV and plot
      tokred viz --method "tome r=13"                 what was merged into what, as a page and PNG
      tokred explain --model sdxl --size 1024         what a method could gain on a denoiser
      tokred doctor                                   whether everything works with what is installed here

    "tokred COMMAND --help" has examples of each.
    """


@app.command("demo", short_help="Accuracy against speed on the embedded model, offline.")
def demo_command(
    quick: Annotated[bool, typer.Option("--quick", help="Two settings a method and 500 images.")] = False,
    images: Annotated[int | None, typer.Option(min=10, help="Test images to classify. [default: 1000]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward.")] = 50,
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = "tome,pitome,evit,random",
    counts: Annotated[str | None, typer.Option("--r", help="Tokens removed per block. [default: 8,12,16]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's]")] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which methods take turns.")] = 0,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("tokred-demo"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of an earlier run.")] = False,
) -> None:
    """Measure accuracy against speed on the embedded model: offline, in under two minutes on two cores.

    Every row is measured here and now: ToMe and random merging at several r, PiToMe and EViT where they cost as many
    multiply-adds, all on the same batches as the unpatched model, which every speed-up is the ratio to.

    \b
    Examples:
      tokred demo
      tokred demo --quick --out /tmp/demo
      tokred demo --methods tome,random --r 4,8,12,16 --images 2000
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

    set_threads(threads)
    with refusing():
        model = embedded.load()
        sample = embedded.sample(images or (500 if quick else 1000))
        if batch > len(sample.labels):
            raise ValueError(f"a batch of {batch} needs as many images, got --images {len(sample.labels)}")
        chosen = _counts(counts) if counts else demo.QUICK_COUNTS if quick else demo.COUNTS
        arms = demo.choose(model, counts=chosen, methods=_names(methods))
        outputs.free(folder, ())
    with progress(demo.ticks(arms, len(sample.labels), batch), "measuring") as tick:
        rows = demo.measure(model, arms, sample.images, sample.labels, batch=batch, seed=seed, tick=tick)
    count = len(sample.labels) // batch * batch
    out.print(tables.demo_table(rows, count))
    print(tables.within_chance(rows, count))
    with refusing():
        paths = demo.write(rows, model, sample.images, sample.labels, folder, batch=batch, force=force)
    written(paths)


def _names(text: str) -> list[str]:
    """Comma-separated methods, each of which exists.

    Raises:
        UnknownMethodError: one does not; the message has the nearest names.
        ValueError: there is none.
    """
    from tokred.core.registry import methods

    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    if not names:
        raise ValueError("no method is named")
    for name in names:
        methods.get(name)
    return names


def _counts(text: str) -> list[int]:
    try:
        found = [int(s) for s in text.split(",") if s.strip()]
    except ValueError as error:
        raise ValueError(f"--r is a list of whole numbers such as 8,16, got {text!r}") from error
    if not found or min(found) < 1:
        raise ValueError(f"--r is a list of positive numbers, got {text!r}")
    return list(dict.fromkeys(found))


@app.command("list", short_help="Methods and families of models, one line each.")
def list_command(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Which methods run on this model: timm's name, hf:NAME, embedded."),
    ] = None,
) -> None:
    """List methods and families of models, one line each; or what runs on one model, and why the rest does not.

    \b
    Examples:
      tokred list
      tokred list --model vit_base_patch16_224
      tokred list --model hf:facebook/dinov2-small
      tokred list --model swin_tiny_patch4_window7_224     says why not
    """
    from tokred.cli import tables

    if model is None:
        out.print(tables.methods_table())
        out.print(tables.hosts_table())
        return
    with refusing():
        table = tables.support_table(model)
    out.print(table)


@app.command("flops", short_help="Tokens and multiply-adds, without running anything.")
def flops_command(
    model: Annotated[str, typer.Option("--model", "-m", help="timm's name, hf:NAME or embedded.")] = "embedded",
    method: Annotated[str | None, typer.Option("--method", help="A method of `tokred list`; none: as it is.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, as often as needed.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images. [default: the model's]")
    ] = None,
) -> None:
    """Count tokens and multiply-adds, block by block, without running anything.

    \b
    Examples:
      tokred flops --model deit_small_patch16_224
      tokred flops --model deit_small_patch16_224 --method tome --set r=13
      tokred flops --model vit_base_patch16_224 --method tome --set "r=(16, -1)"
      tokred flops --model vit_base_patch16_224 --method evit --set kappa=0.7 --set "blocks=(3, 6, 9)"
    """
    from tokred.cli import tables

    with refusing():
        table, total = tables.flops_table(model, method, settings or [], size)
    out.print(table)
    print(total)


BENCH = """Measure what methods cost and gain on a model: quality, speed and memory, as CSV and as a Pareto plot.

Each method is set to equal shares of the model's multiply-adds, so that points of equal cost stand beside each
other. Quality is top-1 (of the model's head where the classes fit it, else of a linear probe on frozen features),
the features' cosine with the unpatched model's and, for dinov2, the error of the saliency map after un-merging.
Speed is the ratio to the unpatched model in the same round, as median and quartiles.

\b
Examples:
  tokred bench                                                    the embedded model, offline
  tokred bench --model dinov2                                     real photos, a probe on Fashion-MNIST
  tokred bench --model dinov2 --images textile --size 112
  tokred bench --model vit_base_patch16_224 --images imagenet/val --device cuda --dtype bfloat16 --batch 256
  tokred bench --model hf:facebook/dinov2-small --images my_photos
  tokred bench --model deit_small_patch16_224 --random-weights --methods none \\
               --setting "tome r=13" --setting "evit kappa=0.7"   speed alone

A folder of images may hold a folder for each class, or images only (then there is no top-1).
"""


@app.command("bench", help=BENCH, short_help="Quality, speed and memory of methods on a model.")
def bench_command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="embedded, dinov2, timm's name, or hf:NAME.")
    ] = "embedded",
    data: Annotated[
        str | None, typer.Option("--images", help="A folder of images; or fashion, textile, photos, noise.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas; 'none' for settings only.")
    ] = "tome,pitome,evit,random",
    shares: Annotated[
        str, typer.Option(help="Shares of the multiply-adds to set each method to.")
    ] = "0.85,0.7,0.55,0.4",
    settings: Annotated[list[str] | None, typer.Option("--setting", help="One more arm, such as 'tome r=13'.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Labelled images to test on, at most.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed forwards of each arm.")] = 20,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images. [default: the model's]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU. [default: torch's]")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images and the order of the arms.")] = 0,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No trained weights: speed only.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("tokred-bench"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of an earlier run.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add the rows to an earlier run's CSV file.")] = False,
) -> None:
    """Quality, speed and memory of methods on a model."""
    from tokred.bench import models as subjects
    from tokred.bench import results as outputs
    from tokred.bench import run as bench
    from tokred.bench import tasks
    from tokred.cli import tables

    set_threads(threads)
    with refusing():
        options = _options(device, dtype, batch=batch, rounds=rounds, seed=seed)
        names = [] if methods.strip() == "none" else _names(methods)
        wanted = _shares(shares)
        subject = subjects.load(model, size=size, random_weights=random_weights)
        names, left = bench.supported(subject, names)
        arms = bench.choose(subject, names, settings or [], wanted)
        if len(arms) == 1:
            raise ValueError(f"there is nothing to measure on {model}: {'; '.join(left) or 'no method, no setting'}")
        task = tasks.choose(subject, data, count=count, seed=seed)
        outputs.free(folder, ())
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    with progress(bench.ticks(task, arms, options), f"{len(arms)} arms") as tick:
        rows = bench.run(subject, task, arms, options, tick)
    out.print(tables.bench_table(rows))
    stem = "bench-" + "".join(c if c.isalnum() or c in "._-" else "_" for c in model).strip("_")
    with refusing():
        paths = bench.write(rows, folder, stem, force=force, append=append)
    written(paths)


def _shares(text: str) -> list[float]:
    try:
        found = [float(s) for s in text.split(",") if s.strip()]
    except ValueError as error:
        raise ValueError(f"--shares is a list of numbers such as 0.7,0.5, got {text!r}") from error
    if not all(0 < s < 1 for s in found):
        raise ValueError(f"--shares must lie between 0 and 1, got {text!r}")
    return found


def _options(device: str, dtype: str, **rest: Any) -> Any:
    import torch

    from tokred.bench.run import Options

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"--dtype must be {', '.join(kinds)}, got {dtype!r}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA device")
    return Options(device=device, dtype=kinds[dtype], **rest)


# Files of their own: this one has grown long enough.
app.command("doctor", short_help="Whether tokred works with what is installed here.")(doctor_command)
app.command("explain", short_help="What a method could gain on a denoiser.")(explain_command)
app.command("viz", short_help="What was merged into what, over the image, block by block.")(viz_command)
app.add_typer(evaluate_app, name="eval", short_help="Harnesses of others, such as lm-eval.")
