"""PEFT's adapters of a base less what they began as, as adapters of the base itself.

PEFT makes such a base W - s A0 B0 again whenever it loads them (`peft.split.AGAIN`). With it they
are, exactly, W + s (A B - A0 B0): the pairs [A, A0] and [B; -B0] of twice the rank, which is what
PEFT writes for `path_initial_model_for_weight_conversion`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoint.fused import Arrays, Whole
from jaxtune.checkpoint.hf import split_path
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import WeightError
from jaxtune.models.base import TRANSPOSE, Weight
from jaxtune.peft import Adapters, weight_name
from jaxtune.peft.base import EMBEDDING
from jaxtune.peft.lora import with_rank
from jaxtune.peft.split import AGAIN


def on_whole_base(
    start: str,
    adapters: Adapters,
    adapted: Sequence[Whole],
    values: Mapping[str, Arrays],
    weights: Sequence[Weight],
    base: Checkpoint,
) -> tuple[Adapters, list[Whole], dict[str, Arrays]]:
    """What was read of a folder, changed to go with the base's own weights.

    Args:
        start: PEFT's `init_lora_weights`, of those that it makes again.
        adapters: the method.
        adapted: its layers in the transformers model; the embedding starts as ever.
        values: variables of each, by name.
        weights: the base family's table.
        base: the base model.

    Raises:
        WeightError: the base is quantized, or one of the layers is a parameter of experts.
    """
    if base.quantized:
        raise WeightError(
            f"{base.name} is quantized, and init_lora_weights={start} is a part of its weights as "
            "they were before - use the dense model, and quant.format"
        )
    if parameters := [whole.name for whole in adapted if whole.first.is_parameter]:
        raise WeightError(
            f"init_lora_weights={start} starts matrices of layers, and {parameters[0]} is one "
            "parameter of all experts - save it merged, where it was trained"
        )
    rows, wide, arrays = {row.ours: row for row in weights}, [], dict(values)
    for whole in adapted:
        path = whole.first.path
        if path in adapters.choice and path != EMBEDDING:
            row = rows[weight_name(split_path(path)[1])]
            if start == "olora" and row.change is not TRANSPOSE:
                raise WeightError(
                    f"init_lora_weights=olora starts from the columns of {whole.name} as it is "
                    "stored, which is the other way round here - save it merged, with PEFT"
                )
            kernel = row.change.to_ours(base.read(f"{whole.name}.weight"))
            arrays[whole.name] = _with_taken(start, kernel, values[whole.name], whole)
            whole = whole._replace(config=with_rank(whole.config, 2 * whole.config.rank))
        wide.append(whole)
    config = with_rank(adapters.config, 2 * adapters.config.rank)
    return dataclasses.replace(adapters, config=config), wide, arrays


def _with_taken(start: str, kernel: np.ndarray, own: Arrays, whole: Whole) -> Arrays:
    """A layer's variables with the pair that PEFT takes out of its kernel [D_in, D_out]."""
    with jax.default_matmul_precision("highest"):
        a, b = AGAIN[start](jnp.asarray(kernel, jnp.float32), whole.config)
    pair = {
        "a": np.concatenate([own["a"], np.asarray(a)], axis=1),
        "b": np.concatenate([own["b"], -np.asarray(b)], axis=0),
    }
    return {**own, **pair}
