"""The GGUF file of a recipe: file type, exceptions for tensors, importance matrix, size budget, split."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.schema import Bytes, Pattern, Strict

FloatFile = Literal["F32", "F16", "BF16"]
FileType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M",
    "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
]  # fmt: skip
TensorType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
]  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
# Types that llama.cpp only makes with an importance matrix.
_TENSORS_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
NEED_IMATRIX = (*_TENSORS_NEED_IMATRIX, "IQ2_M", "IQ3_XS", "Q2_K_S")


class GgufBudget(Strict):
    """A size for the file; the types of its tensors are chosen to meet it."""

    bytes: Bytes | None = Field(None, ge=1, description="size of the whole file, such as 100M")
    bits_per_weight: float | None = Field(
        None, gt=0, strict=False, description="size of the whole file over the number of weights"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise ValueError("give one of bytes and bits_per_weight")
        return self


class Gguf(Strict):
    """A GGUF file, as llama.cpp and Ollama load it."""

    type: FileType = Field("Q4_K_M", description="llama.cpp's file type: a type, or a mix of them by kinds of tensors")
    tensor_types: dict[Pattern, TensorType] = Field(
        {},
        description="types by a pattern of GGUF tensor names, such as blk.*.attn_v.weight; the first match counts",
    )
    imatrix: bool | str = Field(
        False,
        description="importance matrix: true computes it from the calibration text, else a file that llama.cpp made; "
        "with gptq, which has the blocks' Hessians, it is used for the embedding and the output head only",
    )
    budget: GgufBudget | None = Field(
        None,
        description="a size for the file instead of `type`: each tensor gets the type that loses least",
    )
    converter: str | None = Field(
        None,
        description="a checkout of llama.cpp, whose converter then makes the unquantized file: for families that have "
        "no row of their own here",
    )
    split: Bytes | None = Field(
        None, ge=1, description="most bytes of tensors in one file, such as 4G; null: a single file"
    )

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model."""
        return self.imatrix is True

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if self.type in FLOATS and (self.tensor_types or self.imatrix):
            raise ValueError(
                f"type {self.type} is not quantized: drop tensor_types and imatrix, or choose another type"
            )
        low = [kind for kind in self.tensor_types.values() if kind in _TENSORS_NEED_IMATRIX]
        if self.imatrix is False and (self.type in NEED_IMATRIX or low):
            raise ValueError(f"type {low[0] if low else self.type} needs an importance matrix: set imatrix: true")
        return self
