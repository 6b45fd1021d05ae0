"""From a config to a described run, and from a description to arrays.

`describe` knows every shape, dtype and sharding and makes no array; `fill_base`, `fill_adapter` and
`initial_state` make them. Models and the maths below never see the config: they get a `Policy`, and
adapter methods a config of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import frozen as frozen_weights
from jaxtune import models, optim, peft, residual, tree
from jaxtune.checkpoint import experts_in_peft, hf
from jaxtune.checkpoint.adapter import Adapter, first_values, load_adapter, places_beside
from jaxtune.checkpoint.adapter_config import is_apart, is_of_labels
from jaxtune.checkpoint.expand import deeper
from jaxtune.checkpoint.fused import require_supported
from jaxtune.checkpoint.label_head import require_pooler, with_head
from jaxtune.checkpoint.merging import merged
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.distributed import to_device
from jaxtune.errors import ConfigError
from jaxtune.log import warn
from jaxtune.models.base import Weight
from jaxtune.nn import quantized
from jaxtune.nn.noise import Noise
from jaxtune.nn.params import AdapterConstant, AdapterParam, HeadParam
from jaxtune.nn.stack import stack_sizes
from jaxtune.peft import adalora
from jaxtune.policy import (
    require_equal_chunks,
    require_room,
    resolve_objective,
    resolve_policy,
)
from jaxtune.quant import QArray
from jaxtune.run import Run
from jaxtune.schema import Peft, RunConfig
from jaxtune.sharding import rules
from jaxtune.sharding.mesh import HOST, require_host_memory
from jaxtune.step import TrainState
from jaxtune.tree import Params, Skeleton


def _as_float32(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _first_layers(leaf: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)


def describe(config: RunConfig, mesh: Mesh, checkpoint: Checkpoint) -> Run:
    """Builds the description of a run.

    Raises:
        WeightError: the checkpoint's config.json is of no known family, or the adapter does not
        fit. ConfigError: options that the method does not read, adapter targets that match
        nothing, a new pooler beside an adapter, or nothing can be offloaded here.
    """
    if problems := peft.unread(config.peft):
        raise ConfigError("; ".join(problems))
    folders = [Path(folder) for folder in config.peft.merged_adapters]
    for folder in (folder for folder in folders if not is_of_labels(folder)):
        checkpoint = merged(checkpoint, folder)
    stored, checkpoint = checkpoint, with_head(checkpoint, config.objective, config.train.seed)
    for folder in (folder for folder in folders if is_of_labels(folder)):  # they have the head
        checkpoint = merged(checkpoint, folder)
    run = _describe(config, mesh, deeper(config.peft, checkpoint))
    if run.adapters is not None:
        require_pooler(stored, run.family, run.adapters.saved)
    if why := _not_in_peft(run):
        warn(f"PEFT cannot load this adapter: {why} - jaxtune can, and merged models have it")
    return run


def _not_in_peft(run: Run) -> str | None:
    """Why PEFT would compute something else with the run's new adapter, if it would."""
    if run.adapters is None or run.imported or peft.fills_one_slot(run.adapters.method):
        return None
    weights = run.family.weights(run.model_config)
    if is_apart(run.adapters, weights):
        return f"it has one {run.adapters.method} for layers that are several here"
    return experts_in_peft.problem(run.adapters, weights, run.checkpoint.config["model_type"])


