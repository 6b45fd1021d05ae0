"""A base of whose weights adapters start as a part (`peft.split`): what it keeps, and its exports.

A kernel is split while it is read, before it is rounded or quantized: one layer at a time is held
twice. The pairs taken out of the base are part of the training state, so a resumed run makes the
same base again without another decomposition, and exports know what the files' weights have more.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxtune import peft, quant
from jaxtune.checkpoint.hf import Place
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.distributed import to_device, to_host
from jaxtune.errors import ConfigError
from jaxtune.peft import lora
from jaxtune.peft.base import EMBEDDING
from jaxtune.peft.split import Start, loftq, pissa, without
from jaxtune.quant import QArray
from jaxtune.run import Run
from jaxtune.schema import Peft
from jaxtune.tree import Params

Keep = Callable[[Place, np.ndarray], np.ndarray]


def taken_pairs(
    config: Peft, adapters: peft.Adapters | None, shapes: Params, checkpoint: Checkpoint
) -> Params:
    """Shapes and places of the pairs that the base loses, float32: <layer>.taken.a and .taken.b.

    Args:
        config: of the run.
        adapters: what is attached.
        shapes: of all variables, with shardings.
        checkpoint: of the base.

    Raises:
        ConfigError: the base's files are quantized, the embedding is adapted, a layer that has to
            be quantized is not, or has fewer singular values than its rank.
    """
    start = peft.start(config)
    if start is None or adapters is None:
        return {}
    if checkpoint.quantized:
        raise ConfigError(
            f"config.peft.init={start.init} splits the weights before they are quantized, and "
            f"{checkpoint.name} is quantized already - take the dense model and quant.format"
        )
    if EMBEDDING in adapters.choice:
        raise ConfigError(
            f"config.peft.target_modules: peft.init={start.init} is for linear layers - leave "
            f"{EMBEDDING} out"
        )
    for path, configs in adapters.choice.items():
        if start.init == "loftq" and not isinstance(shapes[f"{path}.kernel"], QArray):
            remedy = "leave it out of peft.target_modules"
            if path.startswith("layers."):  # others are never quantized
                remedy = f"add it to quant.format, or {remedy}"
            raise ConfigError(
                f"config.peft.init=loftq starts from what quantizing loses, and {path} is not "
                f"quantized - {remedy}"
            )
        width = min(shapes[f"{path}.kernel"].shape[-2:])
        rank = max(config.rank for config in configs if config is not None)
        if rank > width:
            raise ConfigError(
                f"config.peft.rank={rank}: {path} has only {width} singular values, from which "
                f"peft.init={start.init} starts - use a smaller rank or rank_pattern"
            )
    if start.init == "loftq" and start.loftq_iterations == 1:
        return {}  # what is quantized is the kernel itself
    pairs = ((path, leaf) for path in adapters.choice for leaf in "ab")
    return {f"{path}.taken.{leaf}": shapes[f"{path}.adapter.{leaf}"] for path, leaf in pairs}


def load(run: Run, read: Callable[[Keep], Params], taken: Params | None) -> Params:
    """The base's parameters, less what is taken out of them.

    Args:
        run: its adapters start as parts of the base.
        read: loads parameters, of which a function decides what is kept.
        taken: the pairs of a run that goes on; None: it begins, and the result has the first values
            of its adapters and the pairs beside the base.
    """
    start, adapters = peft.start(run.config.peft), run.adapters
    assert start is not None and adapters is not None
    wanted = run.taken
    if taken is None:
        wanted = wanted | {n: leaf for n, leaf in run.trainable.items() if _is_pair(n)}
        pairs = {name: np.zeros(leaf.shape, np.float32) for name, leaf in wanted.items()}
    else:
        pairs = {name: to_host(array) for name, array in taken.items()}

    def keep(place: Place, array: np.ndarray) -> np.ndarray:
        path, _, leaf = place.path.rpartition(".")
        config = adapters.choice[path][place.position] if path in adapters.choice else None
        if leaf != "kernel" or config is None:
            return array
        weight = jnp.asarray(array, jnp.float32)
        if taken is None:
            for name, value in _split(weight, config, start, run, place).items():
                own = pairs[f"{path}.{name}"][place.index]
                own[tuple(map(slice, value.shape))] = value
        if not run.taken:
            return array
        a, b = (pairs[f"{path}.taken.{leaf}"][place.index] for leaf in "ab")
        return np.asarray(without(weight, (a, b), config.scale))

    with jax.default_matmul_precision("highest"):
        base = read(keep)
    if taken is not None:
        return base
    return base | {name: to_device(pairs[name], leaf.sharding) for name, leaf in wanted.items()}


def _is_pair(name: str) -> bool:
    return name.endswith((".adapter.a", ".adapter.b"))


def _split(
    weight: jax.Array, config: Any, start: Start, run: Run, place: Place
) -> dict[str, np.ndarray]:
    """The first values of a layer's adapter, and the pair that the base loses."""
    path = place.path.removesuffix(".kernel")
    layer = peft.layer_names(path, run.stacks)[place.position][1]
    rng = np.random.default_rng([run.config.train.seed, zlib.crc32(layer.encode())])
    if start.init == "pissa":
        split = pissa(weight, config, start, rng)
    else:
        like = run.frozen[place.path]

        def rounded(kernel: jax.Array) -> jax.Array:
            return quant.dequantize(quant.quantize_like(like, kernel), jnp.float32)

        split = loftq(weight, config, start, rounded)
    if jax.process_count() > 1:  # shards of one decomposition, to the last bit
        split = multihost_utils.broadcast_one_to_all(split)
    found = {"adapter.a": split.a, "adapter.b": split.b}
    if split.taken is not None:
        found |= {"taken.a": split.taken[0], "taken.b": split.taken[1]}
    return {name: np.asarray(value) for name, value in found.items()}


