"""What one rank does: take the newest checkpoint, train to the end or until asked to stop, save on the way.

All ranks do the same steps. What only the first one does (write checkpoints, evaluate, say how it goes) the others wait
for, and hear of its failure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import TrainingError
from kblam_ray.model.base_model import load_base_model
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.training.checkpoints import CheckpointStore
from kblam_ray.training.loop.deepspeed_config import clipping_of, completed, read_deepspeed_config
from kblam_ray.training.loop.engines import DataParallel, Engine, Zero, adamw, parameter_groups
from kblam_ray.training.loop.module import TrainedModel, checkpoint_activations, compile_layers
from kblam_ray.training.loop.plan import RunPlan
from kblam_ray.training.loop.ranks import AgreedError, Ranks
from kblam_ray.training.loop.reports import Board
from kblam_ray.training.loop.schedule import learning_rate
from kblam_ray.training.loop.small_evaluation import held_out_figures
from kblam_ray.training.loop.state import TrainingState, random_state, restore_random_state, seed_everything
from kblam_ray.training.losses import TERMS, loss_counts
from kblam_ray.training.mix.batches import Share, TrainingBatch, batches, dataset
from kblam_ray.training.mix.examples import ExampleMaker
from kblam_ray.training.mix.streaming import stream_examples
from kblam_ray.training.mix.texts import read_texts

ASK_EVERY_S = 1.0
"""How often the first rank asks whether to stop."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """How a rank's work ended: steps done, and whether it was stopped before the last one."""

    step: int
    was_stopped: bool


def train_rank(plan: RunPlan, ranks: Ranks, board: Board, report: Report | None = None) -> Outcome:
    """Train from the newest checkpoint on.

    Args:
        plan: the run; there is a checkpoint of step 0 at least.
        ranks: who else trains.
        board: hears the first rank.
        report: called on every rank with the figures of each logged step, for trackers that listen through Ray.

    Raises:
        AgreedError: on every rank: the loss is not a number, or a checkpoint cannot be written.
        KblamError: this rank cannot go on.
    """
    return _Run(plan, ranks, board, report or (lambda figures: None)).train()


