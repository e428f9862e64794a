"""Chat templates in the styles of known models, and conversations for them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

CHATML: Final = """\
{%- if documents %}
    {{- '<|im_start|>system\\n# Documents\\n' }}
    {%- for document in documents %}
        {{- loop.index }}. {{ document['title'] }}: {{ document.text | trim }}
    {% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

CHATML_TOOLS: Final = """\
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}
    {{- '\\n' }}
    {{- tool | tojson }}
{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA_3: Final = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('today') %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL: Final = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == 'tool' or message.tool_calls is defined) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('After a system message, roles must alternate user/assistant') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val | tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{% endif %}
                {%- endfor %}
                {{- '}}' + (', ' if not loop.last else ']') }}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.function | tojson }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should have a length of 9!') }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported after a system turn') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA: Final = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

PHI: Final = """\
{% for message in messages %}
{% if message['role'] == 'tool' %}{% break %}{% endif %}
{% if message['role'] == 'system' and message['content'] %}
{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' -}}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' -}}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' -}}
{% generation %}
{% set text = message['content'] | default('', true) %}
{{ text + '<|end|>' }}
{% endgeneration %}
{{ text | default('(no text)') }}
{% endif %}
{% endfor %}
{% if tools %}{{ '<|tool|>' + tools | tojson(sort_keys=true, separators=(',', ':')) }}{% endif %}
{% if documents %}{{ documents | map(attribute='text') | join('; ') | tojson(true) }}{% endif %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""


class Style(NamedTuple):
    """Chat templates of one tokenizer, and its special tokens; `extra` are not special."""

    templates: str | dict[str, str]
    bos_token: str | None
    eos_token: str
    special: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


STYLES: Final = {
    "chatml": Style(
        {"default": CHATML, "tool_use": CHATML_TOOLS},
        None,
        "<|im_end|>",
        ("<|im_start|>",),
        ("<tool_call>", "</tool_call>"),
    ),
    "llama_3": Style(
        LLAMA_3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "mistral": Style(
        MISTRAL,
        "<s>",
        "</s>",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    ),
    "gemma": Style(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi": Style(
        PHI, None, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
}

WEATHER: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, e.g. Zürich <now> & 'soon'.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": None},
                "city": {"type": "string"},
                "days": {"type": "number", "minimum": 0.5, "maximum": 1e3, "strict": True},
            },
            "required": ["city"],
        },
    },
}
TIME: Final[dict[str, Any]] = {"type": "function", "function": {"name": "get_time"}}
DOCUMENTS: Final = [
    {"title": "Rivers", "text": "The Aare is 288 km long.\n"},
    {"text": "“Über” lakes <and> ponds", "title": "Lakes", "year": 1999},
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(*names: str, **content: str) -> dict[str, Any]:
    """Return a message of the assistant that calls functions."""
    calls = [
        {
            "type": "function",
            "id": f"abcdefgh{i}",
            "function": {"name": name, "arguments": {"city": "Genève", "days": 2, "a": [None]}},
        }
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", **content, "tool_calls": calls}


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"abcdefgh{number}"}


CONVERSATIONS: Final[dict[str, dict[str, Any]]] = {
    "one turn": {"messages": [user("How warm is it?")]},
    "a system turn": {"messages": [system("Be brief."), user("How warm is it?")]},
    "three turns": {"messages": [user("a"), assistant("b"), user("c")]},
    "a system turn and five": {
        "messages": [system("S"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    },
    "unicode": {
        "messages": [user("Grüße, 東京 🦜 \u200d\u0301 \u2028 ﬁ"), assistant("☃"), user("ß")]
    },
    "an empty answer": {"messages": [user("a"), assistant(""), user("b")]},
    "an empty system turn": {"messages": [system(""), user("a")]},
    "newlines at both ends": {"messages": [user("\n\na\n"), assistant("\nb\n\n"), user("c\n")]},
    "spaces at both ends": {
        "messages": [system("  s  "), user("  a  "), assistant(" b "), user(" ")]
    },
    "code": {"messages": [user("if a < 5 && b > \"x\":\n\treturn '&amp;'  # \\n")]},
    "the syntax of templates": {"messages": [user("{{ 7 * 7 }} {% raw %} {# no #} {%- endif %}")]},
    "two users": {"messages": [user("a"), user("b")]},
    "an assistant first": {"messages": [assistant("a"), user("b")]},
    "an assistant last": {"messages": [user("a"), assistant("b")]},
    "a late system turn": {"messages": [user("a"), assistant("b"), system("c"), user("d")]},
    "one tool": {"messages": [user("How warm is it?")], "tools": [WEATHER]},
    "tools and a system turn": {
        "messages": [system("Be brief."), user("a"), assistant("b"), user("c")],
        "tools": [WEATHER, TIME],
    },
    "no tools": {"messages": [user("a")], "tools": []},
    "a call": {
        "messages": [user("a"), call("get_weather"), result("21.5"), assistant("b"), user("c")],
        "tools": [WEATHER],
    },
    "two calls": {
        "messages": [
            user("a"),
            call("get_weather", "get_time", content="Let me see."),
            result('{"warm": true}'),
            result("12:00", 1),
        ],
        "tools": [WEATHER, TIME],
    },
    "documents": {"messages": [user("How long is the Aare?")], "documents": DOCUMENTS},
    "documents and a system turn": {
        "messages": [system("Cite."), user("a")],
        "documents": DOCUMENTS[:1],
    },
    "tools and documents": {
        "messages": [user("a")],
        "tools": [TIME],
        "documents": DOCUMENTS,
    },
}
