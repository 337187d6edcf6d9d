"""A model that finds and copies before its first training step."""

import numpy as np
import pytest
import torch

from kblam_ray.demo.pretraining.batches import Steps
from kblam_ray.demo.pretraining.prepare import prepare
from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.demo.pretraining.train import Pretraining
from kblam_ray.demo.pretraining.wiring import token_meanings

SMALL = {
    "num_facts": 400,
    "adapter_facts": 0,
    "vocabulary": 800,
    "hidden_size": 192,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_size": 64,
    "wiring_questions": 3_000,
}


@pytest.fixture(scope="module")
def wired(tmp_path_factory):
    settings = PretrainSettings(output=str(tmp_path_factory.mktemp("wired")), **SMALL)
    facts, keys_MP, tokenizer = prepare(settings)
    training = Pretraining(settings, tokenizer, keys_MP)
    untrained = Pretraining(settings, tokenizer, keys_MP)
    training.wire(facts)
    return facts, tokenizer, settings, training, untrained


def found(training, step):
    keys_CP = training._candidates(step)
    losses = [training._losses(batch, keys_CP, step.candidates_C) for batch in step.micro_batches]
    asked = sum(len(batch.asked_Q) for batch in step.micro_batches)
    return sum(float(loss["right"]) for loss in losses) / asked


def test_a_wired_model_finds_most_of_what_is_asked(wired):
    facts, tokenizer, settings, training, untrained = wired
    step = Steps(facts, tokenizer, settings, 0)[3]
    with torch.no_grad():
        assert found(training, step) > 0.5
        assert found(untrained, step) < 0.1


def test_a_wired_model_goes_on_with_what_stood_above(wired):
    *_, training, untrained = wired
    once_BT = torch.randint(300, training.model.config.vocab_size, (16, 20), generator=torch.Generator().manual_seed(1))
    twice_BT = torch.cat([once_BT, once_BT], 1)
    right = {}
    for name, model in (("wired", training.model), ("untrained", untrained.model)):
        with torch.no_grad():
            guessed_BT = model(input_ids=twice_BT).logits[:, 20:-1].argmax(-1)
        right[name] = float((guessed_BT == twice_BT[:, 21:]).float().mean())
    assert right["wired"] > 0.5
    assert right["untrained"] < 0.1


def test_meanings_of_tokens_add_up_to_keys():
    random = np.random.default_rng(0)
    vectors_VP = random.normal(size=(40, 32)).astype(np.float32)
    ids = [random.integers(40, size=5).tolist() for _ in range(600)]
    keys_QP = np.stack([vectors_VP[tokens].sum(0) for tokens in ids])
    batches = [(ids[start : start + 100], keys_QP[start : start + 100]) for start in range(0, 600, 100)]
    found = token_meanings(iter(batches), 40, 32, 32)
    mean_P = keys_QP.mean(0)
    scores_QQ = (
        np.stack([found.tokens_VX[tokens].sum(0) for tokens in ids[:100]])
        @ ((keys_QP[:100] - mean_P) @ found.keys_PX.numpy()).T
    )
    assert np.mean(scores_QQ.argmax(1) == np.arange(100)) > 0.95
