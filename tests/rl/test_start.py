"""What keeps a run from starting, before anything is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl.config import PromptsConfig
from megatron_m1.rl.start import rl_run
from parallel.layout import Layout
from tests.rl.stored import MODEL, rl_config


def test_a_data_source_of_a_file_needs_a_verifier(single_process: Layout, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "reward_model": {"ground_truth": "2"}}
    rows = [{**row, "data_source": name} for name in ("arithmetic", "unheard")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = PromptsConfig(files=[str(file)], tokenizer="bytes")
    config = rl_config(str(tmp_path), data=prompts, model=replace(MODEL, vocab_size=264))
    with (
        pytest.raises(InputError, match="no verifier is known for data_source=unheard"),
        rl_run(config),
    ):
        pass
