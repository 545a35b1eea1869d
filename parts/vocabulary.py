"""Vocabularies: from the files beside a model to its tokenizer.

Llama 3's own through tiktoken, Llama 2's tokenizer.model through sentencepiece, every other tokenizer.json
through the library tokenizers. Beside those of tiktoken's members that the script uses (n_vocab,
encode_ordinary, encode_single_token, decode, decode_single_token_bytes) each has what says how it is used:

    begin, end    the ids in front of a text and those behind it
    stops         the ids that end a text
    spare         ids below n_vocab that are no token's
    specials      the texts of the special tokens, with their ids
    template      the chat template, or None
    named         the texts that a template knows by name: bos_token, eos_token, …
    encode_chat   (text, mark) to ids: see parts/chat.py
    source        where it was read, for errors; those of Meta's layout have only begin, end and stops
"""

import functools
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import first_line
from parts.files import read_text
from parts.layouts import explain, read_json

Json = Mapping[str, Any]


# ------------------------------------------------------------------------------------ tokenizer.json


def from_json(
    tokenizer_json: Json, tokenizer_config: Json, stops: Sequence[int], source: object
) -> Any:
    """A tokenizer from what tokenizer.json and tokenizer_config.json hold (chat_template, bos_token, …).

    add_bos_token and add_eos_token, where they are told, count more than the post-processor. stops: the ids
    that end a text, as config.json and generation_config.json name them. source: for errors.
    ValueError, in one line, for what makes no sense.
    """
    content = checked(tokenizer_json, source)
    config = dict(tokenizer_config)
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind == "LlamaTokenizer" and not mentions(content.get("pre_tokenizer"), "ByteLevel"):
        content = as_llama_2(content, config)
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    if kind == "CodeLlamaTokenizer":
        if content.get("post_processor") is None:
            config["add_bos_token"] = True
        content = as_llama_2(content, config | {"legacy": False})
        config = CODE_LLAMAS | config
    if kind in BYTE_LEVEL_CLASSES:
        content = as_byte_level(content, config, kind)
        config = dict.fromkeys(BYTE_LEVEL_CLASSES[kind], "<|endoftext|>") | config
    tokenizer = own_of_llama_3(content, config, source)
    if tokenizer is None:
        tokenizer = through_tokenizers(content, config, source)
    return with_use(tokenizer, config, stops, source)


def checked(tokenizer_json: Json, source: object) -> dict[str, Any]:
    """The content of a tokenizer.json, if it is that of a BPE. ValueError if not."""
    content = dict(tokenizer_json)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{source}: no tokenizer of Llama's kind: it has no vocabulary of a BPE")
    kind = model.get("type") or "BPE"
    if kind != "BPE":
        raise ValueError(f"{source}: the tokenizer is of type {str(kind)[:40]!r}, expected 'BPE'")
    for text, token in model["vocab"].items():
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{source}: the token {text[:40]!r} has the id {str(token)[:40]!r}")
    content["added_tokens"] = content.get("added_tokens") or []
    if not isinstance(content["added_tokens"], list):
        raise ValueError(f"{source}: added_tokens is no list")
    for added in content["added_tokens"]:
        check_added(added, source)
        if type(added.get("id")) is not int or not 0 <= added["id"] < 2**31:
            raise ValueError(f"{source}: the added token {added['content'][:40]!r} has no id")
    return content


def check_added(added: Any, source: object) -> None:
    """ValueError unless this is a token as added_tokens and added_tokens_decoder hold them."""
    text = added.get("content") if isinstance(added, dict) else None
    if not isinstance(text, str) or not text or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{source}: an added token has no text: {str(added)[:60]}")


