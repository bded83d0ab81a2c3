"""lmms-eval's models with methods on them: against a stand-in of its registry, and against itself where it is there."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.vlm.tiny import llava, prompts

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Manifest:
    """As in lmms-eval's registry."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Chat:
    """As lmms-eval's chat classes: loads by name, and takes no argument that it does not know."""

    is_simple = False
    loaded: ClassVar[list[str]] = []

    def __init__(self, pretrained: str = "", batch_size: int = 1, **kwargs: Any) -> None:
        assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
        self.loaded.append(pretrained)
        self._model = llava()
        self.batch = batch_size

    @property
    def model(self) -> Any:
        return self._model


@pytest.fixture
def lmms(monkeypatch):
    """``tokred.eval.lmms`` beside a package that looks like lmms-eval."""
    names = ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2", "lmms_eval.models.chat",
             "lmms_eval.models.chat.huggingface", "lmms_eval.models.chat.qwen3_vl")  # fmt: skip
    made = {name: ModuleType(name) for name in names}
    kinds = {"huggingface": type("Huggingface", (Chat,), {}), "qwen3_vl": type("Qwen3_VL", (Chat,), {})}
    for name, kind in kinds.items():
        setattr(made[f"lmms_eval.models.chat.{name}"], kind.__name__, kind)
    made["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    made["lmms_eval.models"].get_model_manifest = lambda name: Manifest(
        name, chat_class_path=f"lmms_eval.models.chat.{name}.{kinds[name].__name__}"
    )
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Chat, "loaded", [])
    found = importlib.import_module("tokred.eval.lmms")
    found.patched.cache_clear()
    return found


def resolved(manifest: Any) -> Any:
    """The class of a manifest, found as lmms-eval's registry does."""
    module, name = manifest.chat_class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_the_entry_point_names_a_function_that_gives_manifests(lmms):
    with (ROOT / "pyproject.toml").open("rb") as file:
        (target,) = tomllib.load(file)["project"]["entry-points"]["lmms_eval.models"].values()
    module, _, name = target.partition(":")
    manifests = getattr(importlib.import_module(module), name)()
    ids = [m.model_id for m in manifests]
    assert ids[0] == "tokred"
    assert {"tokred_huggingface", "tokred_qwen3_vl", "tokred_qwen2_5_vl"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert all(m.simple_class_path is None for m in manifests)


def test_a_model_is_patched_once_it_is_loaded(lmms):
    by_id = {m.model_id: m for m in lmms.manifests()}
    for name, base in (("tokred", "Huggingface"), ("tokred_qwen3_vl", "Qwen3_VL")):
        kind = resolved(by_id[name])
        assert issubclass(kind, Chat)
        assert kind.__mro__[1].__name__ == base
        assert kind.is_simple is False
        lm = kind(pretrained="folder", method="divprune budget=0.5 + fastv ratio=0.5 layer=2", batch_size=3)
        assert (Chat.loaded[-1], lm.batch) == ("folder", 3)
        assert [m.name for m in tokred.patched(lm.model)] == ["divprune", "fastv"]
        with torch.inference_mode():
            lm.model(**prompts([[2, "image", 3]]))
        assert [row.visual for row in tokred.report(lm.model).layers] == [(8,), (8,), (4,), (4,)], "of sixteen"
        assert not tokred.patched(kind(pretrained="folder").model), "no method: the dense model"


def test_what_is_wrong_is_said_before_a_model_is_loaded(lmms):
    kind = resolved(lmms.manifests()[0])
    for method, error in (("divprunne budget=0.5", tokred.UnknownMethodError), ("divprune kep=0.5", TypeError)):
        with pytest.raises(error):
            kind(pretrained="folder", method=method)
    assert Chat.loaded == []
    with pytest.raises(AssertionError, match="Unexpected kwargs"):
        kind(pretrained="folder", budget=3)
    with pytest.raises(AttributeError, match="no_such"):
        _ = lmms.no_such


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    module = importlib.import_module("tokred.eval.lmms")
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        module.manifests()


# ------------------------------------------------------------------------------------------ lmms-eval itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with its processor, on disk."""
    from tests.eval import tiny
    from tokred.adapters.tiny.vlm import IMAGE

    place = tmp_path_factory.mktemp("llava")
    tokenizer = tiny.tokenizer()
    fill = IMAGE - len(tokenizer)
    tokenizer.add_tokens([f"v{i}" for i in range(fill)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    # Text without spaces around would melt into the image's token.
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    size = {"shortest_edge": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        chat_template=template, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    llava().save_pretrained(place)
    processor.save_pretrained(place)
    return str(place)


def test_lmms_eval_itself(folder):
    """Its registry takes the manifests, its class loads the model, and its requests are answered from fewer tokens."""
    models = pytest.importorskip("lmms_eval.models")
    from lmms_eval.api.instance import Instance
    from PIL import Image

    from tokred.eval import lmms

    lmms.patched.cache_clear()
    for manifest in lmms.manifests():
        models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    kind = models.get_model("tokred_llava_hf")

    def messages(doc: Any) -> list[dict[str, Any]]:
        picture = Image.new("RGB", (20, 20), tuple(doc["colour"]))
        return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": doc["text"]}]}]

    docs = [{"colour": [40 * i, 200 - 30 * i, 7 * i], "text": f"w{3 * i} w{i + 9}"} for i in range(4)]
    requests = [
        Instance("generate_until", (doc["text"], messages, {"max_new_tokens": 5, "until": []}, i, "colours", "test"), i,
                 metadata={"task": "colours", "doc_id": i, "repeats": 1})
        for i, doc in enumerate(docs)
    ]  # fmt: skip
    said = {}
    for method in ("", "random_visual budget=0.25 seed=1"):
        arguments = f"pretrained={folder},device=cpu,device_map=cpu" + (f",method={method}" if method else "")
        lm = kind.create_from_arg_string(arguments, {"batch_size": 1})
        lm.task_dict = {"colours": {"test": docs}}
        said[method] = [answer.text for answer in lm.generate_until(requests)]
        if method:
            assert [m.name for m in tokred.patched(lm.model)] == ["random_visual"]
            assert {row.visual for row in tokred.report(lm.model).layers} == {(4,)}, "of sixteen"
    first, second = said.values()
    assert all(first), "lmms-eval makes an empty answer of an error"
    assert first != second
    assert len(first) == 4
