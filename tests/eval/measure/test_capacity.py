"""The key-value cache against what transformers itself keeps, what fits a GPU, and what a token costs."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantpress.artifact.artifact import Artifact, open_artifact
from quantpress.core import machine
from quantpress.core.errors import BadInput
from quantpress.eval.measure import capacity, speed
from quantpress.eval.measure.sections import Runtime, Speed
from quantpress.eval.release.recommend import cache_bytes
from quantpress.recipe import Timing

from ... import families
from ...quantize.engine.test_pipeline import make
from ...tiny import FAMILIES, build


def kept_by_transformers(config: Any, tokens: int) -> int:
    """Bytes of keys and values that the model's own cache holds after a prompt of `tokens`."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3", "gpt_neox"])
def test_the_cache_is_what_transformers_keeps(family: str) -> None:
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    held = capacity.cache(config, None, "float32", 24)
    assert held.bytes_at_context == kept_by_transformers(config, 24)
    assert held.bytes_per_token * 24 == held.bytes_at_context
    assert held.bytes_per_token_past_window is None


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_windows_stop_growing(family: str) -> None:
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    held = capacity.cache(config, None, "float32", 24)
    assert held.sliding_window == 8
    # transformers keeps one token less than the window, which the newest one then fills
    layers = {"gemma2": (1, 2), "gemma3": (1, 2), "mistral": (0, 2)}[family]
    one = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16, float32
    assert held.bytes_per_token == one * sum(layers)
    assert held.bytes_per_token_past_window == one * layers[0]
    assert held.bytes_at_context == one * (layers[0] * 24 + layers[1] * 8)
    assert held.bytes_at_context - kept_by_transformers(config, 24) == one * layers[1]


def kept_whole(config: Any, tokens: int) -> int:
    """Bytes of all that the model's own cache holds after a prompt of `tokens`, float32."""
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        found = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True)
    layers = (found.get("past_key_values") or found.cache_params).layers
    held = [x for one in layers for x in vars(one).values()]
    held += [x for several in held if isinstance(several, dict) for x in several.values()]
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor) and x.dim())


_LATENT = pytest.mark.skipif(
    not isinstance(families.config_of("hy_v4").layer_types, list)
    or "indexed_attention" not in families.config_of("hy_v4").layer_types,
    reason="transformers before 5.24 names no layers with an index, and caches all heads of latent attention",
)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("falcon", {}),  # one key-value head
        ("falcon_h1", {}),  # state spaces beside attention in every layer
        ("zamba2", {}),  # in some, with heads of their own width
        ("mamba", {}),  # no attention
        ("mamba2", {}),
        ("jamba", {}),
        ("nemotron_h", {}),  # layers that keep nothing
        ("granitemoehybrid", {"layer_types": ["attention", "mamba"] * 2}),
        ("qwen3_next", {}),  # gated delta rule
        ("lfm2", {}),  # convolutions
        ("deepseek_v3", {}),
        pytest.param("deepseek_v32", {}, marks=_LATENT),  # keys of an index beside the latents
        pytest.param("hy_v4", {}, marks=_LATENT),  # some layers share it
        ("gemma3n_text", {"sliding_window": 128}),  # keys and values of earlier layers
        ("gemma4_text", {"sliding_window": 128}),  # and heads that differ by layer
        ("mimo_v2_flash", {"sliding_window": 128}),
        ("llama4_text", {}),
    ],
)
def test_each_kind_of_layer_keeps_what_transformers_keeps(family: str, more: dict[str, Any]) -> None:
    config = families.config_of(family, **more)
    held = capacity.cache(config, None, "float32", 24)
    assert held.bytes_at_context == kept_whole(config, 24)
    assert held.bytes_at_context == cache_bytes(held, 24)
    assert cache_bytes(held, 48) == held.bytes_per_token * 48 + held.state_bytes


def test_windows_of_hybrid_layers_and_of_compressed_tokens() -> None:
    """DeepSeek-V4 by hand: 128 tokens of 512 numbers in each layer, every 4 or 128 tokens one more, and its index."""
    config = transformers.DeepseekV4Config(num_hidden_layers=4)
    kinds = {"compressed_sparse_attention": (512 + 128) / 4, "heavily_compressed_attention": 512 / 128}
    full = sum(kinds.get(kind, 0) for kind in config.layer_types)
    held = capacity.cache(config, None, "bfloat16", 1000)
    assert held.bytes_at_context == full * 2 * 1000 + 4 * 512 * 2 * 128
    assert (
        capacity.cache(families.config_of("zaya"), None, "bfloat16", 100).bytes_at_context == 4 * 2 * 2 * 16 * 2 * 100
    )


