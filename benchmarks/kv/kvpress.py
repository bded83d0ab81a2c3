"""tokred's cache scores against NVIDIA/kvpress, on the same tensors in the same process.

kvpress 0.5.5 needs transformers below 5.3, which tokred's adapter for caches does not run on. Its scores do: they need
torch alone. So this script has an environment of its own:

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5
    python -m benchmarks.zoo.fetch smollm2 handbook          # in the usual environment, which converts the weights
    kvpress-env/bin/python -m benchmarks kv/kvpress --threads 1 --out benchmarks/results/kv.csv --overwrite

A press is called as its own hook calls it after the attention of a layer: it gets hidden states, keys and values, and
makes queries anew from the hidden states. tokred gets what the attention has had: queries, keys, values. Both act on
the tensors of SmolLM2-135M reading the Debian handbook (of a random model with its heads, where the weights are
missing).

Metrics: ``max_abs_difference`` of the scores, in float32, and ``largest``, the largest of them; ``rows_differ``, rows
of all heads that one keeps and the other does not; ``score_ms`` and ``kvpress_ms``, of calls that score one layer,
alternating; ``bytes`` and ``kvpress_bytes``, which the caches of all layers really hold after the prompt, positions (4
bytes a row) among tokred's. Where the two differ by design, a note is printed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.kv import feed
from benchmarks.kv.presses import SINKS, Layer, Pair, pairs
from benchmarks.saving import save, saving
from tokred import kv
from tokred.adapters.kv.layer import TokLayer
from tokred.bench import results, timing
from tokred.bench.metrics import METRICS
from tokred.kv.repeat import Piece, Probe, Repeats


class _Row(TokLayer):
    """tokred's layer, under the older transformers."""

    def get_max_cache_shape(self) -> int:
        """What newer ones call ``get_max_length``."""
        return self.get_max_length()


# ---------------------------------------------------------------------------------------------- what they are given


def load(which: str) -> tuple[Any, Any, str]:
    """Model and ids of a text, or a random model and random ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.zoo import data, smollm2

    if which != "random":
        try:
            model, tokenizer = smollm2.load()
            ids = tokenizer(data.handbook()[:60_000], return_tensors="pt").input_ids
            return model, ids, "SmolLM2-135M, Debian handbook"
        except Exception as error:  # weights or text are missing; another transformers may also name it otherwise
            if which == "smollm2":
                raise
            print(f"no SmolLM2 ({type(error).__name__}: {error}); a random model instead")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=256, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(3, 1000, (1, 8192)), "random model, random tokens"


def record(model: Any, ids: Tensor, chosen: list[int]) -> list[Layer]:
    """What the attention of the chosen layers has in a forward over ``ids``."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found: list[Layer] = []
    depth = model.config.num_hidden_layers

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        x, tables = kwargs["hidden_states"], kwargs["position_embeddings"]
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, module.head_dim).transpose(1, 2) for f in
                   (module.q_proj, module.k_proj, module.v_proj))  # fmt: skip
        q, k = apply_rotary_pos_emb(q, k, *tables)
        module.rotary_emb = model.model.rotary_emb
        found.append(Layer(module, x, q, k, v.contiguous(), tables, module.layer_idx, depth))

    attentions = [model.model.layers[i].self_attn for i in chosen]
    handles = [a.register_forward_pre_hook(hook, with_kwargs=True) for a in attentions]
    model.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


# ---------------------------------------------------------------------------------------------- what is compared


def kept_by_press(name: str, press: Any, layer: Layer, score: Tensor) -> Tensor:
    """``[1, Hk, N]`` bool: rows that survive."""
    kept = torch.zeros(layer.k.shape[:3], dtype=torch.bool)
    n = layer.k.shape[2]
    if name == "adakv":
        press.compress(layer.module, layer.hidden, layer.k, layer.v, None, {"position_embeddings": layer.tables})
        _, heads, rows = layer.module.masked_key_indices
        layer.module.masked_key_indices = None
        kept[:] = True
        kept[0, heads, rows] = False
        return kept
    count = max(1, int(n * (1 - press.compression_ratio)))
    count = press.get_layer_budget(layer.module, n) if name == "pyramidkv" else count
    return kept.scatter(-1, score.topk(count, dim=-1).indices, True)


