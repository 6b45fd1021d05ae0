"""Which layers and other parameters of a base an adapter_config.json of PEFT is about.

Source: PEFT 0.21.2 (tuners/tuners_utils.py, utils/other.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.adapter_config import (
    CONFIG_FILE,
    Module,
    is_head,
    is_matrix,
    modules,
    patterns,
    read_config,
)
from jaxtune.checkpoint.hf import split_path
from jaxtune.errors import WeightError
from jaxtune.models.base import Weight
from jaxtune.peft import METHODS, Adapters, layer_names, tokens, weight_name
from jaxtune.peft.base import EMBEDDING, Choice
from jaxtune.peft.targets import is_target


def read_adapters(
    folder: Path,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
) -> Adapters:
    """The adapters that PEFT would put on a base model.

    Args:
        folder: holds adapter_config.json.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.

    Raises:
        WeightError: see `read_config`; or targets that the base lacks.
    """
    name, fields = read_config(folder)
    if fields.get("layers_to_transform") is not None and any(row.first for row in weights):
        raise WeightError(
            f"{folder / CONFIG_FILE}: layers_to_transform counts parts of an encoder's and a "
            "decoder's layers alike - merge the adapter with PEFT and start from the merged model"
        )
    method = METHODS[name]
    config = method.from_peft(fields)
    kernels = {row.ours for row in weights if is_matrix(row) and not is_head(row.ours)}
    paths = [path.rpartition(".")[0] for path in base_params if split_path(path)[1] in kernels]
    every = {path: (True,) * len(layer_names(path, tuple(stacks))) for path in paths}
    candidates = modules(weights, Adapters(name, None, every), stacks)
    try:
        rows = _rows(name, fields, base_params, weights)
    except ValueError as error:
        raise WeightError(
            f"{folder / CONFIG_FILE}: {error} - use the adapter's own base model"
        ) from error
    adapted = [] if name == "tokens" else _adapted(folder, name, fields, candidates)
    widths = {m.name: base_params[weight_name(m.path)].shape[-2:] for m in adapted}
    own = method.configure(config, widths) if adapted else {}
    choice: dict[str, list[Any]] = {m.path: [None] * len(every[m.path]) for m in adapted}
    for module in adapted:
        choice[module.path][module.position] = own[module.name]
    found = {path: tuple(configs) for path, configs in choice.items()}
    table = {row.ours: row for row in weights}
    saved, biases = set(), set()
    for path in base_params:
        stack, ours = split_path(path)
        first = sum(stacks[: stack or 0])
        module = path.rpartition(".")[0]
        theirs = table[ours].names(first)[0].rpartition(".")[0]
        if any(_is_saved(theirs, kept) for kept in fields.get("modules_to_save") or ()):
            saved.add(path)
        if ours.endswith(".bias") and _trains(fields.get("bias"), module in found):
            biases.add(path)
    heads = {path for path in base_params if is_head(path)}
    if heads - saved:
        raise WeightError(
            f"{folder / CONFIG_FILE}: task_type {fields.get('task_type')} is of an adapter without "
            "the head that the objective trains - start a new adapter on the merged model"
        )
    if "embed.table" in saved and "lm_head.kernel" not in base_params and not heads:
        raise WeightError(
            f"{folder / CONFIG_FILE}: modules_to_save has the embedding, which this base ties to "
            "its head and PEFT does not - merge it with PEFT and start from the merged model"
        )
    return Adapters(name, config, found, frozenset(saved), frozenset(biases), rows)


def _adapted(
    folder: Path, name: str, fields: Mapping[str, Any], candidates: Sequence[Module]
) -> list[Module]:
    """The layers that PEFT's rules take for targets."""
    targets, parameters = (fields.get(f"target_{kind}") for kind in ("modules", "parameters"))
    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    excluded = fields.get("exclude_modules") or []
    if not hasattr(METHODS[name], "ON_EMBEDDING"):
        candidates = [module for module in candidates if module.path != EMBEDDING]

    def hits(module: Module) -> bool:
        if module.is_parameter:  # in whatever layer, and never excluded
            return module.is_target(parameters)
        if module.is_target(excluded) or (layers is not None and module.layer not in layers):
            return False
        return module.layer is not None if targets == "all-linear" else module.is_target(targets)

    adapted = [module for module in candidates if hits(module)]
    named = [*(parameters or ()), *(() if isinstance(targets, str) else targets or ())]
    unused = [name for name in named if not any(m.is_target([name]) for m in candidates)]
    if unused or not adapted:
        if any(is_target(module.name.rpartition(".")[0], targets) for module in candidates):
            raise WeightError(
                f"{folder / CONFIG_FILE}: {unused or targets} are several layers here, or have "
                f"their outputs in another order, and {name} of the whole is none of these - merge "
                "it with PEFT and start from the merged model"
            )
        known = sorted({module.name.rsplit(".", 1)[-1] for module in candidates})
        raise WeightError(
            f"{folder / CONFIG_FILE}: targets {unused or targets} are not in this base "
            f"model, whose layers are {', '.join(known)} - use the adapter's own base model"
        )
    if any(module.path == tokens.HEAD for module in adapted):
        raise WeightError(
            f"{folder / CONFIG_FILE} adapts lm_head, which is multiplied inside the loss - merge "
            "the adapter with PEFT and start from the merged model"
        )
    if any(".experts." in m.path for m in adapted) and not hasattr(METHODS[name], "EXPERTS"):
        raise WeightError(
            f"{folder / CONFIG_FILE}: {name} cannot adapt experts - merge it with PEFT"
        )
    return adapted


