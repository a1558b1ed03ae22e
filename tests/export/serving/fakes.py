"""The fake server as the table of servers has it, and the tokenizer that goes with it."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quantpress.exports.servers.server import Launch, Launcher
from quantpress.exports.serving.starting import Options, Running, serve

FAKE = Path(__file__).with_name("fake_server.py")


def row(fault: str = "") -> Launcher:
    def command(launch: Launch) -> list[str]:
        return [launch.python, str(FAKE), str(launch.port), fault]

    return Launcher("fake", "folder", ("psutil",), "it is always there", command, model=lambda artifact: "fake")


def fake_server(folder: Path, fault: str = "") -> AbstractContextManager[Running]:
    return serve(row(fault), folder, folder / "log", Options(python=sys.executable, deadline_s=30))


class Bytes:
    """A token a byte; the template puts the contents of the messages one after another."""

    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)
