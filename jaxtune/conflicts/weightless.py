"""Options that contradict methods which change no weights: prefixes, prompts and edits."""

from jaxtune.schema import WEIGHTLESS, RunConfig


def contradictions(c: RunConfig) -> list[str]:
    """What does not go with such a method."""
    if c.peft.method not in WEIGHTLESS:
        return []
    problems = []
    if c.checkpoint.export_merged:
        problems.append(
            f"config.checkpoint.export_merged: peft.method={c.peft.method} changes no weights, so "
            "there is nothing to merge - turn it off"
        )
    return problems + (_edits(c) if c.peft.method == "reft" else _prompts(c))


def _edits(c: RunConfig) -> list[str]:
    """What does not go with edits of hidden states at tokens of prompts."""
    peft, problems = c.peft, []
    counts = (peft.reft_first_tokens, peft.reft_last_tokens)
    if not any(counts):
        problems.append(
            "config.peft: with reft_first_tokens=0 and reft_last_tokens=0 nothing is edited - set "
            "one of them above 0"
        )
    elif peft.reft_shared and not all(counts):
        problems.append(
            "config.peft.reft_shared=True would be ignored: only the first or the last tokens are "
            "edited"
        )
    if c.data.train_on == "all" or c.data.format in ("text", "document"):
        problems.append(
            "config.data: peft.method=reft edits prompts, and with train_on=all or texts there is "
            "nothing before what is trained - use rows with answers, and train_on=answers or last"
        )
    if c.data.cuts_examples or not c.data.isolated:
        problems.append(
            "config.peft.method=reft edits the prompt of every example - set data.isolated=true "
            "and another data.packer than concat"
        )
    return problems


def _prompts(c: RunConfig) -> list[str]:
    """What does not go with a prefix or prompt, or with the way it starts."""
    peft, problems = c.peft, []
    starts = {"prefix": ("random", "zero"), "prompt": ("random", "vocab", "text")}
    allowed = starts.get(peft.method, ("random",))
    if peft.prompt_init not in allowed:
        problems.append(
            f"config.peft.prompt_init={peft.prompt_init} is not for peft.method={peft.method} - "
            f"choose {' or '.join(allowed)}"
        )
    if (peft.prompt_init == "text") != bool(peft.prompt_init_text):
        problems.append("config.peft: prompt_init=text and prompt_init_text need each other")
    if peft.method == "prefix":
        return problems + _prefix(c)
    if peft.num_virtual_tokens > c.data.max_seq_len // 2:
        problems.append(
            f"config.peft.num_virtual_tokens={peft.num_virtual_tokens} takes more than half of "
            f"data.max_seq_len={c.data.max_seq_len} - raise that, or use fewer"
        )
    if c.data.streaming:
        problems.append(
            f"config.data.streaming has no room for the virtual tokens of "
            f"peft.method={peft.method} - turn it off, or use peft.method=prefix"
        )
    if c.data.cuts_examples or not c.data.isolated:
        problems.append(
            f"config.peft.method={peft.method} begins every example with virtual tokens - set "
            "data.isolated=true and another data.packer than concat"
        )
    return problems


def _prefix(c: RunConfig) -> list[str]:
    """What does not go with keys and values before those of every layer."""
    problems = []
    if c.model.attention in ("splash", "cudnn"):
        problems.append(
            f"config.model.attention={c.model.attention} has no keys that all tokens see, which "
            "peft.method=prefix adds - leave it at auto"
        )
    if c.mesh.sequence != 1:
        problems.append(
            f"config.mesh.sequence={c.mesh.sequence} cuts rows of tokens, before which "
            "peft.method=prefix puts others - use mesh.fsdp, or peft.method=prompt"
        )
    if c.train.attention_group:
        problems.append(
            "config.train.attention_group: a prefix is outside of all groups - set it to 0, or "
            "use peft.method=lora"
        )
    return problems
