"""Converts models between Hugging Face files (or GGUF) and orbax, and looks into them.

python tools/convert_checkpoint.py to_orbax MODEL FOLDER   MODEL as for config.model.path;
                                   [--revision=branch, tag or commit of a hub id]
python tools/convert_checkpoint.py to_hf FOLDER OUT        FOLDER as written by to_orbax;
                                   [--dtype=float32|bfloat16|float16] [--max_shard_gb=5]
python tools/convert_checkpoint.py add_tokens MODEL OUT    a Hugging Face folder with more tokens;
                                   --tokens=<a>,<b> [--special] [--revision=...]
python tools/convert_checkpoint.py inspect MODEL           config, tensors, bytes by dtype;
                                   [--revision=...]

An orbax folder holds `params/` (our parameters by dotted path, layers stacked), `source.json` (the
Hugging Face config and the dtype of each tensor), `tokenizer/` and `manifest.json` (checksums).
There and back is bitwise equal; what was written is read back before a folder gets its name.
"""

import argparse
import collections
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxtune import data, models, tree
from jaxtune.checkpoint import manifest
from jaxtune.checkpoint.folder import replace_folder
from jaxtune.checkpoint.hf import Place, load_weights, places
from jaxtune.checkpoint.hf_save import save_model, write_json
from jaxtune.checkpoint.safetensors import shard_bytes
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo, as_bytes, dtype_from_name
from jaxtune.checkpoint.vocabulary import with_vocabulary
from jaxtune.errors import ConfigError, WeightError, run_command
from jaxtune.log import every_few_seconds, info, warn
from jaxtune.models.base import Weight
from jaxtune.nn.params import Policy
from jaxtune.nn.stack import stack_sizes
from jaxtune.tree import Params


def to_orbax(name: str, folder: Path, revision: str | None = None) -> None:
    """Reads a model and writes it as an orbax checkpoint with stacked layers.

    Raises:
        WeightError: the model cannot be read, or what was written reads back differently.
        StorageError, ConfigError: `folder` cannot be written.
    """
    checkpoint = open_checkpoint(name, revision)
    weights, abstract, stacks = _describe(checkpoint)
    targets = places(weights, abstract, stacks)
    for path, leaf in abstract.items():
        abstract[path] = jax.ShapeDtypeStruct(leaf.shape, _stored_dtype(checkpoint, targets, path))
    report = every_few_seconds("reading")
    params = load_weights(checkpoint, weights, abstract, stacks, progress=report)
    kept = {key: checkpoint.tensors[key] for key in targets}
    source = {
        "name": checkpoint.name,
        "config": checkpoint.config,
        "generation_config": checkpoint.generation_config,
        "tensors": {key: [list(kept[key].shape), kept[key].dtype.name] for key in kept},
    }
    record = {"kind": "orbax", "base": name, "revision": revision}
    with replace_folder(folder, record, source=checkpoint.root) as new:
        with ocp.StandardCheckpointer() as writer:
            writer.save(new.resolve() / "params", params)
        written = _digests(params)
        del params  # room for the copy that is read back
        if _digests(_read_params(new, abstract)) != written:
            raise WeightError(f"{folder} reads back differently - check the disk, then repeat")
        write_json(new / "source.json", source)
        try:
            data.load_tokenizer(checkpoint.tokenizer_source).save_pretrained(str(new / "tokenizer"))
        except WeightError as error:
            warn(f"without tokenizer: {error}")
        manifest.write(new)


def _digests(params: Params) -> dict[str, str]:
    return {
        name: hashlib.sha256(as_bytes(np.asarray(array, order="C"))).hexdigest()
        for name, array in params.items()
    }


