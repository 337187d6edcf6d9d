"""A training in one process: its result, how it is resumed, and what goes wrong by name."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kblam_ray import KnowledgeAdapter
from kblam_ray.errors import AdapterMismatchError, EncoderMismatchError, InputError, StorageError, TrainingError
from kblam_ray.table import KnowledgeBase
from kblam_ray.training import checkpoints
from kblam_ray.training.checkpoints import Checkpoint, CheckpointStore
from kblam_ray.training.loop import worker
from kblam_ray.training.loop.run import train
from kblam_ray.training.loop.state import TrainingState
from tests.model_samples import llama_tokenizer, phi_tokenizer, qwen_tokenizer, tiny_llama
from tests.training.loop_cases import losses, make_places, settings


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    summary = train(settings(places, output, keep=10))
    assert summary["steps"] == 6
    return output


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def test_the_result_is_an_adapter_with_a_card_and_no_base_model(whole, places):
    adapter = KnowledgeAdapter.from_pretrained(whole)
    assert adapter.config.layers == (1, 3)
    assert adapter.config.training_kb_range == (4, 12)
    assert adapter.dtype == torch.float32
    size = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    assert size < sum(file.stat().st_size for file in Path(places["base_model"]).glob("*.safetensors"))
    card = (whole / "README.md").read_text()
    for part in (f"`{places['kb'][0]}` | 0 |", "hashing:64", "learning_rate: 0.01", "| step | loss |", "6 optimizer"):
        assert part in card
    assert sorted(losses(whole)) == [1, 2, 3, 4, 5, 6]


def test_training_changes_every_kind_of_tensor(whole):
    with CheckpointStore(str(whole / "checkpoints")).newest().folder() as folder:
        after = TrainingState.read(folder).tensors
    before = load_file(whole / "checkpoints" / "step-00000000" / "adapter" / "adapter_model.safetensors")
    assert {name for name in after if torch.equal(after[name], before[name])} == {"key_mean", "key_scale"}


@pytest.mark.parametrize("at", [2, 4])
def test_resumed_it_goes_on_exactly(places, whole, tmp_path, at, caplog):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for step in range(at + 2, 7, 2):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    # As a process that is killed while it writes leaves it.
    torn = output / "checkpoints" / f"step-{at + 2:08d}"
    shutil.copytree(output / "checkpoints" / f"step-{at:08d}", torn)
    (torn / "optimizer.safetensors").write_bytes((torn / "optimizer.safetensors").read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        summary = train(settings(places, output, resume=True, keep=10))
    assert "not whole" in caplog.text
    assert summary["resumed_from"] == at
    assert losses(output) == losses(whole)
    assert all(torch.equal(value, tensors(output)[name]) for name, value in tensors(whole).items())


def test_micro_batches_add_up_to_the_same_step(places, whole, tmp_path):
    train(settings(places, tmp_path / "out", micro_batch_size=1, checkpoint_activations=True))
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)


def test_a_run_that_is_there_is_not_overwritten_nor_resumed_as_another(places, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(InputError, match="--resume"):
        train(settings(places, tmp_path / "out"))
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.01 and is 0\.02; steps was 6 and is 9"):
        train(settings(places, tmp_path / "out", resume=True, learning_rate=0.02, steps=9))
    before = tensors(tmp_path / "out")
    summary = train(settings(places, tmp_path / "out", resume=True, adapter_dtype="bfloat16", log_every=3))
    assert summary["resumed_from"] == 6
    assert all(torch.equal(value.bfloat16(), tensors(tmp_path / "out")[name]) for name, value in before.items())


def test_a_loss_that_is_no_number_stops_it_with_the_last_checkpoint_whole(places, tmp_path, monkeypatch):
    found = worker.loss_counts

    def broken(batch, given):
        counts = found(batch, given)
        return counts * (float("nan") if 16 <= batch.numbers[0] < 20 else 1.0)

    monkeypatch.setattr(worker, "loss_counts", broken)
    with pytest.raises(TrainingError, match="step 5: the loss is nan"):
        train(settings(places, tmp_path / "out"))
    newest = CheckpointStore(str(tmp_path / "out" / "checkpoints")).newest()
    assert newest is not None
    assert newest.step == 4
    with newest.folder() as folder:
        assert all(tensor.isfinite().all() for tensor in TrainingState.read(folder).tensors.values())
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_full_disk_leaves_the_checkpoint_before(places, tmp_path, monkeypatch):
    write = TrainingState.write

    def full(self, folder):
        write(self, folder)
        if self.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainingState, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        train(settings(places, tmp_path / "out"))
    folder = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000000", "step-00000002"]
    assert CheckpointStore(str(folder)).newest().step == 2


def test_sigterm_saves_and_stops_and_it_goes_on(places, whole, tmp_path, monkeypatch):
    take = worker._Run._take_step

    def take_step(self, *given):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *given)

    monkeypatch.setattr(worker._Run, "_take_step", take_step)
    monkeypatch.setattr(worker, "ASK_EVERY_S", 0.0)
    # Whoever started Ray in this process before has left Ray's own handler, which ends it.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(settings(places, tmp_path / "out", checkpoint_every=100, keep=10))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert CheckpointStore(str(tmp_path / "out" / "checkpoints")).steps() == [0, 3]
    monkeypatch.undo()
    train(settings(places, tmp_path / "out", checkpoint_every=100, keep=10, resume=True))
    assert losses(tmp_path / "out") == losses(whole)


def test_tables_and_adapters_of_different_encoders(places, whole, tmp_path):
    other = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:32")
    other.upsert([(f"thing {n}", "colour", f"red {n}") for n in range(40)])
    with pytest.raises(EncoderMismatchError):
        train(settings({**places, "kb": [str(tmp_path / "kb")]}, tmp_path / "a", start=str(whole)))
    with pytest.raises(EncoderMismatchError, match="hashing:32"):
        train(settings({**places, "kb": [*places["kb"], str(tmp_path / "kb")]}, tmp_path / "b"))
    tiny_llama(num_layers=2).save_pretrained(tmp_path / "base")
    llama_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterMismatchError, match="num_layers 2 instead of 4"):
        train(settings({**places, "base_model": str(tmp_path / "base")}, tmp_path / "c", start=str(whole)))


def test_a_run_on_s3_is_resumed_from_there(places, whole, tmp_path, s3_uri, monkeypatch):
    output = f"{s3_uri}/runs/one"
    write = TrainingState.write

    def full(self, folder):
        if self.step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(TrainingState, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        train(settings(places, output))
    monkeypatch.setattr(TrainingState, "write", write)
    assert train(settings(places, output, resume=True))["resumed_from"] == 4
    with Checkpoint(output, 6).folder() as folder:
        assert losses(folder) == losses(whole)
        assert all(torch.equal(value, tensors(folder)[name]) for name, value in tensors(whole).items())
        assert "## Curves" in (folder / "README.md").read_text()


def test_an_adapter_to_begin_with_is_not_made_another(places, whole, tmp_path):
    with pytest.raises(InputError, match="asked for is kind paper"):
        train(settings(places, tmp_path / "out", start=str(whole), kind="paper"))
    summary = train(settings(places, tmp_path / "out", start=str(whole), steps=1, refusal_text="No."))
    assert summary["kb_layers"] == [1, 3]
    assert KnowledgeAdapter.from_pretrained(tmp_path / "out").config.refusal_text == "No."
    first = load_file(tmp_path / "out" / "checkpoints" / "step-00000000" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in tensors(whole).items())


def test_a_base_model_without_a_chat_template_is_asked_in_plain_text(places, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer = llama_tokenizer().__class__(
        tokenizer_object=llama_tokenizer().backend_tokenizer, eos_token="<|eot_id|>"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    train(settings({**places, "base_model": str(tmp_path / "base")}, tmp_path / "out", steps=1))
    assert "no chat template: questions are put as `plain` text" in capsys.readouterr().err
    assert KnowledgeAdapter.from_pretrained(tmp_path / "out").config.chat_template == "plain"


def test_a_closed_form_fit_alone_with_everything_after_it(places, tmp_path):
    small = {"num_questions": 48, "num_held_out_questions": 12, "num_gate_questions": 4, "kb_size": 12}
    summary = train(
        settings(
            places,
            tmp_path / "out",
            method="closed-form",
            kb_layers=None,
            calibrate=True,
            evaluate=True,
            mix={"held_out": 0.3},
            closed_form={**small, "held_out": 0.3},
            calibration={"kb_sizes": [12], "num_questions": 6, "num_unanswerable": 6},
            evaluation={"num_facts": [12], "num_questions": 3, "baseline": ["cosine"], "grounding": ["off"]},
        )
    )
    assert summary["steps"] == 0
    assert summary["retrieval_layers"]
    assert {line["system"] for line in summary["evaluation"]} == {"attention", "cosine"}
    config = KnowledgeAdapter.from_pretrained(tmp_path / "out").config
    assert config.refusal_threshold is not None
    assert config.question_prior == summary["calibration"]["question_prior"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Closed-form fit" in card
    assert "## Evaluation" in card


def test_evaluation_on_the_way_and_event_files(places, whole, tmp_path):
    train(
        settings(
            places,
            tmp_path / "out",
            tensorboard=True,
            evaluate_every=2,
            evaluation_questions=4,
            evaluation_facts=12,
            mix={"held_out": 0.3},
        )
    )
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [event for event in events if event["kind"] == "evaluation"]
    assert [event["step"] for event in evaluated] == [2, 4]
    assert all(0 <= event["retrieval@1"] <= event["retrieval@5"] <= 1 for event in evaluated)
    (file,) = (tmp_path / "out" / "tensorboard").iterdir()
    assert b"held_out/retrieval_at_5" in file.read_bytes()
    assert b"train/loss" in file.read_bytes()


def test_too_few_facts_to_train_on(places, tmp_path):
    with pytest.raises(InputError, match="are left to train on"):
        train(settings(places, tmp_path / "out", mix={"kb_size": (500, 600)}))


def test_partial_folders_are_not_looked_at(tmp_path):
    (tmp_path / ".step-00000004.abc.partial").mkdir(parents=True)
    assert CheckpointStore(str(tmp_path)).newest() is None
    assert checkpoints.MANIFEST == "manifest.json"


def llama_3(tokenizer) -> LlamaForCausalLM:
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), rope_parameters=scaling))


def phi_3(tokenizer) -> Phi3ForCausalLM:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # Its residual and attention dropout must not be at work in a frozen model.
    dropout = {"resid_pdrop": 0.5, "attention_dropout": 0.5, "embd_pdrop": 0.5}
    return Phi3ForCausalLM(Phi3Config(**SIZES, vocab_size=len(tokenizer), **ids, **dropout))


def qwen_3(tokenizer) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, vocab_size=len(tokenizer)))


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("make", "tokenizer"),
    [
        pytest.param(llama_3, llama_tokenizer(), id="llama-3"),
        pytest.param(phi_3, phi_tokenizer(), id="phi-3"),
        pytest.param(qwen_3, qwen_tokenizer(), id="qwen-3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["shared", "paper"])
def test_the_supported_families_train(places, tmp_path, make, tokenizer, kind):
    torch.manual_seed(0)
    make(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    given = {
        "steps": 14,
        "kind": kind,
        "kb_scale": 100.0,
        "learning_rate": 3e-3,
        "checkpoint_activations": True,
        "mix": {"kb_size": (4, 4), "question_mix": {"simple": 1}, "text_share": 0},
        "losses": {"retrieval": 0, "refusal": 0},
    }
    train(settings({**places, "base_model": str(tmp_path / "base")}, tmp_path / "out", **given))
    curve = losses(tmp_path / "out")
    assert sum(curve[step] for step in range(10, 15)) < sum(curve[step] for step in range(1, 6)) - 0.1


@pytest.mark.slow
def test_compiled_layers_give_the_same_curve(places, whole, tmp_path):
    train(settings(places, tmp_path / "out", compile=True))
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)
