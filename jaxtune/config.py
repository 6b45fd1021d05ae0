"""From a config file and a command line to a checked `RunConfig`; only this file knows
ml_collections.

A config file returns `default()` with a few fields changed; the command line overrides single
fields (`--config.peft.rank=8`). `resolve` checks every value against the schema and turns the
editable tree into frozen dataclasses.
"""

import ast
import dataclasses
import importlib.util
import json
import math
import typing
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jaxtune.conflicts import contradictions
from jaxtune.errors import ConfigError, listing, nearest
from jaxtune.schema import RunConfig, sections


def default() -> Any:
    """The editable tree of all fields with their defaults: a typed, locked `ConfigDict`."""
    tree: Any = config_dict.ConfigDict(type_safe=True)
    for section, cls in sections().items():
        hints = typing.get_type_hints(cls)
        tree[section] = config_dict.ConfigDict(type_safe=True)
        for field in dataclasses.fields(cls):
            value = field.default
            if value is None:
                value = config_dict.placeholder(_value_type(hints[field.name]))
            tree[section][field.name] = value
    return tree.lock()


def resolve(tree: config_dict.ConfigDict | typing.Mapping[str, Any]) -> RunConfig:
    """Checks every value and returns the frozen config.

    Raises:
        ConfigError: listing every unknown key (with the nearest known one), ill-typed or
            out-of-range value, and contradiction between fields.
    """
    if isinstance(tree, config_dict.ConfigDict):
        tree = tree.to_dict()
    if not isinstance(tree, typing.Mapping):
        raise ConfigError(f"a config is a mapping of sections, not {tree!r}")
    problems: list[str] = []
    known = sections()
    for section in tree:
        if section not in known:
            problems.append(f"config.{section}: no such section" + nearest(section, known))
    values = {
        name: _resolve_section(name, cls, tree.get(name, {}), problems)
        for name, cls in known.items()
    }
    if not problems:
        config = RunConfig(**values)
        problems = contradictions(config)
        if not problems:
            return config
    if len(problems) == 1:
        raise ConfigError(problems[0])
    raise ConfigError(f"{len(problems)} problems in the config:{listing(problems)}")


def _resolve_section(name: str, cls: type, given: Any, problems: list[str]) -> Any:
    if not isinstance(given, typing.Mapping):
        problems.append(f"config.{name}={given!r}: a section cannot be set as a whole")
        return cls()
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            problems.append(f"config.{name}.{key}: no such key" + nearest(key, fields))
    values = {}
    for key, field in fields.items():
        if key in given:
            try:
                values[key] = _checked(given[key], hints[key], field)
            except ValueError as error:
                problems.append(f"config.{name}.{key}={given[key]!r}: {error}")
    return cls(**values)


def _checked(value: Any, hint: Any, field: dataclasses.Field) -> Any:
    """The value in its field's type; ValueError says what is wrong with it."""
    kind = _value_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if kind is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise ValueError(f"must be a tuple of {item.__name__}")
        if not all(type(part) is item for part in value):
            raise ValueError(f"must hold only {item.__name__}")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"must be {kind.__name__}, not {type(value).__name__}")
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}" + nearest(value, choices))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if low is not None and value < low or high is not None and value > high:
        bounds = [f">= {low:g}"] * (low is not None) + [f"<= {high:g}"] * (high is not None)
        raise ValueError("must be " + " and ".join(bounds))
    return value


def _value_type(hint: Any) -> type:
    """str | None -> str, tuple[str, ...] -> tuple, int -> int."""
    plain = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        return tuple
    return plain[0] if plain else hint


