"""The servers that a recipe's artifact is meant for: those of `quantpress.exports.servers`, each with its settings."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import BeforeValidator, Field

from quantpress.exports.servers import SERVERS
from quantpress.exports.servers.target_settings import ServerSettings

from ..core.schema import named

if TYPE_CHECKING:
    Target = ServerSettings
else:  # the union of all servers' settings, told apart by `name`; a name alone stands for its defaults
    _settings = tuple(server.settings for server in SERVERS.values() if server.settings is not None)
    _Target = Annotated[Union[_settings], Field(discriminator="name")]  # noqa: UP007
    Target = Annotated[_Target, BeforeValidator(named, json_schema_input_type=_Target | str)]
