"""States, and folders of saved ones, for the tests of checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoint.store import Store


def make_state(seed: int = 0) -> dict:
    """Nested, of several dtypes, with a scalar and a name that has dots."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"layers.0.kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)},
        "opt": [
            jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16),
            jnp.asarray(rng.integers(0, 99, (4, 2)), jnp.int32),
        ],
        "step": jnp.int32(seed),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got: dict, expected: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved_run(folder: Path, saved_steps: tuple[int, ...] = (3, 6), **options) -> Store:
    """A closed store with states made from the step numbers."""
    store = Store(folder, **{"keep_last": 5, **options})
    for step in saved_steps:
        store.save(step, make_state(step), {"row": step}, metric=None)
    store.close()
    return store


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def restore(folder: Path, step: int | None = None, like: dict | None = None, verify: str = "full"):
    store = Store(folder, verify=verify)
    try:
        return store.restore(step, abstract(like or make_state()))
    finally:
        store.close()
