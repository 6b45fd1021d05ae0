"""The table of methods, and what can be done with every one of them.

`peft.base` says what a method is made of.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import quant
from jaxtune.errors import ConfigError
from jaxtune.nn.experts import ExpertLinear
from jaxtune.nn.linear import layer_names, linears
from jaxtune.nn.params import HeadParam
from jaxtune.peft import (
    adalora,
    badam,
    beside,
    bitfit,
    dora,
    freeze,
    full,
    ia3,
    lisa,
    llama_pro,
    loha,
    lokr,
    lora,
    mora,
    moslora,
    oft,
    p_tuning,
    patterns,
    prefix,
    prompt,
    reft,
    tokens,
    vera,
)
from jaxtune.peft.base import EMBEDDING, Adapters, Turns, common, weight_name
from jaxtune.peft.split import Start
from jaxtune.peft.targets import Targets, choose
from jaxtune.quant import QArray
from jaxtune.tree import flatten, path_name

__all__ = [
    "METHODS",
    "Adapters",
    "Start",
    "Targets",
    "Turns",
    "attach",
    "choose",
    "choose_adapters",
    "continued",
    "fills_one_slot",
    "initial_value",
    "is_adapter",
    "layer_names",
    "linears",
    "module_of",
    "origins",
    "penalty",
    "segments",
    "seed",
    "start",
    "trained",
    "turns",
    "unread",
    "value_from_kernel",
    "weight_name",
]

METHODS: Mapping[str, Any] = MappingProxyType(
    {
        "lora": lora,
        "dora": dora,
        "moslora": moslora,
        "mora": mora,
        "loha": loha,
        "lokr": lokr,
        "adalora": adalora,
        "vera": vera,
        "ia3": ia3,
        "oft": oft,
        "tokens": tokens,
        "prefix": prefix,
        "prompt": prompt,
        "p_tuning": p_tuning,
        "reft": reft,
        "full": full,
        "freeze": freeze,
        "bitfit": bitfit,
        "llama_pro": llama_pro,
        "lisa": lisa,
        "badam": badam,
    }
)

# Knobs that say nothing about what a trained adapter computes.
_OF_TRAINING = ("dropout",)


def is_adapter(method: str) -> bool:
    """Whether the method attaches something to the model."""
    return hasattr(METHODS[method], "attach")


def fills_one_slot(method: str) -> bool:
    """Whether the method fills a slot of the whole model, not one of each adapted layer."""
    return hasattr(METHODS[method], "SLOT")


def module_of(adapters: Adapters, path: str) -> Any:
    """The module of what is attached to a layer: the method's, or that of embedding or rows."""
    if path in adapters.rows:
        return tokens
    method = METHODS[adapters.method]
    return method.ON_EMBEDDING if path == EMBEDDING else method


def _options(section: Any, kind: type) -> Any:
    """A dataclass of `READS` with the values of config.peft."""
    return kind(**{field.name: getattr(section, field.name) for field in dataclasses.fields(kind)})


def unread(section: Any) -> list[str]:
    """What is wrong with options of config.peft that are set although nobody reads them."""
    read, why = {"method", "merged_adapters"}, f"peft.method={section.method} does not read it"
    if is_adapter(section.method):
        read |= {"adapter"}
    for kind in METHODS[section.method].READS:
        read |= {field.name for field in dataclasses.fields(kind)}
    if section.adapter is not None and is_adapter(section.method):
        read &= {"method", "merged_adapters", "adapter", *_OF_TRAINING}
        why = "peft.adapter brings its own"
    return [
        f"config.peft.{field.name}={getattr(section, field.name)!r} would be ignored: {why}"
        for field in dataclasses.fields(section)
        if field.name not in read and getattr(section, field.name) != field.default
    ]


