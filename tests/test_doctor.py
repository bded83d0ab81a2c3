"""The doctor: laws hold on a family of every kind, planted faults are named, and the report can be read anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("timm")

from typer.testing import CliRunner

import tokred
from tokred import doctor
from tokred.cli.main import app
from tokred.doctor import caches, denoisers, encoders, installed, mixtures, stores, visual
from tokred.doctor.laws import LAWS, Case

ROOT = Path(__file__).resolve().parents[1]
# A family of every way in which something is checked: library, wing, label.
SOME = [
    ("timm", "encoder", "vit"),
    ("timm", "encoder", "dinov3 (rope, registers)"),
    ("timm", "encoder", "relpos-mlp-mean"),
    ("timm", "encoder", "timm SAM, rope"),
    ("open_clip", "encoder", "CLIP"),
    ("transformers", "encoder", "BERT"),
    ("transformers", "encoder", "TimeSformer"),
    ("transformers", "encoder", "ViTDet"),
    ("transformers", "kv", "llama"),
    ("transformers", "kv", "gemma2"),
    ("transformers", "kv", "formats on llama"),
    ("transformers", "kv", "formats on qwen3_5"),
    ("transformers", "vlm", "llava"),
    ("transformers", "vlm", "qwen2_5_vl"),
    ("transformers", "moe", "mixtral"),
    ("transformers", "moe", "qwen2_moe"),
    ("diffusers", "diffusion", "sd15"),
    ("diffusers", "diffusion", "flux"),
    ("diffusers", "diffusion", "wan"),
]


def case_of(library: str, wing: str, family: str) -> Case:
    pytest.importorskip(library)
    return next(c for c in doctor.choose([library]) if (c.wing, c.family) == (wing, family))


def broken(case: Case) -> dict[str, str]:
    """Laws that do not hold, and why."""
    (row,) = doctor.examine([case])
    assert not row.error, row.error
    assert set(row.broken) == set(case.checks)
    return {law: why for law, why in row.broken.items() if why}


@pytest.fixture
def torch_alone(monkeypatch):
    """Loops and kernels have tests of their own, and take seconds to be compiled."""
    monkeypatch.setenv("TOKRED_KERNELS", "torch")


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("which", SOME, ids=lambda which: "-".join(which))
def test_laws_hold(which, torch_alone):
    case = case_of(*which)
    assert {"nothing", "fewer", "removed"} <= set(case.checks) <= set(LAWS)
    divided = which[2] == "TimeSformer"  # which hands out sizes, and no tokens that could be masked
    assert ("dropped" in case.checks) != (divided or which[2].startswith("formats"))
    assert broken(case) == {}


@pytest.mark.hosts
def test_laws_hold_with_every_method(torch_alone):
    for name in ("transformers", "diffusers"):
        pytest.importorskip(name)
    from tokred.adapters.tiny import omni

    cases = [case for wing in ("encoder", "kv", "vlm", "diffusion", "moe") for case in doctor.choose([wing], "*")]
    hosted = set(tokred.list_methods()) - (set() if omni.known() else {"omnizip"})  # which hears
    assert {case.family.partition(" on ")[0] for case in cases} == hosted
    for case in cases:
        assert broken(case) == {}, case.family
        assert ("nothing" in case.checks) == bool(case.nothing)


def test_one_method_is_asked_by_name():
    assert [case.family for case in doctor.choose(["timm"], "tom?")] == ["tome on vit"]
    with pytest.raises(ValueError, match="no method's name fits 'nobody'"):
        doctor.choose(["timm"], "nobody")
    done = run("--only", "timm", "--methods", "kth")
    assert done.exit_code == 0, done.output
    assert "kth on vit" in done.stdout
    assert "on 1 families" in done.stdout


def test_every_tiny_model_is_asked():
    for name in ("transformers", "diffusers", "open_clip"):
        pytest.importorskip(name)
    from tokred.adapters.tiny import diffusion, kv, moe, omni, open_clip, timm, transformers, vlm, windows

    tables = (diffusion, kv, moe, open_clip, timm, transformers, vlm, windows)
    others = len(vlm.HYBRIDS) + 1 + omni.known()  # Florence-2, Qwen2.5-Omni
    assert len(doctor.choose()) == sum(len(table.FAMILIES) for table in tables) + len(stores.KINDS) + others


@pytest.mark.parametrize(
    ("which", "module"),
    [
        (("timm", "encoder", "vit"), encoders),
        (("timm", "encoder", "timm SAM"), encoders),
        (("open_clip", "encoder", "CLIP"), encoders),
        (("transformers", "kv", "llama"), caches),
        (("transformers", "kv", "gemma2"), caches),
        (("transformers", "vlm", "llava"), visual),
        (("transformers", "moe", "mixtral"), mixtures),
        (("diffusers", "diffusion", "sd15"), denoisers),
        (("diffusers", "diffusion", "flux"), denoisers),
    ],
    ids=lambda which: "-".join(which) if isinstance(which, tuple) else "",
)
def test_dropped_tokens_that_are_seen_are_noticed(monkeypatch, which, module):
    """The masked model sees what the patched one has dropped."""
    monkeypatch.setattr(module, "LEFT", 0.0)
    found = broken(case_of(*which))
    assert set(found) - {"merged"} == {"dropped"}
    assert "differ from those of the model as it is by" in found["dropped"]


def test_a_host_whose_blocks_have_changed_is_noticed(monkeypatch):
    """The host's block does something that the split block does not know. (Where tokens were merged, the host's blocks
    are compared from the second on, which is run whole.)"""
    from timm.models.vision_transformer import Block

    def forward(self, x, *args, **kwargs):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        return x + 2 * self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    monkeypatch.setattr(Block, "forward", forward)
    assert set(broken(case_of("timm", "encoder", "vit"))) == {"dropped"}


def test_sizes_that_do_not_reach_attention_are_noticed(monkeypatch):
    monkeypatch.setattr("tokred.adapters.encoder.block.attention_bias", lambda state, proportional: None)
    assert set(broken(case_of("timm", "encoder", "vit"))) == {"merged"}


def test_a_format_that_rounds_too_much_holds_too_much_or_cannot_go_back_is_noticed(monkeypatch, torch_alone):
    case = case_of("transformers", "kv", "formats on llama")
    cls = tokred.core.registry.methods.get("turbo")
    monkeypatch.setattr(cls, "nothing", {"bits": 4})
    monkeypatch.setattr("tokred.kv.stores.coded.CodedShelf.tensors", property(lambda self: iter([torch.zeros(10**6)])))
    monkeypatch.setattr("tokred.kv.stores.coded.CodedShelf._cut", lambda self, count: None)
    found = broken(case)
    assert set(found) == {"nothing", "fewer", "cropped"}
    assert found["nothing"].startswith("turbo: nothing was to be removed, but the output differs by up to")
    assert found["fewer"].startswith("kivi: 12000000 bytes are held, and as they come the rows would take")
    assert found["cropped"].startswith("kivi: ")


def test_a_patch_that_leaves_something_behind_is_noticed(monkeypatch):
    real = tokred.remove

    def forgetful(model):
        model.register_forward_hook(lambda module, args, out: None)
        return real(model)

    monkeypatch.setattr(tokred, "remove", forgetful)
    found = broken(case_of("timm", "encoder", "vit"))
    assert found == {"removed": "after removal the model's hooks is not what it was"}


def test_methods_that_do_too_much_or_nothing_are_noticed():
    case = case_of("timm", "encoder", "vit")
    swapped = dataclasses.replace(case, nothing=case.reducing, reducing=case.nothing)
    found = broken(swapped)
    assert set(found) == {"nothing", "fewer"}
    assert "nothing was to be removed, but the output differs by up to" in found["nothing"]
    assert found["fewer"] == "26 of 26 tokens are left: none was removed"


def test_each_law_has_a_model_of_its_own():
    case = case_of("timm", "encoder", "vit")
    first, second = case.build(), case.build()
    assert first is not second
    tokred.apply(first, "tome", r=5)
    assert type(second.blocks[0]) is type(case.model.blocks[0])
    assert torch.equal(case.run(second)[0], case.before[0])


# ---------------------------------------------------------------- what is said


def break_host(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> None:
    """Every tower of open_clip that tokred looks at answers with an error."""
    pytest.importorskip("open_clip")

    def fail(module):
        raise error()

    monkeypatch.setattr("tokred.adapters.encoder.open_clip.match", fail)


def test_a_broken_family_is_named_and_the_exit_status_is_one(monkeypatch):
    break_host(monkeypatch, lambda: AttributeError("the tower has\nno blocks"))
    done = run("--only", "open_clip")
    assert done.exit_code == 1
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(" CLIP")]
    assert rows == [["CLIP", "NO", "NO", "NO", "NO", "NO"]]
    said = " ".join(done.stdout.split())
    assert "open_clip/encoder CLIP (nothing, fewer, dropped, merged, removed)" in said
    assert said.count("AttributeError: the tower has no blocks") == 1, "one reason is given once"
    assert "and 5 more" in said
    assert "10 of 10 families are broken: give `tokred doctor --json` with an issue" in said


def test_a_host_that_cannot_be_built_is_broken(monkeypatch):
    from tokred.adapters.tiny import timm

    monkeypatch.setitem(timm.FAMILIES, "vit", timm.Family("vision_transformer.NoSuchTransformer"))
    (row,) = doctor.examine([case_of("timm", "encoder", "vit")])
    assert not row.healthy
    assert row.error.startswith("AttributeError: ")
    assert row.complaints == [("build", row.error)]


def test_a_library_too_old_for_a_family_is_no_failure(monkeypatch):
    case = dataclasses.replace(case_of("timm", "encoder", "vit"), since="999.0")
    monkeypatch.setattr(doctor, "choose", lambda *given: [case])
    done = run("--only", "timm")
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert f"timm vit: not asked: timm {installed.environment.version('timm')} cannot build it, 999.0 and later" in said
    assert "no family was examined" in said


def test_a_missing_library_is_a_row_and_no_failure(monkeypatch):
    real, version = doctor.present, installed.environment.version
    monkeypatch.setattr(doctor, "present", lambda library: library != "open_clip" and real(library))
    monkeypatch.setattr(installed.environment, "version", lambda p: "" if p == "open_clip_torch" else version(p))
    done = run("--only", "open_clip")
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("open_clip no 3.0 to ") for line in lines)
    assert "open_clip is not installed: pip install 'tokred[open_clip]'" in lines
    assert "open_clip: not installed: pip install 'tokred[open_clip]'" in lines
    assert lines[-1].startswith("no family was examined")


def test_every_wing_has_a_table_of_its_own():
    from tokred.cli.doctor import KINDS
    from tokred.doctor.cases import WINGS

    assert {wing for wings in WINGS.values() for wing in wings} == set(KINDS)


def test_the_document(monkeypatch):
    pytest.importorskip("open_clip")
    break_host(monkeypatch, lambda: RuntimeError("no"))
    done = run("--only", "open_clip", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert list(found) == [
        "schema", "tokred", "commit", "date", "machine", "libraries", "operators", "names", "laws", "families",
        "broken", "seconds",
    ]  # fmt: skip
    assert found["schema"] == 1
    assert set(found["machine"]) == {"python", "system", "cpu", "threads", "cuda", "devices"}
    assert {row["name"] for row in found["libraries"]} >= {"torch", "timm", "transformers", "diffusers", "open_clip"}
    assert all(set(row) == {"name", "installed", "floor", "newest", "standing"} for row in found["libraries"])
    assert all(set(row) == {"name", "device", "path", "reason"} for row in found["operators"])
    assert {row["path"] for row in found["operators"] if row["device"] == "cpu"} == {"torch"}
    assert list(found["laws"]) == list(LAWS)
    assert found["broken"] == len(found["families"]) == 10
    for row in found["families"]:
        assert set(row) == {"library", "wing", "family", "broken", "error", "skipped", "healthy"}
        assert set(row["broken"].values()) == {"RuntimeError: no"}
        assert row["healthy"] is False


def test_only_versions():
    done = run("--versions")
    assert done.exit_code == 0
    assert "Libraries" in done.stdout
    assert "operators on cpu: torch for attention," in done.stdout
    assert "laws hold" not in done.stdout


@pytest.mark.parametrize("only", ["pandas", "timm,flax", ","])
def test_what_cannot_be_examined_is_refused_in_one_line(only):
    done = run("--only", only)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tokred: ")
    assert line.endswith("timm, open_clip, transformers, diffusers, encoder, kv, vlm, moe, diffusion")


def test_a_wing_alone():
    pytest.importorskip("transformers")
    found = doctor.choose(["kv"])
    assert {(case.library, case.wing) for case in found} == {("transformers", "kv")}
    assert {case.wing for case in doctor.choose(["transformers", "vlm"])} == {"vlm"}
    assert doctor.choose(["timm", "vlm"]) == []


def test_missing_libraries_of_other_wings_are_no_matter(monkeypatch):
    monkeypatch.setattr(doctor, "present", lambda library: False)
    assert doctor.missing(["kv"]) == ["transformers"]
    assert doctor.missing(["timm", "diffusers"]) == ["timm", "diffusers"]
    assert doctor.missing() == ["timm", "open_clip", "transformers", "diffusers"]


@pytest.mark.hosts
def test_piped_into_sixty_columns():
    """No terminal and no width given: everything fits, the table is whole, and progress is lines of another stream."""
    pytest.importorskip("open_clip")
    surroundings = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", "from tokred.cli.main import main; main()", "doctor", "--only", "open_clip"],
        cwd=ROOT / "tests", env=surroundings, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    assert "\x1b" not in done.stdout + done.stderr
    head = next(line for line in lines if line.split()[:1] == ["family"])
    assert head.split() == ["family", "same", "fewer", "drop", "merge", "crop", "undo"]
    assert sum(line.count("ok ") for line in lines) >= 50
    assert lines[-1].startswith("all 50 laws hold on 10 families")
    assert done.stderr.splitlines()[-1] == "10 of 10 families, last open_clip timm trunk"
