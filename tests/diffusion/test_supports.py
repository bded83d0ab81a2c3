"""What the table of support promises runs, and what it refuses is refused."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.diffusion.tiny import MODELS, inputs, run
from tests.kinds import DENOISERS, each


@pytest.mark.filterwarnings("ignore:.*reduced nothing")
@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
def test_promises_are_kept(kind: str):
    """Every method with its defaults, over steps enough for each to act, with both sides of guidance in a batch."""
    given = inputs(kind)
    sample = given["sample" if "sample" in given else "hidden_states"]
    sample[1] = sample[0]
    model = MODELS[kind]()
    for row in tokred.supports(model):
        if not row.works:
            with pytest.raises((tokred.UnsupportedModelError, tokred.MissingInputError)):
                tokred.apply(model, row.method)
            continue
        with tokred.applied(model, row.method):
            for time in (0.9, 0.8, 0.7):
                old, new = given["timestep"], time if kind == "flux" else 1000 * time
                now = torch.full_like(old, new) if torch.is_tensor(old) else new
                assert run(model, {**given, "timestep": now}).isfinite().all(), row.method
