"""Loads tokenizers, with their own chat template or one of ours; the one file with transformers."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.data import gguf_tokenizer, paddlenlp
from jaxtune.data.templates import TEMPLATES
from jaxtune.errors import ConfigError, WeightError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tokenizers need no torch; without this transformers advises to install it at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load_tokenizer(
    path: str, *, template: str | None = None, enable_thinking: bool | None = None
) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a folder, a .gguf file or a hub id; `tiny:...` gives a byte tokenizer.

    Args:
        path: where the tokenizer is.
        template: name of a built-in chat template or a chat_template.json of PaddleNLP's, which
            replaces the tokenizer's own; "none" takes its own away.
        enable_thinking: what the template's variable of that name is, where the caller of the
            template does not say; None: not defined.

    Raises:
        ConfigError: the template is unknown, or needs tokens that the tokenizer lacks.
        WeightError: there is no tokenizer that can be loaded without running foreign code.
    """
    if path.startswith("tiny:"):
        tokenizer = _byte_tokenizer()
    elif Path(path).expanduser().is_file():
        tokenizer = _from_gguf(Path(path).expanduser())
    else:
        tokenizer = _from_pretrained(path)
    if template == "none":
        tokenizer.chat_template = None
    elif template is not None and template.endswith(".json"):
        tokenizer.chat_template = paddlenlp.read_template(template)
    elif template is not None:
        tokenizer.chat_template = _built_in(tokenizer, template)
    if enable_thinking is not None:
        tokenizer.chat_template = _with_thinking(tokenizer.chat_template, enable_thinking)
    return tokenizer


def _with_thinking(template: Any, value: bool) -> str:
    """The template with a default for its variable enable_thinking."""
    if template is None or "enable_thinking" not in template:
        raise ConfigError(
            f"data.enable_thinking={value}: the chat template has no such variable - leave it out, "
            "or set data.template=qwen3"
        )
    default = f"{{% set enable_thinking = {str(value).lower()} %}}"
    return f"{{% if enable_thinking is not defined %}}{default}{{% endif %}}{template}"


def _from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    loaded = gguf_tokenizer.load(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend,
        clean_up_tokenization_spaces=False,
        model_max_length=loaded.context_length,
        **loaded.special_tokens,
    )
    tokenizer.chat_template = loaded.chat_template
    return tokenizer


def _from_pretrained(path: str) -> "PreTrainedTokenizerFast":
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    try:
        # tokenizer.json says everything; AutoTokenizer imports models (and torch, where it is
        # installed) only to find a class for it, so it is left to folders without that file.
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Loader
        else:
            from transformers import AutoTokenizer as Loader
        tokenizer: Any = Loader.from_pretrained(
            str(folder) if is_folder else path,
            revision="main",
            trust_remote_code=False,
            local_files_only=is_folder,
        )
    except Exception as error:  # transformers raises nearly every type, for the same few reasons
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightError(
            f"no tokenizer can be loaded from {path}: {reason} - set model.tokenizer to a folder "
            "with tokenizer.json, a .gguf file or a hub id"
        ) from error
    if not tokenizer.is_fast:
        raise WeightError(
            f"the tokenizer of {path} has no tokenizer.json - save it once as a fast tokenizer"
        )
    return tokenizer


def _byte_tokenizer() -> "PreTrainedTokenizerFast":
    """259 tokens: three special ones and the 256 bytes; chatml. For tests and tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[2], pad_token=special[0]
    )
    tokenizer.chat_template = TEMPLATES["chatml"].jinja
    return tokenizer


def _built_in(tokenizer: "PreTrainedTokenizerFast", name: str) -> str:
    """The text of a built-in template, made to fit the tokenizer."""
    if name not in TEMPLATES:
        raise ConfigError(
            f"data.template={name!r} is neither built in nor a .json file - choose one of "
            f"{', '.join(TEMPLATES)}"
        )
    jinja, tokens = TEMPLATES[name].jinja, TEMPLATES[name].tokens
    if not tokens and tokenizer.eos_token is None:
        raise ConfigError(f"data.template={name} ends answers with EOS, which the tokenizer lacks")
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        fitting = [n for n, row in TEMPLATES.items() if all(t in vocabulary for t in row.tokens)]
        raise ConfigError(
            f"data.template={name} needs the tokens {', '.join(missing)}, which the tokenizer "
            f"lacks - templates that fit: {', '.join(fitting)}"
        )
    plain = tokenizer("").input_ids
    starts_with_bos = tokenizer.bos_token_id is not None and plain[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + jinja
