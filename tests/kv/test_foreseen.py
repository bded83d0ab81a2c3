"""Blends of chunks that know which of their tokens depend on what stands before."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.test_blend import QUESTION, dense, equal
from tests.kv.tiny import prompt
from tokred.kv.blend import count_of, deviation, moved, smoothed

pytestmark = pytest.mark.usefixtures("no_grad")


def test_what_was_foreseen_is_computed_from_the_first_layer_on(built, model):
    lead, other = prompt(3, seed=20), prompt(8, seed=30)
    store = tokred.ChunkStore(built, behind=lead, against=other)
    parts = [store.prefix, *(store.add(prompt(n, seed=n)) for n in (7, 9, 11))]
    assert store.prefix.foreseen is None
    made = tokred.blend(model, [*parts, QUESTION], recompute=0.3, measure="foreseen")
    own = dense(model, made.ids)
    # As many of the stored as their share says, and the question; not the prefix, nor the chunk that is exact.
    assert all(torch.equal(rows, made.rows[0]) for rows in made.rows)
    assert len(made.rows[0]) == count_of(0.3, 30) + 6
    assert int(made.rows[0].min()) >= 10
    assert set(range(30, 36)) <= set(made.rows[0].tolist())
    # By hand: keys of layer 2, smoothed, behind one text and behind another.
    far = []
    for part in parts[2:]:
        one, two = (dense(model, torch.cat([lead, *more, part.ids], 1)).layers[2] for more in ((), (other,)))
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(40)[None])
        n, tables = (
            part.ids.shape[1],
            [(cos[0, a : a + part.ids.shape[1]], sin[0, a : a + part.ids.shape[1]]) for a in (11, 3)],
        )
        far.append(smoothed(deviation([moved(two.keys[:, :, 11:], *tables)], [one.keys[:, :, 3:]])))
        assert part.foreseen.shape == (n,)
        assert torch.allclose(part.foreseen, far[-1], rtol=1e-3, atol=1e-5)
    best = torch.cat(far).topk(count_of(0.3, 30)).indices.sort().values + 10
    assert made.rows[0][:-6].tolist() == best.tolist()
    # Layer 0 is exact, and so is what is computed in layer 1; all is with everything computed.
    assert torch.allclose(made.cache.layers[0].keys, own.layers[0].keys, atol=1e-5)
    at = made.rows[0]
    assert torch.allclose(made.cache.layers[1].keys[:, :, at], own.layers[1].keys[:, :, at], atol=1e-5)
    assert equal(tokred.blend(model, parts, recompute=1.0, measure="foreseen").cache, dense(model, made.ids[:, :30]))


def test_neighbours_are_chosen_together():
    assert smoothed(torch.tensor([0.0, 0, 9, 0, 0, 0]), 3).tolist() == [0, 3, 3, 3, 0, 0]


def test_chunks_that_foresee_in_a_folder(model, tmp_path):
    pytest.importorskip("safetensors")
    first = tokred.ChunkStore(model, tmp_path, against=prompt(8)).add(prompt(7))
    again = tokred.ChunkStore(model, tmp_path, against=prompt(8)).add(prompt(7))
    assert torch.equal(first.foreseen, again.foreseen)
    assert tokred.ChunkStore(model, tmp_path).add(prompt(7)).foreseen is None
    assert len(list(tmp_path.iterdir())) == 2
