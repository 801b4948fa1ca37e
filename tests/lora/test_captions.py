"""Captions: what is accepted, and where a mistake is said to be."""

import csv
import json
import re
import unicodedata
from pathlib import Path

import pytest

from diffattn.lora.captions import CaptionedClip, captioned_clips, read_prompts
from diffattn.lora.errors import LoraError

CAPTIONS = {
    "a.mp4": "a red fox",
    "b.mp4": 'commas, "quotes" and; semicolons',
    "sub/c.gif": "Füchse im Schnee, 狐狸",
    "sub/d e.png": "two\u2028lines' worth",
}


@pytest.fixture
def clips(tmp_path) -> list[Path]:
    (tmp_path / "sub").mkdir()
    for name in CAPTIONS:
        (tmp_path / name).touch()
    return [tmp_path / name for name in CAPTIONS]


def table(tmp_path: Path, text: str | bytes, name: str = "captions.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(tmp_path: Path, clips: list[Path], path: Path | None) -> str:
    """The one line that is said."""
    with pytest.raises(LoraError) as caught:
        captioned_clips(tmp_path, clips, path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DATA")


class TestBeside:
    def test_each_clip_has_its_own_file(self, tmp_path, clips):
        for clip, caption in zip(clips, CAPTIONS.values(), strict=True):
            clip.with_suffix(".txt").write_text(f"\ufeff {caption} \r\n", "utf-8")
        found, left = captioned_clips(tmp_path, clips)
        expected = [" ".join(caption.split()) for caption in CAPTIONS.values()]
        assert found == [CaptionedClip(*pair) for pair in zip(clips, expected, strict=True)]
        assert left == []

    def test_lines_are_joined(self, tmp_path, clips):
        clips[0].with_suffix(".txt").write_text("a fox\n  in snow\n")
        (found,), _ = captioned_clips(tmp_path, clips[:1])
        assert found.caption == "a fox in snow"

    def test_a_missing_empty_or_odd_file_is_refused(self, tmp_path, clips):
        message = refusal(tmp_path, clips, None)
        assert message.startswith("DATA/a.mp4 has no caption: write it to a.txt beside it, or give")
        beside = clips[0].with_suffix(".txt")
        beside.write_text(" \n")
        message = refusal(tmp_path, clips, None)
        assert message == "DATA/a.txt is empty, but must hold the caption of a.mp4"
        beside.write_bytes("fine\nun café\n".encode("latin-1"))
        message = refusal(tmp_path, clips, None)
        assert message == "DATA/a.txt is not UTF-8: byte 0xe9 in line 2"


class TestTables:
    def written(self, path: Path, file: str, caption: str, names=lambda name: name) -> Path:
        rows = [
            {"id": "1", file: names(name), caption: text}
            for name, text in reversed(CAPTIONS.items())
        ]
        with path.open("w", encoding="utf-8", newline="") as stream:
            if path.suffix == ".csv":
                writer = csv.DictWriter(stream, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
        return path

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".CSV"])
    @pytest.mark.parametrize("columns", [("file", "caption"), ("file_name", "text")])
    def test_captions_go_to_their_clips_whatever_is_in_them(self, tmp_path, clips, suffix, columns):
        path = self.written(tmp_path / f"captions{suffix.lower()}", *columns)
        path = path.rename(path.with_suffix(suffix))
        found, left = captioned_clips(tmp_path, clips, path)
        assert [one.path for one in found] == clips
        assert [one.caption for one in found] == [" ".join(c.split()) for c in CAPTIONS.values()]
        assert left == []

    def test_names_may_take_detours_or_be_whole_paths(self, tmp_path, clips):
        path = tmp_path / "captions.csv"
        for names in (lambda name: f"./sub/../{name}", lambda name: str(tmp_path / name)):
            found, _ = captioned_clips(
                tmp_path, clips, self.written(path, "file", "caption", names)
            )
            assert len(found) == len(clips)

    @pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
    @pytest.mark.parametrize("name", ["café.mp4", "ガラス.png", "한국/ö.webm"])
    def test_names_that_look_alike_are_alike(self, tmp_path, name, on_disk, in_table):
        clip = tmp_path / unicodedata.normalize(on_disk, name)
        other = tmp_path / "cafe.mp4"
        path = table(tmp_path, f"file,caption\n{unicodedata.normalize(in_table, name)},a glass\n")
        found, left = captioned_clips(tmp_path, [clip, other], path)
        assert (found, left) == ([CaptionedClip(clip, "a glass")], [other])

    def test_a_name_that_is_there_exactly_comes_before_one_that_looks_alike(self, tmp_path):
        apart, whole = (tmp_path / unicodedata.normalize(form, "é.mp4") for form in ("NFD", "NFC"))
        path = table(tmp_path, f"file,caption\n{apart.name},apart\n{whole.name},whole\n")
        for clips in ([apart, whole], [whole, apart]):
            found, left = captioned_clips(tmp_path, clips, path)
            assert {one.path: one.caption for one in found} == {apart: "apart", whole: "whole"}
            assert left == []

    def test_clips_that_are_not_in_the_table_are_told(self, tmp_path, clips):
        path = table(tmp_path, "file,caption\r\nb.mp4,a fox\r\n\r\n")
        found, left = captioned_clips(tmp_path, clips, path)
        assert found == [CaptionedClip(clips[1], "a fox")]
        assert left == [clips[0], *clips[2:]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "DATA/captions.csv has no column file: its first line must name the columns"),
            ("a.mp4,a fox\n", "has no column file: .* such as file,caption; it is 'a.mp4,a fox'"),
            ("file;caption\na.mp4;x\n", "has no column file: .* it is 'file;caption'"),
            ("file,words\na.mp4,x\n", "has no column caption: .* it is 'file,words'"),
            ("file,caption\n", "^DATA/captions.csv holds no captions$"),
            ("file,caption\na.mp4,x\nc.mp4,x\n", "line 3: there is no clip 'c.mp4' in DATA; did y"),
            ("file,caption\nc.gif,x\n", "line 2: .*'c.gif' in DATA; did you mean 'sub/c.gif'"),
            ("file,caption\nQQ,x\n", "line 2: there is no clip 'QQ' in DATA$"),
            ("file,caption\na.mp4,x\na.mp4,y\n", "line 3: 'a.mp4' has a caption already: remove"),
            ("file,caption\na.mp4, \n", "line 2: the caption is empty"),
            ("file,caption\n ,x\n", "line 2: the file name is empty"),
            (
                "file,caption\na.mp4,x, y\n",
                "line 2: it has 3 columns, but the first line has 2: pu",
            ),
            ("file,caption\na.mp4\n", "line 2: it has 1 columns, but the first line has 2"),
            ('file,caption\na.mp4,"x\ny', "line 3: unexpected end of data"),
            (b"file,caption\na.mp4,caf\xe9\n", "captions.csv is not UTF-8: byte 0xe9 in line 2"),
        ],
    )
    def test_mistakes_in_a_csv_file(self, tmp_path, clips, text, message):
        found = refusal(tmp_path, clips, table(tmp_path, text))
        assert re.search(message, found), found

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"file": "a.mp4", "caption" "x"}', "line 2 is not JSON: Expecting ':' delimiter"),
            ('["a.mp4", "x"]', 'line 2: \'\\["a.mp4", "x"\\]\' is not a JSON object'),
            ('{"path": "a.mp4", "caption": "x"}', 'line 2 has no "file": it has path, caption'),
            ('{"file": "a.mp4"}', 'line 2 has no "caption": it has file'),
            ('{"file": "a.mp4", "caption": 7}', 'line 2: "caption" is 7, but must be a text'),
            ('{"file": "a.mp4", "caption": ""}', "line 2: the caption is empty"),
            ('{"file": "a.mp4", "caption": ' + "[" * 100_000, "line 2 is not JSON: maximum recurs"),
            (
                '{"file": "a.mp4", "caption": "a \\udcff"}',
                "line 2: the caption 'a .*' is no text",
            ),
            ('{"file": "b.mp4", "caption": "x"}', "line 2: 'b.mp4' has a caption already"),
            ('{"file": "x.mp4", "caption": "x"}', "line 2: there is no clip 'x.mp4' in DATA"),
        ],
    )
    def test_mistakes_in_a_jsonl_file(self, tmp_path, clips, line, message):
        text = '{"file": "b.mp4", "caption": "x"}\n' + line
        found = refusal(tmp_path, clips, table(tmp_path, text, "captions.jsonl"))
        assert re.search(message, found), found

    def test_what_is_no_table(self, tmp_path, clips):
        found = refusal(tmp_path, clips, table(tmp_path, "", "captions.json"))
        assert found == (
            "DATA/captions.json ends in '.json', but a table of captions is .csv or .jsonl"
        )
        found = refusal(tmp_path, clips, tmp_path / "none.csv")
        assert found == "cannot read DATA/none.csv: No such file or directory"


class TestPrompts:
    def test_one_a_line_without_blank_ones(self, tmp_path):
        path = table(tmp_path, "\ufeffone\r\n\r\n two\u2028still two \n", "prompts.txt")
        assert read_prompts(path) == ["one", "two\u2028still two"]

    def test_none(self, tmp_path):
        with pytest.raises(LoraError, match=r"prompts.txt holds no prompt"):
            read_prompts(table(tmp_path, " \n\n", "prompts.txt"))
        with pytest.raises(LoraError, match=r"cannot read .*none.txt: No such file"):
            read_prompts(tmp_path / "none.txt")
