"""Continuous batching: an answer is the same alone and among any others, and nothing waits for long."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from generation import greedy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storm_jax
from storm_jax.inference.engine import Engine, EngineShape, Request
from storm_jax.inference.generate import Sampling

BLOCK = 64
SHAPE = EngineShape(rows=3, length=256, prompts=1, block=BLOCK, bits=2)
LENGTHS = (5, 32, 40, 64, 65, 150, 200)  # up to one block, and several


@pytest.fixture(scope="module")
def storm(trained_run):
    return storm_jax.load(trained_run)


@pytest.fixture(scope="module")
def table(storm):
    width = storm.config.model.decoder.width
    rng = np.random.default_rng(0)
    return storm._programs._put({"table": rng.standard_normal((2, 48, width), np.float32)})["table"]


def engine_of(storm, shape: EngineShape = SHAPE, steps: int = 1) -> Engine:
    return Engine(storm._programs, shape, pad_id=0, steps=steps)


def request(table, number: int, length: int, **sampling) -> Request:
    """A prompt of random tokens, of which about half are visual."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(1, 300, length).astype(np.int32)
    index = rng.integers(0, 48, length) * (rng.random(length) < 0.5)
    sampling = {"max_new_tokens": 4 + number % 9} | sampling
    return Request(
        tokens=tokens,
        visual_index=np.where(index, index, -1).astype(np.int32),
        table=table,
        scene=number % 2,
        sampling=Sampling(**sampling),
        seed=number,
    )


