"""Options that contradict each other: what no run can be, whatever the model."""

import re

from jaxtune.conflicts import weightless
from jaxtune.conflicts.objectives import labelled, paired
from jaxtune.errors import nearest
from jaxtune.schema import FETCHING, QUANT_FORMATS, Peft, Quant, RunConfig

# Methods that train the model's own weights.
WHOLE = ("full", "freeze", "bitfit", "llama_pro", "lisa", "badam")
# Of those, the ones that train a few layers at a time.
IN_TURN = ("lisa", "badam")
# Of these, those that train its matrices.
MATRICES = tuple(method for method in WHOLE if method != "bitfit")
# Methods with matrices A and B.
PAIRS = ("lora", "dora", "moslora")
# Optimizers that see kernels at a low rank.
PROJECTED = ("galore", "galore8bit", "apollo", "apollo_mini")


def contradictions(config: RunConfig) -> list[str]:
    """Combinations of fields that cannot work, whatever the model."""
    c, problems = config, []
    if not c.data.train:
        problems.append("config.data.train is empty - name a training file")
    if c.optim.warmup_steps and c.optim.warmup_ratio:
        problems.append("config.optim: set warmup_steps or warmup_ratio, not both")
    if c.peft.method == "full" and c.quant.format:
        problems.append("config.quant.format needs an adapter: peft.method=full trains the weights")
    problems += _bad_formats(c.quant)
    problems += _bad_peft(c)
    if c.checkpoint.resume not in ("auto", "never") and not c.checkpoint.resume.isdecimal():
        problems.append(
            f"config.checkpoint.resume={c.checkpoint.resume!r}: must be auto, never or a step"
        )
    if c.checkpoint.keep_best and not c.eval.every_steps:
        problems.append("config.checkpoint.keep_best needs eval.every_steps")
    if c.data.eval and c.data.eval_fraction:
        problems.append("config.data: set eval or eval_fraction, not both")
    if (c.eval.every_steps or c.eval.exact_match) and not (c.data.eval or c.data.eval_fraction):
        problems.append("config.eval needs held-out rows - set data.eval or data.eval_fraction")
    if c.data.streaming and c.train.num_steps is None:
        problems.append("config.data.streaming does not count rows - set train.num_steps")
    if c.data.streaming and c.data.eval_fraction:
        problems.append("config.data.eval_fraction needs all rows - name data.eval files to stream")
    if c.data.streaming and not c.data.packing and c.data.pad_to == "longest":
        problems.append("config.data.pad_to=longest: processes of a stream see their own rows only")
    if c.train.num_steps is None and c.train.num_epochs == 0:
        problems.append("config.train: set num_steps, or num_epochs above 0")
    if c.model.offload_frozen and c.model.layers == "unroll":
        problems.append("config.model.layers: offload_frozen fetches layers in a scan - use auto")
    if c.model.offload_frozen and c.model.remat not in ("auto", *FETCHING):
        problems.append(
            f"config.model.remat={c.model.remat} would keep weights on the device that "
            "model.offload_frozen brings there - choose dots or full"
        )
    if c.model.offload_frozen and c.mesh.sharding_stage < 3:
        problems.append(
            "config.model.offload_frozen would keep the whole model in host memory for each "
            "device - set mesh.sharding_stage=3"
        )
    if c.optim.offload and c.optim.name in ("adamw8bit", "galore8bit"):
        problems.append(
            "config.optim.offload: XLA for TPU cannot compute with bytes in host memory - choose "
            f"optim.name=adamw, or leave {c.optim.name}'s small state on the device"
        )
    if c.peft.method in IN_TURN:
        problems += _contradict_turns(c)
    if c.optim.name in PROJECTED and c.peft.method not in MATRICES:
        problems.append(
            f"config.optim.name={c.optim.name} projects gradients of whole matrices, and "
            f"peft.method={c.peft.method} trains none - use peft.method=full, or optim.name=adamw"
        )
    if c.optim.embedding_learning_rate is not None and not c.optim.learning_rate:
        problems.append(
            "config.optim.embedding_learning_rate follows the schedule of optim.learning_rate, "
            "which is 0 - set both"
        )
    problems += _bad_data(c)
    problems += weightless.contradictions(c) + _groups(c) + labelled(c) + paired(c) + _unread(c)
    axes = c.mesh.axes()
    problems += [f"config.mesh.{name}=0: must be -1 or >= 1" for name, n in axes.items() if n == 0]
    if list(axes.values()).count(-1) > 1:
        problems.append("config.mesh: only one axis may be -1")
    return problems


