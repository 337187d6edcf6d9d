"""Pretrain the demo's base model: next-token loss on answers, and a throw-away head that must say what is asked.

A small model answers from the last token or two of a name, so that no place of it holds the whole question, and nothing
could be found from there. The head maps the state that the last layer's attention receives into the sentence encoder's
space, where it must choose the key of the fact asked for among a thousand others. It is not saved: what remains is a
plain LlamaForCausalLM.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kblam_ray.demo.pretraining.batches import MicroBatch, Step, Steps
from kblam_ray.demo.pretraining.prepare import prepare
from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.demo.pretraining.wiring import MEANING_SHARE, token_meanings, wire
from kblam_ray.errors import TrainingError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.questions import QuestionKind, QuestionMaker

WIRING_MIX: dict[QuestionKind, float] = {"simple": 0.7, "paraphrase": 0.2, "misspelt": 0.1}
REPORT_STEPS = 25
WIRED_AT_A_TIME = 2_000
HEAD_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Scales of the throw-away head tried at the start."""


class Pretraining:
    """Model, head and optimizer, and where they stand."""

    def __init__(self, settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase, keys_MP: np.ndarray) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.tokenizer = settings, tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = _model(settings, tokenizer).to(self.device).train()  # type: ignore[arg-type]
        sample_MP = np.asarray(keys_MP[:20_000], np.float32)
        self._mean_P = torch.from_numpy(sample_MP.mean(0)).to(self.device)
        self._scale = float(sample_MP.std(0).mean())
        self._keys_MP = keys_MP
        self.head = nn.Linear(settings.hidden_size, keys_MP.shape[1]).to(self.device)
        nn.init.normal_(self.head.weight, std=0.02 / math.sqrt(keys_MP.shape[1]))
        matrices = [weight for weight in self._parameters() if weight.dim() > 1]
        others = [weight for weight in self._parameters() if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0
        self.model.model.layers[-1].input_layernorm.register_forward_hook(self._keep_state)

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.head.parameters()]

    def _keep_state(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        self._state_BTX = output

    def learn(self, step: Step) -> dict[str, float]:
        """One optimizer step; the losses and how often the head was right."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(self.step, self.settings)
        keys_CP = self._candidates(step)
        weight = sum(float(batch.weights_A.sum()) for batch in step.micro_batches)
        num_asked = sum(len(batch.asked_Q) for batch in step.micro_batches)
        totals = {"loss": 0.0, "meaning": 0.0, "right": 0.0, "copied": 0.0}
        for batch in step.micro_batches:
            found = self._losses(batch, keys_CP, step.candidates_C)
            loss = found["loss"] / weight + self.settings.meaning_weight * found["meaning"] / max(1, num_asked)
            loss.backward()
            for name in totals:
                totals[name] += float(found[name].detach())
        norm = nn.utils.clip_grad_norm_(self._parameters(), self.settings.gradient_clipping)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {self.step} is not finite",
                where="pretraining",
                help="lower --learning-rate and go on from the last checkpoint with --resume",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += step.num_tokens
        answers = sum(len(batch.targets_A) for batch in step.micro_batches)
        return {
            "loss": totals["loss"] / weight,
            "meaning": totals["meaning"] / max(1, num_asked),
            "found": totals["right"] / max(1, num_asked),
            "next_token": totals["copied"] / answers,
        }

    def _losses(self, batch: MicroBatch, keys_CP: torch.Tensor, candidates_C: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            output = self.model.model(
                input_ids=batch.input_ids_BT.to(self.device),
                attention_mask=batch.mask_BT.to(self.device),
                use_cache=False,
            )
            hidden_AX = output.last_hidden_state.flatten(0, 1)[batch.answer_rows_A]
            logits_AV = self.model.lm_head(hidden_AX)
            query_QP = self.head(self._state_BTX.flatten(0, 1)[batch.asked_rows_Q])
            scores_QC = query_QP @ keys_CP.T.to(query_QP.dtype)
        targets_A = batch.targets_A.to(self.device)
        loss_A = nn.functional.cross_entropy(logits_AV.float(), targets_A, reduction="none")
        places = {number: place for place, number in enumerate(candidates_C.tolist())}
        wanted_Q = torch.tensor([places[number] for number in batch.asked_Q.tolist()], dtype=torch.long).to(self.device)
        meaning = nn.functional.cross_entropy(scores_QC.float(), wanted_Q, reduction="sum")
        with torch.no_grad():
            right = (scores_QC.argmax(1) == wanted_Q).sum()
            copied = (logits_AV.argmax(1) == targets_A).sum()
        loss = (loss_A * batch.weights_A.to(self.device)).sum()
        return {"loss": loss, "meaning": meaning, "right": right, "copied": copied}

    def wire(self, facts: list[Fact]) -> None:
        """Start in closed form, see `wiring.py`; the head's scale is the one at which it says best what is asked."""
        settings = self.settings
        meaning = int(settings.hidden_size * MEANING_SHARE)
        found = token_meanings(self._asked(facts), self.model.config.vocab_size, len(self._mean_P), meaning)
        wire(self.model, self.head, found)
        start_PX = self.head.weight.detach().clone()
        steps = Steps(facts, self.tokenizer, settings, 0)
        losses = {}
        for scale in HEAD_SCALES:
            with torch.no_grad():
                self.head.weight.copy_(scale * start_PX)
                losses[scale] = self._meaning_loss(steps[0])
        with torch.no_grad():
            self.head.weight.copy_(min(losses, key=losses.__getitem__) * start_PX)
        print(f"pretrain_demo: wired; the head's loss by its scale: {losses}", file=sys.stderr)

    def _asked(self, facts: list[Fact]) -> Iterator[tuple[list[list[int]], np.ndarray]]:
        """Token ids of questions and the keys they ask for, less the keys' mean."""
        maker = QuestionMaker(facts, self.settings.seed)
        number_of = {(fact.entity, fact.property): number for number, fact in enumerate(facts)}
        mean_P = self._mean_P.cpu().numpy()
        for start in range(0, self.settings.wiring_questions, WIRED_AT_A_TIME):
            stop = min(start + WIRED_AT_A_TIME, self.settings.wiring_questions)
            questions = list(maker.questions(start, stop, WIRING_MIX))
            encodings = self.tokenizer.backend_tokenizer.encode_batch([question.text for question in questions])
            asked = [number_of[question.asked[0]] for question in questions]
            keys_QP = self._keys_MP[asked].astype(np.float32) - mean_P
            yield [encoding.ids for encoding in encodings], keys_QP

    def _meaning_loss(self, step: Step) -> float:
        keys_CP = self._candidates(step)
        return sum(float(self._losses(batch, keys_CP, step.candidates_C)["meaning"]) for batch in step.micro_batches)

    def _candidates(self, step: Step) -> torch.Tensor:
        keys_CP = torch.from_numpy(self._keys_MP[step.candidates_C.numpy()].astype(np.float32)).to(self.device)
        return (keys_CP - self._mean_P) / self._scale

    def save(self, folder: Path) -> None:
        """A checkpoint to go on from, and the model of this moment as `model/`; both appear whole or not at all."""
        state = {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "settings": json.dumps(self.settings.model_dump()),
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = folder / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, folder / "checkpoint.pt")
        self.write_model(folder / "model")

    def write_model(self, place: Path) -> None:
        """The base model in bfloat16 and its tokenizer, as transformers reads them."""
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model: Any = LlamaForCausalLM(self.model.config)
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(partial, place)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingError: there is none, or it is of a model of another shape.
        """
        path = folder / "checkpoint.pt"
        if not path.exists():
            raise TrainingError("there is no checkpoint to go on from", where=str(path), help="leave out --resume")
        state = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
        except RuntimeError as error:
            raise TrainingError(
                f"the checkpoint is of another model: {error}",
                where=str(path),
                help="give the settings it was made with",
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.num_tokens, self.seconds = state["step"], state["num_tokens"], state["seconds"]


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Train, with checkpoints, and write `model/` into the output folder.

    Returns:
        What `jobs/pretrain_demo.py` reports.
    """
    facts, keys_MP, tokenizer = prepare(settings)
    folder = Path(settings.output)
    training = Pretraining(settings, tokenizer, keys_MP)
    if settings.resume:
        training.load(folder)
    elif settings.wired:
        training.wire(facts)
    steps = Steps(facts, tokenizer, settings, training.step)
    averages: dict[str, float] = {}
    started, before = time.monotonic(), training.seconds
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
        for step in DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=4):
            for name, value in training.learn(step).items():
                averages[name] = averages.get(name, value) * 0.95 + value * 0.05
            training.seconds = before + time.monotonic() - started
            if training.step % REPORT_STEPS == 0 or training.step == settings.steps:
                line = {"step": training.step, "tokens": training.num_tokens, "seconds": round(training.seconds, 1)}
                line |= {name: round(value, 4) for name, value in averages.items()}
                curve.write(json.dumps(line) + "\n")
                curve.flush()
                print(f"pretrain_demo: {json.dumps(line)}", file=sys.stderr)
            if training.step % settings.checkpoint_steps == 0:
                training.save(folder)
    training.save(folder)
    return {
        "output": str(folder / "model"),
        "parameters": sum(weight.numel() for weight in training.model.parameters()),
        "steps": training.step,
        "tokens": training.num_tokens,
        "train_seconds": round(training.seconds, 1),
        **{name: round(value, 4) for name, value in averages.items()},
    }


def _model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Short sequences: cheaper here than the fused operator.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def _schedule(step: int, settings: PretrainSettings) -> float:
    """Up, level, down: a training may be ended early by going on from a checkpoint with fewer steps."""
    rising = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    falling = min(1.0, (settings.steps - step) / (settings.decay_share * settings.steps))
    return min(rising, falling)
