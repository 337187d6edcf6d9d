"""The KB logits of every fact at the last prompt token, per layer and head, for several prompts in one pass.

Shape legend: B prompts, T tokens of the longest one, M facts, A rows of scores per token (query heads, or 1 where they
share a score).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.batch import Attended
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.projections import exact_dtype
from kblam_ray.attention.trace import Looked, run_recorded
from kblam_ray.evaluation.retrieval import padded


@torch.no_grad()
def prompt_logits(
    attachment: Attachment, prompts: Sequence[Sequence[int]], memory: KnowledgeMemory, pad_id: int
) -> dict[int, torch.Tensor]:
    """By KB layer float32 [B, A, M]: what a softmax over the facts gives retrieval scores from; a prior's part is in.

    Args:
        prompts: token ids of whole prompts.
        memory: whole, of one chunk: facts in the order of its rows.
    """
    device = attachment.base_model.device
    ids_BT, mask_BT = padded(prompts, left=False, pad_id=pad_id)
    length = ids_BT.shape[1]
    last_B = torch.tensor([row * length + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
    recorder = _LastLogits(last_B)
    run_recorded(attachment, ids_BT, memory, recorder, mask_BT.to(device))
    return recorder.logits


class _LastLogits:
    """Keeps one token's logits of every row, per layer: a `batch.Recorder`."""

    def __init__(self, last_B: torch.Tensor) -> None:
        self._last_B = last_B
        self.logits: dict[int, torch.Tensor] = {}

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        (part,) = attended.groups
        looked = Looked(part, self._last_B)
        ((_, facts),) = looked.facts()
        keys, _ = facts.block(slice(0, facts.num_rows))
        scores_ABM = torch.matmul(looked.query_AtD, keys.transpose(-1, -2))
        logits_ABM = scores_ABM.to(exact_dtype(scores_ABM.dtype))
        if looked.bias_At is not None:
            logits_ABM = logits_ABM + looked.bias_At[..., None].to(logits_ABM.dtype)
        scale_M = facts.scale_M()
        if scale_M is not None:
            logits_ABM = logits_ABM * scale_M.to(logits_ABM.dtype)
        log_weights = facts.log_weights(slice(0, facts.num_rows), slice(0, len(looked.tokens)))
        if log_weights is not None:
            logits_ABM = logits_ABM + log_weights
        self.logits[layer] = logits_ABM.transpose(0, 1).float()
