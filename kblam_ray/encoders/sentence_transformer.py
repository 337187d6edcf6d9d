"""Local encoders: any sentence-transformers model, through ONNX Runtime on a CPU and torch on a GPU.

Both ways give the vectors of `SentenceTransformer.encode` (cosine above 0.99999; tests measure it) and are
faster, because texts are grouped by their number of tokens, so that hardly any padding is computed.
On one core of an EPYC with AVX-512, ONNX Runtime does 2.1 to 2.4 times the sentences of
`SentenceTransformer.encode` for short facts (`python jobs/benchmark.py encode`).

`NAME:int8` quantises the matrix products' weights and inputs to 8 bits. Its vectors differ from the model's, so
it is an encoder of its own: for MiniLM on 2,151 texts of a knowledge base of countries the cosine to the exact
vector is 0.994 in the median, 0.975 at the first percentile and 0.956 at worst. Inputs are scaled per batch, so a
vector also depends a little on its neighbours.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.encoders.model_files import ONNX_PACKAGES, canonical_name, fingerprint, locate, require_local
from kblam_ray.encoders.onnx_bundle import BundleCache, OnnxBundle, Precision, default_cache, export, quantize
from kblam_ray.encoders.revision import default_prompt, revision_of, revision_of_model
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.encoders.tokenization import TextTokenizer, TokenizerSettings
from kblam_ray.errors import EncoderError, EncoderNotFoundError, InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""ids int64 [B, T] and mask int64 [B, T] -> embeddings float32 [B, P]."""

INT8_SUFFIX = ":int8"
# A batch whose activations fit into the core's cache is the fastest on a CPU; a GPU wants work.
CPU_BATCH_TOKENS = 256
GPU_BATCH_TOKENS = 32_768

# What a path must get right: lengths that differ, case, scripts, unknown characters, truncation.
PROBES = ("the capital of France", "PARIS", "Größe der Stadt: 105,4 km²", "東京 ☃", "a", "one two three " * 400)
MAX_PROBE_DIFFERENCE = 1e-3


class SentenceTransformerEncoder(Encoder):
    """A model behind `run`, with its tokenizer."""

    def __init__(self, spec: EncoderSpec, tokenizer: TextTokenizer, run: Run, batch_tokens: int) -> None:
        self.spec, self._tokenizer, self._run, self._batch_tokens = spec, tokenizer, run, batch_tokens

    @property
    def vocabulary(self) -> list[str]:
        """The tokens that the encoder knows, as its tokenizer writes them, in the order of their ids."""
        return self._tokenizer.vocabulary

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Embed texts; tokens include the special ones and exclude padding."""
        found = self._tokenizer.tokenize(texts)
        embeddings_BP = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        for batch in self._tokenizer.batches(found.ids, self._batch_tokens):
            embeddings_BP[batch.rows] = self._run(batch.ids_BT, batch.mask_BT)
        return EncodedBatch(embeddings_BP, found.truncated, found.unknown, tokens=found.num_tokens)


class WholeModelEncoder(Encoder):
    """A model that is more than tokenizer, transformer and pooling: left to its own `encode`.

    It cannot say which texts were truncated or had unknown tokens.
    """

    def __init__(self, spec: EncoderSpec, model: SentenceTransformer) -> None:
        self.spec, self._model = spec, model

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Embed texts."""
        return EncodedBatch(_reference(self._model, texts).reshape(len(texts), self.spec.dim))


def load_sentence_transformer(settings: EncoderSettings) -> Encoder:
    """The local encoder that `settings` name.

    Raises:
        EncoderNotFoundError: the model cannot be had here.
        EncoderError: `onnx` was asked for and the model cannot be exported.
        InputError: settings that contradict each other.
        MissingDependencyError: the packages of local encoders are not installed.
    """
    require_local()
    name, wants_int8 = _split_name(settings)
    if wants_int8 or settings.backend == "onnx" or (settings.backend == "auto" and _device(settings) == "cpu"):
        if settings.device not in (None, "cpu"):
            raise InputError(
                f"ONNX Runtime is used on the CPU only, not on {settings.device}",
                where=settings.name,
                help="drop --device, or take --backend torch",
            )
        return _load_onnx(settings, name, "int8" if wants_int8 else "float32")
    model = _load_model(name, locate(name), _device(settings))
    return _torch_encoder(settings, name, model)


