"""What diffusers and accelerate hang on a denoiser, before and after a patch: caches, offloading, casting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.diffusion.tiny import MODELS, inputs, run
from tests.kinds import WRAPPED, each
from tokred import adapters

hooks = pytest.importorskip("diffusers.hooks")
CPU = torch.device("cpu")
TIMES = (900, 700, 500, 300)


def cache(name: str, **settings: Any) -> Callable[[nn.Module], None]:
    config = getattr(hooks, f"{name}Config", None)

    def hang(model: Any) -> None:
        if config is None or not hasattr(model, "enable_cache"):
            pytest.skip(f"no {name} here")
        model.enable_cache(config(**settings))

    return hang


def group_offload(kind: str) -> Callable[[nn.Module], None]:
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def hang(model: nn.Module) -> None:
        hooks.apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **more)

    return hang


def casting(model: nn.Module) -> None:
    hooks.apply_layerwise_casting(model, storage_dtype=torch.float32, compute_dtype=torch.float32)


def offload(model: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=CPU)


def offload_with_hook(model: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload_with_hook(model, execution_device="cpu")


def dispatch(model: nn.Module) -> None:
    """As a map of devices does it: hooks on the modules that are named, attentions among them."""
    big = pytest.importorskip("accelerate.big_modeling")
    names = [name for part in adapters.find(model, "attention").parts for name, *_ in part.sublayers]
    big.attach_align_device_hook_on_blocks(model, execution_device=dict.fromkeys([*names, ""], "cpu"))


# Those that give what the model gives, and those that leave out some of the work.
NEUTRAL: dict[str, Callable[[nn.Module], None]] = {
    "group offload of leaves": group_offload("leaf_level"),
    "group offload of blocks": group_offload("block_level"),
    "casting": casting,
    "offload": offload,
    "offload with a hook": offload_with_hook,
    "map of devices": dispatch,
    "first block, never": cache("FirstBlockCache", threshold=-1.0),
}
CACHES: dict[str, Callable[[nn.Module], None]] = {
    "first block": cache("FirstBlockCache", threshold=0.05),
    "first block, always": cache("FirstBlockCache", threshold=1e9),
    "pyramid": cache("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2,
                     cross_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
                     current_timestep_callback=lambda: 500),
    "taylor": cache("TaylorSeerCache", cache_interval=2, disable_cache_before_step=1, max_order=1),
    "taylor, lite": cache("TaylorSeerCache", cache_interval=2, disable_cache_before_step=1, max_order=1,
                          use_lite_mode=True),
    "magnitude": cache("MagCache", num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4, threshold=0.5),
    "faster": cache("FasterCache", current_timestep_callback=lambda: 500, spatial_attention_block_skip_range=2,
                    tensor_format="BFCHW", attention_weight_callback=lambda _: 0.5),
}  # fmt: skip
ALL = {**NEUTRAL, **CACHES}
KINDS = ("sd15", "flux", "wan")
# A block as a whole, keys alone, every head by itself.
METHODS: dict[str, dict[str, Any]] = {
    "tomesd": {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True, "use_rand": False},
    "todo": {"factors": (2, 2)},
    "asymrnr": {"q": 0.5, "kv": 0.5, "refresh": 2, "first_full": 0},
}


def image(model: Any, kind: str) -> list[Tensor]:
    """The predictions of some steps, each on another sample."""
    out = []
    for number, time in enumerate(TIMES):
        given = inputs(kind, seed=number)
        t = given["timestep"]
        given["timestep"] = torch.full_like(t, time / 1000 if kind == "flux" else time) if torch.is_tensor(t) else time
        with model.cache_context("image") if hasattr(model, "cache_context") else contextlib.nullcontext():
            out.append(run(model, given))
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def made(kind: str, *steps: Callable[[Any], Any]) -> Any:
    model = MODELS[kind]()
    for step in steps:
        step(model)
    return model


def patch(name: str, **settings: Any) -> Callable[[Any], Any]:
    return lambda model: tokred.apply(model, name, **(settings or METHODS[name]))


# What each runs on: caches are for transformers, and one of them does not run on some as they are.
PAIRS = [(kind, name) for name in NEUTRAL for kind in KINDS if kind != "sd15" or "first" not in name]
CACHED = [(kind, name) for name in CACHES for kind in ("cogvideox", "flux", "wan") if name != "faster"]
CACHED += [("hunyuan", "first block"), ("hunyuan", "pyramid"), ("cogvideox", "faster")]
PAIRS += CACHED
OTHERS = [("flux", name) for name in ("group offload of blocks", *CACHES) if name != "faster"]


@pytest.mark.parametrize(("kind", "name"), each(PAIRS, WRAPPED))
def test_nothing_to_reduce(kind: str, name: str):
    wrap, idle = ALL[name], patch("tomesd", ratio=0.0)
    expected = image(made(kind, wrap), kind)
    assert same(image(made(kind, idle, wrap), kind), expected)
    # Hooks that hold a module's forward are entered from inside by the exchange of classes.
    assert same(image(made(kind, wrap, idle), kind), expected)


@pytest.mark.parametrize(
    ("kind", "name", "method"),
    each(
        [(*pair, "tomesd") for pair in PAIRS] + [(*pair, method) for pair in OTHERS for method in ("todo", "asymrnr")],
        WRAPPED,
    ),
)
def test_both_orders(kind: str, name: str, method: str):
    wrap, reduce = ALL[name], patch(method)
    model = made(kind, reduce, wrap)
    out = image(model, kind)
    if name in NEUTRAL:
        alone = made(kind, reduce)
        assert same(out, image(alone, kind))
        assert tokred.report(model).sublayers == tokred.report(alone).sublayers
        assert tokred.report(model).reduced > 0
    else:
        assert not same(out, image(made(kind, wrap), kind))
    # Hooks that hold a module's forward are entered from inside by the exchange of classes.
    model = made(kind, wrap, reduce)
    assert same(image(model, kind), out)
    assert same(image(made(kind, reduce, wrap, reduce), kind), out), "applied once more: reduced once"


@pytest.mark.parametrize(("kind", "name"), each(PAIRS, WRAPPED))
def test_removed_in_the_middle(kind: str, name: str):
    """With hooks that still hold the forward of the patch: what the hooks give on the model as it was."""
    wrap, reduce = ALL[name], patch("tomesd")
    expected = image(made(kind, wrap), kind)
    assert same(image(made(kind, reduce, wrap, tokred.remove), kind), expected)
    assert same(image(made(kind, wrap, reduce, tokred.remove), kind), expected)


@pytest.mark.parametrize(("kind", "name"), each([*CACHED, ("flux", "first block, never")], WRAPPED))
def test_caches_taken_off_in_the_middle(kind: str, name: str):
    wrap, reduce = ALL[name], patch("tomesd")
    expected = image(made(kind, reduce), kind)

    def disable(model: Any) -> None:
        model.disable_cache()

    assert same(image(made(kind, reduce, wrap, disable), kind), expected)
    assert same(image(made(kind, wrap, reduce, disable), kind), expected)
    assert same(image(made(kind, reduce, wrap, disable, tokred.remove), kind), image(MODELS[kind](), kind))
    assert same(image(made(kind, reduce, wrap, tokred.remove, disable), kind), image(MODELS[kind](), kind))


def test_caches_of_attention_inside_of_whole_blocks():
    """Steps whose plans leave other numbers of tokens: what the cache repeats has full length."""
    model = made("flux", patch("sdtm", ratio=0.5, max_downsample=8), CACHES["pyramid"])
    assert all(out.isfinite().all() for out in image(model, "flux"))


@pytest.mark.parametrize("kind", ["flux", "hunyuan"])
def test_what_is_known_of_a_block_is_known_of_the_patched_one(kind: str):
    from diffusers.hooks._helpers import TransformerBlockRegistry as Registry

    model = MODELS[kind]()
    block = model.single_transformer_blocks[0]
    host, before = type(block), Registry.get(type(block))
    cls = before._cls
    tokred.apply(model, "tomesd")
    found = Registry.get(type(block))
    assert type(block) is not host
    # Whatever the installed version notes: younger ones name the arguments, too.
    known = {name: value for name, value in vars(before).items() if not name.startswith("_")}
    assert {"return_hidden_states_index", "return_encoder_hidden_states_index"} <= set(known)
    assert {name: vars(found)[name] for name in known} == known
    assert Registry.get(host) is before
    assert before._cls is cls
    # By place, too, where the names are those of the host's forward.
    given = [torch.zeros(1), torch.ones(1)]
    assert found._get_parameter_from_args_kwargs("encoder_hidden_states", given) is given[1]
