"""apply, remove, applied, supports, report, flops: what they promise and what they refuse."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images, without_weights


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "match"),
    [
        (("tomme",), {"r": 2}, tokred.UnknownMethodError, "did you mean 'tome'"),
        (("tome",), {"r": -2}, ValueError, "must not be negative"),
        (("tome",), {"r": [1, 1, 1, 1]}, ValueError, "4 entries, but the model has 3 blocks"),
        (("evit",), {"blocks": (7,)}, ValueError, r"blocks names \[7\], but the model has 3 blocks"),
        (("tome",), {"q": 2}, TypeError, "has no parameter 'q'"),
        (("tome",), {"r": 2, "expose": "some"}, ValueError, "expose is 'some'"),
        ((["tome", "pitome"],), {}, ValueError, "one method a stage"),
        (([],), {}, ValueError, "empty"),
        ((3,), {}, TypeError, "not iterable|a method is a name"),
        ((tokred.ToMe(r=2),), {"r": 3}, TypeError, "already has its parameters"),
        (("tome r=2",), {"metric": "k"}, TypeError, "'tome r=2' has its parameters; metric cannot"),
        (("tome r",), {}, tokred.UnknownMethodError, "no method is named 'tome r'"),
        (("tome q=2",), {}, TypeError, "has no parameter 'q'"),
    ],
)
def test_bad_calls_leave_the_model_as_it_was(arguments, parameters, error, match):
    model = build("vit")
    before = classes(model)
    with pytest.raises(error, match=match):
        tokred.apply(model, *arguments, **parameters)
    assert classes(model) == before


def test_a_setting_as_text():
    """The spelling of the command line serves everywhere."""
    model = build("vit")
    assert tokred.patched(tokred.apply(model, "tome r=4 metric=x")) == [tokred.ToMe(r=4, metric="x")]
    assert tokred.patched(tokred.apply(model, ["evit kappa=0.7"])) == [tokred.EViT(kappa=0.7)]


def test_an_error_keeps_the_patch_that_is_there():
    model, x = build("vit"), images()
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(x)
        with pytest.raises(ValueError):
            tokred.apply(model, "tome", r=[1] * 9)
        assert torch.equal(model(x), y)


def test_where_must_select_something():
    with pytest.raises(ValueError, match="selects none of the 3 blocks"):
        tokred.apply(build("vit"), "tome", r=2, where=lambda name, block: False)


def test_torchscript_compiled_and_foreign_models_are_refused():
    with pytest.raises(tokred.UnsupportedModelError, match="TorchScript"):
        tokred.apply(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "tome", r=2)
    with pytest.raises(tokred.UnsupportedModelError, match="compiled"):
        tokred.apply(torch.compile(build("vit")), "tome", r=2)
    with pytest.raises(tokred.UnsupportedModelError, match="no family that tokred knows"):
        tokred.apply(torch.nn.Linear(2, 2), "tome", r=2)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        tokred.apply("vit", "tome", r=2)
    two = torch.nn.ModuleDict({"a": build("vit"), "b": build("vit")})
    with pytest.raises(tokred.UnsupportedModelError, match="several models that can be patched \\('a', 'b'\\)"):
        tokred.apply(two, "tome", r=2)


def test_applying_again_replaces():
    model, x = build("vit"), images()
    with torch.no_grad():
        plain = model(x)
        once = tokred.apply(model, "tome", r=4)(x)
        tokred.apply(model, "tome", r=2)
        assert torch.equal(tokred.apply(model, "tome", r=4)(x), once)
        assert torch.equal(tokred.remove(model)(x), plain)
        assert torch.equal(tokred.remove(model)(x), plain), "removing twice is harmless"


def test_applied_is_undone_also_after_an_error():
    model = build("vit")
    before = classes(model)
    with pytest.raises(RuntimeError), tokred.applied(model, "tome", r=4):
        raise RuntimeError
    with tokred.applied(model, "tome", r=4):
        assert classes(model) != before
    assert classes(model) == before
    tokred.apply(model, "tome", r=4)
    with pytest.raises(ValueError, match="already patched"), tokred.applied(model, "tome", r=2):
        pass


def test_supports_says_what_is_missing():
    rows = {row.method: row for row in tokred.supports(build("vit-mean"))}
    assert rows["tome"].works
    assert not rows["evit"].works
    assert "needs class_attention" in rows["evit"].reason
    assert not any(row.works for row in tokred.supports(torch.nn.Linear(1, 1)))


def test_report_and_trace_describe_the_last_forward():
    model, x = build("vit"), images(2)
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        model(x)
    found = tokred.report(model)
    assert [(row.tokens_in, row.tokens_out) for row in found.layers] == [(26, 22), (22, 18), (18, 14)]
    assert found.layers[-1].mean_size == pytest.approx(26 / 14)
    counted = tokred.flops(model, "tome", (3, 40, 40), r=4)
    assert found.macs == counted.macs - counted.outside
    assert found.macs_unpatched > found.macs
    assert "14" in str(found)
    total = tokred.trace(model)
    assert total.index.shape == (2, 26)
    assert total.slots == 14
    assert float(total.sizes().sum()) == 52


@pytest.mark.parametrize(
    ("name", "method", "parameters", "published"),
    [
        ("deit_small_patch16_224", "tome", {"r": 13}, 2.7),
        ("vit_large_patch16_224", "tome", {"r": 8}, 31.0),
        ("vit_large_patch16_224", "tome", {"r": (8, -1)}, 22.3),
        ("vit_huge_patch14_224", "tome", {"r": 7}, 92.9),
        ("vit_huge_patch14_224", "tome", {"r": (7, -1)}, 72.6),
        ("deit_small_patch16_224", "evit", {"kappa": 0.7}, 3.0),
        ("deit_small_patch16_224", "evit", {"kappa": 0.5}, 2.3),
        ("deit_small_patch16_224", "pitome", {"ratio": 0.9}, 2.6),
        ("deit_small_patch16_224", "pitome", {"ratio": 0.975}, 4.01),
        ("deit_small_patch16_224", None, {}, 4.6),
    ],
)
def test_published_gflops_are_reproduced_to_one_percent(name, method, parameters, published):
    model = without_weights(name)
    counted = tokred.flops(model, method, (1, 3, 224, 224), **parameters).gmacs
    # Published figures are rounded: half a unit of their last digit is allowed besides the one per cent.
    digits = len(str(published).partition(".")[2])
    assert abs(counted - published) <= 0.01 * published + 0.5 * 10**-digits


def test_two_models_in_two_threads_do_not_meet():
    import threading

    models = [tokred.apply(build("vit", seed=i), "tome", r=4 + i) for i in range(2)]
    xs = [images(seed=i) for i in range(2)]
    with torch.no_grad():
        expected = [m(x) for m, x in zip(models, xs, strict=True)]
    failures: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(models[i](xs[i]), expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
