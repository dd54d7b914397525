"""What a server draws against our own generation, over layouts, callers and weights."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_m1.inference.generation import Generator
from megatron_m1.inference.load import load_tokenizer
from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence
from megatron_m1.serving.protocol import Weights
from megatron_m1.serving.service import Service
from parallel.layout import Layout
from tests.distributed import Pool
from tests.serving.served import TOKENIZER, begin, complete, serve, write_weights

SAMPLINGS = [
    SamplingParams(temperature=0, max_new_tokens=9),
    SamplingParams(temperature=2, max_new_tokens=12),
    SamplingParams(temperature=1.5, top_k=20, max_new_tokens=3),
    SamplingParams(temperature=2, top_p=0.8, max_new_tokens=8),
    SamplingParams(max_new_tokens=30, stop=("e",)),
]
SEQUENCES = [
    Sequence(tuple(np.random.RandomState(length).randint(300, size=length).tolist()), s, 5, n, 2)
    for n, (length, s) in enumerate(zip((1, 23, 5, 32, 9), SAMPLINGS, strict=True))
]
LAYOUTS = {
    "one_process": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "dp2": (2, Layout()),
    "pp2": (2, Layout(pp=2)),
}


def body(sequence: Sequence, **more: Any) -> dict[str, Any]:
    sampling = sequence.sampling
    return {
        "prompt": list(sequence.prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "seed": sequence.seed,
        "prompt_id": sequence.prompt_id,
        "index": sequence.index,
        "logprobs": 1,
        "return_token_ids": True,
        **more,
    }


def generated(path: Path, sequences: list[Sequence]) -> list[dict[str, Any]]:
    """Each sequence by itself."""
    _, loaded = begin(Layout(), path)
    generator = Generator(loaded.chunks, stop_token=TOKENIZER.eod, tokenizer=TOKENIZER)
    return [asdict(next(generator.run([sequence]))[1]) for sequence in sequences]


@pytest.fixture(scope="module")
def weights(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of two versions, the second written by other ranks than read the first."""
    folder = tmp_path_factory.mktemp("weights")
    ranks(1).run(write_weights, Layout(), 1, folder / "a")
    ranks(2).run(write_weights, Layout(tp=2), 2, folder / "b")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    return [folder / "a", folder / "b"]


@pytest.fixture(scope="module")
def expected(ranks: Callable[[int], Pool], weights: list[Path]) -> list[list[Continuation]]:
    """By both weights."""
    found = [ranks(1).run(generated, path, SEQUENCES)[0] for path in weights]
    return [[Continuation(**values) for values in one] for one in found]


