"""Messages to prompt text, by the checkpoint's own Jinja template.

Templates come with downloaded checkpoints, so they run in a sandbox.  Filters, globals and
white-space rules are those of transformers' ``apply_chat_template``, so that a template gives the
same prompt here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from flashmoe.errors import ArgumentError, ModelFileError, TokenizerError, UnsupportedError
from flashmoe.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Message", "check_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Message(TypedDict, total=False):
    """One turn, in the shape that the OpenAI API and the templates know."""

    role: str
    content: str | list[dict[str, Any]] | None
    name: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source : str
        Jinja text.
    where : str
        For messages: the file it came from.
    variables : mapping
        What the template sees beside the messages, such as ``bos_token``.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, Any]) -> None:
        self._where = where
        self._variables = dict(variables)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ModelFileError(f"{where}: line {e.lineno}: {e.message}") from e
        self.source = source

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Load the template of a checkpoint directory.

        Raises
        ------
        TokenizerError
            The checkpoint has none.
        """
        variables = {n: t for n in _SPECIAL if (t := tokenizer.special_token(n)) is not None}
        file = tokenizer.path / "chat_template.jinja"
        if file.is_file():
            return cls(_read(file), str(file), variables)
        where = tokenizer.path / "tokenizer_config.json"
        value = tokenizer.config.get("chat_template")
        if isinstance(value, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default", next(iter(named.values()), None))
        if value is None:
            raise TokenizerError(
                f"{tokenizer.path}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), so messages cannot be formatted; give the prompt as text"
            )
        if not isinstance(value, str):
            raise ModelFileError(f"{where}: chat_template is not a string")
        return cls(value, str(where), variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt text; extra variables (``enable_thinking=False``) go to the template.

        Raises
        ------
        ArgumentError
            The messages are malformed, or the template itself refuses them.
        """
        checked = check_messages(messages)
        try:
            return self._template.render(
                {
                    **self._variables,
                    **variables,
                    "messages": checked,
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.exceptions.SecurityError as e:
            raise ModelFileError(f"{self._where}: the template does what it must not: {e}") from e
        except jinja2.TemplateError as e:
            raise ArgumentError(f"{self._where}: the chat template refuses this: {e}") from e
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise ArgumentError(f"{self._where}: the chat template failed: {e}") from e


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a checked copy of a message list.

    Text parts are joined; the arguments of tool calls, a JSON text in the OpenAI API, become the
    object that templates iterate over.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ArgumentError("messages must be a list of {'role': ..., 'content': ...}")
    if not messages:
        raise ArgumentError("messages must hold at least one message")
    return [_check_message(i, m) for i, m in enumerate(messages)]


def _check_message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ArgumentError(f"messages[{i}] must be a dict, not {type(message).__name__}")
    unknown = sorted(set(message) - _MESSAGE_KEYS)
    if unknown:
        raise ArgumentError(
            f"messages[{i}] has the unknown key {unknown[0]!r}; known: "
            + ", ".join(sorted(_MESSAGE_KEYS))
        )
    role = message.get("role")
    if role not in ROLES:
        raise ArgumentError(f"messages[{i}]: role {role!r} is not one of {', '.join(ROLES)}")
    checked = dict(message)
    calls = message.get("tool_calls")
    if calls is None:
        checked.pop("tool_calls", None)
    else:
        checked["tool_calls"] = [_check_call(i, call) for call in calls]
    content = message.get("content")
    if content is None and not calls:
        raise ArgumentError(f"messages[{i}] has no content")
    checked["content"] = _check_content(i, content)
    return checked


def _check_content(i: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ArgumentError(f"messages[{i}]: content must be text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise UnsupportedError(
                f"messages[{i}]: a content part of type {kind!r}; only 'text' is supported"
            )
        if not isinstance(part.get("text"), str):
            raise ArgumentError(f"messages[{i}]: a text part without its text")
        texts.append(part["text"])
    return "".join(texts)


def _check_call(i: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ArgumentError(f"messages[{i}]: a tool call without function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as e:
            raise ArgumentError(
                f"messages[{i}]: the arguments of tool call {function['name']!r} are not JSON: {e}"
            ) from e
    if not isinstance(arguments, Mapping):
        raise ArgumentError(
            f"messages[{i}]: the arguments of tool call {function['name']!r} must be an object"
        )
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters and sorts keys; models were trained without.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ModelFileError(f"{path}: not UTF-8 text: {e}") from e
