"""The page of ``tokred app``: what it calls, without a browser; and one walk through the real page in one."""

from __future__ import annotations

import re
import shutil
import socket

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("numpy")
pytest.importorskip("PIL.Image")
pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import tokred
from tokred.bench import embedded
from tokred.bench.app import amounts, page, shown
from tokred.bench.app.trials import Trials, of
from tokred.bench.models import Subject
from tokred.cli import app as command
from tokred.cli.main import app

NASTY = "<img src=x onerror=\"alert('1')\">"


@pytest.fixture(scope="module")
def trials() -> Trials:
    from tokred.bench import sources

    return of(sources.model("embedded"))


@pytest.fixture(scope="module")
def faced(trials) -> page.Page:
    return page.Page(trials, command.gallery(trials, [], 3), seconds=0.01)


@pytest.fixture(scope="module")
def small() -> Trials:
    """On a model without a classifier."""
    from tests.encoder.tiny_timm import build

    model = build("vit")
    model.reset_classifier(0)
    size = model.patch_embed.img_size
    return Trials(Subject("tiny", model, size, 3, (0.5,) * 3, (0.5,) * 3, model))


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["app", "--no-browser", *arguments])
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tokred: ")
    return line


def test_a_trial_is_what_apply_and_report_say(trials, faced):
    picture = faced.pictures[0]
    model, x = trials.subject.model, picture.input[None]
    trial = trials.run(picture, "tome r=12")
    with torch.inference_mode():
        dense = model(x)[0].softmax(-1)
        with tokred.applied(model, "tome", r=12):
            reduced = model(x)[0].softmax(-1)
            report = tokred.report(model)
    assert trial.tokens == (report.layers[0].tokens_in, report.layers[-1].tokens_out)
    assert trial.macs[1] == sum(layer.macs for layer in report.layers)
    for guesses, right in ((trial.before, dense), (trial.after, reduced)):
        assert [g.name for g in guesses] == [embedded.CLASSES[i] for i in right.topk(3).indices.tolist()]
        assert [g.share for g in guesses] == pytest.approx(right.topk(3).values.tolist(), abs=1e-5)
    assert not tokred.patched(model)
    assert trials.run(picture, "tome r=0").before == trials.run(picture, "tome r=0").after


def test_a_trial_that_removes_nothing_says_so(trials, faced):
    trial = trials.run(faced.pictures[0], "tome")
    assert "removes nothing" in shown.notes(trial)
    assert trial.cosine == pytest.approx(1)
    assert trial.tokens[0] == trial.tokens[1]


