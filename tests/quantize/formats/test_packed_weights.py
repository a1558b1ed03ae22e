"""Packed weights of other writers: layouts that no writer of ours makes, and how they are named."""

import pytest
import torch

from quantpress.core.errors import BadInput
from quantpress.formats import bits as bitstream
from quantpress.formats.decoding import ScaleGrid
from quantpress.formats.packed_weights import TensorType, packed_weights
from quantpress.formats.statement import stated_quantization


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (ScaleGrid((1, 1), 64, 128), "tensor"),
        (ScaleGrid((4, 1, 1), 64, 128), "tensor"),
        (ScaleGrid((64, 1), 1, 128), "channel"),
        (ScaleGrid((64, 4), 1, 32), "32 columns"),
        (ScaleGrid((2, 4), 32, 32), "32 x 32 block"),
    ],
)
def test_how_scales_lie_over_a_weight_in_words(layout: ScaleGrid, name: str) -> None:
    assert str(layout) == name


@pytest.mark.parametrize("bits", [4, 8])
def test_words_with_one_scale_and_one_zero_for_the_whole_weight(bits: int) -> None:
    """compressed-tensors' strategy tensor: the zero is stored as it is, signed, and not packed."""
    make = torch.Generator().manual_seed(bits)
    middle = 1 << (bits - 1)
    signed = torch.randint(-middle, middle, (6, 32), generator=make)
    tensors = {
        "x.weight_packed": bitstream.pack((signed + middle).to(torch.uint8), bits),
        "x.weight_scale": torch.tensor([0.5]),
        "x.weight_zero_point": torch.tensor([3], dtype=torch.int8),
        "x.weight_shape": torch.tensor([6, 32]),
    }
    headers = {name: TensorType(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": bits}}}}
    found, used = packed_weights(headers, tensors.__getitem__, stated)
    assert used == tensors.keys()
    torch.testing.assert_close(found["x.weight"].decode(tensors.__getitem__, torch.float32), 0.5 * (signed - 3.0))


def test_words_of_other_bits_than_the_config_says_are_refused() -> None:
    headers = {
        "x.weight_packed": TensorType((6, 24), torch.int32),
        "x.weight_scale": TensorType((6, 3), torch.float16),
        "x.weight_shape": TensorType((2,), torch.int64),
    }
    shape = {"x.weight_shape": torch.tensor([6, 192])}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}}
    with pytest.raises(BadInput, match=r"24 words for 192 codes a row are not the 8 bits a code that config.json says"):
        packed_weights(headers, shape.__getitem__, stated)


def test_an_empty_statement_is_no_statement() -> None:
    with pytest.raises(BadInput, match=r"config\.json: quantization_config is empty"):
        stated_quantization({"quantization_config": {}}, lambda name: None)
    assert stated_quantization({"quantization_config": None}, lambda name: None) is None


@pytest.mark.parametrize(("scale", "refused"), [((4, 4), True), ((2, 4), True), ((2, 2), False), ((256, 1), False)])
def test_scales_that_contradict_the_stated_blocks_are_refused(scale: tuple[int, int], refused: bool) -> None:
    headers = {
        "x.weight": TensorType((256, 256), torch.float8_e4m3fn),
        "x.weight_scale_inv": TensorType(scale, torch.float32),
    }
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if refused:
        said = r"x.weight_scale_inv: scales of shape \[[24], 4\] are not those of the 128 x 128 blocks that the config"
        with pytest.raises(BadInput, match=said):
            packed_weights(headers, headers.__getitem__, stated)  # type: ignore[arg-type]
    else:
        assert packed_weights(headers, headers.__getitem__, stated)[0].keys() == {"x.weight"}  # type: ignore[arg-type]
