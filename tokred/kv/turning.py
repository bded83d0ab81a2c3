"""Rotary embedding of rows at given positions, and back: the first channels turn as two halves, others do not."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, positions: Tensor, angle: Tensor, *, back: bool = False) -> Tensor:
    """Rows as they are at other positions.

    Args:
        x: ``[B, H, n, D]``, or ``[B, H, M, n, D]`` of several lots at the same positions, of all samples.
        positions: ``[B or 1, n]`` int64, by how many steps rows turn.
        angle: ``[R]`` of one step; ``2 * R`` channels turn.
        back: whether they turn back.

    Returns:
        The same shape in float32, or float64 if ``x`` is.
    """
    kind, r = torch.promote_types(x.dtype, torch.float32), len(angle)
    # Angles of late positions would lose their last digits in float32.
    steps = positions.unsqueeze(-1) * angle.double()
    phase = torch.complex(steps.cos().to(kind), steps.sin().to(kind)).unsqueeze(1)
    a, b = (x[..., i * r : (i + 1) * r].to(kind).contiguous() for i in (0, 1))
    z = torch.complex(a, b) * (phase.conj() if back else phase)
    return torch.cat([z.real, z.imag, x[..., 2 * r :].to(kind)], -1)