def test_the_time_is_a_ratio_of_pairs_with_quartiles(trials, faced, monkeypatch):
    found = trials.clock(faced.pictures[0], "tome r=30", batch=4, seconds=0.01)
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.rounds == 5
    assert not tokred.patched(trials.subject.model)
    from tokred.bench.app import trials as module

    def fake(arms, run, rounds, **options):
        assert options["device"] == torch.device("cpu")
        return [[2.0] * rounds, [1.0, 4.0] * (rounds // 2) + [1.0] * (rounds % 2)]

    monkeypatch.setattr(module.timing, "paired", fake)
    found = trials.clock(faced.pictures[0], "tome r=30")
    assert (found.ratio.low, found.ratio.high) == (0.5, 2.0)
    assert not found.told
    said = shown.numbers(trials.run(faced.pictures[0], "tome r=30"), found)
    assert "no difference that could be told" in said
    assert "over 5 pairs" in said


def test_every_method_that_runs_has_an_amount_or_usual_parameters(small):
    subject, faced = small.subject, page.Page(small, [])
    rows = {row.method: row for row in tokred.supports(subject.model)}
    assert set(small.methods) == {n for n in tokred.list_methods(stage="block") if rows[n].works}
    amount = set()
    for name in small.methods:
        parameters, has = faced.settle(name, 0.6)
        setting = amounts.setting(name, parameters)
        assert small.arm(setting).method.removes(small.depth), setting
        assert amounts.controls(setting)
        amount |= {name} if has else set()
    assert {"tome", "pitome", "evit", "vomix"} <= amount
    assert "ltp" not in amount, "what it removes depends on the picture"


def test_amounts_cost_what_they_say(trials):
    subject = trials.subject
    full = tokred.flops(subject.model, None, subject.shape).macs
    for name, keep in (("tome", 0.5), ("evit", 0.8), ("tome", 1.0)):
        arm = trials.arm(f"{name} {amounts.settle(subject, name, keep)}")
        assert tokred.flops(subject.model, arm.method, subject.shape).macs / full == pytest.approx(keep, abs=0.03)


def test_parameters_as_controls():
    found = {c.name: c for c in amounts.controls("tome r=(16,-1) metric=v")}
    assert found["r"].value == "(16, -1)"
    assert found["metric"].value == "v"
    assert found["prop_attn"] == ("prop_attn", "flag", True, (), found["prop_attn"].about)
    assert found["mode"].choices == ("mean", "max", "mlerp", "keep")
    assert "proportional attention" in found["prop_attn"].about
    assert amounts.changed("tome r=13", "prop_attn", False) == "r=13 prop_attn=False"
    assert amounts.changed("tome r=13 prop_attn=False", "prop_attn", True) == "r=13"
    assert amounts.changed("pitome ratio=0.9", "margin", "0.5") == "ratio=0.9 margin=0.5"
    with pytest.raises(ValueError, match="mode"):
        amounts.changed("tome r=13", "mode", "middle")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("r=-3", "r"),
        ("s=1", "has no parameter"),
        ("13", "key=value"),
        ("evit kappa=0.7", "the method is chosen above"),
        ("metric=k,r=13", "separated by spaces"),
    ],
)
def test_wrong_parameters_are_told_on_the_page(faced, parameters, words):
    ((error, trial, _),) = faced.tried(0, None, "tome", parameters, 1)
    assert trial is None
    assert words in error
    assert 'role="alert"' in error
    assert not tokred.patched(faced.trials.subject.model)


def test_pictures_of_the_users(faced, tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "red.png")
    found = list(faced.tried(None, str(tmp_path / "red.png"), "tome", "r=12", 1))
    assert len(found) == 2
    assert found[0][1].recording.names == ("red.png",)
    assert "measuring" in found[0][2]
    assert "quartiles" in found[1][2]
    (tmp_path / "broken.png").write_bytes(b"none")
    ((error, _, _),) = faced.tried(None, str(tmp_path / "broken.png"), "tome", "r=12", 1)
    assert "cannot be read as an image" in error
    ((error, _, _),) = faced.tried(None, None, "tome", "r=12", 1)
    assert "no picture yet" in error


def test_names_are_escaped(trials, faced):
    classes, trials.classes = trials.classes, [NASTY] * 10
    try:
        trial = trials.run(faced.pictures[0], "tome r=12")
    finally:
        trials.classes = classes
    assert "<img" not in shown.answers(trial) + shown.error(NASTY) + shown.blocks(trial)
    assert "&lt;img" in shown.answers(trial)


def test_models_without_a_classifier_show_the_cosine(small):
    black = torch.zeros(small.subject.shape)
    trial = small.run(small.pictures(black, black, ["black"])[0], "tome r=2")
    assert trial.before == ()
    assert "no classifier" in shown.answers(trial)


def test_pictures_where_a_model_brings_none(small):
    pytest.importorskip("sklearn")
    found = command.photographs(small)
    assert [p.name for p in found] == ["china", "flower"]
    assert {p.input.shape for p in found} == {(3, *small.subject.size)}
    small.subject.channels = 1
    try:
        assert command.photographs(small) == []
    finally:
        small.subject.channels = 3


