import json

from megatron_m1.data.chat_template import load_chat_template
from megatron_m1.data.tokenizer import train_bpe

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
READ = "<system>Add.<user>1+1<assistant>"


def test_template_of_either_file(tmp_path):
    train_bpe([], 257).save(tmp_path)
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load_chat_template(tmp_path)(ASKED) == READ
    assert load_chat_template(tmp_path / "tokenizer.json")(ASKED) == READ
    config.write_text("{}")
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert load_chat_template(tmp_path)(ASKED) == READ
