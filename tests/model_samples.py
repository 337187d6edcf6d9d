"""Small tokenizers of three families and a tiny random Llama, made without a network."""

from __future__ import annotations

import functools

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.table import KnowledgeBase

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "Question: what is the population of Peru?\nAnswer: I am sorry I cannot find relevant information in the KB.",
    "You are a helpful assistant\n\nToday is a fine day\n\n",
]

LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

PHI_3 = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN_3 = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def _byte_level(special: list[str], marked_up: list[str] | None = None, **names) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Words as Llama 3 and Qwen cut them: a run of line breaks is one piece, whatever follows.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in marked_up or []])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3 has it."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(special, bos_token=special[0], eos_token=special[4], pad_token=special[1])
    tokenizer.chat_template = LLAMA_3
    return tokenizer


@functools.cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with control tokens that are not marked special, as Qwen has them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(special, ["<think>", "</think>", "<tool_call>"], eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = QWEN_3
    return tokenizer


@functools.cache
def phi_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their blank, and control tokens that swallow the blanks after them, as Phi-3 has them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "<|endoftext|>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *bytes_]))
    tokenizer = Tokenizer.from_str(_without_added(tokenizer.to_str(), bytes_))
    tokenizer.add_special_tokens(
        [AddedToken(token, rstrip=True, normalized=False) for token in ("<|user|>", "<|assistant|>", "<|end|>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>", pad_token=special[2]
    )
    fast.chat_template = PHI_3
    return fast


def _without_added(tokenizer: str, tokens: list[str]) -> str:
    import json

    parts = json.loads(tokenizer)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in tokens]
    return json.dumps(parts)


def tiny_llama(seed: int = 0, *, num_layers: int = 4, **sizes) -> LlamaForCausalLM:
    """A random Llama for `llama_tokenizer`: hidden 32, 4 query and 2 key/value heads of 8 numbers."""
    torch.manual_seed(seed)
    tokenizer = llama_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


FACTS = [
    ("France", "capital", "Paris"),
    ("Peru", "capital", "Lima"),
    ("Peru", "population", "34 million"),
    ("Ur", "founder", "Meskalamdug"),
    ("C++", "author", "Bjarne Stroustrup"),
    ("北京", "country", "China"),
]

ENCODER = "hashing:64"


def tiny_adapter(base, kind: str = "paper", **settings) -> KnowledgeAdapter:
    """An adapter for `ENCODER`, whose facts a random model notices."""
    spec = encoder_spec(ENCODER)
    torch.manual_seed(1)
    adapter = KnowledgeAdapter.for_model(
        base, kind=kind, encoder=EncoderRef(**spec.model_dump()), kb_layer_frequency=2, **{"kb_scale": 100, **settings}
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter.eval()


def make_kb(uri) -> KnowledgeBase:
    kb = KnowledgeBase.create(str(uri), ENCODER)
    kb.upsert([{"entity": entity, "property": property, "value": value} for entity, property, value in FACTS])
    return kb


def save_base(folder, base=None) -> str:
    (base or tiny_llama()).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return str(folder)
