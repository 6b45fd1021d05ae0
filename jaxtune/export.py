"""The export command: a run's checkpoint as Hugging Face files.

python -m jaxtune.export --run=runs/lora_llama --to=adapter --out=exports/adapter
python -m jaxtune.export --run=runs/lora_llama --to=merged --out=exports/model --dtype=bfloat16

The run's config.json names the base model, which must still be where it was. A merged model takes
untrained weights straight from the base's files, so it is exact whatever dtype training used.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxtune import build, config, data, optim, peft
from jaxtune.checkpoint.meta import OtherArrays
from jaxtune.checkpoint.quantized_save import FORMATS
from jaxtune.checkpoint.safetensors import shard_bytes
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.store import Store
from jaxtune.conflicts import contradictions
from jaxtune.errors import ConfigError, WeightError, run_command
from jaxtune.exports import write_adapter, write_base, write_merged
from jaxtune.log import every_few_seconds, info
from jaxtune.schema import RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.tree import Params

TARGETS = ("adapter", "merged", "both", "base")
BASES = ("dequantized", "original")
DTYPES = ("float32", "bfloat16", "float16")


def export(
    run_folder: Path,
    out: Path,
    *,
    to: str = "adapter",
    step: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    merge_base: str | None = None,
    max_shard_gb: float = 5.0,
) -> dict[str, Path]:
    """Writes a finished or interrupted run's weights as Hugging Face folders.

    Args:
        run_folder: train.output_dir of the run.
        out: a new folder, or an earlier export, which is replaced.
        to: "adapter" (PEFT), "merged" (whole model), "both" (out/adapter and out/merged), or "base"
            (the quantized base, decoded).
        step: of the checkpoint; None: the newest good one.
        dtype: of a merged model; None: that of the base's files.
        quantize: nf4, fp4 or int8, in which bitsandbytes loads a merged model; None: dense.
        merge_base: "dequantized" or "original", see checkpoint.merge_base; None: as in the run.
        max_shard_gb: size at which a merged model's next file is begun, in 10^9 bytes.

    Returns:
        The folders written, by what they are.

    Raises:
        ConfigError: not a run's folder, no adapter or quantized base to export, or no size of
            shards.
        WeightError: no usable checkpoint, or the base model is gone or differs.
        StorageError: `out` cannot be written.
    """
    size = shard_bytes(max_shard_gb)
    cfg = _read_config(run_folder)
    if not peft.is_adapter(cfg.peft.method) and to in ("adapter", "both"):
        raise ConfigError(
            f"{run_folder} has no adapter: peft.method={cfg.peft.method} - use --to=merged"
        )
    for option, value in (("quantize", quantize), ("merge_base", merge_base)):
        if value is not None and to in ("adapter", "base"):
            raise ConfigError(f"--{option}={value} is for merged models - use --to=merged")
    if merge_base is not None:
        checkpoint = dataclasses.replace(cfg.checkpoint, merge_base=merge_base)
        cfg = dataclasses.replace(cfg, checkpoint=checkpoint)
        if problems := contradictions(cfg):
            raise ConfigError(f"--merge_base={merge_base}: {problems[0]}")
    run, params = _restore(cfg, run_folder / "checkpoints", step)
    names = ("adapter", "merged") if to == "both" else (to,)
    paths = {name: out / name if to == "both" else out for name in names}
    is_quantized = bool(build.quantized_kernels(run))
    if to == "base" and not is_quantized:
        raise ConfigError(
            f"--to=base: {run_folder} trains on {run.checkpoint.name} as it is - use it"
        )
    if "adapter" in paths:
        write_adapter(run, params, paths["adapter"])
    if to == "adapter":
        return paths
    source = cfg.model.tokenizer or run.checkpoint.tokenizer_source
    tokenizer = data.load_tokenizer(
        source, template=cfg.data.template, enable_thinking=cfg.data.enable_thinking
    )
    if is_quantized and (to == "base" or cfg.checkpoint.merge_base == "dequantized"):
        taken = {name: params[name] for name in run.taken}
        params = build.fill_base(run, every_few_seconds("loading weights"), taken) | params
    sizes: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": size}
    if to == "base":
        write_base(run, params, tokenizer, out, **sizes)
    else:
        write_merged(run, params, tokenizer, paths["merged"], quantize=quantize, **sizes)
    return paths


def _read_config(run_folder: Path) -> RunConfig:
    path = run_folder / "config.json"
    if not path.is_file() or not (run_folder / "checkpoints").is_dir():
        raise ConfigError(
            f"--run={run_folder} is not a run's folder (config.json and checkpoints/) - "
            "give its train.output_dir"
        )
    return config.from_json(path.read_text("utf-8"))


def _restore(cfg: RunConfig, folder: Path, step: int | None) -> tuple[build.Run, Params]:
    """The run's description on this machine's devices, what it trained and took from the base."""
    store = Store(folder, verify=cfg.checkpoint.verify)
    try:
        if not store.steps():
            raise WeightError(f"no checkpoint in {folder} - let the run save one first")
        # The layout of layers is part of a checkpoint; "auto" may have meant either.
        if cfg.model.layers != "auto":
            return _restore_as(cfg, store, step)
        scan = dataclasses.replace(cfg.model, layers="scan")
        unroll = dataclasses.replace(cfg.model, layers="unroll")
        try:
            return _restore_as(dataclasses.replace(cfg, model=scan), store, step)
        except (OtherArrays, ConfigError):  # a method may cut layers that no scan can hold
            return _restore_as(dataclasses.replace(cfg, model=unroll), store, step)
    finally:
        store.close()


def _restore_as(cfg: RunConfig, store: Store, step: int | None) -> tuple[build.Run, Params]:
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    # The run may have used kernels that this machine lacks.
    anywhere: dict[str, Any] = dict.fromkeys(("attention", "matmul", "cross_entropy"), "auto")
    anywhere |= {"remat": "auto", "offload_frozen": False}
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **anywhere))
    run = build.describe(cfg, mesh, open_checkpoint(cfg.model.path, cfg.model.revision))
    schedule = optim.make_schedule(cfg.optim, cfg.train.num_steps or 1)
    tx = build.make_optimizer(run, schedule)
    restored = store.restore(step, build.abstract_state(run, tx))
    assert restored is not None  # there are steps, and damaged ones raise
    found, state, _ = restored
    info(f"exporting step {found} of {store.folder.parent}")
    return run, state.learnt | state.taken


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; ConfigError for what it does not understand."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.export",
        description="Writes a run's weights as Hugging Face files.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, help="train.output_dir of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--to", choices=TARGETS, default="adapter", help="what to write")
    parser.add_argument("--step", type=int, help="checkpoint step; default: the newest good one")
    parser.add_argument("--dtype", choices=DTYPES, help="of a merged model; default: the base's")
    parser.add_argument(
        "--quantize", choices=FORMATS, help="a merged model for bitsandbytes; default: dense"
    )
    parser.add_argument(
        "--merge_base", choices=BASES, help="what of a quantized base; default: as in the run"
    )
    parser.add_argument(
        "--max_shard_gb", type=float, default=5.0, help="a merged model's largest file (default 5)"
    )

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message} - see python -m jaxtune.export --help")

    parser.error = fail
    return parser.parse_args(argv)


def main() -> None:
    """Reads the command line and exports."""
    arguments = parse_arguments(sys.argv[1:])
    # Nothing is computed that needs an accelerator, which may be busy with the run itself.
    jax.config.update("jax_platforms", "cpu")
    paths = export(
        arguments.run,
        arguments.out,
        to=arguments.to,
        step=arguments.step,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        merge_base=arguments.merge_base,
        max_shard_gb=arguments.max_shard_gb,
    )
    for what, path in paths.items():
        info(f"{what}: {path}")


if __name__ == "__main__":
    run_command(main)
