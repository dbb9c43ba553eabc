"""Conversations: the loss covers exactly answers and their end markers, a prompt equals what training
sees before the answer, and visual tokens replace their placeholders."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import unicodedata

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.config import ConfigError
from storm_jax.media.media import Media
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.conversation import ConversationEncoder, Encoded
from storm_jax.text.sample import Sample, SampleError, Turn
from storm_jax.text.tokenizer import load_tokenizer, stop_ids

PROPERTY = settings(max_examples=60, derandomize=True, database=None)
EOS = "<|im_end|>"
LOOK_ALIKES = (
    EOS, "<|im_start|>assistant\n", "<|endoftext|>", "<|im_end>", "<images>", "< image>", "<IMAGE>",
    "assistant\n", "<|im_start|>", "{{ messages }}", "{% for", "[INST]",
)  # fmt: skip

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
messages = st.lists(st.one_of(words, st.sampled_from(LOOK_ALIKES)), max_size=4).map("".join)
answers = messages.filter(lambda text: text.strip())
dialogues = st.lists(st.tuples(messages, answers), min_size=1, max_size=3)


def sample_of(*pairs: tuple[str, str], system: str = "", media: int = 0) -> Sample:
    turns = [Turn("system", system)] if system else []
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    files = tuple(Media.file("image", f"{i}.png") for i in range(media))
    return Sample(id="a", turns=tuple(turns), media=files, extra={})


def stretches(tokenizer, encoded: Encoded) -> list[tuple[bool, str]]:
    """Text of each stretch of tokens with equal loss mask, without visual tokens."""
    text = encoded.media < 0
    pairs = zip(encoded.answer[text].tolist(), encoded.tokens[text].tolist(), strict=True)
    return [
        (trained, tokenizer.decode([token for _, token in group]))
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def normal(text: str) -> str:
    """What the tokenizer stores of a text: the NFC of everything between special tokens."""
    pieces = re.split(r"(<\|im_end\|>|<\|im_start\|>|<\|endoftext\|>)", text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def chatml(*pairs: tuple[str, str], system: str = "") -> list[tuple[bool, str]]:
    """The expected stretches in ChatML, written by hand."""
    before = f"<|im_start|>system\n{system}{EOS}\n" if system else ""
    expected = []
    for question, answer in pairs:
        before += f"<|im_start|>user\n{question}{EOS}\n<|im_start|>assistant\n"
        expected += [(False, before), (True, answer + EOS)]
        before = "\n"
    return [(trained, normal(text)) for trained, text in [*expected, (False, before)]]


# Loss.


@pytest.mark.parametrize("system", ["", "You are a helpful assistant"])
@pytest.mark.parametrize(
    "pairs",
    [
        [("Which way?", "left")],
        [("Which way?", "left\nand then\n\nright")],
        [("Which way?", "  left \n")],
        [("Which way?", "left"), ("And then?", "right"), ("And then?", "left\nagain")],
        [("left", "left"), ("left", "left")],
        [("user\nassistant", "assistant\nuser")],
        [("a <|im_end|> b", "c <|im_end|> d")],
        [("<|im_start|>assistant\nright<|im_end|>", "left<|im_end|>")],
        [("<images> < image>", "<video/> <IMAGE>")],
        [("", "left")],
        [("é 😀 \u0301", "ä\u0308")],
    ],
)
def test_loss_covers_exactly_answers_and_end_markers(tokenizer, system: str, pairs: list):
    encoded = ConversationEncoder(tokenizer, system).encode(sample_of(*pairs), [])
    assert stretches(tokenizer, encoded) == chatml(*pairs, system=system)


@PROPERTY
@given(pairs=dialogues, system=st.sampled_from(["", "Be brief."]))
def test_loss_covers_exactly_the_answers_of_any_text(tokenizer, pairs: list, system: str):
    encoded = ConversationEncoder(tokenizer, system).encode(sample_of(*pairs), [])
    assert stretches(tokenizer, encoded) == chatml(*pairs, system=system)


def test_end_marker_is_one_trained_token(tokenizer):
    encoded = ConversationEncoder(tokenizer, "").encode(sample_of(("Why?", "So.")), [])
    trained = encoded.tokens[encoded.answer]
    assert trained[-1] == tokenizer.eos_token_id
    assert (trained[:-1] != tokenizer.eos_token_id).all()


def test_sample_with_its_own_system_prompt_keeps_it(tokenizer):
    encoder = ConversationEncoder(tokenizer, "You are a helpful assistant")
    encoded = encoder.encode(sample_of(("Why?", "So."), system="Be brief."), [])
    assert stretches(tokenizer, encoded) == chatml(("Why?", "So."), system="Be brief.")


def test_arrays_have_equal_lengths_and_documented_types(tokenizer):
    encoded = ConversationEncoder(tokenizer, "").encode(sample_of(("Why?", "So.")), [])
    assert [a.dtype for a in (encoded.tokens, encoded.answer, encoded.media)] == [
        np.int32, np.bool_, np.int32,
    ]  # fmt: skip
    assert len(encoded) == len(encoded.tokens) == len(encoded.answer) == len(encoded.media)


# Prompts.


@PROPERTY
@given(pairs=dialogues, system=st.sampled_from(["", "Be brief."]))
def test_prompt_is_what_training_sees_before_the_last_answer(tokenizer, pairs: list, system: str):
    sample, encoder = sample_of(*pairs), ConversationEncoder(tokenizer, system)
    prompt, full = encoder.encode(sample.prompt(), []), encoder.encode(sample, [])
    size = len(prompt)
    np.testing.assert_array_equal(prompt.tokens, full.tokens[:size])
    np.testing.assert_array_equal(prompt.answer, full.answer[:size])
    assert not full.answer[size - 1] and full.answer[size]
    trained = full.tokens[size:][full.answer[size:]]
    assert tokenizer.decode(trained) == normal(sample.answer() + EOS)


def test_prompt_with_media_is_a_prefix_too(tokenizer):
    sample = sample_of(("<image> and\n<image>?", "So."), ("Why?", "Because."), media=2)
    encoder = ConversationEncoder(tokenizer, "")
    prompt, full = encoder.encode(sample.prompt(), [[5], [3]]), encoder.encode(sample, [[5], [3]])
    for name in ("tokens", "answer", "media"):
        start = getattr(full, name)[: len(prompt)]
        np.testing.assert_array_equal(getattr(prompt, name), start)


# Visual slots.


@pytest.mark.parametrize(
    ("question", "counts"),
    [
        ("<image>", [4]),
        ("<image>\nWhy?", [1]),
        ("Why? <video>", [9]),
        ("<image><image>", [2, 3]),
        ("One <image> two\n<video> three <image>!", [3, 7, 1]),
    ],
)
def test_visual_slots_replace_the_placeholder(tokenizer, question: str, counts: list):
    sample = sample_of((question, "So."), media=len(counts))
    encoded = ConversationEncoder(tokenizer, "Be brief.").encode(
        sample, [[count] for count in counts]
    )
    expected_tokens, expected_media = [], []
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    pieces = re.split("<image>|<video>", start + question + EOS + "\n<|im_start|>assistant\n")
    for i, piece in enumerate([*pieces, "So." + EOS, "\n"]):
        if 0 < i <= len(counts):
            expected_tokens += [tokenizer.pad_token_id] * counts[i - 1]
            expected_media += [i - 1] * counts[i - 1]
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        expected_tokens += ids
        expected_media += [-1] * len(ids)
    assert encoded.media.tolist() == expected_media
    assert encoded.tokens.tolist() == expected_tokens
    assert stretches(tokenizer, encoded)[1] == (True, "So." + EOS)


def test_media_of_later_turns_keep_their_order_and_carry_no_loss(tokenizer):
    sample = sample_of(("<image>?", "As shown."), ("<image> and <video>?", "So."), media=3)
    encoded = ConversationEncoder(tokenizer, "").encode(sample, [[2], [3], [4]])
    slots = encoded.media[encoded.media >= 0]
    assert slots.tolist() == [0] * 2 + [1] * 3 + [2] * 4
    assert not encoded.answer[encoded.media >= 0].any()
    trained = tokenizer.decode(encoded.tokens[encoded.answer])
    assert trained == f"As shown.{EOS}So.{EOS}"


@pytest.mark.parametrize("media", [0, 1])
def test_placeholders_in_answers_are_text(tokenizer, media):
    asked = "<image>?" if media else "Which tags?"
    sample = sample_of((asked, "<video> and <image>"), media=media)
    encoded = ConversationEncoder(tokenizer, "").encode(sample, [[2]] * media)
    assert (encoded.media >= 0).sum() == 2 * media
    trained = tokenizer.decode(encoded.tokens[encoded.answer])
    assert trained == f"<video> and <image>{EOS}"


def test_answers_of_weight_zero_carry_no_loss(tokenizer):
    sample = sample_of(("Q1", "bad"), ("Q2", "good"))
    turns = [dataclasses.replace(turn, trained=turn.text != "bad") for turn in sample.turns]
    encoder = ConversationEncoder(tokenizer, "")
    encoded = encoder.encode(dataclasses.replace(sample, turns=tuple(turns)), [])
    np.testing.assert_array_equal(encoded.tokens, encoder.encode(sample, []).tokens)
    assert tokenizer.decode(encoded.tokens[encoded.answer]) == f"good{EOS}"


def test_placeholder_never_reaches_the_tokenizer(tokenizer):
    encoder = ConversationEncoder(tokenizer, "")
    encoded = encoder.encode(sample_of(("<image>Why?", "So."), media=1), [[0]])
    assert "image" not in tokenizer.decode(encoded.tokens)


def test_placeholder_in_the_system_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="system"):
        ConversationEncoder(tokenizer, "Look at <image>").encode(sample_of(("Why?", "So.")), [])


# Other templates.


def with_template(template: str) -> transformers.PreTrainedTokenizerBase:
    trained = train_tokenizer(["Which way? left"], 280)
    trained.chat_template = template
    return trained


INST = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }} <|im_end|>"
    "{% endif %}{% endfor %}"
)


def test_template_that_trims_and_has_no_opening_is_followed():
    trained = with_template(INST)
    encoded = ConversationEncoder(trained, "").encode(sample_of(("a", " b "), ("c", "d")), [])
    assert stretches(trained, encoded) == [
        (False, "[INST] a [/INST]"), (True, f" b {EOS}"),
        (False, "[INST] c [/INST]"), (True, f" d {EOS}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",  # modifies answers
        "{% for m in messages %}{{ '>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}opening{% endif %}",  # the generation prompt is not part of the answer's turn
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}!{% endif %}",  # drops earlier turns
        INST.replace(" <|im_end|>", "\n"),  # no end marker
    ],
)
def test_template_that_does_not_continue_its_prompt_is_a_sample_error(template: str):
    encoder = ConversationEncoder(with_template(template), "")
    with pytest.raises(SampleError) as caught:
        encoder.encode(sample_of(("a", "b"), ("c", "d")), [])
    assert caught.value.cause == "template"


# Loading.


def test_loaded_tokenizer_encodes_as_the_trained_one(tmp_path: pathlib.Path):
    trained = train_tokenizer(["Which way? left"], 280)
    trained.save_pretrained(tmp_path)
    text = "Which way? left <|im_end|>"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == trained(text)["input_ids"]


def test_damaged_tokenizer_is_refused_by_name(tmp_path: pathlib.Path):
    train_tokenizer(["Which way? left"], 280).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ConfigError, match=f"{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", ["<|endoftext|>", None])
def test_the_template_determines_what_ends_an_answer(tmp_path: pathlib.Path, eos: str | None):
    """Base Qwen2 has the eos_token <|endoftext|> but a ChatML template."""
    trained = train_tokenizer(["Which way? left"], 280)
    trained.eos_token = eos
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    encoded = ConversationEncoder(loaded, "").encode(sample_of(("Why?", "So.")), [])
    assert stretches(loaded, encoded) == chatml(("Why?", "So."))
    turn, document = loaded.convert_tokens_to_ids([EOS, "<|endoftext|>"])
    assert stop_ids(tmp_path, loaded) == ((turn, document) if eos else (turn,))
    for listed, expected in ((document, {turn, document}), ([7, turn], {turn, 7})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        found = stop_ids(tmp_path, loaded)
        assert set(found) == expected | ({document} if eos else set())
        assert found[0] == turn


def test_a_missing_pad_token_is_replaced(tmp_path: pathlib.Path):
    """Llama 3 has no pad token."""
    trained = train_tokenizer(["Which way? left"], 280)
    trained.pad_token = None
    trained.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == EOS


THINKING = (  # like Qwen3: an empty thought before the last answer only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "generation would never stop"),
        (THINKING, "as a continuation of its prompt"),
        ("{{ raise_exception('not like this') }}", "not like this"),
        ("{% for m in messages %}", "unexpected|Unexpected"),
    ],
)
def test_unusable_template_is_refused_by_name(
    tmp_path: pathlib.Path, template: str | None, message: str
):
    trained = train_tokenizer(["a"], 259)
    trained.chat_template = template
    trained.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_template_with_a_date_renders_the_same_every_day():
    """Llama 3.2's template reads the clock if no date is passed."""
    clock = "{% set date_string = strftime_now('%d %b %Y') %}"
    trained = with_template(
        "{% if date_string is not defined %}" + clock + "{% endif %}{{ date_string }}" + INST
    )
    encoded = ConversationEncoder(trained, "").encode(sample_of(("a", "b")), [])
    assert stretches(trained, encoded)[0] == (False, "26 Jul 2024[INST] a [/INST]")


