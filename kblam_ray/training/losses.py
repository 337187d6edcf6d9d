"""The training loss of a batch, as sums and counts: those of all micro-batches and workers add up to the global mean.

next_token   cross-entropy of the answers' tokens, the end of the turn included; an unanswerable question's answer is
             the refusal (KBLaM, arXiv 2410.10450, section 4).
retrieval    cross-entropy of the share that the right facts have among the facts, at the retrieval layers, for the
             last prompt token and each answer token. Next-token loss alone hardly finds them: its gradient reaches the
             scores through values that say nothing yet.
refusal      binary cross-entropy of "the knowledge base answers" against the evidence `logsumexp(scores) - log M` at
             the last prompt token. That is the weight of the facts beside one imagined fact that scores
             `log M + margin` and stands for "none of them": where no fact applies none may score high, else one must.
divergence   KL(base model || with knowledge) at every token of texts in need of no fact.

Shape legend: B batch, T tokens, V vocabulary, W pairs of a token and a right fact, K tokens whose logits are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.projections import exact_dtype
from kblam_ray.errors import InputError, UnsupportedModelError
from kblam_ray.training.mix.batches import TrainingBatch
from kblam_ray.training.mix.settings import LossSettings
from kblam_ray.training.watching import FactWatcher

TERMS = ("next_token", "retrieval", "refusal", "divergence")
"""The order of the terms in every tensor here."""


@dataclass(frozen=True)
class Losses:
    """Sums and counts of the terms over some examples; the order is that of `TERMS`.

    Attributes:
        sums: [4], with gradients where autograd is on.
        counts: float64 [4]: answer tokens, weighted positions with a right fact, questions, text tokens.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.sums + other.sums, self.counts + other.counts)

    def detach(self) -> Losses:
        """The numbers alone."""
        return Losses(self.sums.detach(), self.counts)

    def objective(self, settings: LossSettings, counts: torch.Tensor | None = None) -> torch.Tensor:
        """What to go backwards from: each term's sum divided by its count, times its weight, added up.

        Args:
            counts: those of the whole global batch, see `loss_counts`; the gradients of all its micro-batches on all
                workers then add up (they are not averaged) to that of the global mean. None: these examples' own.
        """
        counts = self.counts if counts is None else counts
        weights = torch.tensor([getattr(settings, term) for term in TERMS], dtype=torch.float64)
        factors = weights.to(counts.device) / counts.clamp_min(1e-30)
        # A term without examples has the sum 0, and nothing must come of dividing it.
        factors = torch.where(counts > 0, factors, 0.0)
        return (self.sums * factors.to(self.sums)).sum()

    def means(self) -> dict[str, float]:
        """The mean of each term over these examples; a term without examples is left out."""
        pairs = zip(TERMS, self.sums.detach().double().tolist(), self.counts.tolist(), strict=True)
        return {term: total / count for term, total, count in pairs if count}


def loss_counts(batch: TrainingBatch, settings: LossSettings) -> torch.Tensor:
    """What each term of a batch is divided by, known before the model has run: float64 [4] on the batch's device.

    Add those of all micro-batches and workers, and give the sum to `Losses.objective`.
    """
    text_tokens = (batch.attention_mask_BT * batch.is_text_B[:, None]).sum()
    return torch.stack(
        [
            (batch.labels_BT[:, 1:] >= 0).sum().double(),
            _pair_weights(batch, settings).sum(),
            (~batch.is_text_B).sum().double(),
            text_tokens.double(),
        ]
    )


def training_loss(attachment: Attachment, batch: TrainingBatch, settings: LossSettings) -> Losses:
    """The losses of a batch, differentiable in the adapter.

    The base model runs once over all examples and makes logits for the tokens that count only; once more, without
    knowledge, over the texts. A term of weight 0 is not computed; its sum is 0.

    Args:
        attachment: of the adapter to a base model whose parameters want no gradient, so that nothing below the first KB
            layer is recorded.
        batch: on the model's device.

    Raises:
        InputError: a parameter of the base model wants a gradient.
        UnsupportedModelError: the base model has no language-model head.
    """
    base, adapter = attachment.base_model, attachment.adapter
    _check_frozen(base)
    length = batch.input_ids_BT.shape[1]
    is_text = batch.is_text_B[:, None].expand_as(batch.input_ids_BT)
    # The attention at a position writes the next token.
    has_label_BT = F.pad(batch.labels_BT[:, 1:] >= 0, (0, 1))
    answer_K = has_label_BT.flatten().nonzero().squeeze(1)
    text_K = (is_text & (batch.attention_mask_BT > 0)).flatten().nonzero().squeeze(1)
    if not settings.divergence:
        text_K = text_K[:0]
    last_B = torch.arange(len(batch), device=answer_K.device) * length + batch.answer_start_B - 1
    asked_b = (~batch.is_text_B).nonzero().squeeze(1)
    watcher = FactWatcher(
        tuple(adapter.config.retrieval_layers),
        batch.wanted_row_W * length + batch.wanted_at_W,
        batch.wanted_place_W,
        last_B[asked_b],
    )
    with attachment.using(batch.knowledge(adapter), watcher):
        logits_KV = _logits_at(base, batch.input_ids_BT, torch.cat([answer_K, text_K]))
    answer_logits_KV, text_logits_KV = logits_KV.split([len(answer_K), len(text_K)])
    labels_K = batch.labels_BT.flatten()[answer_K + 1]
    zero = logits_KV.new_zeros((), dtype=exact_dtype(logits_KV.dtype))
    sums = [
        _next_token(answer_logits_KV, labels_K) if settings.next_token else zero,
        _retrieval(watcher, batch, settings) if settings.retrieval else zero,
        _refusal(watcher, batch, asked_b, settings) if settings.refusal else zero,
        _divergence(base, batch, text_logits_KV) if len(text_K) else zero,
    ]
    return Losses(torch.stack([part.to(zero.dtype) for part in sums]), loss_counts(batch, settings))


