from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.data.indexed import IndexedTokens
from megatron_m1.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from tools.preprocess_data import main

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first text", "zweiter Text: ä", "", f"third {END_OF_DOCUMENT} goes on"]


@pytest.fixture(autouse=True)
def tokenizer(tmp_path, monkeypatch) -> Tokenizer:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # main() sets it; this puts it back
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(TEXTS, 270)
    tokenizer.save("tokenizer.json")
    return tokenizer


def write_jsonl(path: str, rows: list) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def run(*arguments: str) -> None:
    main([*arguments, "--tokenizer-model", "tokenizer.json", "--output-prefix", "out/corpus"])


def documents(key: str = "text") -> list[list[int]]:
    tokens = IndexedTokens(f"out/corpus_{key}_document")
    return [tokens.document(i).tolist() for i in range(len(tokens))]


def test_json_lines(tokenizer, capsys):
    write_jsonl("a.jsonl", [{"text": text} for text in TEXTS])
    run("--input", "a.jsonl", "--append-eod", "--log-interval", "2")
    assert [d[-1] for d in documents()] == [tokenizer.eod] * 4
    assert [tokenizer.decode(d[:-1]) for d in documents()] == TEXTS
    assert all(tokenizer.eod not in d[:-1] for d in documents())
    out, err = capsys.readouterr()
    total = sum(map(len, documents()))
    assert out == (
        f"4 documents, {total} tokens: out/corpus_text_document.bin, out/corpus_text_document.idx\n"
    )
    assert "docs/s" in err and "MB/s" in err


def test_without_end_and_with_special_tokens(tokenizer):
    write_jsonl("a.jsonl", [{"text": text} for text in TEXTS])
    run("--input", "a.jsonl", "--parse-special-tokens")
    assert documents() == [tokenizer.encode(text) for text in TEXTS]
    assert documents()[3].count(tokenizer.eod) == 1


def test_several_inputs_and_keys_keep_their_order(tokenizer):
    write_jsonl("b.jsonl", [{"title": "b", "text": "B"}])
    write_jsonl("a1.jsonl", [{"title": f"{i}", "text": f"{i}" * 3} for i in range(300)])
    write_jsonl("a2.json", [{"title": "a2", "text": "A2"}])
    run("--input", "b.jsonl", "a*.json*", "--json-keys", "title", "text")
    titles = ["b", *(f"{i}" for i in range(300)), "a2"]
    assert [tokenizer.decode(d) for d in documents("title")] == titles
    assert len(documents("text")) == 302


def test_a_plain_text_is_one_document(tokenizer):
    Path("a.txt").write_text("line\nline\n")
    run("--input", "a.txt")
    assert documents() == [tokenizer.encode("line\nline\n")]


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "a JSON object is expected, not list"),
        ('{"body": "x"}', "no text under the key text; the line has body"),
        ('{"text": 5}', "no text under the key text"),
        ('{"text": "\udcff"}', "not JSON in UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_left(line, problem):
    good = [json.dumps({"text": "good"})] * 300
    content = "\n".join([*good, "", line, *good])
    Path("bad.jsonl").write_text(content, "utf-8", errors="surrogateescape")
    with pytest.raises(SystemExit, match=f"bad.jsonl, line 302: .*{problem}"):
        run("--input", "bad.jsonl")
    assert list(Path("out").iterdir()) == []


def test_unfit_input(tmp_path):
    with pytest.raises(SystemExit, match="no file is named by --input none"):
        run("--input", "none*.jsonl")
    Path("empty.jsonl").touch()
    with pytest.raises(SystemExit, match="nothing to write under out/corpus_text_document"):
        run("--input", "empty.jsonl")
    Path("a.txt").write_text("x")
    with pytest.raises(SystemExit, match="a.txt: a plain text has one key"):
        run("--input", "a.txt", "--json-keys", "a", "b")
    with pytest.raises(SystemExit, match="tokenizer.json is not a tokenizer"):
        Path("tokenizer.json").write_text("")
        run("--input", "a.txt")


def test_the_command_runs_from_the_repository_root(tmp_path):
    write_jsonl("a.jsonl", [{"text": "text"}])
    command = [sys.executable, "tools/preprocess_data.py", "--input", f"{tmp_path}/a.jsonl"]
    options = ["--tokenizer-type", "HuggingFaceTokenizer", "--workers", "1"]
    paths = ["--output-prefix", f"{tmp_path}/out/corpus", "--tokenizer-model", f"{tmp_path}"]
    result = subprocess.run(
        [*command, *options, *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 documents, ")
    assert len(documents()) == 1
