"""Ollama's Modelfile for a GGUF file: the chat template in Go, the stop strings, the context length.

The Jinja template is not parsed. It is rendered with marked messages; the text between the marks gives the prefix and
suffix of each role. These are accepted only if they render further conversations exactly as the original template does.
A template that cannot be expressed so is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..calibrate.chat_template import rendered
from ..core.errors import BadInput

CONTEXT = 8192  # tokens at most: the model's full context may need more memory than there is
Message = dict[str, str]
_SYSTEM, _USER, _ANSWER, _AGAIN = "\u2460sys\u2460", "\u2461use\u2461", "\u2462ans\u2462", "\u2463aga\u2463"
_TEXTS = ("What is 2 + 2?", "It's 4.\nIs it not?", "Yes: 四", "Why", "So it is.")


@dataclass(frozen=True)
class Turns:
    """The text that a chat template puts around each role's message.

    user, answer, system: prefix and suffix; system None: the template refuses system messages. inside: the system text
    is put into the first user's turn, after its prefix. start: before everything. prompt: where the answer begins.
    default: the system text when none is given.
    """

    start: str
    user: tuple[str, str]
    answer: tuple[str, str]
    system: tuple[str, str] | None
    inside: bool
    prompt: str
    default: str | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama renders from the Go template, restated in Python."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else self.default
        out, first = self.start, True
        if system is not None and self.system is not None and not self.inside:
            out += self.system[0] + system + self.system[1]
        for message in messages:
            if message["role"] == "user":
                out += self.user[0]
                if first and self.inside and system is not None and self.system is not None:
                    out += self.system[0] + system + self.system[1]
                out += message["content"] + self.user[1]
                first = False
            elif message["role"] == "assistant":
                out += self.answer[0] + message["content"] + self.answer[1]
        return out + self.prompt

    def go(self) -> str:
        """The Go template. Only the first message can be a system one, so the first user message is number 0 or 1."""
        lead = ""
        if self.system is not None:
            lead = self.system[0] + "{{ $.System }}" + self.system[1]
        apart = "" if self.inside or not lead else '{{ if eq .Role "system" }}' + lead.replace("$.System", ".Content")
        apart += "{{ else if" if apart else "{{ if"
        inner = "{{ if and $.System (le $i 1) }}" + lead + "{{ end }}" if self.inside and lead else ""
        user = f'{apart} eq .Role "user" }}}}{self.user[0]}{inner}{{{{ .Content }}}}{self.user[1]}'
        answer = f'{{{{ else if eq .Role "assistant" }}}}{self.answer[0]}{{{{ .Content }}}}{self.answer[1]}'
        return f"{self.start}{{{{ range $i, $m := .Messages }}}}{user}{answer}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def modelfile(
    file: Path,
    tokenizer: Any,
    positions: int,
    ends: Sequence[int],
    add_bos: bool,
    sampling: Mapping[str, float | int] = MappingProxyType({}),
) -> tuple[str, str | None]:
    """The Modelfile for GGUF `file` in the same folder, and a note when it has no template.

    positions: what the model takes at most. ends: the ids that end an answer. add_bos: whether llama.cpp adds BOS
    itself. sampling: the recommended settings, by Ollama's names.
    """
    lines, note, turns = [f"FROM ./{file.name}"], None, None
    if not getattr(tokenizer, "chat_template", None):
        note = "Modelfile: the model has no chat template; Ollama completes plain text"
    else:
        try:
            turns = translate(tokenizer, add_bos)
            lines.append(f'TEMPLATE """{turns.go()}"""')
            if turns.default is not None:
                lines.append(f'SYSTEM """{turns.default}"""')
        except BadInput as error:
            note = f"Modelfile: no TEMPLATE, {error}; Ollama makes one of its own"
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer, ends, turns)]
    lines.append(f"PARAMETER num_ctx {min(CONTEXT, positions)}")
    lines += [
        f"PARAMETER {name} {value}" if isinstance(value, int) else f"PARAMETER {name} {value:g}"
        for name, value in sampling.items()
    ]
    return "\n".join(lines) + "\n", note


def translate(tokenizer: Any, add_bos: bool) -> Turns:
    """The turns of the tokenizer's chat template; raises BadInput when they do not reproduce it."""
    turns = _observed(tokenizer)
    bos = tokenizer.bos_token or ""
    if add_bos and bos:
        turns = _without_bos(turns, bos)
    for messages in _conversations(with_system=turns.system is not None):
        want = _rendered(tokenizer, messages)
        if add_bos and bos:
            if not want.startswith(bos):
                raise BadInput("llama.cpp puts BOS before the text and the chat template does not")
            want = want.removeprefix(bos)
        if turns.render(messages) != want:
            raise BadInput("the chat template does more than put a text before and after each message")
    pieces = (turns.start, turns.prompt, *turns.user, *turns.answer, *(turns.system or ()), turns.default or "")
    if any(mark in piece for piece in pieces for mark in ("{{", "}}", '"""')) or any(p.endswith("{") for p in pieces):
        raise BadInput("the chat template holds braces or quotes that a Modelfile cannot")
    lost = {c for piece in pieces for c in piece if not (c.isprintable() or c in "\n\r\t")}
    if lost:  # parser/parser.go, ParseFile: what Go's strconv.IsPrint refuses is left out of a value
        raise BadInput(f"Ollama leaves {', '.join(map(ascii, sorted(lost)))} out of a Modelfile, and the chat template "
                       "has it")  # fmt: skip
    return turns


