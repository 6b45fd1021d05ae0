"""From the config's choices to how a model is computed on these devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import peft
from jaxtune.checkpoint.hf import split_path
from jaxtune.data.loader import LENGTH_STEP
from jaxtune.errors import ConfigError
from jaxtune.models.block import is_encoder_decoder
from jaxtune.nn.params import Policy, suited_policy
from jaxtune.nn.stack import period
from jaxtune.objectives import OBJECTIVES, Objective
from jaxtune.schema import FETCHING, RunConfig
from jaxtune.sharding import pipeline
from jaxtune.sharding.mesh import require_host_memory
from jaxtune.tree import Params

# Implementations that exist on one platform only.
_PLATFORMS = {"pallas_tpu": "tpu", "splash": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}


def resolve_policy(config: RunConfig, model_config: Any, mesh: Mesh) -> Policy:
    """Replaces every "auto" by what suits the platform; what is trained is kept in float32.

    Args:
        config: of the run.
        model_config: the family's, of which heads and their number are looked at.
        mesh: the devices.

    Raises:
        ConfigError: a kernel of another platform is asked for, or the mesh does not suit the model.
    """
    model = config.model
    platform = mesh.devices.flat[0].platform
    experts, shards = getattr(model_config, "num_experts", 0), mesh.shape.get("expert", 1)
    if shards > 1 and (not experts or experts % shards):
        raise ConfigError(
            f"config.mesh.expert={shards}: the model has {experts or 'no'} experts to share out - "
            "use mesh.fsdp or mesh.data, or a number that divides them"
        )
    length = config.data.max_seq_len
    if model_config.position_rows and length > model_config.max_positions:
        raise ConfigError(
            f"config.data.max_seq_len={length}: the model has learned {model_config.max_positions} "
            "positions - use as many or fewer"
        )
    if config.peft.method == "prefix" and getattr(model_config, "latent", None):
        raise ConfigError(
            "config.peft.method=prefix: keys and values of this model come from one latent vector, "
            "for which PEFT has no prefix - use peft.method=prompt or lora"
        )
    if config.train.router_aux_loss:
        _require_balance(config, model_config, mesh)
    if config.train.router_bias_update_rate:
        _require_correction(config, model_config, mesh)
    if config.train.attention_group:
        _require_halves(model_config, config.train.attention_group)
    if config.peft.method == "llama_pro" and not model_config.causal:
        raise ConfigError(
            "config.peft.method=llama_pro: a new layer that adds nothing still normalises its "
            "input in an encoder, so it would change the model - use freeze or lora"
        )
    for name in ("attention", "matmul", "cross_entropy"):
        needed = _PLATFORMS.get(getattr(model, name), platform)
        if needed != platform:
            raise ConfigError(
                f"config.model.{name}={getattr(model, name)} runs on {needed} only, and this is "
                f"{platform} - leave it at auto"
            )
    if model.remat == "offload":
        require_host_memory(mesh, "model.remat=offload")
    if model.offload_frozen:
        require_host_memory(mesh, "model.offload_frozen")
        if period(model_config.layer_kinds) > 1:
            raise ConfigError(
                "config.model.offload_frozen fetches layer by layer in a scan, and this model's "
                f"layers differ in {_differences(model_config)} - turn it off"
            )
    names = [f.name for f in dataclasses.fields(Policy) if hasattr(model, f.name)]
    segments = _segments(config, model_config, mesh)
    chosen = segments | _cut_for_pipeline(config, model_config, mesh)
    chosen |= {name: getattr(model, name) for name in names if getattr(model, name) != "auto"}
    if is_encoder_decoder(model_config):
        chosen.setdefault("attention", "xla")  # the kernels have no bias by distance
    if config.peft.method == "full":
        chosen["param_dtype"] = "float32"
    chosen["sharding_stage"] = config.mesh.sharding_stage
    chosen["imbalance"] = config.train.router_aux_loss > 0
    chosen["counts_loads"] = config.train.router_bias_update_rate > 0
    chosen["context_parallel"] = _context_parallel(config, model_config, mesh)
    return suited_policy(platform, mesh=mesh, **chosen)


def _differences(model_config: Any) -> str:
    """What layers that are not alike differ in, for messages."""
    words = {"rope": "rotation", "window": "windows", "dense": "experts, which some do not have"}
    words["crosses"] = "what they attend to"
    kinds = model_config.layer_kinds
    differ = [word for name, word in words.items() if len({getattr(k, name) for k in kinds}) > 1]
    return " and ".join(differ)


def _segments(config: RunConfig, model_config: Any, mesh: Mesh) -> dict[str, Any]:
    """The fields of the policy for layers of which some train, which no pipeline can cut again."""
    segments = peft.segments(config.peft, model_config.num_layers)
    turns = peft.turns(config.peft, model_config.num_layers, config.train.seed)
    if len(segments) < 2 and turns is None:
        return {}
    if pipeline.num_stages(mesh) > 1 or config.train.pipeline_chunks > 1:
        raise ConfigError(
            f"config.peft.method={config.peft.method} trains some layers and not others, and the "
            "stages of a pipeline have layers that are alike - set mesh.stage=1 and "
            "train.pipeline_chunks=1"
        )
    alike = period(model_config.layer_kinds) == 1
    if turns is not None and not alike:
        raise ConfigError(
            f"config.peft.method={config.peft.method} goes over layers that are alike, and this "
            f"model's differ in {_differences(model_config)} - use another method, e.g. freeze"
        )
    if turns is not None:
        return {"layers": "scan", "remat": "full"}
    if alike:
        return {"segments": segments}
    if config.model.layers == "scan":
        raise ConfigError(
            f"config.model.layers=scan: peft.method={config.peft.method} cuts the layers where "
            "their kinds do not repeat - leave it at auto"
        )
    return {"layers": "unroll"}


def _require_balance(config: RunConfig, model_config: Any, mesh: Mesh) -> None:
    """Raises ConfigError if the layers cannot say how evenly their experts are chosen."""
    option = f"config.train.router_aux_loss={config.train.router_aux_loss}"
    if not getattr(model_config, "num_experts", 0):
        raise ConfigError(f"{option}: the model has no experts - set it to 0")
    if pipeline.num_stages(mesh) > 1 or peft.turns(config.peft, model_config.num_layers, 0):
        raise ConfigError(
            f"{option} sums over all layers, which a pipeline (mesh.stage) and methods that train "
            "layers in turn do not pass on - use mesh.fsdp, another peft.method, or 0"
        )


def _require_correction(config: RunConfig, model_config: Any, mesh: Mesh) -> None:
    """Raises ConfigError if no router has numbers that balance its experts, or they stay."""
    option = f"config.train.router_bias_update_rate={config.train.router_bias_update_rate}"
    moe = getattr(model_config, "moe", None)
    if moe is None or not moe.correction:
        raise ConfigError(
            f"{option}: the model has no e_score_correction_bias, as DeepSeek-V3 has - use "
            "train.router_aux_loss, or 0"
        )
    if config.peft.method != "full":
        raise ConfigError(
            f"{option} changes the base, which peft.method={config.peft.method} leaves as it is - "
            "use peft.method=full, or 0"
        )
    if pipeline.num_stages(mesh) > 1:
        raise ConfigError(
            f"{option} counts tokens, and a pipeline also computes rows that are none - set "
            "mesh.stage=1, or use 0"
        )


def _require_halves(model_config: Any, group: int) -> None:
    """Raises ConfigError if heads cannot be cut into two halves with key heads of their own."""
    heads, key_heads = model_config.num_heads, model_config.num_kv_heads
    if heads % 2 or (key_heads > 1 and key_heads % 2):
        raise ConfigError(
            f"config.train.attention_group={group} needs two halves of the heads, and the model "
            f"has {heads} heads with {key_heads} key heads - set it to 0"
        )


def _cut_for_pipeline(config: RunConfig, model_config: Any, mesh: Mesh) -> dict[str, Any]:
    """The fields of the policy by which layers and rows are cut for a pipeline's stages."""
    train, stages, num_layers = config.train, pipeline.num_stages(mesh), model_config.num_layers
    if num_layers % (stages * train.pipeline_chunks):
        raise ConfigError(
            f"config.mesh.stage={stages} x train.pipeline_chunks={train.pipeline_chunks} does not "
            f"divide the model's {num_layers} layers - use numbers whose product does"
        )
    repeats = period(model_config.layer_kinds)
    parts = stages * train.pipeline_chunks
    if parts > 1 and num_layers // parts % repeats:
        raise ConfigError(
            f"config.mesh.stage={stages} x train.pipeline_chunks={train.pipeline_chunks} cuts the "
            f"{num_layers} layers inside the {repeats} after which they repeat (they differ in "
            f"{_differences(model_config)}) - use numbers that do not, or mesh.fsdp"
        )
    if stages * train.pipeline_chunks > 1 and config.model.layers == "unroll":
        raise ConfigError(
            "config.model.layers=unroll has no stack of layers for mesh.stage or "
            "train.pipeline_chunks to cut - leave it at auto"
        )
    if train.pipeline_chunks > 1 and config.model.remat not in ("auto", *FETCHING):
        raise ConfigError(
            f"config.model.remat={config.model.remat} would keep the weights that "
            "train.pipeline_chunks picks, once for every micro-batch - choose dots or full"
        )
    if stages > 1 and config.model.remat == "offload":
        raise ConfigError(
            "config.model.remat=offload cannot keep what a pipeline's loop over micro-batches "
            f"saves in host memory (mesh.stage={stages}) - choose dots or full"
        )
    rows = {"train.micro_batch_size": train.micro_batch_size}
    if config.data.eval or config.data.eval_fraction:
        rows["eval.batch_size"] = config.eval.batch_size
    micro = pipeline.choose_micro_batches(train.pipeline_micro_batches, mesh, rows)
    cut = {"chunks": train.pipeline_chunks, "micro_batches": micro}
    return cut | ({"layers": "scan"} if stages > 1 else {})


