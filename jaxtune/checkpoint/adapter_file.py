"""The tensors of a PEFT folder, read and checked."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from jaxtune.checkpoint.adapter_config import CONFIG_FILE
from jaxtune.checkpoint.safetensors import Location, read_header, read_tensor, refuse_pickle
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import WeightError, listing

WEIGHTS_FILE = "adapter_model.safetensors"


def header(folder: Path) -> dict[str, Location]:
    """The tensors of a PEFT folder."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise WeightError(f"{folder} holds no {WEIGHTS_FILE} - copy the whole adapter folder")
    return read_header(path)


def read_tensors(
    folder: Path,
    sizes: Mapping[str, tuple[int, ...]],
    fixed: Mapping[str, np.ndarray],
    others: Collection[str],
) -> dict[str, np.ndarray]:
    """The folder's tensors, float32; those of `fixed` may be there too, with these values.

    Args:
        folder: of the adapter.
        sizes: shapes by name.
        fixed: values by name.
        others: names that may be there, and are not read.

    Raises:
        WeightError: tensors are missing, extra, mis-shaped, not finite or not those of `fixed`.
    """
    path, in_file = folder / WEIGHTS_FILE, header(folder)
    arrays, problems = {}, []
    for key, size in sizes.items():
        if key not in in_file:
            problems.append(f"missing: {key}")
        elif in_file[key].info.shape != size:
            shapes = f"{list(in_file[key].info.shape)}, base and r ask for {list(size)}"
            problems.append(f"wrong shape: {key} is {shapes}")
        else:
            arrays[key] = read_tensor(in_file[key]).astype(np.float32)
            if not np.isfinite(arrays[key]).all():
                problems.append(f"NaN or infinity: {key}")
    for key in fixed.keys() & in_file.keys():
        same = in_file[key].info.shape == fixed[key].shape
        # Drawn on other machines, the last bit may differ.
        if not same or not np.allclose(read_tensor(in_file[key]), fixed[key], atol=1e-6):
            problems.append(f"not what {CONFIG_FILE} gives: {key}")
    problems += [f"unexpected: {key}" for key in in_file if key not in {*sizes, *fixed, *others}]
    if problems:
        raise WeightError(
            f"{path}: {len(problems)} tensors do not fit the base model and {CONFIG_FILE} - use "
            "the adapter's own base model:" + listing(problems, limit=len(problems))
        )
    return arrays


def require_same(folder: Path, copies: Mapping[str, str], base: Checkpoint) -> None:
    """Raises WeightError for a copy of a base weight that is another, but for its rounding."""
    in_file = header(folder)
    for key, name in copies.items():
        if key in in_file:
            copy, own = read_tensor(in_file[key]), base.read(name)
            narrow = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
            if copy.shape != own.shape or (copy.astype(narrow) != own.astype(narrow)).any():
                raise WeightError(
                    f"{folder}: {key} is not the embedding of {base.name} - save the model that it "
                    "was trained on as a folder, and use that as model.path"
                )
