"""The train step with `model.remat=auto` decided by the compiled program's own account of memory.

The step is compiled from shapes alone, before any weight is read, with the cheapest policy first;
the first program that fits the devices is the one that trains.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune import build, data, hardware, optim, peft
from jaxtune.distributed import smallest
from jaxtune.errors import DoesNotFitError
from jaxtune.log import info, warn
from jaxtune.models.heads import head_of
from jaxtune.nn.stack import REMAT
from jaxtune.objectives import Objective
from jaxtune.schema import FETCHING
from jaxtune.sharding import pipeline, rules
from jaxtune.sharding.mesh import has_host_memory, own_device
from jaxtune.step import Metrics, TrainStep, make_train_step

# Of a device's memory, what a program may plan with; the rest is for the runtime and fragments.
USABLE = 0.95

_REMEDY = (
    "lower train.micro_batch_size or data.max_seq_len, set quant.format=nf4, or use more devices"
)


def fitted_step(
    run: build.Run, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> tuple[build.Run, TrainStep]:
    """The run as it will be trained, and its train step.

    Raises:
        DoesNotFitError: not even the leanest policy fits an accelerator.
    """
    if not _is_open(run):
        return run, _step(run, tx, schedule)
    run, step, compiled = _search(run, tx, schedule)
    return run, step if compiled is None else _step_for(abstract_batch(run), compiled, step)


def compiled_step(
    run: build.Run, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> tuple[build.Run, Any]:
    """The run as it would be trained, and the compiled program of its largest batch.

    Raises:
        DoesNotFitError: the compiler finds no program that fits.
    """
    step, compiled = _step(run, tx, schedule), None
    if _is_open(run):
        run, step, compiled = _search(run, tx, schedule)
    return run, _compiled(run, tx, step) if compiled is None else compiled


def fits(needed: int, limit: int | None) -> bool:
    """Whether a device has the bytes that are needed, as far as one knows."""
    return limit is None or needed <= USABLE * limit


def check_fits(needed: int, limit: int | None, kind: str) -> None:
    """Raises DoesNotFitError if a device of this kind has not the bytes that are needed."""
    if limit is not None and not fits(needed, limit):
        raise DoesNotFitError(
            f"the step needs {needed / 2**30:.2f} GiB, and {USABLE:.0%} of {limit / 2**30:.2f} GiB "
            f"of {kind} can be used - {_REMEDY}"
        )


def _is_open(run: build.Run) -> bool:
    """Whether memory decides what is recomputed."""
    fixed = run.config.model.remat != "auto" or run.turns is not None
    return not fixed and _limit(run) is not None


def _limit(run: build.Run) -> float | None:
    """Bytes of the device with the least memory, as far as each process knows its own."""
    return smallest(hardware.memory_bytes(own_device(run.mesh)))


def policies(run: build.Run) -> list[str]:
    """What may be recomputed on the run's devices, from the fastest to the leanest."""
    device = own_device(run.mesh)
    fetches = run.policy.offload_frozen or run.policy.chunks > 1
    # A CPU's memory is the host's; a pipeline refuses it.
    offloads = device.platform != "cpu" and pipeline.num_stages(run.mesh) == 1
    offloads = offloads and has_host_memory(device)
    names = FETCHING if fetches else REMAT
    return [name for name in names if name != "offload" or offloads]


