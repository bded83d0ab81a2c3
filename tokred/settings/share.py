"""Settings that travel: ``save`` and ``load`` of a method or of what acts on a model, and ``push_to_hub``."""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokred.core.method import Method
from tokred.core.origin import Origin
from tokred.core.versions import TOKRED
from tokred.learn import store
from tokred.patch import entries_of

logger = logging.getLogger("tokred")

# A name of the hub: a user or an organisation, and a repository.
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def save(model: Any, folder: str | Path) -> Path:
    """Write a method, or the methods on ``model`` with their weights and where they act, into ``folder``.

    With the methods of a model goes how they were applied: the blocks that ``where`` chose, by their names, ``expose``,
    ``windows``, and the model's class and depth. The model's own weights are not written.

    Args:
        model: a patched model or pipeline, a method, or a list of methods.
        folder: made where it is not there; an earlier setting in it is replaced.

    Returns:
        The folder, for :func:`load`.

    Raises:
        NothingRecordedError: the model is not patched.
        TypeError: ``model`` is none of these.
        ImportError: there are weights, and safetensors is not installed.
        OSError: the folder cannot be written.
    """
    path = store.write(folder, _entries(model))
    logger.info("saved a setting in %s", path)
    return path


def load(source: str | Path, *, revision: str | None = None) -> Method | list[Method]:
    """The method that :func:`save` wrote, with its weights, for ``tokred.apply(model, tokred.load(source))``.

    Args:
        source: a folder, or a repository of the Hugging Face hub, such as ``"user/tome-vit-b"``; needs
            huggingface_hub.
        revision: of the repository: a branch, a tag or a commit.

    Returns:
        The method; a list where several acted. ``tokred.apply`` gives each the blocks, ``expose`` and ``windows`` that
        it was saved with, unless it is told others.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no setting in it.
        ValueError, UnknownMethodError: the setting does not fit this tokred; the message has both versions.
        ImportError: huggingface_hub, or safetensors where there are weights, is not installed.
    """
    local = Path(source)
    if not local.is_dir() and isinstance(source, str) and _HUB.fullmatch(source):
        local = _fetched(source, revision)
    elif revision is not None:
        raise ValueError(f"revision is for repositories of the hub, and {str(source)!r} is a folder")
    if not local.is_dir():
        raise FileNotFoundError(
            f"{str(source)!r} is no folder; give one that tokred.save has written, or a repository of the hub, "
            "user/name"
        )
    found = store.read(local)
    return found[0] if len(found) == 1 else found


def push_to_hub(
    model: Any, repository: str, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """Save a setting into a repository of the Hugging Face hub, which is made where it is not there.

    Args:
        model: as for :func:`save`.
        repository: ``"user/name"``; ``tokred.load(repository)`` reads it back.
        private: whether a new repository is so; None: as the organisation has it.
        token: of the hub; None: the one that ``hf auth login`` has stored.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``repository`` is no such name.
        ImportError: huggingface_hub is not installed.
        Whatever :func:`save` raises, and the hub's own errors.
    """
    if not _HUB.fullmatch(repository):
        raise ValueError(f"repository must be user/name, got {repository!r}")
    entries = _entries(model)
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = store.write(scratch, entries)
        (folder / "README.md").write_text(_card(repository, entries), "utf-8")
        api.create_repo(repository, private=private, exist_ok=True)
        said = message or f"tokred {TOKRED}: {', '.join(one.method.name for one in entries)}"
        where = str(api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=said))
    logger.info("pushed a setting to %s", where)
    return where


