"""Arms of ``encoder/train_learned``: recipes at a share of the work, methods without weights, and smaller models."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tokred
from tokred import adapters, learn
from tokred.bench import embedded
from tokred.bench.data.model import PATCH, SIZE
from tokred.bench.data.scenes import GARMENT
from tokred.learn.recipe import FOLDER

# Of methods that learn beside a model that stays as it is, at a third of the work.
WEIGHTS = Path(__file__).parent / "weights"
COUNTS, SHARES = list(range(1, 60)), [k / 100 for k in range(99, 1, -1)]
# The parameter that decides how much is removed, and its values, the most work first.
AMOUNTS: dict[str, tuple[str, list[Any]]] = {
    "bavit": ("rho", SHARES),
    "cropr": ("r", COUNTS),
    "downsample": ("keep", SHARES),
    "dtem": ("r", COUNTS),
    "dynamicvit": ("rho", SHARES),
    "evit": ("kappa", SHARES),
    "pitome": ("ratio", SHARES),
    "random_prune": ("r", COUNTS),
    "skipvit": ("rho", [k / 100 for k in range(1, 100)]),
    "tome": ("r", COUNTS),
    "vtm": ("R", [k / 100 for k in range(1, 101)]),
}
# Names of the script's own: a method with parameters.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"class_attention": ("evit", {"fuse": False})}
# Models that remove nothing; what stands for a method in their recipes removes no token.
DENSE, SMALLER = "dense", "smaller"
# Methods that learn by labels of patches.
LABELLED = ("bavit",)
NONE: tuple[str, dict[str, Any]] = ("random_prune", {"r": 0})
# A model that has lost blocks and neurons has more to learn than one that has lost tokens.
FASTER = 10


@dataclass(frozen=True)
class Arm:
    """One model to train.

    Attributes:
        name: as it was given.
        share: of the dense blocks' multiply-adds.
        recipe: how it is trained.
        build: makes the model that training begins with.
    """

    name: str
    share: float
    recipe: learn.Recipe
    build: Callable[[], nn.Module]


def work(model: nn.Module, method: tokred.Method | None) -> int:
    """Multiply-adds of all blocks for one picture, by the method's plan, and of a network that decides before them."""
    host = adapters.find(model)
    one = shape(model)
    decides = method is not None and method.name in LABELLED
    own = before_blocks(method.module(host.model_facts()), host.tokens(one) - host.prefix) if decides and method else 0
    return own + sum(macs for _, _, macs in host.plan(method, one))


def shape(model: Any) -> tuple[int, ...]:
    """That of a batch of one picture, by a timm model's patch embedding."""
    return (1, 3, *model.patch_embed.img_size)


