"""Reads and writes LoRA adapters as Hugging Face PEFT folders.

`adapter_model.safetensors` holds `base_model.model.<module>.lora_A.weight` [R, in] and
`lora_B.weight` [out, R], where <module> is the layer's path in the transformers model: it follows
from the family's WEIGHTS table. Ours are transposed and stacked: `layers.<s>.attn.q_proj.adapter.a`
[n, in, R], `.b` [n, R, out], `.scale` [n].

PEFT ignores what it does not expect; here missing, extra and mis-shaped tensors are errors, and so
is every setting that changes what the adapter computes and that jaxtune does not have.

Source: PEFT 0.21.2 (tuners/lora/config.py, utils/save_and_load.py, tuners/tuners_utils.py).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import process
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf import split_path
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import (
    read_along,
    read_header,
    read_tensor,
    refuse_pickle,
    write_folder,
)
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.distributed import to_host
from jaxtune.errors import WeightError, listing
from jaxtune.models.base import Weight
from jaxtune.peft import Choice, layer_names, lora

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
_PREFIX = "base_model.model."
_FLOAT32 = np.dtype(np.float32)

# Every field of PEFT's LoraConfig that an adapter of ours leaves at its default.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Fields that are read, or that say nothing about what the adapter computes.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path"),
    *("task_type", "inference_mode", "peft_version", "revision", "auto_mapping", "loftq_config"),
    *("megatron_core", "megatron_config", "eva_config", "fan_in_fan_out", "qalora_group_size"),
}
# Ways to start an adapter that leave the base weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class Module(NamedTuple):
    """One adapted linear layer."""

    path: str  # of the stack's Linear among our parameters
    index: int | None  # position in the stack
    layer: int | None  # number of the layer in the model
    name: str  # in the transformers model


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter read from disk, in the form that `peft.attach` takes.

    Attributes:
        config: rank, alpha, rsLoRA, dropout.
        choice: linear path -> which layers of its stack are adapted.
        params: path of each adapter variable -> float32 array.
        warnings: what looks wrong but may be meant.
    """

    config: lora.Config
    choice: Choice
    params: dict[str, np.ndarray]
    warnings: tuple[str, ...]


def modules(weights: Sequence[Weight], paths: Choice, stacks: Sequence[int]) -> Iterator[Module]:
    """The chosen layers behind linear paths, with their names in the transformers model."""
    names = {row.ours: row.hf.removesuffix(".weight") for row in weights}
    for path, chosen in paths.items():
        _, ours = split_path(path)
        numbers = [number for number, _ in layer_names(path, tuple(stacks))]
        for index, number in enumerate(numbers):
            if chosen[index]:
                name = names[f"{ours}.kernel"].format(number)
                yield Module(path, None if number is None else index, number, name)


# ---- save


