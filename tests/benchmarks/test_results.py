"""The table of results: rows and records, files that are never half written, where rows come from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tokred.bench import results
from tokred.bench.metrics import CONDITIONS, METRICS

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
SOURCE = {"device": "a CPU", "threads": 2, "dtype": "float32", "versions": "torch=1", "commit": "abc", "date": "today"}
RECORD = {
    "model": "m", "method": "tome", "setting": "r=13 blocks=(3, 6)", "batch": 8, "asked": "after", "rounds": 5,
    "speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "cosine": 1 / 3, "bytes": 70755840, **SOURCE,
}  # fmt: skip


def test_a_record_comes_back(tmp_path: Path) -> None:
    path = results.write(tmp_path / "new" / "a.csv", [RECORD], "s")
    table = results.read(path)
    assert [row.metric for row in table] == ["speedup", "cosine", "bytes"]
    assert table[0] == results.Row(
        "s", "m", "tome", "r=13 blocks=(3, 6) asked=after batch=8", "speedup", "x", 1.5, 1.4, 1.6, 5, *SOURCE.values()
    )
    (found,) = results.records(table)
    assert found["bytes"] == 70755840, "whole numbers are whole"
    assert found["cosine"] == 0.333333, "others have six digits"
    assert {k: found[k] for k in RECORD if k != "cosine"} == {k: v for k, v in RECORD.items() if k != "cosine"}
    assert found["speedup_count"] == 5
    assert results.records(table, "another") == []
    assert list(results.wide(table)["speedup_low"]) == [1.4]


def test_a_file_has_the_columns_and_nothing_else(tmp_path: Path) -> None:
    path = results.write(tmp_path / "a.csv", [RECORD], "s")
    head = "scenario,model,method,setting,metric,unit,value,low,high,count,device,threads,dtype,versions,commit,date"
    assert path.read_text().splitlines()[0] == head
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    assert not results.is_table(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="no table of results"):
        results.write(tmp_path / "b.csv", [RECORD])
    assert (tmp_path / "b.csv").read_text() == "x,y\n1,2\n"
    assert results.read(tmp_path / "none.csv") == []


def test_rows_are_added_and_overwritten_only_on_request(tmp_path: Path) -> None:
    path = results.write(tmp_path / "a.csv", [RECORD], "s")
    results.write(path, [{**RECORD, "batch": 16}], "s")
    assert len(results.read(path)) == 6
    with pytest.raises(ValueError, match="has 3 of these rows already"):
        results.write(path, [{**RECORD, "speedup": 9.0}], "s")
    assert results.read(path)[0].value == 1.5
    results.write(path, [{**RECORD, "speedup": 9.0}], "s", overwrite=True)
    assert [r.value for r in results.read(path) if r.metric == "speedup"] == [9.0, 1.5]


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path = results.write(tmp_path / "a.csv", [RECORD], "s")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no fields speed_up"):
        results.write(path, [{**RECORD, "batch": 2}, {**RECORD, "speed_up": 1}], "s")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_no_condition_is_a_parameter_of_a_method() -> None:
    """Else a setting could not be taken apart again."""
    import dataclasses

    import tokred
    from tokred.core.registry import methods

    parameters = {f.name for name in tokred.list_methods() for f in dataclasses.fields(methods.get(name))}
    assert not parameters & {*CONDITIONS}
    assert not {*METRICS} & {*CONDITIONS}
    assert results.conditions("") == ("", {})
    assert results.conditions("batch=8") == ("", {"batch": 8})


def test_intervals() -> None:
    low, high = results.wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    low, high = results.wilson(0.0, 20)
    assert low == pytest.approx(0, abs=1e-12)
    assert 0.1 < high < 0.2
    for count in range(1, 200):
        for value in (0.0, 1 / count, 1.0):
            low, high = results.wilson(value, count)
            assert 0 <= low <= value <= high <= 1, (value, count)
    assert results.share("top1", 1, 4)["top1"] == 0.25
    assert results.mean("psnr", 10.0, 1.0) == pytest.approx(
        {"psnr": 10, "psnr_low": 10 - 1.959964, "psnr_high": 11.959964}
    )
    assert results.spread("ms", [1.0, 2.0, 3.0]) == {"ms": 2.0, "ms_low": 1.5, "ms_high": 2.5}
    assert results.spread("ms", []) == {}
    assert results.level((1.0, 0.8, 1.2), (1.1, 1.0, 1.3))
    assert not results.level((1.0, 0.9, 1.05), (1.1, 1.08, 1.3))
    assert not results.level((1.0, None, None), (1.1,))
    assert results.level((1.0,), (1.0,))


def test_what_is_not_known_is_empty_and_counted() -> None:
    known = results.rows(RECORD)
    dirty = results.rows({**RECORD, "commit": "abc+"})
    unknown = results.rows({k: v for k, v in RECORD.items() if k not in ("commit", "device")})
    assert unknown[0].device == unknown[0].commit == ""
    assert results.provenance([*known, *dirty, *unknown]) == (9, 3, 3, 3)
    assert results.rows({**RECORD, "cosine": math.nan, "bytes": None})[-1].metric == "speedup"


def test_where_a_measurement_is_made() -> None:
    import torch

    found = results.here("cpu", torch.bfloat16)
    assert found["dtype"] == "bfloat16"
    assert found["threads"] == torch.get_num_threads()
    assert f"torch={torch.__version__}" in found["versions"]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_committed_tables(path: Path) -> None:
    table = results.read(path)
    assert len({row.key for row in table}) == len(table) > 0
    for row in table:
        assert row.unit == METRICS[row.metric].unit, row
        assert (row.low is None) == (row.high is None), row
        assert row.low is None or row.low <= row.high, row
        assert (row.low is not None) <= bool(METRICS[row.metric].interval), row
        assert row.method, row


def test_there_is_one_table_a_wing() -> None:
    assert [path.stem for path in TABLES] == ["diffusion", "encoder", "kernels", "kv", "vlm"]
