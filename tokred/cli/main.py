"""The command line: one file for each command, and the application that holds them."""

from __future__ import annotations

import sys
from typing import Annotated

from tokred import __version__

try:
    import typer
except ImportError as error:  # a script's entry point has no better place to say this
    raise SystemExit(f"tokred's command line needs {error.name}: pip install 'tokred[cli]'") from error

# They need typer.
from tokred.cli.app import app_command
from tokred.cli.bench import bench_command
from tokred.cli.calibrate import calibrate_command
from tokred.cli.console import INTERRUPTED
from tokred.cli.demo import demo_command
from tokred.cli.doctor import doctor_command
from tokred.cli.evaluate import evaluate_app
from tokred.cli.explain import explain_command
from tokred.cli.lists import flops_command, list_command
from tokred.cli.train import train_command
from tokred.cli.tune import tune_command
from tokred.cli.viz import viz_command

app = typer.Typer(
    name="tokred",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``tokred`` script and of ``python -m tokred``."""
    try:
        app(prog_name="tokred")
    except KeyboardInterrupt:
        print("tokred: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


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
      tokred list deit_small_patch16_224              which methods run on this model
      tokred flops deit_small_patch16_224 -m "tome r=13"
      tokred bench deit_small_patch16_224 --data photos -m "tome r=13" -m "evit kappa=0.7"
      tokred bench hf:path/to/a/llama --data book.txt -m "snapkv budget=0.25"
      tokred tune deit_small_patch16_224 --data photos --speedup 1.5
      tokred train cropr                              a method with weights, on the embedded model
      tokred calibrate hf:FOLDER book.txt -o queries.safetensors
      tokred viz -m "tome r=13"                       what was merged into what, as a page and PNG
      tokred app                                      try methods on pictures, in the browser
      tokred explain sdxl --size 1024                 what a method could gain on a denoiser
      tokred eval lm-eval hf:FOLDER --tasks ruler -m "snapkv budget=0.25"
      tokred doctor                                   whether everything works with what is installed here

    "tokred COMMAND --help" has examples of each. Exit status: 0; 1 where something is broken; 2 where the input is
    wrong; 130 after Ctrl-C.
    """


# The order of `tokred --help`. A command is a function in a file of its own.
for name, command, summary in (
    ("demo", demo_command, "Accuracy against speed on the embedded model, offline."),
    ("bench", bench_command, "Quality, speed and memory of methods on your model and data."),
    ("tune", tune_command, "Find the method and the schedule that suit your model."),
    ("train", train_command, "Train a method with weights by a recipe, on labelled images."),
    ("calibrate", calibrate_command, "Statistics of a language model that some cache policies need."),
    ("list", list_command, "Methods and families of models, one line each."),
    ("flops", flops_command, "Tokens and multiply-adds, without running anything."),
    ("explain", explain_command, "What a method could gain on a denoiser."),
    ("viz", viz_command, "What was merged into what, over the image, block by block."),
    ("app", app_command, "Try methods on pictures, in the browser."),
    ("doctor", doctor_command, "Whether tokred works with what is installed here."),
):
    app.command(name, short_help=summary)(command)
app.add_typer(evaluate_app, name="eval", short_help="Harnesses of others, such as lm-eval.")
