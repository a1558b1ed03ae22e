"""A run multiplies float32 numbers as such, whatever the process around it has allowed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ...tiny import build
from .test_pipeline import files, make


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_run_is_not_shortened_to_tf32_or_bfloat16(precision: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    make(tmp_path / "plain", tmp_path / "model", {})
    torch.set_float32_matmul_precision(precision)
    seen: list[str] = []
    make(
        tmp_path / "run",
        tmp_path / "model",
        {},
        on_block=lambda _: seen.append(torch.get_float32_matmul_precision()),
    )
    assert seen == ["highest", "highest"]
    assert torch.get_float32_matmul_precision() == precision
    assert files(tmp_path / "run" / "quantized") == files(tmp_path / "plain" / "quantized")
