"""The page's components of Gradio, and which event calls what."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import partial
from typing import Any

from tokred.bench.app import amounts, shown
from tokred.bench.app.page import (
    BATCHES,
    COLOURS,
    FIRST,
    HOW,
    INTRO,
    UPLOAD,
    USUAL_BATCH,
    WRONG,
    Page,
    caption,
    gradio,
    painted,
    seen,
)
from tokred.bench.app.trials import Trial

AMOUNT = "share of the multiply-adds that is left"
STYLE = (
    shown.STYLE
    + """
.gradio-container {max-width: 1320px !important; margin: 0 auto !important;}
footer {display: none !important;}
#before img, #after img {width: 100%; height: auto; image-rendering: pixelated;}
#left {margin-top: -10px;}
"""
)


def build(page: Page) -> Any:
    """The page as Blocks of Gradio, not yet served.

    Raises:
        ImportError: gradio is not installed.
    """
    gr = gradio()
    trials, subject = page.trials, page.trials.subject
    method = FIRST if FIRST in trials.methods else next(iter(trials.methods))
    first, has = page.settle(method, amounts.KEEP)
    with gr.Blocks(title=f"tokred: {subject.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# tokred: {html.escape(subject.name)}\n{INTRO}")
        chosen, kept, good = gr.State(0 if page.pictures else None), gr.State(None), gr.State("")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                with gr.Tabs():
                    with gr.Tab("Its pictures", visible=bool(page.pictures)):
                        gallery = gr.Gallery(
                            [(_image(p), p.name) for p in page.pictures],
                            show_label=False,
                            columns=3,
                            height=224,
                            object_fit="contain",
                            format="png",
                            allow_preview=False,
                            selected_index=0 if page.pictures else None,
                            buttons=[],
                            elem_id="gallery",
                        )
                    with gr.Tab("Your own"):
                        own = gr.Image(
                            show_label=False,
                            type="filepath",
                            sources=["upload", "clipboard"],
                            height=224,
                            buttons=[],
                            elem_id="own",
                        )
                names = gr.Dropdown(
                    list(trials.methods),
                    value=method,
                    label="Method",
                    info=trials.methods[method],
                    elem_id="method",
                )
                keep = gr.Slider(
                    0.2,
                    1.0,
                    value=amounts.KEEP,
                    step=0.05,
                    label="keep",
                    info=AMOUNT,
                    interactive=has,
                    elem_id="keep",
                )
                text = gr.Textbox(
                    first,
                    label="parameters",
                    info="such as r=13; Enter tries them",
                    max_lines=1,
                    elem_id="parameters",
                )
                with gr.Accordion("All parameters of the method", open=False):
                    slot = gr.Column()
                batch = gr.Dropdown(
                    [(f"{n} cop{'ies' if n > 1 else 'y'} of the picture", n) for n in BATCHES],
                    value=USUAL_BATCH,
                    label="Timed on",
                    elem_id="batch",
                )
                button = gr.Button("Try it", variant="primary", elem_id="try")
                count = len(trials.refused)
                with gr.Accordion(f"{count} methods do not run here", open=False, visible=count > 0):
                    gr.Markdown("\n".join(f"- **{n}**: {html.escape(why)}" for n, why in trials.refused.items()))
            with gr.Column(scale=5, min_width=320):
                wrong = gr.HTML(elem_id="error", padding=False)
                with gr.Row(elem_id="pictures"):
                    before, after = (gr.Image(**_still(name)) for name in ("before", "after"))
                left = gr.HTML(elem_id="left", padding=False)
                stage = gr.Slider(
                    0,
                    trials.depth,
                    value=trials.depth,
                    step=1,
                    label="Blocks so far",
                    info="0 is the picture itself",
                    elem_id="stage",
                )
                answers = gr.HTML(elem_id="answers", padding=False)
                numbers = gr.HTML(elem_id="numbers", padding=False)
                notes = gr.HTML(elem_id="notes", padding=False)
                with gr.Accordion("Block by block", open=False):
                    table = gr.HTML(elem_id="blocks", padding=False)
                with gr.Accordion("How to read this page", open=False):
                    gr.Markdown(f"{COLOURS}\n{HOW}")

        inputs = [chosen, own, names, text, batch]
        outputs = [wrong, before, after, left, stage, answers, numbers, notes, table, kept, good]
        run = {
            "fn": partial(_run, gr, page),
            "inputs": inputs,
            "outputs": outputs,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "trigger_mode": "always_last",
            "show_progress_on": [after, numbers],
        }
        amount = {"fn": partial(_settle, gr, page), "inputs": [names, keep], "outputs": [names, keep, text]}
        settling = {**amount, "show_progress": "hidden", "trigger_mode": "always_last"}

        gallery.select(_picking(gr), None, [chosen, own]).then(**run)
        own.upload(**run)
        own.clear(**run)
        names.input(**settling).then(**run)
        keep.input(**settling)
        keep.release(**settling).then(**run)
        text.submit(**run)
        batch.input(**run)
        button.click(**run)
        stage.input(_redrawn, [kept, stage], [after, left], show_progress="hidden", trigger_mode="always_last")
        blocks.load(**run)

        with slot:

            @gr.render(inputs=[good], triggers=[good.change])  # type: ignore[untyped-decorator]
            def parameters(setting: str) -> None:
                for one in amounts.controls(setting) if setting else ():
                    made, event = _control(gr, one)
                    update = partial(_changed, gr, setting, one.name)
                    event(update, [made], [wrong, text], show_progress="hidden").then(**run)

    return blocks


def theme(gr: Any) -> Any:
    """Colours and letters; no font that would have to be fetched."""
    return gr.themes.Default(
        primary_hue="teal",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        # Its own grey is too light to be read.
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
    )


def launch(blocks: Any, host: str, port: int, *, share: bool = False, browser: bool = False) -> str:
    """Serve the page from threads of its own; ``blocks.close()`` ends it.

    Returns:
        Its address on this machine.

    Raises:
        OSError: the port is in use, or there is no such host.
    """
    gr = gradio()
    _, address, public = blocks.queue(default_concurrency_limit=2).launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=UPLOAD,
        theme=theme(gr),
        css=STYLE,
    )
    return str(public or address)


def _still(name: str) -> dict[str, Any]:
    """Settings of an image that is only shown."""
    return {
        "interactive": False,
        "show_label": False,
        "format": "png",
        "buttons": [],
        "elem_id": name,
        "min_width": 120,
    }


def _image(picture: Any) -> Any:
    from PIL import Image

    from tokred.analysis.viz.recording import as_bytes

    pixels = as_bytes(picture.pixels).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    found = Image.fromarray(pixels)
    # Few pixels are kept as squares: a browser would blur them.
    times = max(1, 112 // max(found.size))
    return found.resize((found.width * times, found.height * times), Image.Resampling.NEAREST)


def _picking(gr: Any) -> Any:
    """A function of the event that a picture of the gallery was picked; the user's own one is put away."""

    def picked(event: Any) -> tuple[int, None]:
        return int(event.index), None

    # Gradio hands out events by type, which is known here only once it is imported.
    picked.__annotations__ = {"event": gr.SelectData}
    return picked