def _next_token(logits_KV: torch.Tensor, labels_K: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_KV.to(exact_dtype(logits_KV.dtype)), labels_K, reduction="sum")


def _retrieval(watcher: FactWatcher, batch: TrainingBatch, settings: LossSettings) -> torch.Tensor:
    """Sum over positions of the divergence of the facts' shares from even parts for the right facts; mean of layers."""
    weight_W = _pair_weights(batch, settings)
    log_part_W = torch.log(batch.wanted_part_W)
    terms = [
        (weight_W.to(log_share_W) * (log_part_W.to(log_share_W) - log_share_W)).sum()
        for log_share_W in watcher.log_shares.values()
    ]
    return torch.stack(terms).mean()


def _pair_weights(batch: TrainingBatch, settings: LossSettings) -> torch.Tensor:
    """What each pair of a token and a right fact counts for: float64 [W]; those of one position add up."""
    is_last_W = batch.wanted_at_W == batch.answer_start_B[batch.wanted_row_W] - 1
    return batch.wanted_part_W * torch.where(is_last_W, settings.last_prompt_token, 1.0).double()


def _refusal(watcher: FactWatcher, batch: TrainingBatch, asked_b: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    log_size_B = torch.tensor([math.log(size) for size in batch.num_facts_B], dtype=torch.float64)
    log_size_b = log_size_B.to(asked_b.device)[asked_b]
    is_answered_b = (~batch.is_unanswerable_B)[asked_b]
    terms = []
    for log_sum_b in watcher.log_sums.values():
        evidence_b = log_sum_b - log_size_b.to(log_sum_b) - settings.refusal_margin
        target_b = is_answered_b.to(evidence_b)
        terms.append(F.binary_cross_entropy_with_logits(evidence_b, target_b, reduction="sum"))
    return torch.stack(terms).mean()


def _divergence(base: PreTrainedModel, batch: TrainingBatch, logits_KV: torch.Tensor) -> torch.Tensor:
    mask_bT = batch.attention_mask_BT[batch.is_text_B]
    with torch.no_grad():
        own_KV = _logits_at(base, batch.input_ids_BT[batch.is_text_B], mask_bT.flatten().nonzero().squeeze(1))
    exact = exact_dtype(logits_KV.dtype)
    own_KV, log_probs_KV = (F.log_softmax(logits.to(exact), -1) for logits in (own_KV, logits_KV))
    return F.kl_div(log_probs_KV, own_KV, reduction="sum", log_target=True)


def _check_frozen(base: PreTrainedModel) -> None:
    trained = next((name for name, parameter in base.named_parameters() if parameter.requires_grad), None)
    if trained is not None:
        raise InputError(
            "the base model is not frozen",
            where=trained,
            help="call `base_model.requires_grad_(False)`: only the adapter is trained",
        )


_WANTED: ContextVar[torch.Tensor | None] = ContextVar("kblam_ray_wanted_logits", default=None)


# One function for all calls, outside of compiled code, which may have taken it in and run it without looking again.
@torch.compiler.disable
def _pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    wanted_K = _WANTED.get()
    return None if wanted_K is None else (args[0].flatten(0, 1)[wanted_K][None], *args[1:])


@contextmanager
def _picking(base: PreTrainedModel, wanted_K: torch.Tensor) -> Iterator[None]:
    head = base.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            "the base model has no language-model head",
            where=type(base).__name__,
            help="give a model for causal language modelling",
        )
    handle = head.register_forward_pre_hook(_pick)
    token = _WANTED.set(wanted_K)
    try:
        yield
    finally:
        _WANTED.reset(token)
        handle.remove()


def _logits_at(base: PreTrainedModel, input_ids_BT: torch.Tensor, wanted_K: torch.Tensor) -> torch.Tensor:
    """The base model's logits [K, V] for some of the B * T tokens; the others' are never made.

    Without a mask: padding stands behind everything that is looked at, where causal attention does not see it.
    """
    with _picking(base, wanted_K):
        logits = base(input_ids=input_ids_BT, use_cache=False).logits
    if logits.shape[:2] == (1, len(wanted_K)):
        return logits[0]
    # A model that was compiled before the hook was there makes them all.
    return logits.flatten(0, 1)[wanted_K]
