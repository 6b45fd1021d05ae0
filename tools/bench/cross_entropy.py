"""Memory and time of head and loss, with gradients, against the same with all logits at once.

    python tools/bench/cross_entropy.py cpu     temporaries at V=128256, and milliseconds
    python tools/bench/cross_entropy.py v5e     temporaries of the program compiled for a TPU (v4,
                                                v5e, v5p, v6e) that is not here; needs libtpu

Prints a JSON object a line. CPU times are CPU time of the process (all its threads), the least of
several alternating runs; `ratio` is to the full logits.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jaxtune import ops  # noqa: E402
from jaxtune.planning.topology import DEVICELESS  # noqa: E402

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ON_CPU = ((4096, 256, 128256, 0), (2048, 256, 128256, 3), (2048, 576, 49152, 3))
GRADIENTS = {"x": (0,), "x and w": (0, 1)}


def full(x: Any, w: Any, targets: Any, weights: Any, *, transposed: bool) -> jax.Array:
    """The loss from the logits of all tokens."""
    spec = "btd,vd->btv" if transposed else "btd,dv->btv"
    logits = jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits, axis=-1) - at_target) * weights).sum()


def losses(names: tuple[str, ...], transposed: bool) -> dict[str, Callable]:
    """Functions of (x, w, targets, weights) by name; "full" is the one to compare with."""

    def ours(name: str) -> Callable:
        return lambda *operands: ops.cross_entropy(
            *operands, transposed=transposed, implementation=name
        )[0]

    found: dict[str, Callable] = {"full": functools.partial(full, transposed=transposed)}
    return found | {name: ours(name) for name in names}


def shapes(n: int, d: int, vocab: int, transposed: bool, dtype: Any, device: Any) -> tuple:
    """Abstract operands on a device."""
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    w = (vocab, d) if transposed else (d, vocab)
    wanted = (((2, n // 2, d), dtype), (w, dtype), ((2, n // 2), "int32"), ((2, n // 2), "float32"))
    return tuple(jax.ShapeDtypeStruct(s, jnp.dtype(t), sharding=place) for s, t in wanted)


def compiled(function: Callable, argnums: tuple[int, ...], operands: tuple) -> Any:
    """Value and gradients, compiled, in the context of the operands' device."""
    mesh = operands[0].sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(jax.value_and_grad(function, argnums)).lower(*operands).compile()


def on_tpu(chip: str) -> Iterator[dict]:
    """Llama-3.1-8B's head, 4096 tokens, bfloat16."""
    name = TOPOLOGIES[chip]
    os.environ |= DEVICELESS
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    for transposed in (True, False):
        operands = shapes(4096, 4096, 128256, transposed, jnp.bfloat16, device)
        for label, argnums in GRADIENTS.items():
            row = {"weight": "[V, D]" if transposed else "[D, V]", "gradients": label}
            for name, function in losses(("chunked", "pallas_tpu"), transposed).items():
                memory = compiled(function, argnums, operands).memory_analysis()
                temp = memory.temp_size_in_bytes / 2**20
                yield row | {"implementation": name, "temp_mib": round(temp, 1)}


def on_cpu(n: int, d: int, vocab: int, repeats: int) -> Iterator[dict]:
    """float32, a tied weight; memory, and times where `repeats` says how often."""
    operands = shapes(n, d, vocab, True, jnp.float32, jax.devices()[0])
    random = np.random.default_rng(0)
    for label, argnums in GRADIENTS.items():
        functions = losses(("chunked",), True).items()
        programs = {name: compiled(f, argnums, operands) for name, f in functions}
        values = [random.normal(0, 0.05, s.shape).astype(np.float32) for s in operands[:2]]
        values += [random.integers(0, vocab, operands[2].shape).astype(np.int32)]
        values += [np.ones(operands[3].shape, np.float32)]
        placed = jax.device_put(values, operands[0].sharding) if repeats else []
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, program in programs.items():
                start = time.process_time()
                jax.block_until_ready(program(*placed))
                seconds[name].append(time.process_time() - start)
        row = {"tokens": n, "width": d, "vocab": vocab, "gradients": label}
        for name, program in programs.items():
            temp = program.memory_analysis().temp_size_in_bytes
            base = programs["full"].memory_analysis().temp_size_in_bytes
            row |= {"implementation": name, "temp_mib": round(temp / 2**20, 1)}
            row |= {"temp_ratio": round(temp / base, 4)}
            if repeats:
                least, of_full = min(seconds[name]), min(seconds["full"])
                row |= {"cpu_ms": round(1e3 * least), "ratio": round(least / of_full, 3)}
            yield dict(row)


def main() -> None:
    """Prints the rows of one platform."""
    platform = sys.argv[1] if len(sys.argv) == 2 else ""
    if platform not in {"cpu", *TOPOLOGIES}:
        sys.exit(__doc__)
    rows = (r for c in ON_CPU for r in on_cpu(*c)) if platform == "cpu" else on_tpu(platform)
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
