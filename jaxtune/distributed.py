"""Host data as global arrays, in one process or many."""

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding


def to_device(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A host array that every process holds whole, as a global array of any sharding.

    None stands for this process's default device.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_to_device(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The rows that this process holds of a global batch, as a global array."""
    return jax.make_array_from_process_local_data(sharding, array)
