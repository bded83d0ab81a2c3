"""Marked parts about caches: tables, and what is claimed of them, each a function of the results."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import Record, Results, Value, between, code, percent, ranked, table, value
from tokred.bench import results

SHARES = ("0.5", "0.25", "0.125", "0.05")


def _policies(found: Results, metric: str, **fields: Any) -> dict[str, dict[str, Record]]:
    """By policy and share of the cache; the full cache under ``"1"``."""
    out: dict[str, dict[str, Record]] = {}
    for r in found.records("kv", "quality", **fields):
        if metric in r:
            share = r["setting"].removeprefix("budget=") or "1"
            out.setdefault(r["method"], {})[share] = r
    order = [r["method"] for r in found.records("kv", "quality", length=4096, batch=1) if "perplexity" in r]
    return {name: out[name] for name in dict.fromkeys(order) if name in out}


def name(method: str) -> str:
    """A policy, or the full cache."""
    return "the full cache" if method == "unpatched" else f"`{method}`"


def kv_perplexity(found: Results) -> str:
    """Perplexity by share of the cache."""
    plain = _policies(found, "perplexity", length=4096, batch=1)
    padded = _policies(found, "perplexity", length=4096, batch=3)

    def cell(row: Record | None) -> str:
        return f"{row['perplexity']:.2f}" if row else ""

    lines = []
    for policy, by in plain.items():
        full = policy == "unpatched"
        cells = [cell(by.get("1" if full and s == "0.5" else s)) for s in SHARES]
        lines.append([name(policy), *cells, cell(padded.get(policy, {}).get("1" if full else "0.25"))])
    return table(["policy", "50 %", "25 %", "12.5 %", "5 %", "25 %, padded"], lines, 1)


def kv_perplexity_claims(found: Results) -> str:
    """Lowest by value, which without intervals is no claim; and whom a random choice beats."""
    plain = _policies(found, "perplexity", length=4096, batch=1)
    lines = []
    for share, text in zip(SHARES, ("a half", "a quarter", "an eighth", "a twentieth"), strict=True):
        rows = {n: by[share] for n, by in plain.items() if share in by}
        order = sorted(rows, key=lambda n: rows[n]["perplexity"])
        first, second = (f"`{n}` ({rows[n]['perplexity']:.2f})" for n in order[:2])
        random = rows["random_evict"]["perplexity"]
        beaten = [n for n in order if rows[n]["perplexity"] > random]
        known = all(f"perplexity{end}" in r for r in rows.values() for end in ("_low", "_high"))
        said = f"At {text}, {first} has the lowest figure, then {second}"
        if known:
            values = {n: value(r, "perplexity") for n, r in rows.items()}
            said += f"; level with the first: {code(ranked(values, higher=False)[1])}"
        else:
            said += ", of rows without an interval: no order of near ones can be claimed"
        lines.append(
            f"- {said}. `random_evict` ({random:.2f}) is below {len(beaten)} of {len(rows) - 1}: {code(beaten)}."
        )
    full = plain["unpatched"]["1"]["perplexity"]
    over = [f"{percent(plain['kvzip'][s]['perplexity'] / full - 1)} % at {s}" for s in ("0.25", "0.125")]
    lines.append(f"- `kvzip` has a perplexity above the full cache's by {' and '.join(over)}, without an interval too.")
    trials = sorted({r["loss"] for r in found.records("kv", "search")})
    mine = "score=reconstruction budget=all-share fate=merge share=0.25"
    rank = trials.index(results.one(found.records("kv", "search"), setting=mine)["loss"]) + 1
    lines.append(f"- By the loss of the search itself the composition of `composed` is number {rank} of {len(trials)}.")
    return "\n".join(lines)


def kv_keys(found: Results) -> str:
    """Keys found, asked after and before."""
    lengths = ((1024, 1), (2048, 1), (4096, 1), (2048, 4))
    found_keys = {
        (n, b, asked): _policies(found, "retrieval", length=n, batch=b, asked=asked)
        for n, b in lengths
        for asked in ("after", "before")
    }
    columns = [(n, 1, s) for n in (1024, 2048, 4096) for s in SHARES[:3]] + [(2048, 4, "0.25")]
    lines = []
    for policy in _policies(found, "perplexity", length=4096, batch=1):
        if policy == "unpatched":
            continue
        cells = []
        for n, b, share in columns:
            pair = [found_keys[n, b, asked].get(policy, {}).get(share) for asked in ("after", "before")]
            cells.append(" / ".join("" if r is None else f"{100 * r['retrieval']:.0f}" for r in pair))
        lines.append([f"`{policy}`", *cells])
    header = ["policy", "1,024 tokens: 50 %", "25 %", "12.5 %", "2,048: 50 %", "25 %", "12.5 %", "4,096: 50 %"]
    return table([*header, "25 %", "12.5 %", "2,048 padded: 25 %"], lines, 1)


def kv_keys_claims(found: Results) -> str:
    """All lengths together at a quarter, asked after."""
    counts: dict[str, list[int]] = {}
    for r in found.records("kv", "quality", batch=1, asked="after"):
        if "retrieval" in r and r["setting"] in ("", "budget=0.25"):
            mine = counts.setdefault(r["method"], [0, 0])
            mine[0] += round(r["retrieval"] * r["retrieval_count"])
            mine[1] += r["retrieval_count"]
    full = counts.pop("unpatched")
    values = {n: Value(right / count, *results.wilson(right / count, count)) for n, (right, count) in counts.items()}
    best, level = ranked(values)
    text = (
        f"- Asked after, at a quarter of the cache and all lengths together, `{best}` finds {counts[best][0]} of "
        f"{counts[best][1]} and the full cache {full[0]}; level with `{best}` by the 95 % intervals: "
    )
    text += ", ".join(f"`{n}` ({counts[n][0]})" for n in level) or "none"
    rest = [n for n in values if n != best and n not in level]
    most = max(rest, key=lambda n: counts[n][0])
    text += f". Of all others none finds more than {counts[most][0]} (`{most}`); "
    text += f"`random_evict` finds {counts['random_evict'][0]}."
    whole = {r["length"]: r for r in found.records("kv", "quality", batch=1, asked="after", method="unpatched")}
    shares = ", ".join(f"{percent(r['retrieval'], digits=0)} % at {n:,}" for n, r in sorted(whole.items()))
    goal = [f"`{n}` {percent(right / full[0], digits=0)} %" for n, (right, _) in counts.items() if n in (best, *level)]
    return f"{text}\n- By length the full cache finds {shares}. Of what it finds: {', '.join(goal)}."


def kv_gemma3(found: Results) -> str:
    """A model with windows: perplexity, keys and bytes of each arm."""
    arms: dict[tuple[str, str], dict[str, Record]] = {}
    for r in found.records("kv", "quality-gemma3-270m", batch=1):
        by = arms.setdefault((r["method"], r["setting"]), {})
        by |= {m: r for m in ("perplexity", "bytes_window") if m in r}
        if "retrieval" in r:
            by[f"retrieval {r['asked']}"] = r
    if not arms:
        return "Not measured yet."
    full = arms["unpatched", ""]["bytes_window"]["bytes_window"]
    lines = []
    for (method, setting), by in arms.items():
        keys = [by.get(f"retrieval {asked}") for asked in ("after", "before")]
        cells = [
            "" if r is None else f"{round(r['retrieval'] * r['retrieval_count'])} of {r['retrieval_count']}"
            for r in keys
        ]
        called = " ".join([name(method), *(f"`{part}`" for part in setting.split())])
        share = percent(by["bytes_window"]["bytes_window"] / full, digits=0)
        lines.append([called, between(by["perplexity"], "perplexity"), *cells, f"{share} %"])
    return table(["rows", "perplexity (95 % interval)", "keys, asked after", "before", "bytes of all layers"], lines, 1)


def kv_speed(found: Results) -> str:
    """Time and bytes at a quarter."""
    every = [_policies(found, "prefill_s", length=2048, batch=b) for b in (1, 4)]
    lines = []
    for policy in every[0]:
        cells = [name(policy)]
        for by in every:
            r = by[policy]["1" if policy == "unpatched" else "0.25"]
            cells += [f"{r['prefill_s']:.1f}", f"{r['decode_tokens_per_s']:.1f}", f"{r['bytes_timed'] / 1e6:.1f}"]
        lines.append(cells)
    header = ["policy at 25 %", "prompt, s", "tokens/s", "MB", "batch of 4, padded: prompt, s", "tokens/s"]
    return table([*header, "MB a sample"], lines, 1)


def kv_scoring(found: Results) -> str:
    """What a policy costs at the end of a prompt."""
    lines = []
    for r in found.records("kv", "scoring"):
        more = r["setting"].replace("budget=0.25", "").strip()
        cells = [f"`{r['method']} {more}`" if more else f"`{r['method']}`", f"{r['score_ms']:.1f}"]
        lines.append([*cells, f"{r['policy_ms']:.1f}", f"{percent(r['policy_share'], digits=2)} %"])
    return table(["policy", "score, ms", "all, ms", "share of the prompt"], lines, 1)


def kv_decode(found: Results) -> str:
    """A token over a cache that was cut."""
    rows = found.records("kv", "decode")
    named = {"smollm2-135m": "SmolLM2-135M", "llama-3.2-1b": "Llama 3.2 1B, four layers"}
    lines = []
    for model, count in dict.fromkeys((r["model"], r["rows"]) for r in rows):
        mine = [results.one(rows, model=model, rows=count, method=m) for m in ("even", "flat", "rectangle")]
        lines.append([named[model], f"{count:,}", *(between(r, "ratio") for r in mine)])
    return table(["shapes", "rows", "even", "flat", "rectangle"], lines, 1)


def kvpress(found: Results) -> str:
    """Scores, rows, bytes and times beside kvpress's, and the rows that differ."""
    lines = []
    for r in found.records("kv", "kvpress"):
        more = r["setting"].replace("budget=0.25", "").strip()
        cells = [f"`{r['method']} {more}`" if more else f"`{r['method']}`"]
        cells += [f"{r['max_abs_difference']:.2g}", f"{r['largest']:.2g}"]
        cells += [f"{r['rows_differ']} of {r['rows_differ_count']:,}" if "rows_differ" in r else ""]
        cells += [f"{r['kvpress_bytes'] / 1e6:.1f}", f"{r['bytes'] / 1e6:.1f}"]
        lines.append([*cells, f"{r['kvpress_ms']:.3g}", f"{r['score_ms']:.3g}"])
    header = ["policy", "largest difference of scores", "largest score", "rows that differ", "MB kvpress", "MB tokred"]
    return table([*header, "ms kvpress", "ms tokred"], lines, 1)


