"""Chat templates: code of the model's, which is rendered only once it is known to come to an end."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from ..core.errors import BadInput

_SECONDS, _BYTES, _CHARACTERS = 2, 1 << 30, 1_000_000  # for a conversation of one letter
_SAID = "Hello, who are you?"
_TRIED_TOO_LONG = 60  # seconds of waiting, on a busy machine
_TRY = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
from jinja2 import nodes, sandbox
from jinja2.ext import Extension
class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def refuse(message):
    raise ValueError(message)
made = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
made.filters["tojson"] = lambda value, **_: json.dumps(value)
made.globals |= {{"raise_exception": refuse, "strftime_now": lambda form: ""}}
try:
    text = made.from_string(sys.stdin.buffer.read().decode("utf-8", "surrogatepass")).render(
        messages=[{{"role": "user", "content": "a"}}], tools=None, documents=None, add_generation_prompt=True,
        bos_token="", eos_token="", unk_token="", pad_token="")
except MemoryError:
    sys.exit(3)
except Exception:  # told where it is rendered for use
    sys.exit(0)
sys.exit(4 if len(text) > {_CHARACTERS} else 0)
"""


def check_templates(templates: Any, where: str) -> None:
    """Raise BadInput unless each of a tokenizer's templates ends, and soon; `where` is where they lie.

    templates: a text, {name: text}, or None. What a template raises is told when it is rendered.
    """
    for template in templates.values() if isinstance(templates, Mapping) else (templates,):
        if template is not None and not isinstance(template, str):
            raise BadInput(f"{where}: chat_template is a {type(template).__name__}, not a text")
        if template and (wrong := _costs(template)):
            raise BadInput(f"{where}: the chat template {wrong} for a message of one letter; mend or remove it")


@cache
def _costs(template: str) -> str:
    """What a template takes too much of, tried in a process with limits; "" where it does not."""
    given = template.encode("utf-8", "surrogatepass")
    try:
        status = subprocess.run(
            [sys.executable, "-I", "-c", _TRY], input=given, capture_output=True, timeout=_TRIED_TOO_LONG, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    if status == 4:
        return f"makes more than {_CHARACTERS} characters"
    if status == 3:
        return f"takes more than {_BYTES >> 20} MiB"
    return f"takes more than {_SECONDS} s" if status < 0 else ""


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A conversation in the tokenizer's chat template; prompt: with what opens the answer.

    Raises BadInput for a template that fails.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt, **arguments
        )
    except Exception as error:  # it is a program: several templates, none the default; a role that it refuses; a bug
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"the chat template fails ({said})") from error
    return text


class TemplateFault(NamedTuple):
    """What is amiss with a chat template: it cannot be parsed, refuses a plain message, or drops what a user says.

    The last two may be meant so: a template can ask for a system message, a language, a tool.
    """

    kind: Literal["broken", "refuses", "drops"]
    line: str


def template_fault(tokenizer: Any) -> TemplateFault | None:
    """What is amiss with the default chat template; None where nothing is, and where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or (isinstance(template, dict) and "default" not in template):
        return None
    faults = []
    for content in (_SAID, [{"type": "text", "text": _SAID}]):
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except TemplateSyntaxError as error:
            return TemplateFault("broken", f"the chat template is broken: {' '.join(str(error).split())[:160]}")
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            said = " ".join(str(error).split())[:160]
            faults.append(TemplateFault("refuses", f"the chat template refuses a plain user's message: {said}"))
            continue
        if _SAID in text:
            return None
        faults.append(TemplateFault("drops", "the chat template drops what a user says"))
    return faults[0]
