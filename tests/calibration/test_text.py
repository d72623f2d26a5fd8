"""Text files: what is read, what is refused and where, and how documents are split."""

import gzip
import json

import pytest

from vllm_expert_prefetch.calibration import CalibrationError
from vllm_expert_prefetch.calibration.text import Text, cut, read_text


def write(path, content):
    path.write_bytes(content)
    return path


def test_text_and_prompt_are_read_plain_or_compressed(tmp_path):
    lines = b'{"text": "one", "domain": "x"}\n\n{"prompt": "two"}\n'
    plain = read_text(write(tmp_path / "a.jsonl", lines))
    packed = read_text(write(tmp_path / "a.jsonl.gz", gzip.compress(lines)))
    assert plain.documents == packed.documents == ["one", "two"]
    assert plain.sha256 != packed.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"Call me Ishmael.", "line 1: not JSON"),
        (b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        (b'{"body": "a"}', "line 1: no text"),
        (b'{"text": 3}', "line 1: no text"),
        (b'{"text": "  "}', "line 1: no text"),
        (b'["text"]', "line 1: no text"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_what_is_not_json_lines_with_text_is_refused_by_line(tmp_path, content, message):
    with pytest.raises(CalibrationError, match=message):
        read_text(write(tmp_path / "a.jsonl", content))


def test_a_file_that_is_missing_or_not_gzip_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="cannot read"):
        read_text(tmp_path / "missing.jsonl")
    with pytest.raises(CalibrationError, match="cannot read"):
        read_text(write(tmp_path / "a.jsonl.gz", json.dumps({"text": "a"}).encode()))


def tokenize(text):
    return [ord(letter) for letter in text]


def documents(count, length):
    return Text([chr(100 + number) * length for number in range(count)], "")


def test_no_document_is_in_two_splits():
    windows = cut(documents(24, 100), tokenize, 32, 100_000)
    splits = [{piece[0] for piece in split} for split in (windows.training, windows.validation, windows.test)]
    assert [len(split) for split in splits] == [18, 3, 3]
    assert len(set.union(*splits)) == 24
    assert max(map(len, windows.all)) == 32


def test_one_long_document_is_split_by_windows():
    windows = cut(documents(1, 320), tokenize, 32, 100_000)
    assert [len(split) for split in (windows.training, windows.validation, windows.test)] == [8, 1, 1]


def test_the_number_of_tokens_is_kept_to():
    windows = cut(documents(50, 100), tokenize, 32, 1000)
    assert 900 < sum(map(len, windows.all)) <= 1000


def test_too_little_text_is_refused():
    with pytest.raises(CalibrationError, match="40 tokens in 2 windows"):
        cut(documents(1, 40), tokenize, 32, 1000)
