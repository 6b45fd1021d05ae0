"""The schema of a run: every option once, with its type, default, range and documentation.

`--help`, the reference page and the range checks of `config.resolve` are made from these fields.
The dataclasses are frozen: what the rest of the package reads can no longer change.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

# What model.remat may be if a layer's weights are brought to it, from host memory or a chunk.
FETCHING = ("dots", "full")
DATA_FORMATS = (
    *("alpaca", "messages", "sharegpt", "xtuner", "src_tgt", "prompt_completion", "qa"),
    *("multiple_choice", "text", "document"),
    *("preference", "rejected", "ranked", "rated", "classified", "tagged", "extractive"),
)
# Objectives that learn labels, with a head of their own.
LABELLED = ("sequence_classification", "token_classification", "question_answering")
PAIRED = ("seq2seq",)  # objectives whose rows are a source and a target
WEIGHTLESS = ("prefix", "prompt", "p_tuning", "reft")  # methods that change no weights
QUANT_FORMATS = ("int8", "int8_block", "int4", "nf4", "fp4")


def _field(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """One config field: default, documentation, inclusive range or allowed values."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is fine-tuned, and in which precision and layout it is computed."""

    path: str = _field(
        "tiny:llama",
        "Hugging Face folder, .gguf file, hub id (org/name), "
        "package:<pip package> for a package that ships a model, or tiny:<family>",
    )
    revision: str | None = _field(None, "branch, tag or commit when path is a hub id")
    tokenizer: str | None = _field(None, "folder, .gguf file or hub id; default: the model's own")
    compute_dtype: str = _field(
        "auto",
        "dtype of activations and matmul operands; auto: float32 on CPU, else bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )
    param_dtype: str = _field(
        "auto",
        "dtype in which frozen weights are kept (trained ones are always float32); "
        "auto: compute_dtype",
        choices=("auto", "float32", "bfloat16"),
    )
    softmax_dtype: str = _field(
        "auto",
        "dtype in which attention probabilities multiply the values (they are always computed "
        "in float32); auto: compute_dtype",
        choices=("auto", "float32", "bfloat16"),
    )
    loss_dtype: str = _field(
        "float32", "dtype of logits inside the loss", choices=("float32", "bfloat16")
    )
    attention: str = _field(
        "auto",
        "attention implementation: xla (in blocks), pallas_tpu, pallas_gpu (our kernels), splash "
        "(JAX's, TPU), cudnn (GPU), reference (dense, slower); auto: the platform's own kernels",
        choices=("auto", "reference", "xla", "pallas_tpu", "pallas_gpu", "splash", "cudnn"),
    )
    context_parallel: str = _field(
        "auto",
        "how attention crosses the mesh's sequence axis: ring (keys travel around), ulysses "
        "(heads are exchanged for tokens); auto: ulysses where the heads divide, else ring",
        choices=("auto", "ring", "ulysses"),
    )
    matmul: str = _field(
        "auto",
        "product with a quantized weight: xla (the weight is decoded first), pallas_tpu (decoded "
        "block by block inside the kernel; also the weight gradient of experts); auto: pallas_tpu "
        "on TPU, but for int8 with a scale a column, else xla",
        choices=("auto", "xla", "pallas_tpu"),
    )
    cross_entropy: str = _field(
        "auto",
        "head and loss: chunked (XLA), pallas_tpu, reference (all logits at once); auto: "
        "pallas_tpu on TPU, else chunked",
        choices=("auto", "chunked", "pallas_tpu", "reference"),
    )
    layers: str = _field(
        "auto",
        "scan: one compiled layer looped over stacked weights; unroll: each layer compiled "
        "(slower to compile, more memory); auto: unroll in bfloat16 on CPU, else scan",
        choices=("auto", "scan", "unroll"),
    )
    remat: str = _field(
        "auto",
        "what the backward pass recomputes: none, attention (its internals), dots (all but "
        "matmul outputs), offload (like dots, the outputs kept in host memory), full (all but "
        "layer inputs and, of adapters, x A); auto: the cheapest whose compiled program fits the "
        "device",
        choices=("auto", "none", "attention", "dots", "offload", "full"),
    )
    offload_frozen: bool = _field(
        False,
        "keep the layers' frozen matrices in host memory: each travels to the device when its "
        "layer runs (not quantized ones, which XLA for TPU cannot read from there)",
    )
    allow_nan: bool = _field(False, "load weights that contain NaN or infinity")


@dataclass(frozen=True, kw_only=True)
class Quant:
    """How frozen weights are kept: in few bits, decoded where they are used."""

    format: tuple[str, ...] = _field(
        (),
        "format of the frozen linear layers (nf4, fp4, int4, int8, int8_block), or several as "
        "format=pattern, the first that matches (nf4=.*mlp.*,int8=.*attn.*); embeddings, norms, "
        "the head and layers that match nothing stay as they are",
    )
    block_size: int = _field(
        64, "rows that share a scale (nf4, fp4, int4, int8_block)", low=32, high=4096
    )
    double_quant: bool = _field(True, "quantize the scales of nf4 and fp4 too")


@dataclass(frozen=True, kw_only=True)
class Peft:
    """Which parameters learn."""

    method: str = _field(
        "lora",
        "lora: low-rank adapters; dora: with trained norms; moslora: with a mixer; mora: square "
        "matrices; loha, lokr: products of small matrices; adalora: ranks where they matter; vera: "
        "vectors around random matrices; ia3: factors of activations; oft: rotations; prefix: keys "
        "and values before those of every layer; prompt: virtual tokens before every example; "
        "p_tuning: those of a network; reft: edits of hidden states at some tokens of the prompt; "
        "tokens: single rows of the embedding; full: every parameter; "
        "freeze: the last or first layers; bitfit: the biases; llama_pro: new layers "
        "between the old ones; lisa, badam: a few layers at a time",
        choices=(
            *("lora", "dora", "moslora", "mora", "loha", "lokr", "adalora", "vera", "ia3", "oft"),
            *("prefix", "prompt", "p_tuning", "reft", "tokens"),
            *("full", "freeze", "bitfit", "llama_pro", "lisa", "badam"),
        ),
    )
    rank: int = _field(16, "rank R of the adapter matrices", low=1, high=65536)
    alpha: float = _field(32.0, "adapter scale is alpha / rank", low=0.0)
    rank_pattern: tuple[str, ...] = _field(
        (),
        "ranks of single layers as pattern=rank (layers.0.attn.q_proj=8); a pattern is a regular "
        "expression for the name or its end, and the first that matches counts",
    )
    alpha_pattern: tuple[str, ...] = _field((), "alphas of single layers, likewise")
    init: str = _field(
        "random",
        "how A and B start (lora): random, with B zero; pissa: as the largest singular triplets of "
        "the weight, of which the base keeps the rest; loftq: as those of what quantizing it loses",
        choices=("random", "pissa", "loftq"),
    )
    pissa_iterations: int = _field(
        0,
        "power iterations of a randomized SVD, much faster than an exact one (pissa); 0: exact",
        low=0,
    )
    loftq_iterations: int = _field(
        1, "times that the weight less the adapter is quantized anew (loftq)", low=1
    )
    rslora: bool = _field(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    dropout: float = _field(0.0, "dropout on the adapter's input", low=0.0, high=0.99)
    lora_bias: bool = _field(False, "a bias beside B, which is scaled too (lora)")
    target_modules: tuple[str, ...] = _field(
        ("all-linear",),
        "layers that get an adapter: names (q_proj), regular expressions matched against the "
        "whole path (layers.[0-3].mlp.*), all-linear (all but the head), or embed (lora, dora)",
    )
    exclude_modules: tuple[str, ...] = _field((), "names or patterns taken out of the targets")
    layers_to_transform: tuple[int, ...] = _field(
        (), "indices of the layers that get adapters; empty: all"
    )
    feedforward_modules: tuple[str, ...] = _field(
        ("down_proj",), "targets whose input is scaled, not their output (ia3)"
    )
    decompose_both: bool = _field(False, "both factors of low rank where that is smaller (lokr)")
    decompose_factor: int = _field(
        -1, "size of the small Kronecker factor; -1: near the square root (lokr)", low=-1
    )
    target_rank: int = _field(8, "mean rank of the layers in the end (adalora)", low=1)
    budget_start_steps: int = _field(0, "steps before ranks are given up (adalora)", low=0)
    budget_final_steps: int = _field(0, "last steps, in which ranks stay (adalora)", low=0)
    budget_every_steps: int = _field(1, "steps between decisions on ranks (adalora)", low=1)
    importance_b1: float = _field(
        0.85, "decay of the mean of a parameter's importance (adalora)", low=0.0, high=0.9999
    )
    importance_b2: float = _field(
        0.85, "decay of the mean of its uncertainty (adalora)", low=0.0, high=0.9999
    )
    orthogonal_weight: float = _field(
        0.5, "weight in the loss of what keeps singular vectors orthogonal (adalora)", low=0.0
    )
    mora_type: str = _field(
        "rotation",
        "blocks of the input are kept apart and rotated, or added (mora)",
        choices=("rotation", "sharing"),
    )
    d_initial: float = _field(0.1, "first value of the inner vector (vera)")
    projection_prng_key: int = _field(0, "seed of the random matrices (vera)", low=0)
    block_size: int = _field(
        32, "size of the rotated blocks; the nearest divisor of a layer's width (oft)", low=2
    )
    cayley_terms: int = _field(
        5,
        "terms of the Neumann series for a rotation, at least 4; 0: exact by a solve (oft)",
        low=0,
    )
    modules_to_save: tuple[str, ...] = _field(
        (),
        "parts of the base that train whole beside the adapter: embed, lm_head, norm, attn_norm",
    )
    bias: str = _field(
        "none",
        "biases of the base that train beside the adapter: those of adapted layers, or all",
        choices=("none", "adapted", "all"),
    )
    trainable_tokens: tuple[int, ...] = _field(
        (),
        "ids of tokens whose rows of the embedding, and of a head that is not tied to it, train: "
        "alone (tokens), or beside the adapter (lora, dora)",
    )
    trainable_layers: int = _field(
        2, "freeze: the last layers that train; negative: the first ones; 0: none"
    )
    trainable_modules: tuple[str, ...] = _field(
        ("all",),
        "freeze: what trains of those layers: all, or names, patterns (mlp, attn.q_proj)",
    )
    extra_modules: tuple[str, ...] = _field(
        (), "freeze: what trains outside the layers: embed, norm, lm_head"
    )
    new_layers: int = _field(4, "llama_pro: layers that are added, at equal distances", low=1)
    active_layers: int = _field(2, "lisa, badam: layers that train at a time", low=1)
    switch_steps: int = _field(
        50, "lisa, badam: optimizer steps after which other layers train", low=1
    )
    num_virtual_tokens: int = _field(
        20, "length P of a prefix or prompt; data.max_seq_len counts that of a prompt", low=1
    )
    prompt_init: str = _field(
        "random",
        "how a prefix or prompt starts: random (normal, as in PEFT); zero (prefix); vocab: the "
        "embeddings of random tokens, text: those of prompt_init_text (prompt)",
        choices=("random", "zero", "vocab", "text"),
    )
    prompt_init_text: str | None = _field(
        None, "text whose embeddings, repeated or cut, a prompt starts as"
    )
    prefix_projection: bool = _field(
        False, "make the prefix by a network while it is trained; false: P-tuning v2"
    )
    reft_form: str = _field(
        "loreft",
        "how hidden states h are edited (reft): loreft h + R^T (W h + b - R h) with orthonormal "
        "rows of R, direft h + R^T (W h + b), noreft as loreft with any R",
        choices=("loreft", "direft", "noreft"),
    )
    reft_first_tokens: int = _field(
        1, "first tokens of a prompt that are edited, at most half of it (reft)", low=0
    )
    reft_last_tokens: int = _field(
        1, "last tokens of a prompt that are edited, at most half of it (reft)", low=0
    )
    reft_shared: bool = _field(False, "one set of weights for first and last tokens (reft)")
    encoder: str = _field("mlp", "network of p_tuning", choices=("mlp", "lstm"))
    encoder_hidden_size: int | None = _field(
        None,
        "hidden width of the network of p_tuning or prefix_projection; default: that of what it "
        "makes",
        low=1,
    )
    encoder_num_layers: int = _field(2, "layers of p_tuning's LSTM", low=1)
    adapter: str | None = _field(
        None, "Hugging Face PEFT folder from which training continues (its rank and alpha are used)"
    )
    merged_adapters: tuple[str, ...] = _field(
        (), "PEFT folders that are merged into the base, one after the other, before it is trained"
    )

    @property
    def prompt_tokens(self) -> int:
        """Places of a row that every example leaves to virtual tokens."""
        return self.num_virtual_tokens if self.method in ("prompt", "p_tuning") else 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learnt from, and how rows become batches."""

    train: tuple[str, ...] = _field(
        (),
        "sources of training rows: files (JSON, JSON lines, CSV, Parquet, Arrow, text, gzip), "
        "patterns (data/*.jsonl), folders, hub ids (org/name), entries of registry",
    )
    eval: tuple[str, ...] = _field(
        (), "sources of held-out rows, as train; empty: see eval_fraction"
    )
    eval_fraction: float = _field(
        0.0, "share of the training rows held out when eval is empty", low=0.0, high=0.9
    )
    format: str = _field(
        "auto",
        "row schema; auto recognises it from the fields of each file's first row",
        choices=("auto", *DATA_FORMATS),
    )
    registry: str | None = _field(
        None, "a LLaMA-Factory dataset_info.json, whose entries train and eval may name"
    )
    columns: tuple[str, ...] = _field(
        (),
        "renamed fields as ours=theirs (instruction=Question,output=Best Answer); then only the "
        "fields named here are read",
    )
    function: str | None = _field(
        None,
        "module:function that makes fields of a known format of a row's fields (None: the row is "
        "left out)",
    )
    text_rows: str = _field(
        "line",
        "what is a row of a plain text file: line, paragraph (up to a blank line) or file",
        choices=("line", "paragraph", "file"),
    )
    mix: str = _field(
        "concatenate",
        "how several sources of train become one: concatenate; interleave_under (until the first "
        "is used up), interleave_over (until all were used up, shorter ones again), "
        "interleave_once (until all are used up)",
        choices=("concatenate", "interleave_under", "interleave_over", "interleave_once"),
    )
    weights: tuple[float, ...] = _field(
        (), "shares of the sources when interleaved, in any unit; empty: they take turns"
    )
    repeats: tuple[float, ...] = _field(
        (), "how often each source's rows appear in an epoch (0.5: a random half); one for all"
    )
    max_samples: tuple[int, ...] = _field(
        (), "rows considered of each source, the first ones; one for all"
    )
    template: str | None = _field(
        None,
        "built-in chat template (see docs/data.md), a chat_template.json of PaddleNLP's, or none: "
        "texts are joined as they are; default: the tokenizer's own",
    )
    enable_thinking: bool | None = _field(
        None,
        "value of the chat template's variable of that name (Qwen 3 and others): false puts an "
        "empty thought into the prompt, true or unset lets the answer begin with its thought",
    )
    max_seq_len: int = _field(
        512,
        "tokens in a row, at most; with objective.name=seq2seq in a source",
        low=8,
        high=1 << 20,
    )
    max_target_len: int = _field(
        128,
        "tokens in a target with objective.name=seq2seq, at most, its EOS included",
        low=8,
        high=1 << 20,
    )
    packing: bool = _field(True, "several examples in a row; false: one example a row")
    packer: str = _field(
        "best_fit",
        "which examples share a row: best_fit (rows all but full), greedy (PaddleNLP's greedy zero "
        "padding), next_fit (PaddleNLP's zero padding), concat (one after the other, cut every "
        "max_seq_len tokens, for pretraining)",
        choices=("best_fit", "greedy", "next_fit", "concat"),
    )
    isolated: bool = _field(
        True,
        "examples of a packed row do not see each other; false: attention and positions run "
        "through the row",
    )
    pad_to: str = _field(
        "max",
        "row length without packing: max_seq_len, or the longest row of the batch rounded up "
        "to 64 (compiles once per length)",
        choices=("max", "longest"),
    )
    train_on: str = _field(
        "answers",
        "tokens that carry loss: the assistant's answers and their end-of-turn tokens, the last "
        "answer only, or all; answers that a row marks as not trained never do",
        choices=("answers", "last", "all"),
    )
    loss_weights: str = _field(
        "tokens",
        "what counts the same in the loss: tokens (each that is trained), or examples (the trained "
        "tokens of one share a weight of 1)",
        choices=("tokens", "examples"),
    )
    overlong: str = _field(
        "truncate_right",
        "examples longer than max_seq_len: truncate_right, truncate_left, drop, error, split (into "
        "rows; of question_answering into windows of the context), last_rounds (the last whole "
        "rounds behind the system text), truncate_source (the end of the prompt, the beginning of "
        "the answer); each case is counted and reported",
        choices=(
            *("truncate_right", "truncate_left", "drop", "error"),
            *("split", "last_rounds", "truncate_source"),
        ),
    )
    window_overlap: int = _field(
        128,
        "tokens of the context, half of those in a window at most, that a window shares with the "
        "one before it (objective.name=question_answering with overlong=split, and where "
        "eval.exact_match looks for answers)",
        low=0,
    )
    max_source_len: int | None = _field(
        None,
        "tokens that a prompt keeps with overlong=truncate_source, and a question that does not "
        "fit with last_rounds; default: half of max_seq_len",
        low=1,
    )
    on_bad_row: str = _field(
        "error", "a row that breaks its schema: stop, or count and skip", choices=("error", "skip")
    )
    max_bad_fraction: float = _field(
        0.01, "with on_bad_row=skip: stop above this share of bad rows", low=0.0, high=1.0
    )
    max_line_bytes: int = _field(8 << 20, "longest accepted line of a JSONL file", low=1024)
    shuffle: bool = _field(True, "new deterministic order every epoch")
    streaming: bool = _field(
        False, "read and tokenize while training, without a cache or a count of rows"
    )
    shuffle_units: int = _field(
        4,
        "with streaming: units (256 KiB of JSON lines, or another file) from anywhere in the data "
        "whose rows are mixed and packed together, in memory for each row of a batch",
        low=1,
    )
    prefetch: int = _field(2, "batches prepared ahead by a background thread", low=0, high=64)
    cache: str | None = _field(
        None,
        "folder where tokenized files are kept for later runs; empty: they are not; default: "
        "$XDG_CACHE_HOME/jaxtune/tokens or ~/.cache/jaxtune/tokens",
    )
    workers: int = _field(
        0, "processes that tokenize files of more than 8192 rows; 0: one for each core", low=0
    )
    allow_change: bool = _field(False, "resume although the training data differ from the run's")

    @property
    def source_limit(self) -> int:
        """Tokens that a prompt keeps where it is cut."""
        return self.max_source_len or self.max_seq_len // 2

    @property
    def cuts_examples(self) -> bool:
        """Whether an example may continue in the next row."""
        return self.packing and self.packer == "concat"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised."""

    name: str = _field(
        "sft",
        "sft: next-token cross-entropy on the trained tokens; sequence_classification: labels or "
        "scores of texts and pairs of texts; token_classification: labels of words; "
        "question_answering: where in a context an answer starts and ends; seq2seq: targets that "
        "an encoder-decoder writes for sources",
        choices=("sft", *LABELLED, *PAIRED),
    )
    labels: tuple[str, ...] = _field(
        (),
        "names of the classes, in the order of the head's outputs; default: those of the model's "
        "head if it has one, else those of the training rows, sorted",
    )
    problem_type: str = _field(
        "auto",
        "of sequence_classification: one class a text, any number of classes, or scores; auto: as "
        "the model's head if that is kept, else by the type of the rows' labels",
        choices=(
            *("auto", "single_label_classification"),
            *("multi_label_classification", "regression"),
        ),
    )

    @property
    def is_labelled(self) -> bool:
        """Whether rows have labels instead of answers."""
        return self.name in LABELLED

    @property
    def has_spans(self) -> bool:
        """Whether answers are parts of contexts."""
        return self.name == "question_answering"

    @property
    def is_paired(self) -> bool:
        """Whether rows are a source and a target."""
        return self.name in PAIRED


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedule."""

    name: str = _field(
        "adamw",
        "adamw; adamw8bit: its moments in 8 bits, as bitsandbytes'; adafactor: factored second "
        "moment; lion: sign of the momentum; muon: orthogonalised momentum of matrices, adamw for "
        "the rest; galore, galore8bit: adamw, adamw8bit of gradients projected to a low rank; "
        "apollo, apollo_mini: gradients scaled as adamw scales a projection of them",
        choices=(
            "adamw",
            "adamw8bit",
            "adafactor",
            "lion",
            "muon",
            "galore",
            "galore8bit",
            "apollo",
            "apollo_mini",
        ),
    )
    learning_rate: float = _field(2e-4, "peak learning rate", low=0.0, high=10.0)
    schedule: str = _field(
        "linear", "shape after warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = _field(0, "linear warm-up, optimizer steps", low=0)
    warmup_ratio: float = _field(
        0.0, "warm-up as a share of all steps; set one of the two", low=0.0, high=1.0
    )
    min_lr_ratio: float = _field(
        0.0, "final learning rate as a share of the peak", low=0.0, high=1.0
    )
    b1: float | None = _field(
        None,
        "decay of the first moment; default: 0.9, for the matrices of muon 0.95",
        low=0.0,
        high=0.9999999,
    )
    b2: float | None = _field(
        None,
        "decay of the second moment (of lion: of the momentum that is kept); default: 0.999, "
        "for lion 0.99",
        low=0.0,
        high=0.9999999,
    )
    eps: float = _field(
        1e-8, "added to the root of the second moment by adamw, adamw8bit and muon", low=0.0
    )
    weight_decay: float = _field(0.0, "decoupled weight decay of matrices", low=0.0, high=1.0)
    max_grad_norm: float = _field(1.0, "global gradient norm is clipped to this; 0: off", low=0.0)
    loraplus_ratio: float = _field(
        1.0,
        "learning rate of an adapter's B and of vectors, as a multiple of that of A (LoRA+; its "
        "paper suggests 16)",
        low=0.0,
        high=1e6,
    )
    embedding_learning_rate: float | None = _field(
        None,
        "peak learning rate of what is trained of the embedding; default: learning_rate",
        low=0.0,
        high=10.0,
    )
    projection_rank: int | None = _field(
        None,
        "rank of projected gradients; default: 128 for galore, galore8bit and apollo, 1 for "
        "apollo_mini",
        low=1,
        high=65536,
    )
    projection_gap: int = _field(200, "optimizer steps that share a projection", low=1)
    projection_scale: float | None = _field(
        None,
        "factor of the direction (of apollo: its square); default: galore 0.25, apollo 1, "
        "apollo_mini 128",
        low=0.0,
    )
    offload: bool = _field(
        False, "keep the optimizer's state in host memory, on the device only during the update"
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how much at a time, and where the results go."""

    output_dir: str = _field("runs/default", "folder for everything the run writes")
    seed: int = _field(0, "seed of initial adapters, data order and dropout", low=0, high=2**31)
    num_steps: int | None = _field(None, "optimizer steps; default: from num_epochs", low=1)
    num_epochs: float = _field(1.0, "passes over the training data", low=0.0)
    micro_batch_size: int = _field(4, "rows per data shard in one forward pass", low=1)
    gradient_accumulation_steps: int = _field(1, "forward passes per optimizer step", low=1)
    pipeline_micro_batches: int = _field(
        0,
        "parts of micro_batch_size that follow each other through the stages of mesh.stage, a "
        "multiple of their number: with more the stages wait less; 0: as many as stages",
        low=0,
    )
    pipeline_chunks: int = _field(
        1,
        "separate parts of the layers that each stage of mesh.stage holds: with more the stages "
        "wait less and exchange more; kept in checkpoints, so resume with the same",
        low=1,
    )
    neftune_alpha: float = _field(
        0.0,
        "uniform noise on embeddings while training, at most alpha / sqrt(tokens of the example x "
        "width) (NEFTune; 5 to 15); 0: none",
        low=0.0,
        high=1e4,
    )
    attention_group: int = _field(
        0,
        "shifted sparse attention of LongLoRA while training: half of the heads see tokens of "
        "their own group of so many (even) only, the others of groups shifted by half; "
        "measurements and answers see all; 0: full attention",
        low=0,
    )
    router_aux_loss: float = _field(
        0.0,
        "factor of the load-balancing loss of a mixture's experts, added while training "
        "(config.json of most says 0.001); 0: none",
        low=0.0,
        high=10.0,
    )
    router_bias_update_rate: float = _field(
        0.0,
        "step of the numbers by which a router's experts are balanced (e_score_correction_bias), "
        "against their loads of every step (DeepSeek-V3 0.001); 0: they stay as they are",
        low=0.0,
        high=1.0,
    )
    max_bad_steps: int = _field(
        5, "consecutive non-finite steps (each skipped) before the run stops", low=1
    )
    compilation_cache: str = _field(
        "~/.cache/jaxtune/xla", "folder of compiled programs kept between runs; empty: off"
    )


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How devices are arranged; one axis may be -1 (all that are left)."""

    stage: int = _field(1, "shards of the layers, as a pipeline", low=-1)
    data: int = _field(1, "replicas with their own rows", low=-1)
    fsdp: int = _field(-1, "shards of weights and optimizer state, with their own rows", low=-1)
    expert: int = _field(
        1, "shards of the experts of a mixture, with their own rows like data", low=-1
    )
    sequence: int = _field(
        1, "shards of every row's tokens (context parallel), and of weights like fsdp", low=-1
    )
    tensor: int = _field(
        1, "shards of every matrix multiplication, and of the tokens between them", low=-1
    )
    sharding_stage: int = _field(
        3,
        "what the fsdp and sequence axes shard (ZeRO): 1 the optimizer's state; 2 gradients too; "
        "3 parameters too",
        low=1,
        high=3,
    )
    indivisible: str = _field(
        "replicate",
        "a parameter's axis that a mesh axis does not divide: kept whole, with a warning, or error",
        choices=("replicate", "error"),
    )

    def axes(self) -> dict[str, int]:
        """Sizes of the mesh's axes, from the one whose neighbours talk least to the most."""
        names = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Several processes: how they find each other, and when one is lost (docs/launch.md)."""

    coordinator_address: str | None = _field(None, "host:port of process 0; default: by launcher")
    num_processes: int | None = _field(None, "processes in all; default: by launcher", low=1)
    process_id: int | None = _field(None, "number of this process, from 0", low=0)
    local_device_ids: tuple[int, ...] = _field((), "devices of this host to use; empty: all")
    start_timeout_seconds: int = _field(300, "wait for the others at the start", low=1)
    silence_seconds: int = _field(10, "a process without sign of life for so long is lost", low=3)
    step_timeout_seconds: int = _field(
        0, "a longer step ends with stacks and exit code 70, unless it compiles; 0: never", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measurements on held-out rows."""

    every_steps: int = _field(0, "optimizer steps between evaluations; 0: only at the end", low=0)
    batch_size: int = _field(8, "rows per data shard", low=1)
    exact_match: bool = _field(
        False,
        "generate the last answer of each held-out row, or find it in its context, before and "
        "after, and compare",
    )
    max_rows: int = _field(0, "rows used for exact_match; 0: all", low=0)
    max_new_tokens: int = _field(128, "longest answer, tokens", low=1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saved states, resume and exports."""

    every_steps: int = _field(100, "optimizer steps between checkpoints; 0: only at the end", low=0)
    keep_last: int = _field(2, "newest checkpoints kept", low=1)
    keep_best: int = _field(0, "checkpoints with the lowest eval loss kept besides", low=0)
    resume: str = _field("auto", "auto: newest good checkpoint; never: start anew; or a step")
    verify: str = _field(
        "full",
        "check on restore: checksums of all bytes, sizes only, or off",
        choices=("full", "size", "off"),
    )
    export_adapter: bool = _field(True, "write a Hugging Face PEFT folder at the end (LoRA)")
    export_merged: bool = _field(
        False, "write a merged Hugging Face model at the end; full fine-tuning always does"
    )
    merge_base: str = _field(
        "dequantized",
        "what an adapter trained on quantized weights is merged into: dequantized (the weights it "
        "was trained on) or original (those of the base's files)",
        choices=("dequantized", "original"),
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is reported, and where."""

    every_steps: int = _field(1, "optimizer steps between metric lines", low=1)
    progress: str = _field(
        "auto",
        "bar (terminals), plain lines, or off; auto: bar on a terminal, else plain",
        choices=("auto", "bar", "plain", "off"),
    )
    tensorboard: bool = _field(True, "write TensorBoard event files")
    plot: bool = _field(True, "draw the loss curve (loss.png) at the end")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run."""

    model: Model = Model()
    quant: Quant = Quant()
    peft: Peft = Peft()
    data: Data = Data()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train = Train()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def has_windows(self) -> bool:
        """Whether contexts are read in windows, to train or to find answers."""
        return self.objective.has_spans and (self.data.overlong == "split" or self.eval.exact_match)


def sections() -> dict[str, type]:
    """Section name -> dataclass, in the order of the schema."""
    return {f.name: type(f.default) for f in dataclasses.fields(RunConfig)}