def _bad_peft(c: RunConfig) -> list[str]:
    """Options of peft that contradict each other or the devices'."""
    problems = []
    if c.peft.method == "dora" and c.model.offload_frozen:
        problems.append(
            "config.peft.method=dora starts from the norms of weights, which model.offload_frozen "
            "keeps off the device - choose one of the two"
        )
    if c.peft.method == "vera" and c.mesh.stage != 1:
        problems.append(
            "config.peft.method=vera has matrices that all layers share, which mesh.stage does "
            "not carry - use other axes"
        )
    if 0 < c.peft.cayley_terms < 4:
        problems.append(
            f"config.peft.cayley_terms={c.peft.cayley_terms} rotates too coarsely - use 0 or >= 4"
        )
    if c.peft.decompose_factor == 0:
        problems.append("config.peft.decompose_factor=0: must be -1 or >= 1")
    if c.peft.lora_bias and c.peft.method != "lora":
        problems.append(
            f"config.peft.lora_bias: peft.method={c.peft.method} has no bias beside B, as in PEFT "
            "- use peft.method=lora"
        )
    if c.peft.method == "tokens" and not c.peft.trainable_tokens and c.peft.adapter is None:
        problems.append("config.peft.method=tokens trains nothing - name peft.trainable_tokens")
    if not c.peft.target_modules:
        problems.append("config.peft.target_modules is empty - e.g. all-linear")
    return problems + _starts(c) + _ranks(c)


def _ranks(c: RunConfig) -> list[str]:
    """What does not go with ranks that layers give up."""
    problems = []
    if c.peft.method != "adalora" or c.peft.adapter is not None:
        return problems
    if c.peft.target_rank > c.peft.rank:
        problems.append(
            f"config.peft.target_rank={c.peft.target_rank} must not be above rank={c.peft.rank}, "
            "from which adalora begins"
        )
    if c.optim.offload or c.optim.name not in ("adamw", "adafactor", "lion"):
        problems.append(
            f"config.optim: peft.method=adalora compares all layers after a step, and "
            f"optim.name={c.optim.name}, offload={c.optim.offload} takes it layer by layer - use "
            "adamw, adafactor or lion without offload"
        )
    return problems


def _starts(c: RunConfig) -> list[str]:
    """What does not go with adapters that start as a part of the base."""
    problems, init = [], c.peft.init
    if init == "random":
        return problems
    if not c.peft.alpha:
        problems.append(f"config.peft.alpha=0: peft.init={init} divides by the adapter's scale")
    if init == "loftq" and not c.quant.format:
        problems.append(
            "config.peft.init=loftq starts from what quantizing loses - set quant.format, or use "
            "peft.init=pissa"
        )
    if init == "loftq" and c.checkpoint.merge_base == "original":
        problems.append(
            "config.checkpoint.merge_base=original: peft.init=loftq makes up for what quantizing "
            "lost, which the base's files still have - use dequantized"
        )
    return problems


