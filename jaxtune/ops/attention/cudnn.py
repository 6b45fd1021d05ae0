"""cuDNN's flash attention on NVIDIA GPUs, through jax.nn.dot_product_attention (jax 0.10.2).

For comparison with our own kernels, and where it applies: whole rows in bfloat16 or float16. JAX
gives no derivative of the log-sum-exp. Probabilities meet the values in the dtype of the inputs.
"""

import jax
import jax.numpy as jnp

from jaxtune.ops.attention.flash import Operands, refuse


def attend(operands: Operands) -> tuple[jax.Array, None]:
    """Output [B, T, N, H] in q's dtype; None for the log-sum-exp.

    Raises:
        NotImplementedError: prefix, segments, columns, softcap, sinks, alibi, relative,
            query_offset; a window that is not causal or meets keys of other tokens; float32.
    """
    refuse("cudnn", operands, "prefix", "segments", "columns", "query_offset")
    # A bias, and with it alibi, would be an array [N, T, S].
    refuse("cudnn", operands, "softcap", "sinks", "alibi", "relative")
    mask = operands.mask
    if mask.window is not None:
        refuse("cudnn sliding window", operands, "lengths")
        if not mask.causal:
            raise NotImplementedError("cudnn attention has no window without a causal mask")
    if operands.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cudnn attention in {operands.q.dtype}: only 16-bit floats")
    y = jax.nn.dot_product_attention(
        operands.q,
        operands.k,
        operands.v,
        scale=operands.scale,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return y, None
