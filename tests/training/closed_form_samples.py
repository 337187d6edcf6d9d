"""A tiny random Llama and synthetic facts that the closed-form fit is tried on."""

from __future__ import annotations

import functools

from model_samples import ENCODER, llama_tokenizer, tiny_llama

from kblam_ray.encoders.load import load_encoder
from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.closed_form.settings import ClosedFormSettings

SMALL = ClosedFormSettings(
    num_questions=160,
    num_held_out_questions=48,
    held_out=0.3,
    ridges=(1e-2, 1e-1),
    shrinkages=(0.3, 1.0),
    prompt_shares=(0.6,),
    kb_size=60,
    num_gate_questions=4,
    block_questions=48,
    question_mix={"simple": 0.8, "two_entity": 0.1, "unanswerable": 0.1},
)


@functools.cache
def facts() -> EmbeddedFacts:
    return EmbeddedFacts.embed(list(SyntheticFacts(5).facts(0, 240)), load_encoder(ENCODER))


@functools.cache
def chat() -> ChatTemplate:
    return ChatTemplate(llama_tokenizer())


def base(**sizes):
    """Its attention is nearly uniform, so that a hidden state holds the mean of the words before it."""
    return tiny_llama(num_layers=2, hidden_size=96, **sizes)
