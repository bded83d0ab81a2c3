"""The seam for methods with weights: gates, losses, saved folders, recipes and a small training loop.

model = tokred.apply(model, "dynamicvit", rho=0.7)      # builds the method's module beside the model
loss = task(model(x), y) + sum(tokred.losses(model).values())
tokred.save(model, "folder"); tokred.apply(other, tokred.load("folder"))
"""

from tokred.core.learned import Facts, Learned, Weights
from tokred.learn.build import build, chosen
from tokred.learn.gates import gated_attention, gumbel_keep
from tokred.learn.loop import Step, Terms, endless, fit, total
from tokred.learn.losses import distill_logits, distill_tokens, ratio_loss
from tokred.learn.recipe import Ramp, Recipe, recipe

__all__ = [
    "Facts",
    "Learned",
    "Ramp",
    "Recipe",
    "Step",
    "Terms",
    "Weights",
    "build",
    "chosen",
    "distill_logits",
    "distill_tokens",
    "endless",
    "fit",
    "gated_attention",
    "gumbel_keep",
    "ratio_loss",
    "recipe",
    "total",
]