def _contradict_turns(c: RunConfig) -> list[str]:
    """What the written-out backward pass of layers in turn does not do."""
    method, problems = f"peft.method={c.peft.method}", []
    if c.model.layers == "unroll":
        problems.append(f"config.model.layers=unroll: {method} goes over one stack - use auto")
    if c.model.remat not in ("auto", "full"):
        problems.append(
            f"config.model.remat={c.model.remat}: {method} computes each layer again - use auto"
        )
    if c.optim.offload:
        problems.append(
            f"config.optim.offload: {method} keeps state of {c.peft.active_layers} layers only - "
            "turn it off"
        )
    if c.quant.format:
        problems.append(f"config.quant.format: {method} trains every layer sooner or later")
    return problems


def _bad_data(c: RunConfig) -> list[str]:
    """Options of data that contradict each other or the prompt's."""
    problems = []
    for name in ("weights", "repeats", "max_samples"):
        values, count = getattr(c.data, name), len(c.data.train)
        if any(value <= 0 for value in values):
            problems.append(f"config.data.{name}={values}: must be above 0")
        if len(values) not in (0, 1, count):
            problems.append(
                f"config.data.{name} has {len(values)} values for {count} sources of data.train - "
                "give one for each, or one"
            )
    room = c.data.max_seq_len - c.peft.prompt_tokens
    if c.data.max_source_len is not None and c.data.max_source_len >= room:
        less = f" less the {c.peft.prompt_tokens} virtual tokens" if c.peft.prompt_tokens else ""
        problems.append(
            f"config.data.max_source_len={c.data.max_source_len} must be below "
            f"max_seq_len={c.data.max_seq_len}{less} - answers need room"
        )
    if c.data.template == "none" and c.data.enable_thinking is not None:
        problems.append("config.data.enable_thinking needs a chat template - unset data.template")
    return problems


def _bad_formats(quant: Quant) -> list[str]:
    """Items of quant.format that are no `format` or `format=pattern`."""
    problems = []
    for item in quant.format:
        name, equals, pattern = item.partition("=")
        if name not in QUANT_FORMATS:
            known = f"must begin with one of {', '.join(QUANT_FORMATS)}"
            problems.append(f"config.quant.format={item!r}: {known}" + nearest(name, QUANT_FORMATS))
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"config.quant.format={item!r}: {error}")
        if not equals and len(quant.format) > 1 and item != quant.format[-1]:
            problems.append(
                f"config.quant.format: {item!r} takes all layers, so what follows is never used"
            )
    block_size = quant.block_size
    if block_size & (block_size - 1):
        problems.append(f"config.quant.block_size={block_size}: must be a power of two")
    return problems


def _groups(c: RunConfig) -> list[str]:
    """Sizes of attention groups that cannot be shifted, or are whole rows."""
    problems, group = [], c.train.attention_group
    if group % 2:
        problems.append(
            f"config.train.attention_group={group}: shifted groups begin half a group earlier - "
            "use an even number"
        )
    if group >= c.data.max_seq_len:
        problems.append(
            f"config.train.attention_group={group} would change nothing: rows have "
            f"{c.data.max_seq_len} tokens - use a quarter of them, or 0"
        )
    for name in ("router_aux_loss", "router_bias_update_rate"):
        if group and getattr(c.train, name):
            problems.append(
                f"config.train.{name} balances whole examples, and attention_group cuts them - "
                "set one of them to 0"
            )
    return problems


def _trains_beside(peft: Peft) -> bool:
    """Whether more than the matrices of layers' adapters trains."""
    more = peft.modules_to_save or peft.trainable_tokens or peft.lora_bias
    return bool(more) or peft.bias != "none" or "embed" in peft.target_modules


