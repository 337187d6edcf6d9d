"""How near the wording of an answer is to what it shall state: ROUGE and BERTScore, by their libraries.

What is compared: the whole answer as it was written (the candidate) with what it shall state, in short and as a
sentence (the references): the values with a blank between them, and the sentence that the question was made with, such
as "The capital of Peru is Lima." The nearer of the two counts, measure by measure, so that neither style of answering
is at a loss; a question of one's own has values only. Nothing is taken out of the answer, unlike in
`metrics.token_f1`. Of each measure the F1 of precision and recall is kept, from 0 to 1; BERTScore's may be a little
below 0.

ROUGE (C.-Y. Lin, Text Summarization Branches Out, 2004): shared words, shared pairs of neighbours, and the longest
common subsequence. A reference of one word has no pair: its ROUGE-2 is 0, as the library has it. The library's own
tokenizer keeps only a-z and 0-9; ours keeps the words of every script, letter by letter where no blanks part them,
without case and without stemming.

BERTScore (T. Zhang et al., arXiv 1904.09675): each token is matched with the most similar one of the other side, by the
cosine of contextual embeddings; no weights by frequency, no rescaling.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.evaluation.statements import words

PAIRS_PER_BATCH = 64

PAIRS_PER_CALL = 512
"""bert-score keeps the embeddings of every token it is given until it returns."""

_INSTALL = 'pip install "kblam-ray[evaluate]"'

_LOADING = threading.Lock()


@dataclass(frozen=True)
class Rouge:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def references(values: Sequence[str], sentence: str | None) -> tuple[str, ...]:
    """What an answer is compared with: the values with a blank between them, and the sentence that states them."""
    return (" ".join(values), *([] if sentence is None else [sentence]))


def rouge(text: str, wanted: str | Sequence[str]) -> Rouge:
    """ROUGE of an answer against a reference, or against the nearest of several, measure by measure.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    found = _rouge_scorer().score_multi([wanted] if isinstance(wanted, str) else list(wanted), text)
    return Rouge(*(float(found[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")))


def require_rouge() -> None:
    """Raises MissingDependencyError if rouge-score is not installed."""
    _rouge_scorer()


class _Words:
    """The tokenizer that rouge-score is given."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"ROUGE needs the package {error.name}", help=_INSTALL) from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


class BertScore:
    """BERTScore by one model, loaded once; `BertScore.load` keeps it for the process.

    Attributes:
        name: folder or name on the hub.
        layer: whose hidden states are compared; 0 are the embeddings.
    """

    def __init__(self, name: str, layer: int | None = None, *, device: torch.device | str = "cpu") -> None:
        self._score, published = _library()
        model, self._tokenizer = _pretrained(name)
        num_layers = int(model.config.num_hidden_layers)
        chosen = _published_layer(name, published) if layer is None else layer
        if chosen is None:
            chosen = num_layers
        if chosen > num_layers:
            raise InputError(
                f"layer {chosen} of a model that has {num_layers}",
                where="bert_score_layer",
                help=f"give a layer from 0 to {num_layers}, or leave it out",
            )
        self.name, self.layer = name, chosen
        self._model = _HiddenStates(model, chosen).eval().to(device)

    @staticmethod
    def load(name: str, layer: int | None = None, *, device: torch.device | str = "cpu") -> BertScore:
        """The one of this process, loaded when it is first asked for.

        Args:
            name: a folder or a name on the hub.
            layer: None: the layer published for a model of that name (the last part of a folder's path counts), else
                the last one.

        Raises:
            MissingDependencyError: bert-score is not installed.
            InputError: there is no such model, or it has no such layer.
        """
        with _LOADING:
            return _loaded(name, layer, str(device))

    def f1(self, texts: Sequence[str], wanted: Sequence[str]) -> list[float]:
        """F1 of each text against its reference; 0 where one of the two is blank, as bert-score has it."""
        scores = [0.0] * len(texts)
        # bert-score asks the tokenizer for an empty sequence by a method that transformers 5 has not.
        places = [at for at, pair in enumerate(zip(texts, wanted, strict=True)) if all(part.strip() for part in pair)]
        weights: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
        weights[self._tokenizer.sep_token_id] = weights[self._tokenizer.cls_token_id] = 0.0
        for start in range(0, len(places), PAIRS_PER_CALL):
            some = places[start : start + PAIRS_PER_CALL]
            found = self._score(
                self._model,
                [wanted[at] for at in some],
                [texts[at] for at in some],
                self._tokenizer,
                weights,
                batch_size=PAIRS_PER_BATCH,
                device=next(self._model.parameters()).device,
            )
            for at, score in zip(some, found[:, 2].tolist(), strict=True):
                scores[at] = min(score, 1.0)  # a cosine of float32 may be a little above
        return scores


@cache
def _loaded(name: str, layer: int | None, device: str) -> BertScore:
    return BertScore(name, layer, device=device)


class _HiddenStates(nn.Module):
    """An encoder that gives one layer's hidden states where bert-score looks for its output.

    bert-score itself would load the model by its name: it takes every path with `t5` in it for a T5 model, and keeps
    weights in the type of the file, which may be one that a CPU is slow in.
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model, self._layer = model, layer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor]:
        output = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return (output.hidden_states[self._layer],)


def _library() -> tuple[Any, dict[str, int]]:
    try:
        from bert_score.utils import bert_cos_score_idf, model2layers
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"BERTScore needs the package {error.name}", help=_INSTALL) from None
    return bert_cos_score_idf, model2layers


def _pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model for BERTScore cannot be had: {str(error).splitlines()[0]}",
            where=name,
            help="give the folder of an encoder such as roberta-large with its tokenizer, or leave bert_score_model"
            " out: BERTScore is then not measured",
        ) from None
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if tokenizer.pad_token_id is None:
        raise InputError(
            "the model's tokenizer has no padding token", where=name, help="take an encoder such as roberta-large"
        )
    # Where the tokenizer does not say how much the model reads, its library takes no limit, and bert-score hands that
    # on as a number that is too large. Two positions may be kept for padding, as RoBERTa does.
    positions = getattr(model.config, "max_position_embeddings", None) or 514
    tokenizer.model_max_length = min(tokenizer.model_max_length, max(positions - 2, 1))
    return model, tokenizer


def _published_layer(name: str, published: dict[str, int]) -> int | None:
    by_last_part = {known.rpartition("/")[2]: layer for known, layer in published.items()}
    return published.get(name, by_last_part.get(Path(name).name))
