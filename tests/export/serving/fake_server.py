"""A small OpenAI server that does what it should, or one thing wrong: `python fake_server.py PORT [FAULT]`.

Faults of a single answer are asked for by the name of the model, `fake:FAULT`, so that one process can show them all.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTEXT = 512
WORDS = ("river", "stone", "Ω", "cloud", "東京", "lamp", "paper", "wind")
calls = itertools.count()
earlier: list[str] = []


def words(seed: str, count: int) -> list[str]:
    picks = random.Random(hashlib.sha256(seed.encode()).digest())
    return [f" {picks.choice(WORDS)}" for _ in range(count)]


_JSON = {  # what the fault answers where JSON is asked for
    "other-schema": '{"answer": "maybe"}',
    "no-json": "Yes, it is.",
    "blanks": '{\n  "answer"\n  \n      \n  ',
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(
                {"status": "loading"} if FAULT == "never-healthy" else {}, 503 if FAULT == "never-healthy" else 200
            )
        else:
            self.answer({"object": "list", "data": [{"id": "another" if FAULT == "lists-another" else "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = str(body["model"]).partition(":")[2]
        if "messages" in body:  # the template of the tests: contents one after another
            body["prompt"] = "".join(message["content"] for message in body["messages"])
        if FAULT == "templated" and isinstance(body["prompt"], str):
            body["prompt"] = f"<{body['prompt'][: CONTEXT - 2]}>"
        prompt = body["prompt"] if isinstance(body["prompt"], str) else bytes(body["prompt"]).decode(errors="replace")
        if FAULT == "text-only" and (not isinstance(body["prompt"], str) or "logprobs" in body):
            return self.answer({"detail": "prompt: a string, and no other fields"}, 422)
        if fault == "hangs":
            time.sleep(600)
        if fault == "html":
            return self.send(b"<html>Bad gateway</html>", 200, "text/html")
        if len(prompt) > CONTEXT and fault != "any-length":
            if FAULT == "dies-of-long-prompts":
                os._exit(9)
            said = "internal" if fault == "mute" else f"{len(prompt)} tokens are more than the context of {CONTEXT}"
            return self.answer({"error": {"message": said}}, 500 if fault == "breaks" else 400)
        pieces = self.pieces(body, prompt, fault)
        text = "".join(pieces)
        finish = "stop" if pieces == [""] else "length"
        for stop in [] if fault == "no-stop" else body.get("stop", []):
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        usage = {"prompt_tokens": self.count(prompt, fault), "completion_tokens": len(pieces)}
        chat = "messages" in body
        if body.get("stream"):
            return self.stream(pieces, usage, fault, chat)
        if "response_format" in body:
            text = _JSON.get(fault, '{"answer": "yes"}')
        content = {"message": {"content": text}} if chat else {"text": text}
        if chat and body.get("logprobs"):
            rows = [{"token": p, "logprob": -0.1, "top_logprobs": [{"token": p, "logprob": -0.1}]} for p in pieces]
            rows[-1]["logprob"] = -2.0 if fault == "not-likeliest" else -0.1
            content["logprobs"] = {"content": rows[:3] if fault == "few-rows" else rows}
        if not chat and body.get("logprobs"):
            named = [f"token_id:{ord(piece[1]) % 256}" for piece in pieces if piece]
            content["logprobs"] = {"tokens": named, "token_logprobs": [-0.1] * len(named)}
        number = 1 if fault == "once" else body.get("n", 1)
        choices = [content | {"index": i, "finish_reason": finish} for i in range(number)]
        if fault == "one-is-empty" and number > 1:
            choices[1] |= {"text": ""}
        self.answer({"choices": choices, "usage": usage})

    def pieces(self, body: dict[str, Any], prompt: str, fault: str) -> list[str]:
        seed = prompt
        if body["temperature"] and fault != "always-greedy":
            seed += str(next(calls) if fault == "no-seed" else body.get("seed"))
        if fault == "not-greedy":
            seed += str(next(calls))
        if fault == "crosstalk":
            earlier.append(prompt)
            seed = earlier[0] if len(earlier) > 4 else prompt  # four alone, and then four together
        if fault == "empty":
            return []
        if fault == "ends-always" or (fault == "ends" and not body.get("ignore_eos")):
            return [""]
        return words(seed, body["max_tokens"])

    def count(self, prompt: str, fault: str) -> int:
        text = prompt.encode("ascii", "ignore").decode() if fault == "ascii" else prompt
        return len(text.encode()) + (fault == "other-template")

    def stream(self, pieces: list[str], usage: dict[str, int], fault: str, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain" if fault == "plain" else "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "wrong-text":
            pieces = [*pieces[:-1], " instead"]
        if fault == "chat-wrong-text" and chat:
            pieces = [*pieces[:-1], " instead"]
        forms = [{"delta": {"content": piece}} if chat else {"text": piece} for piece in pieces]
        chunks = [{"choices": [form | {"finish_reason": None}]} for form in forms]
        events = [json.dumps(chunk) for chunk in [*chunks, {"choices": [], "usage": usage}]]
        if fault == "breaks-midway":
            events = [*events[:3], json.dumps({"error": {"message": "engine died"}})]
        events += [] if fault == "no-done" else ["[DONE]"]
        if fault == "at-once":
            time.sleep(0.002 * len(events))
            self.chunk("".join(f"data: {event}\n\n" for event in events).encode())
            events = []
        for number, event in enumerate(events):
            if fault == "closes" and number == 3:
                self.close_connection = True
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.chunk(f"data: {event}\n\n".encode())
            time.sleep(0.002)
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def answer(self, document: dict[str, Any], status: int = 200) -> None:
        self.send(json.dumps(document).encode(), status, "application/json")

    def send(self, data: bytes, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(data)


if __name__ == "__main__":
    FAULT = sys.argv[2] if len(sys.argv) > 2 else ""
    sys.stdout.write("fake server: starting\n")
    sys.stdout.flush()
    if FAULT == "dies":
        sys.stdout.write("RuntimeError: qweight of model.layers.0 has the wrong shape\n")
        sys.exit(3)
    if FAULT == "stays":  # a server, and an engine in a session of its own, that do not want to end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
        subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    if FAULT == "exposed":
        outside = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        threading.Thread(target=outside.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
