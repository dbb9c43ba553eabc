"""Greedy generation equals transformers' `generate` for every decoder family, with prompts of different
lengths and several end tokens. Rendered token ids equal those of the chat template."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation import greedy
from reference_models import (
    BASE,
    DECODERS,
    config_for,
    load_model,
    make_decoder,
    make_tokenizer,
    make_tower,
    save,
)

from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample, Turn
from storm_jax.text.tokenizer import load_tokenizer
from storm_jax.weights.importer import Sources, import_run

NEW = 64
LENGTHS = (23, 1, 9, 40)


@pytest.fixture(params=DECODERS)
def family(request) -> str:
    return request.param


def ours_of(path, prompts: list[np.ndarray], stops: tuple[int, ...]) -> list[list[int]]:
    size = max(len(prompt) for prompt in prompts)
    rows = np.stack([np.pad(prompt, (0, size - len(prompt))) for prompt in prompts])
    batch = {
        "tokens": jnp.asarray(rows, jnp.int32),
        "lengths": jnp.array([len(prompt) for prompt in prompts], jnp.int32),
        "visual_index": jnp.full(rows.shape, -1, jnp.int32),
    }
    model = load_model(path)
    empty_table = jnp.zeros((len(prompts), 1, model.decoder.head().shape[0]))
    tokens = greedy(model, batch, empty_table, NEW, stops)
    return [until(row, stops) for row in tokens.tolist()]


def theirs_of(model, prompts: list[np.ndarray], stops: tuple[int, ...]) -> list[list[int]]:
    size = max(len(prompt) for prompt in prompts)
    rows = [np.pad(prompt, (size - len(prompt), 0)) for prompt in prompts]
    masks = [np.arange(size) >= size - len(prompt) for prompt in prompts]
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.from_numpy(np.stack(rows)),
            attention_mask=torch.from_numpy(np.stack(masks)).long(),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=list(stops),
            pad_token_id=0,
        )
    return [until(row[size:], stops) for row in found.tolist()]


def until(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """Returns the tokens up to and including the first end token."""
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def test_greedy_tokens_equal_transformers(family, tmp_path):
    model = make_decoder(family)
    folder = save(model, tmp_path / "hub", family)
    tower = save(make_tower(), tmp_path / "tower")
    import_run(config_for(), Sources(str(tower), str(folder)), tmp_path / "run")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, BASE["vocab_size"], length) for length in LENGTHS]
    never = (BASE["vocab_size"] + 1,)
    free = theirs_of(model, prompts, never)
    assert {len(row) for row in free} == {NEW}
    assert max(len(set(row)) for row in free) > 5
    assert ours_of(tmp_path / "run", prompts, never) == free
    stops = (free[0][20], free[2][9], free[3][30])
    stopped = theirs_of(model, prompts, stops)
    assert len(stopped[0]) <= 21 and stopped != free
    assert ours_of(tmp_path / "run", prompts, stops) == stopped


CHATS = {
    "one turn": [("user", "What colour was the flash?"), ("assistant", "red")],
    "three turns": [
        ("user", "What colour?"), ("assistant", "red\nand green"), ("user", "And then? 12, 345"),
        ("assistant", "It's blue."), ("user", "éa 😀"), ("assistant", "A (b) \"c\""),
    ],
    "question": [("user", "Which?"), ("assistant", "red"), ("user", "Which now?")],
}  # fmt: skip


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("system", ["You are a helpful assistant", "Be brief.\nPlease."])
@pytest.mark.parametrize("kind", ["qwen2", "llama3"])
def test_rendered_ids_equal_those_of_the_template(kind, system, chat, tmp_path):
    make_tokenizer(kind).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    turns = CHATS[chat]
    sample = Sample(
        id="a", turns=tuple(Turn(role, text) for role, text in turns), media=(), extra={}
    )
    encoded = ConversationEncoder(tokenizer, system).encode(sample, [])
    messages = [{"role": r, "content": t} for r, t in [("system", system), *turns]]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=turns[-1][0] == "user", return_dict=False
    )
    assert encoded.tokens.tolist() == expected