def kv_scoring_claims(found: Results) -> str:
    """Which scores of a window take at most 1 % of the prompt, and which policies more than a tenth."""
    shares = {f"{r['method']} {r['setting'].replace('budget=0.25', '').strip()}".strip(): r["policy_share"]
              for r in found.records("kv", "scoring")}  # fmt: skip
    goal = [
        f"{'met' if shares[n] <= 0.01 else 'missed'} by `{n}` ({percent(shares[n], digits=2)} %)"
        for n in ("snapkv window=32", "snapkv")
    ]
    much = [f"`{n}` ({percent(share, digits=0)} %)" for n, share in shares.items() if share > 0.1]
    return (
        f"- The aim was 1 % for scores of SnapKV's kind: {', '.join(goal)}.\n"
        f"- More than a tenth of the prompt's time again: {', '.join(much)}. They want the attention of all queries, "
        "which is computed without its N x N matrix."
    )


def kv_decode_claims(found: Results) -> str:
    """Where a token over a cut cache takes longer than over a dense one of as many rows, by the quartiles."""
    lines = []
    for method, text in (("even", "As many rows in every head"), ("flat", "Flat"), ("rectangle", "A rectangle")):
        rows = found.records("kv", "decode", method=method)
        slow = [f"{r['rows']:,} rows of {r['model']} ({between(r, 'ratio')})" for r in rows if r["ratio_low"] > 1]
        lines.append(f"- {text}: slower than a dense cache, by its quartiles, at {', '.join(slow) or 'no length'}.")
    return "\n".join(lines)