def mentions(part: Any, kind: str) -> bool:
    """Is there a step of this type in a part of a tokenizer.json?"""
    if isinstance(part, dict):
        return part.get("type") == kind or any(mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(mentions(value, kind) for value in part)


def as_llama_2(content: dict[str, Any], config: Json) -> dict[str, Any]:
    """A tokenizer.json as transformers 5 takes it where LlamaTokenizer is its class.

    It keeps the vocabulary, the merges and the post-processor. A text gets a space in front: the first part
    alone, or with `legacy` each part between two special tokens.
    """
    scheme = "first"
    if config.get("legacy", False):
        scheme = "always"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    metaspace = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    model = content["model"] | {"byte_fallback": True, "fuse_unk": True, "dropout": None}
    return content | {"normalizer": None, "pre_tokenizer": metaspace, "model": model}


CODE_LLAMAS = {  # what CodeLlamaTokenizer knows without being told
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "prefix_token": "\u2581<PRE>",
    "middle_token": "\u2581<MID>", "suffix_token": "\u2581<SUF>", "eot_token": "\u2581<EOT>",
    "fill_token": "<FILL_ME>",
}  # fmt: skip
BYTE_LEVEL_CLASSES = {  # which of its special tokens are <|endoftext|> where no other is told
    "GPT2Tokenizer": ("bos_token", "eos_token", "unk_token"),
    "GPTNeoXTokenizer": ("bos_token", "eos_token", "unk_token"),
    "Qwen2Tokenizer": ("eos_token", "unk_token", "pad_token"),
}


def as_byte_level(content: dict[str, Any], config: Json, kind: str) -> dict[str, Any]:
    """A tokenizer.json as transformers 5 takes it where its class is one of BYTE_LEVEL_CLASSES.

    It keeps the vocabulary, the merges and the post-processor; add_prefix_space is the config's.
    """
    prefix = bool(config.get("add_prefix_space"))
    letters = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    letters["use_regex"] = True
    cut: Json = letters
    if kind == "Qwen2Tokenizer":  # as Llama 3, but digit by digit
        pattern = {"Regex": llama_3_pattern().replace(r"\p{N}{1,3}", r"\p{N}")}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, letters | {"use_regex": False}]}
    normalizer = None if kind == "GPT2Tokenizer" else {"type": "NFC"}
    model = {"type": "BPE", "vocab": content["model"]["vocab"]}
    model["merges"] = content["model"].get("merges") or []
    made = {"normalizer": normalizer, "pre_tokenizer": cut, "decoder": letters, "model": model}
    if kind == "GPTNeoXTokenizer":  # begin and end are the config's
        made["post_processor"] = None
    return content | made


# Byte-level BPE writes each byte as a printable letter: itself, or else the letters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE}
BYTES |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


@functools.cache
def llama_3_pattern() -> str:
    """How Llama 3 cuts a text before its bytes are joined, as the script says it."""
    pattern: str = llama.make_tokenizer({bytes([b]): b for b in range(256)}, "bytes")._pat_str
    return pattern


def own_of_llama_3(content: dict[str, Any], config: Json, source: object) -> Any:
    """Llama 3's tokenizer through tiktoken, if all that the file says is what tiktoken does; else None."""
    model, added = content["model"], content["added_tokens"]
    ignored = {"type", "vocab", "merges", "ignore_merges", "fuse_unk", "unk_token"}
    if not model.get("ignore_merges") or any(model[key] for key in model.keys() - ignored):
        return None  # dropout, byte_fallback, prefixes, suffixes
    vocab = model["vocab"]
    if not BYTES.keys() >= {*"".join(vocab)}:
        return None
    letter_to_byte = {ord(letter): b for letter, b in BYTES.items()}
    ranks = {text.translate(letter_to_byte).encode("latin-1"): n for text, n in vocab.items()}
    if {*ranks.values()} != {*range(len(ranks))} or len(ranks) < len(vocab):
        return None
    if not ranks.keys() >= {bytes([b]) for b in range(256)}:
        return None
    split = {"type": "Split", "pattern": {"Regex": llama_3_pattern()}, "behavior": "Isolated"}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = content.get("pre_tokenizer")
    if not isinstance(steps, dict) or steps.get("type") != "Sequence" or content.get("normalizer"):
        return None
    found = [
        {key: value for key, value in step.items() if key not in ("trim_offsets", "invert")}
        for step in steps.get("pretokenizers") or []
        if isinstance(step, dict) and not step.get("invert")
    ]
    begin_end = template_of_texts(content.get("post_processor"))
    if found != [split, letters] or begin_end is None:
        return None
    if not merges_as_tiktoken(model.get("merges"), vocab):
        return None
    specials = {token["content"]: token["id"] for token in added}
    flags = ("lstrip", "rstrip", "single_word")
    plain = all(token.get("special") and not any(map(token.get, flags)) for token in added)
    ids = sorted(specials.values())
    if not plain or ids != [*range(len(ranks), len(ranks) + len(added))]:
        return None
    told = {token["content"] for token in added_by_config(config, source).values()}
    begin, end = begin_end_of_config(config, begin_end)
    if not {*begin, *end, *told} <= specials.keys():
        return None
    tokenizer = tiktoken.Encoding(
        name=str(source),
        mergeable_ranks=ranks,
        special_tokens=specials,
        pat_str=llama_3_pattern(),
    )
    encode = functools.partial(llama.encode, tokenizer)
    vars(tokenizer).update(
        begin=[specials[text] for text in begin],
        end=[specials[text] for text in end],
        specials=specials,
        spare=[],
        encode_chat=functools.partial(encode_by_parts, encode, encode, specials),
    )
    return tokenizer


