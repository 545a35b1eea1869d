"""A prompt, alone or in a conversation, as token ids: in Llama 3's chat format or by a template."""

import atexit
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from llama3_from_scratch import encode, special

SECONDS = 10  # that a template may take
Messages = Sequence[Mapping[str, str]]  # {"role": …, "content": …} each


def chat_message(tokenizer: tiktoken.Encoding, role: str, text: str | None = None) -> list[int]:
    """A message of a conversation as token ids, open if the text is yet to come.

    <|start_header_id|>role<|end_header_id|>, empty line, text, <|eot_id|> (Meta's llama3/chat_format.py).
    """
    ids = [special(tokenizer, "start_header_id"), *encode(tokenizer, role)]
    ids += [special(tokenizer, "end_header_id"), *encode(tokenizer, "\n\n")]
    if text is not None:
        ids += [*encode(tokenizer, text), special(tokenizer, "eot_id")]
    return ids


def check_chat(tokenizer: Any) -> None:
    """ValueError if a model has neither a chat template nor Llama 3's special tokens."""
    specials = getattr(tokenizer, "specials", None)
    if specials is None or getattr(tokenizer, "template", None) is not None:
        return
    lacking = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} - specials.keys()
    if lacking:
        raise ValueError(
            f"{getattr(tokenizer, 'source', 'this model')}: --chat needs a chat template beside it, or "
            f"Llama 3's special tokens; there is no {min(lacking)}; without --chat it goes on from a text"
        )


def prompt_ids(
    prompt: str,
    tokenizer: tiktoken.Encoding,
    context: float,
    chat: bool = False,
    system: str | None = None,
    said: Sequence[int] = (),
    history: Messages = (),
) -> list[int]:
    """Token ids of a prompt, behind those `said` before; chat: as a question to the assistant.

    system: what the assistant is told first. history: the messages before, for a template, which writes the
    whole conversation anew. ValueError for a prompt that is empty, no UTF-8, or longer than the context.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    # Python keeps bytes that are no UTF-8 as surrogates.
    if re.search("[\ud800-\udfff]", prompt + (system or "")):
        raise ValueError("the prompt is not valid UTF-8")
    use = vars(tokenizer)
    ids = list(said)
    if chat and use.get("template") is not None:
        opening = [] if system is None else [{"role": "system", "content": system}]
        ids = template_ids(tokenizer, [*opening, *history, {"role": "user", "content": prompt}])
    elif chat:
        check_chat(tokenizer)
        if not said:
            ids = [*use["begin"]]  # one begin_of_text, at the very start
        if system is not None and not said:
            ids += chat_message(tokenizer, "system", system)
        ids += chat_message(tokenizer, "user", prompt) + chat_message(tokenizer, "assistant")
    else:
        ids = [*(ids or use["begin"]), *encode(tokenizer, prompt), *use["end"]]
    if not ids:
        raise ValueError("the prompt has no tokens")
    if len(ids) > context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the context only {context}")
    return ids


# ------------------------------------------------------------------------------------ chat templates


def template_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation as the model's template writes it, open for an answer.

    The special tokens that the template writes are meant. What a message spells stays text: a character that
    is used nowhere is put into it before the template runs, and encode_chat takes it out.
    """
    template, specials = tokenizer.template, tokenizer.specials
    given = "".join([template, *specials, *(message["content"] for message in messages)])
    free = (n for n in range(0xE000, 0xF8FF) if chr(n) not in given and chr(n + 1) not in given)
    mark = chr(next(free))
    marked = [
        {**message, "content": marked_specials(message["content"], tuple(specials), mark)}
        for message in messages
    ]
    text = rendered(template, marked, tokenizer.named, tokenizer.source)
    return tokenizer.encode_chat(text, mark)


def marked_specials(text: str, specials: Sequence[str], mark: str) -> str:
    """A text with a mark in all that spells a special token, or could with what comes before or after it."""
    for token in sorted(specials, key=len, reverse=True):
        if len(token) < 2:
            if token in text:
                raise ValueError(f"the prompt holds {token!r}, which is a special token here")
            continue
        text = text.replace(token, token[0] + mark + token[1:])
    body = text.strip()  # a template may take the spaces off
    before, after = text[: text.index(body)], text[text.index(body) + len(body) :]
    cuts = [(token[:n], token[n:]) for token in specials for n in range(1, len(token))]
    if any(body.endswith(start) for start, _ in cuts):
        body += mark
    if any(body.startswith(rest) for _, rest in cuts):
        body = mark + body
    return before + body + after


def rendered(template: str, messages: Messages, named: Mapping[str, str], source: object) -> str:
    """What a template writes, with all messages and the beginning of an answer. ValueError if it refuses."""
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{source}: the model's chat template needs a library: pip install jinja2"
        ) from None
    if [*map(int, re.findall(r"\d+", version)[:3])] < [3, 1, 6]:
        raise ValueError(
            f"jinja2 is {version}; its sandbox is safe from 3.1.6 on: pip install -U jinja2"
        )
    question = json.dumps({"template": template, "messages": [*messages], "named": dict(named)})
    answer = ask_worker(question)
    if answer is None:
        raise ValueError(
            f"{source}: the chat template did not come to an end within {SECONDS} seconds and 1 GB"
        )
    if "text" not in answer:
        raise ValueError(f"{source}: the chat template says: {answer.get('error')}")
    return answer["text"]


@functools.lru_cache(maxsize=256)  # prompts are asked for twice: for the memory, and for the model
def ask_worker(question: str) -> dict[str, str] | None:
    """The answer of parts/template_worker.py; None if it did not come to an end."""
    worker = template_worker()
    timer = threading.Timer(SECONDS, worker.kill)
    timer.start()
    try:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except OSError:
        line = ""
    finally:
        timer.cancel()
    if not line.endswith("\n"):
        end_worker()
        return None
    return json.loads(line)


@functools.cache
def template_worker() -> Any:
    """A process that runs templates, for as long as this one lasts."""
    worker: Any = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for us
    )
    worker.stdin.write(json.dumps(sys.path) + "\n")
    return worker


@atexit.register
def end_worker() -> None:
    """Ends the process that runs templates, if there is one."""
    if template_worker.cache_info().currsize:
        worker = template_worker()
        worker.kill()
        worker.communicate()
        template_worker.cache_clear()
