"""Generation with states and keys that are kept, against running whole texts again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.errors import NotFinite
from megatron_m1.inference.generation import Generation, Generator
from megatron_m1.inference.load import Loaded
from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence
from megatron_m1.model.build import build_chunks, unwrap
from megatron_m1.model.cache import Cache
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from tests.distributed import Pool
from tests.inference.full_forward import continued
from tests.inference.trained import load_into
from tests.training import small_run

LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one_process": (1, Layout()),
    "tp2": (2, Layout(tp=2, sequence_parallel=False)),
    "tp2_sp": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2)),
    "ep2": (2, Layout(ep=2)),
    "ep2_overlap": (2, Layout(ep=2, moe_overlap_groups=2)),
    "etp2": (2, Layout(etp=2)),
    "dp2": (2, Layout()),
    "cp2": (2, Layout(cp=2)),
    "tp2_pp2": (4, Layout(tp=2, pp=2)),
    "tp2_etp2_ep2": (4, Layout(tp=2, etp=2, ep=2)),
}
STOP = 7
SAMPLINGS = [
    SamplingParams(temperature=0, max_new_tokens=9),
    SamplingParams(temperature=2, max_new_tokens=12),
    SamplingParams(temperature=1.5, top_k=20, max_new_tokens=3),
    SamplingParams(temperature=2, top_p=0.8, max_new_tokens=8),
    SamplingParams(temperature=3, top_k=40, top_p=0.9, max_new_tokens=11),
]
# Prompts of one token, shorter and longer than a piece, more of them than slots.
SEQUENCES = [
    Sequence(tuple(np.random.RandomState(length).randint(64, size=length)), sampling, 5, length, 1)
    for length, sampling in zip((1, 23, 5, 40, 9), SAMPLINGS, strict=True)
]


def small_chunks() -> list[torch.nn.Module]:
    return build_chunks(small_run.MODEL, transformer_config(small_run.MODEL, Layout()), seed=1)


def run(generator: Generator, *arguments: Any) -> list[Continuation]:
    """What became of the sequences, in their order."""
    found = dict(generator.run(*arguments))
    return [found[number] for number in sorted(found)]


def generated(layout: Layout, checkpoint: Path) -> list[Continuation]:
    loaded = load_into(layout, checkpoint)
    generator = Generator(
        loaded.chunks, slots=2, prefill_tokens=16, stop_token=STOP, record_experts=True
    )
    return run(generator, SEQUENCES)


def by_full_forward(checkpoint: Path) -> list[Continuation]:
    (chunk,) = load_into(Layout(), checkpoint).chunks
    return [continued(chunk, sequence, STOP) for sequence in SEQUENCES]


@pytest.fixture(scope="module")
def expected(ranks: Callable[[int], Pool], checkpoint: Path) -> list[Continuation]:
    (found,) = ranks(1).run(by_full_forward, checkpoint)
    return found


def assert_alike(found: list[Continuation], expected: list[Continuation]) -> None:
    """Equal in all but the last bits of the log-probabilities."""
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish, one.versions) == (
            other.tokens,
            other.finish,
            other.versions,
        )
        for name in ("logprobs", "raw_logprobs"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_generates_what_whole_texts_give(
    name: str, ranks: Callable[[int], Pool], checkpoint: Path, expected: list[Continuation]
) -> None:
    size, layout = LAYOUTS[name]
    assert {one.finish for one in expected} == {"stop", "length"}
    for found in ranks(size).run(generated, layout, checkpoint):
        assert_alike(found, expected)
        for one, other in zip(found, expected, strict=True):
            # The order of a token's experts is that of their probability, which may be a tie.
            assert torch.equal(one.experts.sort().values, other.experts.sort().values)


@pytest.fixture(scope="module")
def chunks(single_process: Layout) -> list[torch.nn.Module]:
    return small_chunks()


@pytest.fixture(scope="module")
def alone(chunks: list[torch.nn.Module]) -> list[Continuation]:
    """Each sequence by itself."""
    return [run(Generator(chunks), [sequence])[0] for sequence in SEQUENCES]


@pytest.mark.parametrize(("slots", "prefill"), [(1, 1), (2, 3), (3, 7), (5, 64), (16, 1000)])
def test_no_batch_or_piece_changes_a_response(
    slots: int, prefill: int, chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    generator = Generator(chunks, slots=slots, prefill_tokens=prefill)
    assert_alike(run(generator, SEQUENCES), alone)
    backwards = run(generator, SEQUENCES[::-1])
    assert_alike(backwards[::-1], alone)


def test_members_of_a_group_differ(chunks: list[torch.nn.Module]) -> None:
    group = [replace(SEQUENCES[1], index=index) for index in range(4)]
    found = run(Generator(chunks), group)
    assert len({tuple(one.tokens) for one in found}) == 4
    assert run(Generator(chunks), [replace(group[2], seed=6)])[0].tokens != found[2].tokens


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill slots with NaN when they are made, and whenever another sequence takes one."""
    empty, clear = Cache.of, Cache.clear

    def of(*arguments: Any) -> Cache:
        cache = empty(*arguments)
        for pool in pools(cache):
            pool.fill_(torch.nan)
        return cache

    def poisoned_clear(cache: Cache, slot: int) -> None:
        for pool in pools(cache):
            pool[slot].fill_(torch.nan)
        clear(cache, slot)

    monkeypatch.setattr(Cache, "of", of)
    monkeypatch.setattr(Cache, "clear", poisoned_clear)


