"""How the patches of one forward stand, from where they are made to the first block: ``Sides`` and the ``Note``."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import backward_pass
from tokred.encoder.motion import frame_motion


class Sides(NamedTuple):
    """How patches stand: rows and columns, of each of several frames where they are a video's.

    Attributes:
        frames: of a video; None for an image.
        rows, columns: of a frame.
        motion: ``(B, number)`` float32, how much each patch of a video changes from frame to frame; None: nobody asks.
        pixels: ``(B, number, F)`` float32, the patches as they came, channel after channel; None: nobody asks.
    """

    frames: int | None
    rows: int
    columns: int
    motion: Tensor | None = None
    pixels: Tensor | None = None

    @property
    def number(self) -> int:
        """How many patches that are."""
        return (self.frames or 1) * self.rows * self.columns


class Note:
    """Sides that the first block has not taken yet. Copies and pickles start empty."""

    def __init__(self) -> None:
        self.left: dict[int, tuple[int, Sides | None]] = {}

    def leave(self, sides: Sides | None) -> None:
        """Write down how the patches of this pass stand."""
        self.left[_thread()] = (_pass(), sides)

    def take(self) -> Sides | None:
        """The sides of this pass, once."""
        here, sides = self.left.pop(_thread(), (None, None))
        return sides if here == _pass() else None

    def __getstate__(self) -> dict[str, Any]:
        return {"left": {}}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _pass() -> int:
    """The backward that is running (a checkpoint's recomputation); -1 in a forward."""
    return -1 if torch.compiler.is_compiling() else backward_pass()


def of_convolution(module: nn.Module, inputs: Any, output: Any) -> Sides | None:
    """Sides of the map that a convolution made, ``(B, C, H, W)`` or ``(B, C, T, H, W)``."""
    if not isinstance(output, Tensor) or output.ndim not in (4, 5):
        return None
    *frames, rows, columns = output.shape[2:]
    return Sides(frames[0] if frames else None, rows, columns)


def convolution(module: Any) -> nn.Module | None:
    """The convolution that makes patches: ``module`` itself, or the one inside; None where there is none."""
    if not isinstance(module, nn.Module):
        return None
    return next((m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)


def films(module: Any) -> bool:
    """True for a convolution over the frames of a clip whose tokens are blocks of pixels that do not overlap."""
    made = convolution(module)
    return (
        isinstance(made, nn.Conv3d)
        and tuple(made.stride) == tuple(made.kernel_size)
        and not any(made.padding)
        and set(made.dilation) == {1}
    )


def motion_of(module: Any, clip: Tensor) -> Tensor:
    """``(B, number)`` float32: how much the pixels of each token of clips ``(B, C, T, H, W)`` change from frame to
    frame, see :func:`films`."""
    made = convolution(module)
    assert isinstance(made, nn.Conv3d)
    tubelet, high, wide = made.kernel_size
    return frame_motion(clip.transpose(1, 2), (high, wide), tubelet)


def pixels_of(module: Any, image: Tensor) -> Tensor | None:
    """``(B, N, F)`` float32: the patches of images ``(B, C, H, W)``, as :func:`tiles` has a convolution cut them."""
    size = tiles(module)
    if size is None or image.ndim != 4:
        return None
    with torch.no_grad():
        return torch.nn.functional.unfold(image.float(), size, stride=size).mT


def tiles(module: Any) -> tuple[int, int] | None:
    """Height and width of patches that lie side by side; None where a convolution's overlap, or stand apart."""
    made = convolution(module)
    if not isinstance(made, nn.Conv2d) or made.kernel_size != made.stride or set(made.padding) != {0}:
        return None
    height, width = made.kernel_size
    return height, width


def numbers_of(module: Any) -> int:
    """How many numbers of an image one patch has, as :func:`pixels_of` gives them; 0 where patches overlap."""
    made, size = convolution(module), tiles(module)
    if size is None or not isinstance(made, nn.Conv2d):
        return 0
    return made.in_channels * size[0] * size[1]
