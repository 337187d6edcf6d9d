"""What an answer costs in time and memory by size of the knowledge base: attention beside reading facts, and no facts.

    zero_shot     the base model reads the question
    attention     the same, and attends to all facts or to those selected
    in_context    the base model reads all facts, where they fit
    dense         it reads the five facts nearest by the cosine of their embeddings

Within a round each way takes its turn on one question, in an order that moves on from round to round, so that what else
the machine does strikes all alike; ratios are taken to the turn without facts of the same round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.benchmark.machine import Machine
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import InputError
from kblam_ray.evaluation.baselines.cosine import nearest
from kblam_ray.evaluation.baselines.prompts import InContext, Prompt, reading_prompt
from kblam_ray.evaluation.intervals import NOTHING, Estimate, bootstrap
from kblam_ray.evaluation.questions import Asked, drawn_rows
from kblam_ray.evaluation.task import Progress
from kblam_ray.facts.questions import QuestionMaker
from kblam_ray.model.asking import parse_selection
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.generation import trained_positions
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.model.planner import kv_cache_size
from kblam_ray.table.embedded import EmbeddedFacts

READ_FACTS = 5
"""Facts that `dense` reads."""

Name = tuple[str, str | None]
"""Way of answering, and the selection of attention."""

ZERO_SHOT: Name = ("zero_shot", None)


def measure_cost(
    model: KnowledgeModel,
    facts: EmbeddedFacts,
    sizes: Sequence[int],
    *,
    selections: Sequence[str] = ("all",),
    new_tokens: int = 16,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time to the first token and for each further one, and memory, of one question at a time.

    The first token takes reading the prompt, and before it what a request needs: embedding the question, the prior and
    the selection where the adapter or the selection has them; of `dense` embedding the question and the search. Turning
    text into tokens is left out of all ways. Further tokens are the most likely ones, the end of the turn passed over.
    The questions are the same for all sizes and ways.

    Args:
        model: with a tokenizer.
        facts: where the facts of each size are drawn from, embedded by the adapter's encoder.
        sizes: numbers of facts; 0 has none.
        selections: "all" or "similar:K", each a way of attending.
        new_tokens: tokens of each answer, the first one included.
        rounds: questions, after one that does not count.
        seed: of the facts drawn and the questions.
        progress: called with a line of text as the measuring goes on; None: silent.

    Returns:
        `new_tokens, rounds, threads, device, limit_tokens` (what the base model was made for, None if not said) and
        `points`, one per size and way: `way, selection, num_facts, fits, prompt_tokens` (of the longest prompt),
        `first_token_s, per_token_s` and their ratios to no facts `first_token_ratio, per_token_ratio` (each the median
        over rounds with its bootstrap interval; empty where the prompt does not fit), `knowledge_bytes` (the knowledge
        memory with what was derived from it; of `dense` keys and texts), `cache_bytes` (of the prompt in the base
        model's cache) and `load_s` (from embedded facts to the knowledge memory; None where there is none).

    Raises:
        InputError: no sizes, more facts wanted than there are, a selection or number that cannot be.
        EncoderMismatchError: the facts are not of the adapter's encoder.
        EncoderNotFoundError, EncoderError: questions must be embedded and cannot be.
        UnsupportedModelError: the base model's cache has no single shape.
    """
    _check(len(facts), sizes, selections, new_tokens, rounds)
    require_encoder(model.adapter.config, facts.encoder, where="facts")
    maker = QuestionMaker(facts.facts, seed)
    questions = [Asked.of(maker.make("simple", number)) for number in range(rounds + 1)]
    points: list[dict[str, Any]] = []
    modes = [(module, module.training) for module in model.base_model.modules()]
    model.base_model.eval()
    try:
        for num_facts in dict.fromkeys(sizes):
            rows = None if num_facts == len(facts) else drawn_rows(facts, num_facts, seed, lambda entity: True)
            chosen = facts if rows is None else facts.take(rows)
            points += _Size(model, chosen, questions, selections, new_tokens).measure(progress)
    finally:
        for module, is_training in modes:
            module.training = is_training
    return {
        "new_tokens": new_tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "limit_tokens": trained_positions(model),
        "points": points,
    }


def _check(most: int, sizes: Sequence[int], selections: Sequence[str], new_tokens: int, rounds: int) -> None:
    if not sizes or not selections:
        raise InputError("nothing to measure", where="cost", help="give at least one number of facts and one selection")
    if min(sizes) < 0 or max(sizes) > most:
        wrong = min(sizes) if min(sizes) < 0 else max(sizes)
        raise InputError(f"{wrong} facts of {most}", where="cost", help="ask for 0 or more, or embed more")
    for selection in selections:
        parse_selection(selection)
    if new_tokens < 2 or rounds < 1:
        raise InputError(
            f"{new_tokens} tokens in {rounds} rounds", where="cost", help="give at least 2 tokens and 1 round"
        )


@dataclass(frozen=True)
class _Turn:
    """Seconds of one answer."""

    first_s: float
    per_token_s: float
    prompt_tokens: int


