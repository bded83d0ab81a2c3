"""Folders for results: those that take no file are refused before anything runs, and none is made by asking."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.core.folders import check_file, check_folder


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"nothing can be written into .*: .*file is a file, not a folder"):
        check_folder(tmp_path / "file" / below)


def test_a_folder_that_refuses_files_says_so(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tokred.core.folders.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"x: .* refuses files \(permission denied\)"):
        check_folder(tmp_path / "x")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_file(tmp_path)


def test_a_link_to_nowhere_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "link")


def test_calibration_refuses_a_file_before_it_reads_any_text(tmp_path):
    (tmp_path / "file").touch()

    def texts():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(NotADirectoryError):
        tokred.calibrate(torch.nn.Linear(2, 2), texts(), tmp_path / "file" / "queries.safetensors")