def _rows(
    name: str, fields: Mapping[str, Any], base_params: Mapping[str, Any], weights: Sequence[Weight]
) -> Choice:
    """The rows of the embedding and the head that PEFT trains one by one.

    Raises:
        ValueError: the base has no such rows, or the indices are no numbers.
    """
    names, by_target = patterns(weights), fields.get("trainable_token_indices") or {}
    if name == "tokens":
        targets = fields.get("target_modules") or [names[EMBEDDING]]
        targets = [targets] if isinstance(targets, str) else targets
        by_target = dict.fromkeys(targets, fields["token_indices"])
    if isinstance(by_target, list):
        by_target = {names[EMBEDDING]: by_target}
    ids = {
        path: tokens.token_ids(found)
        for target, found in by_target.items()
        for path in (EMBEDDING, tokens.HEAD)
        if path in names and is_target(names[path], [target])
    }
    is_tied = weight_name(tokens.HEAD) not in base_params
    # Rows of a tied head are the embedding's.
    differs = is_tied and ids.get(tokens.HEAD, ids.get(EMBEDDING)) != ids.get(EMBEDDING)
    if len(ids) < len(by_target) or differs:
        raise ValueError(
            f"tokens train in {', '.join(by_target)}, which is not this base's embedding or a head "
            "with rows of its own"
        )
    vocab_size = base_params[weight_name(EMBEDDING)].shape[0]
    if beyond := [i for found in ids.values() for i in found if not 0 <= i < vocab_size]:
        raise ValueError(f"token {beyond[0]} trains, and the base has {vocab_size} tokens")
    if is_tied:
        ids.pop(tokens.HEAD, None)
    axes, alone = {EMBEDDING: 0, tokens.HEAD: 1}, name == "tokens"
    return {path: (tokens.Rows(found, axes[path], alone),) for path, found in ids.items()}


def _is_saved(name: str, kept: str) -> bool:
    """Whether PEFT keeps a module, or one that it is in, for an item of modules_to_save."""
    return name.endswith(kept) or f".{kept}." in f".{name}."


def _trains(bias: str | None, is_adapted: bool) -> bool:
    """Whether PEFT trains a bias of an adapted or another layer."""
    return bias == "all" or bias not in (None, "none") and is_adapted
