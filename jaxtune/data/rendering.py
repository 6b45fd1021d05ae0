"""Runs chat templates: programs of strangers, in a sandbox that bounds their time and memory.

The environment is that of transformers' `apply_chat_template` (jinja2's immutable sandbox,
trim_blocks, lstrip_blocks, loop controls, `tojson` without escapes, `raise_exception`), so the text
is the same. What is added:

* every turn of a loop and every call of a macro, filter or test looks at the clock;
* operators, methods and filters that can make a text much longer check its length before;
* lists and the like are measured when they are made, by the text that they would print;
* methods of texts and filters are those that chat templates need, and no others;
* `strftime_now` gives one fixed day, so that the rows of a run are the same tomorrow;
* what stands between `{% generation %}` and `{% endgeneration %}` comes out as spans.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 25
MAX_FACTOR = 1 << 16
TODAY = datetime(2024, 7, 26)  # the day that Llama 3's templates print where they know no other
# Unicode noncharacters, never part of text: they stand for the markers in what a template prints.
GENERATION_START, GENERATION_END = "\ufdd2", "\ufdd3"
MARKERS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")
ITEM_CHARACTERS = 8  # what an item of a list counts
MAX_INDENT = 16
FILTERS = """abs capitalize count d default dictsort e escape first float int items last length list
    lower map max min reject rejectattr reverse safe select selectattr sort string title trim unique
    upper wordcount""".split()
METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper""".split()
)
_PLAIN_FORMAT = re.compile(r"(?:[^%]|%[sd%])*")
_PLAIN_DATE = re.compile(r"(?:[^%]|%-?[a-zA-Z%])*")
_deadline: ContextVar[float] = ContextVar("_deadline", default=float("inf"))

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


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"makes a text of more than {MAX_CHARACTERS} characters")


def _look_at_clock() -> str:
    if time.monotonic() > _deadline.get():
        _refuse(f"takes more than {MAX_SECONDS:g} s")
    return ""


def _size(value: Any) -> int:
    """Characters that a value prints, about; counts no further than MAX_CHARACTERS."""
    size, rest = 0, [value]
    while rest and size <= MAX_CHARACTERS:
        part = rest.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, Mapping | list | tuple | set | range):
            size += ITEM_CHARACTERS * len(part)
            if size <= MAX_CHARACTERS and not isinstance(part, range):
                rest += part
                rest += part.values() if isinstance(part, Mapping) else ()
    return size


def _measured(value: Any) -> Any:
    _check_size(_size(value))
    return value


def _concatenate(pieces: Iterable[Any]) -> str:
    texts = [str(piece) for piece in pieces]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators and calls that check sizes first."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            if not _PLAIN_FORMAT.fullmatch(left):
                _refuse(f"formats with {left[:40]!r}, where only %s and %d are allowed")
            _check_size(len(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            if operator != "+" and max(abs(left), abs(right)) > MAX_FACTOR:
                _refuse(f"computes with numbers above {MAX_FACTOR}")
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            items, times = (right, left) if isinstance(left, int) else (left, right)
            _check_size(_size(items) * times if isinstance(items, Sequence) else 0)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int | float):
            return isinstance(obj, str) and attr in METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is refused like every method that is not in METHODS."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        own = getattr(__obj, "__self__", None)
        if isinstance(own, str):
            _check_method(own, getattr(__obj, "__name__", ""), (*args, *kwargs.values()))
        if isinstance(__obj, Macro):
            _look_at_clock()
            _check_size(_size(args) + _size(kwargs))
        return _measured(super().call(__context, __obj, *args, **kwargs))

    concat = staticmethod(_concatenate)  # Jinja calls it for what a macro or a block printed
    look_at_clock = staticmethod(_look_at_clock)
    measured = staticmethod(_measured)


class _Namespace(Namespace):
    """A namespace that prints no values: what it holds changes after it was measured."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_method(text: str, method: str, args: Sequence[Any]) -> None:
    """Checks what a method of a text would make of it."""
    if method == "replace" and len(args) > 1:
        _check_size(len(text) + text.count(str(args[0])) * len(str(args[1])))
    elif method == "join" and args and isinstance(args[0], Sequence):
        _check_size(_size(args[0]) + len(args[0]) * len(text))


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    _check_method(str(text), "replace", (old, new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(parts: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    texts = [part if attribute is None else part[attribute] for part in parts]
    _check_method(str(separator), "join", (texts,))
    return str(separator).join(map(str, texts))


def _map(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """The filter `map`, whose items are measured as they are made."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> list[Any]:
        made, size = [], 0
        for item in function(*args, **kwargs):
            size += _size(item) + ITEM_CHARACTERS
            _check_size(size)
            made.append(item)
        return made

    return bounded


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that looks at the clock and whose result is measured."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _look_at_clock()
        return _measured(function(*args, **kwargs))

    return bounded


def _date(form: str) -> str:
    if not _PLAIN_DATE.fullmatch(form):
        _refuse(f"prints a date as {form[:40]!r}, where only plain %d and %-d are allowed")
    return TODAY.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
        _refuse(f"indents JSON by {str(indent)[:40]}, where 0 to {MAX_INDENT} are allowed")
    for separator in separators or ():
        if not isinstance(separator, str) or len(separator) > MAX_INDENT:
            _refuse(f"separates JSON by more than {MAX_INDENT} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(_measured(value))
    pieces, size = [], 0
    for piece in encoder.iterencode(_measured(value)):
        size += len(piece)
        _check_size(size)
        pieces.append(piece)
    return "".join(pieces)


@functools.cache
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    filters = {name: made.filters[name] for name in FILTERS}
    filters |= {"tojson": _to_json, "replace": _replace, "join": _join}
    filters["map"] = _map(filters["map"])
    made.filters = {name: _bounded(function) for name, function in filters.items()}
    made.tests = {name: _bounded(function) for name, function in made.tests.items()}
    made.globals = {
        "range": made.globals["range"],
        "dict": dict,
        "namespace": _Namespace,
        "raise_exception": _refuse,
        "strftime_now": _date,
    }
    return made


def _called(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of the environment's own function; no variable of a template can take its place."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Checks(NodeTransformer):
    """Adds a look at the clock to loops and macros; measures lists and the like and `~`."""

    def _add_look(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        look = nodes.Output([_called("look_at_clock")])
        node.body.insert(0, look.set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _add_look

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _called("concat", nodes.List(node.nodes)).set_lineno(node.lineno)

    def _add_measure(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        is_constant = not any(True for _ in node.find_all(nodes.Name))
        if is_constant or getattr(node, "ctx", "load") != "load":
            return node
        return _called("measured", node).set_lineno(node.lineno)

    visit_List = visit_Tuple = visit_Dict = _add_measure


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
        _deadline.set(time.monotonic() + MAX_SECONDS)
        pieces, size = [], 0
        for piece in compiled.generate(**variables):
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
