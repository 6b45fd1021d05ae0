"""adapter_config.json of a PEFT folder: what an adapter is, without its tensors.

Every method has fields of its own (`PEFT`, `to_peft`, `from_peft` of its module); the common ones
are written and read here. A setting that changes what the adapter computes, and that jaxtune does
not have, is an error.

Source: PEFT 0.21.2 (tuners/*/config.py, tuners/tuners_utils.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.checkpoint.hf import split_path
from jaxtune.errors import WeightError, listing
from jaxtune.models.base import Weight
from jaxtune.models.heads import TASKS, TRAINED
from jaxtune.peft import METHODS, Adapters, layer_names, weight_name
from jaxtune.peft.base import EMBEDDING
from jaxtune.peft.split import LOST
from jaxtune.peft.targets import is_target

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"
# End of a peft_type that PEFT does not know: layers that transformers keeps as one are apart.
OF_PARTS = "_OF_PARTS"
_FORMATS = {name: module.PEFT for name, module in METHODS.items() if hasattr(module, "PEFT")}
# Common fields that are read, or that say nothing about what the adapter computes.
_COMMON = frozenset(
    ("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "task_type")
    + ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
    + ("modules_to_save", "trainable_token_indices", "target_parameters")
)


class Module(NamedTuple):
    """One layer that is adapted, or may be."""

    path: str  # of the stack's Linear among our parameters
    index: tuple[int, ...]  # (position in the stack), (position, expert); () outside the layers
    layer: int | None  # number of the layer in the model
    name: str  # in the transformers model
    config: Any  # knobs of its adapter; None: not adapted

    def is_target(self, targets: Any) -> bool:
        """Whether target_modules name the layer; an expert's number may be left out."""
        names = [self.name]
        if len(self.index) > 1:
            *mixture, _, last = self.name.split(".")
            names.append(".".join((*mixture, last)))
        return any(is_target(name, targets) for name in names)

    @property
    def is_parameter(self) -> bool:
        """Whether it is one parameter of all experts, which PEFT does not take for a module."""
        return ".experts." in self.path and len(self.index) == 1

    @property
    def position(self) -> int:
        """Which entry of the path's `Choice` has the knobs."""
        return self.index[0] if self.index else 0


def modules(weights: Sequence[Weight], adapters: Adapters, stacks: Sequence[int]) -> list[Module]:
    """The adapted layers, with their names in the transformers model.

    Of methods whose adapters cannot be joined (`APART`) a part of a layer has its own name after
    the layer's: `model.layers.0.self_attn.qkv_proj.q_proj`.
    """
    rows, apart = _matrices(weights), hasattr(METHODS[adapters.method], "APART")
    found = []
    for path, configs in adapters.layers.items():
        row = rows[split_path(path)[1]]
        numbers = [number for number, _ in layer_names(path, tuple(stacks))]
        for position, (number, config) in enumerate(zip(numbers, configs, strict=True)):
            for expert, name in enumerate(row.names(number) if config is not None else ()):
                index = () if number is None else (position, expert)[: 2 if row.experts else 1]
                module = name.removesuffix(".weight")
                if apart and row.columns is not None:
                    module = f"{module}.{path.rpartition('.')[2]}"
                found.append(Module(path, index, number, module, config))
    return found


def is_apart(adapters: Adapters, weights: Sequence[Weight]) -> bool:
    """Whether parts of a layer of the transformers model have adapters that cannot be joined."""
    rows = _matrices(weights)
    of_parts = (rows[split_path(path)[1]].columns is not None for path in adapters.choice)
    return hasattr(METHODS[adapters.method], "APART") and any(of_parts)


def _matrices(weights: Sequence[Weight]) -> dict[str, Weight]:
    """Rows of layers that may be adapted, by path without the stack's number."""
    return {row.ours.rpartition(".")[0]: row for row in weights if is_matrix(row)}


def patterns(weights: Sequence[Weight]) -> dict[str, str]:
    """Path of a layer without its stack's number -> pattern of the name in transformers."""
    return {ours: row.hf.removesuffix(".weight") for ours, row in _matrices(weights).items()}


def is_matrix(row: Weight) -> bool:
    """Whether a row of a weight table is the matrix of a layer that may be adapted."""
    return row.ours.endswith(".kernel") or row.ours == weight_name(EMBEDDING)


def config_fields(
    adapters: Adapters,
    adapted: Sequence[Module],
    weights: Sequence[Weight],
    stacks: Sequence[int],
    task_type: str,
) -> dict[str, Any]:
    """What PEFT writes about the adapters, but for the base model's name."""
    method = METHODS[adapters.method]
    chosen = [module for module in adapted if module.path in (adapters.choice or adapters.rows)]
    named = [module for module in chosen if not module.is_parameter]
    targets, layers = sorted(module.name for module in named), None
    apart = is_apart(adapters, weights)
    if method.PEFT.has_layers and named and not apart:
        targets, layers = _targets(named, weights, sum(stacks))
    own = method.to_peft(adapters.config, {module.name: module.config for module in chosen})
    if parameters := sorted({module.name for module in chosen if module.is_parameter}):
        own["target_parameters"] = parameters
    if adapters.choice and method.PEFT.peft_type == "LORA":
        rows = {m.name: list(m.config.ids) for m in adapted if m.path in adapters.rows}
        own["trainable_token_indices"] = rows or None
    return {
        **method.PEFT.defaults,
        **({"layers_to_transform": layers} if method.PEFT.has_layers else {}),
        "auto_mapping": None,
        "inference_mode": True,
        "peft_type": method.PEFT.peft_type + OF_PARTS * apart,
        "peft_version": PEFT_VERSION,
        "target_modules": targets,
        "task_type": task_type,
        **own,
        **_beside(adapters, weights, stacks),
    }


