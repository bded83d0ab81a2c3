"""VTM: the card's examples, its laws, and its motion magnitudes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.angles import check_compiled_and_trained, check_on_a_model, column, keys, real_groups, real_rows
from tokred.encoder.motion import frame_motion
from tokred.methods.encoder.vtm import gumbel, largest

EIGHT = [0, 10, 80, 100, 90, 20, 70, -5]


def merged(method: tokred.VTM, **more) -> list[float]:
    x = column(8, 1)
    return method.reduce(tokred.Site(x=x, k=keys(EIGHT), **more)).merge(x).flatten().tolist()


# ---------------------------------------------------------------- the card's examples


def test_all_sources_merge():
    r = tokred.VTM(gamma=4, R=None).reduce(tokred.Site(x=column(8), k=keys(EIGHT)))
    assert r.groups() == [[[0, 1, 5, 7], [2, 3, 4, 6]]]
    assert merged(tokred.VTM(gamma=4, R=None)) == [4.25, 4.75]
    assert merged(tokred.VTM(gamma=4, R=1.0)) == [4.25, 4.75]


def test_four_sources_merge():
    assert merged(tokred.VTM(gamma=4, R=4)) == pytest.approx([11 / 3, 4, 6, 7])
    assert merged(tokred.VTM(gamma=4, R=0.7)) == pytest.approx([11 / 3, 4, 6, 7])


def test_saliency_becomes_targets():
    s = torch.tensor([[0.9, -0.5, 0.1, 0.7]])
    p = s.softmax(1)
    assert p[0].tolist() == pytest.approx([0.397669, 0.098064, 0.178684, 0.325584], abs=1e-6)
    assert largest(p, 2).tolist() == [[True, False, False, True]]
    x = column(4)
    r = tokred.VTM("motion", gamma=2, R=None).reduce(tokred.Site(x=x, k=keys([0, 10, 80, 90]), motion=s))
    assert r.groups() == [[[0, 1], [2, 3]]]
    assert r.representative.tolist() == [[0, 3]]


def test_half_of_the_targets_lie_in_the_centre():
    x, k = column(16), torch.randn(1, 1, 16, 4, generator=torch.Generator().manual_seed(0))
    r = tokred.VTM("centre", gamma=4, R=None).reduce(tokred.Site(x=x, k=k, grid=(4, 4)))
    assert r.representative.tolist() == [[0, 5, 8, 9]], "5 and 9 of 5, 6, 9, 10"
    r = tokred.VTM("boundary", gamma=4, R=None).reduce(tokred.Site(x=x, k=k, grid=(4, 4)))
    assert r.representative.tolist() == [[0, 2, 4, 5, 8, 12, 14]]


def test_frames_are_flattened_time_first():
    x = column(32)
    k = torch.randn(1, 1, 32, 4, generator=torch.Generator().manual_seed(0))
    for frames in (2, None):
        r = tokred.VTM("centre", gamma=4, R=None).reduce(tokred.Site(x=x, k=k, grid=(4, 4), frames=frames))
        assert r.representative.tolist() == [[0, 5, 8, 9, 16, 21, 24, 25]]
    with pytest.raises(tokred.MissingInputError, match="32 tokens are not 3 frames of a 4 x 4 grid"):
        tokred.VTM("centre").reduce(tokred.Site(x=x, k=k, grid=(4, 4), frames=3))
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
        tokred.VTM("centre").reduce(tokred.Site(x=x, k=k))


# ---------------------------------------------------------------- laws


@given(
    st.integers(1, 30), st.integers(0, 2), st.integers(0, 2), st.integers(2, 6),
    st.sampled_from([None, 0, 3, 0.5, 0.8]), st.sampled_from(["naive", "motion"]), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_laws(free, prefix, suffix, gamma, limit, variant, seed):
    n, g = free + prefix + suffix, torch.Generator().manual_seed(seed)
    k, motion = torch.randn(2, 1, n, 4, generator=g), torch.randn(2, n, generator=g)
    method = tokred.VTM(variant, gamma=gamma, R=limit)
    place = {"prefix": prefix, "suffix": suffix}
    r = method.reduce(tokred.Site(k=k, motion=motion, **place))
    counted = method.tokens(n, tokred.Place(layer=3, depth=12, **place))
    assert r.slots == counted
    assert r.trivial == (counted == n)
    targets = -(-free // gamma)
    if limit is None and free > 1:
        assert r.slots == prefix + suffix + targets
    assert (r.index >= 0).all()
    rows = r.representative
    assert (rows.diff(dim=1) > 0).all(), "the order of the sequence"
    assert (rows[:, :prefix] == torch.arange(prefix)).all()
    assert (rows[:, r.slots - suffix :] == torch.arange(n - suffix, n)).all()
    # Every target survives, and stands for its group.
    if variant == "naive":
        chosen = torch.arange(0, free, gamma).expand(2, -1) + prefix
    else:
        chosen = motion[:, prefix : prefix + free].topk(targets).indices + prefix
    assert all(set(c.tolist()) <= set(kept.tolist()) for c, kept in zip(chosen, rows, strict=True))
    constant = torch.full((2, n, 3), 2.5)
    assert torch.equal(r.merge(constant), constant[:, : r.slots])
    again = method.reduce(tokred.Site(k=k[1:], motion=motion[1:] + 7, **place))
    assert again.groups()[0] == r.groups()[1], "no batch-mates, and a constant added to the magnitudes changes nothing"


def test_naive_two_is_kth_two_with_the_other_parity():
    k = torch.randn(1, 1, 12, 4, generator=torch.Generator().manual_seed(1))
    ours = tokred.VTM(gamma=2, R=None).reduce(tokred.Site(k=k)).groups()[0]
    theirs = tokred.KthMerge(k=2).reduce(tokred.Site(k=k.flip(2))).groups()[0]
    assert sorted(ours) == sorted(sorted(11 - t for t in g) for g in theirs)


def test_the_mean_is_plain_unless_told_otherwise():
    x, size = column(4, 1), torch.tensor([[3.0, 1, 1, 1]])
    site = tokred.Site(x=x, k=keys([0, 1, 90, 91]), sizes=size)
    plain = tokred.VTM(gamma=2, R=None).reduce(site)
    assert plain.merge(x, size).flatten().tolist() == [1.5, 3.5]
    assert plain.sizes(size).tolist() == [[4, 2]]
    weighted = tokred.VTM(gamma=2, R=None, size_weighted=True).reduce(site)
    assert weighted.merge(x, size).flatten().tolist() == [1.25, 3.5]
    assert not tokred.VTM().proportional


@pytest.mark.parametrize("variant", ["naive", "centre", "boundary", "motion"])
@pytest.mark.parametrize("limit", [None, 3, 0.6])
def test_padding_takes_no_part(variant, limit):
    g = torch.Generator().manual_seed(3)
    place = {"prefix": 1, "suffix": 1}
    method = tokred.VTM(variant, gamma=3, R=limit)
    k, motion = torch.randn(2, 1, 18, 4, generator=g), torch.randn(2, 18, generator=g)
    # Where 18 of 27 tokens stand now; the second sample has four fewer.
    positions = torch.stack([torch.randperm(25, generator=g)[:16].sort().values for _ in range(2)]) + 1
    positions = torch.cat([torch.zeros(2, 1).long(), positions, torch.full((2, 1), 26)], 1)
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[1, 13:17] = False
    both = method.reduce(
        tokred.Site(k=k, motion=motion, mask=mask, grid=(5, 5), positions=positions, length=27, **place)
    )
    for i in range(2):
        rows = mask[i].nonzero().flatten()
        alone = method.reduce(
            tokred.Site(
                k=k[i : i + 1, :, rows], motion=motion[i : i + 1, rows], grid=(5, 5),
                positions=positions[i : i + 1, rows], length=27, **place,
            )
        )  # fmt: skip
        assert [[rows[t].item() for t in group] for group in real_groups(alone, 0)] == real_groups(both, i)
        assert len(real_rows(both, i)) < len(rows)
        assert real_rows(both, i)[-1] == 17
        bound = method.tokens(len(rows), tokred.Place(layer=3, depth=12, **place))
        assert len(real_rows(both, i)) <= bound


def test_draws_follow_the_probabilities_and_leave_the_generator_alone():
    v = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    state = torch.random.get_rng_state()
    first = torch.stack([(v[0] + gumbel(4, seed, 0)).argmax() for seed in range(3000)])
    share = torch.bincount(first, minlength=4) / 3000
    torch.testing.assert_close(share, v.softmax(1)[0], rtol=0, atol=0.03)
    site = tokred.Site(
        k=torch.randn(2, 1, 40, 3, generator=torch.Generator().manual_seed(0)), motion=torch.zeros(2, 40)
    )
    drawn = [tokred.VTM("motion", sampling=True, seed=s, R=None).reduce(site) for s in (0, 0, 1)]
    assert torch.equal(drawn[0].representative, drawn[1].representative)
    assert not torch.equal(drawn[0].representative, drawn[2].representative)
    assert torch.equal(drawn[0].representative[0], drawn[0].representative[1])
    assert drawn[0].slots == 10
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.isfinite(gumbel(100_000, 0, 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_and_zero_keys(dtype):
    r = tokred.VTM(gamma=4, R=2).reduce(tokred.Site(k=torch.zeros(1, 1, 9, 4, dtype=dtype)))
    assert r.groups() == [[[0, 1, 2], [3], [4], [5], [6], [7], [8]]]
    flat = tokred.VTM("motion", gamma=4, R=None)
    r = flat.reduce(tokred.Site(k=torch.ones(1, 1, 9, 4, dtype=dtype), motion=torch.zeros(1, 9)))
    assert r.representative.tolist() == [[0, 1, 2]]


# ---------------------------------------------------------------- motion


def test_frame_motion():
    video = torch.zeros(1, 3, 2, 4, 6)
    video[0, 1, :, :2, :2] = 8.0  # one patch appears in frame 1
    video[0, 2] = video[0, 1]
    video[0, 2, 0, 3, 5] = 4.0  # one pixel of one channel changes in frame 2
    v = frame_motion(video, 2)
    assert v.shape == (1, 3 * 2 * 3)
    assert v.view(3, 6).tolist() == [[8, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.5]]
    assert frame_motion(video, 2, 2).tolist() == [[8, 0, 0, 0, 0, 0]], "the third frame fills no tubelet"
    assert frame_motion(video[:, :1], (2, 3)).tolist() == [[0, 0, 0, 0]]
    assert frame_motion((video * 10).to(torch.uint8), 2)[0, 0] == 80
    with pytest.raises(ValueError, match="video must be"):
        frame_motion(video[0], 2)
    with pytest.raises(ValueError, match="patch is 5; allowed are 1 to 4"):
        frame_motion(video, 5)


def test_moving_tokens_are_targets():
    video = torch.zeros(1, 2, 1, 4, 4)
    video[0, 1, 0, 2:, 2:] = 1.0  # the last of four patches moves
    motion = frame_motion(video, 2)
    r = tokred.VTM("motion", gamma=4, R=None).reduce(
        tokred.Site(k=torch.randn(1, 1, 8, 2, generator=torch.Generator().manual_seed(0)), motion=motion)
    )
    assert r.representative.tolist() == [[3, 7]]
    with pytest.raises(tokred.MissingInputError, match="does not supply 'motion'"):
        tokred.VTM("motion").reduce(tokred.Site(k=torch.randn(1, 1, 8, 2)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["VideoMAE", pytest.param("ViViT", marks=pytest.mark.hosts)])
def test_motion_of_the_pixels_of_a_clip(family):
    """What a host supplies is what the frames that it was given say, whatever its weights."""
    tiny = pytest.importorskip("tokred.adapters.tiny.transformers")
    model, seen = tiny.build(family), []

    class Watch(tokred.VTM):
        def reduce(self, site: tokred.Site) -> tokred.Reduction:
            seen.append(site.motion)
            return super().reduce(site)

    given = tiny.FAMILIES[family].inputs(2)
    clip, plain = given["pixel_values"], next(m for m in model.modules() if isinstance(m, torch.nn.Conv3d)).kernel_size
    with tokred.applied(model, Watch("motion", gamma=4, R=None, blocks=(0,), moves="pixels")):
        model(**given)
        left = tokred.report(model).layers[-1].tokens_out
    own = frame_motion(clip, plain[1:], plain[0])
    prefix = seen[0].shape[1] - own.shape[1]
    assert torch.equal(seen[0][:, prefix:], own)
    assert left == prefix + -(-own.shape[1] // 4)


def test_pixels_are_those_of_clips():
    timm = pytest.importorskip("tokred.adapters.tiny.timm")
    with pytest.raises(tokred.MissingInputError, match="frame_motion"):
        tokred.apply(timm.build("vit"), "vtm", variant="motion", moves="pixels")
    with pytest.raises(ValueError, match="moves='pixels' goes with variant='motion'"):
        tokred.VTM(moves="pixels")


# ---------------------------------------------------------------- parameters and models


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"variant": "even"}, "variant is 'even'; allowed are 'naive', 'centre', 'boundary', 'motion', 'learned'"),
        ({"helps": "never"}, "helps is 'never'; allowed are 'gradient', 'added'"),
        ({"helps": "added"}, "helps='added' goes with variant='learned'; 'naive' learns nothing"),
        ({"gamma": 1}, "gamma must be an integer of at least 2, got 1"),
        ({"R": 1.5}, r"R must be a share in \[0, 1\]"),
        ({"R": -1}, "R must be a share"),
        ({"R": True}, "R must be a share"),
        ({"sampling": True}, "sampling goes with variant='motion' or 'learned'; 'naive' draws nothing"),
        ({"metric": "keys"}, "metric is 'keys'"),
        ({"blocks": (-1,)}, "blocks must be non-negative"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.VTM(**parameters)


def test_what_it_reads_and_how_it_is_written_down():
    assert tokred.VTM().reads == {"x", "k"}
    assert tokred.VTM("centre").reads == {"x", "k", "grid"}
    assert tokred.VTM("motion", metric="x").reads == {"x", "motion"}
    method = tokred.VTM("motion", R=5, sampling=True, blocks=(1,))
    assert tokred.from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match=r"blocks names \[12\]"):
        tokred.VTM(blocks=(12,)).check(12)


@pytest.mark.parametrize("family", ["vit", "vit-mean", "vit-registers (DINOv2)", "rope-mixed"])
@pytest.mark.parametrize("variant", ["naive", "centre", "boundary"])
def test_on_models(family, variant):
    method = tokred.VTM(variant, gamma=2, R=0.5, blocks=(0, 1, 2))
    check_on_a_model(family, method, tokred.VTM(variant, R=0, blocks=(0, 1, 2)))


def test_hosts_without_motion_say_so():
    from tests.encoder.tiny_timm import build

    with pytest.raises(tokred.MissingInputError, match="reads motion"):
        tokred.apply(build("vit"), "vtm", variant="motion")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [tokred.VTM(gamma=2, blocks=(0, 1)), tokred.VTM("centre", gamma=2, R=0.5, blocks=(0, 1, 2))]
)
def test_compiles_and_trains(method):
    check_compiled_and_trained("vit-mean", method)


@torch.no_grad()
@pytest.mark.parametrize("family", ["VideoMAE", "ViViT"])
def test_encoders_of_videos_supply_motion(family):
    """How much what the patch convolution makes of a place changes; tokens that are left keep their patch's."""
    pytest.importorskip("transformers")
    from tokred.adapters.tiny.transformers import FAMILIES, build

    model, batch = build(family), FAMILIES[family].inputs(2)
    made: list[torch.Tensor] = []
    convolution = next(m for m in model.modules() if isinstance(m, torch.nn.Conv3d))
    method = tokred.VTM("motion", gamma=2, R=3, blocks=(0, 1))
    sites: list[tuple[tokred.Site, torch.Tensor]] = []
    reduce = method.reduce

    def noted(site: tokred.Site) -> tokred.Reduction:
        sites.append((site, site.motion))
        return reduce(site)

    object.__setattr__(method, "reduce", noted)
    handle = convolution.register_forward_hook(lambda m, args, out: made.append(out))
    with tokred.applied(model, method):
        model(**batch)
    handle.remove()
    change = made[0].flatten(3).diff(dim=2).abs().mean(1)
    expected = torch.cat([change[:, :1], change], 1).flatten(1)
    expected = torch.nn.functional.pad(expected, (sites[0][0].prefix, 0))
    torch.testing.assert_close(sites[0][1], expected)
    assert sites[1][0].shape[1] == expected.shape[1] - 3
    torch.testing.assert_close(sites[1][1], expected.gather(1, sites[1][0].positions))