def _describe(config: RunConfig, mesh: Mesh, checkpoint: Checkpoint) -> Run:
    if config.optim.offload:
        require_host_memory(mesh, "optim.offload")
    family, model_config = models.read_config(checkpoint.config, checkpoint.name)
    policy = resolve_policy(config, model_config, mesh)
    stacks = stack_sizes(model_config.num_layers, policy, model_config.layer_kinds)
    weights = family.weights(model_config)

    def build_dense() -> nnx.Module:
        return family.build(model_config, policy, nnx.Rngs(0))

    def build_base() -> nnx.Module:
        model = build_dense()
        quantized.put(model, kernels)
        return model

    dense = tree.describe(build_dense)
    whole = peft.trained(dense.variables, config.peft, stacks) | dense.select(HeadParam)
    kernels = frozen_weights.quantized_kernels(config, checkpoint, weights, dense, stacks, whole)

    base = tree.describe(build_base)
    imported, adapters = _adapters(config.peft, base, checkpoint, weights, stacks)

    def build() -> nnx.Module:
        model: Any = build_base()
        if adapters is not None:
            peft.attach(model, adapters)
        if config.train.neftune_alpha:
            model.embed.noise = nnx.data(Noise(config.train.neftune_alpha))
        return model

    skeleton = tree.describe(build)
    require_room(config, skeleton.model(skeleton.abstract()))
    shapes = rules.placed(
        skeleton,
        mesh,
        sharding_stage=config.mesh.sharding_stage,
        strict=config.mesh.indivisible == "error",
    )
    if policy.chunks > 1:
        require_equal_chunks(shapes, policy.chunks)
    beside = {*adapters.saved, *adapters.biases} if adapters is not None else set()
    learning = skeleton.select(AdapterParam) | whole | beside
    if coded := sorted(name for name in learning if isinstance(shapes[name], QArray)):
        raise ConfigError(
            f"config.peft.method={config.peft.method} cannot train the quantized {coded[0]} - "
            "use peft.method=lora, or dense weights"
        )
    frozen = {name: leaf for name, leaf in shapes.items() if name not in learning}
    if policy.offload_frozen:
        frozen |= frozen_weights.on_host(frozen)
    trainable = {name: _as_float32(shapes[name]) for name in shapes if name in learning}
    turns = peft.turns(config.peft, model_config.num_layers, config.train.seed)
    layers = {name for name in trainable if turns and name.startswith("layers.")}
    count = turns.layers if turns else 0
    trainable |= {name: _first_layers(trainable[name], count) for name in layers}
    return Run(
        config=config,
        mesh=mesh,
        checkpoint=checkpoint,
        family=family,
        model_config=model_config,
        policy=policy,
        skeleton=skeleton,
        stacks=stacks,
        trainable=trainable,
        frozen=frozen,
        taken=residual.taken_pairs(config.peft, adapters, trainable | frozen, checkpoint),
        in_turn={name: shapes[name] for name in layers},
        turns=turns,
        adapters=adapters,
        imported=imported,
        objective=resolve_objective(config, mesh),
    )


def with_remat(run: Run, remat: str) -> Run:
    """The same run with another policy of recomputation."""
    model = dataclasses.replace(run.config.model, remat=remat)
    return _describe(dataclasses.replace(run.config, model=model), run.mesh, run.checkpoint)


def _adapters(
    config: Peft,
    base: Skeleton,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    stacks: tuple[int, ...],
) -> tuple[Adapter | None, peft.Adapters | None]:
    """The adapter from which training continues, and what is attached to the base."""
    if not peft.is_adapter(config.method):
        return None, None
    shapes = base.abstract()
    if config.adapter is None:
        adapters = peft.choose_adapters(base.model(shapes), config)
        if not peft.fills_one_slot(config.method):
            require_supported(adapters, shapes, weights, stacks)
            places_beside(adapters, shapes, weights, stacks)  # refuses what cannot be exported
        return None, adapters
    imported = load_adapter(Path(config.adapter), shapes, weights, stacks, base=checkpoint)
    if imported.partial:
        raise ConfigError(
            f"config.peft.adapter={config.adapter} has the biases {imported.partial[0]} of some "
            "layers, which are stacked in one array with others - set model.layers=unroll"
        )
    if imported.adapters.method != config.method:
        raise ConfigError(
            f"config.peft.adapter={config.adapter} holds a {imported.adapters.method} adapter - "
            f"set peft.method={imported.adapters.method}"
        )
    return imported, peft.continued(imported.adapters, config, base.model(shapes))


def trained_axes(run: Run) -> dict[str, rules.Axes]:
    """Logical names of the trailing axes of each trainable parameter; experts are a stack."""
    axes = {name: run.skeleton.axes(name) for name in run.trainable}
    return {name: found[1:] if found[:1] == ("experts",) else found for name, found in axes.items()}


def make_optimizer(
    run: Run, schedule: optax.Schedule, num_steps: int | None = None
) -> optax.GradientTransformation:
    """The optimizer of what the run trains.

    Args:
        run: the description.
        schedule: learning rate by step.
        num_steps: of the run; None: only the state's shapes are asked for.

    Raises:
        ConfigError: the run is too short for its budget of ranks.
    """
    tx = optim.make_optimizer(
        run.config.optim,
        schedule,
        trained_axes(run),
        restarted=run.in_turn.keys(),
        every=run.turns.steps if run.turns else 1,
        allocation=_allocation(run, num_steps),
    )
    return optim.balance(tx, run.loads, run.config.train.router_bias_update_rate)