def requests_of(table, count: int) -> list[Request]:
    """Every third one is sampled."""
    return [
        request(table, number, LENGTHS[number % len(LENGTHS)], temperature=float(number % 3 == 0))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def alone(storm, table) -> list[list[int]]:
    """The answers, each from an engine without other requests."""
    answers = []
    for each in requests_of(table, 14):
        engine = engine_of(storm)
        (done,) = engine.run([each])
        assert engine.is_idle
        answers.append(done.written)
    return answers


def test_greedy_answers_are_those_of_the_whole_prompt_at_once(storm, table, alone):
    from flax import nnx

    programs = storm._programs
    model = nnx.merge(programs._graphdef, programs._params)
    requests, longest = requests_of(table, 14), max(LENGTHS)
    batch = {
        "tokens": np.stack(
            [np.pad(each.tokens, (0, longest - len(each.tokens))) for each in requests]
        ),
        "visual_index": np.stack(
            [
                np.pad(each.visual_index, (0, longest - len(each.tokens)), constant_values=-1)
                for each in requests
            ]
        ),
        "lengths": np.array([len(each.tokens) for each in requests], np.int32),
    }
    visual = np.asarray(table)[[each.scene for each in requests]]
    found = greedy(model, batch, visual, 12, programs.stop_ids)
    for each, answer, expected in zip(requests, alone, found, strict=True):
        if each.sampling.temperature == 0:
            expected = expected[: each.sampling.max_new_tokens]
            assert answer == expected[expected >= 0].tolist()


@pytest.mark.parametrize(
    ("rows", "prompts", "steps"), [(3, 1, 1), (3, 2, 8), (8, 8, 32), (1, 1, 4)]
)
def test_answers_do_not_depend_on_other_requests(storm, table, alone, rows, prompts, steps):
    shape = EngineShape(rows=rows, length=256, prompts=prompts, block=BLOCK, bits=5)
    engine = engine_of(storm, shape, steps)
    requests = requests_of(table, 14)
    order = np.random.default_rng(1).permutation(14)
    done = list(engine.run([requests[number] for number in order]))
    assert len(done) == 14 and set(done) == set(requests)
    assert [each.written for each in requests] == alone
    stops = storm._programs.stop_ids
    for each in requests:
        limit = each.sampling.max_new_tokens
        assert each.finish == ("stop" if each.written[-1] in stops else "length")
        assert each.finish == "stop" or len(each.written) == limit
        assert each.seconds > 0


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_requests_may_come_and_go_at_any_time(storm, table, alone, data):
    engine, requests = engine_of(storm), requests_of(table, 6)
    waiting, cancelled = list(range(6)), set()
    while waiting or not engine.is_idle:
        if waiting and data.draw(st.booleans(), label="submit"):
            engine.submit(requests[waiting.pop(0)])
        if data.draw(st.integers(0, 9), label="cancel") == 0:
            number = data.draw(st.integers(0, 5), label="which")
            if not requests[number].finish and number not in waiting:
                requests[number].cancel()
                cancelled.add(number)
        engine.step()
        assert engine.running <= SHAPE.rows
    for number, each in enumerate(requests):
        if number in cancelled:
            assert each.finish == "cancelled"
            assert each.written == alone[number][: len(each.written)]
        else:
            assert each.written == alone[number]


def test_a_long_prompt_does_not_hold_up_running_answers(storm, table):
    """Every step adds a token to them, and reads one block at most."""
    engine = engine_of(storm)
    running = request(table, 0, 20, max_new_tokens=30, temperature=1.0)
    engine.submit(running)
    engine.step()
    long = request(table, 1, 200, max_new_tokens=8)
    engine.submit(long)
    while not long.written and not running.finish:
        before = len(running.written)
        engine.step()
        assert len(running.written) == before + 1
    assert long.written or running.finish == "stop"


def test_a_cancelled_request_leaves_its_row_within_a_step(storm, table):
    engine = engine_of(storm, EngineShape(rows=1, length=256, prompts=1, block=BLOCK, bits=2))
    first = request(table, 0, 20, max_new_tokens=200, temperature=2.0)
    second = request(table, 1, 20)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert engine.running == 1 and engine.waiting == 1
    first.cancel()
    engine.step()
    assert first.finish == "cancelled" and second.written


def test_nothing_is_compiled_after_all_lengths_have_been_seen(storm, table):
    def run(numbers) -> None:
        rng = np.random.default_rng(0)
        requests = [
            request(
                table,
                int(number),
                int(rng.integers(1, 240)),
                max_new_tokens=int(rng.integers(1, 5)),
                temperature=float(rng.choice([0, 0.5, 1])),
                top_p=float(rng.uniform(0.1, 1)),
            )
            for number in numbers
        ]
        assert len(list(engine.run(requests))) == len(requests)

    engine = engine_of(storm, dataclasses.replace(SHAPE, bits=1))
    for length in (1, 33, 65, 129, 193):
        list(engine.run([request(table, 0, length, max_new_tokens=2)]))
    programs = storm.num_programs
    run(range(200))
    assert storm.num_programs == programs


def test_candidates_are_scored_among_answers(storm, table, alone):
    engine = engine_of(storm)
    scored, written = request(table, 5, 150), requests_of(table, 14)[7]
    scored.candidates = (7, 3, 250)
    assert {each.finish for each in engine.run([scored, written])} <= {"scored", "stop", "length"}
    assert written.written == alone[7] and scored.written == []
    best = request(table, 5, 150, max_new_tokens=1)
    (best,) = engine.run([best])
    best.candidates, (token,) = tuple(range(300)), best.written
    best.finish = ""
    (best,) = engine.run([best])
    assert int(best.scores.argmax()) == token or token >= 300
    np.testing.assert_allclose(scored.scores, best.scores[[7, 3, 250]], atol=1e-4)


@pytest.mark.parametrize(
    ("length", "new", "message"),
    [
        (0, 1, "the prompt is empty"),
        (200, 57, "200 tokens of the prompt and up to 57 of the answer exceed the 256"),
    ],
)
def test_what_does_not_fit_is_refused(storm, table, length, new, message):
    with pytest.raises(ValueError, match=message):
        engine_of(storm).submit(request(table, 0, length, max_new_tokens=new))


@given(
    longest=st.integers(1, 40_000),
    block=st.integers(1, 300).map(lambda n: 32 * n),
    bits=st.integers(1, 5),
)
def test_blocks_hold_every_prompt_that_fits(longest, block, bits):
    shape = EngineShape(rows=1, length=40_000, prompts=1, block=block, bits=bits)
    size, slots = shape.cut(longest)
    assert longest <= slots <= shape.length and 0 < size <= block
    assert slots < 4 * longest + 2 * block
    sizes = {shape.cut(n) for n in range(1, 40_000, 97)}
    assert len(sizes) <= 40 * 2**bits
