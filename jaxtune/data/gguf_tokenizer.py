"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

A GGUF file stores vocabulary, merges (or scores), token types and a few flags, but the rule that
cuts text into words before merging only by name (`tokenizer.ggml.pre`). `SPLITS` has the rules that
are known here; an unknown name is refused, because a wrong rule changes ids silently (of digits,
mostly).

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from jaxtune.errors import WeightError
from jaxtune.gguf_header import read_header

CONTROL, USER_DEFINED = 3, 4  # token types

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> (digits are cut off one by one first, regular expression of a word).
SPLITS: dict[str, tuple[bool, str]] = {
    "default": (False, GPT2),
    "gpt-2": (False, GPT2),
    "smollm": (True, GPT2),
    "llama-bpe": (False, LLAMA3),
    "llama3": (False, LLAMA3),
    "llama-v3": (False, LLAMA3),
    "qwen2": (False, QWEN2),
}


class GgufTokenizer(NamedTuple):
    """A rebuilt tokenizer and the keyword arguments of the object that wraps it."""

    backend: Tokenizer
    special_tokens: dict[str, str]  # bos_token, eos_token, ... -> text
    chat_template: str | None
    context_length: int | None


def load(path: str | Path) -> GgufTokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Raises:
        WeightError: the file is damaged, has no tokenizer, or one of a kind that is not supported.
    """
    metadata, _ = read_header(Path(path))
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in BUILDERS:
        raise WeightError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported "
            f"(supported: {', '.join(BUILDERS)}) - "
            "set model.tokenizer to the Hugging Face tokenizer"
        )
    try:
        return _rebuilt(path, metadata, kind)
    except WeightError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WeightError(
            f"{path}: its tokenizer is damaged ({type(error).__name__}: {error}) - get the file "
            "again, or set model.tokenizer to the Hugging Face tokenizer"
        ) from error


def _rebuilt(path: str | Path, metadata: dict[str, Any], kind: str) -> GgufTokenizer:
    """The tokenizer that the metadata of a file describe."""
    tokens = metadata["tokenizer.ggml.tokens"]
    backend = BUILDERS[kind](path, metadata)
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for type_id, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        named = [text for text, of in zip(tokens, types, strict=True) if of == type_id]
        add([AddedToken(text, normalized=False, special=type_id == CONTROL) for text in named])
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in SPECIAL_KEYS.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    _add_bos(backend, metadata, special)
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return GgufTokenizer(backend, special, metadata.get("tokenizer.chat_template"), context)


SPECIAL_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def _byte_level(path: str | Path, metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE (GPT-2 and all that came after it)."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise WeightError(
            f"{path}: tokenizer.ggml.pre={name!r} is not supported "
            f"(supported: {', '.join(SPLITS)}) - set model.tokenizer to the Hugging Face tokenizer"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=_vocabulary(metadata), merges=merges))
    digits, word = SPLITS[name]
    # The ByteLevel step knows GPT-2's expression itself, and Hugging Face files rely on that.
    if word == GPT2:
        steps: list[Any] = [pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        split = pre.Split(Regex(word), behavior="isolated")
        steps = [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    if digits:
        steps.insert(0, pre.Digits(individual_digits=True))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: str | Path, metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Llama 1 and 2): merges are derived from the scores."""
    vocabulary = _vocabulary(metadata)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = [pair for *_, pair in sorted(ranked)]
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_bos(backend: Tokenizer, metadata: dict[str, Any], special: dict[str, str]) -> None:
    """Makes plain text start with BOS where the file (or its kind's default) says so."""
    default = metadata["tokenizer.ggml.model"] == "llama" or (
        metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    )
    if metadata.get("tokenizer.ggml.add_bos_token", default) and (bos := special.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
