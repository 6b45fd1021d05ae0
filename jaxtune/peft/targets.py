"""Which layers a method adapts."""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.nn.linear import layer_names, linears
from jaxtune.peft.base import EMBEDDING


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Names, patterns or "all-linear"; patterns taken out; indices of layers (empty: all)."""

    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()


def choose(model: Any, targets: Targets) -> dict[str, tuple[bool, ...]]:
    """Linear path -> for each layer of its stack, whether it is targeted.

    A layer is matched by its name with its index in the whole model (`layers.3.attn.q_proj`),
    however the model is cut into stacks. So is the embedding, but not by all-linear; it is in no
    layer. The output head cannot be a target.

    Raises:
        ConfigError: a pattern or a layer index that matches nothing, with the candidates; or the
            output head.
    """
    unused = set(targets.target_modules)
    absent = [i for i in targets.layers_to_transform if not 0 <= i < sum(model.stacks)]
    if absent:
        raise ConfigError(
            f"config.peft.layers_to_transform: no layer {absent[0]} - "
            f"the model has layers 0 to {sum(model.stacks) - 1}"
        )
    choice, seen, layers = {}, set(), targets.layers_to_transform
    for path in (EMBEDDING, *(path for path, _ in linears(model))):
        chosen = []
        for index, name in layer_names(path, model.stacks):
            seen.add(name.rsplit(".", 1)[-1])
            hits = {pattern for pattern in targets.target_modules if _hits(pattern, name)}
            unused -= hits
            excluded = any(tree.matches(pattern, name) for pattern in targets.exclude_modules)
            wanted = index is None or not layers or index in layers
            chosen.append(bool(hits) and not excluded and wanted)
        if any(chosen):
            choice[path] = tuple(chosen)
    if unused or not choice:
        raise ConfigError(_no_match(sorted(unused) or targets.target_modules, sorted(seen)))
    if "lm_head" in choice:
        raise ConfigError(
            "config.peft.target_modules: lm_head is multiplied inside the loss, where no adapter "
            "is computed - train it whole with peft.modules_to_save=lm_head"
        )
    return choice


def _hits(pattern: str, name: str) -> bool:
    if pattern == "all-linear":
        return name not in (EMBEDDING, "lm_head")
    return tree.matches(pattern, name)


def _no_match(patterns: Any, names: list[str]) -> str:
    close = difflib.get_close_matches(patterns[0], names, n=1) if patterns else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return (
        f"config.peft.target_modules={tuple(patterns)} matches no layer that is left - "
        f"layers are {', '.join(names)}, or all-linear{hint}"
    )


def is_target(name: str, targets: Any) -> bool:
    """PEFT's rule for target_modules: a regular expression, or a list of names or ends of them."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())
