"""Before the work: the model block by block, as it is quantized here, against the whole model of transformers.

A block that is run otherwise than in the model it comes from would be calibrated, and its outputs measured, on another
model without any sign of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..artifact.manifest import ForwardCheck
from ..core import machine
from ..core.errors import BadInput
from ..models.architecture import decoder_config, load_whole, special_tokens
from ..models.building import auto_class, build_model
from ..models.model_tensors import TensorReader
from ..models.skeleton import Skeleton, run_block
from ..models.towers import filled_where_called, text_model, tower_names

_WHOLE_BYTES = 150_000_000  # in float32; a larger model would take more memory and time than its run is planned for
_TOLERANCE = 2e-3  # of the largest value; float32 rounding stays under 1e-4
_TOKENS = (2, 12)
_NARROW = {"intermediate_size": 256, "vocab_size": 1024}  # what a twin has less of, where the config has it
_NOT_MADE = (BadInput, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_NARROWER = {"hidden_size": 256}  # tried first: not every class makes a model with fewer columns a head


def is_compared_whole(parameters: int) -> bool:
    """Whether a model of so many weights is compared as a whole; its plan says what that takes."""
    return 4 * parameters <= _WHOLE_BYTES


def comparison_bytes(nbytes: int, parameters: int) -> int:
    """What comparing the whole of a model takes: in float32, beside the file's `nbytes`; 0 for one too large."""
    return 4 * parameters + nbytes if is_compared_whole(parameters) else 0


def check_forward(folder: Path, skeleton: Skeleton, original: TensorReader, parameters: int) -> ForwardCheck:
    """Compare the states that leave each block. Raises BadInput naming the first block that computes something else.

    skeleton: of the model in folder. original: its checkpoint, none of its weights quantized. parameters: their number.
    A model that is too large is compared as a twin: the same config with the first blocks only, narrower, and random
    weights.
    """
    if is_compared_whole(parameters):
        try:
            with _without_progress_bar():
                whole = load_whole(folder, torch.float32)
        except (OSError, ImportError) as error:  # for want of a file or a package that text does not need
            why = f"transformers does not load the original: {' '.join(str(error).split())[:200]}"
            return ForwardCheck(compared=f"nothing: {why}", difference=None)
        exact = Skeleton(original, device=torch.device("cpu"), dtype=torch.float32)
        tokens = _tokens(exact)
        wanted = _states(whole, exact, tokens)
        del whole  # both at once would be the most memory that a small model's run takes
        machine.release_memory()
        return ForwardCheck(compared="the whole model", difference=_difference(wanted, exact, tokens))
    narrow = _compared_twin(skeleton, _NARROW | _NARROWER)
    if narrow.difference is not None:
        return narrow
    return _compared_twin(skeleton, _NARROW, last=True)


