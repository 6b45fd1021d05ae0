"""A base's weights with what was trained beside them, one tensor at a time."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.checkpoint.hf import Place, split_path
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.distributed import to_host
from jaxtune.errors import ConfigError
from jaxtune.models.base import Weight
from jaxtune.peft import Adapters, fills_one_slot, module_of
from jaxtune.quant import QArray


def require_mergeable(adapters: Adapters, names: Container[str]) -> None:
    """Raises ConfigError if adapters cannot be put into the weights of a base.

    Args:
        adapters: what is attached.
        names: of the base's parameters.
    """
    if fills_one_slot(adapters.method):
        raise ConfigError(
            f"peft.method={adapters.method} changes no weights, so there is nothing to merge - "
            "use the adapter folder"
        )
    if getattr(adapters.config, "lora_bias", False):
        absent = [path for path in adapters.choice if f"{path}.bias" not in names]
        if absent:
            raise ConfigError(
                f"peft.lora_bias: {absent[0]} has no bias into which that of its adapter could be "
                "merged - use the adapter folder, or train without lora_bias"
            )


def changed(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    stacks: Sequence[int],
) -> dict[str, Any]:
    """The base parameters that training changed: path -> anything with `.shape`."""
    found = {path: leaf for path, leaf in params.items() if ".adapter." not in path}
    rows = {row.ours: row for row in weights}
    for path in adapters.layers if adapters is not None else ():
        stack, module = split_path(path)
        lead = () if stack is None else (stacks[stack],)
        for leaf in ("kernel", "table", "bias"):
            row = rows.get(f"{module}.{leaf}")
            info = row and checkpoint.tensors.get(row.names(sum(stacks[: stack or 0]))[0])
            if row and info:
                shape = row.take(np.broadcast_to(np.uint8(0), info.shape)).shape
                experts = (row.experts,) if row.experts else ()
                like = jax.ShapeDtypeStruct((*lead, *experts, *shape), info.dtype)
                found.setdefault(f"{path}.{leaf}", like)
    return found


def own(params: Mapping[str, Any], place: Place, stored: Callable[[], np.ndarray]) -> np.ndarray:
    """One layer's array without its adapter; `stored` reads the tensor of one not in `params`."""
    if place.path in params:
        return _host(params, place.path, place.index)
    return place.row.take(stored())


def with_adapter(
    params: Mapping[str, Any], adapters: Adapters | None, place: Place, array: np.ndarray
) -> np.ndarray:
    """One layer's array with its adapter, float32; the same object if it has none."""
    module, _, leaf = place.path.rpartition(".")
    if adapters is None or module not in adapters.layers:
        return array
    config = adapters.layers[module][place.position]
    if config is None:  # a layer of the stack that is not adapted
        return array
    slot = f"{module}.adapter."
    values = {
        path.removeprefix(slot): _host(params, path, place.index)
        for path in params
        if path.startswith(slot)
    }
    return module_of(adapters, module).merge(leaf, array.astype(np.float32), values, config)


def _host(params: Mapping[str, Any], path: str, index: tuple[int, ...]) -> np.ndarray:
    """One layer's array of a parameter, decoded, on the host."""
    value = jax.tree.map(lambda leaf: leaf[index], params[path])
    if isinstance(value, QArray):
        value = quant.dequantize(value, jnp.float32)
    return to_host(value)