class _Size:
    """All ways of answering at one size of the knowledge base.

    Args:
        questions: one that does not count, then one per round.
    """

    def __init__(
        self,
        model: KnowledgeModel,
        facts: EmbeddedFacts,
        questions: Sequence[Asked],
        selections: Sequence[str],
        new_tokens: int,
    ) -> None:
        self._model, self._facts, self._questions, self._new_tokens = model, facts, questions, new_tokens
        self._machine = Machine(str(model.device))
        dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else None
        self._load_s, self._memory = self._machine.seconds(
            lambda: memory_of(model.adapter, facts, device=model.device, dtype=dtype)
        )
        self._in_context = InContext.of(model, questions, facts.facts, new_tokens)
        self._ways: dict[Name, Callable[[int], _Turn]] = {ZERO_SHOT: self._zero_shot}
        for selection in dict.fromkeys(selections):
            self._ways["attention", selection] = self._attending(selection)
        self._ways["in_context", None] = self._reading_all
        self._ways["dense", None] = self._dense
        # Newer base models can leave out the logits of all tokens but the last, which nobody looks at.
        accepts = inspect.signature(model.base_model.forward).parameters
        self._options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepts else {})

    def measure(self, progress: Progress | None) -> list[dict[str, Any]]:
        """A point for each way."""
        turns: dict[Name, list[_Turn]] = {name: [] for name in self._ways}
        fits = self._in_context.prompts is not None
        names, rounds = [name for name in self._ways if fits or name[0] != "in_context"], len(self._questions) - 1
        for number in range(rounds + 1):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                turn = self._ways[name](number)
                if number:
                    turns[name].append(turn)
            if progress is not None and number:
                progress(f"{len(self._facts):,} facts, cost: round {number} of {rounds}")
        return [self._point(name, taken, turns[ZERO_SHOT]) for name, taken in turns.items()]

    def _point(self, name: Name, turns: Sequence[_Turn], bare: Sequence[_Turn]) -> dict[str, Any]:
        way, selection = name
        first_s, per_token_s = ([getattr(turn, part) for turn in turns] for part in ("first_s", "per_token_s"))
        bare_first_s, bare_per_token_s = ([getattr(turn, part) for turn in bare] for part in ("first_s", "per_token_s"))
        prompt_tokens = max((turn.prompt_tokens for turn in turns), default=self._in_context.num_tokens)
        cache_bytes = prompt_tokens * kv_cache_size(self._model.base_model.config, self._model.dtype)
        figures = {
            "first_token_s": _median(first_s),
            "per_token_s": _median(per_token_s),
            "first_token_ratio": _median(_ratios(first_s, bare_first_s)),
            "per_token_ratio": _median(_ratios(per_token_s, bare_per_token_s)),
        }
        return {
            "way": way,
            "selection": selection,
            "num_facts": len(self._facts),
            "fits": bool(turns),
            "prompt_tokens": prompt_tokens,
            **{part: figure.to_json() for part, figure in figures.items()},
            "knowledge_bytes": self._knowledge_bytes(way),
            "cache_bytes": cache_bytes,
            "load_s": round(self._load_s, 6) if way == "attention" else None,
        }

    def _knowledge_bytes(self, way: str) -> int:
        if way == "attention":
            return self._memory.nbytes
        if way != "dense":
            return 0
        texts = (text for fact in self._facts.facts for text in (fact.entity, fact.property, fact.value))
        return self._facts.keys_MP.nbytes + sum(len(text.encode()) for text in texts)

    def _zero_shot(self, number: int) -> _Turn:
        return self._answer(self._model.chat.render(self._questions[number].messages), None)

    def _attending(self, selection: str) -> Callable[[int], _Turn]:
        def turn(number: int) -> _Turn:
            messages = list(self._questions[number].messages)
            prompt = self._model.chat.render(messages)
            before_s, memory = self._machine.seconds(lambda: self._model.prepare(self._memory, messages, selection))
            return self._answer(prompt, memory, before_s)

        return turn

    def _reading_all(self, number: int) -> _Turn:
        assert self._in_context.prompts is not None
        return self._answer(self._in_context.prompts[number], None)

    def _dense(self, number: int) -> _Turn:
        question = self._questions[number]
        before_s, rows = self._machine.seconds(lambda: self._nearest(question))
        read = [self._facts.facts[row] for row in rows]
        return self._answer(reading_prompt(self._model, question, read, self._new_tokens), None, before_s)

    def _nearest(self, question: Asked) -> list[int]:
        prior = self._model.prior
        cosines_M = prior.cosines(self._memory, prior.question(question.messages))
        return nearest(cosines_M.cpu().numpy(), READ_FACTS)

    @torch.no_grad()
    def _answer(self, prompt: Prompt, memory: KnowledgeMemory | None, before_s: float = 0.0) -> _Turn:
        """Read the prompt and write `new_tokens` tokens.

        Args:
            before_s: what the request took before.
        """
        model = self._model
        ids_BT = torch.tensor([prompt], device=model.device)
        with nullcontext() if memory is None else model.attachment.using(memory):
            first_s, (cache, token_BT) = self._machine.seconds(lambda: self._step(ids_BT, None))
            rest_s, _ = self._machine.seconds(lambda: self._rest(token_BT, cache))
        return _Turn(before_s + first_s, rest_s / (self._new_tokens - 1), len(prompt))

    def _rest(self, token_BT: torch.Tensor, cache: Any) -> None:
        for _ in range(self._new_tokens - 1):
            cache, token_BT = self._step(token_BT, cache)

    def _step(self, ids_BT: torch.Tensor, cache: Any) -> tuple[Any, torch.Tensor]:
        output = self._model.base_model(input_ids=ids_BT, past_key_values=cache, **self._options)
        return output.past_key_values, output.logits[:, -1:].argmax(-1)


def _ratios(own_s: Sequence[float], bare_s: Sequence[float]) -> list[float]:
    return [own / bare for own, bare in zip(own_s, bare_s, strict=True)] if own_s else []


def _median(values: Sequence[float]) -> Estimate:
    """The median with its bootstrap interval; of one round it is that round."""
    if not values:
        return NOTHING
    numbers = np.asarray(values, np.float64)
    return bootstrap(lambda samples: np.median(numbers[samples], axis=1), len(numbers))