def test_the_keys_of_an_index_are_counted() -> None:
    """DeepSeek-V3.2: latents, the rotary part, and the index's keys."""
    config = families.config_of("deepseek_v32")
    numbers = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    assert capacity.cache(config, None, "bfloat16", 10).bytes_per_token == config.num_hidden_layers * numbers * 2


def test_states_are_not_rounded_with_the_cache() -> None:
    """Qwen3-Next by hand: one layer in four has 2 heads of 16; the others 4 x 16 x 16 numbers, and 4 of 128."""
    held = capacity.cache(families.config_of("qwen3_next"), "fp8", "bfloat16", 10)
    assert held.state_bytes == 3 * (4 * 16 * 16 * 4 + 128 * 4 * 2)
    assert held.bytes_per_token == 2 * 2 * 16


def test_a_cache_of_8_bits_and_latent_attention() -> None:
    config = transformers.LlamaConfig(**FAMILIES["llama"][1])
    full, small = (capacity.cache(config, kind, "bfloat16", 10) for kind in (None, "fp8"))
    assert (small.dtype, small.bytes_per_token * 2) == ("fp8", full.bytes_per_token)
    latent = transformers.DeepseekV3Config(num_hidden_layers=3, kv_lora_rank=512, qk_rope_head_dim=64)
    assert capacity.cache(latent, None, "bfloat16", 1).bytes_per_token == 3 * (512 + 64) * 2