def _read_params(folder: Path, abstract: dict[str, Any]) -> Params:
    """The arrays of an orbax folder, with their stored dtypes."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        path = folder.resolve() / "params"
        stored = reader.metadata(path).item_metadata
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, stored[name].dtype, sharding=device)
            for name, leaf in abstract.items()
        }
        return reader.restore(path, target)


def _describe(
    checkpoint: Checkpoint,
) -> tuple[tuple[Weight, ...], dict[str, Any], tuple[int, ...]]:
    """The weight table, shape of each parameter, and the stacks of layers."""
    family = models.family(checkpoint.config.get("model_type"))
    config = family.Config.from_hf(checkpoint.config)
    policy = Policy(layers="scan")
    skeleton = tree.describe(lambda: family.build(config, policy, nnx.Rngs(0)))
    stacks = stack_sizes(config.num_layers, policy, config.layer_kinds)
    return family.weights(config), skeleton.abstract(), stacks


def _stored_dtype(
    checkpoint: Checkpoint, targets: dict[str, tuple[Place, ...]], path: str
) -> np.dtype:
    """The dtype that the files have for a parameter; float32 where its layers differ."""
    names = [name for name, parts in targets.items() if any(p.path == path for p in parts)]
    dtypes = {checkpoint.tensors[name].dtype for name in names if name in checkpoint.tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def to_hf(folder: Path, out: Path, dtype: str | None, max_shard_gb: float) -> None:
    """Writes an orbax checkpoint of `to_orbax` as a Hugging Face folder.

    Raises:
        WeightError: `folder` is damaged or was not written by `to_orbax`.
        StorageError, ConfigError: `out` cannot be written.
    """
    size = shard_bytes(max_shard_gb)
    checkpoint = _open_orbax(folder)
    weights, abstract, stacks = _describe(checkpoint)
    params = _read_params(folder, abstract)
    tokenizer = folder / "tokenizer"
    save_model(
        out,
        params,
        checkpoint,
        weights,
        stacks,
        tokenizer=data.load_tokenizer(str(tokenizer)) if tokenizer.exists() else None,
        dtype=dtype,
        max_shard_bytes=size,
    )


def _open_orbax(folder: Path) -> Checkpoint:
    """What `to_orbax` noted of the model it read; the tensors themselves are in `params/`."""
    try:
        source = json.loads((folder / "source.json").read_text("utf-8"))
        tensors = {
            name: TensorInfo(tuple(shape), dtype_from_name(dtype))
            for name, (shape, dtype) in source["tensors"].items()
        }
        config, generation = source["config"], source["generation_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{folder} was not written by to_orbax ({error})") from error
    if damage := manifest.find_damage(folder, "full"):
        raise WeightError(f"{folder} is damaged ({damage}) - convert the model again")

    def read(name: str) -> NoReturn:
        raise WeightError(f"{folder} holds no {name} - convert the model again")

    return Checkpoint(source["name"], folder, config, generation, tensors, read)


def add_tokens(
    name: str, out: Path, tokens: list[str], *, special: bool, revision: str | None = None
) -> None:
    """Writes a model with tokens added; a row of a new token is the mean of the old rows.

    Raises:
        WeightError: the model or its tokenizer cannot be read.
        ConfigError: none of the tokens is new.
        StorageError: `out` cannot be written.
    """
    checkpoint = open_checkpoint(name, revision)
    tokenizer = data.load_tokenizer(checkpoint.tokenizer_source)
    if not tokenizer.add_tokens(tokens, special_tokens=special):
        raise ConfigError(f"--tokens={','.join(tokens)}: {name} has them all - name new ones")
    family, config = models.read_config(checkpoint.config, name)
    weights = family.weights(config)
    if len(tokenizer) > config.vocab_size:
        checkpoint = with_vocabulary(checkpoint, weights, len(tokenizer))
    save_model(out, {}, checkpoint, weights, (config.num_layers,), tokenizer=tokenizer)
    ids = ",".join(str(tokenizer.convert_tokens_to_ids(token)) for token in tokens)
    info(f"{out}: their ids are {ids} (--config.peft.trainable_tokens={ids})")


def inspect(name: str, revision: str | None = None) -> None:
    """Prints what a model is, without reading its tensors."""
    checkpoint = open_checkpoint(name, revision)
    for key, value in sorted(checkpoint.config.items()):
        info(f"{key}: {value}")
    dtypes: collections.Counter[str] = collections.Counter()
    for tensor, stored in checkpoint.tensors.items():
        info(f"{tensor}  {stored.dtype.name}{list(stored.shape)}")
        dtypes[stored.dtype.name] += stored.nbytes
    for dtype, size in dtypes.items():
        info(f"{dtype}: {size / 1e6:.1f} MB")


def main() -> None:
    """Reads the command line and converts."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("to_orbax")
    verb.add_argument("model")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--revision")
    verb = verbs.add_parser("to_hf")
    verb.add_argument("folder", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    verb.add_argument("--max_shard_gb", type=float, default=5.0)
    verb = verbs.add_parser("add_tokens")
    verb.add_argument("model")
    verb.add_argument("out", type=Path)
    verb.add_argument("--tokens", type=lambda text: text.split(","), required=True)
    verb.add_argument("--special", action="store_true")
    verb.add_argument("--revision")
    verb = verbs.add_parser("inspect")
    verb.add_argument("model")
    verb.add_argument("--revision")

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message} - see --help")

    parser.error = fail
    arguments = parser.parse_args(sys.argv[1:])
    if arguments.verb == "to_orbax":
        to_orbax(arguments.model, arguments.folder, arguments.revision)
    elif arguments.verb == "to_hf":
        to_hf(arguments.folder, arguments.out, arguments.dtype, arguments.max_shard_gb)
    elif arguments.verb == "add_tokens":
        special, revision = arguments.special, arguments.revision
        tokens = arguments.tokens
        add_tokens(arguments.model, arguments.out, tokens, special=special, revision=revision)
    else:
        inspect(arguments.model, arguments.revision)


if __name__ == "__main__":
    run_command(main)
