"""Reads and writes what fills a slot of the whole model as Hugging Face PEFT folders.

Of a prompt `adapter_model.safetensors` holds one tensor, `prompt_embeddings`: the keys and values
of a prefix [P, L * 2 * K*H] or virtual tokens [P, D]. The network that made them while they were
trained, if there was one, is not stored, so that a prompt is read as one that has none. Edits of
hidden states, which PEFT does not have, are stored as `peft/reft.py` says.

Source: PEFT 0.21.2 (peft_model.py, tuners/tuners_utils.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import process
from jaxtune.checkpoint.adapter_config import CONFIG_FILE, PEFT_VERSION
from jaxtune.checkpoint.adapter_file import read_tensors
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import write_folder
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import WeightError
from jaxtune.peft import METHODS, Adapters


def save_slot(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    adapters: Adapters,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes a PEFT folder; it appears under its name only when complete and checked.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        arrays: float32, what `METHODS[...].stored` gives.
        adapters: the method.
        base: name of the base model, for base_model_name_or_path.
        revision: its revision, when it is a hub id.
    """
    if not process.is_first():
        return
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    method = METHODS[adapters.method]
    fields = {
        **method.PEFT.defaults,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": method.PEFT.peft_type,
        "peft_version": PEFT_VERSION,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        **method.to_peft(adapters.config, {}),
    }
    with replace_folder(folder, {"kind": "adapter", "base": base}) as temporary:
        size = sum(array.nbytes for array in arrays.values())
        read = arrays.__getitem__
        write_folder(temporary, tensors, read, stem="adapter_model", max_shard_bytes=size)
        write_json(temporary / CONFIG_FILE, fields)


def read_slot(
    folder: Path,
    method: str,
    fields: Mapping[str, Any],
    base_params: Mapping[str, Any],
    stacks: Sequence[int],
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """What a folder puts into a base model, and its variables.

    Args:
        folder: of the adapter.
        method: by which it was made.
        fields: of adapter_config.json.
        base_params: path -> anything with `.shape`, of the base model.
        stacks: number of layers in each stack.

    Raises:
        WeightError: tensors are missing, extra, mis-shaped or not finite (all listed), or not what
            the method makes. ConfigError: the base lacks a layer.
    """
    name = METHODS[method].FINISHED
    finished, num_layers = METHODS[name], sum(stacks)
    config = finished.from_peft(fields)
    arrays = read_tensors(folder, finished.sizes(config, base_params, num_layers), {}, ())
    try:
        variables = finished.from_stored(arrays, config, num_layers)
    except ValueError as error:
        raise WeightError(f"{folder}: {error} - train or copy it again") from error
    params = {f"{finished.SLOT}.{leaf}": value for leaf, value in variables.items()}
    return Adapters(name, config, {finished.SLOT: (config,)}), params
