"""Chat templates: five that are built in, the one most models have, and whether a text is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- set told = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set told.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + told.system + message['content'] + ' [/INST]' }}
{%- set told.system = '' %}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] + eos_token }}
{%- else %}
{{- raise_exception("Mistral's format has the roles system, user and assistant; found " + message['role'] + '.') }}
{%- endif %}
{%- endfor %}
"""

ALPACA = """\
{%- if messages[0]['role'] != 'system' %}
{{- 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""

EXAONE = """\
{%- if messages[0]['role'] != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""

BUILT_IN = {"alpaca": ALPACA, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "exaone": EXAONE}


def most_common(templates: Iterable[str | None]) -> str | None:
    """Return the template that most models have, the first of those that are equally common; None if none has one."""
    counts = Counter(template for template in templates if template)
    return max(counts, key=lambda template: counts[template], default=None)


def template_error(text: str) -> str | None:
    """Say what is wrong with a text as a chat template, with its line; None if nothing is."""
    from jinja2 import TemplateError, TemplateSyntaxError

    from hf_merge import _compat

    try:
        _compat.compile_chat_template(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except TemplateError as error:
        return str(error)
    return None