def assert_alike(answers: list[dict[str, Any]], expected: list[Continuation]) -> None:
    for answer, one in zip(answers, expected, strict=True):
        (choice,) = answer["choices"]
        assert (choice["token_ids"], choice["finish_reason"]) == (one.tokens, one.finish)
        told = choice["logprobs"]
        np.testing.assert_allclose(told["token_logprobs"], one.logprobs, atol=2e-5)
        np.testing.assert_allclose(told["raw_token_logprobs"], one.raw_logprobs, atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_answers_what_generation_gives(
    name: str,
    ranks: Callable[[int], Pool],
    weights: list[Path],
    expected: list[list[Continuation]],
) -> None:
    size, layout = LAYOUTS[name]
    bodies = [body(sequence) for sequence in SEQUENCES]
    answers = ranks(size).run(serve, layout, weights[0], complete, bodies * 2)[0]
    assert_alike(answers, expected[0] * 2)
    assert {answer["model"] for answer in answers} == {str(weights[0])}
    assert expected[0][4].finish == "stop"
    assert answers[4]["choices"][0]["stop_reason"] == "e"
    text = TOKENIZER.decode(expected[0][4].tokens)
    assert answers[4]["choices"][0]["text"] == text[: text.rfind("e")]


def test_a_response_that_goes_on_is_what_it_would_have_been(
    ranks: Callable[[int], Pool], weights: list[Path], expected: list[list[Continuation]]
) -> None:
    bodies = []
    for sequence, whole in zip(SEQUENCES, expected[0], strict=True):
        begun = whole.tokens[:2]
        left = sequence.sampling.max_new_tokens - 2
        prompt = [*sequence.prompt, *begun]
        bodies.append(body(sequence, prompt=prompt, begun=2, max_tokens=left))
    (answers,) = ranks(1).run(serve, Layout(), weights[0], complete, bodies)
    rest = [
        replace(
            one, tokens=one.tokens[2:], logprobs=one.logprobs[2:], raw_logprobs=one.raw_logprobs[2:]
        )
        for one in expected[0]
    ]
    assert_alike(answers, rest)


def change_weights(client: httpx.Client, weights: list[Path]) -> dict[str, Any]:
    """Two versions in turn, each asked for while the other is; and what cannot be loaded."""
    bodies = [body(sequence) for sequence in SEQUENCES]
    load = {"folder": str(weights[1]), "name": "second", "version": 7}
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as threads:
        before = threads.submit(complete, client, bodies)
        while not client.get("/v1/models").json()["data"]:
            time.sleep(0.01)
        loaded = threads.submit(client.post, "/load_weights", json=load)
        found["loaded"] = loaded.result().json()
        found["before"] = before.result()
    found["after"] = complete(client, [one | {"model": "second"} for one in bodies])
    found["other"] = complete(client, [bodies[0] | {"model": "first"}])[0]
    found["missing"] = client.post("/load_weights", json={"folder": "nowhere"}).text
    found["models"] = client.get("/v1/models").json()
    back = {"folder": str(weights[0]), "name": "third", "version": 8}
    client.post("/load_weights", json=back)
    found["back"] = complete(client, bodies)
    return found


@pytest.mark.parametrize("name", ["one_process", "tp2"])
def test_new_weights_are_taken_between_batches(
    name: str,
    ranks: Callable[[int], Pool],
    weights: list[Path],
    expected: list[list[Continuation]],
) -> None:
    size, layout = LAYOUTS[name]
    found = ranks(size).run(serve, layout, weights[0], change_weights, weights)[0]
    assert (found["loaded"]["id"], found["loaded"]["weight_version"]) == ("second", 7)
    for answer in found["before"]:
        # Whichever they are of, it is what they say, and of nothing else.
        by_second = answer["model"] == "second"
        number = found["before"].index(answer)
        assert_alike([answer], [expected[by_second][number]])
    assert_alike(found["after"], expected[1])
    assert {(one["model"], one["weight_version"]) for one in found["after"]} == {("second", 7)}
    assert found["other"]["status"] == 404
    assert found["other"]["error"]["message"] == "model=first is not served: second is"
    assert "folder=nowhere is no checkpoint" in found["missing"]
    assert [model["id"] for model in found["models"]["data"]] == ["second"]
    assert_alike(found["back"], expected[0])


def load_damaged(
    client: httpx.Client, whole: Path, damaged: Path, other: Path, late: Path
) -> list[Any]:
    first = client.post("/load_weights", json={"folder": str(damaged)})
    first = client.post("/load_weights", json={"folder": str(other)}), first
    still = complete(client, [body(SEQUENCES[0])])[0]
    second = client.post("/load_weights", json={"folder": str(late)})
    after = complete(client, [body(SEQUENCES[0])])[0]
    health = client.get("/health")
    client.post("/load_weights", json={"folder": str(whole)})
    texts = [answer.text for answer in first]
    return [texts, still, second.text, after, health.status_code, client.get("/health").text]


def test_weights_that_fail_halfway_are_never_used(
    ranks: Callable[[int], Pool],
    weights: list[Path],
    expected: list[list[Continuation]],
    tmp_path: Path,
) -> None:
    """A damaged checkpoint and another model are refused before anything is read; a checkpoint that
    lacks a tensor, without a manifest to say so, leaves no weights."""
    damaged, other, late = tmp_path / "damaged", tmp_path / "other", tmp_path / "late"
    shutil.copytree(weights[1], other)
    (other / "manifest.json").unlink()
    described = json.loads((other / "config.json").read_text())
    described["model"]["ffn_hidden_size"] = 64
    (other / "config.json").write_text(json.dumps(described))
    shutil.copytree(weights[1], damaged)
    (file,) = list(damaged.glob("__0_0.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    shutil.copytree(weights[1], late)
    (late / "manifest.json").unlink()
    (late / "__1_0.distcp").unlink()
    folders = weights[0], damaged, other, late
    (found,) = ranks(1).run(serve, Layout(), weights[0], load_damaged, *folders)
    refused, still, failed, after, health, healthy = found
    assert "model.ffn_hidden_size=32 here, 64 there" in refused[0]
    assert "is damaged" in refused[1]
    assert_alike([still], expected[0][:1])
    assert '"code": 400' in failed
    assert after["status"] == health == 503
    assert "no whole weights" in after["error"]["message"]
    assert "ok" in healthy


def hang_up(client: httpx.Client) -> float:
    """Seconds that a caller waits who comes after one that left."""
    url = client.base_url
    long = body(
        replace(SEQUENCES[0], sampling=SamplingParams(temperature=0, max_new_tokens=100_000))
    )
    content = json.dumps(long).encode()
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        time.sleep(0.3)
    started = time.perf_counter()
    (answer,) = complete(client, [body(SEQUENCES[1])])
    assert answer["status"] == 200
    return time.perf_counter() - started


def test_a_caller_who_leaves_frees_a_slot(
    ranks: Callable[[int], Pool], weights: list[Path]
) -> None:
    """The only one, for minutes otherwise."""
    (seconds,) = ranks(1).run(wait_behind, weights[0])
    assert seconds < 30


def wait_behind(path: Path) -> float:
    return serve(Layout(), path, hang_up, slots=1, max_length=100_100)


def test_who_comes_after_the_end_is_told(ranks: Callable[[int], Pool], weights: list[Path]) -> None:
    assert ranks(1).run(ask_after_the_end, weights[0]) == ["the server ends"]


def ask_after_the_end(path: Path) -> str:
    config, loaded = begin(Layout(), path)
    stop = threading.Event()
    service = Service(config, loaded, load_tokenizer(None, config.eod, loaded), stop)
    stop.set()
    service.run()
    return str(service.load(str(path), Weights("late", 1)).exception(timeout=5))