def merges_as_tiktoken(merges: Any, vocab: dict[str, int]) -> bool:
    """Are these all the pairs of tokens that make a token, in the order of its id? So tiktoken merges."""
    try:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        keys = [(vocab[a + b], vocab[a], vocab[b]) for a, b in pairs]
    except (TypeError, ValueError, KeyError):
        return False
    if any(key >= after for key, after in itertools.pairwise(keys)):
        return False
    count = 0
    for text in vocab:
        for n in range(1, len(text)):
            count += text[:n] in vocab and text[n:] in vocab
    return count == len(keys)


def template_of_texts(step: Any) -> tuple[list[str], list[str]] | None:
    """The special tokens in front of a text and behind it, of a post-processor; None: not plain to see."""
    if step is None or (isinstance(step, dict) and step.get("type") == "ByteLevel"):
        return [], []
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        parts = [template_of_texts(inner) for inner in step.get("processors") or []]
        telling = [part for part in parts if part != ([], [])]
        if not telling:
            return [], []
        return telling[0] if len(telling) == 1 else None
    if step.get("type") != "TemplateProcessing":
        return None
    sides: tuple[list[str], list[str]] = [], []
    behind = 0
    for piece in step.get("single") or []:
        if "Sequence" in piece:
            behind += 1
        else:
            sides[min(behind, 1)].append(piece["SpecialToken"]["id"])
    return sides if behind == 1 else None


def name_of(config: Json, key: str) -> str | None:
    """The text of a token that tokenizer_config.json names: "bos_token", as text or as an object."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def begin_end_of_config(
    config: Json, otherwise: tuple[list[str], list[str]]
) -> tuple[list[str], list[str]]:
    """What add_bos_token and add_eos_token ask for; otherwise, where neither is there, is the file's own."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return otherwise
    bos, eos = name_of(config, "bos_token"), name_of(config, "eos_token")
    begin = [bos] if bos and config.get("add_bos_token") else []
    end = [eos] if eos and config.get("add_eos_token") else []
    return begin, end


def added_by_config(config: Json, source: object) -> dict[int, dict[str, Any]]:
    """The tokens of tokenizer_config.json's added_tokens_decoder, by id."""
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{source}: added_tokens_decoder of tokenizer_config.json is no object")
    added = {}
    for key, token in decoder.items():
        check_added(token, source)
        if not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise ValueError(f"{source}: added_tokens_decoder has {str(key)[:40]!r} for an id")
        added[int(key)] = token
    return dict(sorted(added.items()))


# ------------------------------------------------------------------------------------ the library tokenizers


