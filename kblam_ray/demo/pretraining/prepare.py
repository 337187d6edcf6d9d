"""What pretraining needs before its first step: facts, their key embeddings and a tokenizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kblam_ray.demo.pretraining.documents import DocumentMaker
from kblam_ray.demo.pretraining.facts import pretraining_facts
from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.demo.pretraining.tokenizer import train_tokenizer
from kblam_ray.encoders.load import load_encoder
from kblam_ray.errors import InputError
from kblam_ray.facts import write_facts
from kblam_ray.facts.fact import Fact, key_text

ADAPTER_FACTS = "adapter_facts.jsonl"
ENCODED_AT_A_TIME = 2_000
TOKENIZER_DOCUMENTS = 40_000


def prepare(settings: PretrainSettings) -> tuple[list[Fact], np.ndarray, PreTrainedTokenizerBase]:
    """Facts, their key embeddings float16 [M, P], and the tokenizer; what the output folder has already is read.

    Raises:
        InputError: the encoder has no vocabulary of words.
        EncoderNotFoundError: there is no such encoder.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(settings.encoder)
    vocabulary = getattr(encoder, "vocabulary", None)
    if vocabulary is None:
        raise InputError(
            "the encoder has no vocabulary to take words from",
            where=settings.encoder,
            help="choose a sentence-transformers encoder, for example all-MiniLM-L6-v2",
        )
    facts = list(pretraining_facts(vocabulary, settings.num_facts, settings.seed))
    # Others: what the model has read too often would look easier to find than it is.
    others = pretraining_facts(vocabulary, settings.adapter_facts, settings.seed + 1)
    write_facts(others, str(folder / ADAPTER_FACTS))
    kept = folder / f"keys-{settings.num_facts}-{settings.seed}-{encoder.spec.revision[:8]}.npy"
    if not kept.exists():
        keys_MP = np.empty((len(facts), encoder.spec.dim), np.float16)
        for start in range(0, len(facts), ENCODED_AT_A_TIME):
            some = facts[start : start + ENCODED_AT_A_TIME]
            keys_MP[start : start + len(some)] = encoder.encode([key_text(f.entity, f.property) for f in some])
            print(f"pretrain_demo: embedded {start + len(some):,} of {len(facts):,} keys", file=sys.stderr)
        _save(kept, keys_MP)
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").exists():
        train_tokenizer(_texts(facts, vocabulary, settings.seed), settings.vocabulary).save_pretrained(place)
    return facts, np.load(kept, mmap_mode="r"), AutoTokenizer.from_pretrained(place)


def _texts(facts: list[Fact], vocabulary: Sequence[str], seed: int) -> Iterator[str]:
    """Documents, and each word of the encoder alone and with a capital, so that words in use become few tokens."""
    maker = DocumentMaker(facts, seed)
    for number in range(min(TOKENIZER_DOCUMENTS, len(facts))):
        document = maker.question(number)
        yield document.prompt + " " + document.answer
        yield facts[number].value
    for word in vocabulary:
        if word.isalpha():
            yield f" {word} {word.capitalize()}"


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    os.replace(partial, path)
