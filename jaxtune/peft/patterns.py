"""Ranks and alphas that differ between layers: PEFT's rank_pattern and alpha_pattern."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

Layers = Mapping[str, tuple[int, int]]  # name of an adapted layer -> its D_in and D_out


def configure(config: Any, layers: Layers) -> dict[str, Any]:
    """The knobs of each layer: rank and alpha of the first pattern that matches its name."""
    ranks, alphas = (_parsed(items) for items in (config.rank_pattern, config.alpha_pattern))
    return {
        name: dataclasses.replace(
            config,
            rank=int(first_match(ranks, name, config.rank)),
            alpha=float(first_match(alphas, name, config.alpha)),
            rank_pattern=(),
            alpha_pattern=(),
        )
        for name in layers
    }


def _parsed(items: Sequence[str]) -> dict[str, float]:
    return {key: float(value) for key, _, value in (item.rpartition("=") for item in items)}


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the name, or its end from some dot on.

    That is PEFT 0.21's rule for rank_pattern (utils/other.py, `get_pattern_key`).
    """
    return next((value for key, value in patterns.items() if hits(key, name)), default)


def hits(pattern: str, name: str) -> bool:
    """Whether a regular expression matches the name, or its end from some dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def problems(section: Any, names: Sequence[str]) -> list[str]:
    """What is wrong with config.peft's patterns, for the names of the adapted layers."""
    found = []
    for field, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for item in getattr(section, field) if names else ():
            pattern, _, value = item.rpartition("=")
            try:
                valid = bool(pattern) and kind(value) > 0
                if valid and not any(hits(pattern, name) for name in names):
                    found.append(f"config.peft.{field}: {pattern} matches no adapted layer")
            except (ValueError, re.error):
                valid = False
            if not valid:
                found.append(f"config.peft.{field}: {item!r} is not of the form pattern={kind(8)}")
    return found


def to_peft(config: Any, layers: Mapping[str, Any], rank: str, alpha: str) -> dict[str, Any]:
    """The fields of adapter_config.json for ranks and alphas, named `rank` and `alpha` there."""
    ranks = {name: own.rank for name, own in layers.items()}
    alphas = {name: plain(own.alpha) for name, own in layers.items()}
    return {
        rank: config.rank,
        alpha: plain(config.alpha),
        "rank_pattern": _differing(ranks, config.rank),
        "alpha_pattern": _differing(alphas, config.alpha),
    }


def _differing(values: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """Values that are not the usual one, by short names where all such layers have it."""
    short: dict[str, set] = {}
    for name, value in values.items():
        short.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != usual:
            found[last if len(short[last]) == 1 else name] = value
    return found


def from_peft(fields: Mapping[str, Any], rank: str, alpha: str) -> dict[str, Any]:
    """The knobs that `to_peft` writes.

    Raises:
        ValueError: rank or alpha are no numbers.
    """
    ranks = [fields.get(rank), *(fields.get("rank_pattern") or {}).values()]
    alphas = [fields.get(alpha), *(fields.get("alpha_pattern") or {}).values()]
    if not all(type(r) is int and r >= 1 for r in ranks):
        raise ValueError(f"{rank}={fields.get(rank)!r} and rank_pattern are not numbers")
    if not all(isinstance(a, int | float) for a in alphas):
        raise ValueError(f"{alpha}={fields.get(alpha)!r} and alpha_pattern are not numbers")
    patterns = {
        field: tuple(f"{key}={value}" for key, value in (fields.get(field) or {}).items())
        for field in ("rank_pattern", "alpha_pattern")
    }
    return {"rank": fields[rank], "alpha": float(fields[alpha]), **patterns}


def plain(number: float) -> int | float:
    """A whole number as int, as PEFT's users write it."""
    return int(number) if float(number).is_integer() else number