def require_equal_chunks(shapes: Params, chunks: int) -> None:
    """Raises ConfigError if the stacks of layers differ in their variables."""
    kinds: dict[str, list[Any]] = {}
    for path, leaf in shapes.items():
        stack, name = split_path(path)
        if stack is not None:
            parts = [(part.shape, part.dtype) for part in jax.tree.leaves(leaf)]
            kinds.setdefault(name, []).append((jax.tree.structure(leaf), parts))
    unlike = [name for name, found in kinds.items() if found != [found[0]] * chunks]
    if unlike:
        raise ConfigError(
            f"config.train.pipeline_chunks={chunks}: {unlike[0]} is not alike in all chunks - let "
            "peft and quant options choose layers by name, not by index, or use one chunk"
        )


def _context_parallel(config: RunConfig, model_config: Any, mesh: Mesh) -> str:
    """How attention crosses the sequence axis, which must divide every row that is trained on."""
    asked, shards = config.model.context_parallel, mesh.shape.get("sequence", 1)
    if shards == 1:
        if asked != "auto":
            raise ConfigError(
                f"config.model.context_parallel={asked} would be ignored: mesh.sequence is 1"
            )
        return "ring"
    longest = config.data.max_seq_len
    varies = not config.data.packing and config.data.pad_to == "longest"
    for length in (longest, LENGTH_STEP) if varies else (longest,):
        if length % shards:
            raise ConfigError(
                f"config.mesh.sequence={shards} does not divide rows of {length} tokens - change "
                "it, or data.max_seq_len" + (", or set data.pad_to=max" if varies else "")
            )
    heads, tensor = model_config.num_kv_heads, mesh.shape.get("tensor", 1)
    exchanged = heads if heads % tensor else heads // tensor
    if asked == "ulysses" and exchanged % shards:
        raise ConfigError(
            f"config.model.context_parallel=ulysses: mesh.sequence={shards} does not divide the "
            f"{exchanged} key heads of a device - choose ring"
        )
    libraries = ("reference", "splash", "cudnn")
    chosen = "ring" if asked == "ring" or exchanged % shards else "ulysses"
    if chosen == "ring" and config.model.attention in libraries:
        raise ConfigError(
            f"config.model.attention={config.model.attention} cannot be computed key shard by key "
            "shard, as context_parallel=ring does - leave it at auto"
        )
    return chosen


def resolve_objective(config: RunConfig, mesh: Mesh) -> Objective:
    """What is minimised, with the loss's implementation chosen for the platform."""
    objective: Any = OBJECTIVES[config.objective.name]
    if config.objective.is_labelled:
        return objective
    chosen = config.model.cross_entropy
    if chosen == "auto":
        chosen = "pallas_tpu" if mesh.devices.flat[0].platform == "tpu" else "chunked"
    loss_dtype = jnp.dtype(config.model.loss_dtype)
    return functools.partial(objective, loss_dtype=loss_dtype, cross_entropy=chosen)


def require_room(config: RunConfig, model: Any) -> None:
    """Raises ConfigError if a prefix or prompt, of a folder say, leaves too little room."""
    length, virtual = config.data.max_seq_len, model.num_virtual_tokens
    if virtual > length // 2:
        raise ConfigError(
            f"config.data.max_seq_len={length}: more than half of a row would be the {virtual} "
            "virtual tokens of the prompt - raise it"
        )
    if model.config.position_rows and length - virtual > model.max_tokens:
        raise ConfigError(
            f"config.data.max_seq_len={length}: the model has learned {model.config.max_positions} "
            f"positions, of which the prefix leaves {model.max_tokens} - use as many or fewer"
        )
