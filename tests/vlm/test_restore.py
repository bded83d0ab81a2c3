"""RESTORE: the card's examples, what is left, and that attention is what it is over all columns with the same bias."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle
from tests.vlm.test_clip_methods import clip, same
from tests.vlm.test_clip_methods import one as alone
from tests.vlm.visual import kept
from tokred import adapters
from tokred.adapters.vlm.calibration import turns_of
from tokred.methods.vlm.restore import Restore
from tokred.vlm import VisualSite, clips
from tokred.vlm.tools.anchors import anchor_scores, beside_slots, merged_into_anchors, weights_of
from tokred.vlm.tools.calibration import Turns, calibration_bias, nearness

X = torch.tensor([[[1, 0], [0.9, 0.3], [0.8, 0.6], [0, 1], [0.2, 1], [-0.3, 1], [0.6, 0.8]]])


def rotary(d: int, base: float = 10000.0) -> Turns:
    angles = base ** -(torch.arange(0, d, 2).double() / d)
    return Turns(angles.float(), torch.zeros(d // 2, dtype=torch.long), d // 2)


# ------------------------------------------------------------------ worked examples


def test_anchors():
    unit = torch.nn.functional.normalize(X, dim=-1)
    scores = anchor_scores(unit)[0]
    assert [round(v, 4) for v in scores[1:6].tolist()] == [0.2341, 0.2159, 0.0904, 0.5092, 0.1485]
    assert scores[6] == math.inf
    step = merged_into_anchors(X, torch.tensor([[0]]), 2)
    assert step.groups() == [[[0], [1, 2, 6], [3, 4, 5]]]
    assert step.representative.tolist() == [[0, 2, 4]]
    assert step.sizes().tolist() == [[1, 3, 3]]
    wanted = torch.tensor([[[1, 0], [0.7667, 0.5667], [-0.0333, 1]]])
    torch.testing.assert_close(step.merge(X), wanted, rtol=0, atol=5e-5)


def test_nearness():
    far = torch.tensor([[0, 1, 10, 100, 600, 4060]])
    found = nearness(far, rotary(128))
    assert [round(v, 4) for v in found.tolist()] == [1, 0.9702, 0.6691, 0.4772, 0.2077, -0.1307]
    assert [round(v, 4) for v in (2 - found[:5]).log().tolist()] == [0, 0.0294, 0.2859, 0.4205, 0.5835]
    small = nearness(torch.tensor([[0, 1, 5, 50]]), rotary(8))
    assert [round(v, 4) for v in small.tolist()] == [1, 0.8838, 0.79, 0.7812]
    turns = Turns(rotary(8).angles, torch.tensor([0, 1, 2, 2]), 4)
    assert nearness(torch.tensor([[0], [3], [2]]), turns).item() == pytest.approx(0.9888, abs=5e-5)
    half = Turns(rotary(8).angles, torch.zeros(4, dtype=torch.long), 8)
    assert nearness(torch.tensor([[5]]), half).item() == pytest.approx((1 + small[2].item()) / 2), (
        "still pairs count as 1"
    )


def test_one_row():
    far = (50 - torch.tensor([0, 10, 45, 49])).view(1, 1, 1, 4)
    bias = calibration_bias(far, torch.tensor([[0.0, 1, 3, 0]]), rotary(8))[0, 0]
    assert [round(v, 4) for v in bias.tolist()] == [0, 0.6152, 1.2892, 0]
    logits = torch.tensor([1, 0.5, 0.2, 0.8])
    assert [round(v, 4) for v in (logits + bias).softmax(0).tolist()] == [0.2187, 0.2454, 0.3568, 0.1791]


# ------------------------------------------------------------------ what is left


@pytest.mark.parametrize("pool", ["all", "rest"])
@pytest.mark.parametrize("position", ["median", "first", "mean", "last"])
def test_sizes_positions_and_duplicates(pool, position):
    x = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    x[:, 7] = x[:, 12]
    kept = torch.tensor([[1, 5], [0, 19], [3, 4]])
    step = merged_into_anchors(x, kept, 4, pool, position)
    assert step.slots == 6
    for i, groups in enumerate(step.groups()):
        assert sorted(t for group in groups for t in group) == list(range(20))
        assert all([int(t)] in groups for t in kept[i])
        stands = step.representative[i].tolist()
        assert stands == sorted(stands)
        assert all(r in group for r, group in zip(stands, groups, strict=True))
        sizes = [len(g) for g in groups]
        assert step.sizes()[i].tolist() == sizes
    scaled = merged_into_anchors(x * torch.rand(3, 20, 1).add(0.1), kept, 4, pool, position)
    assert scaled.groups() == step.groups()
    rows = torch.tensor([2, 0, 1])
    assert merged_into_anchors(x[rows], kept[rows], 4, pool, position).groups() == [step.groups()[i] for i in (2, 0, 1)]
    unit = torch.nn.functional.normalize(x, dim=-1)
    scores = anchor_scores(unit)
    assert bool((scores[:, [7, 12]].amin(1) < 1e-5).all()), "of two alike, one at most"


def test_parts_of_the_budget():
    site = VisualSite(x=torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), grid=(4, 4))
    assert Restore(budget=7, base="random_visual").split(7) == (4, 3)
    assert Restore(budget=7, base="random_visual", gamma=1.0).reduce(site).sizes().tolist() == [[1.0] * 7] * 2
    whole = Restore(budget=7, base="random_visual", gamma=0.0).reduce(site)
    assert whole.sizes().sum(1).tolist() == [16, 16]
    assert Restore(budget=16).reduce(site).trivial
    half = VisualSite(x=site.x.half(), grid=(4, 4))
    assert Restore(budget=7, base="uniform_visual").reduce(half).merge(half.x).isfinite().all()


# ------------------------------------------------------------------ around methods for clips

# Of five frames of twelve tokens: what leaves even numbers and uneven ones, whole frames, and merged tokens.
BASES = [
    "evs", "vidcom2", "vidcom2 exact=False", "vcast", "dycoke", "dycoke groups=official", "fastvid context=0",
    "flashvid picked=1", "holitom", "holitom contextual=0.3", "uniform_frames", "stc", "streamingtom", "random_visual",
]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_the_budget_of_a_clip(base):
    site = clip(3, 5)
    for budget, gamma in ((30, 0.5), (0.5, 0.25), (18, 0.75)):
        method = Restore(budget=budget, base=base, gamma=gamma)
        found, total = method.reduce(site), method.count(60)
        asked = method.asked(method.split(total)[0], site).reduce(site)
        for i in range(3):
            same(method.reduce(alone(site, i)), found, site.x, i)
            mine, theirs = kept(found, i), kept(asked, i)
            assert set(theirs) <= set(mine)
            assert mine == sorted(mine)
            lost = 60 - int(asked.sizes()[i].sum())
            assert len(mine) == len(theirs) + max(0, min(lost, total - len(theirs)))
            if len(mine) > len(theirs):
                assert int(found.sizes()[i].sum()) == 60, "what was lost is in the others"
            # Slots of the base are what they were, bit for bit.
            at = torch.tensor([mine.index(t) for t in theirs])
            torch.testing.assert_close(found.merge(site.x)[i, at], asked.merge(site.x)[i, : len(at)])
            assert torch.equal(found.sizes()[i, at], asked.sizes()[i, : len(at)])
    rows = torch.tensor([2, 0, 1])
    moved = VisualSite(**{k: v[rows] for k, v in site._values.items() if v is not None}, grid=site.grid, frames=5)
    assert torch.equal(method.reduce(moved).index, found.index[rows])


@pytest.mark.parametrize("base", BASES)
def test_around_what_keeps_everything(base):
    assert Restore(budget=1.0, base=base).reduce(clip()).trivial
    assert Restore(budget=60, base=base).reduce(clip(2, 5)).trivial
    if base in ("evs", "vcast", "dycoke", "uniform_frames"):  # which keep all of a single frame
        assert Restore(budget=4, base=base).reduce(clip(2, 1)).trivial


@pytest.mark.parametrize("base", ["evs", "vidcom2", "vcast", "holitom tau=2", "uniform_frames"])
def test_clips_of_exact_budgets(base):
    made = Restore(base=base).inner
    for frames, cells, count in ((8, 64, 128), (8, 64, 77), (5, 9, 45)):
        wanted = made.leaving(count, frames, cells).kept(frames, cells)
        assert (wanted == count) or (base == "uniform_frames" and wanted % cells == 0) or base.startswith("holitom")


def test_merged_beside_uneven_numbers():
    """Two samples of which one keeps a token more: the other has an anchor more."""
    x = X.expand(2, -1, -1)
    step = tokred.Reduction.keep(torch.tensor([[0, 0], [0, 4]]), 7, torch.tensor([[True, False], [True, True]]))
    found = beside_slots(x, step, 3)
    assert found.groups() == [[[0], [1, 2, 6], [3, 4, 5]], [[0], [1, 2, 3, 5, 6], [4]]]
    assert found.representative.tolist() == [[0, 2, 4], [0, 3, 4]]
    wanted = torch.tensor([[1, 0], [0.7667, 0.5667], [-0.0333, 1]])
    torch.testing.assert_close(found.merge(x)[0], wanted, rtol=0, atol=5e-5)
    assert beside_slots(x, step, 1).groups() == [[[0], []], [[0], [4]]]


def test_sums_of_a_reduction():
    mean = tokred.Reduction.from_index(torch.tensor([[0, 0, -1, 1, 0]]), 2, mode="mean")
    torch.testing.assert_close(weights_of(mean), torch.tensor([[1 / 3, 1 / 3, 1, 1, 1 / 3]]))
    first = tokred.Reduction.from_index(torch.tensor([[0, 0, -1, 1, 0]]), 2, mode="keep")
    assert weights_of(first).tolist() == [[1, 0, 1, 1, 0]]
    with pytest.raises(ValueError, match="combines tokens by 'max'"):
        weights_of(tokred.Reduction.from_index(torch.tensor([[0, 0]]), 1, mode="max"))


@torch.no_grad()
def test_on_clips_and_images_beside_them():
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[3, "image", 2, *["image"] * 3, 5]])
    stock = model(**batch).logits
    with clips([[1, 3]]):
        for base, left in (("vidcom2", 16 + 12), ("vcast", 16 + 12), ("divprune", 4 + 12)):
            with tokred.applied(model, "restore", base=base, budget=0.25):
                model(**batch)
                assert tokred.report(model).layers[0].visual == (left,)
        with tokred.applied(model, "restore", base="vidcom2", budget=1.0):
            assert torch.equal(model(**batch).logits, stock)


# ------------------------------------------------------------------ attention


@contextlib.contextmanager
def calibrated(layers, model, keep: Tensor, padding: Tensor, visual: Tensor):
    """Inside, layers see only columns that are kept, and visual ones with the bias, by their positions."""
    language = adapters.find(model, "projector").language
    turns = turns_of(language, language.config.hidden_size // language.config.num_attention_heads)
    seen_before: list[Tensor] = []

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        places, every = seen_before[-1], torch.cat(seen_before, 2)
        q, k = x.shape[1], every.shape[2]

        def grown(t: Tensor, value: bool) -> Tensor:
            return torch.nn.functional.pad(t, (0, k - t.shape[1]), value=value)

        bias = calibration_bias((places.unsqueeze(-1) - every.unsqueeze(-2)).abs(), grown(visual, False).float(), turns)
        seen = torch.arange(k) <= torch.arange(k - q, k).unsqueeze(1)
        seen = seen & (grown(keep, True) & grown(padding.bool(), True))[:, None, None]
        seen = seen | ((torch.arange(k) == torch.arange(k - q, k).unsqueeze(1)) & ~seen.any(-1, keepdim=True))
        mask = bias.unsqueeze(1).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    def enter(module, args, kwargs):
        """Positions of all axes, which layers are not given."""
        x, places = kwargs["inputs_embeds"], kwargs.get("position_ids")
        if places is None:
            before = sum(one.shape[2] for one in seen_before)
            places = torch.arange(before, before + x.shape[1])[None]
        places = places if places.ndim == 3 else places.unsqueeze(0)
        seen_before.append((places[1:] if places.shape[0] == 4 else places).expand(-1, len(x), -1))

    handles = [language.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ROWS: hosts.Rows = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_dropping_equals_masking_with_the_same_bias(name):
    model = hosts.build(name)
    method = Restore(budget=3, base="random_visual", gamma=1.0)
    if name in ("gemma3", "paligemma"):  # whose images see all of themselves
        with pytest.raises(tokred.MissingInputError, match="calibration"):
            tokred.apply(model, method)
        return
    batch = hosts.prompts(name, ROWS)
    tokred.apply(model, method)
    pruned = oracle.generate(model, batch)
    keeps = oracle.kept(pruned.past_key_values, batch["input_ids"].shape[1])
    visual = visual_columns(model, batch)
    tokred.remove(model)
    with calibrated(list(hosts.layers(name, model)), model, keeps[0], batch["attention_mask"], visual):
        whole = oracle.generate(model, batch)
    for one, other in zip(pruned.logits, whole.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", ["vidcom2 exact=False", "evs", "holitom tau=2"])
def test_dropping_tokens_of_clips_equals_masking_with_the_same_bias(base):
    model = hosts.build("onevision_video")
    batch = hosts.prompts("onevision_video", [[3, "image", 5], [2, "image", 1, "image", 4]])
    tokred.apply(model, Restore(budget=0.5, base=base, gamma=1.0))
    pruned = oracle.generate(model, batch)
    keeps = oracle.kept(pruned.past_key_values, batch["input_ids"].shape[1])
    visual = visual_columns(model, batch)
    assert 0 < int((keeps[0] & visual).sum()) < int(visual.sum())
    tokred.remove(model)
    with calibrated(list(hosts.layers("onevision_video", model)), model, keeps[0], batch["attention_mask"], visual):
        whole = oracle.generate(model, batch)
    for short, long in zip(pruned.logits, whole.logits, strict=True):
        torch.testing.assert_close(short, long, rtol=1e-3, atol=1e-4)


def visual_columns(model, batch) -> Tensor:
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    ids = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    return torch.isin(batch["input_ids"], torch.tensor(ids))


def test_off_where_nothing_leaves_and_after_removal():
    model, batch = hosts.build("llava"), hosts.prompts("llava", ROWS)
    with torch.no_grad():
        stock = model(**batch).logits
        tokred.apply(model, "restore", budget=1.0)
        assert torch.equal(model(**batch).logits, stock)
        tokred.apply(model, "restore", base="uniform_visual", budget=4)
        short = model(**batch).logits
        assert short.shape != stock.shape
        tokred.apply(model, "restore", base="uniform_visual", budget=4, gamma=1.0, c=1e9)
        assert model(**batch).logits.isfinite().all()
        tokred.remove(model)
        assert torch.equal(model(**batch).logits, stock)


def test_a_second_turn_and_a_crop():
    """What is known of the rows stays with the cache: in two turns the model says what it says in one."""
    model, batch = hosts.build("llava"), hosts.prompts("llava", [[3, "image", 5], [2, "image", 6]])
    more = torch.randint(1, 20, (2, 4), generator=torch.Generator().manual_seed(0))
    tokred.apply(model, "restore", base="uniform_visual", budget=3)
    turns = {"input_ids": torch.cat([batch["input_ids"], more], 1)}
    for name, value in batch.items():
        if name != "input_ids":
            wide = value.shape == batch["input_ids"].shape
            turns[name] = torch.cat([value, torch.full_like(more, int(name == "attention_mask"))], 1) if wide else value
    with torch.no_grad():
        once = model(**turns).logits[:, -1]
        cache = model(**batch).past_key_values
        mask = {"attention_mask": turns["attention_mask"]}
        twice = model(input_ids=more, past_key_values=cache, **mask).logits[:, -1]
        torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-4)
        cache.crop(-4)
        again = model(input_ids=more, past_key_values=cache, **mask).logits[:, -1]
        torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-4)
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-4)
        one = model(input_ids=more[1:], past_key_values=cache, attention_mask=mask["attention_mask"][1:]).logits[:, -1]
        torch.testing.assert_close(one, once[1:], rtol=1e-3, atol=1e-4)


def test_a_second_turn_whose_text_has_one_position_for_all_axes():
    """It stopped where the rows of the first turn have positions in three axes."""
    model, batch = hosts.build("qwen2_vl"), hosts.prompts("qwen2_vl", [[3, "image", 5]])
    tokred.apply(model, "restore", base="uniform_visual", budget=3)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    said = model.generate(**batch, return_dict_in_generate=True, **options)
    ids = torch.cat([said.sequences, torch.tensor([[7, 8, 9]])], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 98).long()}
    again = model.generate(**more, **tokred.cache_kwargs(said.past_key_values), **options)
    assert torch.equal(again, model.generate(**{**batch, **more}, **options))


def test_turns_of_neighbouring_channels():
    """They were taken for two halves: half of the pairs were missing, and all turned by one axis."""
    found = turns_of(hosts.build("glm4v").model.language_model, 8)
    torch.testing.assert_close(found.angles, torch.tensor([1, 0.1, 0.01, 0.001]), rtol=0, atol=1e-6)
    assert found.axis.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"gamma": 1.5}, ValueError, "gamma must lie"),
        ({"c": 1.0}, ValueError, "c must be more than 1"),
        ({"pool": "some"}, ValueError, "pool is 'some'"),
        ({"position": "middle"}, ValueError, "position is 'middle'"),
        ({"positions": "repack"}, ValueError, "positions is 'repack'"),
        ({"base": "fastv"}, ValueError, "before the language model"),
        ({"base": "hired"}, ValueError, "before the language model"),
        ({"base": "restore"}, ValueError, "before the language model"),
        ({"base": "omnizip"}, ValueError, "before the language model"),
        ({"base": "earlytom"}, ValueError, "merges frames inside the vision tower"),
        ({"base": "prunevid"}, ValueError, "no setting says how many tokens of a clip"),
        ({"base": "fastvid"}, ValueError, "drops nothing that could be merged.*gamma=1"),
        ({"base": "flashvid"}, ValueError, "drops nothing that could be merged.*gamma=1"),
        ({"base": 3}, TypeError, "setting as text"),
    ],
)
def test_bad_parameters(parameters, error, match):
    with pytest.raises(error, match=match):
        tokred.make("restore", **parameters)


def test_around_one_that_merges_all_attention_is_calibrated():
    """Values and places are the base's, and merged where it does."""
    made, site = Restore(base="flashvid", budget=20, gamma=1.0), clip(2, 5)
    base = made.asked(20, site).reduce(site)
    assert torch.equal(made.reduce(site).index, base.index)
    assert int(base.sizes().sum()) == 2 * 60
    assert Restore(base="visionzip", gamma=1.0).space == "tower"
    assert Restore(base="divprune").space == "x"


def test_a_base_that_merges_is_refused():
    site = VisualSite(x=torch.randn(1, 16, 8), grid=(4, 4))
    with pytest.raises(ValueError, match="but merges some"):
        Restore(budget=8, base="downsample_visual").reduce(site)


def test_not_beside_a_policy_of_the_cache():
    model, batch = hosts.build("llava"), hosts.prompts("llava", ROWS)
    tokred.apply(model, [Restore(budget=3, base="random_visual"), tokred.make("snapkv", budget=0.5)])
    with pytest.raises(ValueError, match="take one of the two"):
        model.generate(**batch, max_new_tokens=2)
