"""Motion of each token of a video, from the differences between its frames."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_motion(video: Tensor, patch: int | tuple[int, int], tubelet: int = 1) -> Tensor:
    """Mean absolute difference to the frame before, averaged over the pixels of each token.

    A stand-in for the motion vectors of a video's codec, which are what the method that asks for motion was published
    with (ours). The first frame has no frame before it and takes the difference to the second; a single frame does
    not move.

    Args:
        video: ``(B, T, C, H, W)``, any float type, or integers.
        patch: side of a patch in pixels, or height and width.
        tubelet: frames per token.

    Returns:
        ``(B, T // tubelet * (H // height) * (W // width))`` float32, time first, then rows, then columns, as patch
        embeddings flatten them. Frames and pixels beyond the last whole token are left out.

    Raises:
        ValueError: ``video`` is not five-dimensional, or a token does not fit into it.

    Source: after Lee et al., Video Token Merging for Long-form Video Understanding, NeurIPS 2024.
    """
    if video.ndim != 5:
        raise ValueError(f"video must be (B, T, C, H, W), got shape {tuple(video.shape)}")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    whole = (video.shape[1], video.shape[3], video.shape[4])
    for name, size, limit in zip(("tubelet", "patch", "patch"), (tubelet, height, width), whole, strict=True):
        if not 1 <= size <= limit:
            raise ValueError(f"{name} is {size}; allowed are 1 to {limit} for a video of shape {tuple(video.shape)}")
    frames = video.detach().float()
    if frames.shape[1] == 1:
        change = torch.zeros_like(frames[:, :, 0])
    else:
        change = frames.diff(dim=1).abs().mean(2)
        change = torch.cat([change[:, :1], change], 1)
    kernel = (tubelet, height, width)
    return torch.nn.functional.avg_pool3d(change.unsqueeze(1), kernel, stride=kernel).flatten(1)


def feature_motion(x: Tensor, frames: int) -> Tensor:
    """Mean absolute difference of each token's features to those of the same place in the frame before.

    The same as :func:`frame_motion` where features are at hand and pixels are not (ours). The first frame takes the
    difference to the second; a single frame does not move.

    Args:
        x: ``(B, T * N, C)`` features of any float type, frame after frame.
        frames: ``T``.

    Returns:
        ``(B, T * N)`` float32.

    Raises:
        ValueError: the tokens are no such frames.
    """
    if x.ndim != 3 or frames < 1 or x.shape[1] % frames:
        raise ValueError(f"frames is {frames}, which does not divide the tokens of x, of shape {tuple(x.shape)}")
    each = x.detach().float().reshape(x.shape[0], frames, -1, x.shape[2])
    if frames == 1:
        return torch.zeros_like(each[..., 0]).flatten(1)
    change = each.diff(dim=1).abs().mean(-1)
    return torch.cat([change[:, :1], change], 1).flatten(1)
