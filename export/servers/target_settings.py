"""What every server's target may set in a recipe; each server's file adds its own keys."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantpress.core.schema import Strict

from .loader import Loader

LISTENS_ON = "the port it listens on"
_MODEL = r"^/?[A-Za-z0-9][A-Za-z0-9._/@+-]*$"  # a hub id or an absolute folder, without characters a shell interprets


class ServerSettings(Strict):
    """The settings that all servers share.

    A subclass defines `name`, a Literal with the server's name as its default, and `_loader`; where its settings decide
    which loader it has, the property `loader`.
    """

    if TYPE_CHECKING:
        name: str
    _loader: ClassVar[Loader]

    max_model_len: int | None = Field(None, ge=16, description="tokens of prompt and answer; null: what the model has")
    max_num_seqs: int = Field(64, ge=1, description="requests answered at one time")
    port: int = Field(8000, ge=1, le=65535, description=LISTENS_ON)

    @property
    def loader(self) -> Loader:
        """What this target can load."""
        return self._loader

    @property
    def gpus(self) -> int:
        """Devices that the model is split over."""
        return 1

    @property
    def required_device(self) -> Literal["cuda", "cpu"] | None:
        """The only kind of device that the server can be started on; None for any."""
        return None

    def smoke_refusal(self) -> str | None:
        """Why the smoke test, which speaks OpenAI's protocol, cannot talk to this target; None when it can."""
        return None


class MultiGpu(ServerSettings):
    """Servers that split a model over GPUs."""

    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs the model is split over")

    @property
    def gpus(self) -> int:
        return self.tensor_parallel


class Drafting(MultiGpu):
    """Servers that can use the artifact as the draft of the model it was made from (speculative decoding)."""

    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="auto: what the artifact has scales for")
    prefix_caching: bool = Field(True, description="reuse the cache of prompts that begin alike")
    chunked_prefill: bool = Field(True, description="split long prompts, so that running answers are not held up")
    draft_for: str | None = Field(
        None,
        pattern=_MODEL,
        description="serve this model, a folder or a hub id, with the artifact as its draft (speculative decoding)",
    )
    draft_tokens: int = Field(4, ge=1, le=32, description="tokens the draft proposes at a time")