class _Run:
    def __init__(self, plan: RunPlan, ranks: Ranks, board: Board, report: Report) -> None:
        self.plan, self.ranks, self.board, self.report = plan, ranks, board, report
        self.settings = plan.settings
        self.store = CheckpointStore(plan.checkpoints, self.settings.keep)
        self.state = self._restore()
        self.step = self.state.step
        self.base_model, self.tokenizer = base_model_of(plan, ranks.device)
        self.facts = plan.facts()
        chat = ChatTemplate(self.tokenizer, self.state.config.chat_template)
        texts = read_texts(self.settings.mix.text_input) if self.settings.mix.text_input else ()
        self.maker = ExampleMaker(
            self.facts, chat, self.settings.mix, refusal=self.state.config.refusal_text, texts=texts
        )
        self.engine = self._engine()
        self._asked_at = -math.inf
        if self.state.optimizer:
            self.engine.load_optimizer_state(self.state.optimizer, self.step)
        self._restore_random_state()

    def _restore(self) -> TrainingState:
        # The first rank looks, so that all of them begin with the same one.
        found = self.ranks.first_does(self.store.newest)
        if found is None:
            raise TrainingError(
                "there is no complete checkpoint to begin with",
                where=self.store.uri,
                help="begin anew: give another --output",
            )
        with found.folder() as folder:
            return TrainingState.read(folder)

    def _restore_random_state(self) -> None:
        states = self.state.random_states
        if self.ranks.rank < len(states) and states[self.ranks.rank]:
            restore_random_state(states[self.ranks.rank])
        else:
            seed_everything(self.settings.seed, self.ranks.rank)

    def _engine(self) -> Engine:
        settings = self.settings
        adapter = KnowledgeAdapter.of_tensors(
            self.state.config, self.state.tensors, device=self.ranks.device, dtype=torch.float32
        )
        if settings.checkpoint_activations:
            checkpoint_activations(self.base_model)
        if settings.compile:
            compile_layers(self.base_model)
        is_zero = settings.strategy != "ddp"
        module = TrainedModel(self.base_model, adapter, settings.losses, touch_all=is_zero)
        optimizer = adamw(parameter_groups(adapter, settings.value_rate), settings.weight_decay, settings.betas)
        clipping = clipping_of(settings.strategy, settings.gradient_clipping)
        if not is_zero:
            return DataParallel(module, adapter, optimizer, clipping)
        config = completed(
            read_deepspeed_config(settings.strategy),
            micro_batch_size=settings.mix.batch_size // (self.ranks.world_size * self._accumulation),
            accumulation=self._accumulation,
            clipping=clipping,
        )
        return Zero(module, adapter, optimizer, config)

    @property
    def _accumulation(self) -> int:
        return self.settings.accumulation

    def train(self) -> Outcome:
        saved = self.step
        steps = self._batches()
        while self.step < self.settings.steps:
            started = time.monotonic()
            micro_batches = next(steps)
            wants_stop = self._take_step(micro_batches, started)
            is_last = self.step == self.settings.steps
            if is_last or wants_stop or self.step % self.settings.checkpoint_every == 0:
                self._save()
                saved = self.step
            if self.settings.evaluate_every and not is_last and self.step % self.settings.evaluate_every == 0:
                self._evaluate()
            if wants_stop:
                return Outcome(self.step, was_stopped=not is_last)
        assert saved == self.step
        return Outcome(self.step, was_stopped=False)

    def _batches(self) -> Iterator[list[TrainingBatch]]:
        """This rank's micro-batches of each step that is left."""
        settings, device = self.settings, self.ranks.device
        # As facts are kept beside such a model when it is asked.
        dtype = torch.bfloat16 if self.base_model.dtype == torch.bfloat16 else None
        share = Share(self.ranks.rank, self.ranks.world_size, self._accumulation)
        if not settings.num_example_workers:
            yield from batches(self.maker, self.step, settings.steps, share, device=device, dtype=dtype)
            return
        rows = dataset(self.maker, self.step, settings.steps, share, num_workers=settings.num_example_workers)
        per_micro_batch = settings.mix.batch_size // (self.ranks.world_size * self._accumulation)
        stream = stream_examples(rows, per_micro_batch, prefetch=2 * self._accumulation)
        for _ in range(self.step, settings.steps):
            yield [
                TrainingBatch.collate(next(stream), self.maker, device=device, dtype=dtype)
                for _ in range(self._accumulation)
            ]

    def _take_step(self, micro_batches: list[TrainingBatch], started: float) -> bool:
        """One optimizer step; whether the driver asks to stop."""
        settings = self.settings
        counted = torch.stack([loss_counts(batch, settings.losses) for batch in micro_batches]).sum(0)
        counts = self.ranks.add_up(counted)
        sums = torch.zeros_like(counts)
        for number, batch in enumerate(micro_batches, start=1):
            loss, part = self.engine(batch, counts)
            sums += part
            self.engine.backward(loss, is_last=number == len(micro_batches))
        num_tokens = sum(int(batch.attention_mask_BT.sum()) for batch in micro_batches)
        told = torch.cat([sums, sums.new_tensor([num_tokens, self._is_asked_to_stop()])])
        totals = self.ranks.add_up(told).tolist()
        figures = self._figures(totals[: len(TERMS)], counts.tolist())
        if not math.isfinite(figures["loss"]):
            raise self._not_a_number(f"the loss is {figures['loss']}: {figures}")
        rate = learning_rate(
            self.step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            last=settings.last_learning_rate,
        )
        norm = self.engine.step(rate)
        if not math.isfinite(norm):
            raise self._not_a_number("the gradient is not finite")
        self.step += 1
        seconds = time.monotonic() - started
        figures |= {"learning_rate": rate, "gradient_norm": norm, "tokens_per_s": totals[-2] / seconds}
        if self.step % settings.log_every == 0 or self.step in (1, settings.steps):
            if self.ranks.is_first:
                self.board.post({"kind": "step", "step": self.step, **figures, "seconds": seconds})
            self.report({"step": self.step, **figures})
        return totals[-1] > 0

    def _figures(self, sums: list[float], counts: list[float]) -> dict[str, float]:
        means = {term: total / count for term, total, count in zip(TERMS, sums, counts, strict=True) if count}
        loss = sum(getattr(self.settings.losses, term) * mean for term, mean in means.items())
        return {"loss": loss, **means}

    def _not_a_number(self, what: str) -> AgreedError:
        return AgreedError(
            TrainingError(
                f"step {self.step + 1}: {what}",
                where=self.plan.settings.output,
                help=f"the checkpoints up to step {self.step} are whole; try a smaller --learning-rate, a longer"
                " --warmup-steps or --dtype float32",
            )
        )

    def _is_asked_to_stop(self) -> bool:
        if not self.ranks.is_first or time.monotonic() < self._asked_at + ASK_EVERY_S:
            return False
        self._asked_at = time.monotonic()
        return self.board.wants_stop()

    def _save(self) -> None:
        state = TrainingState(
            config=self.state.config,
            tensors=self.engine.adapter_tensors(self.ranks.is_first),
            optimizer=self.engine.optimizer_state(self.ranks.is_first),
            step=self.step,
            run=self.state.run,
            random_states=self.ranks.gather(random_state()),
            notes=self.state.notes,
        )
        made = self.ranks.first_does(lambda: self.store.save(self.step, state.write))
        if self.ranks.is_first:
            self.board.post({"kind": "checkpoint", "step": self.step, "uri": made.uri})

    def _evaluate(self) -> None:
        tensors = self.engine.adapter_tensors(self.ranks.is_first)

        def evaluate() -> dict[str, float]:
            adapter = KnowledgeAdapter.of_tensors(self.state.config, tensors, device=self.ranks.device)
            return held_out_figures(self.base_model, self.tokenizer, adapter, self.facts, self.settings)

        before = random_state()
        figures = self.ranks.first_does(evaluate)
        restore_random_state(before)
        if self.ranks.is_first:
            self.board.post({"kind": "evaluation", "step": self.step, **figures})
        self.report({"step": self.step, **{f"held_out/{name}": figure for name, figure in figures.items()}})


def base_model_of(plan: RunPlan, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model of a run and its tokenizer."""
    model, tokenizer = load_base_model(plan.base_model, device, plan.settings.dtype)
    return model.requires_grad_(False), tokenizer
