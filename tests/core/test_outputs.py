from tokred.bench import results as outputs


def test_rows_come_back_with_their_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"method": "tome", "r": 16, "share": 0.25}, {"method": "1e", "r": 2, "note": "a, b"}]
    outputs.write_rows(path, rows)
    assert outputs.read_rows(path) == rows


def test_no_file_has_no_rows(tmp_path):
    assert outputs.read_rows(tmp_path / "none.csv") == []


def test_floats_keep_six_digits(tmp_path):
    path = outputs.write_rows(tmp_path / "rows.csv", [{"x": 1 / 3}])
    assert outputs.read_rows(path) == [{"x": 0.333333}]