@torch.no_grad()
def test_nobody_pays_for_motion_that_nobody_reads():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny.transformers import FAMILIES, build

    model = build("VideoMAE")
    look = tokred.VTM("naive", gamma=2, R=3)
    found: list[bool] = []
    reduce = look.reduce

    def noted(site: tokred.Site) -> tokred.Reduction:
        with pytest.raises(tokred.MissingInputError, match="motion"):
            _ = site.motion
        found.append(True)
        return reduce(site)

    object.__setattr__(look, "reduce", noted)
    with tokred.applied(model, look):
        model(**FAMILIES["VideoMAE"].inputs(1))
    assert found


def test_images_have_no_motion():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny.transformers import build

    with pytest.raises(tokred.MissingInputError, match="motion"):
        tokred.apply(build("ViT"), tokred.VTM("motion"))


def test_motion_under_the_compiler_and_a_checkpoint():
    """What a first block recomputes, or a graph holds, is the same motion."""
    pytest.importorskip("transformers")
    from tokred.adapters.tiny.transformers import FAMILIES, build

    model, batch = build("VideoMAE"), FAMILIES["VideoMAE"].inputs(1)
    tokred.apply(model, tokred.VTM("motion", gamma=2, R=3))
    with torch.no_grad():
        plain = model(**batch).logits
        compiled = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(compiled, plain)
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).logits.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