def has_own_base(run: Run) -> bool:
    """Whether the run's adapters belong to a base that no file holds."""
    start = peft.start(run.config.peft)
    return start is not None and start.init == "loftq" and bool(run.taken)


def on_original(
    run: Run, params: Params, decoded: set[str] | frozenset[str] = frozenset()
) -> tuple[peft.Adapters, Params]:
    """The adapters of a run, and its parameters, as they go with the weights of the base's files.

    W - s A0 B0 + s A B is a LoRA of twice the rank on W, with the pairs [A, A0] and [B; -B0] and
    the same scale: what PEFT 0.21.2 writes for `path_initial_model_for_weight_conversion`. Ranks
    lie in turn here, so that those of a layer with a smaller rank are still the first ones.

    Args:
        run: the description.
        params: by name, the pairs taken out of the base among them.
        decoded: kernels that are taken from memory instead, where the pair is out of them.
    """
    adapters, start = run.adapters, peft.start(run.config.peft)
    assert adapters is not None
    if start is None or start.init != "pissa":
        return adapters, params
    wide = {p: c for p, c in adapters.choice.items() if f"{p}.kernel" not in decoded}
    changed = dict(params)
    for path in wide:
        (a, b), (a0, b0) = (
            [params[f"{path}.{part}.{leaf}"] for leaf in "ab"] for part in ("adapter", "taken")
        )
        *stack, rank, width = b.shape
        changed[f"{path}.adapter.a"] = jnp.stack([a, a0], -1).reshape(*stack, -1, 2 * rank)
        changed[f"{path}.adapter.b"] = jnp.stack([b, -b0], -2).reshape(*stack, 2 * rank, width)
    choice = dict(adapters.choice)
    for path, configs in wide.items():
        choice[path] = tuple(
            config and lora.with_rank(config, 2 * config.rank) for config in configs
        )
    config = lora.with_rank(adapters.config, 2 * adapters.config.rank)
    return dataclasses.replace(adapters, config=config, choice=choice), changed
