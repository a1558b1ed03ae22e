"""What a config says in a GGUF file and what is read from it are inverse to each other."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from quantpress.core.errors import BadInput
from quantpress.gguf.hyperparameters import form_of, hyperparameters
from quantpress.gguf.source_config import Metadata, model_config

from ... import tiny
from .models import FAMILIES, SETTINGS

WIDE = {"hidden_size": 128, "query_pre_attn_scalar": 128 // 4}  # the 27B models scale by hidden size over heads
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("gemma2", WIDE | {"num_hidden_layers": 46}),
    ("gemma3", WIDE | {"num_hidden_layers": 62, "layer_types": None}),
    ("gemma3", {"final_logit_softcapping": 20.0}),
    ("phi3", {"sliding_window": 16, "original_max_position_embeddings": 64}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("qwen3", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
]


def config_of(family: str, settings: dict[str, Any]) -> Any:
    name, usual = tiny.FAMILIES[family]
    return getattr(transformers, name)(**(usual | SETTINGS.get(family, {}) | settings))


class Stored(Metadata):
    """The metadata that a file would hold of a config; its only tensor is the embedding."""

    def __init__(self, config: Any) -> None:
        form = form_of(config)
        self.path, self.architecture = Path("x.gguf"), form.architecture
        self._values = hyperparameters(config, form)
        self.tensors = {"token_embd.weight": None}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def shape(self, name: str) -> tuple[int, ...]:
        return (tiny.VOCAB, 64)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_config_comes_back(family: str, settings: dict[str, Any]) -> None:
    config = config_of(family, settings)
    back = model_config(Stored(config))
    assert back.model_type == ("llama" if family == "mistral" else config.model_type)
    want, got = config.to_dict(), back.to_dict()
    unsaid = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "architectures",
              "model_type", "initializer_range", "n_inner")  # fmt: skip
    assert {k: v for k, v in want.items() if k not in unsaid} == {k: got.get(k) for k in want if k not in unsaid}


@pytest.mark.parametrize(("family", "blocks"), [("gemma2", 46), ("gemma3", 62)])
def test_a_27b_gemma_that_scales_by_head_is_refused(family: str, blocks: int) -> None:
    config = config_of(family, WIDE | {"num_hidden_layers": blocks, "layer_types": None, "query_pre_attn_scalar": 16})
    with pytest.raises(BadInput, match=r"query_pre_attn_scalar 16: llama\.cpp computes with 32 for this gemma"):
        hyperparameters(config, form_of(config))
