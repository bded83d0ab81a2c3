"""Pictures of what became of tokens: drawn over images, as figures, sheets and pages that need no server."""

from __future__ import annotations

from tokred.analysis.viz.cached import CacheDrawing, cache
from tokred.analysis.viz.draw import (
    after,
    edges,
    enlarge,
    figure,
    page,
    paint,
    paint_groups,
    palette,
    sheet,
    spaced,
)
from tokred.analysis.viz.drawing import Drawing
from tokred.analysis.viz.latent import LatentDrawing, denoiser
from tokred.analysis.viz.recording import Recording, record
from tokred.analysis.viz.visual import VisualDrawing, vlm
from tokred.analysis.viz.watched import StreamDrawing, stream

__all__ = [
    "CacheDrawing",
    "Drawing",
    "LatentDrawing",
    "Recording",
    "StreamDrawing",
    "VisualDrawing",
    "after",
    "cache",
    "denoiser",
    "edges",
    "enlarge",
    "figure",
    "page",
    "paint",
    "paint_groups",
    "palette",
    "record",
    "sheet",
    "spaced",
    "stream",
    "vlm",
]
