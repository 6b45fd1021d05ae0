"""Decoders that transformers has no class for, transcribed to torch from their published code.

Each is a function from tensors by their published names, config.json and tokens to logits, in the
order and with the shapes of the original `modeling_*.py`, plus the shapes of the tensors.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

Tensors = Mapping[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


class Transcribed:
    """What the tests use of a transformers model."""

    def __init__(self, config: Mapping[str, Any]):
        shapes, self.forward = MODELS[config["model_type"]]
        self.fields = dict(config)
        tied = config.get("tie_word_embeddings", False)
        self.config = SimpleNamespace(tie_word_embeddings=tied, to_dict=lambda: self.fields)
        self.tensors = {
            name: torch.zeros(shape, requires_grad=True) for name, shape in shapes(config).items()
        }

    def named_parameters(self) -> Any:
        return self.tensors.items()

    def state_dict(self) -> Tensors:
        return self.tensors

    def eval(self) -> "Transcribed":
        return self

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits, loss = self.forward(self.tensors, self.fields, tokens), None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def angles(tokens: torch.Tensor, dim: int, base: float) -> torch.Tensor:
    """[T, dim / 2]."""
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
    return torch.outer(torch.arange(tokens.shape[1]).float(), inv_freq)


def rotate_halves(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [B, T, N, H]; LLaMA's rotate_half."""
    emb = torch.cat((turns, turns), dim=-1)[:, None]
    x1, x2 = x.chunk(2, dim=-1)
    return x * emb.cos() + torch.cat((-x2, x1), dim=-1) * emb.sin()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal; q [B, T, N, H], k and v [B, T, K, H], bias [N, T, T] -> [B, T, N * H]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    future = torch.full(scores.shape[-2:], float("-inf")).triu(1)
    return (torch.softmax(scores + future, dim=-1) @ v).transpose(1, 2).flatten(2)


# ---- InternLM 1 and 3: names of Llama


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    d, f, heads = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = config.get("head_dim") or d // heads
    keys = (config.get("num_key_value_heads") or heads) * size
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        outputs = {"q": heads * size, "k": keys, "v": keys, "o": d}
        for name, width in outputs.items():
            inputs = heads * size if name == "o" else d
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (width, inputs)
            if config.get("bias") or (config.get("qkv_bias") and name != "o"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (width,)
        shapes |= mlp_shapes(config, layer)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}


