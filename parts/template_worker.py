"""A process of its own in which chat templates, which are programs of strangers, are run: see parts/chat.py.

It reads JSON, a line each: {"template": …, "messages": […], "named": {…}}, and answers each with a line:
{"text": …} or {"error": …}. Templates run in Jinja's sandbox, with the functions that transformers gives them
(transformers, utils/chat_template_utils.py). The process that asks ends this one when it takes too long.
"""

import contextlib
import datetime
import functools
import json
import re
import sys
from typing import Any

MEMORY, CHARACTERS = 2**30, 4_000_000  # the most that a template may take, and write


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """A template of Jinja, in its sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # {% generation %} marks what an assistant says, for training; here it is a block like another.
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    template = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)
    return environment.from_string(template)


def rendered(template: str, messages: list[dict[str, str]], named: dict[str, str]) -> str:
    """What a template makes of messages, with the beginning of an answer."""
    known = {"tools": None, "documents": None, **named}
    text = ""
    for part in compiled(template).generate(messages=messages, add_generation_prompt=True, **known):
        text += part
        if len(text) > CHARACTERS:
            raise ValueError(f"it wrote more than {CHARACTERS:,} characters")
    return text


def main() -> None:
    """Answers line after line until there are no more."""
    sys.path[:] = json.loads(sys.stdin.readline())  # where the other process finds its packages
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            answer = {"text": rendered(**json.loads(line))}
        except Exception as problem:  # a template can raise anything
            answer = {"error": str(problem)[:500] or type(problem).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
