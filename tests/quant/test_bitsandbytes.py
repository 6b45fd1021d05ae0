"""Tensors of bitsandbytes' own modules, read and written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import quant
from jaxtune.errors import WeightError
from jaxtune.quant.bitsandbytes import export_bitsandbytes, import_bitsandbytes
from tests.quant.oracle import as_kernel, functional, random_weight

ROWS, COLUMNS = 192, 100
FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]


def module(weight: Any, format: str, double_quant: bool) -> Any:
    """bitsandbytes' own linear layer with this weight, quantized."""
    functional()
    from bitsandbytes.nn import modules

    columns, rows = weight.shape
    if format == "int8":
        layer: Any = modules.Linear8bitLt(rows, columns, bias=False, has_fp16_weights=False)
    else:
        layer = modules.Linear4bit(
            rows, columns, bias=False, quant_type=format, compress_statistics=double_quant
        )
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def state_of(layer: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("format, double_quant", FORMATS)
def test_import(format, double_quant):
    weight = random_weight(ROWS, COLUMNS)
    layer = module(weight, format, double_quant)
    q = import_bitsandbytes(state_of(layer), (ROWS, COLUMNS))
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(q))
    # Linear8bitLt rounds to float16 before it quantizes.
    kernel = as_kernel(weight.half() if format == "int8" else weight)
    ours = quant.quantize(kernel, format, double_quant=double_quant)
    assert jax.tree.structure(q) == jax.tree.structure(ours)
    np.testing.assert_array_equal(q.codes, ours.codes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), q.scale, ours.scale)

    if format == "int8":
        dense = functional().int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        dense = functional().dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    np.testing.assert_allclose(quant.dequantize(q, jnp.float32).T, dense.numpy(), rtol=1e-6)


@pytest.mark.parametrize("format, double_quant", FORMATS)
def test_export_gives_back_what_was_imported(format, double_quant):
    tensors = state_of(module(random_weight(ROWS, COLUMNS), format, double_quant))
    q = import_bitsandbytes(tensors, (ROWS, COLUMNS))
    exported = export_bitsandbytes(q, dtype="float32")
    assert list(exported) == list(tensors)
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype and exported[name].shape == tensor.shape, name
        if name == "SCB":
            np.testing.assert_allclose(exported[name], tensor, rtol=3e-7)
        else:
            np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


@pytest.mark.parametrize("format, double_quant", FORMATS)
def test_bitsandbytes_reads_the_export(format, double_quant):
    import torch

    bnb = functional()
    kernel = as_kernel(random_weight(ROWS, COLUMNS))
    q = quant.quantize(kernel, format, double_quant=double_quant)
    tensors = {name: torch.tensor(array) for name, array in export_bitsandbytes(q).items()}
    if format == "int8":
        layer = module(torch.zeros(COLUMNS, ROWS), format, False)
        layer.load_state_dict(tensors)
        dense = bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        tolerance = 1e-6
    else:
        from bitsandbytes.nn.modules import Params4bit

        packed = tensors.pop("weight")
        weight: Any = Params4bit.from_prequantized(packed, tensors, device="cpu")
        assert weight.quant_state.dtype == torch.bfloat16
        dense = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        tolerance = 2**-7 if double_quant else 0  # a last bit of a bfloat16
    ours = quant.dequantize(q, jnp.float32 if format == "int8" else jnp.bfloat16)
    np.testing.assert_allclose(ours.astype(jnp.float32).T, dense.numpy(), rtol=tolerance)


def test_weights_stored_as_another_type():
    tensors = state_of(module(random_weight(ROWS, COLUMNS), "nf4", True))
    stored = tensors["weight"].reshape(-1).view(np.float32)[:, None]
    q = import_bitsandbytes(tensors | {"weight": stored}, (ROWS, COLUMNS))
    np.testing.assert_array_equal(q.codes, import_bitsandbytes(tensors, (ROWS, COLUMNS)).codes)


def test_what_does_not_fit_says_why():
    tensors = state_of(module(random_weight(ROWS, COLUMNS), "nf4", True))
    with pytest.raises(WeightError, match="its shape is"):
        import_bitsandbytes(tensors, (COLUMNS, ROWS))
    with pytest.raises(WeightError, match="map of its own"):
        import_bitsandbytes(tensors | {"weight.quant_map": np.zeros(16)}, (ROWS, COLUMNS))
    missing = {name: tensor for name, tensor in tensors.items() if name != "weight.absmax"}
    with pytest.raises(WeightError, match=r"lacks its tensor 'weight\.absmax'"):
        import_bitsandbytes(missing, (ROWS, COLUMNS))
    crossing = state_of(module(random_weight(96, COLUMNS), "nf4", True))
    with pytest.raises(WeightError, match="blocks cross its rows"):
        import_bitsandbytes(crossing, (96, COLUMNS))
    kernel = jnp.ones((64, 8))
    for q in (quant.quantize(kernel, "int4"), quant.quantize(kernel[None], "nf4")):
        with pytest.raises(ValueError, match="bitsandbytes has no layer"):
            export_bitsandbytes(q)
