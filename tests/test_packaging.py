"""What is installed: every package folder, the type marker, the data; and what an import brings along."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS = {"tokred": "tokred", "kernels": "tokred.kernels", "adapters": "tokred.adapters"}
# What `import tokred` must not import: hosts, kernels, and whatever only the command line and the plots need.
LATER = {
    "timm", "transformers", "diffusers", "open_clip", "triton", "typer", "click", "rich", "matplotlib", "pandas", "PIL",
    "safetensors", "torchvision", "torch._dynamo", "torch._inductor",
}  # fmt: skip


def packages() -> set[str]:
    """Every folder with an ``__init__.py``, by the name that it installs under."""
    found = set()
    for top, name in FOLDERS.items():
        for file in (ROOT / top).rglob("__init__.py"):
            inside = file.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *inside)))
    return found


def set_up() -> dict[str, Any]:
    """Everything that setup.py hands to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: found.update(given))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_every_package_is_listed() -> None:
    assert "packages" not in PROJECT["tool"]["setuptools"], "setup.py finds them"
    found = set_up()
    assert packages() == set(found["packages"])
    assert len(packages()) == len(found["packages"])
    assert found["package_dir"] == {name: folder for folder, name in FOLDERS.items()}


def test_folders_without_init_hold_no_code() -> None:
    for top in FOLDERS:
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.relative_to(ROOT)} stands in no package"


def test_data_files_are_listed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["tokred.bench.data"]
    for file in (ROOT / "tokred" / "bench" / "data").iterdir():
        if file.is_file() and file.suffix not in {".py", ".md"}:
            assert any(file.match(p) for p in patterns), f"{file.name} would not be installed"


def test_templates_are_listed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["tokred.analysis.viz"]
    files = [p for p in (ROOT / "tokred" / "analysis" / "viz" / "templates").iterdir() if p.is_file()]
    assert files
    for file in files:
        assert any(file.match(p) for p in patterns), f"{file.name} would not be installed"


