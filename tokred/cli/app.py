"""``tokred app``: a page on which methods are tried on pictures."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokred.cli.options import Model, Threads, check_device

if TYPE_CHECKING:
    from tokred.bench.app.trials import Picture, Trials

PORT, PORTS = 7860, 100  # where a free port is looked for, and among how many


def app_command(
    model: Model = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="An image or a folder of images to begin with, as often as needed. [default: the model's own]",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of a folder, at most.")] = 12,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images. [default: the model's]")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="No trained weights: for speed alone.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Threads = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"Port to listen at. [default: the first free from {PORT}]")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="A public address for some days, through a server of Gradio's makers.")
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Try methods on pictures in the browser: what was merged, the model's answer, the time, tokens, multiply-adds.

    Everything runs on this machine, and nothing leaves it unless --share is given. Ctrl-C ends it.

    \b
    Examples:
      tokred app                                             the embedded model and its images, offline
      tokred app vit_base_patch16_224 -i cat.jpg -i my_photos
      tokred app hf:path/to/a/dinov2 --device cuda
      tokred app --port 8000 --no-browser                    for a machine without a screen
      tokred app --host 0.0.0.0 --threads 4                  for others in the same network
    """
    import torch

    from tokred.bench.app import layout
    from tokred.bench.app.page import Page, gradio
    from tokred.bench.app.trials import of
    from tokred.bench.sources import Options
    from tokred.bench.sources import model as found
    from tokred.cli.console import refusing, set_threads

    set_threads(threads)
    with refusing():
        gradio()  # before a model is loaded
        number = listening(host, port)
        place = torch.device(check_device(device))
        trials = of(found(model or "embedded", Options(size=size, random_weights=random_weights)), place)
        page = Page(trials, gallery(trials, images or [], count))
        blocks = layout.build(page)
        address = layout.launch(blocks, host, number, share=share, browser=not no_browser)
    print(f"tokred app: {trials.subject.name} at {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def listening(host: str, port: int | None) -> int:
    """The port to listen at: the one that is asked for, or else the first free one.

    Raises:
        ValueError: it is in use, or there is no such address on this machine.
    """
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise ValueError(f"--host {host} is no address: {error.strerror}") from error
    for number in range(PORT, PORT + PORTS) if port is None else (port,):
        try:
            with socket.create_server((host, number)) as server:
                return int(server.getsockname()[1])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ValueError(f"--host {host} --port {number} cannot be listened at: {error.strerror}") from error
    if port is None:
        raise ValueError(f"the ports {PORT} to {PORT + PORTS - 1} of {host} are in use: name another one with --port")
    raise ValueError(f"port {port} of {host} is in use: name another one with --port, or leave it out")


def gallery(trials: Trials, images: Sequence[Path], count: int) -> list[Picture]:
    """Pictures to begin with: those that are named, the model's own, or two photographs of scikit-learn's.

    Raises:
        FileNotFoundError, ValueError: one that is named is no image and no folder of images.
    """
    from tokred.bench.sources import NoModelError
    from tokred.cli.viz import pictures

    try:
        return trials.pictures(*pictures(trials.subject, images, count))
    except NoModelError:
        return photographs(trials)


def photographs(trials: Trials) -> list[Picture]:
    """Photographs that come along with scikit-learn; none without it, or where the model sees no colours."""
    import torch

    from tokred.bench import images

    try:
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError:
        return []
    subject = trials.subject
    if subject.channels != 3:
        return []
    found = load_sample_images()
    pixels = torch.stack([images.fitted(Image.fromarray(p), subject.size, 3, subject.crop) for p in found.images])
    return trials.pictures(pixels, pixels, [Path(name).stem for name in found.filenames])
