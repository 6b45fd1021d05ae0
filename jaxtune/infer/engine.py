"""Batched generation: a jitted pass over the prompts, then a jitted loop over new tokens.

Prompts are padded on the left, so that all rows of a batch fill the cache in step; padding has
segment id 0, and no token attends to it. Weights are arguments of the compiled programs, so the
live parameters of a training run can be used as they are.

The loop stays on the device until every row has ended. Only when somebody watches (to stream, or to
look for stop strings) does it come back to the host every few tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.distributed import to_device
from jaxtune.errors import ConfigError
from jaxtune.infer.batching import (
    PIECE,
    Batch,
    check_ids,
    check_prompts,
    make_batches,
    occurrences,
    rounded_length,
)
from jaxtune.infer.sampling import Sampling, sample
from jaxtune.models.block import is_encoder_decoder
from jaxtune.nn.cache import KVCache
from jaxtune.sharding import rules
from jaxtune.tree import Skeleton

# Logical axes of a cache's arrays, by their number of dimensions: keys and values, ids, length.
CACHE_AXES = {5: ("batch", "key_heads", None, None), 2: ("batch", None), 0: ()}
WATCHED_TOKENS = 8  # new tokens of a row between two looks of a watcher

# Called with the index of a prompt and its new tokens so far; True ends the row.
Watch = Callable[[int, list[int]], bool]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A batch on its way.

    Attributes:
        cache: keys and values; of an encoder-decoder a `SourceCache`.
        pad: int32 [B], padding before each prompt and its virtual tokens.
        limit: int32 [B], new tokens allowed.
        keys: a random key for each row, [B].
        token: int32 [B], the newest token, not yet in the cache.
        output: int32 [B, M], new tokens; -1 where a row had ended.
        count: int32 scalar, columns of `output` that are written.
        done: bool [B].
        seen: bool [B, V], tokens that have occurred; None without a repetition penalty.
    """

    cache: Any
    pad: jax.Array
    limit: jax.Array
    keys: jax.Array
    token: jax.Array
    output: jax.Array
    count: jax.Array
    done: jax.Array
    seen: jax.Array | None


@dataclass(frozen=True, eq=False)
class _Program:
    """The static argument of compiled functions; equal if made of the same skeleton object."""

    skeleton: Skeleton
    mesh: Mesh | None

    def __hash__(self) -> int:
        return hash((id(self.skeleton), self.mesh))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Program):
            return NotImplemented
        return self.skeleton is other.skeleton and self.mesh == other.mesh

    def put(self, array: np.ndarray) -> jax.Array:
        """A host array on the devices, its rows spread over the mesh."""
        if self.mesh is None:
            return jnp.asarray(array)
        axes = ("batch",) + (None,) * (array.ndim - 1)
        return to_device(array, rules.sharding(array.shape, axes, self.mesh))

    def fetch(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, int]:
        """`output`, `done` and `count` on the host of every process."""
        wanted = (rows.output, rows.done, rows.count)
        if self.mesh is not None:
            wanted = _replicate(self.mesh)(wanted)
        output, done, count = jax.device_get(wanted)
        return output, np.array(done), int(count)


def generate(
    skeleton: Skeleton,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
        skeleton: the model. Programs are compiled for this very object: keep it for the next call.
        params: its parameters, of any sharding over one mesh.
        prompts: token ids, at least one each; of an encoder-decoder the sources.
        max_new_tokens: so many for each prompt at most; fewer where the model's positions end.
        eos_ids: tokens that end an answer.
        sampling: how tokens are chosen.
        seed: with a prompt's index, the seed of its draws.
        watch: called every few tokens for each prompt whose answer has grown.

    Returns:
        The new tokens of each prompt, in order, without the one that ended it.

    Raises:
        ConfigError: a prompt is empty, has ids that the model lacks, or leaves no position free.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} - use 1 or more")
    program = _Program(skeleton, _mesh(params))
    model = skeleton.model(skeleton.abstract())
    check_prompts(prompts, model)
    row_multiple = 1 if program.mesh is None else rules.batch_shards(program.mesh)
    eos = np.array(sorted(eos_ids) or [-1], np.int32)
    results: list[list[int]] = [[] for _ in prompts]
    reads_sources = is_encoder_decoder(model.config)
    start = _start_target if reads_sources else _start
    # What has occurred is what the model has written, which does not have the source in it.
    before = [[model.config.start_token]] * len(prompts) if reads_sources else prompts
    for batch in make_batches(prompts, max_new_tokens, model, row_multiple):
        logits, rows = start(program, params, batch, seed)
        if sampling.repetition_penalty is not None:
            seen = occurrences(before, batch, model.config.vocab_size)
            rows = dataclasses.replace(rows, seen=program.put(seen))
        rows = _first(rows, logits, sampling, eos)
        decode = functools.partial(_decode, program, params, sampling=sampling, eos=eos)
        for i, new in zip(batch.indices, _finish(program, decode, rows, batch, watch), strict=True):
            results[i] = new
    return results


