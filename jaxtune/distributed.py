"""What differs between one process and many: who writes, and how host data become global arrays."""

import jax
import numpy as np
from jax.sharding import NamedSharding


def is_first_process() -> bool:
    """Whether this process writes logs, exports and manifests."""
    return jax.process_index() == 0


def to_device(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds whole, as a global array of any sharding."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_to_device(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The rows that this process holds of a global batch, as a global array."""
    return jax.make_array_from_process_local_data(sharding, array)
