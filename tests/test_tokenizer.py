"""The tokenizer and the chat format against Meta's own."""

import os
import time

import pytest
from conftest import ROOT, SMALL

import llama3_from_scratch as llama
from parts import commandline
from parts.conversation import turn_ids
from tools.random_checkpoint import made_up_tokenizer

TEXTS = [
    "Hello, world!",
    " leading and trailing  ",
    "\n\n\ttabs\r\nand\r\n\r\nlines",
    "don't I'LL we've IT'S",
    "12345678 3.14",
    "naïve café Ünïcödé",
    "你好，世界。这是一个测试。",
    "こんにちは 세계 мир שלום مرحبا",
    "🦙🧠 👩‍👩‍👧‍👦 e\u0301",
    "def f(x):\n    return x**2  # ok",
    "<|begin_of_text|><|eot_id|> <|start_header_id|>",
    "\u0000\u0001\x7f",
    "a" * 300,
    " " * 300,
    "\u3000 \u2028\u2029x",
    "".join(map(chr, range(1, 0x3000, 7))),
    "the answer to the ultimate question of life, the universe, and everything is ",
]


@pytest.fixture(scope="module")
def real(real_tokenizer_path):
    return llama.load_tokenizer(real_tokenizer_path)


@pytest.fixture(scope="module")
def metas(real_tokenizer_path):
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer(real_tokenizer_path)


def test_known_ids(real):
    assert llama.encode(real, TEXTS[-1]) == [
        1820,
        4320,
        311,
        279,
        17139,
        3488,
        315,
        2324,
        11,
        279,
        15861,
        11,
        323,
        4395,
        374,
        220,
    ]
    assert llama.special(real, "begin_of_text") == 128000 and llama.encode(real, "42") == [2983]
    assert real.n_vocab == 128256


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_equals_metas_and_round_trips(real, metas, text):
    ids = llama.encode(real, text)
    assert ids == metas.encode(text, bos=False, eos=False)
    assert real.decode(ids) == text
    assert max(ids) < 128000  # nothing in a text becomes a special token


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_001,
        " " * 60_000,
        ("ab " * 9000 + "x" * 30_000) * 3,
        "ab c" * 110_000,
        "é" * 500_000,
        "a" * 25_000 + " " * 25_000 + "b" * 25_000,
    ],
)
def test_long_texts_are_split_as_metas(real, metas, text):
    started = time.time()
    assert llama.encode(real, text) == metas.encode(text, bos=False, eos=False)
    assert time.time() - started < 60


def test_special_tokens_equal_metas(real, metas):
    ours = {name: real.encode_single_token(name) for name in real.special_tokens_set}
    assert ours == metas.special_tokens


def test_specials_follow_however_many_ranks(tmp_path):
    for ranks in (256, 300, 1000):
        (tmp_path / "tokenizer.model").write_text(made_up_tokenizer(ranks))
        tokenizer = llama.load_tokenizer(tmp_path / "tokenizer.model")
        assert tokenizer.n_vocab == ranks + 256
        assert (
            llama.special(tokenizer, "begin_of_text") == ranks
            and llama.special(tokenizer, "eot_id") == ranks + 9
        )


def test_two_folders_with_the_same_relative_path_get_their_own_vocabulary(tmp_path, monkeypatch):
    vocabularies = []
    for name, ranks in (("one", 256), ("two", 400)):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "tokenizer.model").write_text(made_up_tokenizer(ranks))
        monkeypatch.chdir(tmp_path / name)
        vocabularies.append(llama.load_tokenizer("model/tokenizer.model").n_vocab)
    (tmp_path / "two" / "model" / "tokenizer.model").write_text(
        made_up_tokenizer(500)
    )  # changed at the same path
    vocabularies.append(llama.load_tokenizer("model/tokenizer.model").n_vocab)
    assert vocabularies == [512, 656, 756]


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "not one token for each byte"),
        ("hello\n", "line 1"),
        ("YQ== 0\nYg== x\n", "line 2"),
        ("!!! 0\n", "line 1"),
        (
            made_up_tokenizer(300).replace(" 299\n", " 298\n"),
            "not one token for each byte, or rank",
        ),
        (
            made_up_tokenizer(300).replace(" 299\n", " 300\n"),
            "not one token for each byte, or rank",
        ),
        (made_up_tokenizer(300).replace("AA== 0\n", "AAAA 0\n"), "not one token for each byte"),
        ("<!DOCTYPE html>\n<html></html>", "line 1"),
        ("version https://git-lfs.github.com/spec/v1\n", "line 1"),
    ],
)
def test_bad_files_say_so(tmp_path, content, says):
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(ValueError, match=says):
        llama.load_tokenizer(tmp_path / "tokenizer.model")


def args(**changes):
    return commandline.parse_arguments(
        [
            "--weights",
            "x",
            *[
                part
                for name, value in changes.items()
                for part in (f"--{name}", *([value] if value is not True else []))
            ],
        ]
    )


def test_exactly_one_begin_of_text(real):
    assert turn_ids("<|begin_of_text|>Hi", [], real, args(), 9999).count(128000) == 1
    said = turn_ids("Hi", [], real, args(chat=True, system="Be brief."), 9999)
    again = turn_ids(
        "Hi again", said + [9906, 128009], real, args(chat=True, system="Be brief."), 9999
    )
    assert said.count(128000) == again.count(128000) == 1 and said[0] == again[0] == 128000


def test_chat_format_equals_metas(real, metas):
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat

    def message(role, content):
        stop = {"stop_reason": "end_of_turn"} if role == "assistant" else {}
        return RawMessage(role=role, content=content, **stop)

    def meta(*messages):
        return ChatFormat(metas).encode_dialog_prompt([message(*m) for m in messages]).tokens

    for system in (None, "You are kind. 🦙"):
        for question in ("Hi!", "  spaces \n", "<|eot_id|>", "你好"):
            options = {"chat": True} | ({"system": system} if system else {})
            opening = [("system", system)] if system else []
            ours = turn_ids(question, [], real, args(**options), 9999)
            assert ours == meta(*opening, ("user", question))
            answer = llama.encode(real, "An answer.")
            expected = meta(
                *opening, ("user", question), ("assistant", "An answer."), ("user", "And?")
            )
            assert (
                turn_ids("And?", ours + answer + [128009], real, args(**options), 9999) == expected
            )
            assert (
                turn_ids("And?", ours + answer, real, args(**options), 9999) == expected
            )  # cut short: closed


def test_tiny_has_a_tokenizer_of_the_same_kind():
    tokenizer = llama.load_tokenizer(ROOT / "weights" / "tiny" / "tokenizer.model")
    for text in TEXTS:
        assert tokenizer.decode(llama.encode(tokenizer, text)) == text
    assert SMALL["vocab_size"] != tokenizer.n_vocab == 1280
    assert os.path.getsize(ROOT / "weights" / "tiny" / "tokenizer.model") < 100_000
