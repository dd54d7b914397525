"""What belongs to weights beside them: from an import through training and out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, MiniMaxForCausalLM

from megatron_m1.checkpoint import manifest, starting, store
from megatron_m1.data.tokenizer import Tokenizer, train_bpe
from megatron_m1.errors import InputError
from megatron_m1.rl.config import PromptsConfig, TaskConfig
from megatron_m1.rl.start import rl_run
from megatron_m1.training.beginning import begin
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.conversion.foreign import WHOLE, export_checkpoint, import_folder, write_toy
from tests.distributed import Pool
from tests.rl.stored import rl_config
from tests.training.small_run import small_config, start, write_data

# Of a run's balancing loss its own configuration speaks.
MODEL = replace(WHOLE, vocab_size=320, aux_loss_coef=0.001 * WHOLE.router_topk)
EOD = "<eod>"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as somebody publishes it, with a tokenizer."""
    folder = write_toy(tmp_path_factory.mktemp("original"), MODEL)
    train_bpe(["some text"], 300, [EOD, "<bos>"]).save(folder)
    # As others write it: with the same content in other bytes.
    compact = json.dumps(json.loads((folder / "tokenizer.json").read_text()))
    (folder / "tokenizer.json").write_text(compact)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 12_345, "eos_token_id": 0, "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [0, 1], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_folder(original, tmp_path_factory.mktemp("imported") / "checkpoint")


def trained(folder: Path, prefix: str, checkpoint: Path, **sections: Any) -> Path:
    """Begin with a checkpoint, take a step and save."""
    run = begun(folder, prefix, checkpoint, **sections)
    train_step(run)
    return store.save(run)


def begun(folder: Path, prefix: str, checkpoint: Path, **sections: Any) -> Run:
    run = start(small_config(str(folder), prefix, model=MODEL, **sections))
    starting.start(run, checkpoint)
    return run


def assert_whole(folder: Path, original: Path) -> None:
    """transformers finds in an export everything that it finds in the original."""
    _, info = MiniMaxForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    theirs, ours = (AutoConfig.from_pretrained(f).to_dict() for f in (original, folder))
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    assert ours["max_position_embeddings"] == 12_345
    generation = [GenerationConfig.from_pretrained(f).to_dict() for f in (original, folder)]
    assert generation[0] == generation[1]
    for name in (*TOKENIZERS, "generation_config.json"):
        assert (folder / name).read_bytes() == (original / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token == "<bos>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


@pytest.mark.parametrize("size", [1, 2])
def test_a_trained_import_goes_out_whole(
    size: int,
    ranks: Callable[[int], Pool],
    prefix: str,
    imported: Path,
    original: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of a run that was broken off and went on."""
    first = ranks(size).run(trained, tmp_path / "run", prefix, imported)[0]
    second = ranks(size).run(trained, tmp_path / "run", prefix, first)[0]
    assert second.name == "step_000002"
    files = manifest.read(second)
    assert files is not None and {*TOKENIZERS, "foreign_config.json"} <= files.keys()
    assert_whole(export_checkpoint(second, tmp_path / "hf", "transformers"), original)
    assert "warning" not in capsys.readouterr().err


def test_rl_from_an_import_goes_out_whole(
    single_process: Layout, imported: Path, original: Path, tmp_path: Path
) -> None:
    prompts = PromptsConfig(tasks=[TaskConfig("brackets")], eod=EOD)
    config = rl_config(str(tmp_path), model=MODEL, data=prompts)
    config.checkpoint.load = str(imported)
    with rl_run(config) as run:
        assert begin(run)
        run.progress.step = 1
        saved = store.save(run)
        run.sinks.close()
    assert_whole(export_checkpoint(saved, tmp_path / "hf", "transformers"), original)
    report = json.loads((saved / "config.json").read_text())
    assert "rl" in report and "imported" not in report


def test_another_tokenizer_takes_the_imports_place(
    single_process: Layout, prefix: str, imported: Path, tmp_path: Path
) -> None:
    """Its ids mean something else; what says nothing of tokens stays."""
    run = start(small_config(str(tmp_path), prefix, model=MODEL))
    own = train_bpe(["other words"], 290, [EOD])
    run.tokenizer = own
    starting.start(run, imported)
    saved = store.save(run)
    assert Tokenizer.load(saved, EOD).sha256 == own.sha256
    assert not any((saved / name).exists() for name in (*TOKENIZERS[1:], "generation_config.json"))
    config = json.loads(
        (export_checkpoint(saved, tmp_path / "hf", "transformers") / "config.json").read_text()
    )
    assert config["max_position_embeddings"] == 12_345
    assert (config["eos_token_id"], config["bos_token_id"]) == (None, None)


def test_a_run_on_longer_rows_says_so(
    single_process: Layout, prefix: str, imported: Path, tmp_path: Path
) -> None:
    saved = store.save(begun(tmp_path, prefix, imported))
    config = json.loads((saved / "config.json").read_text())
    config["train"]["seq_length"] = 20_000
    (saved / "config.json").write_text(json.dumps(config))
    folder = export_checkpoint(saved, tmp_path / "hf", "minimax_m1")
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 20_000


def test_a_checkpoint_can_be_the_like(imported: Path, tmp_path: Path) -> None:
    bare = import_folder(write_toy(tmp_path / "toy", MODEL), tmp_path / "bare")
    (bare / "foreign_config.json").unlink()
    folder = export_checkpoint(bare, tmp_path / "hf", "minimax_m1", like=imported)
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (12_345, 0)
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("version https://git-lfs.github.com/spec/v1", "tokenizer.json is not JSON"),
        ("[]", "tokenizer.json is not a JSON object"),
        (None, "tokenizer.json is a link out of its folder"),
    ],
)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_they_are_checked_before_a_tensor_is_written(
    direction: str, content: str | None, sentence: str, imported: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if direction == "import":
        write_toy(source, MODEL)
    else:
        import_folder(write_toy(tmp_path / "toy", MODEL), source)
    if content is None:
        (source / "tokenizer.json").symlink_to(tmp_path / "missing")
    else:
        (source / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        if direction == "import":
            import_folder(source, tmp_path / "out")
        else:
            export_checkpoint(source, tmp_path / "out", "minimax_m1")
    assert not (tmp_path / "out.partial").exists()
