"""The token sequences a model is calibrated on, and how text is tokenized."""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from ..core.errors import BadInput
from ..core.untrusted import check_content, read_json
from ..models.architecture import load_whole
from ..recipe import Bos, Calibration
from .chat_template import check_templates, rendered

_CHARACTERS_A_TOKEN = 6  # a first guess, generous for English; doubled until the text read is long enough
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "tekken.json", "vocab.txt",
)  # fmt: skip
_MOST_IDS = 1 << 22  # of a vocabulary, near 2^20 at most in use; the tokenizers library counts up to the last
_MARGIN = 64  # tokens before a cut in the text, discarded because the cut may have changed them


@dataclass(frozen=True)
class Tokens:
    """Calibration or evaluation sequences. ids [samples, seq_len] int64."""

    ids: Tensor
    source: str
    bos: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def calibration_tokens(tokenizer: Any, documents: Sequence[str], source: str, wanted: Calibration) -> Tokens:
    """`samples` sequences of `seq_len` tokens.

    The documents, in an order drawn with the seed, are tokenized one after another and cut into windows. Seed 0 takes
    the first windows, any other seed draws windows without replacement. Raises BadInput when the text is too short.
    """
    generator = torch.Generator().manual_seed(wanted.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    bos = bos_id(tokenizer, wanted.bos)
    body = wanted.seq_len - (bos is not None)
    needed = wanted.samples * body
    stream: list[int] = []
    for i in order:
        if wanted.seed == 0 and not wanted.chat_template:
            stream += first_tokens(tokenizer, documents[i], needed - len(stream))
        else:
            stream += encode(tokenizer, documents[i], chat=wanted.chat_template)
        if wanted.seed == 0 and len(stream) >= needed:
            break
    windows = cut(stream, body, body)
    if len(windows) < wanted.samples:
        raise BadInput(
            f"calibration text {source} gives {len(windows)} sequences of {wanted.seq_len} tokens, "
            f"{wanted.samples} are asked for; lower calibration.samples or seq_len, or give more text"
        )
    if wanted.seed:
        windows = windows[torch.randperm(len(windows), generator=generator)]
    return Tokens(with_bos(windows[: wanted.samples], bos), source, bos is not None)


def with_served_starts(tokenizer: Any, tokens: Tokens, documents: Sequence[str]) -> Tokens:
    """The calibration sequences, the last quarter of them replaced by such as servers see: half are chats in the
    model's template (where it has one), half begin with a document as the tokenizer itself has it.

    For static ranges. A model's largest activations stand at the first tokens of a sequence and at the marks of its
    template, and a range in which they are missing clips them: text cut out of documents holds neither.
    """
    length, count = tokens.ids.shape[1], len(tokens.ids) // 4
    templated = _takes_chats(tokenizer)
    rows: list[list[int]] = []
    for i in range(len(documents)):
        if len(rows) == count:
            break
        row: list[int] = []
        for document in (*documents[i:], *documents[:i]):  # more than one where they are short
            chat = templated and len(rows) % 2 == 0
            row += _as_chat(tokenizer, document) if chat else tokenizer(document, verbose=False)["input_ids"]
            if len(row) >= length:
                rows.append(row[:length])
                break
        else:
            break  # all of the text is shorter than one sequence
    if not rows:
        return tokens
    ids = torch.cat([tokens.ids[: len(tokens.ids) - len(rows)], torch.tensor(rows)])
    return Tokens(ids, f"{tokens.source}, {len(rows)} sequences as servers see them", tokens.bos)


def _takes_chats(tokenizer: Any) -> bool:
    if not getattr(tokenizer, "chat_template", None):
        return False
    try:
        _as_chat(tokenizer, "a b")
    except BadInput:
        return False
    return True


def _as_chat(tokenizer: Any, document: str) -> list[int]:
    """A chat whose question is the document's first sentence and whose answer is the rest."""
    question, _, answer = document.partition(". ")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or question}]
    return encode(tokenizer, rendered(tokenizer, turns))


