"""Rows of a benchmark with the columns of timm's results, so that both tables join on ``model``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tokred import api
from tokred.bench.arms import BASE
from tokred.core.folders import check_file

# Of timm's tables of accuracy, in their order, and of its tables of speed.
ACCURACY = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
SPEED = ("infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_gmacs")
OURS = ("method", "setting", "top1_low", "top1_high", "top1_difference", "speedup", "speedup_low", "speedup_high")
COLUMNS = (*ACCURACY, *SPEED, *OURS)


def timm_columns(
    result: Any, path: str | Path | None = None, *, model: Any = None, batch_size: int | None = None, top5: Any = None
) -> list[dict[str, Any]]:
    """The rows of a benchmark under the names, and in the units, of timm's results tables.

    Accuracies are in per cent, ``param_count`` in millions, ``infer_step_time`` in milliseconds a batch. The dense
    model's row is what timm would have written; every other row bears the same ``model``, and its method and setting in
    columns of their own. What is not known is empty.

    Args:
        result: of :func:`tokred.benchmark` with the metric ``"top1"``.
        path: a ``.csv`` file that is written.
        model: the model of timm that was measured, for ``param_count``, ``img_size``, ``crop_pct``, ``interpolation``
            and ``infer_gmacs``.
        batch_size: images of a batch, for ``infer_batch_size`` and ``infer_samples_per_sec``.
        top5: a result of the same methods with the metric ``"top5"``; None: ``result`` by it, if it was taken too.

    Returns:
        A dictionary a row that was measured, with the keys of :data:`COLUMNS`.

    Raises:
        TypeError, ValueError: a result has another metric, or an argument is wrong.
    """
    if top5 is None and "top5" in getattr(result, "metrics", ()):
        top5 = result.by("top5")
    for given, name, metric in ((result, "result", "top1"), (top5, "top5", "top5")):
        if given is not None and getattr(given, "metric", None) != metric:
            raise ValueError(
                f"{name} must be a result of tokred.benchmark with metric={metric!r}, got "
                f"{getattr(given, 'metric', type(given).__name__)!r}"
            )
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    about = {} if model is None else _about(model)
    gmacs = about.pop("gmacs", None)
    fives = {} if top5 is None else {(r["method"], r["setting"]): r["quality"] for r in top5.measured}
    name = about.pop("name", None) or result.model
    rows = []
    for one in result.measured:
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"model": name, **about}
        row |= _accuracy("top1", one["quality"]) | _accuracy("top5", fives.get((one["method"], one["setting"])))
        row |= {"infer_step_time": round(1000 * one["seconds"], 3), "infer_img_size": about.get("img_size")}
        if batch_size is not None:
            row |= {"infer_batch_size": batch_size, "infer_samples_per_sec": round(batch_size / one["seconds"], 2)}
        share = 1.0 if one["method"] == BASE else one["work"]
        row["infer_gmacs"] = None if gmacs is None or share is None else round(gmacs * share, 2)
        row |= {"method": one["method"], "setting": one["setting"]}
        for ours, theirs in (("top1_low", "low"), ("top1_high", "high"), ("top1_difference", "difference")):
            row[ours] = None if one[theirs] is None else round(100 * one[theirs], 3)
        row |= {k: one[k] for k in ("speedup", "speedup_low", "speedup_high")}
        rows.append(row)
    if path is not None:
        _write(Path(path), rows)
    return rows


def _accuracy(name: str, share: float | None) -> dict[str, float | None]:
    if share is None:
        return {name: None, f"{name}_err": None}
    return {name: round(100 * share, 3), f"{name}_err": round(100 - 100 * share, 3)}


def _about(model: Any) -> dict[str, Any]:
    """Facts that timm tells of a model of its own."""
    config = getattr(model, "pretrained_cfg", None)
    if not config or "input_size" not in config:
        raise TypeError(f"model must be a model of timm, got {type(model).__name__} without a pretrained_cfg")
    tag = config.get("tag")
    name = config.get("architecture") or type(model).__name__
    size = tuple(getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:])
    channels = config["input_size"][0]
    return {
        # timm's tables of accuracy name the weights behind a dot, and its tables of speed do not.
        "name": f"{name}.{tag}" if tag else name,
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": int(size[0]),
        "crop_pct": config.get("crop_pct"),
        "interpolation": config.get("interpolation"),
        "gmacs": api.flops(model, None, (1, channels, *size)).macs / 1e9,
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix != ".csv":
        raise ValueError(f"path must be a .csv file, got {path}")
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        out.writerows(rows)