def pools(cache: Cache) -> list[torch.Tensor]:
    keys_values = (pool for layer in cache.keys_values.values() for pool in layer)
    return [*cache.states.values(), *keys_values]


def test_what_another_sequence_left_is_never_used(
    chunks: list[torch.nn.Module], alone: list[Continuation], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    generator = Generator(chunks, slots=2, prefill_tokens=5)
    paused = run(generator, SEQUENCES, 1)
    assert generator.paused
    resumed = [replace(s, begun=one) for s, one in zip(SEQUENCES, paused, strict=True)]
    assert_alike(run(generator, resumed), alone)


def with_pauses(generator: Generator, forget: bool) -> list[Continuation]:
    """SEQUENCES, paused whenever one of them finishes."""
    finished: dict[int, Continuation] = {}
    waiting = dict(enumerate(SEQUENCES))
    while waiting:
        numbers = list(waiting)
        for place, one in generator.run(list(waiting.values()), 1):
            if one.finish == "paused":
                waiting[numbers[place]] = replace(SEQUENCES[numbers[place]], begun=one)
            else:
                finished[numbers[place]] = one
                del waiting[numbers[place]]
        if forget:
            generator.weights_changed(generator.version)
    return [finished[number] for number in sorted(finished)]


@pytest.mark.parametrize("forget", [False, True])
def test_a_pause_changes_nothing(
    forget: bool, chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    """Whether the state was kept, or the tokens are read again."""
    generator = Generator(chunks, slots=2, prefill_tokens=8, record_experts=True)
    found = with_pauses(generator, forget)
    assert_alike(found, alone)
    unbroken = run(Generator(chunks, record_experts=True), SEQUENCES)
    for one, other in zip(found, unbroken, strict=True):
        assert torch.equal(one.experts, other.experts)


def paused_in_layout(layout: Layout, checkpoint: Path, forget: bool) -> list[Continuation]:
    loaded = load_into(layout, checkpoint)
    return with_pauses(Generator(loaded.chunks, slots=2, prefill_tokens=8), forget)


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("name", ["dp2", "tp2_pp2"])
def test_a_pause_changes_nothing_in_any_layout(
    name: str, forget: bool, ranks: Callable[[int], Pool], checkpoint: Path
) -> None:
    size, layout = LAYOUTS[name]
    (whole,) = ranks(1).run(paused_in_layout, Layout(), checkpoint, False)
    for found in ranks(size).run(paused_in_layout, layout, checkpoint, forget):
        assert_alike(found, whole)


def test_a_kept_state_is_read_instead_of_tokens(chunks: list[torch.nn.Module]) -> None:
    generator = Generator(chunks)
    short = replace(SEQUENCES[0], sampling=SamplingParams(max_new_tokens=1))
    _, paused = run(generator, [short, SEQUENCES[3]], 1)
    assert paused.finish == "paused" and paused.tokens
    (kept,) = generator.paused.values()
    for state in kept.saved.states.values():
        state.fill_(torch.nan)
    with pytest.raises(NotFinite, match="logits are not finite"):
        run(generator, [replace(SEQUENCES[3], begun=paused)])


def test_a_kept_state_belongs_to_its_tokens(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    """Another response of the same name, as after a restart, starts anew."""
    generator = Generator(chunks)
    short = replace(SEQUENCES[0], sampling=SamplingParams(max_new_tokens=1))
    run(generator, [short, SEQUENCES[3]], 1)
    (kept,) = generator.paused.values()
    for state in kept.saved.states.values():
        state.fill_(torch.nan)
    assert_alike(run(generator, [SEQUENCES[3]]), alone[3:4])
    assert not generator.paused


def test_new_weights_start_from_nothing_old(single_process: Layout) -> None:
    chunks = small_chunks()
    generator = Generator(chunks)
    short = replace(SEQUENCES[0], sampling=SamplingParams(max_new_tokens=1))
    _, paused = run(generator, [short, SEQUENCES[3]], 1)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.1)
    generator.weights_changed(1)
    (found,) = run(generator, [replace(SEQUENCES[3], begun=paused)])
    (fresh,) = run(Generator(chunks), [replace(SEQUENCES[3], begun=paused)])
    drawn = len(paused.tokens)
    assert found.versions == [0] * drawn + [1] * (len(found.tokens) - drawn)
    assert (found.tokens, found.logprobs) == (fresh.tokens, fresh.logprobs)
    assert found.logprobs[:drawn] == paused.logprobs


def test_a_response_ends_at_the_stop_token(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    stop = alone[1].tokens[4]
    (found,) = run(Generator(chunks, stop_token=stop), [SEQUENCES[1]])
    assert found.finish == "stop"
    assert found.tokens == alone[1].tokens[: alone[1].tokens.index(stop) + 1]


def test_a_response_that_repeats_itself_is_cut_short(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    """After the first run of three tokens that are all likelier than the median."""
    logprobs = alone[1].raw_logprobs
    threshold = float(np.exp(np.median(logprobs)))
    runs = [min(logprobs[end - 2 : end]) > np.log(threshold) for end in range(2, len(logprobs))]
    end = runs.index(True) + 2
    sampling = replace(SEQUENCES[1].sampling, repetition_length=2, repetition_probability=threshold)
    (found,) = run(Generator(chunks), [replace(SEQUENCES[1], sampling=sampling)])
    assert (found.finish, found.tokens) == ("repetition", alone[1].tokens[:end])
    # The run goes on over a pause within it.
    begun = Continuation(
        *(values[: end - 1] for values in (alone[1].tokens, alone[1].logprobs, logprobs)),
        versions=[0] * (end - 1),
    )
    (resumed,) = run(Generator(chunks), [replace(SEQUENCES[1], sampling=sampling, begun=begun)])
    assert (resumed.finish, resumed.tokens) == ("repetition", found.tokens)


def test_a_response_that_has_all_its_tokens_is_not_continued(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    full = replace(SEQUENCES[0], begun=replace(alone[0], finish="paused"))
    (found,) = run(Generator(chunks), [full])
    assert (found.finish, found.tokens) == ("length", alone[0].tokens)


def test_tokens_come_as_they_are_drawn(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    tokens: Iterator[int] = Generator(chunks).tokens(SEQUENCES[1])
    assert next(tokens) == alone[1].tokens[0]
    assert list(tokens) == alone[1].tokens[1:]


@pytest.fixture
def untrained(single_process: Layout) -> Loaded:
    model = replace(small_run.MODEL, vocab_size=300)
    return Loaded(model, build_chunks(model, transformer_config(model, Layout()), seed=1), Path())


def test_a_response_ends_with_a_stop_text(untrained: Loaded) -> None:
    """Also one that several tokens spell, some of them before a pause."""
    tokenizer = train_bpe(["naive"], 300)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=40)
    sequence = Sequence((3, 4), sampling, seed=2)
    generator = Generator(untrained.chunks, tokenizer=tokenizer)
    (whole,) = run(generator, [sequence])
    texts = [tokenizer.decode(whole.tokens[:end]) for end in range(len(whole.tokens) + 1)]
    # Characters that are whole in themselves.
    place = next(n for n in range(4, 40) if texts[n + 2][-3:].isascii())
    stop = texts[place + 2][-3:]
    end = next(n for n, text in enumerate(texts) if stop in text)
    sampling = replace(sampling, stop=("never there", stop))
    (found,) = run(generator, [replace(sequence, sampling=sampling)])
    assert (found.finish, found.tokens) == ("stop", whole.tokens[:end])
    begun = Continuation(
        *(values[: end - 1] for values in (whole.tokens, whole.logprobs, whole.raw_logprobs)),
        versions=[0] * (end - 1),
    )
    (resumed,) = run(generator, [replace(sequence, sampling=sampling, begun=begun)])
    assert (resumed.finish, resumed.tokens) == ("stop", found.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "sequence 1 has no prompt"),
        ({"prompt": (64,)}, r"sequence 1 has ids outside the vocabulary 0\.\.63"),
        ({"prompt": (-1,)}, "sequence 1 has ids outside"),
        ({"sampling": SamplingParams(stop=("a",))}, "sequence 1 has stop texts, which need a tok"),
        ({"sampling": SamplingParams(top_p=0)}, "sequence 1: sampling.top_p=0 must be above 0"),
    ],
)
def test_what_cannot_be_continued(
    changes: dict[str, Any], message: str, chunks: list[torch.nn.Module]
) -> None:
    with pytest.raises(ValueError, match=message):
        run(Generator(chunks), [SEQUENCES[0], replace(SEQUENCES[1], **changes)])


def test_sequences_come_and_go_while_others_are_drawn(
    chunks: list[torch.nn.Module], alone: list[Continuation]
) -> None:
    """One leaves its slot, one the queue."""
    generation = Generation(Generator(chunks, slots=2, prefill_tokens=5), slots=2, places=64)
    numbers = [generation.add(sequence) for sequence in SEQUENCES[:4]]
    found = dict(generation.step())
    generation.drop(numbers[1])
    generation.drop(numbers[3])
    last = generation.add(SEQUENCES[4])
    while generation.unfinished:
        found |= dict(generation.step())
    assert sorted(found) == [numbers[0], numbers[2], last]
    assert_alike([found[n] for n in sorted(found)], [alone[0], alone[2], alone[4]])


def test_no_sequences_are_no_work(chunks: list[torch.nn.Module]) -> None:
    assert run(Generator(chunks), []) == []


def test_weights_that_are_not_numbers_are_found(single_process: Layout) -> None:
    chunks = small_chunks()
    unwrap(chunks[0]).decoder.final_layernorm.weight.data.fill_(torch.nan)
    with pytest.raises(NotFinite, match="logits are not finite"):
        run(Generator(chunks), SEQUENCES)
