"""Where the small base model and its adapters lie that come with the package, for use without a network."""

from pathlib import Path
from typing import Final

_HERE = Path(__file__).parent

BASE_MODEL: Final = _HERE / "base_model"
"""A LlamaForCausalLM of fewer than 8 million parameters with its tokenizer; `jobs/pretrain_demo.py` made it."""

ADAPTER: Final = _HERE / "adapter"
"""Kind "shared", for `BASE_MODEL` and MiniLM embeddings: what jobs use when nothing else is named."""

PAPER_ADAPTER: Final = _HERE / "adapter_paper"
"""Kind "paper", for the same two."""