def open_in_library(content: Json, source: object) -> Any:
    """A tokenizers.Tokenizer. ValueError for a file that it does not take, or if it is not there."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            f"{source}: not Llama 3's own tokenizer, and for others a library is needed: "
            "pip install tokenizers"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # Rust's panics are no Exception
        raise ValueError(f"{source}: no tokenizer ({first_line(problem)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def through_tokenizers(content: dict[str, Any], config: Json, source: object) -> Any:
    """A tokenizer behind tiktoken's members, from a tokenizer.json that may say anything."""
    model = open_in_library(content, source)
    added = added_by_config(config, source)
    held = {token.content for token in model.get_added_tokens_decoder().values()}
    late = [token for token in added.values() if token["content"] not in held]
    if late:
        from tokenizers import AddedToken

        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for token in late:
            known = {key: bool(token[key]) for key in flags if key in token}
            model.add_tokens([AddedToken(token["content"], **known)])
    named = [name_of(config, key) for key in config if key.endswith("_token")]
    own = model.get_vocab(with_added_tokens=True)
    model.add_special_tokens([text for text in named if text in own])

    tokens = {token: text for text, token in own.items()}
    added_tokens = model.get_added_tokens_decoder()
    specials = {token.content: n for n, token in added_tokens.items() if token.special}
    specials |= {text: own[text] for text in named if text in own and own[text] in added_tokens}
    letters = mentions(content.get("decoder"), "ByteLevel")
    letters = letters or mentions(content.get("pre_tokenizer"), "ByteLevel")

    def encode_ordinary(text: str) -> list[int]:
        model.encode_special_tokens = True  # as text
        ids: list[int] = encoded(model, text, source).ids
        return ids

    def encode_single_token(text: str) -> int:
        if text not in own:
            raise KeyError(text)
        return own[text]

    def token_bytes(token: int) -> bytes:
        text = tokens.get(token, "")
        if token in added_tokens:
            return text.encode()
        return bytes_of(text, letters)

    def encode_chat(text: str, mark: str) -> list[int]:
        return encode_with_specials(model, content, specials, text, mark, source)

    begin, end = begin_end_in_library(model, config, own, content, source)
    return types.SimpleNamespace(
        n_vocab=1 + max(tokens, default=-1),
        encode_ordinary=encode_ordinary,
        encode_single_token=encode_single_token,
        decode_single_token_bytes=token_bytes,
        decode=lambda ids: b"".join(map(token_bytes, ids)).decode("utf-8", "replace"),
        begin=begin,
        end=end,
        specials=specials,
        spare=sorted({*range(max(tokens, default=-1))} - tokens.keys()),
        encode_chat=encode_chat,
    )


def bytes_of(text: str, letters: bool) -> bytes:
    """The bytes of a piece of a vocabulary: written as letters (byte-level), or as SentencePiece has it."""
    if letters:
        if BYTES.keys() >= {*text}:
            return bytes(BYTES[letter] for letter in text)
        return text.encode()
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
    if byte:
        return bytes.fromhex(byte[1])
    return text.replace("\u2581", " ").encode()


def encoded(model: Any, text: str, source: object, whole: bool = False) -> Any:
    """What the library makes of a text; whole: with what stands before and behind it."""
    try:
        return model.encode(text, add_special_tokens=whole)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # Rust's panics are no Exception
        raise ValueError(
            f"{source}: the tokenizer cannot encode {text[:40]!r} ({first_line(problem)})"
        ) from None


def check_post_processor(step: Any, source: object) -> None:
    """ValueError if a template names a token that it does not hold: the library would panic, and say so."""
    if not isinstance(step, dict):
        return
    inner = step.get("processors")
    for part in inner if isinstance(inner, list) else ():
        check_post_processor(part, source)
    known = step.get("special_tokens")
    for piece in (step.get("single") or []) + (step.get("pair") or []):
        name = piece["SpecialToken"]["id"] if "SpecialToken" in piece else None
        if name is not None and name not in (known or {}):
            raise ValueError(
                f"{source}: its post_processor puts {str(name)[:40]!r} into a text, but does not say what "
                "that is"
            )


def begin_end_in_library(
    model: Any, config: Json, own: Mapping[str, int], content: Json, source: object
) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts in front of a text and behind it."""
    explicit = "add_bos_token" in config or "add_eos_token" in config
    if explicit or content.get("post_processor") is None:
        begin, end = begin_end_of_config(config, ([], []))
        return [own[text] for text in begin if text in own], [own[t] for t in end if t in own]
    check_post_processor(content["post_processor"], source)  # the library has taken it
    model.encode_special_tokens = False
    found = encoded(model, "a", source, whole=True)
    inner = encoded(model, "a", source).ids
    at = 0
    while at < len(found.ids) and found.special_tokens_mask[at]:
        at += 1
    begin, end = found.ids[:at], found.ids[at + len(inner) :]
    unknown = {*begin, *end} - {*own.values()}
    if unknown:
        raise ValueError(
            f"{source}: its post_processor puts the id {min(unknown)} into a text, which is no token's"
        )
    return begin, end


def encode_with_specials(
    model: Any, content: Json, specials: Mapping[str, int], text: str, mark: str, source: object
) -> list[int]:
    """Ids of a text in which special tokens are meant, but where `mark` stands within one.

    What is marked was typed by a user and has to stay text. Then the special tokens get other names in a
    second copy of the tokenizer, names that nobody can have typed, and the text is written with these.
    """
    wanted = pattern_of(specials)
    meant = len(wanted.findall(text))
    if mark not in text:
        model.encode_special_tokens = False
        ids: list[int] = encoded(model, text, source).ids
        if sum(token in specials.values() for token in ids) == meant:
            return ids  # and none has come about otherwise, by a normalizer
    other = open_in_library({**content, "added_tokens": [], "post_processor": None}, source)
    from tokenizers import AddedToken

    names = {special: f"{chr(ord(mark) + 1)}{n}{mark}" for special, n in specials.items()}
    meanings = {}
    for n, token in model.get_added_tokens_decoder().items():
        flags = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip")}
        name = names.get(token.content, token.content)
        other.add_tokens([AddedToken(name, normalized=token.normalized, **flags)])
        meanings[other.token_to_id(name)] = n
    parts = wanted.split(text)
    written = parts[0].replace(mark, "")
    for special, part in zip(wanted.findall(text), parts[1:]):
        written += names[special] + part.replace(mark, "")
    found = encoded(other, written, source).ids
    return [meanings.get(token, token) for token in found]


def pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """What finds any of these texts, the longest first; nothing if there are none."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