def before_blocks(module: nn.Module | None, patches: int = (SIZE // PATCH) ** 2) -> int:
    """Multiply-adds of what a method runs on one picture before the first block, which no report counts."""
    cost: Any = getattr(module, "cost", None)
    return 0 if cost is None else int(cost(patches))


def setting(name: str, share: float, model: nn.Module, **more: Any) -> tokred.Method:
    """The method whose blocks do the most work that is at most ``share`` of the dense ones', or a hundredth more.

    Args:
        name: of :data:`AMOUNTS` or :data:`ALIASES`.
        share: of the multiply-adds.
        model: without a patch.
        more: other parameters of the method.

    Raises:
        ValueError: even the least work of this method is more.
    """
    name, own = ALIASES.get(name, (name, {}))
    dense = work(model, None)
    parameter, values = AMOUNTS[name]
    for value in values:
        method = tokred.make(name, **{**own, **more, parameter: value})
        if work(model, method) / dense <= share + 0.01:
            return method
    raise ValueError(f"{name} has no setting for {share:.0%} of the work")


def smaller(share: float, plain: nn.Module | None = None) -> nn.Module:
    """A copy of a timm model with fewer blocks, and fewer neurons in their MLPs, at ``share`` of the blocks' work.

    As few blocks as can do that work whole stay, at even distances, the first and the last among them; then each MLP
    loses the neurons whose incoming and outgoing weights have the smallest product of norms.

    Args:
        share: of the multiply-adds.
        plain: without a patch; None: the embedded default.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
    model: Any = embedded.load() if plain is None else copy.deepcopy(plain)
    depth = len(model.blocks)
    left = max(2, math.ceil(share * depth - 1e-6))
    stay = [round(i * (depth - 1) / (left - 1)) for i in range(left)]
    cost = adapters.find(model).cost(model.blocks[0])
    n = adapters.find(model).tokens(shape(model))
    whole = cost.macs(n, n, True)
    mlp = n * cost.mlp
    part = max(0.05, 1 - (left * whole - share * depth * whole) / (left * mlp))
    model.blocks = nn.Sequential(*(copy.deepcopy(model.blocks[i]) for i in stay))
    for block in model.blocks:
        _narrow(block.mlp, part)
    return model.eval()


@torch.no_grad()
def _narrow(mlp: Any, part: float) -> None:
    """Leave a share of the hidden neurons of an MLP, those that weigh most."""
    first, second = mlp.fc1, mlp.fc2
    count = max(1, math.floor(part * first.out_features + 1e-6))
    weight = first.weight.norm(dim=1) * second.weight.norm(dim=0)
    rows = weight.argsort(descending=True, stable=True)[:count].sort().values
    mlp.fc1 = nn.Linear(first.in_features, count)
    mlp.fc2 = nn.Linear(count, second.out_features)
    mlp.fc1.weight.copy_(first.weight[rows])
    mlp.fc1.bias.copy_(first.bias[rows])
    mlp.fc2.weight.copy_(second.weight[:, rows])
    mlp.fc2.bias.copy_(second.bias)


@torch.inference_mode()
def halting(share: float, model: nn.Module, parameters: dict[str, Any], images: Tensor) -> float:
    """The ``beta`` at which ``avit`` on ``model``, before it has learned anything, does ``share`` of the work.

    Args:
        share: of the dense blocks' multiply-adds.
        model: without a patch.
        parameters: of ``avit``.
        images: ``(N, 3, H, W)`` to run, one by one; what they show is not looked at.
    """
    dense = work(model, None)
    low, high = -12.0, 12.0
    for _ in range(9):
        middle, done = (low + high) / 2, 0
        with tokred.applied(model, tokred.make("avit", **{**parameters, "beta": middle})):
            for image in images:
                model(image[None])
                done += tokred.report(model).macs
        low, high = (low, middle) if done / len(images) > share * dense else (middle, high)
        # The larger beta, the later tokens halt, and the more work there is.
    return round((low + high) / 2, 3)


def recipes(
    names: Sequence[str], steps: int, batch: int, lr: float = 0.0, *, labels: bool = False
) -> dict[str, learn.Recipe]:
    """The recipes by the names that were given; a method without weights takes the first one's numbers.

    Where the first name is no recipe either, ``steps``, ``batch`` and ``lr`` are all there is to say: the labels alone
    teach.

    Args:
        names: recipes of tokred, TOML files, methods, :data:`ALIASES`, ``"dense"`` and ``"smaller"``.
        steps: instead of the recipes'; 0: theirs.
        batch: likewise.
        lr: highest rate of the model's own weights, where they learn; 0: the recipes'.
        labels: nothing is learned from the dense model, whatever the recipes say.

    Raises:
        ValueError: a name is none of these, or no recipe comes before a method and not all numbers are given.
    """
    alone = learn.Recipe(*NONE, steps=steps, batch=batch, lr=lr, warmup=steps // 10) if steps and batch and lr else None
    found: dict[str, learn.Recipe] = {}
    for name in names:
        if name.endswith(".toml") or (FOLDER / f"{name}.toml").exists():
            one = learn.recipe(name)
            if labels:
                one = dataclasses.replace(one, logits=0.0, tokens=0.0, tokens_of="")
        elif not found and alone is None:
            raise ValueError(
                f"{name!r} is no recipe: the first name has to be one, since others train like it, or steps, batch and "
                "lr have to be given"
            )
        else:
            method, parameters = NONE if name in (DENSE, SMALLER) else ALIASES.get(name, (name, {}))
            tokred.make(method, **parameters)
            # Nothing of the method learns, and no soft decisions say which tokens are to be like the teacher's.
            like = next(iter(found.values()), alone)
            assert like is not None
            one = dataclasses.replace(
                like, method=method, parameters=parameters, lr_method=None, tokens=0.0, tokens_of="", schedule={},
                lr=like.lr * (FASTER if name == SMALLER else 1),
            )  # fmt: skip
        numbers = {"steps": steps, "batch": batch, "lr": lr * (FASTER if name == SMALLER else 1) * bool(one.lr)}
        found[Path(name).stem] = dataclasses.replace(one, **{k: v for k, v in numbers.items() if v})
    return found


def at_share(name: str, recipe: learn.Recipe, share: float, plain: nn.Module, images: Tensor | None = None) -> Arm:
    """The model of a name at a share of the work; where the amount is what a method learns, it is told its goal.

    Args:
        name: of ``recipes``.
        recipe: that of the name.
        share: of the dense blocks' multiply-adds.
        plain: the model, without a patch.
        images: ``(N, 3, H, W)``, where the work of a method depends on the pictures; None: 20 of the embedded sample.

    Raises:
        ValueError: the method cannot do with so little.
    """
    if name == DENSE:
        return Arm(name, 1.0, recipe, lambda: copy.deepcopy(plain))
    if name == SMALLER:
        return Arm(name, share, recipe, lambda: smaller(share, plain))
    parameters = dict(recipe.parameters)
    if recipe.method in AMOUNTS and not _listed(parameters.get(AMOUNTS[recipe.method][0])):
        method = setting(recipe.method, share, plain, **parameters)
        parameter = AMOUNTS[recipe.method][0]
        parameters[parameter] = method.to_dict()["parameters"][parameter]
    elif recipe.method == "diffrate":
        host = adapters.find(plain)
        parameters |= {"target": share, "patches": host.tokens(shape(plain)) - host.prefix}
    elif recipe.method == "dovit":
        share = 1.0  # decided by confidence alone, whatever work that is
    elif recipe.method == "avit":
        parameters["beta"] = halting(share, plain, parameters, embedded.sample(20).images if images is None else images)
    # Schedules end at what was asked for, not at what the recipe has.
    schedule = {
        key: dataclasses.replace(ramp, end=parameters[key]) if key in parameters else ramp
        for key, ramp in recipe.schedule.items()
    }
    recipe = dataclasses.replace(recipe, parameters=parameters, schedule=schedule)
    return Arm(name, share, recipe, lambda: copy.deepcopy(plain))


def _listed(amount: object) -> bool:
    """True for an amount of each block, which a recipe has for one share alone."""
    return isinstance(amount, list | tuple)


def foreground(count: int) -> Tensor:
    """``(count, 196)`` bool: the patches of the embedded sample that a garment covers by at least half."""
    with np.load(embedded.FOLDER / embedded.SAMPLE) as f:
        kept = {name: torch.from_numpy(f[name][:count]) for name in ("garment", "flip", "place")}
        garments = torch.from_numpy(f["garments"])
    return covered(garments[kept["garment"]], kept["flip"], kept["place"]).flatten(1) >= 0.5


def covered(garments: Tensor, flip: Tensor, place: Tensor, size: int = SIZE, patch: int = PATCH) -> Tensor:
    """``(N, size // patch, size // patch)`` float32: the share of each patch that a garment covers.

    Args:
        garments: ``(N, 28, 28)`` uint8.
        flip: ``(N,)`` bool, which are mirrored.
        place: ``(N, 2)`` int64, their tops and lefts.
        size: pixels of a picture each way.
        patch: those of a patch.
    """
    shown = garments > 0
    shown = torch.where(flip.view(-1, 1, 1), shown.flip(-1), shown)
    pixels = torch.zeros(len(shown), size, size)
    for one, own, (top, left) in zip(pixels, shown, place.tolist(), strict=True):
        one[top : top + GARMENT, left : left + GARMENT] = own.float()
    return torch.nn.functional.avg_pool2d(pixels[:, None], patch).squeeze(1)
