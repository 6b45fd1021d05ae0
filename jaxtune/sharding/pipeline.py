"""The layers as a pipeline over the mesh axis `stage`.

The rows of a batch are cut into M micro-batches, which follow each other through the S stages. With
one chunk (GPipe, Huang et al. 2018, arXiv 1811.06965) a stage holds consecutive layers: at tick t
stage i computes micro-batch t - i and passes the result on. With V chunks (interleaved, Narayanan
et al. 2021, arXiv 2104.04473) the layers are V stacks, each spread over all stages: groups of S
micro-batches go round V times, so that a tick is V times shorter. Of M V + S - 1 ticks, S - 1 find
a stage without work; it then computes what nobody reads. Autodiff of the loop over ticks gives the
backward pass.

Only `stage` is taken into our own hands; along the other axes of the mesh the compiler partitions
the layers as ever. Before and after the pipeline rows are spread over the stages too
(`rules.RULES["row"]`), so that stages do not repeat each other's work. They travel by permutations,
whose derivatives are permutations: nothing is summed over stages.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxtune.errors import ConfigError
from jaxtune.sharding import rules

STAGE = "stage"

# (a stage's layers of all chunks, the chunk whose turn it is, x, rows) -> x, new cache entries
Layers = Callable[[Sequence[Any], jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def num_stages(mesh: Mesh) -> int:
    """Over how many stages a mesh spreads stacks of layers."""
    return mesh.shape.get(STAGE, 1)


def choose_micro_batches(asked: int, mesh: Mesh, rows: Mapping[str, int]) -> int:
    """Into how many micro-batches rows are cut: as many as stages, unless a number is asked for.

    Args:
        asked: `train.pipeline_micro_batches`.
        mesh: the devices.
        rows: of a data shard in a forward pass, by the option that says so.

    Raises:
        ConfigError: the rows cannot be cut so.
    """
    stages = num_stages(mesh)
    chosen = asked or stages
    option = f"config.train.pipeline_micro_batches={asked}"
    if stages == 1 and chosen > 1:
        raise ConfigError(f"{option} needs a pipeline - set mesh.stage, or leave it at 0")
    if chosen % stages:
        raise ConfigError(f"{option} is not a multiple of mesh.stage={stages} - use one, or 0")
    for name, count in rows.items():
        if count % chosen:
            raise ConfigError(
                f"config.{name}={count} rows cannot be cut into {chosen} micro-batches for "
                f"mesh.stage={stages} - use a multiple of {chosen}"
            )
    return chosen


def run(
    layers: Layers,
    chunks: Sequence[Any],
    x: jax.Array,
    rows: Any,
    *,
    mesh: Mesh,
    micro_batches: int,
) -> tuple[jax.Array, list[Any]]:
    """Sends x through all layers.

    Args:
        layers: what a stage does with a micro-batch when it is a chunk's turn.
        chunks: V trees of arrays [L / V, ...] whose leading axis is sharded over the stages.
        x: [B, T, D].
        rows: a tree of arrays [B, ...] that go with the rows of x.
        mesh: with an axis `stage`, whose size divides L / V.
        micro_batches: M, which divides the rows of each data shard; 1 if there is a cache.

    Returns:
        The last layer's output [B, T, D], and of each chunk the new cache entries [L / V, ...].
    """
    stages, shards = mesh.shape[STAGE], rules.batch_shards(mesh)
    spread = micro_batches % stages == 0
    x_spec = PartitionSpec(STAGE if spread else None)

    def stage(chunks: Sequence[Any], x: jax.Array, rows: Any) -> tuple[jax.Array, list[Any]]:
        index = jax.lax.axis_index(STAGE)
        inputs = _to_first(x, stages) if spread else x
        inputs = rules.constrained(inputs, (None, *rules.RESIDUAL), mesh)

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
            received, outputs = carry
            turn, micro_batch = _work(t - index, stages, len(chunks), micro_batches)
            begins = (index == 0) & (turn == 0)
            given = jnp.where(begins, inputs[micro_batch], received)
            own = jax.tree.map(lambda leaf: leaf[micro_batch], rows)
            y, new = layers(_with_own_keys(chunks, micro_batch), turn, given, own)
            # What comes too early or from an earlier chunk is written over later.
            outputs = jax.lax.dynamic_update_index_in_dim(outputs, y, micro_batch, 0)
            ring = [(i, (i + 1) % stages) for i in range(stages)]
            return (jax.lax.ppermute(y, STAGE, ring), outputs), new

        last = _begin(micro_batches - 1, len(chunks) - 1, stages, len(chunks))
        start = (jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs))
        (_, outputs), new = jax.lax.scan(tick, start, jnp.arange(last + stages))
        first = [_begin(0, turn, stages, len(chunks)) for turn in range(len(chunks))]
        entries = [jax.tree.map(lambda leaf, t=t: leaf[t + index], new) for t in first]
        return _from_last(outputs, stages, spread), entries

    mapped = jax.shard_map(
        stage,
        mesh=mesh,
        axis_names={STAGE},
        in_specs=(PartitionSpec(STAGE), x_spec, PartitionSpec()),
        out_specs=(x_spec, PartitionSpec(STAGE)),
        check_vma=False,
    )
    cut = functools.partial(_cut, parts=micro_batches, shards=shards)
    y, new = mapped(chunks, cut(x), jax.tree.map(cut, rows))
    return _joined(y, shards), new


def _begin(micro_batch: int, turn: int, stages: int, chunks: int) -> int:
    """The tick at which the first stage begins with a micro-batch in a chunk's turn."""
    group, place = divmod(micro_batch, stages)
    return (group * chunks + turn) * stages + place


def _work(
    item: jax.Array, stages: int, chunks: int, micro_batches: int
) -> tuple[jax.Array, jax.Array]:
    """The turn and the micro-batch of a stage's n-th item, the inverse of `_begin`."""
    rounds, place = jnp.divmod(jnp.maximum(item, 0), stages)
    group, turn = jnp.divmod(rounds, chunks)
    return turn, jnp.minimum(group * stages + place, micro_batches - 1)


def _cut(rows: jax.Array, *, parts: int, shards: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]: of every data shard's rows, each part has a share."""
    cut = rows.reshape(shards, parts, -1, *rows.shape[1:]).swapaxes(0, 1)
    return cut.reshape(parts, -1, *rows.shape[1:])


def _joined(parts: jax.Array, shards: int) -> jax.Array:
    """The inverse of `_cut`."""
    cut = parts.reshape(parts.shape[0], shards, -1, *parts.shape[2:]).swapaxes(0, 1)
    return cut.reshape(-1, *parts.shape[2:])


def _to_first(part: jax.Array, stages: int) -> jax.Array:
    """The parts of all stages, one after the other, on the first; zeros elsewhere."""
    return jnp.concatenate([jax.lax.ppermute(part, STAGE, [(i, 0)]) for i in range(stages)])


def _from_last(x: jax.Array, stages: int, spread: bool) -> jax.Array:
    """What the last stage has: to each stage its part, or the whole."""
    parts = jnp.split(x, stages) if spread else [x] * stages
    sent = [jax.lax.ppermute(part, STAGE, [(stages - 1, i)]) for i, part in enumerate(parts)]
    return functools.reduce(jnp.add, sent)  # zeros but for one


def _with_own_keys(chunks: Sequence[Any], micro_batch: jax.Array) -> Sequence[Any]:
    """The layers with the random keys (of dropout) of a micro-batch."""

    def own(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(leaf, micro_batch)

    return jax.tree.map(own, chunks)