# ------------------------------------------------------------------------------------ tokenizer.model


def open_tokenizer(path: Path) -> Any:
    """tokenizer.model of Llama 3 (lines of base64 and rank) or of Llama 2 (SentencePiece)."""
    try:
        if not path.is_file():
            raise OSError
        content = path.read_bytes()
    except OSError as problem:
        raise explain(path, "the tokenizer that comes with the weights", problem) from None
    if b"<unk>" in content[:64]:
        tokenizer = sentencepiece_tokenizer(path)
    else:
        try:
            tokenizer = llama.load_tokenizer(path)
        except ValueError as problem:
            raise explain(
                path, "lines of base64 and rank", str(problem).removeprefix(f"{path}: ")
            ) from None
    vars(tokenizer)["file"] = path
    return tokenizer


def sentencepiece_tokenizer(path: Path) -> Any:
    """Llama 2's tokenizer.model, behind those of tiktoken's methods that the script uses."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{path}: a SentencePiece tokenizer, of Llama 2; pip install sentencepiece"
        ) from None
    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as problem:
        raise explain(path, "a SentencePiece tokenizer", problem) from None
    own = {"<|begin_of_text|>": model.bos_id()}
    own |= dict.fromkeys(("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), model.eos_id())

    def encode_single_token(name: str) -> int:
        if name not in own:
            raise ValueError(f"{path}: Llama 2 has no token {name}; its chat format is another")
        return own[name]

    def token_bytes(token: int) -> bytes:
        if not 0 <= token < model.vocab_size() or model.is_control(token):
            return b""
        return bytes_of(model.id_to_piece(token), letters=False)

    def inner(text: str) -> list[int]:
        """Ids of a text within another, without the space that SentencePiece puts in front."""
        line_break = model.encode("\n")
        ids = model.encode("\n" + text)
        if ids[: len(line_break)] != line_break:
            return model.encode(text)
        return ids[len(line_break) :]

    return types.SimpleNamespace(
        n_vocab=model.vocab_size(),
        encode_ordinary=model.encode,
        encode_single_token=encode_single_token,
        decode_single_token_bytes=token_bytes,
        decode=lambda tokens: b"".join(map(token_bytes, tokens)).decode("utf-8", "replace"),
        begin=[token for token in (model.bos_id(),) if token >= 0],
        end=[],
        stops=[token for token in (model.eos_id(),) if token >= 0],
        specials={
            model.id_to_piece(n): n
            for n in range(model.vocab_size())
            if model.is_control(n) or model.is_unknown(n)
        },
        inner=inner,
    )


def of_model_file(path: Path, config: Json) -> Any:
    """The tokenizer of a tokenizer.model, with the added tokens of tokenizer_config.json."""
    base = open_tokenizer(path)
    if isinstance(base, tiktoken.Encoding):
        specials, inner = dict(base._special_tokens), functools.partial(llama.encode, base)
        encode = inner
    else:
        specials, inner, encode = base.specials, base.inner, base.encode_ordinary
    added = added_by_config(config, path)
    told = {n for n, token in added.items() if token.get("special")}
    told |= {n for n, token in added.items() if token["content"] in specials}  # it stays special
    specials = {text: n for text, n in specials.items() if n not in added}
    specials |= {token["content"]: n for n, token in added.items() if n in told}
    plain = {token["content"]: n for n, token in added.items() if n not in told}
    ids = specials | plain

    def encode_single_token(name: str) -> int:
        return ids[name] if name in ids else base.encode_single_token(name)

    def token_bytes(token: int) -> bytes:
        if token in added:
            return added[token]["content"].encode()
        return piece(base, token)

    held = {*range(base.n_vocab), *added}
    begin, end = base.begin, base.end
    if "add_bos_token" in config or "add_eos_token" in config:
        texts = begin_end_of_config({"bos_token": "<s>", "eos_token": "</s>", **config}, ([], []))
        begin, end = ([ids[text] for text in side if text in ids] for side in texts)
    return types.SimpleNamespace(
        n_vocab=1 + max(held),
        encode_ordinary=functools.partial(encode_by_parts, encode, inner, plain),
        encode_single_token=encode_single_token,
        decode_single_token_bytes=token_bytes,
        decode=lambda tokens: b"".join(map(token_bytes, tokens)).decode("utf-8", "replace"),
        begin=begin,
        end=end,
        stops=base.stops,
        specials=specials,
        spare=sorted({*range(max(held))} - held),
        encode_chat=functools.partial(encode_by_parts, encode, inner, ids),
    )


def encode_by_parts(
    encode: Callable[[str], list[int]],
    inner: Callable[[str], list[int]],
    added: Mapping[str, int],
    text: str,
    mark: str = "",
) -> list[int]:
    """Ids of a text with added tokens, marks taken out. encode: of its start, inner: of the rest."""
    ids: list[int] = []
    at = 0
    found = [(hit.start(), hit.end()) for hit in pattern_of(added).finditer(text)]
    for a, b in [*found, (len(text), len(text))]:
        part = text[at:a].replace(mark, "") if mark else text[at:a]
        if part:
            ids += inner(part) if at else encode(part)
        if a < b:
            ids.append(added[text[a:b]])
        at = b
    return ids


# ------------------------------------------------------------------------------------ a folder's own word


def find_model_file(folder: Path, above: bool = False) -> Path:
    """Where a folder's tokenizer.model is. above: look there too, as Meta's Llama 2 has it.

    Above a folder in another layout would be another model's.
    """
    places = [folder, folder / "original"]
    if above:
        places.append(folder.resolve().parent)
    for place in places:
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    return folder / "tokenizer.model"


def open_folder(folder: Path) -> Any:
    """The tokenizer of a folder in Hugging Face's layout, with all that its files say about its use."""
    config, named = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if "added_tokens_decoder" in config:
        config = named | config
    else:  # the files of before it, which transformers reads then alone; the map's word counts
        config |= named
        config["added_tokens_decoder"] = added_by_older_file(folder, config)
    templates = chat_templates(folder)
    if templates:
        config["chat_template"] = templates
    stops = stops_of(folder)
    path = folder / "tokenizer.json"
    if path.exists():  # its post-processor alone decides, as transformers 5 has it
        for key in ("add_bos_token", "add_eos_token"):
            config.pop(key, None)
        config["tokenizer_class"] = class_of(folder, config)
        tokenizer = from_json(read_json(path), config, stops, path)
    else:
        path = find_model_file(folder)
        if not path.is_file():
            raise ValueError(f"{folder}: neither tokenizer.model nor tokenizer.json is there")
        tokenizer = with_use(of_model_file(path, config), config, stops, path)
    vars(tokenizer)["folder"] = folder
    return tokenizer


