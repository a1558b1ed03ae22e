"""What a multimodal model has beside its text decoder: towers for images and sound, and what joins them to it."""

from typing import Any

from torch import Tensor, nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def tower_names(model: Any) -> set[str]:
    """Parameters and buffers of a model that neither its text decoder nor its head has; empty for a model of text."""
    decoder = model.get_decoder()
    if decoder is model or decoder is model.base_model:
        return set()
    text = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(tensor) for part in text if part is not None for tensor in _tensors(part).values()}
    return {name for name, tensor in _tensors(model).items() if id(tensor) not in inside}


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
