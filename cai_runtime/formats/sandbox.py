"""The Jinja environment of chat templates: a sandbox like transformers', whose output says who wrote each character.

Constants of the template compile to the template's own `TracedText`; whatever else comes out is a caller's. Templates
come with checkpoints, and those from anywhere: they run sandboxed, can't change what they are given, and have a budget
of loop rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_eval_context

from cai_runtime.formats.traced_text import TracedMarkup, TracedText, is_own, joined, own, plain

# What compiling or rendering a template can raise: Jinja's errors, and Python's own of compiling and of expressions. No
# OSError, and no other library's: those are not the template's, but a signal handler's, such as a time limit.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, NameError, RuntimeError,
    MemoryError, AssertionError, StopIteration, SyntaxError,
)  # fmt: skip
MAX_ROUNDS = 1_000_000  # that all `range` of one rendering may ask for together


class _TracingCodeGenerator(CodeGenerator):
    """Marks constants as the template's own, and joins text without losing the marks."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.own({''.join(map(str, group))!r})"

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        value = node.as_const(frame.eval_ctx)
        if type(value) in (str, list, tuple, dict):
            self.write(_own_literal(value))
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)  # escaped text: its origin is lost, so it counts as a caller's
            return
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _own_literal(value: Any) -> str:
    """Python source of a constant whose texts are the template's own. Jinja makes one constant of a literal list or dict
    of constants, such as a table of each role's marker."""
    if type(value) is str:
        return f"environment.own({value!r})"
    if type(value) is list:
        return f"[{', '.join(map(_own_literal, value))}]"
    if type(value) is tuple:
        return f"({''.join(_own_literal(item) + ',' for item in value)})"
    if type(value) is dict:
        return f"{{{', '.join(f'{_own_literal(key)}: {_own_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks answers for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # no named parameter: a template may set any name
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. `from_string(source).render(...)` gives TracedText."""

    code_generator_class = _TracingCodeGenerator
    concat = staticmethod(joined)  # type: ignore[assignment]
    own = staticmethod(own)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.filters["safe"] = TracedMarkup
        for name in ("indent", "title", "wordwrap"):
            self.filters[name] = _tracing(FILTERS[name])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _TemplateNamespace

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if type(text) is not TracedText or getattr(value, "__name__", "") not in ("format", "format_map"):
            return super().wrap_str_format(value)
        if value.__name__ == "format_map":
            return lambda mapping: _format(self, text, (), mapping)
        return lambda *args, **kwargs: _format(self, text, args, kwargs)


def budgeted_range() -> Callable[..., range]:
    """`range` for one rendering.

    Raises OverflowError, inside the template, when all ranges together ask for more than MAX_ROUNDS rounds.
    """
    left = MAX_ROUNDS

    def counted(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        left -= len(numbers)
        if left < 0:
            raise OverflowError(f"its loops ask for more than {MAX_ROUNDS} rounds")
        return numbers

    return counted


def literals(environment: ChatTemplateEnvironment, source: str) -> str:
    """All constant text of a template, parted by line breaks."""
    tree = environment.parse(source)
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    found += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\n".join(found)


def _format(environment: ChatTemplateEnvironment, template: TracedText, args: Any, kwargs: Mapping[str, Any]) -> str:
    """`str.format` in the sandbox. Fields of plain text keep their origin; what is converted counts as a caller's."""
    formatter = SandboxedFormatter(environment)
    whole = formatter.vformat(plain(template), args, kwargs)
    pieces: list[Any] = []
    number = 0
    for literal, field, spec, conversion in Formatter().parse(plain(template)):
        pieces.append(own(literal) if is_own(template) else literal)
        if field is None:
            continue
        if spec and "{" in spec:
            return whole
        if field == "" or field[0] in ".[":
            field, number = f"{number}{field}", number + 1
        value = formatter.convert_field(formatter.get_field(field, args, kwargs)[0], conversion)
        pieces.append(value if isinstance(value, str) and not spec else format(value, spec or ""))
    traced = joined(pieces)
    return traced if traced == whole else whole


@pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    return FILTERS["join"](context, value, TracedText(d) if type(d) is str else d, attribute)


def _tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that builds its text anew: the result is the template's own if all the text it was given is."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        return own(plain(result)) if isinstance(result, str) and texts and all(map(is_own, texts)) else plain(result)

    if hasattr(function, "jinja_pass_arg"):
        traced.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return traced


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike Jinja's own filter this one leaves < > & ' as they are.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return own(text) if _is_all_own(value) else text  # with a caller's text in it, all of it counts as a caller's


def _is_all_own(value: Any) -> bool:
    """Whether the template wrote every text of a value. Numbers and the like may be a caller's."""
    if isinstance(value, Mapping):
        return all(_is_all_own(key) and _is_all_own(item) for key, item in value.items())
    return all(map(_is_all_own, value)) if isinstance(value, (list, tuple)) else is_own(value)


def _raise_exception(message: Any) -> None:
    raise TemplateError(plain(message) if isinstance(message, str) else str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}: names may not begin with an underscore")
