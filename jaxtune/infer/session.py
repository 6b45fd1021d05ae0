"""A model on disk, opened for use: `load` describes it, fills it, and returns a `Session`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune import data
from jaxtune.checkpoint.adapter import Adapter
from jaxtune.checkpoint.adapter_sum import summed
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.tensors import Checkpoint
from jaxtune.errors import ConfigError
from jaxtune.infer import engine
from jaxtune.infer.base import Base, open_base
from jaxtune.infer.sampling import make_sampling
from jaxtune.infer.text import cut, settled
from jaxtune.models import read_config
from jaxtune.models.block import is_encoder_decoder
from jaxtune.models.heads import head_of
from jaxtune.sharding.mesh import make_mesh
from jaxtune.tree import Params, Skeleton

DTYPES = ("float32", "bfloat16")

# Plain text to continue, or a conversation: messages with "role" and "content".
Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Session:
    """A model that is ready to use.

    Attributes:
        skeleton: the model without arrays.
        params: its parameters, by name.
        tokenizer: the transformers tokenizer.
        stop_ids: tokens that end an answer.
        base: the model without adapters.
        adapters: those that `using` chooses from, by name.
    """

    skeleton: Skeleton
    params: Params
    tokenizer: Any
    stop_ids: frozenset[int]
    base: Base
    adapters: Mapping[str, Adapter]

    def using(self, adapter: str | Mapping[str, float] | None) -> "Session":
        """The same model with other adapters; the base's weights are shared, not read again.

        Args:
            adapter: a name; or names and weights: what these LoRAs add is weighted and added up
                (weights 1: all of them act); None: the base.

        Raises:
            ConfigError: there is no adapter of that name, or one of several is no plain LoRA.
        """
        weights = {adapter: 1.0} if isinstance(adapter, str) else adapter
        if not weights:
            return dataclasses.replace(self, skeleton=self.base.skeleton, params=self.base.params)
        if absent := sorted(weights.keys() - self.adapters.keys()):
            known = ", ".join(sorted(self.adapters)) or "none"
            raise ConfigError(f"adapter {absent[0]!r} is not loaded - loaded: {known}")
        parts = [(self.adapters[name], weight) for name, weight in weights.items()]
        chosen = parts[0][0] if list(weights.values()) == [1.0] else summed(parts)
        skeleton, params = self.base.adapted(chosen)
        return dataclasses.replace(self, skeleton=skeleton, params=params)

    def logits(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """Logits of every position, float32 [B, T, V].

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], 0 for padding on either side; None: no padding. Logits of
                padding mean nothing.
        """
        tokens = np.asarray(input_ids, np.int32)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
        if tokens.ndim != 2 or mask.shape != tokens.shape or not tokens.size:
            raise ConfigError(
                f"input_ids {tokens.shape} and attention_mask {mask.shape} - "
                "both must be [rows, tokens] and hold at least one token"
            )
        return engine.score(self.skeleton, self.params, tokens, mask != 0)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answers conversations, or continues plain texts.

        Args:
            prompts: one prompt or several: a text is continued as it is; a conversation goes
                through the chat template and is answered. To an encoder-decoder both are sources,
                for which it writes the targets.
            max_new_tokens: longest answer, in tokens.
            temperature: 0: always the likeliest token.
            top_k: draw among the k likeliest tokens; 0: all.
            top_p: draw among the likeliest that have this probability together; 1: all.
            repetition_penalty: above 1, tokens that have occurred become less likely.
            stop: texts that end an answer; they are not part of it.
            seed: same seed, same answers.
            stream: called with a prompt's index and each new piece of its answer.

        Returns:
            An answer for each prompt, in order.

        Raises:
            ConfigError: an option is out of range, a prompt is empty or too long, or there is no
                chat template.
        """
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop={stop!r} - give a list of texts, none of them empty")
        sampling = make_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        listed = _listed(prompts)
        told = [0] * len(listed)  # characters given to `stream`

        def watch(i: int, new: list[int]) -> bool:
            text, is_stopped = cut(self._decode(new), stop)
            safe = text if is_stopped else settled(text, stop)
            if stream is not None and len(safe) > told[i]:
                stream(i, safe[told[i] :])
                told[i] = len(safe)
            return is_stopped

        outputs = engine.generate(
            self.skeleton,
            self.params,
            [self._encode(prompt) for prompt in listed],
            max_new_tokens=max_new_tokens,
            eos_ids=self.stop_ids,
            sampling=sampling,
            seed=seed,
            watch=watch if stop or stream is not None else None,
        )
        answers = [cut(self._decode(new), stop)[0] for new in outputs]
        if stream is not None:
            for i, answer in enumerate(answers):
                if len(answer) > told[i]:
                    stream(i, answer[told[i] :])
        return answers

    def check_chat(self) -> None:
        """Raises ConfigError if the model cannot be talked with: its template is unusable."""
        self._encode([{"role": "user", "content": "Hello"}])

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        try:
            messages = [data.Message(m["role"], m["content"]) for m in prompt]
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"prompt {prompt!r} - a message needs the fields role and content"
            ) from error
        checkpoint = self.base.checkpoint
        if is_encoder_decoder(read_config(checkpoint.config, checkpoint.name)[1]):
            return data.source_ids(self.tokenizer, messages)
        return data.prompt_ids(self.tokenizer, messages).tolist()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text, one conversation, or a list of either, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    is_conversation = len(prompts) > 0 and isinstance(prompts[0], Mapping)
    return [prompts] if is_conversation else list(prompts)  # type: ignore[list-item]