def class_of(folder: Path, config: Json) -> Any:
    """The class that counts beside a tokenizer.json, as transformers 5 has it; None: the file alone.

    config.json may name it too. For a Mistral no class counts.
    """
    path = folder / "config.json"
    settings = read_json(path) if path.exists() else {}
    if settings.get("model_type") == "mistral":
        return None
    return config.get("tokenizer_class") or settings.get("tokenizer_class")


def added_by_older_file(folder: Path, config: Json) -> dict[str, dict[str, Any]]:
    """added_tokens.json, a text and its id each, as an added_tokens_decoder says it."""
    path = folder / "added_tokens.json"
    if not path.exists():
        return {}
    lists = (config.get(f"{kind}_special_tokens") for kind in ("additional", "extra"))
    named = [token for told in lists if isinstance(told, list) for token in told]
    named += [value for key, value in config.items() if key.endswith("_token")]
    special = {name_of({"token": token}, "token") for token in named}
    found: dict[str, dict[str, Any]] = {}
    for text, token in read_json(path).items():
        if type(token) is not int or not 0 <= token < 10**9:
            raise ValueError(f"{path}: the token {text[:40]!r} has the id {str(token)[:40]!r}")
        if str(token) in found:
            raise ValueError(f"{path}: two tokens have the id {token}")
        is_special = text in special
        found[str(token)] = {
            "content": text,
            "special": is_special,
            "normalized": not is_special,
        }
    return found


