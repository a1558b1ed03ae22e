"""llama.cpp through the optional package llama-cpp-python: its quantizer, and inference on a GGUF file."""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from ..core.errors import BadInput

_GET = (
    "llama.cpp is not installed: pip install 'quantpress[llamacpp]' builds it from source (a C++ compiler and about "
    "ten minutes); or give a wheel of llama-cpp-python to pip with --find-links"
)
_FELL_BACK = re.compile(r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\S+)\)")
_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
Logger = Callable[[str], None]


@dataclass(frozen=True)
class QuantizeRequest:
    """Arguments of llama.cpp's quantizer.

    file_type: such as Q4_K_M. tensor_types: (regular expression, type) of tensors that get another type; the first that
    matches part of the name applies. imatrix: importance of the columns by tensor name, float32 [in] or [experts, in].
    threads: 0 for all cores. split: write as many files as the source has.
    """

    file_type: str
    tensor_types: tuple[tuple[str, str], ...] = ()
    imatrix: Mapping[str, np.ndarray[Any, Any]] | None = None
    threads: int = 0
    split: bool = False


def file_types() -> dict[str, int]:
    """The file types of llama.cpp's quantizer, by name (Q4_K_M, IQ4_XS …), with their numbers."""
    names = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind) for kind in LlamaFileType}
    return {name: number for name, number in names.items() if name not in _NOT_MADE}


_NOT_MADE = ("GUESSED", "Q4_1_SOME_F16", "MXFP4_MOE", "NVFP4")


def quantize(
    source: Path, target: Path, wanted: QuantizeRequest, on_tensor: Callable[[int, int], None] = lambda done, all: None
) -> str:
    """Let llama.cpp quantize the GGUF file `source` into `target`; returns its log.

    `on_tensor(done, all)` is called after each tensor. Raises BadInput, with llama.cpp's reason, when it refuses.
    """
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_types()[wanted.file_type]
    params.nthread = wanted.threads
    params.keep_split = wanted.split
    keep: list[Any] = []  # objects that C holds pointers to
    if wanted.imatrix is not None:
        params.imatrix = _imatrix(lib, wanted.imatrix, keep)
    if wanted.tensor_types:
        kinds = [(p.encode(), int(GGMLQuantizationType[kind])) for p, kind in wanted.tensor_types]
        overrides = (lib.llama_model_tensor_override * (len(kinds) + 1))(*kinds, (None, 0))
        keep.append(overrides)
        params.tt_overrides = overrides

    def progress(line: str) -> None:
        if found := _TENSOR.search(line):
            on_tensor(int(found[1]), int(found[2]))

    with log(lib, progress) as said:
        status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    text = "".join(said)
    if status != 0:
        errors = [line for line in text.splitlines() if "failed to quantize" in line or "error" in line.lower()]
        reason = " ".join((errors or text.splitlines() or ["no reason given"])[-1].split())
        raise BadInput(f"llama.cpp does not quantize {source.name} to {wanted.file_type}: {reason[:300]}")
    return text


def not_whole_blocks(log: str) -> dict[str, str]:
    """From the quantizer's log, the tensors whose rows are not whole blocks: {name: the reason and intended type}."""
    return {
        name: f"rows of {columns} are not whole blocks of {block}: {kind.upper()}"
        for name, columns, block, kind in _FELL_BACK.findall(log)
    }


def package_version() -> str | None:
    """The version of llama-cpp-python, None where it is not installed."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def _imatrix(lib: Any, importance: Mapping[str, np.ndarray[Any, Any]], keep: list[Any]) -> Any:
    """A C array of llama_model_imatrix_data, terminated by an empty entry; `keep` gets what it points to."""
    entries = []
    for name, values in importance.items():
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        keep.append(flat)
        entries.append((name.encode(), flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), flat.size))
    array = (lib.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))
    keep.append(array)
    return array


class Loaded:
    """A GGUF model loaded by llama.cpp on the CPU; a context manager. Raises BadInput when it does not load."""

    def __init__(self, file: Path, n_tokens: int = 2048, threads: int = 0, vocabulary_only: bool = False) -> None:
        self._lib = lib = library()
        self._model = self._context = None
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocabulary_only
        with log(lib) as said:
            self._model = lib.llama_model_load_from_file(str(file).encode(), params)
            if not self._model:
                raise BadInput(f"llama.cpp does not load {file}: {_reason(said)}")
            self._vocabulary = lib.llama_model_get_vocab(self._model)
            if vocabulary_only:
                return
            context = lib.llama_context_default_params()
            context.n_ctx = context.n_batch = context.n_ubatch = n_tokens
            context.n_threads = context.n_threads_batch = threads or os.cpu_count() or 1
            self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise BadInput(f"llama.cpp cannot create a context of {n_tokens} tokens for {file}: {_reason(said)}")

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        with log(self._lib):
            if self._context:
                self._lib.llama_free(self._context)
            if self._model:
                self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def vocab_size(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self._vocabulary))

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits float32 [tokens, vocabulary] of one sequence, with an empty cache."""
        lib, n = self._lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
                batch.seq_id[i][0] = 0
            if (status := lib.llama_decode(self._context, batch)) != 0:
                raise BadInput(f"llama.cpp does not run {n} tokens (llama_decode returned {status})")
            pointer = lib.llama_get_logits(self._context)
            return np.ctypeslib.as_array(pointer, (n, self.vocab_size)).copy()
        finally:
            lib.llama_batch_free(batch)

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """exp of the mean negative log-likelihood of all tokens but the first of each window."""
        total, count = 0.0, 0
        for ids in windows:
            logits = self.logits(ids)[:-1].astype(np.float64)
            largest = logits.max(1)
            log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
            total += float((log_sum - logits[np.arange(len(ids) - 1), list(ids)[1:]]).sum())
            count += len(ids) - 1
        return float(np.exp(total / count))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text without BOS and EOS; special: recognise control tokens that are spelled out in it."""
        data = text.encode()
        room = len(data) + 16
        out = (self._lib.llama_token * room)()
        n = self._lib.llama_tokenize(self._vocabulary, data, len(data), out, room, False, special)
        if n < 0:
            raise BadInput(f"llama.cpp does not tokenize a text of {len(data)} bytes (llama_tokenize returned {n})")
        return list(out[:n])


def library() -> ModuleType:
    """The C bindings of llama.cpp; raises BadInput, with how to install them, when they are missing."""
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise BadInput(_GET) from error
    global _started
    if not _started:
        llama_cpp.llama_backend_init()
        _started = True
    module: ModuleType = llama_cpp
    return module


_started = False


@contextlib.contextmanager
def log(lib: Any, on_line: Logger = lambda line: None) -> Iterator[list[str]]:
    """Collect llama.cpp's log, line by line, instead of letting it write to the terminal."""
    said: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def take(level: int, text: bytes, data: Any) -> None:
        line = text.decode(errors="replace")
        said.append(line)
        on_line(line)

    lib.llama_log_set(take, None)
    try:
        yield said
    finally:
        _kept.append(take)  # C holds it until the next callback is set
        lib.llama_log_set(_silent(lib), None)


_kept: list[Any] = []


def _silent(lib: Any) -> Any:
    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def nothing(level: int, text: bytes, data: Any) -> None:
        return None

    _kept[:] = [*_kept[-1:], nothing]
    return nothing


def _reason(said: list[str]) -> str:
    lines = [" ".join(line.split()) for line in "".join(said).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (errors or lines or ["no reason given"])[0][:300]