def to_json(config: RunConfig) -> str:
    """The resolved config as text; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> RunConfig:
    """The config of a saved run (its config.json); ConfigError if it is not one."""
    try:
        return resolve(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a saved config: {error}") from error


def load_file(path: str) -> config_dict.ConfigDict:
    """Runs `get_config()` of a config file, or reads a saved config.json.

    Raises:
        ConfigError: naming the file and, for an error in it, the line.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such file - e.g. --config=configs/lora_llama.py")
    if path.endswith(".json"):
        tree = default()
        _update(tree, dataclasses.asdict(from_json(Path(path).read_text())))
        return tree
    spec = importlib.util.spec_from_file_location("jaxtune_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        tree = module.get_config()
    except Exception as error:  # a config file is a program: whatever it raises is its author's
        line = _error_line(error, path)
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(f"{path}:{line}: {type(error).__name__}: {first}") from error
    if not isinstance(tree, config_dict.ConfigDict):
        raise ConfigError(
            f"{path}: get_config() must return config.default() with changes, not {tree!r}"
        )
    return tree


def _update(tree: Any, values: typing.Mapping[str, Any]) -> None:
    for section, fields in values.items():
        for key, value in fields.items():
            if value is not None:
                tree[section][key] = tuple(value) if isinstance(value, list) else value


def _error_line(error: BaseException, path: str) -> int:
    if isinstance(error, SyntaxError):
        return error.lineno or 0
    lines, trace = [0], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1]


def parse_arguments(argv: list[str]) -> RunConfig:
    """Reads `--config=FILE` and any number of `--config.section.field=value`.

    Tuples may be written as a list with commas (`--config.data.train=a.jsonl,b.jsonl`).

    Raises:
        ConfigError: unknown or malformed arguments, or what `resolve` refuses.
    """
    path, overrides = None, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not key.startswith("--config") or not equals:
            raise ConfigError(
                f"argument {argument!r} is not of the form --config=FILE or "
                "--config.section.field=value (see --help)"
            )
        if key == "--config":
            path = value
        else:
            overrides.append((key.removeprefix("--config."), value))
    if path is None:
        raise ConfigError("--config=FILE is missing - e.g. --config=configs/lora_llama.py")
    tree = load_file(path)
    problems = []
    for key, value in overrides:
        try:
            _override(tree, key, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return resolve(tree)


def _override(tree: Any, key: str, text: str) -> None:
    section, _, name = key.partition(".")
    known = sections()
    if section not in known:
        raise ValueError(f"config.{key}: no section {section!r}" + nearest(section, known))
    hints = typing.get_type_hints(known[section])
    if name not in hints:
        raise ValueError(f"config.{key}: no such key" + nearest(name, hints))
    hint = hints[name]
    if text == "None" and type(None) in typing.get_args(hint):
        value: Any = None
    elif _value_type(hint) is tuple:
        item = typing.get_args(hint)[0]
        value = tuple(_parse(key, part, item) for part in _parts(text))
    else:
        value = _parse(key, text, _value_type(hint))
    tree[section][name] = value


def _parts(text: str) -> list[str]:
    """Items of `a,b` or of a Python tuple or list, whose quoted items may hold commas."""
    if text[:1] in ("(", "["):
        try:
            literal = ast.literal_eval(text)
            items = literal if isinstance(literal, (tuple, list)) else [literal]
            return [str(item) for item in items]
        except (ValueError, SyntaxError):
            pass  # a regular expression may begin with a bracket
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"config.{key}={text!r}: must be {kind.__name__}") from None


def usage(command: str) -> str:
    """Help text: every field with its type, default, range and documentation."""
    lines = [f"usage: python -m {command} --config=FILE [--config.section.field=value ...]", ""]
    for section, cls in sections().items():
        lines += [f"{section}: {cls.__doc__}"]
        for field in dataclasses.fields(cls):
            lines += [f"  --config.{section}.{field.name}={describe_default(field)}"]
            lines += [f"      {describe_field(cls, field)}"]
        lines += [""]
    return "\n".join(lines)


def describe_default(field: dataclasses.Field) -> str:
    """A field's default as one would type it."""
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return str(field.default)


def describe_field(cls: type, field: dataclasses.Field) -> str:
    """Type, range or choices, and documentation of a field, on one line."""
    hint = typing.get_type_hints(cls)[field.name]
    name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices is not None:
        name = "|".join(choices)
    elif low is not None or high is not None:
        name += f" [{'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}]"
    return f"{name}: {field.metadata['doc']}"
