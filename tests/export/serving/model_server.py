"""An OpenAI server in this process that computes with transformers what an artifact's files say, as vLLM answers, or
as llama.cpp does. For rehearsals of what real servers are asked, in seconds.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch

from quantpress.artifact.artifact import open_artifact
from quantpress.calibrate.tokens import open_tokenizer

Style = Literal["vllm", "llama.cpp"]
# What comes after tokens by each model's weights: several servers of the same are asked for the same.
_KNOWN: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}


@dataclass
class ModelServer:
    """url: without /v1. bos_twice: the tokenizer puts a second BOS first. asked: how many requests came, by path."""

    folder: Path
    style: Style = "vllm"
    text_only: bool = False  # no token ids, no log-probabilities and none of the paths beside OpenAI's
    bos_twice: bool = False
    url: str = ""
    asked: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = _KNOWN.setdefault(_weights(self.folder), {})
        self.model = open_artifact(self.folder, torch.device("cpu"), torch.float32)[1].whole().eval()
        self.tokenizer = open_tokenizer(self.folder)
        self.lock = threading.Lock()
        advised = self.folder / "generation_config.json"  # vLLM takes the tokenizer's and these
        ends = json.loads(advised.read_text()).get("eos_token_id") if advised.is_file() else []
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def ids(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return [*ids[:1], *ids] if self.bos_twice else ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids: list[int] = made["input_ids"]
        return [*ids[:1], *ids] if self.bos_twice else ids

    @torch.no_grad()
    def rows(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities [len, vocab]."""
        rows: torch.Tensor = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return rows

    @torch.no_grad()
    def generate(self, ids: list[int], body: dict[str, Any]) -> tuple[list[int], list[torch.Tensor]]:
        tokens: list[int] = []
        kept = []
        draw = torch.Generator().manual_seed(int(body.get("seed") or 0))
        cache, seen = None, 0
        for _ in range(body.get("max_tokens") or 16):
            before = (*ids, *tokens)
            if before not in self.known:
                out = self.model(torch.tensor([before[seen:]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, seen = out.past_key_values, len(before)
                self.known[before] = out.logits[0, -1].float().log_softmax(-1)
            row = self.known[before]
            kept.append(row)
            free = row.clone()
            if body.get("ignore_eos") or len(tokens) < (body.get("min_tokens") or 0):
                free[self.tokenizer.eos_token_id] = -torch.inf
            for name, bias in (body.get("logit_bias") or {}).items():
                free[int(name)] += bias
            hot = float(body.get("temperature") or 0)
            token = int(torch.multinomial((free / hot).exp(), 1, generator=draw) if hot else free.argmax())
            tokens.append(token)
            if token in self.ends:
                break
        return tokens, kept

    def answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        ids = self.chat(body["messages"]) if chat else self.ids(body["prompt"])
        tokens, rows = self.generate(ids, body)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        finish = "stop" if tokens[-1] in self.ends else "length"
        for stop in body.get("stop") or []:
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        if body.get("response_format"):
            text = '{"answer": "yes"}'
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("logprobs"):
            count = int(body.get("top_logprobs") or 0) if chat else int(body["logprobs"])
            choice["logprobs"] = self.logprobs(ids, tokens, rows, count, body, chat)
        if body.get("return_token_ids") and self.style == "vllm":
            choice |= {"prompt_token_ids": ids, "token_ids": tokens}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        choices = [choice | {"index": i} for i in range(body.get("n") or 1)]
        return {"choices": choices, "usage": usage}

    def logprobs(
        self, ids: list[int], tokens: list[int], rows: list[torch.Tensor], count: int, body: dict[str, Any], chat: bool
    ) -> dict[str, Any]:
        best = [row.topk(max(1, count)) for row in rows]
        tops = [dict(zip(b.indices.tolist(), b.values.tolist(), strict=True)) for b in best]
        if chat or self.style == "llama.cpp":
            form = (lambda t: f"token_id:{t}") if body.get("return_tokens_as_token_ids") else self.tokenizer.decode
            more = (lambda t: {"id": t}) if self.style == "llama.cpp" else (lambda t: {})
            return {"content": [
                {"token": form(t), "logprob": float(row[t]), **more(t),
                 "top_logprobs": [{"token": form(k), "logprob": v, **more(k)} for k, v in top.items()]}
                for t, row, top in zip(tokens, rows, tops, strict=True)
            ]}  # fmt: skip
        named = [f"token_id:{t}" for t in tokens]
        values: list[float | None] = [float(row[t]) for t, row in zip(tokens, rows, strict=True)]
        if body.get("echo"):
            whole = self.rows(ids)
            named = [f"token_id:{t}" for t in ids] + named
            values = [None, *(float(whole[i, t]) for i, t in enumerate(ids[1:])), *values]
            tops = [{} for _ in ids] + tops
        return {"tokens": named, "token_logprobs": values,
                "top_logprobs": [{f"token_id:{k}": v for k, v in top.items()} for top in tops]}  # fmt: skip


def _weights(folder: Path) -> str:
    """A digest of all that the model computes with."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/props":
                return self.send(
                    *(404, {}) if server.style == "vllm" else (200, {"eos_token": server.tokenizer.eos_token})
                )
            self.send(200, {"object": "list", "data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked[self.path] = server.asked.get(self.path, 0) + 1
            try:
                with server.lock:
                    found = self.made(body)
            except ValueError as error:
                return self.send(400, {"error": {"message": str(error)}})
            if found is None:
                return self.send(404, {"error": {"message": "no such path"}})
            if body.get("stream"):
                return self.stream(found)
            self.send(200, found)

        def made(self, body: dict[str, Any]) -> dict[str, Any] | None:
            vllm = server.style == "vllm"
            if server.text_only and (
                self.path[:4] != "/v1/" or {"logprobs", "return_token_ids", "logit_bias"} & body.keys()
            ):
                return None
            if self.path == "/v1/completions":
                return server.answer(body, chat=False)
            if self.path == "/v1/chat/completions":
                return server.answer(body, chat=True)
            if self.path == "/tokenize":
                if not vllm:
                    return {"tokens": server.ids(body.get("content", ""))}
                if "prompt" not in body and "messages" not in body:
                    raise ValueError("prompt or messages: field required")
                return {"tokens": server.chat(body["messages"]) if "messages" in body else server.ids(body["prompt"])}
            if self.path == "/detokenize":
                return {"prompt" if vllm else "content": server.tokenizer.decode(body["tokens"])}
            if self.path == "/apply-template" and not vllm:
                text = server.tokenizer.apply_chat_template(
                    body["messages"], add_generation_prompt=True, tokenize=False
                )
                bos = server.tokenizer.bos_token
                first = bos and server.tokenizer("a")["input_ids"][:1] == [server.tokenizer.bos_token_id]
                return {"prompt": text.removeprefix(bos) if first else text}
            return None

        def stream(self, found: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            choice = found["choices"][0]
            chat = "message" in choice
            text = choice["message"]["content"] if chat else choice["text"]
            pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
            events = [{"choices": [{"delta": {"content": p}} if chat else {"text": p}]} for p in pieces]
            lines = [*map(json.dumps, [*events, {"choices": [], "usage": found["usage"]}]), "[DONE]"]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for line in lines:
                    self.wfile.write(f"data: {line}\n\n".encode())
                    self.wfile.flush()
                    threading.Event().wait(0.001)
            self.close_connection = True

        def send(self, status: int, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def served(
    folder: Path, style: Style = "vllm", *, text_only: bool = False, bos_twice: bool = False
) -> Iterator[ModelServer]:
    """The artifact in `folder`, served until the block ends."""
    server = ModelServer(folder, style, text_only, bos_twice)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
