"""A recording as one HTML page that needs nothing else: a slider over the blocks, drawn on canvases."""

from __future__ import annotations

import base64
import html
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.analysis.viz.recording import Recording

TEMPLATE = Path(__file__).parent / "templates" / "viz.html"
PLACE = re.compile(r"\{\{(\w+)\}\}")


def write(recording: Recording, path: Path | str, *, title: str = "What became of every patch") -> Path:
    """Write the page.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.write_text(render(recording, title), encoding="utf-8", newline="\n")
    return path


def render(recording: Recording, title: str) -> str:
    """The page as text; every name in it is escaped."""
    parts = {
        "title": html.escape(title),
        "style": (TEMPLATE.parent / "style.css").read_text("utf8"),
        "intro": html.escape(_intro(recording)),
        "soft": _soft(recording),
        "columns": "one" if len(recording.runs) == 1 else "several",
        "images": "\n".join(_section(recording, i) for i in range(len(recording.names))),
        "data": as_json(data(recording)),
    }
    return PLACE.sub(lambda found: parts[found[1]], TEMPLATE.read_text("utf-8"))


def data(recording: Recording) -> dict[str, Any]:
    """The data that the page's script reads.

    ``images[i].runs[m]`` has ``tokens`` and ``macs`` of each stage, and ``groups``: for each stage the patch that
    stands for each patch's token (-1: pruned), or null where nothing has changed since the stage before. Before the
    first block every patch stands for itself. ``means`` are the patches' mean colours as 0xRRGGBB.
    """
    return {
        "grid": list(recording.grid),
        "depth": recording.depth,
        "length": recording.length,
        "base": list(recording.base),
        "methods": [run.label for run in recording.runs],
        "images": [
            {
                "name": name,
                "picture": picture(recording.pixels[i]),
                "means": means(recording.pixels[i], recording.grid),
                "runs": [
                    {"tokens": run.tokens[i].tolist(), "macs": run.macs[i].tolist(), "groups": _groups(run.groups[i])}
                    for run in recording.runs
                ],
            }
            for i, name in enumerate(recording.names)
        ],
    }


def _groups(stages: Tensor) -> list[list[int] | None]:
    """Lists of groups, one a stage, None where nothing has changed since the stage before; the first is that of the
    untouched image."""
    before = [torch.arange(stages.shape[1], dtype=stages.dtype), *stages]
    return [None if torch.equal(a, b) else b.tolist() for a, b in zip(before, stages, strict=False)]


def means(pixels: Tensor, grid: tuple[int, int]) -> list[int]:
    """The mean colour of each patch of ``(C, H, W)`` uint8, as 0xRRGGBB."""
    colours = F.adaptive_avg_pool2d(pixels.float(), grid).round().long().expand(3, -1, -1).flatten(1)
    return ((colours[0] << 16) + (colours[1] << 8) + colours[2]).tolist()


def picture(pixels: Tensor) -> str:
    """``(1 or 3, H, W)`` uint8 as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def png(pixels: Tensor) -> bytes:
    """``(1 or 3, H, W)`` uint8 as a PNG file, grey or colour."""
    channels, high, wide = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(high, wide * channels)
    # Each row as its difference to the one above (filter 2), which packs photos better.
    above = torch.cat([rows.new_zeros(1, rows.shape[1]), rows[:-1]])
    filtered = torch.cat([rows.new_full((high, 1), 2), rows - above], 1)
    header = struct.pack(">IIBBBBB", wide, high, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = zlib.compress(bytes(filtered.flatten().tolist()), 9)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def as_json(found: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(found, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _intro(recording: Recording) -> str:
    rows, columns = recording.grid
    protected = f" and {recording.protected} protected" if recording.protected else ""
    counts = f"{recording.length} tokens, {recording.depth} blocks"
    return f"{recording.family}: {rows} × {columns} patches{protected}, {counts}."


def _soft(recording: Recording) -> str:
    soft = ", ".join(html.escape(run.label) for run in recording.runs if run.soft)
    if not soft:
        return ""
    return f"<p>{soft}: patches are handed out in shares, and drawn with the token that gets the largest one.</p>"


def _section(recording: Recording, i: int) -> str:
    """One image: its slider, a canvas for each method, and the numbers as a table."""
    name, depth = html.escape(recording.names[i]), recording.depth
    figures = "\n".join(_figure(recording, i, m) for m in range(len(recording.runs)))
    return f"""<section aria-labelledby="name-{i}" data-image="{i}">
<h2 id="name-{i}">{name}</h2>
<p class="slider"><label for="slider-{i}">Stage</label>
<button type="button" class="play" id="play-{i}" aria-label="Play or stop: {name}">Play</button>
<input type="range" id="slider-{i}" min="0" max="{depth}" value="{depth}" step="1">
<span class="where" id="where-{i}">after block {depth}</span></p>
<div class="methods">
{figures}
</div>
{_table(recording, i)}
</section>"""


def _figure(recording: Recording, i: int, m: int) -> str:
    name, method = html.escape(recording.names[i]), html.escape(recording.runs[m].label)
    return f"""<figure>
<figcaption id="caption-{i}-{m}"><strong>{method}</strong> <span class="count"></span></figcaption>
<canvas data-method="{m}" tabindex="0" role="application" aria-roledescription="patches" aria-label="{name}, {method}"
 aria-describedby="caption-{i}-{m} group-{i}-{m}"></canvas>
<p class="group" id="group-{i}-{m}" aria-live="polite"></p>
{_answer(recording, i, m)}
</figure>"""


def _answer(recording: Recording, i: int, m: int) -> str:
    """The class of one image under a method, and that of the unpatched model."""
    run = recording.runs[m]
    if not run.answers:
        return ""
    after, before = html.escape(run.answers[i]), html.escape(recording.answers[i])
    return f'<p class="answer"><b>Answer</b> {after} <span class="same">unpatched: {before}</span></p>'


def _table(recording: Recording, i: int) -> str:
    """Tokens and multiply-adds of every stage, for those who do not see the canvas."""
    heads = "".join(
        f'<th scope="col">{html.escape(run.label)}: tokens</th><th scope="col">GMACs so far</th>'
        for run in recording.runs
    )
    rows = []
    for stage in range(recording.depth + 1):
        cells = "".join(
            f"<td>{int(run.tokens[i, stage])}</td><td>{int(run.macs[i, stage]) / 1e9:.3f}</td>"
            for run in recording.runs
        )
        rows.append(f'<tr><th scope="row">{"image" if stage == 0 else stage}</th>{cells}</tr>')
    body = "\n".join(rows)
    return f"""<details><summary>Numbers</summary>
<div class="wide"><table>
<thead><tr><th scope="col">after block</th>{heads}</tr></thead>
<tbody>
{body}
</tbody></table></div></details>"""
