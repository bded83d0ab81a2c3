"""The documentation is run: every Python block of README and docs, in order, each page with one namespace.

A block that cannot run here has ``<!-- not run: REASON -->`` on the line before it. A ``text`` block with
``<!-- output -->`` before it must be what the Python block before it printed. Its numbers are those of the pinned
versions: others draw other weights, or hand over other masks, and must print the same but for them.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tokred.core import environment
from tokred.core.versions import release

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "```python" in p.read_text("utf-8"))
FENCE = re.compile(
    r"^(?:[ ]*<!-- (?P<note>[^\n]+) -->\n\n?)?"
    r"(?P<margin>[ ]*)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=margin)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
PINNED = re.compile(r"^(torch|timm|transformers|diffusers)==(\S+)", re.MULTILINE)
COMMAND = re.compile(r"```bash\n(python3 -m venv [^\n]+)\n```")


class Block(NamedTuple):
    """One fenced block: its info string, its text, where it starts, and the comment on the line before it."""

    info: str
    text: str
    line: int
    note: str


def blocks(page: str) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    for found in FENCE.finditer(page):
        body = textwrap.dedent(found["body"])
        start = page.count("\n", 0, found.start("body"))
        yield Block(found["info"].strip(), body, start, found["note"] or "")


def as_pinned() -> bool:
    """Whether torch and the hosts are installed in the pinned versions."""
    pins = dict(PINNED.findall((ROOT / "constraints.txt").read_text("utf-8")))
    assert len(pins) == 4
    return all(release(environment.version(name)) == release(pin) for name, pin in pins.items())


def shown(text: str, numbers: bool) -> str:
    """What is compared of an output: all of it, or each line's words."""
    return text.rstrip() if numbers else re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "0", text.rstrip()))


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder to write into, no switches from outside, and registered names as they were before."""
    import tokred.kv  # noqa: F401 - its parts become known when they are imported, once
    from tokred.core.registry import methods, parts

    names = {registry: dict(registry._targets) for registry in (methods, parts)}
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for variable in ("TOKRED_KERNELS", "TOKRED_AUTOTUNE", "TOKRED_DEBUG", "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    yield
    for registry, before in names.items():
        registry._targets.clear()
        registry._targets.update(before)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(path: Path) -> None:
    text = path.read_text("utf-8")
    for host in ("timm", "transformers", "diffusers"):
        if re.search(rf"^\s*(import|from) {host}\b", text, re.MULTILINE):
            pytest.importorskip(host)
    for models in re.findall(
        r"^from tokred\.adapters\.tiny import .*?\b(diffusion|kv|transformers|vlm)\b", text, re.MULTILINE
    ):
        pytest.importorskip("diffusers" if models == "diffusion" else "transformers")
    namespace: dict[str, object] = {"__name__": "__page__"}
    printed, numbers = None, as_pinned()
    for block in blocks(text):
        where = f"{path.relative_to(ROOT)}:{block.line}"
        if block.info == "python":
            if block.note.startswith("not run"):
                assert re.fullmatch(r"not run: .{10,}", block.note), f"{where}: say why the block is not run"
                compile(block.text, where, "exec", dont_inherit=True)
                continue
            out = io.StringIO()
            # Line numbers of a failure are those of the page.
            code = compile("\n" * block.line + block.text, str(path), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed = out.getvalue()
        elif block.note == "output":
            assert printed is not None, f"{where}: no Python block stands before this output"
            assert shown(printed, numbers) == shown(block.text, numbers), f"{where}: the page shows another output"


def test_pages_are_found() -> None:
    names = {p.relative_to(ROOT).as_posix() for p in PAGES}
    assert {"README.md", "docs/index.md", "docs/concepts.md", "docs/adding-a-method.md"} <= names


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_fence_is_read(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(list(blocks(text))) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE))
    infos = {block.info for block in blocks(text)}
    assert infos <= {"python", "bash", "text", "toml", "yaml", "csv", "json"}, "an info string that no test knows"


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_fits_between_the_sidebars(path: Path) -> None:
    lines = [line for b in blocks(path.read_text("utf-8")) if b.info != "text" for line in b.text.split("\n")]
    assert [line for line in lines if len(line) > 100] == [], "at 1,400 pixels it needs a scroll bar"


# They stand on the page of random_visual.
BASELINES = {"uniform_visual", "downsample_visual", "uniform_frames"}


def test_every_method_has_a_page() -> None:
    import tokred

    built_in = {n for n in tokred.list_methods() if tokred.make(n).__class__.__module__.startswith("tokred.methods.")}
    # Policies for caches are presets of the same few choices, and share a page.
    policies = {n for n in built_in if tokred.make(n).stage == "cache"}
    pages = {p.stem for p in (ROOT / "docs" / "methods").rglob("*.md")} - {"index", "comparison", "hosts"}
    with_page = built_in - policies - BASELINES
    assert pages - (policies - {"kv"}) == with_page | {"kv"}
    folder = ROOT / "docs" / "methods"
    overview = (folder / "index.md").read_text("utf-8")
    wings = {name: tokred.make(name).__class__.__module__.split(".")[2] for name in with_page}
    assert all(f"({wing}/{name}.md)" in overview for name, wing in wings.items())
    baselines = (folder / "vlm" / "random_visual.md").read_text("utf-8")
    assert all(f"`{name}`" in baselines for name in BASELINES)
    shared = (folder / "kv" / "kv.md").read_text("utf-8")
    assert all(f"\n### {name}\n" in shared for name in policies - pages)
    assert "(kv/kv.md)" in overview


def test_every_model_with_vision_stands_in_the_tutorial() -> None:
    pytest.importorskip("transformers")
    from tokred.adapters.vlm.families import FACTS

    rows = [
        line
        for line in (ROOT / "docs" / "tutorials" / "vlm.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    named = [name for row in rows for name in re.findall(r"`(\w+Model)`", row)]
    assert sorted(named) == sorted(FACTS)


def test_readme_has_two_commands() -> None:
    commands = COMMAND.findall((ROOT / "README.md").read_text("utf-8"))
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/tokred demo")
    assert 'pytest -n auto -m "not weights and not hosts"' in commands[1]


def test_ci_extracts_the_commands_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    command = re.search(r"^extract_commands\(\) \{\n(.*?)^\}", ci, re.MULTILINE | re.DOTALL)
    assert command is not None
    done = subprocess.run(["bash", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == COMMAND.findall((ROOT / "README.md").read_text("utf-8"))
    assert "venv .venv &&" not in ci, "the commands stand in README.md alone"


def test_ci_is_sound() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True, timeout=60)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run([sys.executable, "-m", "py_compile", str(ROOT / ".ci" / "assemble.py")], check=True, timeout=60)
