"""Documents: whole, long enough, the same tokens however little of a book was tokenized."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerFast

from kvlab.core import BadInput
from kvlab.eval.data import Books, HubText, TextFile, first_tokens, join_lines
from kvlab.model.load import REFERENCE

POEM = "The sea is calm tonight. The tide is full, the moon lies fair upon the straits. "


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(REFERENCE / "tokenizer.json"))


def test_books_are_eight_and_stay_apart(tokenizer):
    found = Books().documents(tokenizer, None, 64)
    assert len({document.id for document in found}) == 8
    for document, (name, text) in zip(found, Books().texts()):
        whole = tokenizer(text[:2000])["input_ids"]
        assert document.id == name and document.ids.dtype == np.int32
        assert document.ids.tolist() == whole[:64]


@pytest.mark.parametrize("tokens", [2, 100, 4096])
def test_first_tokens_equal_those_of_the_whole_text(tokenizer, tokens):
    text = next(iter(Books().texts()))[1][:100_000]
    assert first_tokens(tokenizer, text, tokens).tolist() == tokenizer(text)["input_ids"][:tokens]


def test_first_tokens_of_dense_text_reads_on(tokenizer):
    text = "supercalifragilistic " * 3000  # some characters more a token than was guessed
    text += "antidisestablishmentarianism" * 100
    assert first_tokens(tokenizer, text, 9000).tolist() == tokenizer(text)["input_ids"][:9000]


def test_short_documents_are_passed_over(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    (tmp_path / "b.txt").write_text(POEM * 10)
    (tmp_path / "ignored.md").write_text(POEM * 10)
    assert [d.id for d in TextFile(str(tmp_path)).documents(tokenizer, 1, 50)] == ["b"]


def test_a_lone_text_is_cut_into_the_documents_wanted(tokenizer, tmp_path, capsys):
    file = tmp_path / "poem.txt"
    file.write_text(POEM * 10)
    whole = tokenizer(POEM * 10)["input_ids"]
    found = TextFile(str(file)).documents(tokenizer, 3, 50)
    assert [d.id for d in found] == ["poem 1/3", "poem 2/3", "poem 3/3"]
    assert [t for d in found for t in d.ids.tolist()] == whole[:150]
    assert "cut into 3 documents of 50 tokens" in capsys.readouterr().err
    assert [d.id for d in TextFile(str(file)).documents(tokenizer, 1, 50)] == ["poem"]
    with pytest.raises(BadInput, match=f"enough for {len(whole) // 100} documents of 100"):
        TextFile(str(file)).documents(tokenizer, 9, 100)


@pytest.mark.parametrize(
    ("count", "tokens", "words"),
    [
        (9, 64, "documents of 64 tokens wanted: 9, long enough: 8"),
        (0, 64, "at least 1"),
        (1, 1, "at least 2"),
    ],
)
def test_too_much_asked_is_refused(tokenizer, count, tokens, words):
    with pytest.raises(BadInput, match=words):
        Books().documents(tokenizer, count, tokens)


def test_too_short_says_how_long_the_longest_is(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("five tokens or so here")
    with pytest.raises(BadInput, match=r"data.path=.*the longest has \d tokens"):
        TextFile(str(tmp_path / "a.txt")).documents(tokenizer, None, 64)


def test_text_of_several_lines_is_one_document(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree ä\n")
    [(name, text)] = TextFile(str(tmp_path / "a.txt")).texts()
    assert name == "a" and text.strip() == "one\n\ntwo\nthree ä"


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    rows = [{"id": "x", "body": POEM}, {"id": "y", "body": "short"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = list(TextFile(str(tmp_path / name), text_column="body").texts())
        assert found == [("x", POEM), ("y", "short")]


def test_heading_opens_a_document():
    lines = [" = A = \n", "x\n", " = = B = = \n", "y\n", " = C = \n", "z\n"]
    texts = list(join_lines(lines, "^ = [^=].* = $"))
    assert texts == [" = A = \nx\n = = B = = \ny\n", " = C = \nz\n"]


BROKEN = {
    "nothing there": (None, "a.txt", "no such file"),
    "unknown ending": (b"x", "a.doc", "must end in one of .txt, .jsonl"),
    "not utf-8": (b"\xff\xfe\x00", "a.txt", "cannot be read"),
    "broken jsonl": (b'{"text": "a"}\n{oops\n', "a.jsonl", "cannot be read"),
    "empty jsonl": (b"", "a.jsonl", "cannot be read: it is empty"),
    "no parquet": (b"PAR0", "a.parquet", "cannot be read"),
    "no such column": (b'{"body": "a"}\n', "a.jsonl", "data.text_column=text: no such column"),
    "no text in column": (b'{"text": 3}\n', "a.jsonl", "data.text_column=text: row 0 holds no"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tokenizer, tmp_path, name):
    data, file, words = BROKEN[name]
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(BadInput, match=words):
        TextFile(str(tmp_path / file)).documents(tokenizer, 1, 8)


def test_folder_without_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="holds no .txt file"):
        TextFile(str(tmp_path)).documents(tokenizer, 1, 8)


def test_hub_without_network_says_what_to_do(tokenizer):
    with pytest.raises(BadInput, match="data.name=no/such.*HF_HUB_OFFLINE.*data=text"):
        HubText("no/such").documents(tokenizer, 1, 8)
