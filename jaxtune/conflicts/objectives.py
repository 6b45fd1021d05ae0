"""Options that contradict an objective whose rows are no conversations."""

from jaxtune.schema import WEIGHTLESS, RunConfig

# What a row may be cut by that has no turns.
_CUTS = ("truncate_right", "drop", "error")
# Attention with a bias by distance.
_ATTENTION = ("auto", "xla", "reference")


def labelled(c: RunConfig) -> list[str]:
    """What does not go with rows that have labels instead of answers."""
    if not c.objective.is_labelled:
        return []
    objective, problems = f"objective.name={c.objective.name}", []
    if c.eval.exact_match and not c.objective.has_spans:
        problems.append(f"config.eval.exact_match: {objective} gives no answers - turn it off")
    if c.eval.exact_match and c.objective.has_spans and c.data.overlong not in ("split", "error"):
        problems.append(
            f"config.data.overlong={c.data.overlong} would leave questions on long contexts out of "
            "eval.exact_match - set it to split, or to error"
        )
    if c.data.streaming:
        problems.append(f"config.data.streaming: {objective} reads all labels first - turn it off")
    if c.data.cuts_examples or not c.data.isolated:
        problems.append(
            f"config.data: {objective} looks at whole examples - set data.isolated=true and "
            "another data.packer than concat"
        )
    suited = (*_CUTS, "split") if c.objective.has_spans else _CUTS
    if c.data.overlong not in suited:
        problems.append(
            f"config.data.overlong={c.data.overlong} is for conversations and texts, and "
            f"{objective} has rows with labels - choose one of {', '.join(suited)}"
        )
    if c.peft.method in (*WEIGHTLESS, "tokens"):
        problems.append(
            f"config.peft.method={c.peft.method} has no place for the head that {objective} trains "
            "- choose lora, or another method that changes weights"
        )
    if c.train.attention_group:
        problems.append(f"config.train.attention_group is for objective.name=sft, not {objective}")
    if c.train.router_aux_loss:
        problems.append(f"config.train.router_aux_loss is for objective.name=sft, not {objective}")
    if len(set(c.objective.labels)) < len(c.objective.labels):
        problems.append(f"config.objective.labels={c.objective.labels}: a name stands there twice")
    return problems


def paired(c: RunConfig) -> list[str]:
    """What does not go with a source that one half of the model reads, and a target of the other.

    Layers of two kinds are refused where the model is known (`policy`).
    """
    if not c.objective.is_paired:
        return []
    objective, problems = f"objective.name={c.objective.name}", []
    if c.data.packing:
        problems.append(
            f"config.data.packing: {objective} has a source and a target a row, of which two "
            "lengths would have to fit - set data.packing=false"
        )
    if c.data.streaming:
        problems.append(f"config.data.streaming: {objective} cuts rows in two - turn it off")
    if c.data.overlong not in _CUTS:
        problems.append(
            f"config.data.overlong={c.data.overlong} is for rows of one text - choose "
            f"{', '.join(_CUTS)}"
        )
    if c.peft.method in (*WEIGHTLESS, "tokens", "llama_pro"):
        problems.append(
            f"config.peft.method={c.peft.method} has one stack of layers to work on, and "
            f"{objective} trains an encoder and a decoder - choose lora, full, or another method "
            "that changes weights"
        )
    if "embed" in (*c.peft.target_modules, *c.peft.modules_to_save) or c.peft.trainable_tokens:
        problems.append(
            "config.peft: PEFT adapts neither the encoder's embedding nor the decoder's, which are "
            "the one that the model has - train it whole with peft.method=full"
        )
    if c.peft.layers_to_transform:
        problems.append(
            "config.peft.layers_to_transform: PEFT numbers the encoder's layers and the decoder's "
            "alike - name layers in peft.target_modules, e.g. .*decoder.*q_proj"
        )
    if c.model.attention not in _ATTENTION:
        problems.append(
            f"config.model.attention={c.model.attention} has no bias by distance, which "
            f"{objective} needs - leave it at auto"
        )
    for axis in ("stage", "sequence"):
        if getattr(c.mesh, axis) != 1:
            problems.append(
                f"config.mesh.{axis}={getattr(c.mesh, axis)}: {objective} has two stacks of layers "
                "and rows of two lengths - use mesh.data, mesh.fsdp or mesh.tensor"
            )
    for name in ("attention_group", "router_aux_loss"):
        if getattr(c.train, name):
            problems.append(f"config.train.{name} is for objective.name=sft, not {objective}")
    return problems
