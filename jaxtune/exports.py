"""A run's parameters as Hugging Face files, at the end of training and by `jaxtune.export`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import peft, residual
from jaxtune.build import Run, adapter_variables, quantized_kernels
from jaxtune.checkpoint.adapted import require_mergeable
from jaxtune.checkpoint.adapter import save_adapter
from jaxtune.checkpoint.adapter_slot import save_slot
from jaxtune.checkpoint.hf_save import save_model
from jaxtune.distributed import to_host
from jaxtune.models.block import is_encoder_decoder
from jaxtune.models.heads import TASKS, head_of
from jaxtune.peft import adalora
from jaxtune.tree import Params


def write_adapter(run: Run, params: Params, folder: Path) -> None:
    """Writes the adapter of a run that has one as a PEFT folder."""
    assert run.adapters is not None
    if peft.fills_one_slot(run.adapters.method):
        base, revision = run.checkpoint.name, run.config.model.revision
        save_slot(folder, _stored(run, params), run.adapters, base=base, revision=revision)
        return
    adapters, params = residual.on_original(run, params)
    if adapters.method == "adalora":
        own = {name: to_host(params[name]) for name in sorted(run.trainable)}
        adapters, params = adalora.trimmed(adapters, params | own)
    save_adapter(
        folder,
        params,
        adapters,
        run.skeleton.abstract(),
        run.family.weights(run.model_config),
        run.stacks,
        base=run.checkpoint.name,
        revision=run.config.model.revision,
        task_type=_task_type(run),
    )


def _task_type(run: Run) -> str:
    """What PEFT calls what the model does."""
    head = head_of(run.checkpoint.config)
    if head is not None:
        return TASKS[head.task].peft
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(run.model_config) else "CAUSAL_LM"


def _stored(run: Run, params: Params) -> dict[str, np.ndarray]:
    """What a folder holds of a slot's content, made by its network if it has one."""
    assert run.adapters is not None
    method = peft.METHODS[run.adapters.method]
    shapes = run.skeleton.abstract()
    own = {name: params[name] for name in adapter_variables(run.skeleton)}
    found = jax.jit(lambda own: method.stored(run.skeleton.model(shapes | own)))(own)
    return {name: to_host(found[name]).astype(np.float32, copy=False) for name in sorted(found)}


def write_merged(
    run: Run,
    params: Params,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a whole model, adapters merged; `dtype` None keeps that of the base's files.

    With `quantize` (nf4, fp4 or int8) the merged matrices are quantized as bitsandbytes does.

    Frozen base weights are copied from the base's files: those in memory may be rounded. Quantized
    ones are those in memory unless `checkpoint.merge_base` says original.
    """
    decoded: set[str] = set()
    if run.config.checkpoint.merge_base == "dequantized":
        decoded = quantized_kernels(run)
    adapters = run.adapters
    if adapters is not None:
        require_mergeable(adapters, run.variables)
        adapters, params = residual.on_original(run, params, decoded)
    save_model(
        folder,
        # All processes gather them together, so in one order: a set has another in each.
        {name: params[name] for name in sorted(decoded | run.trainable.keys())},
        run.checkpoint,
        run.family.weights(run.model_config),
        run.stacks,
        adapters=adapters,
        tokenizer=tokenizer,
        dtype=dtype,
        quantize=quantize,
        max_shard_bytes=max_shard_bytes,
    )


def write_base(
    run: Run,
    params: Params,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the base as it was trained on: its quantized matrices decoded, without adapters."""
    save_model(
        folder,
        {name: params[name] for name in sorted(quantized_kernels(run))},
        run.checkpoint,
        run.family.weights(run.model_config),
        run.stacks,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def write_results(run: Run, params: Params, tokenizer: Any, folder: Path) -> dict[str, Path]:
    """Writes what the config asks for at the end of a run; returns the folders by name."""
    asked, paths = run.config.checkpoint, {}
    if run.adapters is not None and asked.export_adapter:
        paths["adapter"] = folder / "adapter"
        write_adapter(run, params, paths["adapter"])
        if residual.has_own_base(run):
            paths["base"] = folder / "base"
            write_base(run, params, tokenizer, paths["base"])
    if run.adapters is None or asked.export_merged:
        paths["merged"] = folder / "merged"
        write_merged(run, params, tokenizer, paths["merged"])
    return paths
