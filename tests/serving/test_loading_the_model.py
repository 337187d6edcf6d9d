"""How a replica loads its model."""

from __future__ import annotations

import os

import pytest

from kblam_ray.errors import InputError
from kblam_ray.model import KnowledgeModel
from kblam_ray.serving.replica import KERNEL_CACHE, load_model
from kblam_ray.serving.settings import ServeSettings


@pytest.mark.parametrize("chosen", [None, "256"])
def test_kernels_are_kept_in_a_bounded_number_unless_the_environment_says_another(monkeypatch, chosen: str | None):
    name, num = KERNEL_CACHE
    monkeypatch.setenv(name, chosen or "")
    if chosen is None:
        monkeypatch.delenv(name)
    found = []
    monkeypatch.setattr(KnowledgeModel, "from_pretrained", lambda *args, **options: found.append(os.environ[name]))
    load_model(ServeSettings(bundle="bundle"))
    assert found == [chosen or num]


def test_a_model_must_be_named():
    with pytest.raises(InputError, match="no model is named"):
        load_model(ServeSettings(base_model="base"))