def test_type_marker() -> None:
    assert (ROOT / "tokred" / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["tokred"]


def test_the_stub_is_the_generated_one() -> None:
    stub = runpy.run_path(str(ROOT / ".ci" / "stub.py"))
    assert (ROOT / "tokred" / "__init__.pyi").read_text("utf-8") == stub["text"](), "run python .ci/stub.py"
    assert (ROOT / "tokred" / "core" / "names.py").read_text("utf-8") == stub["names"](), "run python .ci/stub.py"
    assert "*.pyi" in PROJECT["tool"]["setuptools"]["package-data"]["tokred"]


def test_the_stub_has_all_names() -> None:
    import tokred

    tree = ast.parse((ROOT / "tokred" / "__init__.pyi").read_text("utf-8"))
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported | {"__version__"} == set(tokred.__all__)
    for name in tokred.__all__:
        assert getattr(tokred, name) is not None


def test_floors_not_pins() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    base = PROJECT["project"]["dependencies"]
    assert [r.partition(">=")[0] for r in base] == ["torch"]
    assert not [r for rs in (base, *extras.values()) for r in rs if "==" in r.partition(";")[0]]
    assert {"timm", "transformers", "diffusers", "open_clip", "triton", "bench", "docs", "dev", "all"} <= set(extras)


def test_version_stands_once() -> None:
    import tokred

    assert tokred.__version__ == PROJECT["project"]["version"]


def test_the_long_description_has_no_link_into_the_repository() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    found = set_up()
    text = found["long_description"]
    assert found["long_description_content_type"] == "text/markdown"
    assert PROJECT["project"]["dynamic"] == ["readme"]
    assert [m for m in re.findall(r"\]\(([^)\s]+)\)", text) if not m.startswith(("https://", "#"))] == []
    assert "![" not in text
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert code.findall(text) == code.findall(readme), "code stays as it is"
    # Nothing is lost but addresses and pictures.
    bare = re.sub(r"\W+", "", re.sub(r"!?\[([^\]]*)\]\([^)\s]+\)", r"\1", readme))
    pictures = "".join(re.sub(r"\W+", "", alt) for alt in re.findall(r"!\[([^\]]*)\]", readme))
    assert len(bare) - len(pictures) == len(re.sub(r"\W+", "", re.sub(r"\[([^\]]*)\]\([^)\s]+\)", r"\1", text)))


def test_licences_of_everything_inside_are_declared() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0 AND MIT"
    files = [p for pattern in PROJECT["project"]["license-files"] for p in ROOT.glob(pattern)]
    assert {ROOT / "LICENSE", *(ROOT / "tokred" / "bench" / "data").glob("LICENSE-*")} == set(files)
    assert any("Permission is hereby granted, free of charge" in p.read_text("utf-8") for p in files)


def test_pythons_agree() -> None:
    named = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + named[0].replace(".", "")
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text("utf-8")
    matrix = re.search(r"python: \[(.*)\]", workflow)
    assert matrix
    assert [v.strip(' "') for v in matrix[1].split(",")] == named
    assert "- run: .ci/run\n" in workflow
    assert all(f"python{v}" in (ROOT / ".ci" / "run").read_text("utf-8") for v in named)


def test_issue_templates_ask_for_the_doctor() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug", "model"):
        text = (folder / f"{name}.yml").read_text("utf-8")
        after = text[text.index("tokred doctor --json") :]
        assert "required: true" in after, "it is not asked in vain"
    yaml = pytest.importorskip("yaml")
    for file in (*folder.glob("*.yml"), *(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "CITATION.cff"):
        assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict), file.name


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def built(kind: str, source: Path, out: Path) -> Path:
    """The one archive that setuptools builds of a copy of the checkout, since it writes into what it builds."""
    (needed,) = (Requirement(r) for r in PROJECT["build-system"]["requires"])
    found = metadata.version("setuptools")
    if not needed.specifier.contains(found):
        pytest.skip(f"the build asks for {needed}, which pip gets by itself; setuptools {found} is installed")
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (archive,) = out.glob("tokred-*.*")
    return archive


@pytest.mark.slow
def test_the_source_archive_is_the_checkout(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to it")
    files = [f for f in tracked.stdout.splitlines() if (ROOT / f).is_file()]
    source, out = tmp_path / "source", tmp_path / "out"
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, source / file)
    with tarfile.open(built("sdist", source, out)) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        info = next(m for m in archive.getmembers() if m.name.count("/") == 1 and m.name.endswith("PKG-INFO"))
        about = archive.extractfile(info)
        assert about is not None
        text = about.read().decode()
    assert {f for f in files if not f.startswith("CHANGES.")} <= inside
    assert "License-Expression: Apache-2.0 AND MIT" in text
    assert "](docs/" not in text


def run(code: str) -> str:
    """What a fresh interpreter prints, started away from the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_torch_alone() -> None:
    # torch comes first: what it imports itself is not tokred's doing.
    code = "import sys, torch; before = set(sys.modules); import tokred; print(*sorted(set(sys.modules) - before))"
    new = set(run(code).split())
    assert "tokred" in new
    assert not {m for m in new if m in LATER or m.partition(".")[0] in LATER}
    foreign = {m.partition(".")[0] for m in new} - {"tokred"} - set(sys.stdlib_module_names)
    assert not foreign - {"torch"}


def test_import_leaves_methods_adapters_and_policies_alone() -> None:
    modules = run("import sys, tokred; print(*sys.modules)").split()
    assert not [m for m in modules if m.startswith(("tokred.methods.", "tokred.adapters.", "tokred.kv"))]
    assert not [m for m in modules if m.startswith("tokred.kernels.") and m.endswith(".triton")]


def test_import_patches_nothing() -> None:
    code = (
        "import torch, torch.nn.functional as F; before = (F.scaled_dot_product_attention, torch.nn.Module.__call__); "
        "import tokred; print(before == (F.scaled_dot_product_attention, torch.nn.Module.__call__))"
    )
    assert run(code).strip() == "True"


def wheel_of_a_copy(folder: Path) -> Path:
    """A wheel, built of a copy: setuptools builds in the source tree, and the checkout is kept clean."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return built("wheel", source, folder)


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    wheel = wheel_of_a_copy(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(Path(n).parent).replace("/", ".") for n in names if n.endswith("/__init__.py")} == packages()
    for top, package in FOLDERS.items():
        inside = package.replace(".", "/")
        for file in (ROOT / top).rglob("*.py"):
            assert f"{inside}/{file.relative_to(ROOT / top).as_posix()}" in names
    assert {"tokred/py.typed", "tokred/__init__.pyi", "tokred/analysis/viz/templates/viz.html"} <= names
    for file in (ROOT / "tokred" / "bench" / "data").iterdir():
        if file.suffix in {".safetensors", ".npz", ".json"} or file.name.startswith("LICENSE"):
            assert f"tokred/bench/data/{file.name}" in names
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("kernels/", "adapters/", "tests/", "benchmarks/"))]


@pytest.mark.hosts
@pytest.mark.slow
def test_the_wheel_installs_in_an_empty_environment_and_runs_from_another_folder(tmp_path: Path) -> None:
    wheel = wheel_of_a_copy(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    description = about.partition("\n\n")[2]
    assert description.startswith("# tokred")
    assert [m for m in re.findall(r"\]\(([^)\s]+)\)", description) if not m.startswith(("https://", "#"))] == []

    home, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def called(*command: object) -> str:
        given = [str(part) for part in command]
        done = subprocess.run(given, cwd=elsewhere, env=bare, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    called(*pip, "install", "--no-index", "--no-deps", wheel)
    assert [re.split("==| @ ", line)[0] for line in called(*pip, "freeze").splitlines()] == ["tokred"]
    # What it depends on comes from where the tests run: behind its own packages, so that nothing of it is hidden.
    own = Path(called(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = "import torch, tokred; print(tokred.__file__); print(len(tokred.list_methods()), tokred.make('tome', r=13))"
    where, told = called(python, "-c", code).splitlines()
    assert Path(where).is_relative_to(own)
    assert told.endswith("ToMe(r=13)")
    pytest.importorskip("typer")
    assert called(python.with_name("tokred"), "--version").split() == ["tokred", PROJECT["project"]["version"]]
    assert "tome" in called(python, "-m", "tokred", "list")
