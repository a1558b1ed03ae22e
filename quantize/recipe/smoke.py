"""The smoke test of a recipe: the server that the finished artifact is tested on, and how."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from quantpress.exports.servers import launchers

from ..core.schema import Strict

if TYPE_CHECKING:
    ServerName = str
else:  # url: one that already runs
    ServerName = Literal[(*launchers(), "url")]


class Smoke(Strict):
    """The artifact on a real server: started, queried, compared with our own forward, timed, stopped."""

    server: ServerName = Field("vllm", description="the server to start; url: one that already runs")
    python: str | None = Field(None, description="the interpreter that has the server; default: .venv-vllm's, or ours")
    url: str | None = Field(None, description="for `server: url`: http://host:port of an OpenAI-compatible server")
    concurrency: int = Field(4, ge=1, le=256, description="requests at a time")
    max_model_len: int | None = Field(
        None,
        ge=64,
        description="tokens of prompt and answer; null: 1024, or the maximum of a server that already runs",
    )
    deadline_s: float = Field(600, gt=0, strict=False, description="seconds the server has to become healthy")

    @model_validator(mode="after")
    def _url_names_a_server(self) -> Self:
        if (self.server == "url") != (self.url is not None):
            raise ValueError("`server: url` and `url: http://host:port` go together")
        if self.url is not None and "@" in self.url:
            raise ValueError("url holds a name or password: give a key in the environment, QUANTPRESS_API_KEY")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} does not start with http:// or https://")
        if self.url is not None and self.python is not None:
            raise ValueError("python means nothing for a server that already runs: drop it")
        return self
