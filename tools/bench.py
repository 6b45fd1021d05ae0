"""Times operations on this machine against plain XLA and library kernels, within one run.

    python tools/bench.py                           sizes for a CPU
    python tools/bench.py --size=llama8b            one layer of Llama-3.1-8B, 2048 tokens
    python tools/bench.py --filter=matmul --repeats=20 --dtype=bfloat16

Prints one JSON object: the device, and for each variant of each case the median milliseconds of
forward and backward, the ratio to the case's first variant (below 1: faster), and the bytes of
temporaries of the compiled program. Variants take turns, so that a busy machine slows all of them
down alike. tests/test_bench.py runs the same cases on tiny shapes and compares their values.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import ops, quant


@dataclass(frozen=True)
class Size:
    """Shapes: T tokens, N and K heads of H, matrices [D, F], vocabulary V."""

    T: int
    N: int
    K: int
    H: int
    D: int
    F: int
    V: int


SIZES = {
    "tiny": Size(T=32, N=4, K=2, H=16, D=128, F=192, V=96),
    "small": Size(T=512, N=8, K=2, H=64, D=512, F=1536, V=32768),
    "llama8b": Size(T=2048, N=32, K=8, H=128, D=4096, F=14336, V=128256),
}

# Kernels of one platform; the others run everywhere.
KERNELS = {
    "tpu": {"attention": ("splash", "pallas_tpu"), "loss": ("pallas_tpu",)},
    "gpu": {"attention": ("cudnn", "pallas_gpu"), "loss": ()},
    "cpu": {"attention": (), "loss": ()},
}


@dataclass(frozen=True)
class Case:
    """Variants of one computation on the same arguments; the first is what others are held to.

    Attributes:
        name: `operation` or `operation/form`.
        args: the arguments.
        variants: functions of args, by name; results are trees of arrays.
        tolerance: how far results may be from the first variant's, relative to the largest
            number; None: they are different numbers (other formats).
    """

    name: str
    args: tuple[Any, ...]
    variants: Mapping[str, Callable]
    tolerance: float | None


def _arrays(dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def _with_gradient(function: Callable, count: int) -> Callable:
    """(result, gradients of the first `count` arguments) for a cotangent, the last argument."""

    def run(*args: Any) -> Any:
        *inputs, cotangent = args
        rest = inputs[count:]
        y, pullback = jax.vjp(lambda *given: function(*given, *rest), *inputs[:count])
        return y, pullback(cotangent)

    return run


def attention(size: Size, dtype: Any, platform: str) -> Iterator[Case]:
    """Causal grouped-query attention, forward and backward, against jax.nn's."""
    shapes = [(1, size.T, heads, size.H) for heads in (size.N, size.K, size.K, size.N)]

    def library(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def ours(implementation: str) -> Callable:
        return lambda q, k, v: ops.attention(q, k, v, implementation=implementation)

    functions = {"jax.nn": library}
    functions |= {name: ours(name) for name in ("xla", *KERNELS[platform]["attention"])}
    variants = {name: _with_gradient(function, 3) for name, function in functions.items()}
    yield Case("attention", tuple(_arrays(dtype, *shapes)), variants, 2e-5)


def matmul(size: Size, dtype: Any, platform: str) -> Iterator[Case]:
    """x W and the gradient of x for each format, against the dense product."""
    x, w, dy = _arrays(dtype, (size.T, size.D), (size.D, size.F), (size.T, size.F))
    implementations = ("xla", "pallas_tpu") if platform == "tpu" else ("xla",)
    for name in quant.FORMATS:
        q = jax.jit(lambda w, name=name: quant.quantize(w, name))(w)
        decoded = quant.dequantize(q, dtype)

        functions: dict[str, Callable] = {"dense": _dense_product}
        functions |= {kind: _quantized_product(kind) for kind in implementations}
        variants = {kind: _with_gradient(function, 1) for kind, function in functions.items()}
        yield Case(f"matmul/{name}", (x, q, decoded, dy), variants, 2e-5)


def _dense_product(x: Any, q: Any, decoded: Any) -> Any:
    return x @ decoded


def _quantized_product(implementation: str) -> Callable:
    return lambda x, q, decoded: ops.matmul(x, q, implementation=implementation)


def dequantize(size: Size, dtype: Any, platform: str) -> Iterator[Case]:
    """Decoding a weight of each format, against copying the dense one."""
    w = _arrays(dtype, (size.D, size.F))[0]
    kernels = {name: jax.jit(lambda w, n=name: quant.quantize(w, n))(w) for name in quant.FORMATS}

    def copy(w: Any, kernels: Any) -> Any:
        return w * 2

    def decode(name: str) -> Callable:
        return lambda w, kernels: quant.dequantize(kernels[name], dtype)

    variants = {"copy": copy} | {name: decode(name) for name in kernels}
    yield Case("dequantize", (w, kernels), variants, None)


def cross_entropy(size: Size, dtype: Any, platform: str) -> Iterator[Case]:
    """Head and loss with the gradient of hidden states, against all logits at once."""
    x, w = _arrays(dtype, (1, size.T, size.D), (size.D, size.V))
    x, w = x / size.D**0.25, w / size.D**0.25
    targets = jnp.asarray(np.random.default_rng(1).integers(0, size.V, (1, size.T)))
    weights = jnp.ones((1, size.T), jnp.float32)

    def full(x: Any, w: Any, targets: Any, weights: Any) -> Any:
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -(picked[..., 0] * weights).sum()

    def ours(implementation: str) -> Callable:
        def loss(x: Any, w: Any, targets: Any, weights: Any) -> Any:
            return ops.cross_entropy(
                x, w, targets, weights, transposed=False, implementation=implementation
            )[0]

        return loss

    functions = {"full logits": full}
    functions |= {name: ours(name) for name in ("chunked", *KERNELS[platform]["loss"])}
    variants = {name: jax.value_and_grad(function) for name, function in functions.items()}
    yield Case("cross_entropy", (x, w, targets, weights), variants, 2e-5)


BENCHMARKS = (attention, matmul, dequantize, cross_entropy)


def cases(size: str, dtype: Any, platform: str, pattern: str = "") -> Iterator[Case]:
    """The cases whose names a regular expression finds.

    Args:
        size: a name of SIZES.
        dtype: of activations and dense weights.
        platform: "cpu", "gpu" or "tpu"; its kernels are variants.
        pattern: searched for in the names.
    """
    for make in BENCHMARKS:
        for case in make(SIZES[size], dtype, platform):
            if re.search(pattern, case.name):
                yield case


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds, ratio to the first variant and temporaries of each variant."""
    compiled = {
        name: jax.jit(function).lower(*case.args).compile()
        for name, function in case.variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(repeats + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*case.args))
            if turn:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return [
        {
            "case": case.name,
            "variant": name,
            "ms": round(median * 1e3, 3),
            "ratio": round(median / first, 3),
            "temp_bytes": getattr(compiled[name].memory_analysis(), "temp_size_in_bytes", None),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    """Reads the command line, runs the cases one after the other, prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--filter", default="", help="regular expression of case names")
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = jax.devices()[0]
    kind = str(device.platform)
    platform = {"cuda": "gpu"}.get(kind, kind)
    found = cases(args.size, jnp.dtype(args.dtype), platform, args.filter)
    results = [line for case in found for line in measure(case, args.repeats)]
    head = {"device": device.device_kind, "jax": jax.__version__, "size": args.size}
    print(json.dumps(head | {"dtype": args.dtype, "results": results}, indent=1))


if __name__ == "__main__":
    main()