def _unread(c: RunConfig) -> list[str]:
    """Fields that were set although another field makes sure that nobody reads them."""
    formats = {item.partition("=")[0] for item in c.quant.format}
    cuts_source = c.data.overlong in ("truncate_source", "last_rounds")
    only_muon = c.optim.name == "muon" and c.peft.method == "lora" and not _trains_beside(c.peft)
    no_projection = c.optim.name not in PROJECTED
    whole = f"peft.method={c.peft.method} trains weights of the model"
    no_b = f"peft.method={c.peft.method} has no A and B"
    projection = ("projection_rank", "projection_gap", "projection_scale")
    objective = f"objective.name={c.objective.name}"
    has_labels, has_pairs = c.objective.is_labelled, c.objective.is_paired
    chat = ("template", "enable_thinking", "train_on", "max_source_len", "workers")
    one_label = c.objective.name in ("sequence_classification", "question_answering")
    no_classes = c.objective.name in ("sft", "question_answering") or has_pairs
    no_problem = c.objective.name != "sequence_classification"
    rules = (
        (has_labels, "data", chat, f"{objective} has no conversations"),
        (has_pairs, "data", chat, f"{objective} joins the texts before an answer as they are"),
        (not has_pairs, "data", ("max_target_len",), "only objective.name=seq2seq has targets"),
        (one_label, "data", ("loss_weights",), "an example has one label"),
        (has_labels, "model", ("loss_dtype", "cross_entropy"), f"{objective} has few logits"),
        (no_classes, "objective", ("labels",), f"{objective} has no classes"),
        (no_problem, "objective", ("problem_type",), "only sequence_classification has several"),
        (c.peft.method in WHOLE, "model", ("offload_frozen",), whole),
        (c.peft.encoder != "lstm", "peft", ("encoder_num_layers",), "only encoder=lstm has them"),
        (
            c.peft.method == "prefix" and not c.peft.prefix_projection,
            "peft",
            ("encoder_hidden_size",),
            "needs prefix_projection=true",
        ),
        (c.peft.init != "pissa", "peft", ("pissa_iterations",), "needs peft.init=pissa"),
        (c.peft.init != "loftq", "peft", ("loftq_iterations",), "needs peft.init=loftq"),
        (formats <= {"int8"}, "quant", ("block_size",), "no format of quant.format has blocks"),
        (not formats & {"nf4", "fp4"}, "quant", ("double_quant",), "only nf4 and fp4 have it"),
        (c.data.packing, "data", ("pad_to",), "data.packing fills rows of max_seq_len"),
        (not c.data.packing, "data", ("packer", "isolated"), "needs data.packing=true"),
        (c.data.cuts_examples, "data", ("overlong",), "data.packer=concat cuts between rows"),
        (not c.data.streaming, "data", ("shuffle_units",), "needs data.streaming=true"),
        (c.data.on_bad_row == "error", "data", ("max_bad_fraction",), "needs on_bad_row=skip"),
        (c.data.mix == "concatenate", "data", ("weights",), "data.mix=concatenate; see repeats"),
        (not c.has_windows, "data", ("window_overlap",), "only question_answering cuts windows"),
        (not cuts_source, "data", ("max_source_len",), "data.overlong does not cut prompts"),
        (c.data.streaming, "data", ("mix", "repeats", "max_samples"), "data.streaming reads all"),
        (c.train.num_steps is not None, "train", ("num_epochs",), "train.num_steps decides"),
        (c.optim.schedule == "constant", "optim", ("min_lr_ratio",), "optim.schedule is constant"),
        (c.optim.name == "adafactor", "optim", ("b1", "b2", "eps"), "adafactor has its own"),
        (c.optim.name == "lion", "optim", ("eps",), "lion divides by nothing"),
        (no_projection, "optim", projection, "only galore and apollo project gradients"),
        (c.peft.method not in PAIRS, "optim", ("loraplus_ratio",), no_b),
        (only_muon, "optim", ("b2", "eps"), "muon keeps no second moment of matrices"),
        (not c.eval.exact_match, "eval", ("max_rows", "max_new_tokens"), "needs eval.exact_match"),
    )
    problems = []
    for applies, section, names, why in rules:
        given, default = getattr(c, section), getattr(RunConfig(), section)
        for name in names:
            if applies and getattr(given, name) != getattr(default, name):
                value = getattr(given, name)
                problems.append(f"config.{section}.{name}={value!r} would be ignored: {why}")
    return problems
