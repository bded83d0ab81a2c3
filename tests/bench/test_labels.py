"""Labels of ``top1`` and ``top5``: forms in which they are read, and what is no label of the output."""

from __future__ import annotations

import pytest
import torch

from tests.bench.test_metrics import scored


def test_labels_in_other_forms():
    """Lists, arrays and a dimension of one more are the same labels."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    right = torch.tensor([1, 1, 1])
    for found in (right[:, None], right.tolist(), [[1], [1], [1]], right.numpy(), right.int(), right.float()):
        assert scored("top1", logits, {"labels": found}) == ([1, 0, 0], [1.0] * 3)
        assert scored("top1", logits, (logits, found)) == ([1, 0, 0], [1.0] * 3)
    assert scored("top1", logits[:1, None], {"labels": right[:1]})[0] == [1]
    several = {"labels": torch.tensor([[1, 0], [2, 2]])}  # a label a token
    assert scored("top1", torch.stack([logits[:2], logits[1:]]), several) == ([1, 0.5], [1.0] * 2)


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (torch.eye(3), r"got \(3, 3\) and \(3, 3\): of one-hot or soft labels give labels.argmax"),
        (torch.full((3, 3), 1 / 3), "of one-hot or soft labels"),
        (torch.tensor([0, 1]), r"got \(3, 3\) and \(2,\)"),
        (torch.tensor([0, 1, 3]), r"classes from 0 to 2, as many as logits \(3, 3\) have, got 3: leave"),
        (torch.tensor([0, -100, 1]), "got -100: leave samples without a class out"),
        ([0, -1, 1], "got -1"),
        (torch.tensor([0, 0.5, 1]), "got 0.5"),
        (["a", "b", "c"], "have no labels"),
    ],
)
@pytest.mark.parametrize("name", ["top1", "top5"])
def test_labels_that_are_no_classes(name, right, says):
    with pytest.raises(ValueError, match=says):
        scored(name, torch.eye(3), {"labels": right})
