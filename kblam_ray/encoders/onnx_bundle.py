"""A sentence-transformers model as a folder that ONNX Runtime alone can run, exported once and kept.

A bundle holds the graph from token ids to sentence embedding (pooling and whatever modules follow
included, as torch traced them), the tokenizer, and a small description. Running it needs neither torch nor
transformers: a worker starts in less than a second instead of ten and saves their memory.

Bundles lie in a cache folder, keyed by revision, so that every copy of a model shares one; a second index
leads from a fingerprint of the model's files to the revision, which otherwise takes loading the model to
know. Folders appear by renaming, so that workers that export at the same time cannot see or leave half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from kblam_ray.encoders.tokenization import TextTokenizer, TokenizerSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FORMAT = "1"
"""Part of every bundle's name: raised when the export or the files change."""

Precision = Literal["float32", "int8"]
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "sentence_embedding"
# A protocol buffer cannot pass 2 GB; larger weights go into a file beside the graph.
MAX_GRAPH_BYTES = 1_800_000_000
# This fusion is slower than what it replaces: a tenth of the whole run time for MiniLM on AVX-512.
SLOW_FUSIONS = ["SkipLayerNormFusion"]


class BundleDescription(BaseModel):
    """`bundle.json`: written last, with the size of the graph, so that a torn copy is seen."""

    base_revision: str
    precision: Precision
    dim: int
    graph_bytes: int
    tokenizer: TokenizerSettings


class OnnxBundle:
    """A bundle opened for use: `run(ids_BT, mask_BT)` gives float32 [B, P]."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        import onnxruntime

        # Some builds report usage to their maker; an encoder on a company's documents must not.
        onnxruntime.disable_telemetry_events()
        self.description = BundleDescription.model_validate_json((folder / "bundle.json").read_bytes())
        self.tokenizer = TextTokenizer((folder / "tokenizer.json").read_text("utf-8"), self.description.tokenizer)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=SLOW_FUSIONS,
        )

    def run(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        return self._session.run([OUTPUT], dict(zip(INPUTS, (ids_BT, mask_BT), strict=True)))[0]


def default_cache() -> Path:
    """The folder for bundles of this user: `kblam-ray/encoders` under XDG_CACHE_HOME or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "kblam-ray" / "encoders"


class BundleCache:
    """The bundles and the index under one folder; a folder that cannot be written holds nothing and takes nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def revision(self, fingerprint: str) -> tuple[str, int] | None:
        """The revision and P of the model whose files have this fingerprint, if it was loaded here before."""
        try:
            entry = json.loads((self.root / f"files-{FORMAT}-{fingerprint}.json").read_bytes())
            return str(entry["revision"]), int(entry["dim"])
        except (OSError, ValueError, KeyError):
            return None

    def remember(self, fingerprint: str, revision: str, dim: int) -> None:
        data = json.dumps({"revision": revision, "dim": dim}).encode()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".new-", delete=False) as file:
                file.write(data)
            os.replace(file.name, self.root / f"files-{FORMAT}-{fingerprint}.json")
        except OSError:
            return  # Nothing is lost but time: the next process loads the model to know.

    def find(self, revision: str, precision: Precision) -> Path | None:
        """The folder of a whole bundle, if there is one."""
        folder = self._folder(revision, precision)
        try:
            description = BundleDescription.model_validate_json((folder / "bundle.json").read_bytes())
            whole = (folder / "model.onnx").stat().st_size == description.graph_bytes
        except (OSError, ValidationError):
            return None
        return folder if whole else None

    def staging(self) -> Path:
        """A new folder to build a bundle in: in the cache if it can be written, else in the system's temporary one."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self.root, prefix=".new-"))
        except OSError:
            return Path(tempfile.mkdtemp(prefix="kblam-ray-"))

    def keep(self, staged: Path, revision: str, precision: Precision) -> Path | None:
        """Move a staged bundle to its place; None where the cache cannot be written."""
        folder = self._folder(revision, precision)
        if staged.parent != self.root:
            return None
        try:
            os.rename(staged, folder)
            return folder
        except OSError:
            whole = self.find(revision, precision)
        if whole is None:
            # What stands there is torn (a full disk, a power cut): make room once, then let the other writer win.
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(staged, folder)
                return folder
            except OSError:
                return self.find(revision, precision)
        shutil.rmtree(staged, ignore_errors=True)
        return whole

    def _folder(self, revision: str, precision: Precision) -> Path:
        return self.root / f"onnx-{FORMAT}-{precision}-{revision}"


def export(model: SentenceTransformer, tokenizer: TextTokenizer, revision: str, dim: int, folder: Path) -> None:
    """Write a float32 bundle of `model`, which is converted to float32 on the CPU.

    Raises whatever torch raises where it cannot trace the model.
    """
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model({"input_ids": input_ids, "attention_mask": attention_mask})[OUTPUT]

    model.cpu().float().eval()
    # Two lengths in the example: a batch without padding would let torch drop the mask.
    batch = next(tokenizer.batches(tokenizer.tokenize(["the capital of France", "Paris"]).ids, batch_tokens=1 << 20))
    example = (torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.mask_BT))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph_bytes = sum(value.numel() * 4 for value in model.state_dict().values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph(),
            example,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=dict.fromkeys(INPUTS, sizes),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / "model.onnx"), external_data=graph_bytes > MAX_GRAPH_BYTES)
    (folder / "tokenizer.json").write_text(tokenizer.state, "utf-8")
    _describe(folder, revision, "float32", dim, tokenizer.settings)


def quantize(source: Path, folder: Path) -> None:
    """Write the int8 bundle of a float32 one: weights of matrix products in 8 bits, inputs scaled as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    description = BundleDescription.model_validate_json((source / "bundle.json").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(
            source / "model.onnx",
            folder / "model.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    _describe(folder, description.base_revision, "int8", description.dim, description.tokenizer)


def _describe(folder: Path, revision: str, precision: Precision, dim: int, tokenizer: TokenizerSettings) -> None:
    description = BundleDescription(
        base_revision=revision,
        precision=precision,
        dim=dim,
        graph_bytes=(folder / "model.onnx").stat().st_size,
        tokenizer=tokenizer,
    )
    (folder / "bundle.json").write_text(description.model_dump_json(indent=1), "utf-8")
