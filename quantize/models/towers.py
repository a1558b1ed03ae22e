"""What a multimodal model has beside its text decoder: towers for images and sound, and what joins them to it."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

_T = TypeVar("_T")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def text_model(model: Any) -> Any:
    """The part of a model that makes logits of text: all of it, but for classes that hold another model for that.

    Those of Qwen-Omni are not run as a whole; Llama 4's hands text on as it is to a language model with its own head.
    """
    if not runs_as_a_whole(model):
        wanted = model.config.get_text_config(decoder=True)
        for part in model.children():
            if isinstance(part, PreTrainedModel) and part.config.get_text_config(decoder=True) is wanted:
                return part
    elif model.base_model is model and isinstance(decoder := model.get_decoder(), PreTrainedModel):
        return decoder if decoder.get_output_embeddings() is not None else model
    return model


def runs_as_a_whole(model: Any) -> bool:
    """Whether the class has a `forward`; those of Qwen-Omni have parts that are called one after another."""
    return type(model).forward is not nn.Module.forward


def without_head(text: Any) -> Any:
    """The part of a text model that makes the states that its head reads."""
    for part in (text.base_model, text.get_decoder()):
        if part is not text:
            return part
    return next((part for part in text.children() if isinstance(part, PreTrainedModel)), text)


def decoder_of(model: Any) -> Any:
    """The text decoder; the model itself where its class calls something without blocks, such as the head, so."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else model


def tower_names(model: Any) -> set[str]:
    """Parameters and buffers of a model that neither its text decoder nor its head has; empty for a model of text."""
    whole, model = model, text_model(model)
    decoder = decoder_of(model)
    if whole is model and (decoder is model or decoder is model.base_model):
        return set()
    text = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(tensor) for part in text if part is not None for tensor in _tensors(part).values()}
    return {name for name, tensor in _tensors(whole).items() if id(tensor) not in inside}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def linears_on_disk(names: dict[str, int]) -> list[str]:
    """What servers may take for linears among tensors {on-disk name: dimensions} that are copied as they are.

    Of experts that are one tensor, the names that those of the first would have: servers ask for these.
    """
    found = []
    for name, dimensions in names.items():
        if dimensions == 2 and name.endswith(".weight"):
            found.append(name.removesuffix(".weight"))
        elif dimensions == 3 and ".experts." in name:
            found += [f"{name.partition('.experts.')[0]}.experts.0.{projection}" for projection in PROJECTIONS]
    return list(dict.fromkeys(found))


def filled_where_called(
    model: Any, towers: Collection[str], fill: Callable[[set[str]], None], run: Callable[[], _T]
) -> _T:
    """What `run` returns, or raises, once all of `towers` that it calls has values.

    Gemma 3n embeds text as images and sound too, and drops that. fill: gives the parameters of these names values.
    """
    called: set[str] = set()
    paths = {path for path, module in model.named_modules() if any(f"{path}.{n}" in towers for n in module._parameters)}

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: called.update(
            f"{path}.{n}" for n, p in module._parameters.items() if p is not None and p.is_meta
        )

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        while True:
            before = set(called)
            called.clear()
            try:
                out = run()
            except Exception:
                if not called or called == before:
                    raise
            if not called or called == before:
                return out
            fill(called)
    finally:
        for hook in hooks:
            hook.remove()
