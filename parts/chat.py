"""Llama 3's chat format: a prompt, alone or in a conversation, as token ids."""

import re
from collections.abc import Sequence

import tiktoken

from llama3_from_scratch import encode, special


def chat_message(tokenizer: tiktoken.Encoding, role: str, text: str | None = None) -> list[int]:
    """A message of a conversation as token ids, open if the text is yet to come.

    <|start_header_id|>role<|end_header_id|>, empty line, text, <|eot_id|> (Meta's llama3/chat_format.py).
    """
    ids = [special(tokenizer, "start_header_id"), *encode(tokenizer, role)]
    ids += [special(tokenizer, "end_header_id"), *encode(tokenizer, "\n\n")]
    if text is not None:
        ids += [*encode(tokenizer, text), special(tokenizer, "eot_id")]
    return ids


def prompt_ids(
    prompt: str,
    tokenizer: tiktoken.Encoding,
    context: float,
    chat: bool = False,
    system: str | None = None,
    said: Sequence[int] = (),
) -> list[int]:
    """Token ids of a prompt, behind those `said` before; chat: as a question to the assistant.

    system: what the assistant is told first. ValueError for a prompt that is empty, no UTF-8, or longer than
    the context.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    # Python keeps bytes that are no UTF-8 as surrogates.
    if re.search("[\ud800-\udfff]", prompt + (system or "")):
        raise ValueError("the prompt is not valid UTF-8")
    ids = list(said)
    if not said:
        ids = [special(tokenizer, "begin_of_text")]  # one, at the very start
    if chat:
        if system is not None and not said:
            ids += chat_message(tokenizer, "system", system)
        ids += chat_message(tokenizer, "user", prompt) + chat_message(tokenizer, "assistant")
    else:
        ids += encode(tokenizer, prompt)
    if len(ids) > context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the context only {context}")
    return ids
