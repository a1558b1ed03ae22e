"""The comparison with transformers' whole model, before the work."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantpress.artifact.manifest import ForwardCheck, read_manifest
from quantpress.core.errors import BadInput
from quantpress.engine import guard
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.skeleton import Skeleton

from ... import tiny
from ..models.test_experts import saved
from .test_accounting import RECIPE
from .test_pipeline import make


def checked(folder: Path) -> ForwardCheck:
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(checkpoint, device=torch.device("cpu"))
    return guard.check_forward(folder, skeleton, checkpoint, 1_000_000)


def test_a_run_says_that_its_blocks_compute_what_the_model_computes(tmp_path: Path) -> None:
    tiny.build("gemma3", tmp_path / "model")
    make(tmp_path / "run", tmp_path / "model", RECIPE)
    check = read_manifest(tmp_path / "run").forward
    assert check is not None
    assert check.compared == "the whole model"
    assert check.difference is not None
    assert check.difference < 1e-4


def test_a_large_model_is_compared_as_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("deepseek_v3", tmp_path)
    monkeypatch.setattr(guard, "_WHOLE_BYTES", 0)
    state = torch.get_rng_state()
    check = checked(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert check.compared == "a twin with 3 blocks"
    assert check.difference is not None
    assert check.difference < 1e-4


def test_a_smaller_one_of_a_config_that_wants_each_token_to_be_a_number(tmp_path: Path) -> None:
    """Emu3's; others lose the tokens, whose rows the smaller vocabulary may lack."""
    saved("deepseek_v3", tmp_path)
    skeleton = Skeleton(Checkpoint(tmp_path), device=torch.device("cpu"))
    assert guard._smaller(skeleton).bos_token_id is None
    skeleton.model.config = transformers.Emu3TextConfig(num_hidden_layers=skeleton.n_blocks, bos_token_id=151849)
    assert guard._smaller(skeleton).bos_token_id == 0


def test_a_block_that_computes_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build("gemma3", tmp_path)
    seen: list[Any] = []

    def wrong(block: Any, hidden: torch.Tensor, arguments: Any, **settings: Any) -> None:
        run(block, hidden, arguments, **settings)
        seen.append(block)
        if len(seen) == 2:
            hidden *= 1.01

    run = guard.run_block
    monkeypatch.setattr(guard, "run_block", wrong)
    with pytest.raises(BadInput, match=r"block 1, run by itself, differs by \d\.\d%"):
        checked(tmp_path)


def test_a_twin_is_narrower_where_its_class_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong in the narrow one only is no fault of the model: the wider one is asked."""
    saved("deepseek_v3", tmp_path)
    monkeypatch.setattr(guard, "_WHOLE_BYTES", 0)
    widths: list[int] = []

    def noted(config: Any) -> Any:
        widths.append(config.hidden_size)
        if fails and config.hidden_size == 32:
            raise ValueError("no such width")
        return twin(config)

    twin, fails = guard._twin, False
    monkeypatch.setattr(guard, "_twin", noted)
    monkeypatch.setitem(guard._NARROWER, "hidden_size", 32)
    assert checked(tmp_path).difference is not None
    assert widths == [32]
    fails = True
    assert checked(tmp_path).difference is not None
    assert widths[1:] == [32, Checkpoint(tmp_path).config["hidden_size"]]


def test_a_plan_counts_the_comparison_where_the_run_makes_it() -> None:
    most = guard._WHOLE_BYTES // 4
    assert guard.is_compared_whole(most)
    assert guard.comparison_bytes(2 * most, most) == 6 * most
    assert not guard.is_compared_whole(most + 1)
    assert guard.comparison_bytes(2 * most, most + 1) == 0
