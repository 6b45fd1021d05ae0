"""Lists the model families: what is special about each, and the sizes known by name.

python -m jaxtune.models
python -m jaxtune.models mistral      one family, with the shapes of its sizes
"""

import argparse
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtune import models
from jaxtune.errors import run_command
from jaxtune.models.block import is_encoder_decoder


class Family(NamedTuple):
    """What the table says of a family.

    Attributes:
        name: `model_type` of its config.json.
        about: the first paragraph of its module.
        positions: how tokens know where they are.
        fused: Hugging Face's names of tensors that are several layers of ours.
        sizes: names of published sizes.
    """

    name: str
    about: str
    positions: str
    fused: tuple[str, ...]
    sizes: tuple[str, ...]


def families() -> list[Family]:
    """All families, by name."""
    return [_family(name) for name in sorted(models.FAMILIES)]


def _family(name: str) -> Family:
    module = models.family(name)
    config = module.Config.from_hf(module.TINY)
    rows = module.weights(config)
    theirs = [row.hf for row in rows]
    fused = {row.hf.split(".")[-2]: None for row in rows if theirs.count(row.hf) > 1}
    about = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
    return Family(name, about, _positions(config), tuple(fused), tuple(module.SIZES))


def _positions(config: Any) -> str:
    kinds = set(config.layer_kinds)
    if is_encoder_decoder(config):
        return "buckets of distances; an encoder and a decoder"
    if config.position_rows:
        return "learned" if config.causal else "learned; an encoder"
    if config.alibi is not None:
        return "ALiBi"
    turned = {kind.rope.head_dim for kind in kinds if kind.rope}
    part = "" if turned == {config.head_dim} else ", part of each head"
    return f"RoPE{part}" + (", windows" if any(kind.window for kind in kinds) else "")


def _print_sizes(name: str) -> None:
    """One line for each size of a family."""
    module = models.family(name)
    for size in module.SIZES:
        c = module.Config.from_hf(models.sized(name, size))
        print(
            f"{name}:{size:8} {c.num_layers} layers, width {c.hidden_size}, MLP "
            f"{c.intermediate_size}, {c.num_heads} heads ({c.num_kv_heads} of keys) of "
            f"{c.head_dim}, vocabulary {c.vocab_size}, {c.max_positions} positions"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the families, or the sizes of one."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.models", description="Lists the model families."
    )
    parser.add_argument("family", nargs="?", help="model_type of one family: its sizes")
    name = parser.parse_args(argv).family
    if name is not None:
        return _print_sizes(name)
    for family in families():
        print(f"{family.name:12} {family.about}")
        print(f"{'':12} {family.positions}; sizes: {', '.join(family.sizes)}")


if __name__ == "__main__":
    run_command(main)
