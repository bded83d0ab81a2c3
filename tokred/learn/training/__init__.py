"""Training as users do it: by a recipe over ``accelerate``, and a callback for transformers' ``Trainer``.

from tokred.learn.training import train
train(model, (images, labels), tokred.learn.recipe("cropr"), "folder")

Needs ``pip install 'tokred[train]'``.
"""

from tokred.learn.training.checkpoint import Checkpoint
from tokred.learn.training.data import Samples, accuracy
from tokred.learn.training.run import Trained, train

__all__ = ["Checkpoint", "Samples", "Trained", "accuracy", "train"]
