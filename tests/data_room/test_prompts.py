"""Prompt files: their three forms, and what is said of a malformed one."""

import json
import re
from pathlib import Path

import pytest

from unigendet.data.prompts import PromptRecord, parse_prompts, read_prompts


def test_text_is_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeff a cat \r\n\n# no prompt\n  \n\tein Hund, süß #1\n{"prompt": "x"}'.encode())
    records = read_prompts(file)
    assert [r.prompt for r in records] == ["a cat", "ein Hund, süß #1", '{"prompt": "x"}']
    assert [r.where for r in records] == [f"{file}, line {i}" for i in (1, 5, 6)]
    assert records[0] == PromptRecord("a cat", where=f"{file}, line 1")


ENTRIES = [
    "plain",
    {"prompt": "# all", "seed": 7, "size": [4, 6], "images": ["in/a.png", "/b.png"], "image_path": "ref.png"},
]


@pytest.mark.parametrize(("name", "places"), [("p.json", ("entry 0", "entry 1")), ("p.JSONL", ("line 1", "line 3"))])
def test_json_and_json_lines_hold_the_same_entries(tmp_path, name, places):
    file = tmp_path / name
    lines = "\n\n".join(map(json.dumps, ENTRIES)) + "\n"
    file.write_text(json.dumps(ENTRIES) if name == "p.json" else lines)
    for root in (tmp_path, Path("elsewhere")):
        assert read_prompts(file, root) == [
            PromptRecord("plain", where=f"{file}, {places[0]}"),
            PromptRecord("# all", 7, (4, 6), (root / "in/a.png", Path("/b.png")), root / "ref.png",
                         f"{file}, {places[1]}"),
        ]  # fmt: skip
    assert read_prompts(file) == read_prompts(file, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "is 3; it must be a string or an object"),
        ({"seed": 1}, "'prompt' is None; it must be a text that is not blank"),
        (" \n", r"'prompt' is ' \n'; it must be a text that is not blank"),
        ({"prompt": ["a"]}, "'prompt' is ['a']; it must be a text"),
        ({"prompt": "a", "sead": 1, "cfg": 2}, "has the unknown keys ['cfg', 'sead']; there are ['prompt', 'seed', "),
        ({"prompt": "a", "seed": -1}, "'seed' is -1; it must be a whole number from 0"),
        ({"prompt": "a", "seed": 1.0}, "'seed' is 1.0; it must be a whole number"),
        ({"prompt": "a", "seed": True}, "'seed' is True; it must be a whole number"),
        ({"prompt": "a", "size": 8}, "'size' is 8; it must be [height, width]"),
        ({"prompt": "a", "size": [8, 8, 8]}, "'size' is [8, 8, 8]; it must be [height, width]"),
        ({"prompt": "a", "size": ["8", 8]}, "it must be [height, width]"),
        ({"prompt": "a", "images": "b.png"}, "'images' is 'b.png'; it must be a list of paths"),
        ({"prompt": "a", "images": [""]}, "'images' is ['']; it must be a list of paths"),
        ({"prompt": "a", "image_path": 3}, "'image_path' is 3; it must be a path"),
        ({"prompt": "a", "image_path": "/b.png"}, "'image_path' is '/b.png'; it must be a path below the image root"),
        ({"prompt": "a", "image_path": "x/../../b"}, "'image_path' is 'x/../../b'; it must be a path below the image"),
        ("a\udcff", r"'prompt' is 'a\udcff'; it must be Unicode text, without a lone surrogate"),
    ],
)
def test_malformed_entries_are_named(entry, message):
    for name, content, where in (
        ("p.json", json.dumps(["fine", entry]), "p.json, entry 1"),
        ("p.jsonl", '"fine"\n\n' + json.dumps(entry), "p.jsonl, line 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(where) + ".*" + re.escape(message)):
            parse_prompts(content.encode(), name, Path())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt holds no prompt"),
        ("p.txt", b"# nothing\n \n", "p.txt holds no prompt"),
        ("p.json", b"[]", "p.json holds no prompt"),
        ("p.jsonl", b"\n", "p.jsonl holds no prompt"),
        ("p.json", b'{"prompt": "a"}', "p.json holds a dict; it must hold a list of prompts"),
        ("p.json", b'["a",\n"b"', "p.json, line 2 is not JSON"),
        ("p.json", b"", "p.json, line 1 is not JSON"),
        ("p.jsonl", b'"a"\n{"prompt": "b"\n', "p.jsonl, line 2 is not JSON: Expecting ',' delimiter at column 15"),
        ("p.txt", b"a\nb\xff\n", "p.txt, line 2 is not UTF-8 text (invalid start byte at byte 3)"),
        ("p.json", b"\x80[]", "p.json, line 1 is not UTF-8 text"),
        ("p.txt", "a\n".encode("utf-16"), "p.txt, line 1 is not UTF-8 text"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(tmp_path / name)


def test_an_annotation_may_say_more_than_is_needed():
    content = json.dumps([{"image_path": "a.png", "prompt": "p", "url": "u", "punsafe": 0.1}]).encode()
    assert parse_prompts(content, "p.json", Path("r")) == [
        PromptRecord("p", reference=Path("r/a.png"), where="p.json, entry 0")
    ]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompt file .*lost\.txt does not exist"):
        read_prompts(tmp_path / "lost.txt")
