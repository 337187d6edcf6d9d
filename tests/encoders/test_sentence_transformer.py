"""Local encoders against `SentenceTransformer.encode`: MiniLM, and small random models with other poolings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kblam_ray.encoders import Encoder, encoder_spec, load_encoder
from kblam_ray.encoders.sentence_transformer import WholeModelEncoder
from kblam_ray.errors import EncoderError, EncoderMismatchError, EncoderNotFoundError, InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LONG = "The river flows through many towns before it reaches the sea. " * 60
TEXTS = [
    "the capital of France",
    "Paris",
    "PARIS",
    "the official name (in German) of Côte d'Ivoire",
    "Российская Федерация — Москва",
    "日本の首都は東京です",
    "مدينة القاهرة",
    "ประเทศไทย",
    "हिन्दी में लिखा हुआ",
    "👩‍👩‍👧 ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\u200b",
    ".",
    " ",
    "",
    "[CLS] [SEP] [PAD] literal",
    "tab\tand\nnewline",
    "x" * 150,
    LONG,
    LONG + "and the end differs",
    *(f"item {number} weighs {number * 37 % 1000} kg " + "very " * (number % 23) for number in range(60)),
]
TRUNCATED = [17, 18]


def cosines(a_BP: np.ndarray, b_BP: np.ndarray) -> np.ndarray:
    return (a_BP * b_BP).sum(1) / np.linalg.norm(a_BP, axis=1) / np.linalg.norm(b_BP, axis=1)


def test_minilm_equals_the_library(minilm: Encoder, reference: SentenceTransformer) -> None:
    encoded = minilm.encode_batch(TEXTS)
    assert encoded.embeddings_BP.dtype == np.float32
    np.testing.assert_allclose(encoded.embeddings_BP, reference.encode(TEXTS), atol=2e-5)
    assert encoded.truncated == TRUNCATED
    assert encoded.tokens == sum(min(len(ids), 256) for ids in reference.tokenizer(TEXTS, padding=False)["input_ids"])


def test_unknown_tokens_are_reported(minilm: Encoder) -> None:
    texts = ["Paris", "☃", "plain", "x" * 150, "ᚠᚢᚦ of Norway"]
    assert minilm.encode_batch(texts).unknown == [1, 3, 4]


def test_order_and_batch_size_do_not_matter(minilm: Encoder, cache_dir: str) -> None:
    expected = minilm.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(minilm.encode([TEXTS[row] for row in order]), expected[order], atol=1e-5)
    one_by_one = load_encoder("all-MiniLM-L6-v2", cache_dir=cache_dir, device="cpu", batch_tokens=1)
    np.testing.assert_allclose(one_by_one.encode(TEXTS), expected, atol=1e-5)
    assert minilm.encode([]).shape == (0, 384)


def test_every_copy_of_minilm_is_one_encoder(
    minilm: Encoder, minilm_folder: Path, reference: SentenceTransformer, cache_dir: str, tmp_path: Path
) -> None:
    """By its names, from the package, saved anew, and with weights in another format and without the pooler."""
    import torch
    from safetensors.torch import load_file

    for name in ("sentence-transformers/all-MiniLM-L6-v2", str(minilm_folder)):
        assert encoder_spec(name, cache_dir=cache_dir, device="cpu") == minilm.spec
    saved = tmp_path / "saved"
    reference.save_pretrained(str(saved))
    other_format = tmp_path / "bin"
    reference.save_pretrained(str(other_format))
    weights = load_file(other_format / "model.safetensors")
    torch.save(
        {name: value for name, value in weights.items() if "pooler" not in name}, other_format / "pytorch_model.bin"
    )
    (other_format / "model.safetensors").unlink()
    for folder in (saved, other_format):
        spec = encoder_spec(str(folder), cache_dir=cache_dir, device="cpu")
        assert (spec.name, spec.revision) == (str(folder), minilm.spec.revision)
    torch_encoder = load_encoder("all-MiniLM-L6-v2", device="cpu", backend="torch")
    assert torch_encoder.spec == minilm.spec
    np.testing.assert_allclose(torch_encoder.encode(TEXTS), minilm.encode(TEXTS), atol=2e-5)


def test_a_changed_weight_length_or_pooling_is_another_encoder(tmp_path: Path) -> None:
    import torch

    model = tiny_model("mean", normalize=True)
    revisions = set()
    for number, change in enumerate([None, "weight", "length", "pooling"]):
        if change == "weight":
            with torch.no_grad():
                next(model[0].auto_model.encoder.parameters())[0, 0] += 1e-3
        elif change == "length":
            model.max_seq_length = 10
        elif change == "pooling":
            model[1].pooling_mode = "cls"
        model.save_pretrained(str(tmp_path / str(number)))
        revisions.add(load_encoder(str(tmp_path / str(number)), backend="torch", device="cpu").spec.revision)
    assert len(revisions) == 4


def test_an_expected_revision_is_checked(minilm: Encoder, cache_dir: str) -> None:
    options: dict[str, Any] = {"cache_dir": cache_dir, "device": "cpu"}
    load_encoder(minilm.spec.name, expected_revision=minilm.spec.revision, **options)
    with pytest.raises(EncoderMismatchError, match=minilm.spec.revision):
        load_encoder(minilm.spec.name, expected_revision="0" * 32, **options)


def test_int8_is_another_encoder_near_the_first(minilm: Encoder, cache_dir: str) -> None:
    int8 = load_encoder("all-MiniLM-L6-v2", backend="onnx-int8", cache_dir=cache_dir)
    assert int8.spec.revision != minilm.spec.revision
    assert int8.spec.name == "all-MiniLM-L6-v2:int8"
    assert encoder_spec(int8.spec.name, cache_dir=cache_dir, device="cpu") == int8.spec
    likeness = cosines(int8.encode(TEXTS), minilm.encode(TEXTS))
    assert 0.9 < likeness.min() < 0.9999, "either the quantisation is broken or nothing was quantised"


def tiny_model(pooling: str, normalize: bool, **config: Any) -> SentenceTransformer:
    """A random BERT of two layers over letters, with the vocabulary of nothing but them."""
    import tempfile

    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words), "utf-8")
        BertTokenizerFast(vocab_file=f"{folder}/vocab.txt").save_pretrained(folder)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **config}
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=24)
    modules = [transformer, Pooling(32, pooling_mode=pooling), *([Normalize()] if normalize else [])]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize(
    ("pooling", "normalize", "backend"),
    [
        ("cls", False, "onnx"),
        ("cls", False, "torch"),
        ("mean", False, "torch"),
        ("max", True, "torch"),
        ("mean_sqrt_len_tokens", False, "torch"),
        ("weightedmean", True, "onnx"),
    ],
)
def test_poolings_are_exact(pooling: str, normalize: bool, backend: str, tmp_path: Path) -> None:
    model = tiny_model(pooling, normalize)
    model.save_pretrained(str(tmp_path / "model"))
    encoder = load_encoder(
        str(tmp_path / "model"), backend=backend, device="cpu", cache_dir=str(tmp_path / "cache"), batch_tokens=100
    )
    encoded = encoder.encode_batch(TEXTS)
    np.testing.assert_allclose(encoded.embeddings_BP, model.encode(TEXTS), atol=1e-5)
    assert set(TRUNCATED) <= set(encoded.truncated)
    assert TEXTS.index("日本の首都は東京です") in encoded.unknown


def test_a_default_prompt_is_put_before_each_text(tmp_path: Path) -> None:
    model = tiny_model("mean", normalize=True)
    plain = model.encode(TEXTS)
    model.prompts, model.default_prompt_name = {"document": "passage "}, "document"
    model.save_pretrained(str(tmp_path / "model"))
    vectors = load_encoder(str(tmp_path / "model"), device="cpu", backend="torch").encode(TEXTS)
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-5)
    assert np.abs(vectors - plain).max() > 0.01


def test_a_model_of_another_kind_is_left_to_its_own_encode(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    tokenizer = tiny_model("mean", normalize=False).tokenizer.backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    options: dict[str, Any] = {"device": "cpu", "cache_dir": str(tmp_path / "cache")}
    encoder = load_encoder(str(tmp_path / "model"), **options)
    assert isinstance(encoder, WholeModelEncoder)
    np.testing.assert_allclose(encoder.encode(TEXTS[:5]), model.encode(TEXTS[:5]), atol=1e-6)
    assert encoder.encode([]).shape == (0, 16)
    with pytest.raises(EncoderError, match="--backend torch"):
        load_encoder(str(tmp_path / "model"), backend="onnx", **options)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    model = tiny_model("max", normalize=True)
    model.save_pretrained(str(tmp_path / "model"))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("a file where the cache's folder should be")
    encoder = load_encoder(str(tmp_path / "model"), device="cpu", backend="onnx", cache_dir=str(in_the_way / "cache"))
    np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


@pytest.mark.slow
def test_a_torn_bundle_is_made_anew(tmp_path: Path) -> None:
    tiny_model("mean", normalize=True).save_pretrained(str(tmp_path / "model"))
    options: dict[str, Any] = {"device": "cpu", "backend": "onnx", "cache_dir": str(tmp_path / "cache")}
    expected = load_encoder(str(tmp_path / "model"), **options).encode(TEXTS)
    (graph,) = (tmp_path / "cache").rglob("model.onnx")
    graph.write_bytes(graph.read_bytes()[:1000])
    np.testing.assert_array_equal(load_encoder(str(tmp_path / "model"), **options).encode(TEXTS), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "leftovers in the cache"


def test_a_cached_model_starts_without_torch(minilm: Encoder, cache_dir: str) -> None:
    program = (
        "import sys\n"
        "from kblam_ray.encoders import load_encoder, encoder_spec\n"
        f"options = dict(cache_dir={cache_dir!r}, device='cpu')\n"
        "spec = encoder_spec('all-MiniLM-L6-v2', **options)\n"
        "encoder = load_encoder('all-MiniLM-L6-v2', **options)\n"
        "assert encoder.spec == spec and encoder.encode(['Paris']).shape == (1, 384)\n"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_processes_that_export_at_once(tmp_path: Path) -> None:
    tiny_model("mean", normalize=True).save_pretrained(str(tmp_path / "model"))
    program = (
        "import numpy, sys\n"
        "from kblam_ray.encoders import load_encoder\n"
        f"encoder = load_encoder({str(tmp_path / 'model')!r}, device='cpu', cache_dir={str(tmp_path / 'cache')!r})\n"
        "numpy.save(sys.argv[1], encoder.encode(['one', 'two words']))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / f"{number}.npy")], env=environment)
        for number in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["files", "onnx"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("not a name!", "neither a folder nor"),
    ],
)
def test_models_that_cannot_be_had(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderNotFoundError, match=message):
        load_encoder(name, device="cpu")


def test_a_hub_that_cannot_be_reached() -> None:
    program = (
        "from kblam_ray.encoders import load_encoder\n"
        "from kblam_ray.errors import EncoderNotFoundError\n"
        "try:\n    load_encoder('nobody/nothing', device='cpu')\n"
        "except EncoderNotFoundError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "the hub cannot be used" in done.stdout
    assert "Help: check the network" in done.stdout


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere.json")
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(EncoderNotFoundError, match="a folder without a model"):
        load_encoder(str(tmp_path), device="cpu", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderNotFoundError, match="not a usable"):
        load_encoder(str(tmp_path), device="cpu", cache_dir=str(tmp_path / "cache"))


def test_settings_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        load_encoder("all-MiniLM-L6-v2", device="cuda")
    with pytest.raises(InputError, match="CPU only"):
        load_encoder("all-MiniLM-L6-v2", backend="onnx", device="cuda")
    with pytest.raises(InputError, match="int8"):
        load_encoder("all-MiniLM-L6-v2:int8", backend="torch")
