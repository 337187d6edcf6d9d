"""What the last prompt token says of each fact, for many prompts in one forward pass.

The same as `attention.prompt_trace.retrieval_evidence` gives for one prompt. Shape legend: B prompts, T tokens of the
longest one, M facts, m facts of one block, N query heads, A rows of queries per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kblam_ray.attention import softmax
from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.batch import Attended
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.projections import exact_dtype
from kblam_ray.attention.prompt_trace import Evidence
from kblam_ray.attention.softmax import NO_FACTS
from kblam_ray.attention.trace import Looked, run_recorded, traced_layers
from kblam_ray.errors import InputError


def padded(
    prompts: Sequence[Sequence[int]], *, left: bool, pad_id: int = 0, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch: ids and attention mask, int64 [B, T], padded at the left or at the right."""
    length = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
        ids_BT[row, place] = torch.tensor(prompt)
        mask_BT[row, place] = 1
    return ids_BT.to(device), mask_BT.to(device)


@torch.no_grad()
def evidence_of(
    attachment: Attachment,
    prompts: Sequence[Sequence[int]],
    memories: Sequence[KnowledgeMemory],
    *,
    layers: Sequence[int] | None = None,
) -> list[Evidence]:
    """The evidence for each fact at the end of each prompt of a batch: retrieval scores, logits, the facts' weight.

    Args:
        prompts: token ids of each.
        memories: one per prompt, all with the same facts; priors may differ.
        layers: default the adapter's retrieval layers.

    Raises:
        InputError: memories of different facts, or another number of them.
    """
    first = memories[0] if memories else None
    if first is None or len(memories) != len(prompts) or any(one.facts_key != first.facts_key for one in memories):
        raise InputError(
            f"{len(memories)} memories for {len(prompts)} prompts, or not of the same facts",
            where="memories",
            help="give one per prompt, made of one memory by priors alone",
        )
    device = attachment.base_model.device
    ids_BT, mask_BT = padded(prompts, left=False, device=device)
    last_B = torch.tensor([row * ids_BT.shape[1] + len(prompt) - 1 for row, prompt in enumerate(prompts)])
    recorder = _LastTokens(traced_layers(attachment, layers), last_B.to(device), first)
    if first.num_facts:
        run_recorded(attachment, ids_BT, list(memories), recorder, mask_BT)
    return recorder.evidence()


class _LastTokens:
    """Adds up, over layers, what one token of every row says of each fact: a `batch.Recorder`."""

    def __init__(self, layers: tuple[int, ...], last_B: torch.Tensor, memory: KnowledgeMemory) -> None:
        self._layers, self._last_B, self._memory = layers, last_B, memory
        # Per view: retrieval scores and logits.
        self._sums = [torch.zeros(2, len(last_B), view.num_rows, device=memory.device) for view in memory.views]
        self._kb_share_B = torch.zeros(len(last_B), device=memory.device)

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        if layer not in self._layers:
            return
        for part in attended.groups:
            looked = Looked(part, self._last_B)
            # Both ascend, row by row.
            rows_b = torch.searchsorted(self._last_B, looked.tokens)
            self._kb_share_B[rows_b] += weight_TN[looked.tokens].mean(1).to(self._kb_share_B.dtype)
            self._add(looked, rows_b)

    def _add(self, looked: Looked, rows_b: torch.Tensor) -> None:
        num_rows_A, num_tokens = looked.lse_At.shape
        lse_Ab1 = looked.lse_At.masked_fill(looked.lse_At == NO_FACTS, 0.0)[..., None]
        budget = softmax.SCORES_PER_BLOCK.get(self._last_B.device.type, softmax.SCORES_PER_BLOCK["cuda"])
        # Not larger blocks for fewer tokens: the form may be one that makes a block's keys, chosen for all the tokens.
        num_facts = max(1, budget // max(num_rows_A * num_tokens, softmax.ROWS_PER_BLOCK))
        for sums_2BM, (_, facts) in zip(self._sums, looked.facts(), strict=True):
            scale_M = facts.scale_M()
            for start in range(0, facts.num_rows, num_facts):
                block = slice(start, min(start + num_facts, facts.num_rows))
                keys, _ = facts.block(block)
                logits_Abm = torch.matmul(looked.query_AtD, keys.transpose(-1, -2))
                logits_Abm = logits_Abm.to(exact_dtype(logits_Abm.dtype))
                if looked.bias_At is not None:
                    logits_Abm += looked.bias_At[..., None].to(logits_Abm.dtype)
                if scale_M is not None:
                    logits_Abm *= scale_M[block].to(logits_Abm.dtype)
                logits_bm = logits_Abm.mean(0)
                log_weights = facts.log_weights(block, slice(0, num_tokens))
                if log_weights is not None:
                    logits_bm.masked_fill_(log_weights.expand_as(logits_bm) == NO_FACTS, NO_FACTS)
                    logits_Abm += log_weights
                sums_2BM[1, rows_b, block] += logits_bm
                sums_2BM[0, rows_b, block] += logits_Abm.sub_(lse_Ab1).exp_().mean(0)

    def evidence(self) -> list[Evidence]:
        live = [
            sums if view.positions is not None else view.live_rows(sums, 2)
            for sums, view in zip(self._sums, self._memory.views, strict=True)
        ]
        means_2BM = torch.cat([*live, torch.zeros(2, len(self._last_B), 0, device=self._memory.device)], 2)
        means_2BM /= len(self._layers)
        kb_shares = (self._kb_share_B / len(self._layers)).tolist()
        return [
            Evidence(scores_M, logits_M, kb_share)
            for scores_M, logits_M, kb_share in zip(*means_2BM, kb_shares, strict=True)
        ]