def chat_templates(folder: Path) -> dict[str, str]:
    """The templates that stand in files of their own, by name."""
    files = {"default": folder / "chat_template.jinja"}
    for path in sorted((folder / "chat_templates").glob("*.jinja")):
        files.setdefault(path.stem, path)
    templates = {}
    for name, path in files.items():
        if path.exists():
            try:
                if not path.is_file():  # a pipe would be waited for
                    raise OSError("no file")
                templates[name] = read_text(path)
            except (OSError, ValueError) as problem:
                raise explain(path, "a chat template", problem) from None
    return templates


def stops_of(folder: Path) -> list[int]:
    """The ids that end a text: eos_token_id of generation_config.json and config.json, one id or a list."""
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        told = read_json(path).get("eos_token_id")
        ids = told if isinstance(told, list) else [told]
        if not all(token is None or (type(token) is int and token < 2**31) for token in ids):
            raise ValueError(
                f"{path}: eos_token_id is {str(told)[:60]}, expected an id or a list of ids"
            )
        stops += [token for token in ids if token is not None and token not in stops]
    return [token for token in stops if token >= 0]  # -1 is a way to say: none


def with_use(tokenizer: Any, config: Json, stops: Sequence[int], source: object) -> Any:
    """The tokenizer with what a folder says about its use: stops, template, names, source."""
    named = {key: name_of(config, key) for key in config if key.endswith("_token")}
    stops = [*stops]
    if not stops and named.get("eos_token") in tokenizer.specials:
        stops = [tokenizer.specials[named["eos_token"]]]
    for name in ("end_of_text", "eom_id", "eot_id"):  # Llama 3's own end a text in any case
        token = tokenizer.specials.get(f"<|{name}|>")
        if token is not None and token not in stops:
            stops.append(token)
    vars(tokenizer).update(
        stops=stops,
        template=the_template(config.get("chat_template"), source),
        named={key: text for key, text in named.items() if text},
        source=source,
    )
    return tokenizer


def the_template(told: Any, source: object) -> str | None:
    """The chat template, as text, or that called default of a list of named ones."""
    if told is None or isinstance(told, str):
        return told
    if isinstance(told, list):
        try:
            told = {template["name"]: template["template"] for template in told}
        except (TypeError, KeyError):
            told = {}
    default = told.get("default") if isinstance(told, dict) else None
    if not isinstance(default, str):
        raise ValueError(
            f"{source}: there are chat templates beside it, but none that is the default"
        )
    return default


# ------------------------------------------------------------------------------------ rows and pieces


def check_rows(tokenizer: Any, rows: int, path: object) -> None:
    """ValueError if a token has no row. Rows to spare are fine, if a folder says what its tokens are."""
    if tokenizer.n_vocab != rows and not hasattr(tokenizer, "source"):  # Meta's layout: as released
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, but vocab_size is {rows}; they are of "
            "different models"
        )
    if tokenizer.n_vocab > rows:
        last = piece(tokenizer, tokenizer.n_vocab - 1).decode("utf-8", "replace")
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, up to {last[:40]!r}, but the model has "
            f"rows for {rows} only; resize the model to its tokenizer, or take another tokenizer"
        )


def of_tokens(logits: Tensor, tokenizer: Any) -> Tensor:
    """Logits (B V) of what can be chosen: rows that are no token's are cut off, or -inf."""
    logits = logits[:, : tokenizer.n_vocab]
    spare = vars(tokenizer).get("spare")
    if spare:
        logits = logits.index_fill(-1, torch.tensor(spare, device=logits.device), -math.inf)
    return logits


def piece(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token, none where a row is no token's."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""
