import json

import pytest

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.errors import InputError
from megatron_m1.rl.config import PromptsConfig, RLConfig
from megatron_m1.rl.sources import open_prompts, open_tokenizer

ROW = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "1+1"}],
    "reward_model": {"ground_truth": "2"},
}


@pytest.fixture
def config(tmp_path) -> RLConfig:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(ROW))
    train_bpe([], 257).save(tmp_path)
    files = [str(tmp_path / "prompts.jsonl")]
    return RLConfig(data=PromptsConfig(files=files, tokenizer=str(tmp_path)))


def test_conversations_go_through_the_tokenizers_template(config, tmp_path):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}answer:"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert open_prompts(config, seed=0).prompt(0).text == "[1+1]answer:"
    assert open_tokenizer(config).vocab_size == 257


def test_conversations_without_a_template_are_refused(config):
    with pytest.raises(InputError, match="holds conversations, and the tokenizer has no chat"):
        open_prompts(config, seed=0)