# ---- load


def load(
    path: str | Path,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    tokenizer: str | Path | None = None,
    template: str | None = None,
    enable_thinking: bool | None = None,
) -> Session:
    """Opens a model.

    Args:
        path: Hugging Face folder (an exported model, say), .gguf file, hub id,
            package:<pip package> or tiny:<family>.
        adapter: PEFT folder for that model; or several by name, for `Session.using`: the session is
            the base's at first.
        dtype: "float32" or "bfloat16", of weights and computation; None: float32 on CPU, else
            bfloat16.
        mesh: devices over which the model is spread (`sharding.mesh.make_mesh`); None: the first.
        tokenizer: folder, .gguf file or hub id; None: the model's own.
        template: name of a built-in chat template; None: the tokenizer's own.
        enable_thinking: told to chat templates that think before they answer; None: nothing is.

    Raises:
        WeightError: the model, its tokenizer or the adapter is missing, damaged or does not fit.
        ConfigError: an option is wrong, or the model is no language model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} - use one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(str(path))
    source = str(tokenizer or checkpoint.tokenizer_source)
    loaded = data.load_tokenizer(source, template=template, enable_thinking=enable_thinking)
    mesh = make_mesh({"data": 1}, jax.devices()[:1]) if mesh is None else mesh
    if (
        head_of(checkpoint.config) is not None
        or not read_config(checkpoint.config, checkpoint.name)[1].causal
    ):
        raise ConfigError(
            f"{checkpoint.name} predicts no next tokens: it is an encoder, or has a head for "
            "labels - open it with transformers, or give a language model"
        )
    base = open_base(checkpoint, dtype, mesh)
    folders: Mapping[str, str | Path] = {}
    chosen = None
    if isinstance(adapter, str | Path):
        folders, chosen = {"default": adapter}, "default"
    elif adapter is not None:
        folders = adapter
    adapters = {name: base.read(Path(folder)) for name, folder in folders.items()}
    stop = stop_ids(checkpoint, loaded)
    return Session(base.skeleton, base.params, loaded, stop, base, adapters).using(chosen)


def stop_ids(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    named = (checkpoint.generation_config or {}).get("eos_token_id")
    named = [] if named is None else named if isinstance(named, list) else [named]
    return frozenset(data.stop_ids(tokenizer)) | frozenset(named)