def kv_memory(found: Results) -> str:
    """How memory of scoring and compressing grows, and who takes most beside the layer's keys and values."""
    rows = found.records("kv", "memory")
    lengths = sorted({r["tokens"] for r in rows})
    extra = {(r["method"], r["tokens"]): r for r in rows}
    last, before = lengths[-1], lengths[-2]
    names = [r["method"] for r in rows if r["tokens"] == last]
    grows = {n: extra[n, last]["extra_bytes"] / extra[n, before]["extra_bytes"] for n in names}
    most = max(grows, key=lambda n: grows[n])
    matrix = max(r["matrix_bytes"] for r in rows) / 2**30
    share = {n: extra[n, last]["extra_bytes"] / extra[n, last]["dense_bytes"] for n in names}
    whole = [f"`{n}` ({share[n]:.1f})" for n in sorted(names, key=lambda n: -share[n]) if share[n] > 1]
    less = sum(x <= 0.6 for x in share.values())
    return (
        f"From {before:,} to {last:,} tokens it grows by a factor of {grows[most]:.2f} at most (`{most}`), not with "
        f"the square of the length; the attention of all queries to all keys would take {matrix:.0f} GiB. {less} of "
        f"{len(names)} policies need at most 0.6 of what the layer's keys and values take; more than all of it need "
        f"{', '.join(whole) or 'none'}."
    )


def kv_limit(found: Results) -> str:
    """What a policy held under a limit, beside a full cache."""
    rows = found.records("kv", "limit", model="smollm2-135m")
    rows = [r for r in rows if "most_bytes" in r]
    most, full = (max(r[n] for r in rows) / 2**20 for n in ("most_bytes", "dense_bytes"))
    limit = int(rows[0]["setting"].split("limit=")[1].split()[0]) / 2**20
    tokens = max(r["tokens"] for r in rows)
    return (
        f"On the left of the picture below SmolLM2-135M with `{rows[0]['method']}` holds {most:.0f} MiB at most under "
        f"a limit of {limit:.0f}, through {tokens:,} tokens, for which a full cache takes {full / 1024:.1f} GiB."
    )


def kv_long(found: Results) -> str:
    """Perplexity of stretches of a text that is longer than the model was made for."""
    by: dict[int, dict[str, Record]] = {}
    for r in found.records("kv", "long"):
        by.setdefault(int(r["tokens"]), {})[f"{r['method']} {r['setting']}".strip()] = r
    if not by:
        return "Not measured yet."
    names = list(dict.fromkeys(one for rows in by.values() for one in rows))
    lines = [
        [f"{end:,}", *(between(rows[one], "perplexity") if one in rows else "" for one in names)]
        for end, rows in sorted(by.items())
    ]
    return table(["up to token", *(name(one) for one in names)], lines, 1)
