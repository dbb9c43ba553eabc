"""The trained tokenizer is deterministic and lossless, never splits special tokens, and stays within its
vocabulary size."""

from __future__ import annotations

import json
import pathlib
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.data import tokenizer as module
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.tokenizer import load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = ["What colour was the flash?", "Which way did the shape move?", "red, green, blue"] * 4
PROPERTY = settings(max_examples=80, derandomize=True, database=None)

texts = st.text(st.characters(exclude_categories=["Cs"]))
texts_with_specials = st.lists(st.one_of(texts, st.sampled_from(SPECIAL))).map("".join)
TRAINED = train_tokenizer(TEXTS, 300)


def ids(text: str) -> list[int]:
    return TRAINED(text, add_special_tokens=False)["input_ids"]


def normal(text: str) -> str:
    """The NFC of everything except special tokens, which is what the tokenizer stores."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def test_training_is_deterministic():
    again = train_tokenizer(TEXTS, 300)
    assert again.backend_tokenizer.to_str() == TRAINED.backend_tokenizer.to_str()
    other = train_tokenizer([text[::-1] for text in TEXTS], 300)
    assert other.backend_tokenizer.to_str() != TRAINED.backend_tokenizer.to_str()


def test_saved_tokenizer_is_the_same(tmp_path: pathlib.Path):
    TRAINED.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "What colour was the <|im_end|> flash? é😀 \n 12"
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids(text)
    assert loaded.get_vocab() == TRAINED.get_vocab()
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert loaded.chat_template == TRAINED.chat_template


@PROPERTY
@given(texts)
def test_any_text_round_trips(text: str):
    assert TRAINED.decode(ids(text)) == unicodedata.normalize("NFC", text)


@PROPERTY
@given(texts_with_specials)
def test_special_tokens_are_never_split(text: str):
    found = ids(text)
    for special in SPECIAL:
        assert found.count(TRAINED.convert_tokens_to_ids(special)) == text.count(special)
    assert TRAINED.decode(found) == normal(text)


@PROPERTY
@given(texts_with_specials)
def test_ids_are_inside_the_vocabulary(text: str):
    assert all(0 <= token < len(TRAINED) for token in ids(text))


@pytest.mark.parametrize(
    "text", [" a ,b .", "do n't", "\r\n\t ", "\0", "a\u200db", "  x", "\u0344"]
)
def test_awkward_text_round_trips(text: str):
    assert TRAINED.decode(ids(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("size", [259, 270, 300, 512])
def test_vocabulary_is_bounded(size: int):
    trained = train_tokenizer(TEXTS, size)
    assert 259 <= len(trained) <= size
    assert size == 512 or len(trained) == size  # these texts are too small for 512
    assert sorted(trained.get_vocab().values()) == list(range(len(trained)))


def test_smallest_vocabulary_still_round_trips():
    trained = train_tokenizer(TEXTS, 259)
    text = "colour é😀"
    assert trained.decode(trained(text, add_special_tokens=False)["input_ids"]) == text


def test_words_of_the_training_text_have_few_tokens():
    assert len(ids("What colour was the flash?")) < len("What colour was the flash?") / 2


def test_digits_are_separate_tokens():
    trained = train_tokenizer(["2024 2024 2024"] * 50, 300)
    assert len(trained("2024", add_special_tokens=False)["input_ids"]) == 4


def test_special_tokens_are_marked_as_special():
    assert set(TRAINED.all_special_tokens) == set(SPECIAL)
    assert TRAINED.decode(ids("<|im_start|>a<|im_end|>"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize("opened", [False, True])
def test_chat_template_renders_chatml(opened: bool):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What\ncolour?"},
        {"role": "assistant", "content": " red "},
    ]
    rendered = TRAINED.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat\ncolour?<|im_end|>\n"
        "<|im_start|>assistant\n red <|im_end|>\n" + ("<|im_start|>assistant\n" if opened else "")
    )


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["tokenizer", *args])
    module.main()


def test_cli_writes_a_tokenizer_that_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, shapes_folder: pathlib.Path
):
    data = shapes_folder / "train.json"
    run_main(monkeypatch, f"--data={data}", f"--out={tmp_path / 'out'}", "--vocab_size=400")
    trained = load_tokenizer(tmp_path / "out")
    assert 259 < len(trained) <= 400
    assert not any("image" in token or "video" in token for token in trained.get_vocab())


def test_cli_rejects_a_vocabulary_below_the_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys
):
    data = tmp_path / "a.json"
    data.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}]}]))
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, f"--data={data}", f"--out={tmp_path / 'out'}", "--vocab_size=258")
    assert caught.value.code == 2 and "--vocab_size=258" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cli_skips_malformed_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys
):
    turns = [{"from": "human", "value": "Which way?"}, {"from": "gpt", "value": "left"}]
    data = tmp_path / "a.json"
    data.write_text(json.dumps([{"conversations": turns}, {"conversations": None}, 3]))
    run_main(monkeypatch, f"--data={data}", f"--out={tmp_path / 'out'}")
    assert "skipped 2 of 3 samples, which are malformed" in capsys.readouterr().out
    load_tokenizer(tmp_path / "out")


def test_cli_names_a_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, f"--data={tmp_path / 'a.json'}", f"--out={tmp_path / 'out'}")
    assert caught.value.code == 2 and "a.json does not exist" in capsys.readouterr().err
