"""Every method that acts in the blocks of an encoder, with settings that change how it selects; and sites for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.core.learned import Facts, Learned
from tokred.core.site import Site
from tokred.core.soft import SoftReduction

METRICS = ("k", "q", "v", "x")
FORMS = ("plain", "bsm", "tome-plain", "halves")
FIRST = {"blocks": (0,)}

# Label -> name and parameters; the name stands before the first hyphen. All act in block 0 of 2 on 16 patches.
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{name}-{m}": {"r": 4, "metric": m} for name in ("tome", "tofu", "tinychart", "random") for m in METRICS},
    **{f"tofu-merge-{m}": {"r": 4, "metric": m, "switch": 0} for m in METRICS},
    "tome-sequential": {"r": 4, "split": "sequential"},
    "tinychart-raster": {"r": 4, "order": "raster"},
    **{f"pitome-{f}-{m}": {"ratio": 0.7, "form": f, "metric": m} for f in FORMS for m in METRICS},
    "pitome-gaussian": {"ratio": 0.7, "form": "halves", "energy": "gaussian", "margin": 0.5},
    **{f"kth-{m}": {"k": 3, "metric": m} for m in METRICS},
    "random_prune": {"r": 3},
    "evit": {"kappa": 0.6, **FIRST},
    "evit-drop": {"kappa": 0.6, "fuse": False, **FIRST},
    "evit-normalise": {"kappa": 0.6, "normalise": True, **FIRST},
    "tokentm": {"keep": 0.6, **FIRST},
    "tokentm-length": {"keep": 0.6, "length_only": True, **FIRST},
    "tokentm-direction": {"keep": 0.6, "direction_only": True, **FIRST},
    "zero_tprune": {"rho": 0.6, "r_s": 3, **FIRST},
    "zero_tprune-mean": {"rho": 1.0, "r_s": 3, "heads": "mean", **FIRST},
    "ats": FIRST,
    "ats-share": {"n": 0.6, **FIRST},
    **{f"ppt-pool-{m}": {"r": 4, "threshold": float("inf"), "metric": m, **FIRST} for m in METRICS},
    "ppt-prune": {"r": 4, "threshold": 0.0, **FIRST},
    "ppt-either": {"r": 4, "relative": True, "threshold": 0.12, "sort": True, **FIRST},
    "saint": {"tau": 0.2, "K": 2},
    "saint-nearest": {"tau": 0.2, "K": 2, "nearest": True},
    "saint-full": {"form": "full", "M": 8, "q": 4, **FIRST},
    "algm-windows": {"T": 0.0, "theta": 2},
    "algm-pairs": {"T": 2, "theta": 0.2, "local_block": 0, "global_block": 1},
    "algm-moments": {"T": 2, "local_block": 0, "global_block": 1},
    **{f"vtm-{m}": {"gamma": 3, "R": 0.5, "metric": m, **FIRST} for m in METRICS},
    "vtm-centre": {"variant": "centre", "R": 0.5, **FIRST},
    "vtm-boundary": {"variant": "boundary", "R": None, **FIRST},
    "vtm-motion": {"variant": "motion", "R": 3, **FIRST},
    "vtm-sampling": {"variant": "motion", "R": 0.7, "sampling": True, **FIRST},
    "vtm-learned": {"variant": "learned", "R": 0.5, **FIRST},
    "vomix": {"r": 0.3},
    "vomix-count": {"r": 0.3, "vote": "count", "tau": 0.01},
    "spatten": {"keep": 0.5, "first": 0},
    "spatten-heads": {"keep": 0.5, "first": 0, "heads": 1},
    "ltp": {"thresholds": [0.05, 0.05]},
    "ltp-least": {"thresholds": [0.3, 0.3], "min_keep": 6},
    "downsample": {"keep": 0.5},
    "dynamicvit": {"rho": 0.6, "at": [1]},
    "pixelprune": {"tau": 0.6, "metric": "mae", "min_keep": 0.5},
    "pixelprune-uneven": {"tau": 0.55, "metric": "mae"},
    "dtem": {"r": 4, "dim": 8},
    "avit": {"gamma": 4.0, "beta": 0.0},
    "diffrate": {"prune": [12], "merge": [8]},
    "skipvit": {"rho": 0.4},
    "skipvit-columns": {"rho": 0.4, "score": "columns"},
    "cropr": {"r": 4, "classes": 3},
    "cropr-folded": {"r": [9, 0], "round_to": 4},
    "bavit": {"mode": "ratio", "rho": 0.6, "dim": 12},
    "bavit-uneven": {"theta": 0.5, "dilate": 0, "dim": 12},
    "dovit": {"classes": 2, "confidence": 0.55, "at": [1]},
    "dovit-three": {"classes": 3, "confidence": 0.4, "at": [1], "agg_rate": 0.0},
    "ltp-learn": {"thresholds": [0.05, 0.05], "learn": True},
}  # fmt: skip
# Their step is the second block's.
LAYERS = {"algm-pairs": 1, "algm-moments": 1}
# Without hidden patches only: what is left of a grid is none.
OF_GRID = ("algm-windows", "vtm-centre", "vtm-boundary", "downsample", "pixelprune", "pixelprune-uneven", "bavit",
           "bavit-uneven")  # fmt: skip


def method(label: str) -> tokred.Method:
    """The method of a label."""
    return tokred.make(label.partition("-")[0], **SETTINGS[label])


def learned(label: str, width: int, heads: int = 1) -> Learned | None:
    """The same module at every call, where the method has one, as it decides after training."""
    one = method(label)
    if "module" not in one.reads:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Learned(one.module(Facts("", 2, width, heads, pixels=width)).eval())


def tensors(
    seed: int, *, batch: int = 2, heads: int = 4, kv_heads: int | None = None, n: int = 18, width: int = 6
) -> dict[str, Tensor]:
    """What a host hands over, float32, with neighbours that are alike."""
    g = torch.Generator().manual_seed(seed)
    kv = kv_heads or heads

    def made(*shape: int) -> Tensor:
        found = torch.randn(*shape, generator=g)
        return found + 0.7 * found.roll(1, -2)

    both = (batch, n, heads * width)
    return {
        "x": made(*both),
        "q": made(batch, heads, n, width),
        "k": made(batch, kv, n, width),
        "v": made(batch, kv, n, width),
        "answers": made(batch, heads, n, width),
        "motion": made(batch, n, 1).squeeze(-1),
        "before": made(*both),
        "after": made(*both),
    }


def site(label: str, given: dict[str, Tensor], *, mask: Tensor | None = None, prefix: int = 1, suffix: int = 1) -> Site:
    """A site of 4 x 4 patches between a class token and one at the end, where the method acts."""
    values = dict(given)
    transform = (values.pop("before"), values.pop("after"))
    # Patches look as their tokens are.
    pixels = values["x"][:, prefix : values["x"].shape[1] - suffix]
    return Site(
        pixels=pixels, **values, transform=transform, prefix=prefix, suffix=suffix, grid=(4, 4),
        layer=LAYERS.get(label, 0), depth=2,
        learned=learned(label, values["x"].shape[-1], values["q"].shape[1]), mask=mask,
        totals=None if mask is None else mask.sum(1),
    )  # fmt: skip


def parts(step: tokred.Reduction) -> dict[str, Tensor | None]:
    """What a reduction consists of."""
    found: dict[str, Any] = {
        "representative": step.representative, "source": step.source, "target": step.target, "weight": step.weight,
        "mask": step.mask, "share": step.share if isinstance(step, SoftReduction) else None,
    }  # fmt: skip
    return found


def assert_equal(a: tokred.Reduction, b: tokred.Reduction) -> None:
    """Two reductions are equal bit for bit."""
    assert type(a) is type(b)
    for (name, x), y in zip(parts(a).items(), parts(b).values(), strict=True):
        assert (x is None) == (y is None), name
        assert x is None or y is None or torch.equal(x, y), name
