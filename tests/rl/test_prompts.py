from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl.prompts import BlendedPrompts, FilePrompts, TaskPrompts
from megatron_m1.rl.tasks import compute_score, make_task


def write_rows(path: Path, count: int, **changes: object) -> Path:
    rows = [
        {
            "data_source": "arithmetic",
            "prompt": f"{i}+0=",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
            **changes,
        }
        for i in range(count)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_problems_of_a_task_are_addressed_by_position():
    stream = TaskPrompts(make_task("sorting"), seed=3)
    forward = [stream.prompt(i) for i in range(20)]
    assert [stream.prompt(i) for i in reversed(range(20))] == forward[::-1]
    assert [TaskPrompts(make_task("sorting"), 3).prompt(i) for i in range(20)] == forward
    assert [prompt.id for prompt in forward] == list(range(20))
    assert len({prompt.text for prompt in forward}) > 15
    assert {prompt.data_source for prompt in forward} == {"sorting"}
    other = TaskPrompts(make_task("sorting"), 4)
    assert other.prompt(0).text != forward[0].text or other.prompt(1).text != forward[1].text


def test_the_answer_to_teach_with_is_right():
    stream = TaskPrompts(make_task("countdown"), 0)
    for prompt in map(stream.prompt, range(20)):
        answer = prompt.extra_info["answer"]
        assert compute_score(prompt.data_source, answer, prompt.ground_truth) == 1.0


def test_a_position_far_out_costs_nothing():
    assert TaskPrompts(make_task("arithmetic"), 0).prompt(10**15).id == 10**15


def test_a_blend_deals_shares_and_skips_nothing():
    parts = [TaskPrompts(make_task("sorting"), 0), TaskPrompts(make_task("brackets"), 0)]
    blend = BlendedPrompts(parts, [3, 1])
    dealt = [blend.prompt(i) for i in range(400)]
    assert Counter(prompt.data_source for prompt in dealt) == {"sorting": 300, "brackets": 100}
    assert [prompt.id for prompt in dealt] == list(range(400))
    texts = [prompt.text for prompt in dealt if prompt.data_source == "brackets"]
    assert texts == [parts[1].prompt(i).text for i in range(100)]
    assert BlendedPrompts(parts, [3, 1]).prompt(321) == dealt[321]


def test_a_blend_needs_a_weight_for_each():
    part = TaskPrompts(make_task("sorting"), 0)
    with pytest.raises(ValueError, match="2 streams of prompts have 1 weights"):
        BlendedPrompts([part, part], [1])
    with pytest.raises(ValueError, match="blend weights are"):
        BlendedPrompts([part, part], [1, 0])


def test_rows_of_a_file_come_once_an_epoch_in_an_order_of_their_own(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 30)
    stream = FilePrompts([path], seed=1)
    epochs = [[stream.prompt(30 * epoch + i) for i in range(30)] for epoch in range(3)]
    orders = [[prompt.extra_info["index"] for prompt in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(30))]}) == 4
    assert [prompt.id for epoch in epochs for prompt in epoch] == list(range(90))
    assert FilePrompts([path], seed=1).prompt(77) == epochs[2][17]
    assert [FilePrompts([path], seed=2).prompt(i) for i in range(30)] != epochs[0]


def test_files_are_one_stream(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", 2, data_source=name) for name in "ab"]
    stream = FilePrompts(paths, seed=0)
    assert len(stream) == 4
    assert Counter(stream.prompt(i).data_source for i in range(4)) == {"a": 2, "b": 2}
    blend = BlendedPrompts([stream, TaskPrompts(make_task("sorting"), 0)], [1, 1])
    assert blend.data_sources == {"a", "b", "sorting"}


def test_conversations_need_a_chat_template(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2="}]
    path = write_rows(tmp_path / "chat.jsonl", 2, prompt=messages)
    with pytest.raises(InputError, match="chat.jsonl holds conversations, and the tokenizer has"):
        FilePrompts([path], seed=0)

    def template(conversation: list[dict[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"

    stream = FilePrompts([path], seed=0, chat_template=template)
    assert stream.prompt(0).text == "<system>Be brief.<user>2+2=<assistant>"


def test_fingerprints_tell_streams_apart(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 3)
    easy, hard = make_task("sorting"), make_task("sorting", 3)
    parts = [TaskPrompts(easy, 0), TaskPrompts(hard, 0), TaskPrompts(easy, 1)]
    streams = [
        *parts,
        FilePrompts([path], 0),
        FilePrompts([path], 1),
        FilePrompts([path, path], 0),
        BlendedPrompts(parts, [1, 1, 1]),
        BlendedPrompts(parts, [1, 1, 2]),
        BlendedPrompts(parts[::-1], [1, 1, 1]),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    before = streams[3].fingerprint
    moved = tmp_path / "b.jsonl"
    moved.write_bytes(path.read_bytes())
    assert FilePrompts([moved], 0).fingerprint == before
    write_rows(path, 4)
    assert FilePrompts([path], 0).fingerprint != before
