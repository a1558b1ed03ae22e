"""What a chat template is told for llama.cpp."""

import pytest

from quantpress.gguf.chat import template_arguments

from .models import tokenizer

_TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, {}),
        (_TURNS, {}),
        (
            _TURNS + "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}",
            {"enable_thinking": True},
        ),
        (_TURNS + "{{ '' if enable_thinking | default(true) else 'no' }}", {"enable_thinking": True}),
        (_TURNS + "{% if enable_thinking %}think{% endif %}", {}),  # undefined is false, as llama.cpp has it
        (_TURNS + "{{ raise_exception('never') }}", {}),
    ],
)
def test_it_is_told_what_it_takes_for_granted_elsewhere(template: str | None, told: dict[str, bool]) -> None:
    fast = tokenizer()
    fast.chat_template = template
    assert template_arguments(fast) == told
