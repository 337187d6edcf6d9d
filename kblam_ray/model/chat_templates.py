"""Chat templates by name, for tokenizers that bring none and for adapters trained with another than the tokenizer's.

Jinja, in transformers' dialect: `messages`, `add_generation_prompt` and the tokenizer's special tokens by name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltInTemplate:
    """A Jinja text and the control tokens that the tokenizer must have for it."""

    jinja: str
    control_tokens: tuple[str, ...] = ()


PLAIN = """\
{%- if bos_token is defined %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'Question: ' + message.content + '\\n' }}
{%- elif message.role == 'assistant' -%}
{{ 'Answer: ' + message.content }}{% if eos_token is defined %}{{ eos_token }}{% endif %}{{ '\\n' }}
{%- else -%}{{ message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"""

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

KBLAM_LLAMA_3 = """\
{%- if bos_token is defined %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>' }}
{%- if message.role != 'assistant' %}{{ ' ' }}{% endif %}{{ message.content + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif -%}"""

KBLAM_PHI_3 = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

BUILT_IN: dict[str, BuiltInTemplate] = {
    "plain": BuiltInTemplate(PLAIN),
    "chatml": BuiltInTemplate(CHATML, ("<|im_start|>", "<|im_end|>")),
    "kblam-llama-3": BuiltInTemplate(KBLAM_LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "kblam-phi-3": BuiltInTemplate(KBLAM_PHI_3, ("<|user|>", "<|assistant|>", "<|end|>")),
}
"""`plain` needs no control tokens; the `kblam-` ones put a question as the published KBLaM code does in training."""