def _allocation(run: Run, num_steps: int | None) -> optim.Allocation | None:
    """How a new AdaLoRA loses ranks; a continued one keeps those that it has."""
    adapters = run.adapters
    if adapters is None or run.imported or adapters.method != "adalora":
        return None
    c = adapters.config
    fixed = c.budget_start_steps + c.budget_final_steps
    if num_steps is not None and fixed >= num_steps:
        raise ConfigError(
            f"config.peft: budget_start_steps + budget_final_steps = {fixed} leave none of "
            f"{num_steps} steps in which ranks are given up - lower them, or train longer"
        )
    adapted = sum(config is not None for stack in adapters.choice.values() for config in stack)
    budget, decides = optim.cubic(
        adapted * c.rank,
        adapted * c.target_rank,
        begin=c.budget_start_steps,
        end=(num_steps or fixed + 1) - c.budget_final_steps,
        every=c.budget_every_steps,
    )
    triplets = adalora.triplets(adapters)
    return optim.Allocation(triplets, budget, decides, c.importance_b1, c.importance_b2)


def abstract_state(run: Run, tx: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the training state.

    What the optimizer keeps under a parameter's name has the parameter's axes, some of them
    shorter (means over rows, scales of blocks), and is sharded by the same rules. Only what it
    keeps of matrices is worth a place in host memory.
    """
    whole = NamedSharding(run.mesh, PartitionSpec())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if getattr(key, "key", None) in run.trainable]
        where = whole
        if names:
            axes = run.skeleton.axes(names[-1])
            where = rules.sharding(leaf.shape, axes, run.mesh)
            if run.config.optim.offload and len(axes) >= 2:
                where = where.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, run.trainable))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(scalar, scalar, run.trainable, opt_state, run.in_turn, run.taken)


def gradient_shardings(run: Run) -> dict[str, NamedSharding] | None:
    """Where gradients are summed: like the optimizer's state, but whole with sharding stage 1."""
    if run.mesh.size == 1 or run.config.mesh.sharding_stage == 1:
        return None
    return {
        name: rules.sharding(leaf.shape, run.skeleton.axes(name), run.mesh)
        for name, leaf in run.trainable.items()
    }


def shardings(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def adapter_variables(skeleton: Skeleton) -> set[str]:
    """Names of the variables that belong to adapters."""
    return skeleton.select(AdapterParam) | skeleton.select(AdapterConstant)


def quantized_kernels(run: Run) -> set[str]:
    """Names of the frozen kernels that are kept quantized."""
    return {name for name, leaf in run.frozen.items() if isinstance(leaf, QArray)}


def fill_base(
    run: Run, progress: Callable[[int, int], None], taken: Params | None = None
) -> Params:
    """Streams the base weights from the checkpoint into arrays of the described shardings.

    Args:
        run: the description.
        progress: called with (tensors loaded, tensors in all).
        taken: of a run that goes on, `TrainState.taken`; None: of one whose adapters start as
            parts of the base, their first values come with it.
    """
    variables = adapter_variables(run.skeleton)
    wanted = run.variables
    base = {name: leaf for name, leaf in wanted.items() if name not in variables}
    read = functools.partial(
        hf.load_weights,
        run.checkpoint,
        run.family.weights(run.model_config),
        base,
        run.stacks,
        allow_nan=run.config.model.allow_nan,
        progress=progress,
    )
    if peft.start(run.config.peft) is None:
        return read()
    return residual.load(run, lambda keep: read(keep=keep), taken)


def fill_adapter(run: Run, base: Params) -> Params:
    """First values of the adapter, of the imported one or the method's own; and of what the
    imported one trained beside it.

    Args:
        run: the description.
        base: the base's parameters, from which some of the first values follow, and those that
            came with it.
    """
    if run.adapters is None:
        return {}
    wanted = run.variables
    names = adapter_variables(run.skeleton) - base.keys()
    if run.imported is not None:
        names |= run.imported.params.keys()
    return first_values(
        {name: wanted[name] for name in names},
        run.adapters,
        run.stacks,
        base,
        stored=run.imported.params if run.imported else {},
        seed=run.config.train.seed,
    )


def initial_state(run: Run, tx: optax.GradientTransformation, values: Params) -> TrainState:
    """A new training state around the given trainable values."""
    abstract = abstract_state(run, tx)
    trainable = {name: values[name] for name in run.trainable.keys() - run.in_turn.keys()}
    for name in run.in_turn:  # the first step fetches them
        leaf = run.trainable[name]
        trainable[name] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    in_turn, taken = ({name: values[name] for name in part} for part in (run.in_turn, run.taken))
    init = jax.jit(tx.init, out_shardings=shardings(abstract.opt_state))
    zero = np.zeros((), np.int32)
    step, bad_steps = (to_device(zero, abstract.step.sharding) for _ in range(2))
    return TrainState(step, bad_steps, trainable, init(trainable), in_turn, taken)
