"""Ollama's Modelfile grammar restated, and what its own tests say of it.

ollama/ollama, parser/parser.go (ParseFile, unquote) and api/types.go (Options, FormatParams), at v0.33;
tests/slow/test_ollama_parser.py asks the real ones the same.
"""

import re

Commands = list[tuple[str, str]]
NAMES = {"from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
         "requires"}  # fmt: skip
WHOLE = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "num_keep", "seed",
         "num_predict", "top_k", "repeat_last_n"}  # fmt: skip
FLOATS = {"top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"}
TEXTS = {"stop"}


def commands(text: str) -> Commands:
    """The instructions of a Modelfile, "model" for FROM, and a parameter's own name; raises ValueError."""
    found: Commands = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = min((end for mark in "\r\n" if (end := text.find(mark, at)) >= 0), default=len(text))
        else:
            name, at = _word(text, at, r"[A-Za-z]*")
            if name.lower() not in NAMES:
                raise ValueError(f"no command: {name!r}")
            name = {"from": "model"}.get(name.lower(), name.lower())
            if name == "parameter":
                name, at = _word(text, at, r"[A-Za-z0-9_]*")
            value, at = _value(text, at)
            found.append((name, value))
    if "model" not in dict(found):
        raise ValueError("no FROM line")
    return found


def _word(text: str, at: int, pattern: str) -> tuple[str, int]:
    """A name and where what follows its space begins."""
    found = re.compile(pattern).match(text, at)
    assert found is not None
    if found.end() == len(text) or text[found.end()] not in " \t":
        raise ValueError("unexpected EOF")
    return found[0], found.end() + 1


def _value(text: str, at: int) -> tuple[str, int]:
    """A value ends with the first line, or the file, at which its quotes are closed."""
    held = ""
    for i in range(at, len(text) + 1):
        end = i == len(text)
        if end or text[i] in "\r\n":
            value = _unquoted(held.strip())
            if value is not None:
                return value, i
            if end:
                raise ValueError("unexpected EOF")
        if text[i].isprintable() or text[i] in "\r\n\t":
            held += text[i]
    raise AssertionError


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            whole = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if whole else None
    return text


def parameter(name: str, value: str) -> int | float | str:
    """A parameter's value in the type that Ollama gives it; raises ValueError."""
    if name in WHOLE:
        if re.fullmatch(r"[+-]?[0-9]+", value) is None:
            raise ValueError(f"invalid int value {value}")
        return int(value)
    if name in FLOATS:
        return float(value)
    if name in TEXTS:
        return value
    raise ValueError(f"unknown parameter {name!r}")


EOF, COMMAND, FROM = "unexpected EOF", "no command", "no FROM"
# (Modelfile, its instructions or the error): parser/parser_test.go.
CASES: list[tuple[str, Commands | str]] = [
    (
        'FROM model1\nADAPTER adapter1\nLICENSE MIT\nPARAMETER param1 value1\nTEMPLATE """{{ if .System }}<|a|>\n\n'
        '{{ .System }}<|b|>{{ end }}"""    \n',
        [
            ("model", "model1"), ("adapter", "adapter1"), ("license", "MIT"), ("param1", "value1"),
            ("template", "{{ if .System }}<|a|>\n\n{{ .System }}<|b|>{{ end }}"),
        ],
    ),
    ('FROM "     model 1"\nLICENSE "MIT       "\n', [("model", "     model 1"), ("license", "MIT       ")]),
    ('FROM a\nTEMPLATE """   {{ .Response }}   """    \n', [("model", "a"), ("template", "   {{ .Response }}   ")]),
    ('FROM "FOO  BAR  "', [("model", "FOO  BAR  ")]),
    ("FROM     FOOO BAR    ", [("model", "FOOO BAR")]),
    ("FROM llama3:7b-instruct-q4_K_M", [("model", "llama3:7b-instruct-q4_K_M")]),
    ("", FROM),
    ("PARAMETER param1 value1", FROM),
    ("PARAMETER what the \nFROM lemons make lemonade ", [("what", "the"), ("model", "lemons make lemonade")]),
    ("\nFROM foo\nPARAMETER param1\n", EOF),
    ("\nFROM foo\nBADCOMMAND param1 value1\n", COMMAND),
    ('\nFROM foo\nSYSTEM """\nOf two\nlines.\n"""\n\t\t\t', [("model", "foo"), ("system", "\nOf two\nlines.\n")]),
    ('\nFROM foo\nSYSTEM """Of two\nlines."""\n', [("model", "foo"), ("system", "Of two\nlines.")]),
    ('\nFROM foo\nSYSTEM """This is a multiline system.""\n', EOF),
    ('\nFROM foo\nSYSTEM "\n', EOF),
    ('\nFROM foo\nSYSTEM """\nwith "quotes".\n"""\n', [("model", "foo"), ("system", '\nwith "quotes".\n')]),
    ('\nFROM foo\nSYSTEM """"""\n', [("model", "foo"), ("system", "")]),
    ('\nFROM foo\nSYSTEM ""\n', [("model", "foo"), ("system", "")]),
    ("\nFROM foo\nSYSTEM \"'\"\n", [("model", "foo"), ("system", "'")]),
    (
        "\nFROM foo\nSYSTEM \"\"\"''\"'\"\"'\"\"'\"'''''\"\"'\"\"'\"\"\"\n",
        [("model", "foo"), ("system", "''\"'\"\"'\"\"'\"'''''\"\"'\"\"'")],
    ),
    ('\nFROM foo\nTEMPLATE """\n{{ .Prompt }}\n"""', [("model", "foo"), ("template", "\n{{ .Prompt }}\n")]),
    ("FROM foo\nPARAMETER stop ### User: \n", [("model", "foo"), ("stop", "### User:")]),
    ('FROM foo\nPARAMETER stop "### User: "\n', [("model", "foo"), ("stop", "### User: ")]),
    ('FROM foo\nPARAMETER stop """### User:\n"""\n', [("model", "foo"), ("stop", "### User:\n")]),
    ("\n# comment\nFROM foo\n\t", [("model", "foo")]),
    ("# a\r\nFROM foo\r\nPARAMETER seed 1\r\n", [("model", "foo"), ("seed", "1")]),
    # Not in its tests: what is not printed is left out, and so no template may have it.
    ('FROM foo\nSYSTEM """a\u00a0b\u200bc\td\r\ne"""\n', [("model", "foo"), ("system", "abc\td\r\ne")]),
    ('FROM foo\nSYSTEM """say "it""""\n', [("model", "foo"), ("system", 'say "it"')]),
]  # fmt: skip
