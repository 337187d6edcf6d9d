"""Adapters partitioned by DeepSpeed's ZeRO-3, whose tensors are read outside of their modules' forward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import KINDS, random_facts, random_ids, tiny_adapter, tiny_llama

from kblam_ray.attention import attach
from kblam_ray.attention.partitioned import external_parameters
from kblam_ray.errors import AdapterError

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_read_outside_of_its_module(kind):
    model = tiny_llama()
    adapter = tiny_adapter(model, kind)
    assert [id(parameter) for parameter in external_parameters(adapter)] == [id(p) for p in adapter.parameters()]

    def refuse(*_):
        raise AssertionError("a module of the adapter ran")

    for module in adapter.modules():
        module.register_forward_pre_hook(refuse)
    attachment = attach(model, adapter)
    model(random_ids(2, 3), knowledge=random_facts(4).memory(adapter)).logits.sum().backward()
    attachment.detach()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_elsewhere_is_named(kind):
    model = tiny_llama()
    adapter = tiny_adapter(model, kind)
    memory = random_facts(4).memory(adapter)
    attachment = attach(model, adapter)
    gate = adapter.query_heads["0"].weight
    gate.data = torch.empty(0)
    for with_grad in (False, True):
        with (
            torch.set_grad_enabled(with_grad),
            pytest.raises(AdapterError, match=r"partitioned.*query_heads\.0\.weight"),
        ):
            model(random_ids(1, 3), knowledge=memory)
    attachment.detach()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_trains_like_one_process_without_it(kind, tmp_path):
    pytest.importorskip("deepspeed")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "zero3_program.py"), kind],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["is_partitioned"]
    assert found["found"] == pytest.approx(found["expected"], abs=1e-6)
    assert found["expected"][0] != pytest.approx(found["expected"][-1], abs=1e-4)  # it does train
    assert found["difference"] < 1e-6
    assert "gathered" in found["message"]
    assert found["facts_count"]