def choose_adapters(model: Any, section: Any) -> Adapters:
    """What config.peft attaches to a model.

    Raises:
        ConfigError: targets or patterns that match nothing, or are ill-formed.
    """
    method = METHODS[section.method]
    config = _options(section, method.READS[0])
    if fills_one_slot(section.method):
        return Adapters(section.method, config, {method.SLOT: (config,)})
    chosen = choose(model, _options(section, Targets)) if Targets in method.READS else {}
    if EMBEDDING in chosen and not hasattr(method, "ON_EMBEDDING"):
        raise ConfigError(
            f"config.peft.target_modules: peft.method={section.method} has no form for the "
            f"embedding - use lora or dora, or train it with peft.modules_to_save={EMBEDDING}"
        )
    if EMBEDDING in chosen and getattr(config, "lora_bias", False):
        raise ConfigError(
            f"config.peft.lora_bias: an adapter of {EMBEDDING} has no bias, and PEFT loads none "
            f"that says so - take {EMBEDDING} out of peft.target_modules, or leave lora_bias out"
        )
    _require_experts_can_be(chosen, model, section)
    variables = flatten(model)
    layers = {
        name: variables[weight_name(path)].shape[-2:]
        for path, flags in chosen.items()
        for name in _names(path, flags, model.stacks)
    }
    if problems := patterns.problems(section, list(layers)):
        raise ConfigError("; ".join(problems))
    configs = method.configure(config, layers) if layers else {}
    choice = {
        path: tuple(
            configs[name] if flag else None
            for (_, name), flag in zip(layer_names(path, model.stacks), flags, strict=True)
        )
        for path, flags in chosen.items()
    }
    names, saved, biases, rows = sorted(variables), frozenset(), frozenset(), {}
    if tokens.Config in method.READS:
        alone = method is tokens
        rows = tokens.choose(model, section.trainable_tokens, choice, alone=alone)
    if beside.Saved in method.READS:
        taken = {**choice, **rows}
        saved = beside.choose_saved(names, section.modules_to_save, taken, model.stacks)
        saved |= {path_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, HeadParam))}
        if "embed.table" in saved and model.config.tie_embeddings:
            raise ConfigError(
                "config.peft.modules_to_save: embed is tied to the output head, of which PEFT "
                "would train a copy - use peft.method=full, or leave embed out"
            )
    if beside.Biases in method.READS:
        biases = beside.choose_biases(names, section.bias, choice, model.stacks)
    return Adapters(section.method, config, choice, saved, biases, rows)


def _require_experts_can_be(chosen: Mapping[str, Any], model: Any, section: Any) -> None:
    """Raises ConfigError if experts are to be adapted in a way that they cannot."""
    for path, linear in linears(model):
        if path not in chosen or not isinstance(linear, ExpertLinear):
            continue
        problem = f"method={section.method}"
        if hasattr(METHODS[section.method], "EXPERTS"):
            asked = {name: getattr(section, name) for name in ("dropout", "lora_bias", "init")}
            plain = {"dropout": 0.0, "lora_bias": False, "init": "random"}
            odd = [f"{name}={value}" for name, value in asked.items() if value != plain[name]]
            if not odd:
                continue
            problem = odd[0]
        other = (
            "" if section.adapter else ", or take them out with peft.exclude_modules=.*experts.*"
        )
        raise ConfigError(
            f"config.peft.{problem} cannot adapt experts, and {path} is among the targets - use "
            f"plain lora without dropout{other}"
        )


def start(section: Any) -> Start | None:
    """How config.peft's adapters start as a part of the base; None: they start as nothing."""
    if Start not in METHODS[section.method].READS or section.adapter is not None:
        return None
    chosen = _options(section, Start)
    return None if chosen.init == "random" else chosen


def _names(path: str, flags: Sequence[bool], stacks: Any) -> list[str]:
    """Names of the layers behind a path whose flag is set."""
    return [name for (_, name), flag in zip(layer_names(path, stacks), flags, strict=False) if flag]


def continued(adapters: Adapters, section: Any, model: Any) -> Adapters:
    """Adapters that were read for a model, with the knobs of config.peft that they do not bring.

    Raises:
        ConfigError: experts cannot have them.
    """
    _require_experts_can_be(adapters.choice, model, section)
    given = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(adapters.config)
        if field.name in _OF_TRAINING
    }
    config = dataclasses.replace(adapters.config, **given)
    return dataclasses.replace(adapters, config=config)


def trained(names: Iterable[str], section: Any, stacks: Sequence[int]) -> set[str]:
    """The base's parameters, of those named, that a method without adapters lets train.

    Args:
        names: of all parameters.
        section: config.peft.
        stacks: sizes of the model's stacks of layers.
    """
    if is_adapter(section.method):
        return set()
    method = METHODS[section.method]
    return method.trained(names, _options(section, method.READS[0]), stacks)


