"""How an encoder is asked for: its name, and where and how it shall run.

| name | encoder |
|---|---|
| `all-MiniLM-L6-v2` | sentence-transformers, 384 numbers; the hub's copy and the packaged one are the same encoder |
| `ORG/MODEL`, `/path/to/model` | any other sentence-transformers model, by hub name or folder |
| `NAME:int8` | the local model NAME quantised to 8 bits: other vectors, so another encoder |
| `openai:text-embedding-3-small[@DIM]` | OpenAI or a compatible server; the bare names of OpenAI's models do too |
| `azure:DEPLOYMENT[=MODEL][@DIM]` | Azure OpenAI; `=MODEL` where the deployment is not named after its model |
| `hashing[:DIM]` | character n-grams, no model, 384 numbers unless given |
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Backend = Literal["auto", "torch", "onnx", "onnx-int8"]


class EncoderOptions(BaseModel):
    """Where and how an encoder shall run; a job that encodes offers these fields as its flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str | None = Field(None, description="torch device of a local encoder: cuda if there is one, else cpu")
    backend: Backend = Field(
        "auto", description="local encoders: ONNX Runtime on the CPU and torch on a GPU, or a choice"
    )
    batch_tokens: int | None = Field(
        None, gt=0, description="tokens in one forward pass of a local encoder: 256 on a CPU, 32768 on a GPU"
    )
    num_threads: int | None = Field(None, gt=0, description="threads of ONNX Runtime: OMP_NUM_THREADS, else 1")
    cache_dir: str | None = Field(None, description="where exported models are kept: ~/.cache/kblam-ray/encoders")
    base_url: str | None = Field(
        None,
        description="address of an OpenAI-compatible server, or the Azure endpoint: the library's own, OPENAI_BASE_URL",
    )
    concurrency: int = Field(8, gt=0, description="requests of a remote encoder under way at once")
    request_texts: int = Field(512, gt=0, le=2048, description="texts in one request of a remote encoder")
    max_retries: int = Field(8, ge=0, description="how often a failed request of a remote encoder is tried again")
    max_wait_s: float = Field(
        120.0, gt=0, description="longest wait before a retry; a server that asks for more fails the job"
    )
    timeout_s: float = Field(60.0, gt=0, description="time limit of one request of a remote encoder")
    usd_per_million_tokens: float | None = Field(
        None, ge=0, description="price of a remote encoder: the provider's list price when it is known"
    )


class EncoderSettings(EncoderOptions):
    """What `load_encoder` takes."""

    name: str = Field(
        min_length=1, description="encoder: a sentence-transformers name or path, openai:, azure:, hashing"
    )
    expected_revision: str | None = Field(None, description="refuse an encoder of another revision than this")