def _compared_twin(skeleton: Skeleton, narrow: Mapping[str, int], last: bool = False) -> ForwardCheck:
    """The comparison of a twin with random weights. Where it is not the `last` that is tried, nothing is raised for one
    that cannot be run, or that computes something else.
    """
    try:
        config = _smaller(skeleton, narrow)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = _twin(config)
        reader = _InMemory(config, revert_weight_conversion(twin, twin.state_dict()))
        exact = Skeleton(reader, device=torch.device("cpu"), dtype=torch.float32)
    except _NOT_MADE as error:
        why = f"a smaller model cannot be made from the config: {' '.join(str(error).split())[:200]}"
        return ForwardCheck(compared=f"nothing: {why}", difference=None)
    tokens = _tokens(exact)
    try:
        difference = _difference(_states(twin, exact, tokens), exact, tokens)
    except _NOT_MADE as error:
        if last:
            raise
        return ForwardCheck(compared=f"nothing: {error}", difference=None)
    return ForwardCheck(compared=f"a twin with {exact.n_blocks} blocks", difference=difference)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers shows one as it loads a model, on stderr; a library's user asked for nothing to be printed."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokens(exact: Skeleton) -> Tensor:
    """Random ordinary tokens [samples, seq_len]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, min(1000, int(exact.config.vocab_size)), _TOKENS, generator=generator)
    special = torch.tensor(sorted(special_tokens(exact.model.config)), dtype=torch.long)
    tokens[torch.isin(tokens, special)] = next(id for id in range(3, 1000) if id not in special)
    return tokens


@torch.no_grad()
def _states(whole: Any, exact: Skeleton, tokens: Tensor) -> list[Tensor]:
    """The states that leave each block of transformers' model."""
    wanted: list[Tensor] = []
    blocks = whole.get_submodule(exact.blocks_name)
    for block in blocks:
        block.register_forward_hook(
            lambda _, args, out: wanted.append(out[0] if isinstance(out, tuple | list) else out)
        )
    try:
        text_model(whole)(input_ids=tokens, use_cache=False)
    except Exception as error:  # whatever its class raises
        raise BadInput(
            f"transformers' own {exact.config.model_type} model does not run with this config.json: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return wanted


@torch.no_grad()
def _difference(wanted: list[Tensor], exact: Skeleton, tokens: Tensor) -> float:
    """The largest difference of the states after a block from those `wanted`, relative to the largest of them."""
    exact.open_shell()
    hidden, arguments = exact.embed(tokens), exact.block_arguments(tokens)
    largest = 0.0
    for k, block in exact.blocks():
        run_block(block, hidden, arguments[k], device=exact.device, batch=tokens.shape[0])
        right = exact.samples_first(wanted[k])
        difference = float((hidden - right).abs().max() / right.abs().max().clamp(min=1e-30))
        if not difference <= _TOLERANCE:
            raise BadInput(
                f"model_type {exact.config.model_type!r} is not supported: block {k}, run by itself, differs by "
                f"{difference:.1%} from the same block in transformers' model"
            )
        largest = max(largest, difference)
    return largest


def _smaller(skeleton: Skeleton, narrow: Mapping[str, int] = _NARROW) -> Any:
    """The config of the twin: as many blocks as it takes to have one of each kind, at least three."""
    whole, total = deepcopy(skeleton.model.config), skeleton.n_blocks
    config = decoder_config(whole)
    kinds = [_kind(skeleton, k) for k in range(total)]
    blocks = min(total, max(3, 1 + max(kinds.index(kind) for kind in set(kinds))))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    for name, size in narrow.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(size, getattr(config, name)))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        try:
            setattr(config, name, None)
        except StrictDataclassFieldValidationError:  # a config class that wants a number
            setattr(config, name, 0)
    return whole


def _twin(config: Any) -> Any:
    """The model of `config` with random weights; a multimodal model's towers, which text does not reach, have none.

    Only its first parameter has: some models take their device from it.
    """
    if decoder_config(config) is config:
        return auto_class(config).from_config(config, dtype=torch.float32).eval()
    twin = build_model(config, torch.float32)
    towers = tower_names(twin) - {next(twin.named_parameters())[0]}
    state = {
        name: torch.randn(parameter.shape) * 0.02 if parameter.dim() > 1 else 1 + torch.randn(parameter.shape) * 0.1
        for name, parameter in twin.named_parameters()
        if name not in towers
    }
    twin.load_state_dict(state, assign=True, strict=False)
    twin.tie_weights()
    filled_where_called(twin, towers, lambda names: _fill(twin, names), lambda: _tried(twin))
    return twin


def _fill(twin: Any, names: Iterable[str]) -> None:
    values = {n: torch.randn(p.shape) * 0.02 for n, p in twin.named_parameters() if n in names}
    twin.load_state_dict(values, assign=True, strict=False)


@torch.no_grad()
def _tried(twin: Any) -> None:
    """Run the twin on a few tokens; why it does not run is said where its states are asked for."""
    with suppress(Exception):
        text_model(twin)(input_ids=torch.full((1, 4), 3), use_cache=False)


def _kind(skeleton: Skeleton, k: int) -> tuple[Any, ...]:
    """What tells the kinds of blocks apart: their modules, and what the config calls them."""
    modules = tuple((path, type(part).__name__) for path, part in skeleton.block(k).named_modules())
    types = getattr(skeleton.config, "layer_types", None) or ()
    return (*modules, types[k] if k < len(types) else None)


class _InMemory:
    """Tensors by their on-disk names, read like a checkpoint."""

    def __init__(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        self.config: dict[str, Any] = config.to_dict()
        self._tensors = dict(tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def read_rows(self, name: str, rows: slice) -> Tensor:
        return self.read(name)[rows]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)
