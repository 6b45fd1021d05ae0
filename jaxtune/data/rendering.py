"""Runs chat templates: programs of strangers, in a sandbox that bounds their time and memory.

The environment is that of transformers' `apply_chat_template` (jinja2's immutable sandbox,
trim_blocks, lstrip_blocks, loop controls, `tojson` without escapes, `raise_exception`), so the text
is the same. What is added:

* every turn of a loop and every call of a macro looks at the clock;
* operators and methods that can make a text much longer check its length before they make it;
* `strftime_now` gives one fixed day, so that the rows of a run are the same tomorrow;
* what stands between `{% generation %}` and `{% endgeneration %}` comes out as spans.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 25
MAX_FACTOR = 1 << 16
TODAY = datetime(2024, 7, 26)  # the day that Llama 3's templates print where they know no other
# Unicode noncharacters, never part of text: they stand for the markers in what a template prints.
GENERATION_START, GENERATION_END = "\ufdd2", "\ufdd3"
MARKERS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")
_DIGITS = re.compile(r"\d{6,}")

Span = tuple[int, int]


class _Generation(Extension):
    """`{% generation %}` blocks: their text between two markers."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line)
            for mark in (GENERATION_START, GENERATION_END)
        )
        return [start, nodes.Scope(body, lineno=line), end]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators and calls that check sizes first."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_size(MAX_CHARACTERS + 1 if _DIGITS.search(left) else 0)
        elif isinstance(left, int) and isinstance(right, int):
            if operator != "+" and max(abs(left), abs(right)) > MAX_FACTOR:
                _refuse(f"computes with numbers above {MAX_FACTOR}")
        elif operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _check_size(len(left) + len(right))
        elif operator == "*" and isinstance(left, int | str | list):
            texts, times = (right, left) if isinstance(left, int) else (left, right)
            _check_size(len(texts) * times if isinstance(texts, str | list) else 0)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        own = getattr(__obj, "__self__", None)
        if isinstance(own, str):
            _check_method(own, getattr(__obj, "__name__", ""), args)
        return super().call(__context, __obj, *args, **kwargs)


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"makes a text of more than {MAX_CHARACTERS} characters")


def _check_method(text: str, method: str, args: Sequence[Any]) -> None:
    """Checks what a method of a text would make of it."""
    if method == "replace" and len(args) > 1:
        _check_size(len(text) + text.count(str(args[0])) * len(str(args[1])))
    elif method == "join" and args and isinstance(args[0], Sequence):
        _check_size(sum(len(str(part)) + len(text) for part in args[0]))
    elif method in ("format", "format_map") and _DIGITS.search(text):
        _check_size(MAX_CHARACTERS + 1)
    elif method in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_size(max((arg for arg in args if isinstance(arg, int)), default=0))


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    _check_method(str(text), "replace", (old, new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(parts: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    texts = [part if attribute is None else part[attribute] for part in parts]
    _check_method(separator, "join", (texts,))
    return separator.join(map(str, texts))


def _concatenate(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_size(0 if indent is None else indent * 1000)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # Filters that pad, or that nobody needs for a chat, are gone.
    for name in ("center", "format", "urlize", "wordwrap", "xmlattr", "filesizeformat", "random"):
        del made.filters[name]
    made.filters |= {"tojson": _to_json, "replace": _replace, "join": _join}
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": TODAY.strftime,
        "_concatenate": _concatenate,
    }
    return made


class _Checks(NodeTransformer):
    """Adds a look at the clock to every turn of a loop and call of a macro; checks `~`."""

    def _add_look(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        look = nodes.Call(nodes.Name("_look_at_clock", "load"), [], [], None, None)
        node.body.insert(0, nodes.Output([look]).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _add_look

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.Name("_concatenate", "load")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> Callable[..., str]:
    """Compiles a chat template; the result takes its variables and returns text with markers.

    Raises:
        jinja2.TemplateError: of the compiled function, too: the template refuses the conversation,
            takes longer than MAX_SECONDS or prints too much.
    """
    environment = _environment()
    tree = _Checks().visit(environment.parse(template))
    compiled = environment.from_string(tree)

    def render(**variables: Any) -> str:
        end = time.monotonic() + MAX_SECONDS

        def look_at_clock() -> str:
            if time.monotonic() > end:
                _refuse(f"takes more than {MAX_SECONDS:g} s")
            return ""

        pieces, size = [], 0
        for piece in compiled.generate(**variables, _look_at_clock=look_at_clock):
            size += len(piece)
            _check_size(size)
            pieces.append(piece)
        return "".join(pieces)

    return render


def take_markers(text: str) -> tuple[str, list[Span]]:
    """The text without markers, and the spans of characters that they enclose.

    Raises:
        jinja2.TemplateError: the template prints a marker itself, so that they are no pairs.
    """
    if not MARKERS.search(text):
        return text, []
    pieces, spans, place, starts = [], [], 0, []
    for piece in re.split(f"({MARKERS.pattern})", text):
        if piece == GENERATION_START:
            starts.append(place)
        elif piece == GENERATION_END:
            if not starts:
                _refuse("prints the reserved character U+FDD3")
            spans.append((starts.pop(), place))
        else:
            pieces.append(piece)
            place += len(piece)
    if starts:
        _refuse("prints the reserved character U+FDD2")
    return "".join(pieces), spans
