"""A server that already runs against the reference that travels with its export: no weights, no original, no torch."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from quantpress.core.errors import BadInput

from .against_reference import hold
from .client import Client
from .outcome import Failed, made
from .record import Against, Check
from .reference import Reference


@dataclass(frozen=True)
class Checked:
    """How a served model stands against its reference."""

    checks: tuple[Check, ...]
    against: Against

    @property
    def passed(self) -> bool:
        """No check failed, and the distributions were compared or at least the tokens."""
        return not any(check.status == "fail" for check in self.checks)


def check_served(
    url: str, reference: Reference, model: str | None = None, api_key: str | None = None,
    tell: Callable[[Check], None] = lambda check: None, *, rounds_inputs: bool | None = None,
) -> Checked:  # fmt: skip
    """Hold the model at `url` (with or without /v1) against `reference`; tell: called with each check.

    model: its name there, by default the first that is listed. rounds_inputs: as of `ServedCheck`; None: as this
    machine does, for a server that runs on it. Raises BadInput for an address that is none.
    """
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        tell(check)

    try:
        client = Client(url.rstrip("/").removesuffix("/v1"), model, api_key, loopback=False)
    except httpx.InvalidURL as error:
        raise BadInput(f"{url}: {error}; write http://host:port") from None
    rounds = _rounds_inputs_here(url) if rounds_inputs is None else rounds_inputs
    against = Against()
    with client:
        note(made("models", lambda: _listed(client), {}))
        if checks[0].status == "pass":
            against = hold(client, reference, client.max_model_len(), {}, note, rounds_inputs=rounds)
            if all(check.status != "pass" for check in checks[1:]):
                nothing = "nothing of the reference could be compared with this server"
                note(Check(name="compared", status="fail", reason=nothing, seconds=0.0))
    return Checked(tuple(checks), against)


def _rounds_inputs_here(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    if here:
        from .agreement import rounds_inputs  # it takes torch

        return rounds_inputs(may=True)
    return False


def _listed(client: Client) -> str:
    names = [str(model["id"]) for model in client.models()]
    if client.model not in names:
        raise Failed(f"the list holds {', '.join(names) or 'nothing'}, and not {client.model}")
    return f"lists {client.model}"