def test_what_fits_a_gpu() -> None:
    config = transformers.LlamaConfig(**FAMILIES["llama"][1])
    held = capacity.cache(config, None, "bfloat16", 4096)
    small, large = capacity.fits(["T4", "H200"], 13_000_000_000, held)
    by_hand = int(15360 * 2**20 * 0.9) - 13_000_000_000 - 2**30
    assert small.concurrency == max(0, by_hand // held.bytes_at_context)
    assert large.concurrency > small.concurrency
    assert (small.gpu, small.memory_bytes, small.context) == ("T4", 15360 * 2**20, 4096)
    assert capacity.fits(["T4"], 20_000_000_000, held)[0].concurrency == 0


def test_the_cost_shows_its_formula() -> None:
    rates = [Speed(batch=b, context=8, repeats=3, prefill_tokens_per_second=900.0 * b, prefill_stderr=1.0,
                   decode_tokens_per_second=50.0 * b, decode_stderr=1.0) for b in (1, 4)]  # fmt: skip
    runtime = Runtime(what="w", device="d", dtype="float32", threads=1, load_seconds=1, peak_rss_bytes=1, speed=rates)
    found = capacity.cost(3.6, runtime)
    assert found is not None
    assert found.per_million_decoded == pytest.approx(3.6 / 3600 / 200 * 1e6)
    assert found.per_million_prefilled == pytest.approx(3.6 / 3600 / 3600 * 1e6)
    assert found.formula == "3.6 an hour / 3600 s / 200 tokens/s x 1,000,000 = 5 per million decoded tokens"


def test_bits_a_weight_are_counted_on_disk(tmp_path: Path) -> None:
    build("llama", tmp_path / "model", torch.bfloat16)
    manifest = make(tmp_path / "run", tmp_path / "model", {"method": {"name": "rtn"}})
    artifact = Artifact(tmp_path / "run" / "quantized")
    assert artifact.bits_per_weight() == pytest.approx(manifest.artifact.quantized_bits_per_weight, rel=0.02)
    assert artifact.total_bytes == manifest.artifact.bytes
    assert Artifact(tmp_path / "model").bits_per_weight() is None


# ---- speed


def test_the_timed_pass_is_greedy_decoding_with_a_cache(tmp_path: Path) -> None:
    """Every token that is decoded while the clock runs is the one a plain forward pass prefers."""
    plain = build("llama", tmp_path)
    _, skeleton = open_artifact(tmp_path, torch.device("cpu"))
    model, seen = skeleton.whole(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    prompt = torch.tensor([[5, 9, 13], [2, 3, 4]])
    first, later = speed._pass(model, prompt, 4, lambda: None)
    assert first > 0
    assert later > 0
    assert [tuple(ids.shape) for ids in seen] == [(2, 3), (2, 1), (2, 1), (2, 1)]
    ids = prompt
    for token in seen[1:]:
        with torch.no_grad():
            assert torch.equal(plain(ids).logits[:, -1:].argmax(-1), token)
        ids = torch.cat([ids, token], 1)


def test_rates_count_every_sequence_and_leave_out_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is timed from the first new token to the last: one step fewer than there are new tokens."""
    passes = iter([(9.0, 99.0), (0.5, 2.0), (0.25, 1.0)])  # seconds
    shapes: list[tuple[int, ...]] = []

    def fake(model: Any, ids: torch.Tensor, new_tokens: int, wait: Any) -> tuple[float, float]:
        shapes.append((*ids.shape, new_tokens))
        return next(passes)

    monkeypatch.setattr(speed, "_pass", fake)
    found = speed._speed(None, 50, 3, 8, Timing(new_tokens=5, repeats=2), torch.device("cpu"))
    assert shapes == [(3, 8, 5)] * 3
    assert (found.batch, found.context, found.repeats) == (3, 8, 2)
    assert found.prefill_tokens_per_second == pytest.approx((3 * 8 / 0.5 + 3 * 8 / 0.25) / 2)
    assert found.decode_tokens_per_second == pytest.approx((3 * 4 / 2 + 3 * 4 / 1) / 2)
    assert found.prefill_stderr == pytest.approx(24.0)  # half the difference of the two
    assert found.decode_stderr == pytest.approx(3.0)


def test_a_model_is_timed_in_this_process(tmp_path: Path) -> None:
    build("llama", tmp_path)
    timing = Timing(batches=(1, 3), contexts=(8, 500), new_tokens=4, repeats=2)
    runtime = speed.measure(tmp_path, timing)
    assert [(s.batch, s.context) for s in runtime.speed] == [(1, 8), (1, 124), (3, 8), (3, 124)]  # 128 positions
    assert all(s.decode_tokens_per_second > 0 and s.prefill_tokens_per_second > 0 for s in runtime.speed)
    assert "transformers" in runtime.what
    assert runtime.dtype == "float32"
    where = machine.device()
    assert runtime.device == machine.describe(where)["cpu" if where.type == "cpu" else "device"]
    assert runtime.peak_vram_bytes is None or torch.cuda.is_available()


def test_a_model_that_takes_too_long_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(BadInput, match=r"timing took more than 3600 s; ask for fewer tokens"):
        speed.time_model(tmp_path, Timing(contexts=(8,), new_tokens=2, repeats=2))


def test_the_process_that_times_prints_its_figures_as_the_last_line_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two sides of `time_model`, each against the other, without the process between them."""
    build("llama", tmp_path / "model")
    timing = Timing(contexts=(8,), new_tokens=2, repeats=2)

    def run(command: list[str], input: str, **_: object) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        try:
            speed._main()
        except SystemExit as stop:
            return subprocess.CompletedProcess(command, 1, "", f"{stop}\n")
        return subprocess.CompletedProcess(command, 0, f"a library says something\n{capsys.readouterr().out}", "")

    monkeypatch.setattr("subprocess.run", run)
    runtime = speed.time_model(tmp_path / "model", timing, "bfloat16", is_original=True)
    assert (runtime.dtype, len(runtime.speed)) == ("bfloat16", 1)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(BadInput, match="could not be timed: unknown architecture"):
        speed.time_model(tmp_path / "model", timing)


@pytest.mark.slow  # a new Python with torch and transformers
def test_a_model_is_timed_in_a_process_of_its_own(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    timing = Timing(contexts=(8,), new_tokens=2, repeats=2)
    runtime = speed.time_model(tmp_path / "model", timing, "bfloat16")
    assert runtime.dtype == "bfloat16"
    assert 50e6 < runtime.peak_rss_bytes < 2e9
    assert runtime.load_seconds > 0
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(BadInput, match="could not be timed: unknown architecture"):
        speed.time_model(tmp_path / "model", timing)