def _observed(tokenizer: Any) -> Turns:
    """The turns, from the text between the marks."""
    user, answer, again = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)
    whole = _rendered(tokenizer, [user, answer, again])
    first, between, second, prompt = _cut(whole, _USER, _ANSWER, _AGAIN)
    closing = _cut(_rendered(tokenizer, [user], prompt=False), _USER)[1]
    closed = _cut(_rendered(tokenizer, [user, answer], prompt=False), _USER, _ANSWER)[2]
    if not (second.startswith(closed) and between.startswith(closing) and prompt.startswith(closing)):
        raise BadInput("the chat template ends a turn in several ways")
    opening = second.removeprefix(closed)
    plain = Turns(
        "", (opening, closing), (between.removeprefix(closing), closed), None, False, prompt.removeprefix(closing)
    )
    if not first.endswith(opening):
        # The prefix of later turns may include BOS; then the first turn's is shorter.
        common = next((opening[i:] for i in range(len(opening)) if first.endswith(opening[i:])), "")
        extra = opening.removesuffix(common)
        plain = replace(plain, user=(common, closing), answer=(plain.answer[0], closed + extra))
        opening = common
    start = first.removesuffix(opening)
    try:
        told = _rendered(tokenizer, [_message("system", _SYSTEM), user])
        before, middle, _ = _cut(told, _SYSTEM, _USER)
    except BadInput:
        return replace(plain, start=start)
    if before == start + opening:
        return replace(plain, start=start, system=("", middle), inside=True)
    if before.startswith(start + opening):
        return replace(plain, start=start, system=(before.removeprefix(start + opening), middle), inside=True)
    if not middle.endswith(opening):
        raise BadInput("the chat template opens the first user's turn in several ways")
    return _with_default(replace(plain, start=start), before, middle.removesuffix(opening))


def _with_default(plain: Turns, before: str, after: str) -> Turns:
    """Turns with system messages of their own; what comes first without one is `start` or the default system text."""
    if before.startswith(plain.start):
        return replace(plain, system=(before.removeprefix(plain.start), after))
    if plain.start.startswith(before) and plain.start.endswith(after):
        default = plain.start[len(before) : len(plain.start) - len(after)]
        return replace(plain, start="", system=(before, after), default=default)
    raise BadInput("the chat template begins otherwise when there is a system message")


def _without_bos(turns: Turns, bos: str) -> Turns:
    """The turns without the leading BOS, which llama.cpp adds."""
    if turns.start.startswith(bos):
        return replace(turns, start=turns.start.removeprefix(bos))
    if turns.system is not None and not turns.inside and turns.default is not None and turns.system[0].startswith(bos):
        return replace(turns, system=(turns.system[0].removeprefix(bos), turns.system[1]))
    before, after = turns.user
    if before.startswith(bos):  # before every user message: moved behind every answer, since llama.cpp adds the first
        answer = turns.answer[0], turns.answer[1] + bos
        return replace(turns, user=(before.removeprefix(bos), after), answer=answer)
    return turns


def _conversations(with_system: bool) -> list[list[Message]]:
    turns = [_message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(_TEXTS)]
    plain = [turns[:1], turns[:3], turns]
    system = _message("system", "Be brief.\nBe kind.")
    return [*plain, *([system, *messages] for messages in plain if with_system)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, messages: Sequence[Message], prompt: bool = True) -> str:
    try:
        return rendered(tokenizer, messages, prompt=prompt)
    except BadInput as error:
        raise BadInput(f"of a plain conversation {error}") from None


def _cut(text: str, *marks: str) -> list[str]:
    """The text around the marks, each of which must occur once, in this order."""
    out = []
    for mark in marks:
        if text.count(mark) != 1:
            raise BadInput("the chat template repeats a message or leaves it out")
        before, _, text = text.partition(mark)
        out.append(before)
    return [*out, text]


def _stops(tokenizer: Any, ends: Sequence[int], turns: Turns | None) -> list[str]:
    """Stop strings: what ends an answer, and the special tokens that end one in a chat or open the next turn."""
    found = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(ends))]
    if turns is not None:
        around = turns.answer[1] + turns.user[0]
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t) in around}
        found += sorted(special - {tokenizer.bos_token} if turns.start else special, key=around.index)
    return [stop for stop in dict.fromkeys(found) if stop and stop.isprintable() and '"' not in stop]