def _beside(adapters: Adapters, weights: Sequence[Weight], stacks: Sequence[int]) -> dict[str, Any]:
    """modules_to_save with whole names, which PEFT takes for ends of names, and bias.

    A head for labels is named as one module, as PEFT does by itself.
    """
    fields: dict[str, Any] = {}
    rows = {row.ours: row for row in weights}
    saved = set()
    for path in adapters.saved:
        stack, ours = split_path(path)
        first = sum(stacks[: stack or 0])
        layers = range(first, first + (1 if stack is None else stacks[stack]))
        tensors = (name for layer in layers for name in rows[ours].names(layer))
        head = is_head(ours)
        saved |= {name.partition(".")[0] if head else name.rpartition(".")[0] for name in tensors}
    if saved:
        fields["modules_to_save"] = sorted(saved)
    if adapters.biases:
        of_adapted = all(name.rpartition(".")[0] in adapters.choice for name in adapters.biases)
        peft_type = METHODS[adapters.method].PEFT.peft_type
        fields["bias"] = f"{peft_type.lower()}_only" if of_adapted else "all"
    return fields


def is_head(path: str) -> bool:
    """Whether a parameter is of a head for labels."""
    return path.startswith(TRAINED)


def _targets(
    adapted: Sequence[Module], weights: Sequence[Weight], num_layers: int
) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform: short names if all layers agree, else full names."""
    if any(row.first for row in weights):  # PEFT's numbers of layers are of either stack
        return sorted(module.name for module in adapted), None
    layers: dict[str, set[int]] = {}
    for module in adapted:
        if module.layer is not None:
            _, ours = split_path(module.path)
            layers.setdefault(ours, set()).add(module.layer)
    inside = sum(module.layer is not None for module in adapted)
    first = next(iter(layers.values()), set())
    if inside < len(adapted) or any(numbers != first for numbers in layers.values()):
        return sorted(module.name for module in adapted), None
    names = patterns(weights)
    short = []
    for ours in layers:
        last = names[ours].rsplit(".", 1)[-1]
        alike = [other for other in set(names.values()) if other.rsplit(".", 1)[-1] == last]
        whole = names[ours].partition("{}.")[2].replace("{}.", "")
        short.append(last if len(alike) == 1 else whole)
    # BERT's output.dense is the end of its attention.output.dense.
    if any(is_target(other, short) for ours, other in names.items() if ours not in layers):
        return sorted(module.name for module in adapted), None
    return sorted(short), None if len(first) == num_layers else sorted(first)


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The method, and the fields of adapter_config.json.

    Raises:
        WeightError: no readable file, an unknown type of adapter, or settings that jaxtune does
            not have (all listed).
    """
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
        peft_type = fields.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WeightError(
            f"{folder} is not a PEFT adapter: no readable {CONFIG_FILE} ({error}) - "
            "give a folder that PEFT or jaxtune saved"
        ) from error
    name = _method(fields)
    if name is None:
        known = ", ".join(sorted({form.peft_type for form in _FORMATS.values()}))
        raise WeightError(f"{path}: peft_type {peft_type!r} is not supported - supported: {known}")
    method, form, start = METHODS[name], _FORMATS[name], str(fields.get("init_lora_weights"))
    for begins, why in LOST.items():
        if start.startswith(begins):
            raise WeightError(
                f"{path}: init_lora_weights={start}: the adapter's base is not the model's weights "
                f"but what its start left of them, and PEFT {why} when it loads it - save it with "
                "path_initial_model_for_weight_conversion, or merged, where it was trained"
            )
    try:
        understood = _COMMON | form.ignored | set(method.to_peft(method.from_peft(fields), {}))
    except ValueError as error:
        raise WeightError(f"{path}: {error} - repair it") from error
    problems = []
    biases = (None, "none", "all", f"{form.peft_type.lower()}_only")
    for key, value in fields.items():
        if key == "bias":
            unknown = value not in biases
        elif key in form.accepted:
            unknown = value not in form.accepted[key]
        else:
            unknown = bool(value) and key not in understood and value != form.defaults.get(key)
        if unknown:
            problems.append(f"{key}={json.dumps(value)}")
    if problems:
        raise WeightError(
            f"{path} uses settings that jaxtune does not support - merge the adapter with PEFT and "
            "start from the merged model:" + listing(problems)
        )
    return name, fields


def _method(fields: Mapping[str, Any]) -> str | None:
    """The method with the fields' type and the most marks that they bear."""
    peft_type = str(fields.get("peft_type")).removesuffix(OF_PARTS)
    fits = [
        name
        for name, form in _FORMATS.items()
        if form.peft_type == peft_type
        and all(fields.get(key) == value for key, value in form.marks.items())
    ]
    return max(fits, key=lambda name: len(_FORMATS[name].marks), default=None)


def is_of_labels(folder: Path) -> bool:
    """Whether an adapter is of a model with a head for labels; WeightError: see `read_config`."""
    return read_config(folder)[1].get("task_type") in {task.peft for task in TASKS.values()}
