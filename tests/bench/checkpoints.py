"""A random Llama checkpoint of equal blocks, one shard a block, never whole in memory.

python tests/bench/checkpoints.py FOLDER --blocks 32 [--hidden 1024 --intermediate 4096]
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast


def write(folder: Path, config: LlamaConfig) -> None:
    """Config, byte-level tokenizer and bfloat16 shards of a model that was never trained."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer(config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    names: dict[str, str] = {}
    total = 0
    for i in range(config.num_hidden_layers + 1):
        tensors = block(i - 1, config, generator) if i else outer(config, generator)
        file = f"model-{i + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def normal(out_features: int, in_features: int, generator: torch.Generator) -> Tensor:
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(torch.bfloat16)


def outer(config: LlamaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Embedding and final norm; the head is tied."""
    return {
        "model.embed_tokens.weight": normal(config.vocab_size, config.hidden_size, generator),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
    }


def block(i: int, config: LlamaConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of decoder block `i`."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    tensors = {f"model.layers.{i}.{name}.weight": normal(*shape, generator) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def tokenizer(config: LlamaConfig) -> PreTrainedTokenizerFast:
    """Every byte a token, BOS and EOS after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "<s>", "</s>"])}
    assert len(vocab) <= config.vocab_size
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    args = parser.parse_args()
    heads = args.hidden // 64
    config = LlamaConfig(
        vocab_size=512, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.blocks,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, dtype="bfloat16",
    )  # fmt: skip
    write(args.folder, config)


if __name__ == "__main__":
    main()
