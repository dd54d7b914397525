from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_m1.errors import InputError
from megatron_m1.rl.prompt_files import SKYRL, Keys, PromptRow, read_rows

ROW = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "What is 6 times 7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0},
}
READ = PromptRow(ROW["prompt"], "42", "math", ROW["extra_info"])


def write(path: Path, *rows: Any) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(params=[".parquet", ".jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"prompts{request.param}"


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name != key}


def refused(path: Path, text: str, keys: Keys | None = None) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as caught:
        read_rows(path, keys or Keys())
    assert "\n" not in str(caught.value)


def test_verls_rows(path):
    plain = {**ROW, "prompt": "6*7="}
    assert read_rows(write(path, ROW, ROW)) == [READ, READ]
    assert read_rows(write(path, plain)) == [PromptRow("6*7=", "42", "math", ROW["extra_info"])]


def test_ground_truths_of_any_kind_stay_what_they_are(path):
    for truth in ({"target": 24, "numbers": [3, 5]}, [1, 2], 7, 0.5, False, 0, ""):
        row = {**ROW, "reward_model": {"ground_truth": truth}}
        (read,) = read_rows(write(path, row))
        assert read.ground_truth == truth and type(read.ground_truth) is type(truth)


def test_extra_info_may_be_missing_or_null(path):
    assert read_rows(write(path, without("extra_info")))[0].extra_info == {}
    assert read_rows(write(path, ROW, {**ROW, "extra_info": None}))[1].extra_info == {}


def test_keys_of_others(path):
    skyrl = {**without("reward_model"), "env_class": "gsm8k", "reward_spec": {"ground_truth": "1"}}
    assert read_rows(write(path, skyrl), SKYRL)[0] == PromptRow(
        ROW["prompt"], "1", "gsm8k", ROW["extra_info"]
    )
    flat = {"input": "q", "label": "a", "metadata": {"source_name": "s"}}
    keys = Keys(prompt="input", ground_truth="label", data_source="metadata.source_name")
    assert read_rows(write(path, flat), keys) == [PromptRow("q", "a", "s", {})]


@pytest.mark.parametrize("key", ["prompt", "data_source"])
def test_a_missing_column_is_named_with_those_that_are_there(path, key):
    there = ", ".join(without(key))
    where = "row 1" if path.suffix == ".parquet" else "line 1"
    refused(write(path, without(key)), f"{path}, {where} has no {key!r}: the row has {there}")


def test_a_missing_ground_truth_is_named(path):
    refused(
        write(path, without("reward_model")),
        "has no 'reward_model.ground_truth': the row has data_source, prompt, ability, extra_info",
    )
    refused(
        write(path, {**ROW, "reward_model": {"style": "rule"}}),
        "has no 'reward_model.ground_truth': 'reward_model' has style",
    )
    refused(
        write(path, {**ROW, "reward_model": "42"}),
        "has no 'reward_model.ground_truth': 'reward_model' is '42'",
    )


def test_a_null_is_missing_in_its_row(path):
    null = {**ROW, "reward_model": {"style": "rule", "ground_truth": None}}
    number = "row 2" if path.suffix == ".parquet" else "line 2"
    refused(
        write(path, ROW, null),
        f"{number} has no 'reward_model.ground_truth': 'reward_model' has style, "
        "ground_truth (null)",
    )


@pytest.mark.parametrize(
    "prompt", [7, [], ["hello"], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_a_prompt_that_is_none(path, prompt):
    refused(write(path, {**ROW, "prompt": prompt}), "'prompt' is")


def test_wrong_types_are_named(path):
    refused(write(path, {**ROW, "data_source": 3}), "'data_source' is 3; it must be a text")
    refused(write(path, {**ROW, "extra_info": [1]}), "'extra_info' is [1]; it must be an object")


def test_long_values_are_shown_in_short(path):
    with pytest.raises(InputError) as caught:
        read_rows(write(path, {**ROW, "prompt": [f"{i}" * 500 for i in range(50)]}))
    assert len(str(caught.value).replace(str(path), "")) < 400


def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path / "a.json", "a.json must end in .parquet or .jsonl")
    refused(tmp_path / "a.jsonl", "a.jsonl does not exist")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    refused(empty, "empty.jsonl has no rows")
    refused(write(tmp_path / "list.jsonl", [1]), "line 1 is a list; a row must be an object")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(f"{json.dumps(ROW)}\n\n{{\n")
    refused(broken, "broken.jsonl, line 3 is not JSON")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    refused(binary, "binary.jsonl, line 1 is not JSON")


def test_parquet_files_that_cannot_be_read(tmp_path):
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    refused(text, "text.parquet cannot be read as parquet")
    cut = write(tmp_path / "cut.parquet", *[ROW] * 100)
    cut.write_bytes(cut.read_bytes()[:-50])
    refused(cut, "cut.parquet cannot be read as parquet")
    none = tmp_path / "none.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW]).slice(0, 0), none)
    refused(none, "none.parquet has no rows")
