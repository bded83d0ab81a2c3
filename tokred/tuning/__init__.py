"""``tokred.tune``: a search for methods, amounts and schedules over the layers, where the user runs the model.

``space`` says which settings there are, ``speed`` predicts from a few measured times how fast each is, ``judge`` says
what each loses, ``search`` looks for the best, ``finals`` measures those beside each other, and ``result`` is what the
user gets. All that is asked of the benchmark's engine stands in ``engine``.
"""

from __future__ import annotations

from tokred.tuning.result import Tuned
from tokred.tuning.run import tune

__all__ = ["Tuned", "tune"]
