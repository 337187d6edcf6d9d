"""The closed-form fit: an adapter for a frozen model from forward passes and ridge regressions, without a gradient.

Shape legend: M facts, L KB layers, P encoder dim, X hidden size, N query heads.

1. Passes over questions with their answers, without a knowledge base, into sufficient statistics (`collect.py`), in
   this process or on Ray workers; passes over a few questions about held-out entities, kept as they are.
2. Per layer the query that ranks the asked fact's key first (`discriminant.py`). Where no KB layers are given, kind
   "shared" takes the layer where that does best on held-out questions, the retrieval layer, and the last ones, where
   decoders are receptive to a value; kind "paper" takes every third.
3. Values (`values.py`) and gates (`gates.py`), and the tensors of the kind that is wanted (`assemble.py`).
4. With the adapter attached and a knowledge base in place, the loss of held-out answers chooses the gates' margin and
   shift, the size of the values and how much of them is the first word.

For an 8-billion-parameter Llama, 4,000 questions of 60 tokens and eight candidate layers are 5 PFLOP: 4 minutes on one
GPU at 20 TFLOP/s; `operation_count` gives the figure for any model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.attention.adapter.initialise import settings_for
from kblam_ray.errors import InputError
from kblam_ray.facts.questions import REFUSAL, QuestionMaker
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.closed_form.assemble import Regressions, adapter_tensors
from kblam_ray.training.closed_form.collect import HeldOutRows, Passes, shares_of
from kblam_ray.training.closed_form.discriminant import HeldOutTask, Query, best_query, part_weights
from kblam_ray.training.closed_form.gates import MARGINS, SHIFTS, GateFit, expected_log_sum_exp, fit_gate, search
from kblam_ray.training.closed_form.held_out import HeldOutAnswers, held_out_facts
from kblam_ray.training.closed_form.positions import COPY, OTHER, PROMPT, VALUE, require_some
from kblam_ray.training.closed_form.settings import FIT_MIX, ClosedFormSettings
from kblam_ray.training.closed_form.statistics import Statistics, mean_and_covariance, with_one
from kblam_ray.training.closed_form.values import ValueFit, fit_values

Kind = Literal["shared", "paper"]
Progress = Callable[[str], None]

FIRST_SHARES = (0.0, 0.5, 1.0)
VALUE_SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class ClosedForm:
    """A fitted adapter and how it came about.

    Attributes:
        adapter: in evaluation mode, float32, on the base model's device.
        report: JSON-able: per candidate layer the held-out figures and the choices, the KB and retrieval layers, the
            gates' margin and shift, the held-out answers' loss with and without the knowledge base, counts, seconds.
    """

    adapter: KnowledgeAdapter
    report: dict[str, Any] = field(default_factory=dict)


def fit_closed_form(
    base_model: PreTrainedModel,
    chat: ChatTemplate | PreTrainedTokenizerBase,
    facts: EmbeddedFacts,
    settings: ClosedFormSettings | None = None,
    **choices: Any,
) -> KnowledgeAdapter:
    """The adapter of `fit`, which has all arguments and errors, without the report."""
    return fit(base_model, chat, facts, settings, **choices).adapter


def fit(
    base_model: PreTrainedModel,
    chat: ChatTemplate | PreTrainedTokenizerBase,
    facts: EmbeddedFacts,
    settings: ClosedFormSettings | None = None,
    *,
    kind: Kind = "shared",
    kb_layers: list[int] | None = None,
    kb_layer_frequency: int | None = None,
    base_source: str | None = None,
    progress: Progress | None = None,
    **adapter_settings: Any,
) -> ClosedForm:
    """Fit an adapter to a frozen model and its facts' encoder, in closed form.

    Args:
        base_model: frozen; nothing of it is changed.
        chat: its chat template, or its tokenizer.
        facts: what questions are made of; a share of the entities is held out, see `settings.held_out`.
        kind: of the adapter; `assemble.py` says what "paper" cannot express.
        kb_layers, kb_layer_frequency: at most one of the two; neither: chosen, see above.
        base_source: name or folder of the base model for Ray workers; None: they get a copy of `base_model`.
        progress: told what is being done.
        adapter_settings: further fields of `AdapterConfig`; a given `kb_scale` or `retrieval_layers` is kept.

    Raises:
        InputError: too few facts to hold some out, or a tokenizer that gives no answer back.
        AdapterError: settings that do not go together, or regressions that cannot be solved.
        UnsupportedModelError: the base model's attention cannot be merged with.
    """
    work = _Fit(base_model, chat, facts, settings or ClosedFormSettings(), kind, progress or (lambda text: None))
    return work.run(kb_layers, kb_layer_frequency, base_source, adapter_settings)


class _Fit:
    def __init__(
        self,
        base_model: PreTrainedModel,
        chat: ChatTemplate | PreTrainedTokenizerBase,
        facts: EmbeddedFacts,
        settings: ClosedFormSettings,
        kind: Kind,
        progress: Progress,
    ) -> None:
        self.model, self.settings, self.kind, self.progress = base_model, settings, kind, progress
        self.chat = chat if isinstance(chat, ChatTemplate) else ChatTemplate(chat)
        self.device = base_model.device
        self.train, self.held_out = facts.split(settings.held_out, settings.seed)
        if len(self.train) < 2 or not len(self.held_out):
            raise InputError(
                f"{len(self.train)} facts to fit on and {len(self.held_out)} held out",
                where="closed-form fit",
                help="give facts about more entities, made-up ones (--synthetic) among them, or another held_out share",
            )
        self.key_mean_P, covariance_PP = mean_and_covariance(self.train.keys_MP)
        self.key_covariance_PP = torch.from_numpy(covariance_PP).to(self.device)
        self.shape = BaseShape.of(base_model.config)
        self.has_one = kind == "shared"

    def run(
        self,
        kb_layers: list[int] | None,
        kb_layer_frequency: int | None,
        base_source: str | None,
        adapter_settings: dict[str, Any],
    ) -> ClosedForm:
        started = time.monotonic()
        given = self._given_config(kb_layers, kb_layer_frequency, adapter_settings)
        layers = given.layers if given is not None else self._candidates()
        statistics = self._statistics(layers, base_source, adapter_settings.get("refusal_text", REFUSAL))
        rows = self._rows(layers, adapter_settings.get("refusal_text", REFUSAL))
        passed = time.monotonic()
        kb = held_out_facts(self.held_out, self.train, rows, self.settings.kb_size, self.settings.seed)
        tasks = {layer: self._task(layer, rows, kb) for layer in layers}
        queries: dict[int, Query] = {}
        for layer in layers:
            queries[layer] = self._query(statistics, layer, tasks[layer])
            chosen = queries[layer].chosen
            self.progress(
                f"layer {layer}: the asked fact is first of {len(kb)} for {chosen.top_1:.1%} of the held-out questions"
            )
        retrieval = min(given.layers if given else layers, key=lambda layer: queries[layer].chosen.cross_entropy)
        config = self._config(given, retrieval, adapter_settings)
        values_MP = self.held_out.values_MP
        fits = {layer: fit_values(statistics, layer, rows, values_MP, self.device) for layer in config.layers}
        shift = 0.0
        if config.kb_scale is not None:
            shift = float(np.log(config.kb_scale) - np.log(len(kb)))
        gates = {layer: self._gate(statistics, layer, tasks[layer], queries[layer], shift) for layer in config.layers}
        solved = time.monotonic()
        answers = HeldOutAnswers(self.model, self.chat, kb, rows.asked[: self.settings.num_gate_questions])
        adapter, searched = self._search(statistics, config, queries, fits, gates, answers, adapter_settings)
        report = {
            "kind": self.kind,
            "kb_layers": list(config.layers),
            "retrieval_layers": list(config.retrieval_layers),
            "candidates": {layer: queries[layer].chosen.described() for layer in layers},
            "values_explained": {layer: [round(share, 4) for share in fits[layer].explained] for layer in fits},
            **searched,
            "num_facts": len(self.train),
            "num_held_out_facts": len(self.held_out),
            "num_questions": statistics.num_questions,
            "num_unreadable": statistics.num_unreadable,
            "num_tokens": statistics.num_tokens,
            "seconds": {
                "passes": round(passed - started, 2),
                "regressions": round(solved - passed, 2),
                "gates": round(time.monotonic() - solved, 2),
            },
        }
        return ClosedForm(adapter, report)

    def _candidates(self) -> tuple[int, ...]:
        """Layers tried: evenly spread, the last ones among them."""
        num_layers, most = self.shape.num_layers, self.settings.max_candidate_layers
        first_last = max(0, num_layers - self.settings.num_value_layers)
        spread = np.linspace(0, num_layers - 1, min(most, num_layers)).round().astype(int).tolist()
        return tuple(sorted({*spread, *range(first_last, num_layers)}))

    def _passes(self, facts: EmbeddedFacts, layers: tuple[int, ...], refusal: str) -> Passes:
        mix = shares_of(QuestionMaker(facts.facts, self.settings.seed), self.settings.question_mix, FIT_MIX)
        if not any(share for kind, share in mix.items() if kind != "unanswerable"):
            raise InputError(
                "only questions without an answer to fit to", where="question_mix", help="ask answerable ones too"
            )
        return Passes(
            chat=self.chat,
            facts=facts,
            key_mean_P=self.key_mean_P,
            layers=layers,
            mix=mix,
            refusal=refusal,
            seed=self.settings.seed,
            block_questions=self.settings.block_questions,
            batch_tokens=self.settings.batch_tokens,
        )

    def _statistics(self, layers: tuple[int, ...], base_source: str | None, refusal: str) -> Statistics:
        passes, number = self._passes(self.train, layers, refusal), self.settings.num_questions
        self.progress(f"passes over {number} questions about {len(self.train)} facts")
        if self.settings.num_workers:
            from kblam_ray.training.closed_form.sharded import sharded_statistics

            found = sharded_statistics(
                passes,
                self.model,
                number,
                self.settings.num_workers,
                base_source=base_source,
                progress=self.progress,
            )
        else:
            found = passes.statistics(self.model, range(passes.num_blocks(number)), number)
        require_some(found.num_questions - found.num_unreadable, found.num_questions)
        return found

    def _rows(self, layers: tuple[int, ...], refusal: str) -> HeldOutRows:
        number = self.settings.num_held_out_questions
        rows = self._passes(self.held_out, layers, refusal).rows(self.model, number)
        require_some(len(rows.stated), number)
        return rows

    def _task(self, layer: int, rows: HeldOutRows, kb: EmbeddedFacts) -> HeldOutTask:
        keys_MP = torch.from_numpy(np.asarray(kb.keys_MP, np.float64) - self.key_mean_P).to(self.device)
        place = {(fact.entity, fact.property): at for at, fact in enumerate(kb.facts)}
        hidden, wanted = {}, {}
        for part in (OTHER, PROMPT, COPY, VALUE):
            found = rows.hidden.get((layer, part))
            hidden[part] = keys_MP.new_empty(0, self.shape.hidden_size + 1) if found is None else with_one(found)
            if part != OTHER:
                facts = [self.held_out.facts[number] for number in rows.facts.get(part, ())]
                places = [place[fact.entity, fact.property] for fact in facts]
                wanted[part] = torch.tensor(places, dtype=torch.int64, device=self.device)
        return HeldOutTask(keys_MP, hidden, wanted, PROMPT, VALUE)

    def _query(self, statistics: Statistics, layer: int, task: HeldOutTask) -> Query:
        return best_query(
            statistics,
            layer,
            task,
            self.key_covariance_PP,
            prompt_shares=self.settings.prompt_shares,
            ridges=self.settings.ridges,
            shrinkages=self.settings.shrinkages,
            key_shares=self.settings.key_shares,
            others=(COPY, VALUE),
            with_bias=self.has_one,
        )

    def _gate(self, statistics: Statistics, layer: int, task: HeldOutTask, query: Query, shift: float) -> GateFit:
        scores = {part: task.scores(query.weight_PX, part) for part in (OTHER, PROMPT, COPY, VALUE)}
        expected = expected_log_sum_exp(scores, shift)
        return fit_gate(statistics, layer, expected, self.device, has_one=self.has_one)

    def _given_config(
        self, kb_layers: list[int] | None, kb_layer_frequency: int | None, adapter_settings: dict[str, Any]
    ) -> AdapterConfig | None:
        """The settings with the KB layers that are given; None where they are to be found."""
        if kb_layers is None and kb_layer_frequency is None and self.kind == "shared":
            if "retrieval_layers" in adapter_settings:
                raise InputError(
                    "retrieval layers without KB layers", where="retrieval_layers", help="give kb_layers as well"
                )
            return None
        return self._made_config(kb_layers, kb_layer_frequency, adapter_settings)

    def _config(self, given: AdapterConfig | None, retrieval: int, adapter_settings: dict[str, Any]) -> AdapterConfig:
        if given is None:
            num_layers = self.shape.num_layers
            last = range(max(0, num_layers - self.settings.num_value_layers), num_layers)
            given = self._made_config(sorted({retrieval, *last}), None, adapter_settings)
        if "retrieval_layers" in adapter_settings:
            return given
        return given.changed(retrieval_layers=[retrieval])

    def _made_config(
        self, kb_layers: list[int] | None, kb_layer_frequency: int | None, adapter_settings: dict[str, Any]
    ) -> AdapterConfig:
        encoder = EncoderRef.of(self.train.encoder)
        made = {
            "refusal_text": REFUSAL,
            "training_kb_range": (self.settings.kb_size, self.settings.kb_size),
            **adapter_settings,
        }
        return settings_for(self.model, self.kind, encoder, None, kb_layer_frequency, kb_layers, None, made)

    def _search(
        self,
        statistics: Statistics,
        config: AdapterConfig,
        queries: dict[int, Query],
        fits: dict[int, ValueFit],
        gates: dict[int, GateFit],
        answers: HeldOutAnswers,
        adapter_settings: dict[str, Any],
    ) -> tuple[KnowledgeAdapter, dict[str, Any]]:
        squares = {}
        for layer in config.layers if self.kind == "paper" else ():
            share = queries[layer].chosen.prompt_share
            weights = part_weights(statistics, share, PROMPT, (COPY, VALUE))
            squares[layer] = statistics.weighted("hidden", layer, weights)[:-1, :-1].to(self.device)
        # The paper's form has no bias that could shift its gates: there, C does it.
        with_scale = self.kind == "paper" and "kb_scale" not in adapter_settings

        def made(chosen: dict[str, float]) -> KnowledgeAdapter:
            found = Regressions(
                key_mean_P=torch.from_numpy(self.key_mean_P).to(self.device),
                key_scale=max(self.key_covariance_PP.diagonal().mean().sqrt().item(), 1e-6),
                key_covariance_PP=self.key_covariance_PP,
                queries={layer: queries[layer].weight_PX for layer in config.layers},
                hidden_squares=squares,
                values={
                    layer: fits[layer].weight(chosen["first_share"], self.shape.num_heads, self.shape.head_dim)
                    for layer in config.layers
                },
            )
            weights = {layer: gates[layer].gate(chosen["margin"], chosen["shift"]) for layer in config.layers}
            settings = config
            if with_scale:
                settings = config.changed(kb_scale=answers.num_facts * float(np.exp(chosen["shift"])))
            tensors = adapter_tensors(settings, found, weights, chosen["value_scale"])
            return KnowledgeAdapter.of_tensors(settings, tensors, device=self.device, dtype=torch.float32)

        def loss(chosen: dict[str, float]) -> float:
            return answers.loss(made(chosen))

        grid = {
            "margin": MARGINS,
            "shift": SHIFTS if self.has_one or with_scale else (0.0,),
            "value_scale": VALUE_SCALES,
            "first_share": FIRST_SHARES,
        }
        start = {"margin": 8.0, "shift": 0.0, "value_scale": 1.0, "first_share": 0.5}
        chosen, least = search(loss, grid, start)
        bare = answers.loss(None)
        self.progress(f"loss of held-out answers: {least:.3f}; without the facts {bare:.3f}")
        return made(chosen), {"gates": chosen, "answer_loss": least, "answer_loss_without_facts": bare}
