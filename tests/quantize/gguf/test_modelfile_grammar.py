"""What Ollama's grammar reads in our Modelfiles is what was meant."""

import re
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.errors import BadInput
from quantpress.exports.servers.deployment import ModelFolder
from quantpress.exports.servers.ollama import Ollama, deploy
from quantpress.exports.servers.resources import Resources
from quantpress.gguf.modelfile import modelfile, translate

from .ollama_grammar import CASES, Commands, commands, parameter
from .test_modelfile import CHATML, KNOWN, PHI3, with_template

LENGTH, ENDS = 2048, [2]
ADVICE = {"temperature": 0.6000000238418579, "top_k": 2_000_000, "top_p": 0.00001, "min_p": 0.05, "repeat_penalty": 1.1}


@pytest.mark.parametrize(("text", "wanted"), CASES)
def test_the_grammar_is_ollamas(text: str, wanted: Commands | str) -> None:
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            commands(text)
    else:
        assert commands(text) == wanted


def written(template: str, add_bos: bool) -> tuple[str, Commands]:
    """The Modelfile that an export of the file has, and what it is meant to say."""
    words = with_template(template)
    text, note = modelfile(Path("the model.gguf"), words, LENGTH, ENDS, add_bos, ADVICE)
    assert note is None
    folder = ModelFolder("it", Resources(1, 1, 1, 1, 1), gguf_file="the model.gguf", modelfile=text)
    turns = translate(words, add_bos)
    meant = [("model", "./the model.gguf"), ("template", turns.go())]
    meant += [("system", turns.default)] if turns.default is not None else []
    return deploy(Ollama(max_model_len=512), folder).files["model/Modelfile"], meant


ODD: dict[str, Any] = {  # a prompt that ends in a quote, quotes in the system text, lines like instructions
    "quotes": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<system>\"Be\" \"good\"\n\n"
    "PARAMETER num_ctx 9\nFROM x\n\"\"</s>{% endif %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\r\\n\"' }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", [*KNOWN, *ODD])
def test_a_modelfile_reads_as_meant(name: str) -> None:
    text, meant = written((KNOWN | ODD)[name], name not in ("chatml", "phi3", "quotes"))
    found = commands(text)
    assert found[: len(meant)] == meant
    values: dict[str, list[Any]] = {}
    for key, value in found[len(meant) :]:
        values.setdefault(key, []).append(parameter(key, value))
    assert "</s>" in values.pop("stop")
    assert values == {"temperature": [0.6], "top_k": [2_000_000], "top_p": [0.00001], "min_p": [0.05],
                      "repeat_penalty": [1.1], "num_ctx": [512]}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("Be good.", "Be\u00a0good."), r"leaves '\\xa0' out"),
        (CHATML.replace("assistant\n{%", "assistant\u200b{%"), r"leaves '\\u200b' out"),
        (PHI3.replace("|>\n'", "|>\n{'"), "braces"),
    ],
)  # fmt: skip
def test_what_the_grammar_would_change_is_refused(template: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        translate(with_template(template), False)
    text, _ = modelfile(Path("m.gguf"), with_template(template), LENGTH, ENDS, False)
    assert re.search("TEMPLATE|SYSTEM", text) is None
