"""The one place that knows the demo model's chat format (ChatML with XML tool calls).

The training text and the shipped Jinja template both come from here; tests/test_demo_tools.py renders the same
conversations through both and requires equal bytes.  The model is trained without a thinking phase, so the
generation prompt never opens a <think> block and `enable_thinking` has no effect.
"""

import json

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

TOOLS_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
TOOLS_TAIL = (
    "\n</tools>\n\n"
    "To call a function, write <tool_call> and </tool_call> around one <function=name> block with one "
    "<parameter=name> block for each argument that the user gave. If no function fits, answer in plain words."
)

CHAT_TEMPLATE = (
    "{%- macro tool_call(call) -%}\n"
    "{%- set f = call.function if call.function is defined else call -%}\n"
    "{{- '<tool_call>\\n<function=' + f.name + '>\\n' -}}\n"
    "{%- for key, value in f.arguments.items() -%}\n"
    "{{- '<parameter=' + key + '>\\n' -}}\n"
    "{{- value if value is string else value | tojson -}}\n"
    "{{- '\\n</parameter>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{{- '</function>\\n</tool_call>' -}}\n"
    "{%- endmacro -%}\n"
    "{%- set ns = namespace(start=0) -%}\n"
    "{%- set system = '' -%}\n"
    "{%- if messages and messages[0].role == 'system' -%}\n"
    "{%- set system = messages[0].content | trim -%}\n"
    "{%- set ns.start = 1 -%}\n"
    "{%- endif -%}\n"
    "{%- if tools -%}\n"
    "{{- '<|im_start|>system\\n' + __HEAD__ -}}\n"
    "{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}\n"
    "{{- __TAIL__ -}}\n"
    "{%- if system -%}{{- '\\n\\n' + system -}}{%- endif -%}\n"
    "{{- '<|im_end|>\\n' -}}\n"
    "{%- elif system -%}\n"
    "{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- for message in messages[ns.start:] -%}\n"
    "{%- set content = (message.content if message.content is string else '') | trim -%}\n"
    "{%- if message.role == 'tool' -%}\n"
    "{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}\n"
    "{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}\n"
    "{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}\n"
    "{%- elif message.role == 'assistant' -%}\n"
    "{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] | trim -%}{%- endif -%}\n"
    "{{- '<|im_start|>assistant\\n' + content -}}\n"
    "{%- for call in message.tool_calls or [] -%}\n"
    "{%- if loop.first -%}{{- '\\n\\n' if content else '' -}}{%- else -%}{{- '\\n' -}}{%- endif -%}\n"
    "{{- tool_call(call) -}}\n"
    "{%- endfor -%}\n"
    "{{- '<|im_end|>\\n' -}}\n"
    "{%- elif message.role in ('user', 'system') -%}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}\n"
    "{%- else -%}\n"
    "{{- raise_exception('unknown role ' + message.role) -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
).replace("__HEAD__", repr(TOOLS_HEAD)).replace("__TAIL__", repr(TOOLS_TAIL))


def dumps(value):
    """JSON as the template writes it: ", " and ": " separators, given key order, no ASCII escaping."""
    return json.dumps(value, ensure_ascii=False)


def render_call(name, arguments):
    """One tool call as text; strings stand raw, everything else is JSON."""
    out = f"<tool_call>\n<function={name}>\n"
    for key, value in arguments.items():
        out += f"<parameter={key}>\n{value if isinstance(value, str) else dumps(value)}\n</parameter>\n"
    return out + "</function>\n</tool_call>"


def turn(role, text):
    """One ChatML turn with its closing newline."""
    return f"{IM_START}{role}\n{text}{IM_END}\n"


def render_chat(messages, tools=None, add_generation_prompt=False):
    """Render OpenAI-style `messages` (and `tools`) to the text that the model was trained on.

    Parameters
    ----------
    messages : list of dict
        Roles system (first only), user, assistant (`tool_calls` allowed), tool.
    tools : list of dict, optional
        OpenAI function schemas.

    Returns
    -------
    str
        Equal to CHAT_TEMPLATE rendered with the same arguments.
    """
    out, system, rest = "", "", list(messages)
    if rest and rest[0]["role"] == "system":
        system, rest = rest[0]["content"].strip(), rest[1:]
    if tools:
        text = TOOLS_HEAD + "".join("\n" + dumps(t) for t in tools) + TOOLS_TAIL
        out += turn("system", text + ("\n\n" + system if system else ""))
    elif system:
        out += turn("system", system)
    for i, message in enumerate(rest):
        role, content = message["role"], (message.get("content") or "").strip()
        if role == "tool":
            if i == 0 or rest[i - 1]["role"] != "tool":
                out += IM_START + "user"
            out += f"\n<tool_response>\n{content}\n</tool_response>"
            if i + 1 == len(rest) or rest[i + 1]["role"] != "tool":
                out += IM_END + "\n"
        elif role == "assistant":
            calls = [c.get("function", c) for c in message.get("tool_calls") or []]
            calls = "\n".join(render_call(c["name"], c["arguments"]) for c in calls)
            out += turn("assistant", content + ("\n\n" if content and calls else "") + calls)
        else:
            out += turn(role, content)
    return out + (IM_START + "assistant\n" if add_generation_prompt else "")
