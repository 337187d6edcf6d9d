"""Before the first step and after the last: where the adapter begins, and what becomes of it in the end.

Both run where the model runs: in this process, or in a Ray task with a worker's devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.errors import TrainingError
from kblam_ray.evaluation.run import evaluate
from kblam_ray.facts.questions import REFUSAL
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.checkpoints import CheckpointStore
from kblam_ray.training.closed_form.calibrate import calibration
from kblam_ray.training.closed_form.fit import fit
from kblam_ray.training.loop.plan import RunPlan
from kblam_ray.training.loop.state import TrainingState
from kblam_ray.training.loop.worker import base_model_of
from kblam_ray.training.mix.examples import ExampleMaker
from kblam_ray.training.mix.texts import read_texts
from kblam_ray.training.settings import CLOSED_FORM, RANDOM

Say = Callable[[str], None]

_SAMPLE_KEYS = 4_096


def begin(plan: RunPlan, say: Say) -> None:
    """Write the checkpoint of step 0: the adapter that training starts from, fitted, random or given.

    Raises:
        EncoderMismatchError: the tables' encoder is not the given adapter's.
        AdapterMismatchError: that adapter was made for another shape of base model.
        AdapterError, InputError, UnsupportedModelError: settings or facts that an adapter cannot be made of.
        StorageError: the checkpoint cannot be written.
    """
    settings, started = plan.settings, time.monotonic()
    base_model, tokenizer = base_model_of(plan, torch.device(plan.device))
    template = settings.chat_template
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        template = "plain"
        say("the base model's tokenizer has no chat template: questions are put as `plain` text; see --chat-template")
    chat = ChatTemplate(tokenizer, template)
    facts = plan.facts()
    train, _ = facts.split(settings.mix.held_out, settings.mix.held_out_seed)
    notes: dict[str, Any] = {"num_facts": len(facts), "num_facts_held_out": len(facts) - len(train)}
    fields: dict[str, Any] = {
        "refusal_text": settings.refusal_text or REFUSAL,
        "chat_template": template,
        "training_kb_range": settings.mix.kb_size,
    }
    for name in ("kb_scale", "retrieval_layers"):
        if getattr(settings, name) is not None:
            fields[name] = getattr(settings, name)
    if settings.method == "train":
        # Whether examples can be made is known before minutes are spent on a fit.
        texts = read_texts(settings.mix.text_input) if settings.mix.text_input else ()
        ExampleMaker(facts, chat, settings.mix, texts=texts)
    if settings.start == CLOSED_FORM or settings.method == "closed-form":
        fitted = fit(
            base_model,
            chat,
            train,
            settings.closed_form,
            kind=settings.kind,
            kb_layers=settings.kb_layers,
            kb_layer_frequency=settings.kb_layer_frequency,
            base_source=plan.base_model,
            progress=say,
            **fields,
        )
        adapter = fitted.adapter
        notes["closed_form"] = fitted.report
    elif settings.start == RANDOM:
        sample_mP = torch.from_numpy(train.keys_MP[:_SAMPLE_KEYS]).float()
        adapter = KnowledgeAdapter.for_model(
            base_model,
            kind=settings.kind,
            encoder=EncoderRef.of(facts.encoder),
            kb_layers=settings.kb_layers,
            kb_layer_frequency=settings.kb_layer_frequency,
            sample_keys_MP=sample_mP if settings.kind == "shared" else None,
            seed=settings.seed,
            **fields,
        )
    else:
        adapter = KnowledgeAdapter.from_pretrained(settings.start, dtype=torch.float32)
        adapter.config.check_base(base_model.config)
        require_encoder(adapter.config, facts.encoder, where=", ".join(uri for uri, _ in plan.tables))
        # What was calibrated is calibrated anew; what it refuses with stays, unless another text is to be taught.
        kept: dict[str, Any] = {
            name: fields[name] for name in ("training_kb_range", "retrieval_layers") if name in fields
        }
        for name in ("refusal_text", "chat_template"):
            if getattr(settings, name) is not None:
                kept[name] = getattr(settings, name)
        adapter.configure(**kept)
    notes["seconds"] = {"start": round(time.monotonic() - started, 2)}
    state = TrainingState(
        config=adapter.config,
        tensors={name: tensor.detach().float().cpu() for name, tensor in adapter.state_dict().items()},
        optimizer={},
        step=0,
        run=plan.record(),
        random_states=[],
        notes=notes,
    )
    CheckpointStore(plan.checkpoints, settings.keep).save(0, state.write)


def finish(plan: RunPlan, say: Say) -> tuple[KnowledgeAdapter, dict[str, Any]]:
    """Calibrate and evaluate the adapter of the newest checkpoint.

    Returns:
        The adapter on the CPU, with its calibrated settings, and what is known of the run: `step`, `config`, the notes
        of its beginning, `calibration` and `evaluation`.

    Raises:
        TrainingError: there is no complete checkpoint.
        EncoderNotFoundError, EncoderError: the encoder must read questions and cannot be had.
    """
    settings = plan.settings
    newest = CheckpointStore(plan.checkpoints, settings.keep).newest()
    if newest is None:
        raise TrainingError("there is no complete checkpoint", where=plan.checkpoints, help="train again")
    with newest.folder() as folder:
        state = TrainingState.read(folder)
    found: dict[str, Any] = {**state.notes, "step": state.step}
    device = torch.device(plan.device)
    adapter = KnowledgeAdapter.of_tensors(state.config, state.tensors, device=device, dtype=torch.float32)
    if settings.calibrate or settings.evaluate:
        base_model, tokenizer = base_model_of(plan, device)
        model = KnowledgeModel(base_model, adapter, tokenizer)
        facts = plan.facts()
        seconds = found["seconds"] = dict(found.get("seconds", {}))
        if settings.calibrate:
            started = time.monotonic()
            held_out = _held_out(facts, plan)
            say(f"calibrating on {len(held_out)} held-out facts")
            calibrated = calibration(model, held_out, settings.calibration, progress=say)
            adapter.configure(**calibrated.settings)
            found["calibration"] = {"settings": calibrated.settings, **calibrated.report}
            seconds["calibration"] = round(time.monotonic() - started, 2)
        if settings.evaluate:
            started = time.monotonic()
            most = len(facts)
            sizes = sorted({min(size, most) for size in settings.evaluation.num_facts}) or [most]
            asked = settings.evaluation.model_copy(update={"num_facts": sizes})
            found["evaluation"] = evaluate(model, facts, asked, progress=say).summary()
            seconds["evaluation"] = round(time.monotonic() - started, 2)
        model.detach()
    return adapter.to("cpu"), found


def _held_out(facts: EmbeddedFacts, plan: RunPlan) -> EmbeddedFacts:
    """Facts that were not trained on, to calibrate with; all of them where none was held out."""
    _, out = facts.split(plan.settings.mix.held_out, plan.settings.mix.held_out_seed)
    return out if len(out) > 1 else facts