def kept_by_policy(policy: Any, layer: Layer) -> Tensor:
    """The same of tokred."""
    step = policy.reduce(layer.site())
    kept = torch.zeros(layer.k.shape[:3], dtype=torch.bool)
    if step.mask is None:
        return kept.scatter(-1, step.representative, True)
    return kept.scatter_reduce(-1, step.representative, step.mask, "amax", include_self=True)


def time_both(theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of each, called in turn."""
    first, second = timing.compared([lambda _: theirs(), lambda _: ours()], rounds)
    found = results.spread("kvpress_ms", [1e3 * s for s in first])
    return found | results.spread("score_ms", [1e3 * s for s in second])


def bytes_of_press(press: Any, model: Any, ids: Tensor, eager: bool) -> int:
    """Keys and values of all layers after a prompt under a press."""
    from transformers import DynamicCache

    cache = DynamicCache()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else "sdpa")
    with press(model):
        model.model(ids, past_key_values=cache)
    model.set_attn_implementation(before)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values))


def bytes_of_policy(policy: Any, layers: list[Layer]) -> int:
    """All that tokred's layers hold after the same prompt."""
    return sum(row.nbytes for row in feed.compressed(policy, [layer.site() for layer in layers], _Row))


def compare(name: str, pair: Pair, layers: list[Layer], budget: float, rounds: int) -> dict[str, Any]:
    """Scores, kept rows and times, of the chosen layers."""
    press = pair.press(1 - budget)
    worst = largest = 0.0
    differ = total = 0
    for layer in layers:
        theirs, ours = pair.theirs(layer, press).float(), pair.ours(layer, pair.policy).float()
        same = torch.ones_like(theirs, dtype=torch.bool) if pair.compare is None else pair.compare(theirs, ours)
        if same.any():
            worst = max(worst, float((theirs - ours)[same].abs().max()))
            largest = max(largest, float(theirs[same].abs().max()))
        a, b = kept_by_press(name, press, layer, theirs), kept_by_policy(pair.policy, layer)
        differ, total = differ + int((a != b).sum()), total + int(a.sum())
    middle = layers[len(layers) // 2]
    row: dict[str, Any] = {"method": name, "setting": typed(pair.policy, budget), "tokens": layers[0].k.shape[2]}
    row |= {"max_abs_difference": worst, "largest": largest, "rows_differ": differ, "rows_kept": total}
    row |= time_both(lambda: pair.theirs(middle, press), lambda: pair.ours(middle, pair.policy), rounds)
    return row | {"rounds": rounds}


def typed(policy: Any, budget: float) -> str:
    """The setting of a policy, as it is typed."""
    crossed = getattr(policy, "cross_scoring", False)
    return f"budget={budget:g}{' cross_scoring=True' * crossed}"


def compare_kvzip(model: Any, ids: Tensor, n: int, chosen: list[int], rounds: int) -> dict[str, Any]:
    """The context's first piece is fed again: the maximum of its attention on that piece."""
    import kvpress as p

    chunk = n // 2
    press = p.KVzipPress(0.5, n_sink=SINKS)
    press.context_length, press.start_idx, press.end_idx = n, SINKS, SINKS + chunk
    layers = record(model, torch.cat([ids[:, :n], ids[:, SINKS : SINKS + chunk]], 1), chosen)
    config = model.config
    press.score_val = torch.zeros(config.num_hidden_layers, 1, config.num_key_value_heads, n)
    piece = Piece((torch.arange(SINKS, SINKS + chunk),), (torch.arange(0),), ())

    def theirs(layer: Layer) -> Tensor:
        cos, sin = layer.tables
        tables = {"position_embeddings": (cos[:, n:], sin[:, n:])}
        press.score_kvzip(layer.module, layer.hidden[:, n:], layer.k, layer.v, None, tables)
        return press.score_val[layer.index][..., SINKS : SINKS + chunk]  # type: ignore[no-any-return]

    def ours(layer: Layer) -> Tensor:
        probe = Probe(Repeats(chunk, SINKS), n)
        probe.piece = piece
        probe.see(layer._replace(q=layer.q[:, :, n:]).site())
        return probe.best[layer.index][..., SINKS : SINKS + chunk]

    worst = max(float((theirs(x) - ours(x)).abs().max()) for x in layers)
    largest = max(float(ours(x).max()) for x in layers)
    middle = layers[len(layers) // 2]
    row: dict[str, Any] = {"method": "kvzip", "tokens": n, "max_abs_difference": worst, "largest": largest}
    return row | time_both(lambda: theirs(middle), lambda: ours(middle), rounds) | {"rounds": rounds}


def compare_pyramids(depth: int) -> tuple[int, int]:
    """Rows by layer that differ, and how many were compared."""
    import kvpress as p
    from transformers import LlamaConfig

    differ = total = 0
    module = torch.nn.Module()
    module.config = LlamaConfig(num_hidden_layers=depth)
    for n, budget in itertools.product((96, 500, 2048, 4096), (0.5, 0.25, 0.125, 0.05)):
        for window, beta in ((8, 20), (64, 20), (32, 4)):
            press = p.PyramidKVPress(1 - budget, window_size=window, beta=beta)
            for layer in range(depth):
                module.layer_idx = layer
                rows = kv.Pyramid(budget, beta, window).share(n, None, layer, depth)
                differ += rows != press.get_layer_budget(module, n)
                total += 1
    return differ, total


@torch.inference_mode()
def measure(which: str, n: int, budget: float, rounds: int, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """Records, one a pair."""
    model, ids, what = load(which)
    ids = ids[:, :n]
    depth = model.config.num_hidden_layers
    chosen = sorted({0, depth // 3, 2 * depth // 3, depth - 1})
    every = record(model, ids, list(range(depth)))
    layers = [every[i] for i in chosen]
    print(f"{what}, {ids.shape[1]} tokens, layers {chosen} of {depth}", flush=True)
    where = {"model": "smollm2-135m" if "SmolLM2" in what else "random", **results.here("cpu", torch.float32)}
    for name, pair in pairs(budget).items():
        name = name.partition(" ")[0]
        if wanted is not None and name not in wanted:
            continue
        row = compare(name, pair, layers, budget, rounds) | where
        eager = name == "observed_attention"
        row["kvpress_bytes"] = bytes_of_press(pair.press(1 - budget), model, ids, eager=eager)
        row["bytes"] = bytes_of_policy(pair.policy, every)
        print(f"{name}: {pair.note}" if pair.note else name, flush=True)
        yield row
    if wanted is None or "kvzip" in wanted:
        row = compare_kvzip(model, ids, ids.shape[1], chosen, rounds) | where | {"setting": f"budget={budget:g}"}
        row["kvpress_bytes"] = sum(t.nbytes for layer in every for t in (layer.k, layer.v))
        row["bytes"] = bytes_of_policy(tokred.make("kvzip", budget=budget), every)
        print("kvzip: half of the context is repeated; the press masks what it evicts, so its cache stays dense")
        yield row
    for depth in (1, 4, 30):
        print("pyramid of {} layers: {} of {} budgets differ".format(depth, *compare_pyramids(depth)))
    print("(a model of one layer: the press gives it the top of the slope, nearly twice the budget; tokred the budget)")


def main() -> None:
    """Compare, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("auto", "smollm2", "random"), default="auto")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policies", help="names, with commas")
    parser.add_argument("--threads", type=int, help="threads of torch")
    saving(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = arguments.policies.split(",") if arguments.policies else None
    for row in measure(arguments.model, arguments.tokens, arguments.budget, arguments.rounds, wanted):
        print(*(f"{k}={row[k]:.4g}" for k in METRICS if k in row), flush=True)
        save([row], "kvpress", arguments)


if __name__ == "__main__":
    main()
