"""The 8-bit cache against transformers' own: its scales are those of what is cached, its rounding what comes back."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.calibrate import kv_cache
from quantpress.calibrate.tokens import open_tokenizer
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.engine.pipeline import Settings, _tokens, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.models.checkpoint import Checkpoint
from quantpress.models.shards import write_part
from quantpress.models.skeleton import Skeleton, run_block
from quantpress.recipe.loading import parse

from ...tiny import FAMILIES, VOCAB, build, text

CPU = torch.device("cpu")
SERVED = [family for family in FAMILIES if family not in ("gpt2", "gpt_neox")]
RECIPE: dict[str, Any] = {
    "method": {"name": "rtn"},
    "weights": {"bits": 8, "group_size": -1},
    "formats": ["modelopt"],
    "kv_cache": "fp8",
}


def make(folder: Path, family: str, **settings: Any) -> Tensor:
    """An artifact of W8A16 weights and an fp8 cache in folder/out; returns the tokens it was calibrated on."""
    (folder / "text.txt").write_text(text())
    if not (folder / "model").exists():
        build(family, folder / "model")
    calibration = {"samples": 6, "seq_len": 32, "source": str(folder / "text.txt")}
    recipe = parse(RECIPE | {"calibration": calibration, "model": str(folder / "model")})
    job = prepare(recipe, resolve(recipe.model, cache=folder / "cache"))
    out = settings.pop("out", folder / "out")
    where = Settings(out, folder / "cache", **settings)
    tokens = _tokens(job, open_tokenizer(job.source.path, False), where)
    assert tokens is not None
    quantize(job, where)
    return tokens.ids


def plain(folder: Path) -> Any:
    """The original class with the weights the artifact stands for, as transformers runs it."""
    artifact, model = Artifact(folder), folder.parents[1] / "model"
    weights = {name: artifact.read(name) for name in Checkpoint(model).names()}
    shutil.copytree(model, folder.parents[1] / "plain")
    write_part(folder.parents[1] / "plain" / "model.safetensors", weights)
    return transformers.AutoModelForCausalLM.from_pretrained(folder.parents[1] / "plain").eval()


class Rounding(DynamicCache):
    """Gives back what E4M3 keeps of keys and values, in units of the stored scales."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._stored = Checkpoint(folder)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        kept = []
        for x, letter in ((key_states, "k"), (value_states, "v")):
            scale = self._stored.read(f"model.layers.{layer_idx}.self_attn.{letter}_proj.{letter}_scale")
            kept.append((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
        return super().update(*kept, layer_idx, *args, **kwargs)


def logits(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """[samples, seq_len, vocab] of a skeleton run block by block."""
    skeleton.open_shell()
    hidden, arguments = skeleton.embed(ids), skeleton.block_arguments(ids)
    for k, block in skeleton.blocks():
        run_block(block, hidden, arguments[k], device=CPU, batch=2)
    return skeleton.logits(hidden.flatten(0, 1)).unflatten(0, ids.shape)


@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_scales_and_rounding_are_those_of_a_cache(family: str, tmp_path: Path) -> None:
    ids = make(tmp_path, family)
    out = tmp_path / "out" / "quantized"
    model, stored = plain(out), Checkpoint(out)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    for k, layer in enumerate(cache.layers):
        for letter, cached in (("k", layer.keys), ("v", layer.values)):
            scale = stored.read(f"model.layers.{k}.self_attn.{letter}_proj.{letter}_scale")
            assert (scale.dtype, scale.shape) == (torch.float32, ())
            assert cached.shape[1] == model.config.num_key_value_heads
            torch.testing.assert_close(scale, cached.abs().amax() / 448)
    other = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    _, skeleton = open_artifact(out, CPU)
    found, expected = logits(skeleton, other), model(other, past_key_values=Rounding(out)).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - model(other).logits).abs().max() > 10 * (found - expected).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_taps_computes_the_same(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = (Skeleton(Checkpoint(tmp_path), device=CPU) for _ in range(2))
    if family in SERVED:
        kv_cache.attentions(after)
        assert after.model.config._attn_implementation != before.model.config._attn_implementation
        kv_cache.attentions(after)  # once is enough
        assert torch.equal(logits(after, ids), logits(before, ids))
    else:
        with pytest.raises(BadInput, match="servers look for cache scales in self_attn"):
            kv_cache.attentions(after)


_LATENT = {
    "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "BloomConfig",
            {"n_layer": 2, "n_head": 4},
            "bloom: block 0 has 0 attentions that call transformers' attention function",
        ),
        ("DeepseekV3Config", _LATENT, "caches latents, not keys and values"),
    ],
)
def test_models_that_cache_something_else_are_refused(
    name: str, settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    config = getattr(transformers, name)(hidden_size=64, vocab_size=256, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=message):
        kv_cache.attentions(Skeleton(Checkpoint(tmp_path), device=CPU))


@pytest.mark.parametrize("when", [1, 2])
def test_resume_after_a_stop_gives_the_same_bytes(when: int, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.block == when:
            raise Stop

    make(tmp_path, "gemma3", out=tmp_path / "whole")
    with pytest.raises(Stop):
        make(tmp_path, "gemma3", on_block=stop)
    make(tmp_path, "gemma3")
    whole, cut = ({p.name: p.read_bytes() for p in (tmp_path / n / "quantized").iterdir()} for n in ("whole", "out"))
    assert whole == cut


def test_every_batch_counts_and_a_copy_does_not() -> None:
    module, keys = torch.nn.Linear(1, 1), torch.tensor([[[[1.0, -3.0]]]])
    largest = kv_cache.Largest("a", module)
    largest.start()
    for factor in (1.0, -2.0, 0.5):
        same, values = kv_cache._taps[module](factor * keys, factor * keys / 2)
        assert torch.equal(same, factor * keys)
        assert torch.equal(values, factor * keys / 2)
    assert copy.deepcopy(module) not in kv_cache._taps
    assert [s.item() for s in largest.scales("fp8")] == pytest.approx([6 / 448, 3 / 448])
    assert module not in kv_cache._taps
    assert [s.item() for s in largest.scales("int8")] == pytest.approx([6 / 127, 3 / 127])
    with pytest.raises(BadInput, match="b: all keys or all values were 0"):
        kv_cache.Largest("b", module).scales("fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_by_hand(dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    key, value = torch.tensor(0.004), torch.tensor(0.5)
    keys, values = kv_cache.rounding("int8", key, value)(x, x)
    assert torch.equal(keys, ((x.float() / key).round().clamp(-128, 127) * key).to(dtype))
    assert torch.equal(values, ((x.float() / value).round() * value).to(dtype))
    keys, values = kv_cache.rounding("fp8", key, value)(x, x)
    assert torch.equal(keys, ((x.float() / key).clamp(-448, 448).to(torch.float8_e4m3fn).float() * key).to(dtype))
    assert values.dtype == dtype


def test_an_artifact_without_its_scales_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    out = tmp_path / "out" / "quantized"
    config = Checkpoint(out).config
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    tensors = {
        n: Checkpoint(out).read(n) for n in Checkpoint(out).names() if not n.endswith("1.self_attn.v_proj.v_scale")
    }
    (out / "model.safetensors").unlink()
    write_part(out / "model.safetensors", tensors)
    with pytest.raises(BadInput, match=r"there is no model\.layers\.1\.self_attn\.v_proj\.v_scale"):
        open_artifact(out, CPU)
    write_part(out / "model.safetensors", tensors | {"model.layers.1.self_attn.v_proj.v_scale": torch.ones(2)})
    with pytest.raises(BadInput, match=r"v_scale: shape \[2\], and only one scale a layer can be read"):
        open_artifact(out, CPU)
    write_json(out / "config.json", config)
    with pytest.raises(BadInput, match=r"kv_cache_scheme .* cannot be read"):
        open_artifact(out, CPU)
