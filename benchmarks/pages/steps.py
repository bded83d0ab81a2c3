"""Marked parts about a policy's own time in a step and in a prompt, of ``kv/steps``."""

from __future__ import annotations

from benchmarks.pages.markdown import Record, Results, between, table, value

NOTHING = "Not measured yet."
FEW = 2  # places that are named one by one
PLAIN = ("unpatched", "in-place")
NAMES = {
    "packed": "a token over rows in few bits",
    "evicting": "a token over a cache that lets a row go for each that comes",
    "searched": "a token over a cache that is searched",
    "prompt": "a whole prompt",
}
# Most of the unpatched model's time that an arm was to take, by part and method.
AIMS = {
    **{("packed", name): 1.0 for name in ("kivi", "turbo", "nsnquant", "mustafar", "mikv")},
    ("evicting", "snapkv"): 1.03,
    ("evicting", "streaming_llm"): 1.0,
    ("evicting", "h2o"): 1.0,
    ("searched", "shadowkv"): 0.5,
    ("prompt", "expected_attention"): 1.05,
    ("prompt", "h2o"): 1.4,
}


def _size(record: Record) -> int:
    return int(record.get("rows") or record["tokens"])


def _called(record: Record) -> str:
    """An arm without the budget that says no more than its size."""
    parts = [p for p in record["setting"].split() if not p.startswith(("budget=", "window="))]
    return " ".join([f"`{record['method']}`", *(f"`{p}`" for p in parts)])


def kv_steps(found: Results) -> str:
    """Times over those of the unpatched model, by part, model and size."""
    lines = []
    for r in found.records("kv", "steps"):
        if r["method"] != PLAIN[0]:
            ms = r.get("ms_a_token", r.get("prefill_ms"))
            beside = between(r, "ratio_in_place") if "ratio_in_place" in r else ""
            name = r["method"] if r["method"] in PLAIN else _called(r)
            where = [r["case"], r["model"], r["dtype"]]
            lines.append([*where, name, f"{_size(r):,}", f"{ms:.3g}", between(r, "ratio"), beside])
    if not lines:
        return NOTHING
    return table(["part", "shapes", "type", "arm", "rows or tokens", "ms", "of unpatched", "of in-place"], lines, 4)


def _places(method: str, rows: list[Record]) -> str:
    """Where something was measured, each with its ratio; of many places in one type how many, and between which."""
    texts = []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        some = [r for r in rows if r["dtype"] == dtype]
        if len(some) > FEW:
            ratios = [r["ratio"] for r in some]
            texts.append(f"at {len(some)} sizes in {dtype} ({min(ratios):.2f} to {max(ratios):.2f})")
            continue
        for r in some:
            more = _called(r).removeprefix(f"`{method}`").strip()
            size = f"{_size(r):,} {'rows' if 'rows' in r else 'tokens'} of {r['model']} in {dtype}"
            texts.append(" ".join(x for x in (more, "at", size, f"({between(r, 'ratio')})") if x))
    return ", ".join(texts)


def kv_steps_claims(found: Results) -> str:
    """Each aim, and by the quartiles where it was met."""
    lines = []
    for (case, method), most in AIMS.items():
        rows = found.records("kv", "steps", case=case, method=method)
        if not rows:
            continue
        said: dict[str, list[Record]] = {"met": [], "not told apart": [], "missed": []}
        for r in rows:
            v = value(r, "ratio")
            high, low = (v.value if end is None else end for end in (v.high, v.low))
            said["met" if high <= most else "missed" if low > most else "not told apart"].append(r)
        text = "; ".join(f"{verdict} {_places(method, some)}" for verdict, some in said.items() if some)
        lines.append(f"- {NAMES[case]}, `{method}`, at most {most:g} times the unpatched model's time: {text}.")
    return "\n".join(lines) or NOTHING


def kv_stores(found: Results) -> str:
    """One token's attention over a layer's rows in each format, over that over dense rows."""
    lines = []
    for r in found.records("kv", "stores", dtype="float32"):
        name = f"dense, {r['setting'].partition('=')[2]}" if r["method"] == "dense" else _called(r)
        size = f"{r['bytes'] / 2**20:.1f}"
        beside = between(r, "ratio_bfloat16")
        lines.append([r["model"], f"{_size(r):,}", name, size, f"{r['ms_a_token']:.3g}", between(r, "ratio"), beside])
    if not lines:
        return NOTHING
    return table(["shapes", "rows", "arm", "MiB", "ms", "of float32", "of bfloat16"], lines, 3)


def kv_stores_claims(found: Results) -> str:
    """Which formats are faster than dense rows in either type, by the quartiles."""
    rows = [r for r in found.records("kv", "stores", dtype="float32") if r["method"] != "dense"]
    if not rows:
        return NOTHING
    lines = []
    for metric, called in (("ratio_bfloat16", "bfloat16"), ("ratio", "float32")):
        faster: dict[str, int] = {}
        names = list(dict.fromkeys(map(_called, rows)))
        for r in rows:
            v = value(r, metric)
            faster[_called(r)] = faster.get(_called(r), 0) + ((v.value if v.high is None else v.high) < 1)
        places = {name: sum(_called(r) == name for r in rows) for name in names}
        always = [name for name in names if faster[name] == places[name]]
        never = [name for name in names if not faster[name]]
        some = [f"{name} ({faster[name]} of {places[name]})" for name in names if name not in (*always, *never)]
        parts = [("at every size", always), ("at some sizes", some), ("nowhere", never)]
        text = "; ".join(f"{where} {', '.join(who)}" for where, who in parts if who)
        lines.append(f"- Faster than rows in {called}, by the quartiles: {text}.")
    return "\n".join(lines)