def local_spec(settings: EncoderSettings) -> EncoderSpec:
    """The spec of the local encoder that `settings` name: read from the cache when it was loaded here before."""
    require_local()
    name, wants_int8 = _split_name(settings)
    known = _cache(settings).revision(fingerprint(locate(name)))
    if known is None:
        return load_sentence_transformer(settings).spec
    return _spec(name, known[0], known[1], "int8" if wants_int8 else "float32")


def _split_name(settings: EncoderSettings) -> tuple[str, bool]:
    name = settings.name.removesuffix(INT8_SUFFIX)
    wants_int8 = settings.backend == "onnx-int8" or name != settings.name
    if name != settings.name and settings.backend not in ("auto", "onnx-int8"):
        raise InputError(
            f"backend {settings.backend} cannot run an int8 encoder",
            where=settings.name,
            help="drop :int8 or --backend",
        )
    return canonical_name(name), wants_int8


def _spec(name: str, base_revision: str, dim: int, precision: Precision) -> EncoderSpec:
    if precision == "float32":
        return EncoderSpec(name=name, revision=base_revision, dim=dim)
    return EncoderSpec(name=name + INT8_SUFFIX, revision=revision_of("onnx dynamic int8", base_revision), dim=dim)


def _device(settings: EncoderSettings) -> str:
    if settings.device is not None and not settings.device.startswith("cuda"):
        return settings.device
    if settings.device is not None:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "no CUDA device can be used", where=f"--device {settings.device}", help="drop --device, or take cpu"
            )
        return settings.device
    # Importing torch takes seconds; a machine without a GPU's device file need not pay for the answer.
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _omp_threads() -> int:
    # A list gives the threads of nested levels; the first is ours.
    first = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) > 0 else 1


def _cache(settings: EncoderSettings) -> BundleCache:
    return BundleCache(Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache())


def _load_onnx(settings: EncoderSettings, name: str, precision: Precision) -> Encoder:
    require_local(ONNX_PACKAGES)
    cache, folder = _cache(settings), locate(name)
    num_threads = settings.num_threads or _omp_threads()
    files = fingerprint(folder)
    known = cache.revision(files)
    found = cache.find(known[0], precision) if known else None
    if known and found:
        return _onnx_encoder(settings, name, known[0], OnnxBundle(found, num_threads))

    model = _load_model(name, folder, "cpu")
    revision, dim = revision_of_model(model), _reference(model, PROBES[:1]).shape[1]
    cache.remember(files, revision, dim)
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return _without_onnx(settings, name, model, "it is not a tokenizer, a transformer and a pooling")
    import torch

    base = cache.find(revision, "float32")
    staged: list[Path] = []
    try:
        if base is None:
            base = staged_base = cache.staging()
            staged.append(staged_base)
            try:
                export(model, tokenizer, revision, dim, staged_base)
            except torch.onnx.OnnxExporterError as error:
                return _without_onnx(settings, name, model, f"torch cannot export it: {str(error).splitlines()[0]}")
            if not _agrees(OnnxBundle(base, num_threads).run, tokenizer, model):
                return _without_onnx(settings, name, model, "the exported graph gives other vectors")
            base = cache.keep(staged_base, revision, "float32") or staged_base
        if precision == "float32":
            return _onnx_encoder(settings, name, revision, OnnxBundle(base, num_threads))
        staged_int8 = cache.staging()
        staged.append(staged_int8)
        quantize(base, staged_int8)
        int8 = cache.keep(staged_int8, revision, "int8") or staged_int8
        return _onnx_encoder(settings, name, revision, OnnxBundle(int8, num_threads))
    finally:
        # What was not moved into the cache is in memory by now.
        for folder in staged:
            shutil.rmtree(folder, ignore_errors=True)