def end_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: what generation_config.json, else config.json of a checkpoint says, then EOS."""
    given = [read_json(path) for name in ("generation_config.json", "config.json") if (path := folder / name).is_file()]
    given += [part for part in [config.get("text_config") for config in given] if isinstance(part, dict)]
    told = next((end for config in given if (end := config.get("eos_token_id")) is not None), None)
    ends = (*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id)
    return list(dict.fromkeys(end for end in ends if isinstance(end, int)))


def generated_tokens(folder: Path, tokenizer: Any, wanted: Calibration, device: torch.device) -> Tokens:
    """`samples` sequences that the model generates from BOS at temperature 1 (LLM-QAT, arXiv:2305.17888, 3.1).

    Another kind of device draws other ones. This loads the whole model; every other step of a run goes block by block.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadInput("calibration.source self: the tokenizer has neither BOS nor EOS to start from")
    model = load_whole(folder, "auto").to(device)
    rows = []
    for first in range(0, wanted.samples, 16):
        torch.manual_seed(wanted.seed + first)
        prompt = torch.full((min(16, wanted.samples - first), 1), start, dtype=torch.int64, device=device)
        rows.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=wanted.seq_len - 1,
                max_new_tokens=wanted.seq_len - 1,
                pad_token_id=start,
            )
        )
    return Tokens(torch.cat(rows).cpu(), "text the model generated itself", True)


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises BadInput when there is no readable one.

    Its chat template may lie in chat_template.json, where transformers looks for it only beside a processor.
    """
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            _check_last_id(folder / name) if name.endswith(".json") else check_content(folder / name)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise BadInput(f"{folder}: no tokenizer; copy the original's tokenizer files there")
    if _is_sentencepiece_only(folder) and not _has_protobuf():
        raise BadInput(f"{folder}: the tokenizer is a SentencePiece model only, which needs `pip install protobuf`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        said = " ".join(str(error).split())[:160]
        if "custom code" in said:
            raise BadInput(
                f"{folder}: the tokenizer brings its own code; read it, then pass --trust-remote-code"
            ) from error
        if said == _said_of_config(folder):
            raise BadInput(f"{folder / 'config.json'}: transformers cannot read it: {said}") from error
        if _is_sentencepiece_only(folder):  # transformers then tries it as one of tiktoken, and asks for that
            said = "its SentencePiece model cannot be parsed"
        raise BadInput(
            f"{folder}: no tokenizer that can be read ({said}); copy the original's tokenizer files there"
        ) from error
    template = folder / "chat_template.json"
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = read_json(template).get("chat_template")
    check_templates(tokenizer.chat_template, str(folder))
    return tokenizer


def _said_of_config(folder: Path) -> str | None:
    """What transformers says of a config.json that it cannot read, which it does before it opens a tokenizer."""
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:
        return " ".join(str(error).split())[:160]
    return None


def _check_last_id(file: Path) -> None:
    """Raise BadInput for a file of a tokenizer that is no JSON, or has an id beyond any vocabulary."""
    content = read_json(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else content if file.name == "vocab.json" else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    decoder = content.get("added_tokens_decoder")
    ids += [int(key[:20]) for key in decoder if key.isdecimal()] if isinstance(decoder, dict) else []
    last = max((one for one in ids if isinstance(one, int)), default=0)
    if last >= _MOST_IDS:
        raise BadInput(f"{file}: a token has the id {last}; no vocabulary has more than {_MOST_IDS} tokens")


def _is_sentencepiece_only(folder: Path) -> bool:
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    return not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in names)


def _has_protobuf() -> bool:
    try:
        importlib.import_module("google.protobuf")
    except ImportError:
        return False
    return True


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Raise BadInput for a tokenizer whose ordinary tokens have ids beyond the embedding's `rows`.

    Added tokens may lie beyond: a text need not hold them, and `check_ids` sees when it does.
    """
    added = set(tokenizer.added_tokens_encoder)
    last = max((id for token, id in tokenizer.get_vocab().items() if token not in added), default=0)
    if last >= rows:
        raise BadInput(
            f"the tokenizer has ids up to {last} and the model's embedding {rows} rows; "
            "is it the tokenizer that belongs to this model?"
        )


def check_ids(ids: Tensor, rows: int, source: str) -> None:
    """Raise BadInput for token ids, of the text `source`, beyond the embedding's `rows`."""
    if ids.numel() and int(ids.max()) >= rows:
        raise BadInput(
            f"{source} holds token {int(ids.max())} and the model's embedding has {rows} rows; "
            "is its tokenizer the one that belongs to this model?"
        )


def check_chat_template(tokenizer: Any) -> None:
    """Raise BadInput for a tokenizer that cannot wrap a text in its chat template."""
    encode(tokenizer, "a", chat=True)


def encode(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """Token ids of one text, without BOS and EOS; `chat` wraps it in the chat template as a user's message."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput("calibration.chat_template: this model's tokenizer has no chat template; set it to false")
        try:
            text = rendered(tokenizer, [{"role": "user", "content": text}])
        except BadInput as error:
            raise BadInput(f"calibration.chat_template: {error}; mend it or set chat_template to false") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def first_tokens(tokenizer: Any, text: str, count: int) -> list[int]:
    """At least the first `count` token ids of `text`, or all of them, without tokenizing the whole of a long text."""
    length = _CHARACTERS_A_TOKEN * (count + _MARGIN)
    while length < len(text):
        ids = encode(tokenizer, text[:length])
        if len(ids) >= count + _MARGIN:
            return ids[:-_MARGIN]
        length *= 2
    return encode(tokenizer, text)


def bos_id(tokenizer: Any, wanted: Bos) -> int | None:
    """The BOS token to put before each sequence, or None; `auto` follows what the tokenizer itself does."""
    if wanted == "never":
        return None
    token: int | None = tokenizer.bos_token_id
    if wanted == "always":
        if token is None:
            raise BadInput("bos: always, but this model's tokenizer has no BOS token; use auto or never")
        return token
    return token if token is not None and tokenizer("a")["input_ids"][:1] == [token] else None


def cut(stream: Sequence[int], body: int, stride: int) -> Tensor:
    """Full windows [n, body] of a token stream, starting every `stride` tokens."""
    ids = torch.tensor(stream, dtype=torch.int64)
    return ids.unfold(0, body, stride) if len(ids) >= body else ids.new_empty(0, body)


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """The windows [n, body] with BOS prepended to each; as they are without one."""
    if bos is None:
        return windows.contiguous()
    return torch.cat([torch.full((len(windows), 1), bos, dtype=torch.int64), windows], dim=1)
