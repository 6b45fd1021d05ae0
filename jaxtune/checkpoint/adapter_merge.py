"""Several LoRA folders of one base into one; the base itself is not needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoint.adapter_config import CONFIG_FILE, read_config
from jaxtune.checkpoint.adapter_file import WEIGHTS_FILE
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import read_header, read_tensor, write_folder
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import ConfigError, WeightError, listing
from jaxtune.peft import lora
from jaxtune.peft.combine import COMBINATIONS, Knobs, Pair
from jaxtune.peft.split import AGAIN

_A, _B = ".lora_A.weight", ".lora_B.weight"


def merge_adapters(
    folders: Sequence[Path], weights: Sequence[float], out: Path, *, how: str, knobs: Knobs
) -> None:
    """Writes a LoRA folder that combines others.

    Args:
        folders: PEFT LoRA folders of one base.
        weights: factor of each.
        out: a new folder, or an earlier export, which is replaced.
        how: a key of `peft.combine.COMBINATIONS`.
        knobs: what the combination may need.

    Raises:
        WeightError: a folder is no plain LoRA, or they differ in their layers or widths.
        ConfigError: ranks differ where they must not.
    """
    read = [_read(folder) for folder in folders]
    fields, modules = read[0][0], sorted(read[0][1])
    for folder, (_, layers) in zip(folders, read, strict=True):
        differing = sorted(set(layers) ^ set(modules))
        if differing:
            raise WeightError(
                f"{folder} adapts other layers than {folders[0]} - merge adapters of the same "
                "layers:" + listing(differing)
            )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        pairs = [
            layers[module]._replace(weight=layers[module].weight * weight)
            for (_, layers), weight in zip(read, weights, strict=True)
        ]
        _check(module, pairs, folders, how)
        a, b = COMBINATIONS[how](pairs, knobs)
        name = f"base_model.model.{module}"
        tensors[name + _A], tensors[name + _B] = (
            np.ascontiguousarray(x, np.float32) for x in (a, b)
        )
        ranks[module] = len(a)
    base = fields.get("base_model_name_or_path")
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in tensors.items()}
    with replace_folder(out, {"kind": "adapter", "base": base}) as temporary:
        size = sum(info.nbytes for info in infos.values())
        write_folder(
            temporary, infos, tensors.__getitem__, stem="adapter_model", max_shard_bytes=size
        )
        write_json(temporary / CONFIG_FILE, fields | _ranks(ranks))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """adapter_config.json and the pairs of a folder by layer, weighted with their own scales."""
    method, fields = read_config(folder)
    stored = read_header(folder / WEIGHTS_FILE)
    names = {key.removesuffix(_A).removesuffix(_B) for key in stored}
    pairs_only = all(name + end in stored for name in names for end in (_A, _B))
    if method != "lora" or not pairs_only or len(stored) != 2 * len(names):
        raise WeightError(
            f"{folder} is no plain LoRA - only pairs of lora_A and lora_B can be combined; merge "
            "it into its base instead"
        )
    if fields.get("init_lora_weights") in AGAIN:
        raise WeightError(
            f"{folder} started as a part of its base, which is not here "
            f"(init_lora_weights={fields['init_lora_weights']}) - save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it into its base instead"
        )
    if fields.get("target_parameters"):
        raise WeightError(
            f"{folder} adapts parameters of experts, whose pairs cannot be combined one by one - "
            "merge it into its base instead"
        )
    modules = [name.removeprefix("base_model.model.") for name in sorted(names)]
    config = lora.from_peft(fields)
    own = lora.configure(config, dict.fromkeys(modules, (0, 0)))
    layers = {}
    for module in modules:
        a, b = (
            read_tensor(stored[f"base_model.model.{module}{end}"]).astype(np.float32)
            for end in (_A, _B)
        )
        layers[module] = Pair(a, b, own[module].scale)
    return fields, layers


def _check(module: str, pairs: Sequence[Pair], folders: Sequence[Path], how: str) -> None:
    widths = {(pair.a.shape[1], pair.b.shape[0]) for pair in pairs}
    if len(widths) > 1:
        raise WeightError(f"{module} has different widths in {folders} - use adapters of one base")
    ranks = [len(pair.a) for pair in pairs]
    if how not in ("cat", "svd") and len(set(ranks)) > 1:
        raise ConfigError(
            f"--how={how} adds matrices, but {module} has ranks {ranks} - use cat or svd"
        )


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Fields that say the ranks of all layers, with a scale of 1."""
    first = next(iter(ranks.values()))
    others = {module: rank for module, rank in ranks.items() if rank != first}
    patterns = {"rank_pattern": others, "alpha_pattern": dict(others)}
    return {"r": first, "lora_alpha": first, "use_rslora": False, **patterns}
