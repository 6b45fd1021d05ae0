"""One optimizer step, jitted, with donated state.

Losses and gradients are summed over micro-batches in float32 and divided once by the sum of
weights: exact for packed and uneven micro-batches. A step whose loss or gradient is not finite
leaves parameters and optimizer state as they were, bit for bit, and is counted.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune import peft
from jaxtune.nn import noise
from jaxtune.nn.turns import Rows
from jaxtune.objectives import Objective
from jaxtune.optim import Apply, apply_whole
from jaxtune.tree import Params, Skeleton

Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Params, Any], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        step: int32, optimizer steps taken, skipped ones included.
        bad_steps: int32, consecutive skipped steps up to now.
        trainable: float32 parameters by name.
        opt_state: the optimizer's state.
        in_turn: whole stacks of layers that train in turn, in the dtype of frozen weights;
            `trainable` has the float32 rows of those whose turn it is.
        taken: pairs whose products the base has lost to the adapters (`residual`); constant.
    """

    step: jax.Array
    bad_steps: jax.Array
    trainable: Params
    opt_state: Any
    in_turn: Params = field(default_factory=dict)
    taken: Params = field(default_factory=dict)

    @property
    def learnt(self) -> Params:
        """All parameters that training changes, as the model has them."""
        return self.trainable | self.in_turn


def make_train_step(
    skeleton: Skeleton,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    state_shardings: Any = None,
    apply: Apply = apply_whole,
    gradient_shardings: Any = None,
    turns: peft.Turns | None = None,
    loads: Collection[str] = (),
) -> TrainStep:
    """Builds `train_step(state, frozen, batch)`; batch leaves are [A, B, T].

    Args:
        skeleton: the model without arrays.
        objective: (model, micro-batch) -> sum of losses and other sums.
        tx, schedule: the optimizer and its learning rate.
        seed: of dropout and noise.
        state_shardings: where the new state goes.
        apply: how the optimizer's step is taken; `optim.make_apply` chooses.
        gradient_shardings: where the sums of gradients are, by name; None: like the parameters.
        turns: how the layers of `TrainState.in_turn` take turns.
        loads: parameters whose gradients are numbers of tokens, which `tx` gets as they are.

    Returns:
        A function to the new state and float32 scalars: loss, accuracy (if the objective counts
        what is correct), grad_norm, learning_rate, tokens (real ones), targets (sum of weights),
        bad_steps, skipped.
    """

    def loss(trainable: Params, fixed: tuple, micro: Any, key: jax.Array) -> tuple:
        model = skeleton.model(_all_parameters(trainable, *fixed))
        peft.seed(model, key)
        noise.seed(model, key)
        return objective(model, micro)

    def gradient(trainable: Params, fixed: tuple, micro: Any, key: jax.Array) -> tuple:
        found, grads = jax.value_and_grad(loss, has_aux=True)(trainable, fixed, micro, key)
        if gradient_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, gradient_shardings)
        return found, grads

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        accumulation = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), accumulation)
        trainable, active = _begin_turn(state, turns)
        fixed = (frozen, state.in_turn, active)

        def micro_step(total: Any, micro_and_key: tuple) -> tuple:
            (value, sums), grads = gradient(trainable, fixed, *micro_and_key)
            return jax.tree.map(jnp.add, total, (value, sums, grads)), None

        if accumulation == 1:
            first = jax.tree.map(lambda leaf: leaf[0], (batch, keys))
            (value, sums), grads = gradient(trainable, fixed, *first)
        else:
            zeros = _zeros_of(gradient, trainable, fixed, batch, keys)
            (value, sums, grads), _ = jax.lax.scan(micro_step, zeros, (batch, keys))
        weight = jnp.maximum(sums["weight"], 1e-8)
        grads, counts = _mean(grads, weight, loads)
        norm = optax.tree.norm(grads)
        metrics = {
            "loss": value / weight,
            **({"accuracy": sums["correct"] / weight} if "correct" in sums else {}),
            "grad_norm": norm,
            "learning_rate": schedule(_applied_steps(state.opt_state)),
            "tokens": batch.num_tokens,
            "targets": sums["weight"],
        }
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        trainable, opt_state = apply(tx, grads | counts, trainable, state.opt_state, good, norm)
        in_turn = _put_back(state.in_turn, trainable, active)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics |= {"bad_steps": bad_steps, "skipped": ~good}
        new = TrainState(state.step + 1, bad_steps, trainable, opt_state, in_turn, state.taken)
        return new, metrics

    return train_step


def make_eval_step(
    skeleton: Skeleton, objective: Objective
) -> Callable[[Params, Params, Any], tuple[jax.Array, Metrics]]:
    """Builds `eval_step(trainable, frozen, batch)`: sum of losses, other sums; leaves [B, T]."""

    @jax.jit
    def eval_step(trainable: Params, frozen: Params, batch: Any) -> tuple[jax.Array, Metrics]:
        return objective(skeleton.model({**frozen, **trainable}), batch)

    return eval_step


def _mean(grads: Params, weight: jax.Array, loads: Collection[str]) -> tuple[Params, Params]:
    """Gradients of the mean loss, and the numbers of tokens as they are."""
    counts = {name: grads[name] for name in loads}
    return {name: g / weight for name, g in grads.items() if name not in counts}, counts


def _begin_turn(state: TrainState, turns: peft.Turns | None) -> tuple[Params, jax.Array | None]:
    """What trains in this step, rows of a new turn fetched, and the layers whose turn it is."""
    if turns is None:
        return state.trainable, None
    applied = _applied_steps(state.opt_state)
    active = turns.active(applied // turns.steps)
    rows = jax.lax.cond(
        applied % turns.steps == 0,
        lambda: {n: stack[active].astype(jnp.float32) for n, stack in state.in_turn.items()},
        lambda: {n: state.trainable[n] for n in state.in_turn},
    )
    return state.trainable | rows, active


def _put_back(in_turn: Params, trainable: Params, active: jax.Array | None) -> Params:
    """The stacks with the rows that have just learnt."""
    return {
        name: stack.at[active].set(trainable[name].astype(stack.dtype))
        for name, stack in in_turn.items()
    }


def _all_parameters(
    trainable: Params, frozen: Params, in_turn: Params, active: jax.Array | None
) -> Params:
    """The model's parameters; of stacks in turn with the rows that take gradients."""
    if active is None:
        return frozen | trainable
    through = any(not name.startswith("layers.") for name in trainable)
    rows = {n: Rows(stack, trainable[n], active, through) for n, stack in in_turn.items()}
    return frozen | trainable | rows


def _zeros_of(gradient: Callable, trainable: Params, fixed: tuple, batch: Any, keys: Any) -> Any:
    """Float32 zeros shaped like (value, sums, gradients) of one micro-batch."""
    first = jax.tree.map(lambda leaf: leaf[0], (batch, keys))
    (value, sums), grads = jax.eval_shape(gradient, trainable, fixed, *first)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (value, sums, grads))


def _applied_steps(opt_state: Any) -> jax.Array:
    """Steps the optimizer has applied (skipped ones do not count)."""
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if getattr(path[-1], "name", None) == "count"
    ]
    return counts[-1]
