"""Vocabularies: from the files beside a model to its tokenizer.

Llama 3's own through tiktoken, Llama 2's tokenizer.model through sentencepiece, every other tokenizer.json
through the library tokenizers. Beside tiktoken's five methods (n_vocab, encode_ordinary, encode_single_token,
decode, decode_single_token_bytes) a tokenizer may have what a folder says about its use:

around      the ids in front of a text and those behind it, a pair of lists
stops       the ids that end a text; [-1] if none does
spare       ids below n_vocab that are no token's
specials    texts of the special tokens, with their ids
template    the chat template, or None
named       what a template knows by name: bos_token, eos_token, …
encode_chat what makes ids of a conversation that a template has written: see parts/chat.py
source      where it was read, for errors

Without them Llama 3's rules hold.
"""

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

import llama3_from_scratch as llama
from parts import first_line
from parts.layouts import explain, read_json

# ------------------------------------------------------------------------------------ tokenizer.json


def from_json(
    tokenizer_json: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    stops: Sequence[int],
    source: object,
) -> Any:
    """A tokenizer from what tokenizer.json and tokenizer_config.json hold (chat_template, bos_token, …).

    stops: the ids that end a text, as config.json and generation_config.json name them. source: for errors.
    ValueError, in one line, for what makes no sense.
    """
    raise NotImplementedError
