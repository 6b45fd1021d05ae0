"""What PEFT makes of adapters of experts, which are written one by one, as transformers 4 had them.

transformers 5 keeps the experts of a layer in one array. PEFT 0.21.2 joins such adapters when it
loads them (utils/transformers_weight_conversion.py), for some families, and takes every layer with
the name of an expert's for an expert's.
"""

from collections.abc import Sequence

from jaxtune.checkpoint.hf import split_path
from jaxtune.models.base import Weight
from jaxtune.peft import Adapters

# model_type of the families whose adapters of experts it joins.
JOINED = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def problem(adapters: Adapters, weights: Sequence[Weight], model_type: str) -> str | None:
    """Why PEFT would compute something else with the adapters, or None: it would not."""
    rows = {
        row.ours.removesuffix(".kernel"): row for row in weights if row.ours.endswith(".kernel")
    }
    adapted = {split_path(path)[1]: configs for path, configs in adapters.choice.items()}
    experts = {path: rows[path] for path in rows if rows[path].experts}
    ends = {row.hf.rsplit(".", 2)[1] for row in experts.values()}
    for path in (path for path in adapted if path in rows):
        name = rows[path].hf.rsplit(".", 2)[1]
        if path not in experts and name in ends and model_type in JOINED:
            return f"it takes {path} for an expert"
    chosen = {path.rpartition(".")[2] for path in adapted if path in experts}
    if chosen and model_type not in JOINED:
        return f"it cannot join those of {model_type}'s experts"
    if len(chosen & {"gate_proj", "up_proj"}) == 1:
        return "it wants gate_proj and up_proj of experts, or neither"
    common = (adapters.config.rank, adapters.config.alpha) if chosen else ()
    for path in (path for path in adapted if path in experts):
        if any(c is not None and (c.rank, c.alpha) != common for c in adapted[path]):
            return f"it gives all experts the same rank, and {path} has another"
    return None
