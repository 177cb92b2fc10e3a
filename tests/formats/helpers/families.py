"""Each format as its models write it, on a byte tokenizer with the format's markers."""

import json
from dataclasses import dataclass
from functools import cache

from cai_runtime.formats.find import FORMATS

ENDS = {"harmony": "<|return|>"}


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def hermes(calls):
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {_json(a)}}}\n</tool_call>' for n, a in calls)


def llama3(calls):
    return "; ".join(f'{{"name": "{n}", "parameters": {_json(a)}}}' for n, a in calls)


def python_tag(calls):
    return "<|python_tag|>" + llama3(calls)


def python_list(calls):
    written = (f"{n}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for n, a in calls)
    return f"[{', '.join(written)}]"


def python_start(calls):
    return f"<|python_start|>{python_list(calls)}<|python_end|>"


def lfm2(calls):
    return f"<|tool_call_start|>{python_list(calls)}<|tool_call_end|>"


def mistral_list(calls):
    return "[TOOL_CALLS]" + json.dumps(
        [{"name": n, "arguments": a, "id": "abcdef123"} for n, a in calls], ensure_ascii=False
    )


def mistral_named(calls):
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{_json(a)}" for n, a in calls)


def mistral_ids(calls):
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdef{i:03}[ARGS]{_json(a)}" for i, (n, a) in enumerate(calls))


def harmony(calls):
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{_json(a)}<|call|>" for n, a in calls
    )


def _text(value):
    return value if isinstance(value, str) else json.dumps(value)


def qwen_coder(calls):
    def one(name, arguments):
        members = "".join(f"<parameter={k}>\n{_text(v)}\n</parameter>\n" for k, v in arguments.items())
        return f"<tool_call>\n<function={name}>\n{members}</function>\n</tool_call>"

    return "\n".join(one(n, a) for n, a in calls)


def glm(calls):
    def one(name, arguments):
        members = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{_text(v)}</arg_value>\n" for k, v in arguments.items())
        return f"<tool_call>{name}\n{members}</tool_call>"

    return "\n".join(one(n, a) for n, a in calls)


@dataclass(frozen=True)
class Family:
    """bare: calls are a whole answer. unquoted: strings are written without quotes."""

    format: str
    write: object
    bare: bool = False
    unquoted: bool = False
    tokens: bool = True  # the markers are tokens

    def __str__(self):
        return f"{self.write.__name__}{'' if self.tokens else '-text'}"

    @property
    def thinks(self):
        return self.format != "harmony"

    def content(self, text):
        """Content, as the format writes it before calls."""
        return f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant" if self.format == "harmony" else text

    def final(self, text):
        """Content, as the format writes it after calls."""
        return f"<|start|>assistant<|channel|>final<|message|>{text}" if self.format == "harmony" else text

    def thought(self, text):
        if self.format == "harmony":
            return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"
        return f"<think>\n{text}\n</think>\n\n"


FAMILIES = [
    Family("hermes", hermes),
    Family("hermes", hermes, tokens=False),
    Family("generic", hermes, tokens=False),
    Family("llama3", llama3, bare=True),
    Family("llama3", python_tag),
    Family("llama4", python_list, bare=True),
    Family("llama4", python_start),
    Family("llama4", python_list, bare=True, tokens=False),
    Family("lfm2", lfm2),
    Family("lfm2", lfm2, tokens=False),
    Family("mistral", mistral_list),
    Family("mistral", mistral_list, tokens=False),
    Family("mistral", mistral_named),
    Family("mistral", mistral_ids),
    Family("mistral", mistral_named, tokens=False),
    Family("harmony", harmony),
    Family("qwen_coder", qwen_coder, unquoted=True),
    Family("qwen_coder", qwen_coder, unquoted=True, tokens=False),
    Family("glm", glm, unquoted=True),
    Family("glm", glm, unquoted=True, tokens=False),
]


@cache
def made(family, make_byte_tokenizer):
    """(tokenizer, format)"""
    from tokenizers import AddedToken

    tokenizer = make_byte_tokenizer(tags=False)
    cls = FORMATS[family.format]
    markers = [*cls.openers, *cls.closers, *cls.inner, "<think>", "</think>"]
    tokens = [text for text in markers if text != "</s>"] if family.tokens else []
    if family.write is mistral_list and tokens:
        tokens.remove("[ARGS]")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=i % 2 == 0) for i, text in enumerate(tokens)])
    tokenizer.chat_template = "<think></think>" + tokenizer.chat_template
    return tokenizer, cls(tokenizer)


def marker_texts(fmt):
    return [*fmt.openers, *fmt.closers, *fmt.inner, *(fmt.thought or ())]
