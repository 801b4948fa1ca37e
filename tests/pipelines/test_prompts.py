"""Prompt files."""

from pathlib import Path

import pytest

from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.prompts import read_prompts


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return path


def test_blank_lines_are_skipped_and_told(tmp_path):
    read = read_prompts(write(tmp_path, b"\none\n  \n two \n"))
    assert read.prompts == ("one", "two")
    assert read.blank_lines == (1, 3)


def test_lines_with_a_hash_are_prompts_and_told(tmp_path):
    read = read_prompts(write(tmp_path, b"# one\ntwo # three\n\n  #four\n"))
    assert read.prompts == ("# one", "two # three", "#four")
    assert read.hash_lines == (1, 4)


def test_other_systems_line_ends_and_byte_order_marks_are_no_text(tmp_path):
    read = read_prompts(write(tmp_path, b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert read.prompts == ("one", "two")
    assert read.blank_lines == ()


def test_rare_line_separators_stay_inside_a_prompt(tmp_path):
    assert read_prompts(write(tmp_path, "a\u2028b\x0bc".encode())).prompts == ("a\u2028b\x0bc",)


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n"])
def test_a_file_without_a_prompt_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(write(tmp_path, data))


def test_another_encoding_is_refused_with_the_place(tmp_path):
    path = write(tmp_path, "good\nun caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8: byte 0xe9 at offset 11 \(line 2\)"):
        read_prompts(path)


def test_utf16_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not UTF-8: byte 0xff at offset 0 \(line 1\)"):
        read_prompts(write(tmp_path, "\ufeffone\n".encode("utf-16-le")))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)
