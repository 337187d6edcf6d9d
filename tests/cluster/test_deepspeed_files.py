"""DeepSpeed's files: the package's, with and without offload, that the training job and DeepSpeed itself take."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from kblam_ray.training.loop.deepspeed_config import SHIPPED, completed, read_deepspeed_config
from tests.cluster.manifests import CLUSTER

FOLDER = CLUSTER / "deepspeed"
IN_MEMORY = {"device": "cpu", "pin_memory": True}


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_what_there_is():
    assert {path.stem for path in FOLDER.iterdir()} == {*SHIPPED, *(f"{name}-offload" for name in SHIPPED)}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_plain_files_are_the_packages(name):
    packaged = resources.files("kblam_ray.training.loop") / "deepspeed" / f"{name}.json"
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == packaged.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_offload_adds_where_states_are_kept_and_changes_nothing_else(name):
    given, plain = read(f"{name}-offload"), read(name)
    wanted = {"offload_optimizer": IN_MEMORY}
    if plain["zero_optimization"]["stage"] == 3:  # the only stage that parts the weights as well
        wanted["offload_param"] = IN_MEMORY
    assert given == {**plain, "zero_optimization": {**plain["zero_optimization"], **wanted}}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_job_and_deepspeed_take_the_files(path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = read_deepspeed_config(str(path))
    made = completed(config, micro_batch_size=2, accumulation=3, clipping=0.5)
    assert made["train_micro_batch_size_per_gpu"] == 2
    zero = DeepSpeedZeroConfig(**made["zero_optimization"])
    assert (zero.offload_optimizer is not None) is path.stem.endswith("-offload")
    # Else DeepSpeed would want its own Adam, compiled when first used.
    assert made["zero_force_ds_cpu_optimizer"] is False