def score(
    skeleton: Skeleton, params: Mapping[str, Any], tokens: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Logits of every token (virtual ones left out), without a cache; all of them are the prompt.

    Args:
        skeleton, params: as for `generate`.
        tokens: int32 [B, T].
        mask: bool [B, T], False for padding.

    Returns:
        float32 [B, T, V].

    Raises:
        ConfigError: as for `generate`, or the model reads sources.
    """
    program = _Program(skeleton, _mesh(params))
    model = skeleton.model(skeleton.abstract())
    if is_encoder_decoder(model.config):
        raise ConfigError("logits of an encoder-decoder are of targets - use generate")
    check_ids(tokens, "input_ids", model.config)
    virtual, length = model.num_virtual_tokens, tokens.shape[1]
    behind = rounded_length(virtual + length) - virtual - length
    mask = np.pad(mask, ((0, 0), (virtual, 0)), constant_values=True)
    tokens, mask = np.pad(tokens, ((0, 0), (virtual, behind))), np.pad(mask, ((0, 0), (0, behind)))
    logits = _score(program, params, program.put(tokens), program.put(mask))
    if program.mesh is not None:
        logits = _replicate(program.mesh)(logits)
    return np.asarray(logits)[:, virtual : virtual + length]


def _mesh(params: Mapping[str, Any]) -> Mesh | None:
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, Mesh):
            return leaf.sharding.mesh
    return None


def _start(
    program: _Program, params: Mapping[str, Any], batch: Batch, seed: int
) -> tuple[jax.Array, Rows]:
    """Reads the prompts into a cache; the logits of the last prompt tokens, and fresh rows."""
    num_rows, prompt_slots = batch.tokens.shape
    cache = _cache_maker(program, num_rows, prompt_slots + batch.new_slots)()
    pad, logits = program.put(batch.pad), None
    prompts = program.put(prompt_slots - batch.pad[:, None])
    for start in range(0, prompt_slots, PIECE):
        piece = program.put(batch.tokens[:, start : start + PIECE])
        logits, cache = _read(program, params, cache, piece, pad, prompts)
    assert logits is not None  # no prompt is empty
    return logits, _fresh(program, batch, cache, pad, seed)


def _start_target(
    program: _Program, params: Mapping[str, Any], batch: Batch, seed: int
) -> tuple[jax.Array, Rows]:
    """Reads the sources; the logits of the first tokens of the targets, and fresh rows."""
    is_token = np.arange(batch.tokens.shape[1]) >= batch.pad[:, None]
    given = program.put(batch.tokens), program.put(is_token.astype(np.int32))
    logits, cache = _encode(program, params, *given, slots=batch.new_slots + 1)
    pad = program.put(np.zeros_like(batch.pad))  # every target begins in the first slot
    return logits, _fresh(program, batch, cache, pad, seed)


def _fresh(program: _Program, batch: Batch, cache: Any, pad: jax.Array, seed: int) -> Rows:
    """Rows of a batch that have no new tokens yet."""
    num_rows = len(batch.tokens)
    indices = np.zeros(num_rows, np.int32)
    indices[: len(batch.indices)] = batch.indices
    return Rows(
        cache=cache,
        pad=pad,
        limit=program.put(batch.limit),
        keys=_keys(seed, program.put(indices)),
        token=program.put(np.zeros(num_rows, np.int32)),
        output=program.put(np.full((num_rows, batch.new_slots), -1, np.int32)),
        count=jnp.int32(0),
        done=program.put(batch.limit == 0),
        seen=None,
    )


def _finish(
    program: _Program, decode: Callable, rows: Rows, batch: Batch, watch: Watch | None
) -> list[list[int]]:
    """Runs the loop to its end; the new tokens of each prompt of the batch."""
    every = batch.new_slots if watch is None else WATCHED_TOKENS
    finished = np.zeros(len(batch.indices), np.bool_)
    while True:
        output, done, count = program.fetch(rows)
        answers = [[int(token) for token in row if token >= 0] for row in output]
        if watch is not None:
            for row, i in enumerate(batch.indices):
                if not finished[row] and watch(i, answers[row]):
                    done[row] = True
        finished = done
        if done.all():
            return answers[: len(batch.indices)]
        rows = decode(dataclasses.replace(rows, done=program.put(done)), until=count + every)


# ---- on the device


def advance(rows: Rows, logits: jax.Array, sampling: Sampling, eos: jax.Array) -> Rows:
    """Chooses the next token of every row from logits [B, V], and notes it and what it ends."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows.keys, rows.count)
    token = sample(logits, keys, rows.seen, sampling)
    done = rows.done | (token[:, None] == eos).any(axis=-1)
    seen = rows.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(
        rows,
        token=token,
        output=rows.output.at[:, rows.count].set(jnp.where(done, -1, token)),
        count=rows.count + 1,
        done=done | (rows.count + 1 >= rows.limit),
        seen=seen,
    )


def _forward(
    program: _Program,
    params: Mapping[str, Any],
    cache: Any,
    tokens: jax.Array,
    pad: jax.Array,
    prompts: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Logits [B, V] after the last of tokens [B, T], which are appended to the cache.

    Of prompts `prompts` are the lengths [B, 1]; None: the tokens are new ones.
    """
    model = program.skeleton.model(params)
    positions = cache.length + jnp.arange(tokens.shape[1]) - pad[:, None]
    segment_ids = (positions >= 0).astype(jnp.int32)
    told = {} if prompts is None else {"prompts": prompts}
    hidden, cache = model.hidden(tokens, jnp.maximum(positions, 0), segment_ids, cache, **told)
    return model.logits(hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnums=0)
def _score(
    program: _Program, params: Mapping[str, Any], tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    model = program.skeleton.model(params)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    prompts = mask.sum(axis=1, keepdims=True)
    hidden, _ = model.hidden(tokens, positions, mask.astype(jnp.int32), prompts=prompts)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def _encode(
    program: _Program,
    params: Mapping[str, Any],
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    slots: int,
) -> tuple[jax.Array, Any]:
    """Logits [B, V] after the start token, and the cache of sources [B, S] with its room."""
    model = program.skeleton.model(params)
    cache = model.start(tokens, segment_ids, slots)
    rows = len(tokens)
    first = jnp.full((rows, 1), model.config.start_token, jnp.int32)
    return _forward(program, params, cache, first, jnp.zeros(rows, jnp.int32))


_read = jax.jit(_forward, static_argnums=0, donate_argnums=2)
_first = jax.jit(advance)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: _Program,
    params: Mapping[str, Any],
    rows: Rows,
    *,
    until: int,
    sampling: Sampling,
    eos: jax.Array,
) -> Rows:
    """Adds tokens until `count` reaches `until` or every row has ended."""

    def step(rows: Rows) -> Rows:
        logits, cache = _forward(program, params, rows.cache, rows.token[:, None], rows.pad)
        return advance(dataclasses.replace(rows, cache=cache), logits, sampling, eos)

    return jax.lax.while_loop(lambda rows: (rows.count < until) & ~rows.done.all(), step, rows)


@jax.jit
def _keys(seed: int, indices: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), indices)


@functools.lru_cache(maxsize=16)
def _cache_maker(program: _Program, num_rows: int, length: int) -> Callable[[], KVCache]:
    model = program.skeleton.model(program.skeleton.abstract())
    make = functools.partial(model.make_cache, num_rows, length)
    mesh = program.mesh
    if mesh is None:
        return jax.jit(make)
    shardings = jax.tree.map(
        lambda leaf: rules.sharding(leaf.shape, CACHE_AXES[leaf.ndim], mesh),
        jax.eval_shape(make),
    )
    return jax.jit(make, out_shardings=shardings)


@functools.lru_cache(maxsize=16)
def _replicate(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
