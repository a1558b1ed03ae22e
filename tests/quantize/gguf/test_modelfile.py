"""Chat templates as Ollama's Go templates: the same prompt, or none."""

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from quantpress.core.errors import BadInput
from quantpress.gguf.modelfile import modelfile, translate

from .models import tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
KNOWN = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3}
TALK = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Two\nlines"), ("assistant", "So."), ("user", "End")]


def with_template(template: str) -> PreTrainedTokenizerFast:
    out = tokenizer()
    out.chat_template = template
    return out


def go(template: str, messages: list[dict[str, str]], default: str | None) -> str:
    """A reader for the part of Go's template language that is used, by its documented rules.

    .System is the collected system text, with the Modelfile's SYSTEM as a message when none is given.
    """
    if messages[0]["role"] != "system" and default is not None:
        messages = [{"role": "system", "content": default}, *messages]
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    tokens = [("text" if i % 2 == 0 else "action", part) for i, part in enumerate(parts)]
    begin = next(i for i, t in enumerate(tokens) if t == ("action", "range $i, $m := .Messages"))
    out = "".join(text for _, text in tokens[:begin])
    end = len(tokens) - 1 - next(i for i, t in enumerate(reversed(tokens)) if t == ("action", "end"))
    for i, message in enumerate(messages):
        stack: list[tuple[bool, bool]] = []  # (this branch runs, some branch has run)
        for kind, part in tokens[begin + 1 : end]:
            running = all(on for on, _ in stack)
            if kind == "text":
                out += part if running else ""
            elif part in (".Content", "$.System"):
                out += (message["content"] if part == ".Content" else system) if running else ""
            elif part == "end":
                stack.pop()
            else:
                condition = part.removeprefix("else ").removeprefix("if ")
                role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
                assert role or condition == "and $.System (le $i 1)", condition
                true = message["role"] == role[1] if role else bool(system) and i <= 1
                if part.startswith("else"):
                    _, ran = stack.pop()
                    stack.append((true and not ran, ran or true))
                else:
                    stack.append((true, true))
    return out + "".join(text for _, text in tokens[end + 1 :])


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("system", [None, "Speak plainly."])
def test_the_go_template_gives_the_prompt_of_the_chat_template(name: str, system: str | None) -> None:
    fast = with_template(KNOWN[name])
    add_bos = name not in ("chatml", "phi3")
    turns = translate(fast, add_bos)
    if system is not None and turns.system is None:
        assert name == "mistral"
        return
    talk = [{"role": role, "content": text} for role, text in TALK]
    for length in (1, 3, 5):
        messages = ([{"role": "system", "content": system}] if system else []) + talk[:length]
        want = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert (fast.bos_token if add_bos else "") + go(turns.go(), messages, turns.default) == want


def test_the_file() -> None:
    text, note = modelfile(Path("/x/model.gguf"), with_template(CHATML), 2048, [2], False)
    assert note is None
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range $i, $m := .Messages }}')
    assert 'SYSTEM """Be good."""\n' in text
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER num_ctx 2048\n')
    advised, _ = modelfile(
        Path("/x/model.gguf"), with_template(CHATML), 2048, [2], False, {"temperature": 0.6, "top_k": 20}
    )
    assert advised == text + "PARAMETER temperature 0.6\nPARAMETER top_k 20\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "repeats a message or leaves it out"),
        (CHATML.replace("m['content'] +", "m['content'] + (' (long)' if m['content'] | length > 9 else '') +"), "more"),
        (CHATML + "{{ '{{' }}", "several ways|braces"),
        ("{{ raise_exception('never') }}", "of a plain conversation the chat template fails"),
    ],
)
def test_a_template_that_does_more_is_refused(template: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        translate(with_template(template), False)
    text, note = modelfile(Path("m.gguf"), with_template(template), 64, [2], False)
    assert "TEMPLATE" not in text
    assert note is not None
    assert "no TEMPLATE" in note


def test_a_missing_bos_is_refused() -> None:
    with pytest.raises(BadInput, match="puts BOS before the text"):
        translate(with_template(PHI3), True)