def _settle(gr: Any, page: Page, method: str, keep: float) -> tuple[Any, Any, str]:
    parameters, has = page.settle(method, keep)
    info = AMOUNT if has else f"{method} has no single amount: set its parameters"
    about = gr.update(info=page.trials.methods[method])
    return about, gr.update(interactive=has, info=info), parameters


def _run(
    gr: Any, page: Page, chosen: int | None, own: str | None, method: str, parameters: str, batch: int
) -> Iterator[tuple[Any, ...]]:
    drawn = False
    for wrong, trial, numbers in page.tried(chosen, own, method, parameters, batch):
        if trial is None:
            yield (wrong, *[gr.skip()] * 10)
        elif drawn:  # the time has come in
            yield (wrong, *[gr.skip()] * 5, numbers, *[gr.skip()] * 4)
        else:
            drawn = True
            depth = trial.recording.depth
            yield (
                wrong,
                seen(trial),
                painted(trial, depth),
                caption(trial, depth),
                depth,
                shown.answers(trial),
                numbers,
                shown.notes(trial),
                shown.blocks(trial),
                trial,
                trial.setting,
            )


def _redrawn(trial: Trial | None, stage: int) -> tuple[Any, str]:
    return (None, "") if trial is None else (painted(trial, stage), caption(trial, stage))


def _control(gr: Any, one: amounts.Control) -> tuple[Any, Any]:
    """A parameter's component, and the event at which its new value counts."""
    given = {"label": one.name, "info": one.about or None, "interactive": True, "elem_id": f"parameter-{one.name}"}
    if one.kind == "flag":
        made = gr.Checkbox(one.value, **given)
        return made, made.input
    if one.kind == "choice":
        made = gr.Dropdown(list(one.choices), value=one.value, **given)
        return made, made.input
    made = gr.Textbox(one.value, max_lines=1, **given)
    return made, made.submit


def _changed(gr: Any, setting: str, parameter: str, value: Any) -> tuple[str, Any]:
    """The error, and the field of parameters after one of them was changed."""
    try:
        return "", amounts.changed(setting, parameter, value)
    except WRONG as error:
        return shown.error(str(error)), gr.skip()
