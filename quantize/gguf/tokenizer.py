"""The tokenizer of a checkpoint folder as GGUF metadata.

GGUF names a BPE pre-tokenizer by a label that llama.cpp implements. As in llama.cpp's converter, the label is found by
the hash of the ids of a probe text (pre_tokenizers.json, from its conversion/base.py). For an unknown vocabulary it is
found by comparing the splitting rules in tokenizer.json with those of each label; if none are equal, the tokenizer is
refused. SentencePiece models are read from tokenizer.model, or from the merges in tokenizer.json if these are a
SentencePiece model's.
"""

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ..calibrate.tokens import open_tokenizer
from ..core.errors import BadInput
from ..core.text import shortened
from .source_tokenizer import PRE, Pre, steps_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # which their checkpoints do not mark as special
_SPACE = "▁"


def tokenizer_metadata(folder: Path, config: Any) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer.* metadata for the tokenizer in `folder`, and notes on what it cannot express.

    Raises BadInput for a tokenizer that is missing, larger than the model's vocabulary, or one that llama.cpp has no
    rules for.
    """
    fast = open_tokenizer(folder)
    inner = getattr(fast, "backend_tokenizer", None)
    if inner is None:
        raise BadInput(f"{folder}: the tokenizer has no tokenizer.json form ({type(fast).__name__}); GGUF needs it")
    document = json.loads(inner.to_str())
    tokens, kinds = _vocabulary(folder, fast, document, config.vocab_size)
    model = document["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        values = _sentencepiece(folder, document, tokens, kinds)
    elif model["type"] == "BPE":
        values = _byte_level(folder, fast, document, tokens, kinds)
    else:
        raise BadInput(f"{folder}: tokenizer model {model['type']!r} cannot be written as GGUF; BPE can")
    values |= _special(fast, config)
    template = fast.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = template
    notes = []
    if document["normalizer"] == {"type": "NFC"}:
        notes = ["the tokenizer composes characters (NFC) and llama.cpp does not: e + ´ gets other tokens than é"]
    return values, notes


def _vocabulary(folder: Path, fast: Any, document: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, padded with unused tokens to the rows of the embedding."""
    by_id = {i: token for token, i in fast.get_vocab().items()}
    if not by_id or max(by_id) >= rows:
        raise BadInput(
            f"{folder}: the tokenizer has token id {max(by_id, default=-1)} and the model a vocabulary of {rows}; "
            "tokenizer and weights are not of one model"
        )
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    byte_fallback = bool(document["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for i in range(rows):
        token, kind = by_id.get(i, f"[PAD{i}]"), NORMAL
        if i not in by_id:
            kind = UNUSED
        elif i in added:
            kind = CONTROL if added[i]["special"] or _looks_special(token) else USER_DEFINED
            if kind == USER_DEFINED:
                token = token.replace(_SPACE, " ")
        elif byte_fallback and _is_byte(token):
            kind = BYTE
        tokens.append(token)
        kinds.append(kind)
    if byte_fallback and (unknown := document["model"].get("unk_token")) in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    return tokens, kinds


def _looks_special(token: str) -> bool:
    """Whether llama.cpp's converter treats it as a control token although the checkpoint does not mark it."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in _LOOK_SPECIAL or any(token.startswith(a) and token.endswith(b) for a, b in around)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level(
    folder: Path, fast: Any, document: dict[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    if not merges:
        raise BadInput(f"{folder}: the BPE tokenizer has no merges; llama.cpp does not load such a file")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer(folder, fast, document),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def pre_tokenizer(folder: Path, fast: Any, document: dict[str, Any]) -> str:
    """llama.cpp's label for the splitting rules of a byte-level BPE tokenizer; raises BadInput when there is none."""
    table = json.loads((resources.files(__package__) / "pre_tokenizers.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(str(fast.encode(_PROBE)).encode()).hexdigest()
    if digest in table:
        return str(table[digest])
    for label, pre in PRE.items():
        if _same_rules(document, pre):
            return label
    rules = json.dumps(document["pre_tokenizer"])
    raise BadInput(
        f"{folder}: unknown pre-tokenizer: the probe text's hash {digest[:16]}… is not one of llama.cpp's, and its "
        f"rules ({shortened(rules, 200)}) match no label; a guess could "
        "split text wrongly"
    )


def _same_rules(document: dict[str, Any], pre: Pre) -> bool:
    """Whether tokenizer.json splits text by exactly these rules."""
    normalizer = document["normalizer"]
    if (normalizer == {"type": "NFC"}) is not pre.nfc or (normalizer is not None and not pre.nfc):
        return False
    if bool(document["model"].get("ignore_merges")) is not pre.ignore_merges:
        return False
    return _plain(document["pre_tokenizer"]) in [_plain(json.loads(steps.__getstate__())) for steps in steps_of(pre)]


def _plain(pre: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without the keys that do not affect splitting."""
    steps = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    return [{k: v for k, v in step.items() if k not in ("trim_offsets",)} for step in steps]


def _sentencepiece(folder: Path, document: dict[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = _scores_of_model(folder, tokens, kinds)
    if scores is None:
        scores = _scores_of_merges(folder, document, tokens, kinds)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _space_prefix(folder, document),
    }


def _space_prefix(folder: Path, document: dict[str, Any]) -> bool:
    """Whether a space is put before the text; raises BadInput when the text is changed in other ways too."""
    normalizer, pre = document["normalizer"] or {}, document["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if pre.get("type") == "Metaspace" and not steps and pre.get("split", True) is False:
        return bool(pre.get("prepend_scheme") in ("first", "always"))
    whole = not pre or (pre.get("type"), pre.get("pattern")) == ("Split", {"String": " "})  # no longer splits anything
    if whole and steps in ([replace], [prepend, replace]):
        return len(steps) == 2
    raise BadInput(
        f"{folder}: the tokenizer prepares text in a way SentencePiece in llama.cpp does not: {normalizer}, {pre}"
    )


def _scores_of_model(folder: Path, tokens: list[str], kinds: list[int]) -> list[float] | None:
    """The scores in tokenizer.model, None if there is no such file; its token types are written into `kinds`."""
    file = folder / "tokenizer.model"
    if not file.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise BadInput(f"{file}: not a SentencePiece model: {' '.join(str(error).split())[:120]}") from error
    scores = [-1000.0] * len(tokens)
    for i in range(min(model.get_piece_size(), len(tokens))):
        if kinds[i] == NORMAL and tokens[i] != model.id_to_piece(i):
            raise BadInput(f"{file}: token {i} is {model.id_to_piece(i)!r} there and {tokens[i]!r} in tokenizer.json")
        if kinds[i] in (NORMAL, BYTE, UNKNOWN):
            scores[i] = float(model.get_score(i))
    return scores


def _scores_of_merges(folder: Path, document: dict[str, Any], tokens: list[str], kinds: list[int]) -> list[float]:
    """Scores with which SentencePiece's BPE does the merges of tokenizer.json in the same order.

    SentencePiece joins any two neighbours that form a token, best score first. So the merges must include every pair
    that forms a token, and all pairs that form the same token must follow each other.
    """
    rank: dict[str, int] = {}
    pairs = set()
    for i, pair in enumerate(document["model"]["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        pairs.add((left, right))
        rank.setdefault(left + right, i)
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    for token in normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in normal and pair[1] in normal and pair not in pairs:
                raise BadInput(
                    f"{folder}: no tokenizer.model, and the merges of tokenizer.json are not SentencePiece's "
                    f"({pair[0]!r} and {pair[1]!r} are never joined); put the original tokenizer.model there"
                )
    lowest = float(len(pairs))
    return [
        -float(rank.get(token, lowest)) if kind == NORMAL else (0.0 if kind in (BYTE, UNKNOWN) else -1000.0)
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _special(fast: Any, config: Any) -> dict[str, Any]:
    """The special tokens' ids, and whether BOS and EOS are added, as the tokenizer itself does."""
    out: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("sep", "seperator"), ("pad", "padding")):
        token = getattr(fast, f"{name}_token_id", None)
        if token is None:
            token = getattr(config, f"{name}_token_id", None)
            token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < config.vocab_size:
            out[f"tokenizer.ggml.{key}_token_id"] = int(token)
    ids = fast("a")["input_ids"]
    out["tokenizer.ggml.add_bos_token"] = len(ids) > 1 and ids[0] == out.get("tokenizer.ggml.bos_token_id")
    out["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == out.get("tokenizer.ggml.eos_token_id")
    return out
