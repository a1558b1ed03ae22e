"""What latent attention (DeepSeek) keeps of a token, by the names that configs have for it."""

from collections.abc import Callable
from typing import Any


def latent_numbers(value: Callable[[str], Any]) -> int | None:
    """Numbers that a layer keeps of one token: a latent vector and the rotary part of the keys. None where attention is
    of another kind.

    value: of a name in the config, None where it has none.
    """
    rank = value("kv_lora_rank")
    return int(rank) + int(value("qk_rope_head_dim") or 0) if rank else None
