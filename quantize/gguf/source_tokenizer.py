"""The tokenizer of a GGUF file, written as tokenizer.json and tokenizer_config.json.

GGUF stores tokens, merges and token types, but of the pre-tokenizer only a label (`tokenizer.ggml.pre`); PRE lists
what the labels stand for. A label that is not listed is refused: with a guess, text could be split wrongly unnoticed.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..core.errors import BadInput

_PROBE = "It's WE'LL 12345  cafe\u0301 ½٣ x**2, (a_b)\n\n\tdef f(x):\r\n    return \"日本語\"  HelloWorld 🦙 <s></s>…\n"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Pre:
    """What a label stands for: regular expressions that split the text one after the other, and further settings."""

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is taken whole, without merges
    add_bos: bool = False  # when the file does not say


_DIGITS_GPT2 = Pre((r"\p{N}", _GPT2))
_LLAMA_BPE = Pre((_LLAMA3,), ignore_merges=True, add_bos=True)
PRE = {
    "gpt-2": Pre((_GPT2,)),
    "phi-2": Pre((_GPT2,)),
    "olmo": Pre((_GPT2,)),
    "mpt": Pre((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": Pre((_QWEN2,), nfc=True),
    "qwen35": Pre((_QWEN35,), nfc=True),
    "deepseek-r1-qwen": Pre((_QWEN2,), nfc=True),
    "stablelm2": Pre((_QWEN2,), nfc=True),
    "tekken": Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def save_tokenizer(meta: Mapping[str, Any], path: Path, folder: Path, model_max_length: int) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `folder`; returns the tokenizer.

    Raises BadInput, naming GGUF file `path`, for a tokenizer that cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _tokens(meta, path)
    model = meta.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(meta, path, tokens)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(meta, path, tokens), True
    else:
        raise BadInput(f"{path}: tokenizer model {model!r} is not supported; gpt2 (BPE) and llama (SentencePiece) are")
    _add_tokens(tokenizer, tokens, meta["tokenizer.ggml.token_type"])
    special = {
        name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in meta
    }
    add = {
        "bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", add_bos and "bos_token" in special)),
        "eos_token": bool(meta.get("tokenizer.ggml.add_eos_token", False)),
    }
    _add_template(tokenizer, special, add, path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=model_max_length, **special
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    fast.save_pretrained(folder)
    _name_plain_class(folder / "tokenizer_config.json")
    return tokenizer


def check_reads_back(tokenizer: Tokenizer, path: Path, folder: Path) -> None:
    """Raise BadInput when transformers loads another tokenizer from the folder than the one written.

    For some model types it replaces the splitting rules of tokenizer.json by its own.
    """
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(folder)(_PROBE).input_ids != tokenizer.encode(_PROBE).ids:
        raise BadInput(
            f"{path}: transformers reads this tokenizer by other rules than the file's (as the model type's own); "
            "use the original checkpoint"
        )


def _name_plain_class(file: Path) -> None:
    """Name a tokenizer class that both transformers 4 and 5 know; version 5 writes one that 4 does not."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokens(meta: Mapping[str, Any], path: Path) -> list[str]:
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        if key not in meta:
            raise BadInput(f"{path}: the GGUF metadata lacks {key}: a file without its tokenizer cannot be used")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    if len(tokens) != len(types):
        raise BadInput(f"{path}: {len(tokens)} tokens but {len(types)} token types")
    for name in ("bos", "eos", "unknown", "padding"):
        if not 0 <= meta.get(f"tokenizer.ggml.{name}_token_id", 0) < len(tokens):
            raise BadInput(f"{path}: {name}_token_id {meta[f'tokenizer.ggml.{name}_token_id']} of {len(tokens)} tokens")
    while types and types[-1] == UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop()  # padding up to the rows of the embedding, not in the original tokenizer
        types.pop()
    if len(set(tokens)) != len(tokens):
        raise BadInput(f"{path}: the token list names one token twice")
    return tokens


def _byte_level(meta: Mapping[str, Any], path: Path, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """A byte-level BPE tokenizer as of GPT-2, and whether BOS is added if the file does not say."""
    label = meta.get("tokenizer.ggml.pre")
    if label is None:
        raise BadInput(
            f"{path}: no tokenizer.ggml.pre, so the text cannot be split as the model expects; "
            "convert the original checkpoint again"
        )
    pre = PRE.get(label)
    if pre is None:
        near = difflib.get_close_matches(label, PRE, n=1)
        hint = f" (near: {near[0]})" if near else ""
        raise BadInput(f"{path}: unknown pre-tokenizer {label!r}{hint}; known are {', '.join(PRE)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(vocab, _merges(meta, path), path, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = steps_of(pre)[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def steps_of(pre: Pre) -> list[Any]:
    """Equivalent pre-tokenizers that split text by these rules, the one to write first."""
    spelled = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ways = [pre_tokenizers.Sequence([*spelled, plain])]
    if pre.splits[-1] == _GPT2:  # ByteLevel's own
        own = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre.splits[:-1] == (r"\p{N}",) else []
        if len(digits) == len(pre.splits) - 1:
            ways.insert(0 if digits else 1, pre_tokenizers.Sequence([*digits, own]))
    return ways


def _merges(meta: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    if "tokenizer.ggml.merges" not in meta:
        raise BadInput(f"{path}: the GGUF metadata lacks tokenizer.ggml.merges")
    merges: list[tuple[str, str]] = []
    for merge in meta["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _sentencepiece(meta: Mapping[str, Any], path: Path, tokens: list[str]) -> Tokenizer:
    """A SentencePiece BPE tokenizer with byte fallback; merges are the pairs that form a token, best score first."""
    from transformers.convert_slow_tokenizer import generate_merges

    if "tokenizer.ggml.scores" not in meta:
        raise BadInput(f"{path}: the GGUF metadata lacks tokenizer.ggml.scores")
    if meta.get("tokenizer.ggml.remove_extra_whitespaces", False):
        raise BadInput(f"{path}: a SentencePiece model that removes extra whitespace is not supported")
    if "tokenizer.ggml.unknown_token_id" not in meta or "<0x00>" not in tokens:
        raise BadInput(f"{path}: a SentencePiece model without an unknown token or byte tokens is not supported")
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, meta["tokenizer.ggml.scores"], strict=False))
    added = {t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=False) if kind != 1}
    unknown = tokens[meta["tokenizer.ggml.unknown_token_id"]]
    merges = generate_merges(vocab, scores, skip_tokens=added)
    tokenizer = Tokenizer(_bpe(vocab, merges, path, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], path: Path, **settings: Any) -> BPE:
    try:
        return BPE(vocab=vocab, merges=merges, **settings)
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise BadInput(f"{path}: tokens and merges do not fit together: {error}") from error


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add the tokens that are matched before text is split: control tokens (special) and user-defined ones."""
    kinds = zip(tokens, types, strict=False)
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in kinds
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, special: dict[str, str], add: dict[str, bool], path: Path) -> None:
    for name, wanted in add.items():
        if wanted and name not in special:
            raise BadInput(f"{path}: add_{name} is set but the file has no {name}")
    bos = [special["bos_token"]] if add["bos_token"] else []
    eos = [special["eos_token"]] if add["eos_token"] else []
    steps: list[Any] = []
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        steps.append(processors.ByteLevel(trim_offsets=False))
    if bos or eos:
        pair = [f"{t}:1" for t in (*bos, "$B", *eos)]
        steps.append(
            processors.TemplateProcessing(
                single=[*bos, "$A", *eos],
                pair=[*bos, "$A", *eos, *pair],
                special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*bos, *eos}],
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
