"""Chat templates: the same prompt as transformers makes, and clear refusals."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from flashmoe.chat import ChatTemplate, check_messages
from flashmoe.errors import ArgumentError, ModelFileError, TokenizerError, UnsupportedError
from flashmoe.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Größe <b>&'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

# In the manner of the Qwen3.5 template: ChatML, XML calls, thinking, contents trimmed.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + message.content|trim }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments|items %}
                {%- set value = value | tojson if value is mapping else value | string %}
                {{- '<parameter=' + name + '>\\n' + value + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content|trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


def render(source, messages=(USER,), **options):
    return ChatTemplate(source, "t.jinja", {"bos_token": "<s>"}).render(list(messages), **options)


def test_chatml_with_thinking():
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    padded = {"role": "user", "content": "  Hi\n"}
    assert render(QWEN, [padded]) == head + "<think>\n"
    assert render(QWEN, [padded], enable_thinking=False) == head + "<think>\n\n</think>\n\n"
    assert render(QWEN, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_tools_are_plain_json():
    """Python separators, keys in the given order, nothing escaped."""
    text = render(QWEN, tools=[TOOL])
    line = text.split("\n")[3]
    assert line == json.dumps(TOOL, ensure_ascii=False)
    assert "Größe <b>&'" in line


def test_tool_call_arguments_as_text_or_object():
    want = "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n<parameter=o>\n"
    for arguments in ({"n": 3, "o": {"k": "é"}}, '{"n": 3, "o": {"k": "é"}}'):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "content": "ok", "tool_call_id": "1"}
        text = render(QWEN, [USER, answer, result])
        assert want + '{"k": "é"}\n</parameter>\n</function>\n</tool_call>' in text


def test_white_space_rules_and_globals():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"
    assert render("{{ bos_token }}{{ strftime_now('%Y') }}") == f"<s>{datetime.now().year}"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"
    assert render("{{ {'b': 1, 'a': '<é>'} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": "<é>"\n}'
    assert render("{{ documents is none }} {{ tools is none }}") == "True True"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(UnsupportedError, match="image_url"):
        check_messages([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hi", "list"),
        (USER, "list"),
        ([], "at least one"),
        (["Hi"], r"messages\[0\] must be a dict"),
        ([USER, {"role": "bot", "content": "x"}], r"messages\[1\].*'bot'.*user"),
        ([{"content": "x"}], "role None"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 3}], "text or a list"),
        ([{"role": "user", "content": [{"type": "text"}]}], "without its text"),
        ([{"role": "user", "content": "x", "colour": 1}], "unknown key 'colour'"),
        ([{"role": "assistant", "tool_calls": [{}]}], "without function name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
            "must be an object",
        ),
    ],
)
def test_malformed_messages_are_refused(messages, match):
    with pytest.raises(ArgumentError, match=match):
        check_messages(messages)


def test_template_errors():
    with pytest.raises(ArgumentError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ModelFileError, match=r"t\.jinja: line 2"):
        render("fine\n{% if %}")
    with pytest.raises(ArgumentError, match=r"t\.jinja"):
        render("{{ messages[0].content + 3 }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
    ],
)
def test_templates_are_sandboxed(source):
    with pytest.raises((ModelFileError, ArgumentError)):
        render(source)


def test_the_callers_messages_are_not_changed():
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    check_messages(messages)
    assert messages[1]["content"] is None
    assert call["function"]["arguments"] == "{}"


def test_where_templates_are_found(tmp_path, noise_model):
    (tmp_path / "tokenizer.json").write_text((noise_model / "tokenizer.json").read_text())

    def found(config=None):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTemplate.of(Tokenizer(tmp_path)).render([USER])

    with pytest.raises(TokenizerError, match="no chat template"):
        found()
    assert found({"chat_template": "one"}) == "one"
    two = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert found({"chat_template": two}) == "d"
    with pytest.raises(ModelFileError, match="not a string"):
        found({"chat_template": 3})
    eos = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ eos_token }}"}
    assert found(eos) == "<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match="UTF-8"):
        found()