def _onnx_encoder(settings: EncoderSettings, name: str, revision: str, bundle: OnnxBundle) -> Encoder:
    description = bundle.description
    spec = _spec(name, revision, description.dim, description.precision)
    return SentenceTransformerEncoder(spec, bundle.tokenizer, bundle.run, settings.batch_tokens or CPU_BATCH_TOKENS)


def _without_onnx(settings: EncoderSettings, name: str, model: SentenceTransformer, why: str) -> Encoder:
    if settings.backend != "auto" or settings.name.endswith(INT8_SUFFIX):
        raise EncoderError(f"ONNX Runtime cannot run this model: {why}", where=name, help="use --backend torch")
    logger.warning("%s runs on torch, slower than ONNX Runtime: %s", name, why)
    return _torch_encoder(settings, name, model)


def _torch_encoder(settings: EncoderSettings, name: str, model: SentenceTransformer) -> Encoder:
    spec = _spec(name, revision_of_model(model), _reference(model, PROBES[:1]).shape[1], "float32")
    tokenizer = _tokenizer(model)
    run = _torch_run(model)
    if tokenizer is None or not _agrees(run, tokenizer, model):
        logger.warning("%s is run by its own encode: truncated texts and unknown tokens are not reported", name)
        return WholeModelEncoder(spec, model)
    default = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
    return SentenceTransformerEncoder(spec, tokenizer, run, settings.batch_tokens or default)


def _torch_run(model: SentenceTransformer) -> Run:
    import torch

    def run(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        features = {"input_ids": torch.from_numpy(ids_BT), "attention_mask": torch.from_numpy(mask_BT)}
        with torch.inference_mode():
            embeddings_BP = model({key: value.to(model.device) for key, value in features.items()})[
                "sentence_embedding"
            ]
        return embeddings_BP.float().cpu().numpy()

    return run


def _load_model(name: str, folder: Path, device: str) -> SentenceTransformer:
    """The model in float32, whatever it is stored in: half precision is slow on a CPU and loses digits on a GPU."""
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(folder), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EncoderNotFoundError(
            f"not a usable sentence-transformers model: {reason}",
            where=f"{name} in {folder}",
            help="check that the folder is complete and loads with SentenceTransformer(folder)",
        ) from error
    return model.float().eval()


def _tokenizer(model: SentenceTransformer) -> TextTokenizer | None:
    """The tokenizer for our own batches, or None where the model is not tokenizer, transformer and pooling."""
    from sentence_transformers.models import Transformer

    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if not isinstance(model[0], Transformer) or backend is None or model.tokenizer.pad_token_id is None:
        return None
    settings = TokenizerSettings(
        max_tokens=model.max_seq_length,
        pad_id=model.tokenizer.pad_token_id,
        pad_left=model.tokenizer.padding_side == "left",
        unknown_id=model.tokenizer.unk_token_id,
        prompt=default_prompt(model),
    )
    return TextTokenizer(backend.to_str(), settings)


def _agrees(run: Run, tokenizer: TextTokenizer, model: SentenceTransformer) -> bool:
    """Whether our tokens and batches give the vectors that the library gives."""
    batches = tokenizer.batches(tokenizer.tokenize(PROBES).ids, batch_tokens=1 << 20)
    expected_BP = _reference(model, PROBES)
    scale = np.linalg.norm(expected_BP, axis=1).max()
    return all(
        np.abs(run(batch.ids_BT, batch.mask_BT) - expected_BP[batch.rows]).max() < MAX_PROBE_DIFFERENCE * scale
        for batch in batches
    )


def _reference(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    return np.asarray(model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)