def mlp_shapes(config: Mapping[str, Any], layer: str) -> Shapes:
    d, f = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {f"{layer}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (d, f)
    if config["model_type"] == "internlm3" and config.get("bias"):
        shapes |= {f"{layer}mlp.{name}_proj.bias": (f,) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.bias"] = (d,)
    norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {f"{layer}{name}.weight": (d,) for name in norms}


def internlm(tensors: Tensors, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    def attend(layer: str, x: torch.Tensor) -> torch.Tensor:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        q, k, v = (
            linear(tensors, f"{layer}self_attn.{name}_proj", x).unflatten(-1, (-1, size))
            for name in "qkv"
        )
        base = config.get("rotary", {}).get("base") or config["rope_theta"]
        turns = angles(tokens, size, base)
        y = attention(rotate_halves(q, turns), rotate_halves(k, turns), v)
        return linear(tensors, f"{layer}self_attn.o_proj", y)

    return linear(tensors, "lm_head", named_as_llama(tensors, config, tokens, attend))


def named_as_llama(
    tensors: Tensors,
    config: Mapping[str, Any],
    tokens: torch.Tensor,
    attend: Callable[[str, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    eps = config["rms_norm_eps"]
    x = functional.embedding(tokens, tensors["model.embed_tokens.weight"])
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        x = x + attend(layer, rms_norm(x, tensors[layer + "input_layernorm.weight"], eps))
        h = rms_norm(x, tensors[layer + "post_attention_layernorm.weight"], eps)
        gate = functional.silu(linear(tensors, layer + "mlp.gate_proj", h))
        up = linear(tensors, layer + "mlp.up_proj", h)
        x = x + linear(tensors, layer + "mlp.down_proj", gate * up)
    return rms_norm(x, tensors["model.norm.weight"], eps)


# ---- InternLM 2


def internlm2_shapes(config: Mapping[str, Any]) -> Shapes:
    d, f, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    size = d // config["num_attention_heads"]
    width = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * size
    shapes: Shapes = {"model.tok_embeddings.weight": (vocab, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "attention.wqkv.weight": (width, d),
            layer + "attention.wo.weight": (d, d),
        }
        if config["bias"]:
            shapes |= {layer + "attention.wqkv.bias": (width,), layer + "attention.wo.bias": (d,)}
        shapes |= {layer + "attention_norm.weight": (d,), layer + "ffn_norm.weight": (d,)}
        shapes |= {f"{layer}feed_forward.{name}.weight": (f, d) for name in ("w1", "w3")}
        shapes |= {layer + "feed_forward.w2.weight": (d, f)}
    return shapes | {"model.norm.weight": (d,), "output.weight": (vocab, d)}


def internlm2(tensors: Tensors, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    groups, size = heads // config["num_key_value_heads"], config["hidden_size"] // heads
    turns = angles(tokens, size, config["rope_theta"])
    x = functional.embedding(tokens, tensors["model.tok_embeddings.weight"])
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, tensors[layer + "attention_norm.weight"], eps)
        # rearrange(qkv, "b q (h gs d) -> b q h gs d", gs=2 + groups, d=head_dim)
        heads_of = linear(tensors, layer + "attention.wqkv", h).unflatten(
            -1, (-1, 2 + groups, size)
        )
        q = heads_of[..., :groups, :].flatten(2, 3)
        k, v = heads_of[..., -2, :], heads_of[..., -1, :]
        y = attention(rotate_halves(q, turns), rotate_halves(k, turns), v)
        x = x + linear(tensors, layer + "attention.wo", y)
        h = rms_norm(x, tensors[layer + "ffn_norm.weight"], eps)
        gate = functional.silu(linear(tensors, layer + "feed_forward.w1", h))
        up = linear(tensors, layer + "feed_forward.w3", h)
        x = x + linear(tensors, layer + "feed_forward.w2", gate * up)
    return linear(tensors, "output", rms_norm(x, tensors["model.norm.weight"], eps))


# ---- Baichuan


def baichuan_shapes(config: Mapping[str, Any]) -> Shapes:
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.W_pack.weight"] = (3 * d, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, d)
        shapes |= mlp_shapes(config, layer)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}


def interleaved_slopes(n: int) -> list[float]:
    """Baichuan-13B's _get_interleave."""

    def of_power_of_2(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return of_power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return of_power_of_2(closest) + interleaved_slopes(2 * closest)[0::2][: n - closest]


def baichuan(tensors: Tensors, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    heads = config["num_attention_heads"]
    size, length = config["hidden_size"] // heads, tokens.shape[1]

    def attend(layer: str, x: torch.Tensor) -> torch.Tensor:
        packed = linear(tensors, layer + "self_attn.W_pack", x).unflatten(-1, (3, heads, size))
        q, k, v = packed.unbind(2)
        if "max_position_embeddings" in config:
            turns = angles(tokens, size, 10000.0)
            y = attention(rotate_halves(q, turns), rotate_halves(k, turns), v)
        else:
            slopes = torch.tensor(interleaved_slopes(heads))
            alibi = slopes[:, None, None] * torch.arange(length).float()
            y = attention(q, k, v, alibi)
        return linear(tensors, layer + "self_attn.o_proj", y)

    x = named_as_llama(tensors, config, tokens, attend)
    weight = tensors["lm_head.weight"]
    if "z_loss_weight" in config:  # NormHead
        weight = functional.normalize(weight)
    return functional.linear(x, weight)


# ---- ChatGLM 2 and 3


def chatglm_shapes(config: Mapping[str, Any]) -> Shapes:
    d, f, vocab = (config[k] for k in ("hidden_size", "ffn_hidden_size", "padded_vocab_size"))
    heads = config["num_attention_heads"] * config["kv_channels"]
    width = heads + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: Shapes = {"transformer.embedding.word_embeddings.weight": (vocab, d)}
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (d,)
        shapes[layer + "self_attention.query_key_value.weight"] = (width, d)
        if config["add_qkv_bias"]:
            shapes[layer + "self_attention.query_key_value.bias"] = (width,)
        shapes[layer + "self_attention.dense.weight"] = (d, heads)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        shapes[layer + "mlp.dense_h_to_4h.weight"] = (2 * f, d)
        shapes[layer + "mlp.dense_4h_to_h.weight"] = (d, f)
    shapes["transformer.encoder.final_layernorm.weight"] = (d,)
    return shapes | {"transformer.output_layer.weight": (vocab, d)}


def rotate_pairs(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """ChatGLM's apply_rotary_pos_emb: x [B, T, N, H], of which the first 2 * turns are rotated."""
    dim = 2 * turns.shape[-1]
    x, rest = x[..., :dim], x[..., dim:]
    pairs = x.unflatten(-1, (dim // 2, 2))
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    turned = torch.stack(
        [
            pairs[..., 0] * cos - pairs[..., 1] * sin,
            pairs[..., 1] * cos + pairs[..., 0] * sin,
        ],
        -1,
    )
    return torch.cat((turned.flatten(3), rest), dim=-1)


def chatglm(tensors: Tensors, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    eps, size = config["layernorm_epsilon"], config["kv_channels"]
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    turns = angles(tokens, size // 2, 10000.0 * config.get("rope_ratio", 1))
    x = functional.embedding(tokens, tensors["transformer.embedding.word_embeddings.weight"])
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        h = rms_norm(x, tensors[layer + "input_layernorm.weight"], eps)
        mixed = linear(tensors, layer + "self_attention.query_key_value", h)
        parts = mixed.split([heads * size, groups * size, groups * size], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)
        y = attention(rotate_pairs(q, turns), rotate_pairs(k, turns), v)
        x = x + linear(tensors, layer + "self_attention.dense", y)
        h = rms_norm(x, tensors[layer + "post_attention_layernorm.weight"], eps)
        gate, up = linear(tensors, layer + "mlp.dense_h_to_4h", h).chunk(2, dim=-1)
        x = x + linear(tensors, layer + "mlp.dense_4h_to_h", functional.silu(gate) * up)
    x = rms_norm(x, tensors["transformer.encoder.final_layernorm.weight"], eps)
    return linear(tensors, "transformer.output_layer", x)


# ---- Qwen 1


def qwen_shapes(config: Mapping[str, Any]) -> Shapes:
    d, f, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    width = config["kv_channels"] * config["num_attention_heads"]
    shapes: Shapes = {"transformer.wte.weight": (vocab, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        shapes |= {layer + "ln_1.weight": (d,), layer + "ln_2.weight": (d,)}
        shapes |= {layer + "attn.c_attn.weight": (3 * width, d)}
        shapes |= {layer + "attn.c_attn.bias": (3 * width,)}
        shapes |= {layer + "attn.c_proj.weight": (d, width)}
        shapes |= {layer + "mlp.w1.weight": (f, d), layer + "mlp.w2.weight": (f, d)}
        shapes |= {layer + "mlp.c_proj.weight": (d, f)}
        if not config["no_bias"]:
            outputs = {"attn.c_proj": d, "mlp.w1": f, "mlp.w2": f, "mlp.c_proj": d}
            shapes |= {f"{layer}{name}.bias": (size,) for name, size in outputs.items()}
    return shapes | {"transformer.ln_f.weight": (d,), "lm_head.weight": (vocab, d)}


def qwen(tensors: Tensors, config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    eps, size = config["layer_norm_epsilon"], config["kv_channels"]
    turns = angles(tokens, size, config["rotary_emb_base"])
    x = functional.embedding(tokens, tensors["transformer.wte.weight"])
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        h = rms_norm(x, tensors[layer + "ln_1.weight"], eps)
        mixed = linear(tensors, layer + "attn.c_attn", h).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in mixed)
        y = attention(rotate_halves(q, turns), rotate_halves(k, turns), v)
        x = x + linear(tensors, layer + "attn.c_proj", y)
        h = rms_norm(x, tensors[layer + "ln_2.weight"], eps)
        a1, a2 = linear(tensors, layer + "mlp.w1", h), linear(tensors, layer + "mlp.w2", h)
        x = x + linear(tensors, layer + "mlp.c_proj", a1 * functional.silu(a2))
    return linear(tensors, "lm_head", rms_norm(x, tensors["transformer.ln_f.weight"], eps))


MODELS: Mapping[str, tuple[Callable, Callable]] = {
    "baichuan": (baichuan_shapes, baichuan),
    "chatglm": (chatglm_shapes, chatglm),
    "internlm": (llama_shapes, internlm),
    "internlm2": (internlm2_shapes, internlm2),
    "internlm3": (llama_shapes, internlm),
    "qwen": (qwen_shapes, qwen),
}