@pytest.mark.parametrize(
    ("start", "message"),
    [("{{ raise_exception('no system') }}", "no system"), ("", "drops the system turn")],
)
def test_a_system_text_that_the_template_cannot_render_is_refused(start: str, message: str):
    checked = "{% if messages[0]['role'] == 'system' %}" + start + "{% endif %}"
    trained = with_template(checked + INST)
    with pytest.raises(ConfigError, match=rf"data.system='Be brief.*{message}"):
        ConversationEncoder(trained, "Be brief.")
    ConversationEncoder(trained, "")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match=f"{tmp_path} contains no tokenizer"):
        load_tokenizer(tmp_path)


# Templates that place the media themselves.

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
)
IMAGES_FIRST = PARTS.replace(
    "{% for part in m['content'] %}",
    "{% for part in m['content'] | sort(attribute='type') %}",
)


def test_a_template_of_parts_places_the_media():
    tokenizer = with_template(PARTS)
    encoder = ConversationEncoder(tokenizer, "Be brief.")
    sample = sample_of(("<image>\n<image>\nWhich way?", "left"), ("And then?", "up"), media=2)
    encoded = encoder.encode(sample, [[2], [3]])
    assert (encoded.media == 0).sum() == 2 and (encoded.media == 1).sum() == 3
    assert [text for _, text in stretches(tokenizer, encoded)] == [
        "<|im_start|>System: Be brief.<|im_end|>\n<|im_start|>User:Which way?<|im_end|>\n<|im_start|>Assistant:",
        " left<|im_end|>", "\n<|im_start|>User: And then?<|im_end|>\n<|im_start|>Assistant:",
        " up<|im_end|>", "\n",
    ]  # fmt: skip
    prompt = encoder.encode(sample.prompt(), [[2], [3]])
    np.testing.assert_array_equal(prompt.tokens, encoded.tokens[: len(prompt)])


@pytest.mark.parametrize(
    ("template", "text", "rendered"),
    [
        (IMAGES_FIRST, "<video>\n<image>\nWhy?", "the prompt has <image>, <video>, and not <video>, <image>"),
        (PARTS.replace("{{ '<' + part['type'] + '>' }}", "{{ '<image>' if part['type'] == 'image' }}"),
         "<video>\n<image>\nWhy?", "the prompt has <image>, and not <video>, <image>"),
    ],
)  # fmt: skip
def test_a_template_that_moves_or_drops_media_is_rejected(template, text, rendered):
    encoder = ConversationEncoder(with_template(template), "")
    sample = sample_of((text, "So."), media=2)
    with pytest.raises(SampleError, match=rendered):
        encoder.encode(sample, [[2], [3]])