def segments(section: Any, num_layers: int) -> tuple[int, ...]:
    """Sizes of the stacks into which config.peft cuts the layers; () if they are all alike."""
    method = METHODS[section.method]
    if not hasattr(method, "segments"):
        return ()
    return method.segments(num_layers, _options(section, method.READS[0]))


def origins(section: Any, num_layers: int) -> tuple[tuple[int, bool], ...]:
    """Layers of the deeper model that config.peft trains; () if it is as deep as the base.

    Args:
        section: config.peft.
        num_layers: of the base.

    Returns:
        Of each layer the base's layer, and whether it is a copy that adds nothing at first.
    """
    method = METHODS[section.method]
    if not hasattr(method, "origins"):
        return ()
    return method.origins(num_layers, _options(section, method.READS[0]))


def turns(section: Any, num_layers: int, seed: int) -> Turns | None:
    """How layers train in turn; None if all that train do so all the time.

    Raises:
        ConfigError: there are not that many layers.
    """
    method = METHODS[section.method]
    if not hasattr(method, "active"):
        return None
    config = _options(section, method.READS[0])
    if config.active_layers > num_layers:
        raise ConfigError(
            f"config.peft.active_layers={config.active_layers}: the model has {num_layers} layers"
        )

    def active(turn: Any) -> Any:
        return jnp.sort(method.active(turn, num_layers, config, seed))

    return Turns(config.active_layers, config.switch_steps, active)


def attach(model: Any, adapters: Adapters) -> None:
    """Fills the slots of a model (in place; for use under `tree.describe`)."""
    METHODS[adapters.method].attach(model, adapters)
    if adapters.choice:  # else rows are the method's own
        tokens.attach(model, adapters)


def penalty(adapters: Adapters | None) -> Callable[[Any], jax.Array] | None:
    """What is added to the mean loss of a model in training; None: nothing."""
    if adapters is None or not hasattr(METHODS[adapters.method], "penalty"):
        return None
    return functools.partial(METHODS[adapters.method].penalty, config=adapters.config)


def initial_value(
    name: str, shape: tuple[int, ...], adapters: Adapters, stacks: Any, seed: int
) -> np.ndarray:
    """First value of an adapter's variable; the same for a layer in whatever stack it is.

    Args:
        name: path of the variable, `<linear>.adapter.<leaf>` or `<slot>.<leaf>`.
        shape: [n, ...] for a layer in a stack of n.
        adapters: the method and the adapted layers.
        stacks: sizes of the model's stacks.
        seed: with the name of the layer, or of a slot's variable, that of the random numbers.
    """
    path = next(path for path in adapters.choice if name.startswith(f"{path}."))
    leaf = name.removeprefix(f"{path}.").removeprefix("adapter.")
    method, configs = module_of(adapters, path), adapters.choice[path]
    if leaf in getattr(method, "SHARED", ()):
        return method.initial(leaf, shape, common(configs), np.random.default_rng(seed))
    names = layer_names(name if fills_one_slot(adapters.method) else path, stacks)
    stacked = names[0][0] is not None
    values = []
    for (_, layer), config in zip(names, configs, strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(layer.encode())])
        value = np.zeros(shape[stacked:], np.float32)
        if config is not None:
            value = method.initial(leaf, value.shape, config, rng)
        values.append(value)
    return np.stack(values) if stacked else values[0]


def value_from_kernel(name: str, adapters: Adapters, kernel: Any) -> jax.Array | None:
    """First value of a variable that follows from its layer's kernel; None if it does not.

    Args:
        name: path of the variable.
        adapters: the method and the adapted layers.
        kernel: [D_in, D_out], dense or quantized, or a stack of them, of which one at a time is
            decoded.
    """
    path, _, leaf = name.rpartition(".adapter.")
    if path in adapters.rows:
        return tokens.first(adapters.rows[path][0], kernel)
    method = module_of(adapters, path)
    if leaf not in getattr(method, "FROM_KERNEL", ()):
        return None

    def one(layer: Any) -> jax.Array:
        dense = quant.dequantize(layer, jnp.float32) if isinstance(layer, QArray) else layer
        return method.from_kernel(dense)[leaf]

    return one(kernel) if len(kernel.shape) == 2 else jax.lax.map(one, kernel)


def seed(model: nnx.Module, key: Any) -> None:
    """Puts a random key into every adapter that wants one (dropout), for one forward pass."""
    for i, (_, linear) in enumerate(linears(model)):
        if linear.adapter is not None:
            linear.adapter.seed(key, i)