def _compiled(run: build.Run, tx: optax.GradientTransformation, step: Any) -> Any:
    """The compiled program; DoesNotFitError if the compiler finds none that fits."""
    state = build.abstract_state(run, tx)
    try:
        return step.lower(state, run.frozen, abstract_batch(run)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(
            f"remat {run.policy.remat}: {_needed(str(error))} - {_REMEDY}"
        ) from error


def _needed(error: str) -> str:
    """What the compiler says of memory; it has two wordings."""
    sizes = re.search(r"([\d.]+[KMGT])\w*\)? (?:of|exceeds available HBM) \(?([\d.]+[KMGT])", error)
    if sizes is None:
        return "the compiler found no way to fit the device's memory"
    return f"the compiler needs {sizes[1]} of {sizes[2]}"


def _search(
    run: build.Run, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> tuple[build.Run, Any, Any]:
    """The run with the cheapest policy that fits, its step, and the compiled program.

    No program if nothing fits a CPU, whose memory may be more than is free now.
    """
    device = own_device(run.mesh)
    limit: Any = _limit(run)
    for name in policies(run):
        candidate = run if name == run.policy.remat else build.with_remat(run, name)
        step = _step(candidate, tx, schedule)
        try:
            compiled = _compiled(candidate, tx, step)
        except DoesNotFitError as error:
            info(str(error).partition(" - ")[0])
            continue
        needed = planned_bytes(compiled)
        said = f"remat {name} needs {needed / 1e9:.2f} GB of {limit / 1e9:.2f} GB a device"
        if fits(needed, limit):
            info(said)
            return candidate, step, compiled
        info(f"{said}: too much")
    if device.platform == "cpu":
        warn("the step may need more memory than is free; lower train.micro_batch_size")
        return candidate, step, None
    raise DoesNotFitError(
        f"the step does not fit {limit / 1e9:.1f} GB of {device.device_kind} with any model.remat "
        f"- {_REMEDY}"
    )


def planned_bytes(compiled: Any) -> int:
    """Device memory that a compiled program plans with: arguments, results, temporaries, code."""
    plan = compiled.memory_analysis()
    live = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return live + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes


def training_objective(run: build.Run) -> Objective:
    """The objective as a training step computes it: tokens may see less of a row, and the
    imbalance of experts or a method's penalty may count.

    A penalty is of the mean loss, so it counts with the weight of every micro-batch.
    """
    minimised: Any = run.objective
    factor = run.config.train.router_aux_loss
    if factor:
        minimised = functools.partial(minimised, imbalance=factor)
    penalty = peft.penalty(run.adapters)

    def objective(model: Any, batch: Any) -> tuple[jax.Array, Metrics]:
        model.attention_group = run.config.train.attention_group
        loss, sums = minimised(model, batch)
        return loss if penalty is None else loss + penalty(model) * sums["weight"], sums

    return objective


def _step(run: build.Run, tx: optax.GradientTransformation, schedule: optax.Schedule) -> Any:
    shardings = build.shardings(build.abstract_state(run, tx))
    seed = run.config.train.seed
    stages = pipeline.num_stages(run.mesh)
    apply = optim.make_apply(run.config.optim, build.trained_axes(run), stages)
    gradients = build.gradient_shardings(run)
    return make_train_step(
        run.skeleton,
        training_objective(run),
        tx,
        schedule,
        seed,
        shardings,
        apply,
        gradients,
        run.turns,
        run.loads,
    )


def _step_for(batch: Any, compiled: Any, step: TrainStep) -> TrainStep:
    """The compiled program for batches of its shape; others are compiled as they come."""
    known = shapes(batch)

    def train_step(state: Any, frozen: Any, given: Any) -> tuple:
        return (compiled if shapes(given) == known else step)(state, frozen, given)

    return train_step


def shapes(batch: data.Batch) -> tuple[tuple[int, ...], ...]:
    """Shapes of a batch's arrays: for others, a step is another program."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def abstract_batch(run: build.Run) -> data.Batch:
    """Shapes and shardings of the largest batch [A, B, T]."""
    train = run.config.train
    rows = train.micro_batch_size * rules.batch_shards(run.mesh)
    shape = (train.gradient_accumulation_steps, rows, run.config.data.max_seq_len)
    where = rules.sharding(shape, (None, "batch", "length"), run.mesh)
    if run.config.objective.is_paired:
        return _abstract_pairs(run, shape)
    kinds: dict[str, Any] = dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)
    kinds["weights"] = jnp.float32
    head = head_of(run.checkpoint.config)
    if head is not None:
        kinds["types"] = jnp.int32
    leaves: Any = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=where) for name, kind in kinds.items()
    }
    if head is not None:
        shape = (shape[0], head.columns, *shape[1:])
        where = rules.sharding(shape, (None, None, "batch", "length"), run.mesh)
        leaves["labels"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    return data.TokenBatch(**leaves)


def _abstract_pairs(run: build.Run, shape: tuple[int, ...]) -> data.PairBatch:
    """The batch of sources of a shape [A, B, S]."""

    def leaf(length: int, kind: Any = jnp.int32) -> Any:
        own = (*shape[:-1], length)
        where = rules.sharding(own, (None, "batch", "length"), run.mesh)
        return jax.ShapeDtypeStruct(own, kind, sharding=where)

    source, target = shape[-1], run.config.data.max_target_len
    ids = leaf(source), leaf(source), leaf(target), leaf(target)
    return data.PairBatch(*ids, leaf(target, jnp.float32))