def test_bad_input_of_the_command_gets_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused("--port", str(port))
    assert "--host no.such.place. is no address" in refused("--host", "no.such.place.")
    assert "no model is named 'deit_smal_patch'" in refused("deit_smal_patch")
    assert "windows" in refused("swin_tiny_patch4_window7_224", "--random-weights")
    assert "no/such.png is neither" in refused("-i", "no/such.png")
    assert "--device must be" in refused("--device", "toaster")


def test_nothing_is_public_unless_asked(monkeypatch):
    pytest.importorskip("gradio")
    from tokred.bench.app import layout

    seen = []

    def launch(blocks, host, port, **options):
        seen.append((host, port, options))
        raise OSError("not now")

    monkeypatch.setattr(layout, "launch", launch)
    assert refused("--port", "0", "--random-weights") == "tokred: not now"
    (host, port, options) = seen[0]
    assert (host, options) == ("127.0.0.1", {"share": False, "browser": False})
    assert port > 0


def test_a_missing_extra_is_named_before_anything_is_loaded(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'tokred[app]'" in refused("no_such_model")


def test_a_free_port_is_found():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="in use"):
            command.listening("127.0.0.1", port)
    assert command.listening("127.0.0.1", 0) > 0
    assert command.listening("127.0.0.1", None) >= command.PORT


@pytest.mark.hosts  # half a minute of a browser
def test_the_page_in_a_browser(faced):
    """A picture, a method and an amount are chosen; picture, answer and time come, and no error on the console."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    from tokred.bench.app import layout

    playwright.expect.set_options(timeout=60_000)
    blocks = layout.build(faced)
    address = layout.launch(blocks, "127.0.0.1", command.listening("127.0.0.1", 0))
    bad: list[str] = []
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1400, "height": 1000})
            view.set_default_timeout(60_000)
            view.on("console", lambda m: bad.append(m.text) if m.type == "error" else None)
            view.on("pageerror", lambda e: bad.append(str(e)))
            outside = re.compile(r"https?://(?!127\.0\.0\.1)")
            view.on("request", lambda r: bad.append(r.url) if outside.match(r.url) else None)
            view.goto(address)
            walk(view, playwright.expect, faced)
            browser.close()
    finally:
        blocks.close(verbose=False)
    assert bad == []


def walk(view, expect, faced) -> None:
    """A visit: the first picture is there by itself; then another one, another method, another amount, a mistake."""
    numbers, answers = view.locator("#numbers"), view.locator("#answers")
    expect(numbers).to_contain_text("quartiles")
    first = view.locator("#before img").get_attribute("src")
    view.locator("#gallery button.thumbnail-item").nth(1).click()
    expect(view.locator("#before img")).not_to_have_attribute("src", first)
    expect(numbers).to_contain_text("quartiles")

    view.locator("#method input").click()
    view.get_by_role("option", name="evit", exact=True).click()
    expect(answers).to_contain_text("Answer with evit kappa=")
    expect(numbers).to_contain_text("quartiles")
    expect(view.locator("#error")).not_to_contain_text("=")

    amount = view.locator("#keep input[type=number]")
    amount.fill("0.9")
    amount.press("Tab")
    expect(answers).to_contain_text(f"Answer with evit {faced.settle('evit', 0.9)[0]}")
    expect(numbers).to_contain_text("as fast")
    expect(numbers).to_contain_text("quartiles")
    expect(view.locator("#after img")).to_be_visible()

    field = view.locator("#parameters textarea, #parameters input").first
    field.fill("kappa=7")
    field.press("Enter")
    expect(view.locator("#error [role=alert]")).to_contain_text("kappa")
    field.fill("kappa=0.5")
    field.press("Enter")
    expect(answers).to_contain_text("Answer with evit kappa=0.5")
    expect(view.locator("#error [role=alert]")).to_have_count(0)
    expect(numbers).to_contain_text("quartiles")