def given(setting: Mapping[str, Any] | str | Path) -> list[Method]:
    """The methods of a setting as data: one method's ``to_dict()``, what a ``tokred.json`` holds, or a folder of one.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`load` and :func:`tokred.from_dict`.
    """
    if not isinstance(setting, Mapping):
        found = load(Path(setting))
        return found if isinstance(found, list) else [found]
    rows = setting.get("methods", [setting])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"the methods of a setting are a list of dicts, got {rows!r}")
    if any(row.get("host") for row in rows):
        raise ValueError("a setting with weights is more than its dict: give the folder that tokred.save has written")
    return store.methods_of({"tokred": TOKRED, **setting, "methods": rows}, {}, "the setting")


@contextmanager
def told(method: Method, model: str, depth: int) -> Iterator[None]:
    """Around what may refuse a method: of a loaded one it then says what it was made for, and what this model is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if method.origin is None or method.origin.on(model, depth):
            raise
        error.args = (f"{error}; {method.origin.beside(model, depth, TOKRED)}", *error.args[1:])
        raise


def chosen_where(origin: Origin, blocks: Sequence[tuple[str, Any]], model: str, depth: int) -> frozenset[str] | None:
    """Names of the blocks that a loaded method is restricted to; None: it is not.

    Raises:
        ValueError: this model has no blocks of some of these names.
    """
    if origin.where is None:
        return None
    known = {name for name, _ in blocks}
    lost = [name for name in origin.where if name not in known]
    if lost:
        raise ValueError(
            f"the setting acts in {', '.join(origin.where)}, and there is no {', '.join(lost)} here: give where=... "
            f"({origin.beside(model, depth, TOKRED)})"
        )
    return frozenset(origin.where)


def other_model(method: Method, model: str, depth: int) -> str | None:
    """A warning for a loaded method on another model than it was saved from; None: there is nothing to say."""
    # Weights say themselves what they were learned on, and fit nothing else.
    if method.origin is None or method.loaded is not None or method.origin.on(model, depth):
        return None
    return f"{method!r} may not suit this model: {method.origin.beside(model, depth, TOKRED)}"


def _entries(model: Any) -> list[store.Entry]:
    several = list(model) if isinstance(model, list | tuple) else [model]
    if several and all(isinstance(one, Method) for one in several):
        learned = [one.name for one in several if one.loaded is not None]
        if learned:
            raise TypeError(
                f"{', '.join(map(repr, learned))} was loaded with weights, which belong to a model: give the model "
                "that it acts on"
            )
        return [store.Entry(one, origin=one.origin or Origin(TOKRED)) for one in several]
    from tokred import adapters

    module = adapters.module_of(model)
    if not hasattr(module, "modules"):
        raise TypeError(f"save takes a patched model, a method or a list of methods, got {model!r}")
    return entries_of(module)


def _fetched(repository: str, revision: str | None) -> Path:
    hub = _hub()
    try:
        found = hub.snapshot_download(repository, revision=revision, allow_patterns=[store.SETTINGS, store.WEIGHTS])
    except Exception as error:  # the hub has a dozen kinds, none of which says that a folder was possible
        raise FileNotFoundError(
            f"{repository!r} is no folder here, and cannot be had from the hub: {type(error).__name__}: {error}"
        ) from error
    return Path(found)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError("repositories of the hub need huggingface_hub: pip install 'tokred[hub]'") from error


def _card(repository: str, entries: Sequence[store.Entry]) -> str:
    """The page of a repository: what is in it, and the line that uses it."""
    said = "\n".join(f"- `{one.method!r}`" for one in entries)
    models = sorted({one.origin.model for one in entries if one.origin is not None and one.origin.model})
    made = f"Saved from {', '.join(f'`{m}`' for m in models)}.\n\n" if models else ""
    tags = "".join(f"- {one.method.name}\n" for one in entries)
    return (
        f"---\nlibrary_name: tokred\ntags:\n- token-reduction\n{tags}---\n\n# {repository.partition('/')[2]}\n\n"
        f"A setting of tokred {TOKRED}:\n\n{said}\n\n{made}"
        f'```python\nimport tokred\n\ntokred.apply(model, tokred.load("{repository}"))\n```\n'
    )
