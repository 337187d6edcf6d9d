"""How each answer's tokens are chosen, whatever else is in the batch: noise, nucleus, log probabilities.

The engine takes the largest number of each row. A row that was sampled has noise on it such that the largest number is
a sample of the row's distribution (the Gumbel-max way): exact, and the noise is drawn for a seed, a choice and a
position alone, so that an answer can be had again. Shape legend: R rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation.continuous_batching.requests import RequestState

HIDDEN = float("-inf")


@dataclass(frozen=True)
class Chosen:
    """The log probability of the token that was chosen, and the likeliest tokens with theirs, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class TokenChoice:
    """How one answer's tokens are chosen, and what is to be told about them.

    Attributes:
        num_prompt_tokens: of its prompt; the engine may put what was said behind it.
        seed: of all choices of a request; `choice` tells them apart.
        chosen: of every token, where `num_logprobs` is given; written by the engine's thread.
    """

    num_prompt_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    num_logprobs: int | None = None
    chosen: list[Chosen] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the engine's own choice, the likeliest token, is all that is wanted."""
        return self.temperature == 0 and self.num_logprobs is None


class Sampler:
    """Changes the logits of the rows that are sampled; see `attention.batching_parts.Choose`."""

    def __init__(self) -> None:
        self._choices: dict[str, TokenChoice] = {}
        self._lock = threading.Lock()

    def add(self, request_id: str, choice: TokenChoice) -> None:
        """From the request's first token on; nothing is done for one that is plain."""
        if not choice.is_plain:
            with self._lock:
                self._choices[request_id] = choice

    def remove(self, request_id: str) -> None:
        """The request is over."""
        with self._lock:
            self._choices.pop(request_id, None)

    def __call__(self, logits_RV: torch.Tensor, requests: Sequence[RequestState]) -> torch.Tensor:
        if not self._choices:
            return logits_RV
        with self._lock:
            found = [(row, self._choices.get(request.request_id)) for row, request in enumerate(requests)]
        told = [(row, choice) for row, choice in found if choice is not None and choice.num_logprobs is not None]
        # Before the noise: log probabilities are the model's own.
        logprobs_RV = torch.log_softmax(logits_RV[[row for row, _ in told]], -1) if told else logits_RV[:0]
        sampled = [
            (row, choice, len(request.initial_tokens) + request.generated_len() - choice.num_prompt_tokens)
            for (row, choice), request in zip(found, requests, strict=True)
            if choice is not None and choice.temperature > 0
        ]
        if sampled:
            rows = [row for row, _, _ in sampled]
            noisy_RV = logits_RV.clone()
            noisy_RV[rows] = _noisy(logits_RV[rows], [(choice, place) for _, choice, place in sampled])
            logits_RV = noisy_RV
        if told:
            tokens_R = logits_RV[[row for row, _ in told]].argmax(-1)
            _tell(logprobs_RV, tokens_R, [choice for _, choice in told])
        return logits_RV


def _noisy(logits_RV: torch.Tensor, choices: Sequence[tuple[TokenChoice, int]]) -> torch.Tensor:
    """Scaled by temperature, outside the nucleus hidden, and with the noise of each choice and position."""
    temperature_R1 = logits_RV.new_tensor([choice.temperature for choice, _ in choices])[:, None]
    # The largest first becomes 0: however low the temperature, it stays a number.
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1
    nuclear = [row for row, (choice, _) in enumerate(choices) if choice.top_p < 1]
    if nuclear:
        top_p_R1 = logits_RV.new_tensor([choices[row][0].top_p for row in nuclear])[:, None]
        scaled_RV[nuclear] = _nucleus(scaled_RV[nuclear], top_p_R1)
    generator = torch.Generator(logits_RV.device)
    exponential_RV = torch.empty_like(scaled_RV)
    for row, (choice, place) in enumerate(choices):
        generator.manual_seed(_seed(choice, place))
        exponential_RV[row].exponential_(generator=generator)
    return scaled_RV - exponential_RV.clamp_min_(torch.finfo(exponential_RV.dtype).tiny).log_()


def _nucleus(scaled_RV: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    """The logits of the likeliest tokens that together reach the probability, at least one; the others hidden."""
    sorted_RV, order_RV = torch.softmax(scaled_RV, -1).sort(stable=True, dim=-1, descending=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    is_outside_RV = before_RV >= top_p_R1
    is_outside_RV[:, 0] = False
    return scaled_RV.masked_fill(torch.zeros_like(is_outside_RV).scatter(-1, order_RV, is_outside_RV), HIDDEN)


def _tell(logprobs_RV: torch.Tensor, tokens_R: torch.Tensor, choices: Sequence[TokenChoice]) -> None:
    most = min(max(choice.num_logprobs or 0 for choice in choices), logprobs_RV.shape[1])
    top = logprobs_RV.topk(most, -1)
    of_chosen = logprobs_RV.gather(-1, tokens_R[:, None]).squeeze(-1).tolist()
    for choice, logprob, values, ids in zip(choices, of_chosen, top.values.tolist(), top.indices.tolist(), strict=True):
        pairs = tuple(zip(ids, values, strict=True))[: choice.num_logprobs]
        choice.chosen.append(Chosen(logprob, pairs))


def _seed(choice: TokenChoice, place: int) -> int:
    text = f"{choice.seed} {choice.choice} {place}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