def save_adapter(
    folder: Path,
    params: Mapping[str, Any],
    choice: Choice,
    config: lora.Config,
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    base: str,
    revision: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PEFT folder; it appears under its name only when complete and checked.

    All processes call it; the first one writes.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        params: path -> array; the `.adapter.a` and `.adapter.b` among them are written, float32.
        choice: linear path -> which layers of its stack are adapted.
        config: rank, alpha, rsLoRA, dropout.
        weights: the base family's table.
        stacks: number of layers in each stack.
        base: name of the base model, for base_model_name_or_path.
        revision: its revision, when it is a hub id.
        record: what else to note in the folder's jaxtune_export.json.
    """
    adapted = list(modules(weights, choice, stacks))
    sources = {}
    for module in adapted:
        for leaf in "ab":
            key = f"{_PREFIX}{module.name}.lora_{leaf.upper()}.weight"
            sources[key] = (f"{module.path}.adapter.{leaf}", module.index)

    def read(key: str) -> np.ndarray:
        path, index = sources[key]
        array = params[path] if index is None else params[path][index]
        return to_host(array).astype(np.float32, copy=False).T

    tensors = {}
    for key, (path, index) in sources.items():
        shape = params[path].shape if index is None else params[path].shape[1:]
        tensors[key] = TensorInfo(tuple(reversed(shape)), _FLOAT32)
    size = sum(info.nbytes for info in tensors.values())
    if not process.is_first():
        return read_along(tensors, read, max_shard_bytes=size)
    note = {"kind": "adapter", "base": base, **(record or {})}
    with replace_folder(folder, note) as temporary:
        write_folder(temporary, tensors, read, stem="adapter_model", max_shard_bytes=size)
        fields = _config_fields(adapted, config, weights, sum(stacks))
        fields |= {"base_model_name_or_path": base, "revision": revision}
        write_json(temporary / CONFIG_FILE, fields)


def _config_fields(
    adapted: Sequence[Module], config: lora.Config, weights: Sequence[Weight], num_layers: int
) -> dict[str, Any]:
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    targets, layers = _targets(adapted, weights, num_layers)
    return _DEFAULTS | {
        "inference_mode": True,
        "layers_to_transform": layers,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rslora,
    }


def _targets(
    adapted: Sequence[Module], weights: Sequence[Weight], num_layers: int
) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform: short names if all layers agree, else full names."""
    layers: dict[str, set[int]] = {}
    for module in adapted:
        if module.layer is not None:
            _, ours = split_path(module.path)
            layers.setdefault(ours, set()).add(module.layer)
    inside = sum(module.layer is not None for module in adapted)
    first = next(iter(layers.values()), set())
    if inside < len(adapted) or any(numbers != first for numbers in layers.values()):
        return sorted(module.name for module in adapted), None
    kernels = [row.ours.removesuffix(".kernel") for row in weights if row.ours.endswith(".kernel")]
    names = {row.ours.removesuffix(".kernel"): row.hf.removesuffix(".weight") for row in weights}
    short = []
    for ours in layers:
        last = names[ours].rsplit(".", 1)[-1]
        alike = [other for other in kernels if names[other].rsplit(".", 1)[-1] == last]
        short.append(last if len(alike) == 1 else names[ours].split("{}.")[1])
    return sorted(short), None if len(first) == num_layers else sorted(first)


# ---- load


def load_adapter(
    folder: Path,
    base_params: Mapping[str, Any],
    weights: Sequence[Weight],
    stacks: Sequence[int],
    *,
    base: str,
) -> Adapter:
    """Reads a PEFT LoRA folder for a base model, to train it further or to merge it.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_params: path -> anything with `.shape`, of the base model.
        weights: the base family's table.
        stacks: number of layers in each stack.
        base: name of the base model; a warning if the adapter names another.

    Raises:
        WeightError: not a LoRA adapter, a setting that jaxtune does not have, targets that the base
            lacks, or tensors that are missing, extra, mis-shaped or not finite (all listed).
    """
    fields = _read_config(folder)
    config = lora.Config(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(fields.get("lora_dropout") or 0.0),
    )
    kernels = [path.removesuffix(".kernel") for path in base_params if path.endswith(".kernel")]
    everything = {path: (True,) * len(layer_names(path, tuple(stacks))) for path in kernels}
    candidates = list(modules(weights, everything, stacks))
    adapted = _adapted(folder, fields, candidates)
    params = _read_params(folder, config, adapted, base_params)
    choice: dict[str, tuple[bool, ...]] = {}
    for path in dict.fromkeys(module.path for module in adapted):
        indices = {module.index or 0 for module in adapted if module.path == path}
        choice[path] = tuple(i in indices for i in range(len(everything[path])))
        scale = np.where(choice[path], config.scale, 0.0).astype(np.float32)
        params[f"{path}.adapter.scale"] = scale if split_path(path)[0] is not None else scale[0]
    return Adapter(config, choice, params, _warnings(folder, fields, base))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
        peft_type = fields.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WeightError(
            f"{folder} is not a PEFT adapter: no readable {CONFIG_FILE} ({error}) - "
            "give a folder that PEFT or jaxtune saved"
        ) from error
    if peft_type != "LORA":
        raise WeightError(f"{path}: peft_type {peft_type!r} is not supported - supported: LORA")
    problems = []
    for key, value in fields.items():
        if key == "init_lora_weights":
            unknown = value not in _PLAIN_STARTS
        else:
            unknown = bool(value) and key not in _UNDERSTOOD and value != _DEFAULTS.get(key)
        if unknown:
            problems.append(f"{key}={json.dumps(value)}")
    if problems:
        raise WeightError(
            f"{path} uses settings that jaxtune does not support - merge the adapter with PEFT and "
            "start from the merged model:" + listing(problems)
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise WeightError(f"{path}: r={rank!r}, lora_alpha={alpha!r} are not numbers - repair it")
    return fields


def _adapted(folder: Path, fields: Mapping[str, Any], candidates: Sequence[Module]) -> list[Module]:
    """The layers that PEFT would adapt on this base."""
    targets = fields.get("target_modules")
    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    excluded = fields.get("exclude_modules") or []
    adapted = [
        module
        for module in candidates
        if _named(module.name, targets)
        and not _named(module.name, excluded)
        and (layers is None or module.layer in layers)
    ]
    unused = [] if isinstance(targets, str) else targets or []
    unused = [name for name in unused if not any(_named(m.name, [name]) for m in candidates)]
    if unused or not adapted:
        known = sorted({module.name.rsplit(".", 1)[-1] for module in candidates})
        raise WeightError(
            f"{folder / CONFIG_FILE}: target_modules {unused or targets} are not in this base "
            f"model, whose layers are {', '.join(known)} - use the adapter's own base model"
        )
    return adapted


def _named(name: str, targets: Any) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds names or ends of names."""
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _read_params(
    folder: Path,
    config: lora.Config,
    adapted: Sequence[Module],
    base_params: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise WeightError(f"{folder} holds no {WEIGHTS_FILE} - copy the whole adapter folder")
    stored = read_header(path)
    params: dict[str, np.ndarray] = {}
    problems = []
    expected = set()
    for module in adapted:
        kernel = base_params[f"{module.path}.kernel"].shape
        d_in, d_out = kernel[-2:]
        for leaf, shape in (("a", (d_in, config.rank)), ("b", (config.rank, d_out))):
            key = f"{_PREFIX}{module.name}.lora_{leaf.upper()}.weight"
            expected.add(key)
            if key not in stored:
                problems.append(f"missing: {key}")
            elif stored[key].info.shape != shape[::-1]:
                shapes = f"{list(stored[key].info.shape)}, base and r ask for {list(shape[::-1])}"
                problems.append(f"wrong shape: {key} is {shapes}")
            else:
                array = read_tensor(stored[key]).astype(np.float32).T
                if not np.isfinite(array).all():
                    problems.append(f"NaN or infinity: {key}")
                stack = params.setdefault(
                    f"{module.path}.adapter.{leaf}", np.zeros((*kernel[:-2], *shape), np.float32)
                )
                stack[... if module.index is None else module.index] = array
    problems += [f"unexpected: {key}" for key in stored if key not in expected]
    if problems:
        raise WeightError(
            f"{path}: {len(problems)} tensors do not fit the base model and {CONFIG_FILE} - use "
            "the adapter's own base model:" + listing(problems, limit=len(problems))
        )
    return params


def _warnings(folder: Path, fields: Mapping[str, Any], base: str) -> tuple[str, ...]:
    trained_on = fields.get("base_model_name_or_path")
    if not trained_on or Path(trained_on).name == Path(base).name:
        return ()
    return (f"{folder} was trained on {trained_on!r}; it is used on {base!r}",)
