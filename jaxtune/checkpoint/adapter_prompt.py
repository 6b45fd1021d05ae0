"""Reads and writes prompts as Hugging Face PEFT folders.

`adapter_model.safetensors` holds one tensor, `prompt_embeddings`: the keys and values of a prefix
[P, L * 2 * K*H] or virtual tokens [P, D]. The network that made them while they were trained, if
there was one, is not stored, so that a prompt is read as one that has none.

Source: PEFT 0.21.2 (peft_model.py, tuners/tuners_utils.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import process
from jaxtune.checkpoint.adapter_config import CONFIG_FILE, PEFT_VERSION
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf_save import write_json
from jaxtune.checkpoint.safetensors import Location, read_tensor, write_folder
from jaxtune.checkpoint.tensors import TensorInfo
from jaxtune.errors import WeightError, listing
from jaxtune.peft import METHODS, Adapters

KEY = "prompt_embeddings"


def save_prompt(
    folder: Path,
    table: np.ndarray,
    adapters: Adapters,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes a PEFT folder; it appears under its name only when complete and checked.

    Args:
        folder: a new folder, or an earlier export, which is replaced.
        table: float32, what `METHODS[...].table` gives.
        adapters: the method.
        base: name of the base model, for base_model_name_or_path.
        revision: its revision, when it is a hub id.
    """
    if not process.is_first():
        return
    tensors = {KEY: TensorInfo(table.shape, table.dtype)}
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
        write_folder(
            temporary,
            tensors,
            lambda key: table,
            stem="adapter_model",
            max_shard_bytes=table.nbytes,
        )
        write_json(temporary / CONFIG_FILE, fields)


def read_prompt(
    method: str,
    fields: Mapping[str, Any],
    in_file: Mapping[str, Location],
    base_params: Mapping[str, Any],
    stacks: Sequence[int],
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """What PEFT would put in front of a base model, and its variables.

    Args:
        method: by which the prompt was made.
        fields: of adapter_config.json.
        in_file: the tensors of the folder.
        base_params: path -> anything with `.shape`, of the base model.
        stacks: number of layers in each stack.

    Raises:
        WeightError: tensors are missing, extra, mis-shaped or not finite (all listed).
    """
    made_by = METHODS[method]
    config = METHODS[made_by.FINISHED].from_peft(fields)
    shape = (config.num_virtual_tokens, made_by.columns(base_params, sum(stacks)))
    problems = [f"unexpected: {key}" for key in in_file if key != KEY]
    array = np.zeros(shape, np.float32)
    if KEY not in in_file:
        problems.append(f"missing: {KEY}")
    elif in_file[KEY].info.shape != shape:
        shapes = f"{list(in_file[KEY].info.shape)}, base and config ask for {list(shape)}"
        problems.append(f"wrong shape: {KEY} is {shapes}")
    else:
        array = read_tensor(in_file[KEY]).astype(np.float32)
        problems += [] if np.isfinite(array).all() else [f"NaN or infinity: {KEY}"]
    if problems:
        raise WeightError(
            f"the prompt does not fit the base model and {CONFIG_FILE} - use the adapter's own "
            "base model:" + listing(problems)
        )
    finished = METHODS[made_by.FINISHED]
    variables = finished.from_table(array, sum(stacks))
    params = {f"{finished.SLOT}.{leaf}": value for leaf, value in variables.items()}
    return Adapters(made_by.FINISHED, config, {finished.SLOT: (config,)}), params
