"""The operator's guide: the sizes are what its command prints, a backup is whole, what it links to is there."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from deltalake import DeltaTable

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.errors import KblamError
from kblam_ray.model import planner
from tests.cluster.manifests import CLUSTER, kubernetes
from tests.table.fake_encoder import FakeEncoder

GUIDE = (CLUSTER / "README.md").read_text(encoding="utf-8")

PARAMETERS = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}
"""As published: the configurations below are those models'."""


def configurations():
    """What the hub has under these names, as far as sizes go."""
    from transformers import LlamaConfig, Phi3Config, Qwen3Config

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return {
        "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=128256, head_dim=64, **heads,
            tie_word_embeddings=True,
        ),
        "microsoft/Phi-3-mini-4k-instruct": Phi3Config(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
            tie_word_embeddings=False,
        ),
        "Qwen/Qwen3-8B": Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, vocab_size=151936, head_dim=128, **heads,
            tie_word_embeddings=False,
        ),
        "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, **heads,
            tie_word_embeddings=False,
        ),
    }  # fmt: skip


def test_the_table_of_sizes_is_what_the_command_prints(monkeypatch, capsys):
    known = configurations()
    for name, config in known.items():
        assert planner.plan(config, 384, 0, dtype="bfloat16").base_parameters == PARAMETERS[name]
    monkeypatch.setattr(planner, "read_base_config", lambda name: known[name])
    program = re.search(r"python - <<'EOF'\n(.*?)EOF\n", GUIDE, re.DOTALL)
    assert program
    exec(compile(program[1], "README.md", "exec"), {})
    rows = re.findall(r"^\| [\w.-]+/[\w.-]+ \|.*\|$", GUIDE, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == rows
    assert len(rows) == len(PARAMETERS)


def test_what_the_guide_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (CLUSTER / target).exists(), target
    for path in re.findall(r"cluster/[\w./-]+\.(?:yaml|json)", GUIDE):
        assert (CLUSTER.parent / path).exists(), path
    names = {manifest.name for manifest in kubernetes()}
    for kind, name in re.findall(r"\b(job|rayjob|service|deployment)/([\w-]+)", GUIDE):
        assert name in names or name == "kblam-server-serve-svc", kind
    applied = set(re.findall(r"-f cluster/(\S+\.yaml)", GUIDE))
    assert applied == {manifest.path.relative_to(CLUSTER).as_posix() for manifest in kubernetes()}


def test_the_role_that_the_guide_describes_may_do_what_its_commands_do():
    policy = re.search(r"`AbortMultipartUpload` on (.*?), `s3:GetObject` on (.*?);", GUIDE, re.DOTALL)
    assert policy
    writable, readable = (set(re.findall(r"`(\w+/)`", part)) for part in policy.groups())
    objects = [yaml.safe_dump(manifest.content, width=10**6) for manifest in kubernetes()]
    text = "\n".join([*re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL), *objects])
    found = re.findall(r"(--kb|--output|state_uri:|uri:|--input)[ =]+s3://my-bucket/(\w+/)", text)
    assert {place for option, place in found if option != "--input"} == writable
    assert {place for option, place in found if option == "--input"} == readable


@pytest.fixture
def live(tmp_path: Path) -> KnowledgeBase:
    kb = KnowledgeBase.create(str(tmp_path / "bucket"), FakeEncoder())
    for number in range(3):
        kb.upsert([Fact(f"entity {number}", "code", str(number))])
    return kb


BACKUP = re.findall(r"^aws s3 sync s3://my-bucket.*$", GUIDE, re.MULTILINE)


def sync(command: str, folder: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """What an `aws s3 sync` of the guide does, with folders for buckets: it lists, and then copies what it listed."""
    words = shlex.split(command)
    excluded = [words[number + 1] for number, word in enumerate(words) if word == "--exclude"]
    source, target = (
        folder / re.sub(r"^s3://my-(bucket|backup)/kb/products", lambda found: found[1], uri) for uri in words[3:5]
    )
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    meanwhile()
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in excluded):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def test_a_table_is_backed_up_while_it_is_written_to(live, tmp_path):
    """Log first, as the guide has it: what is committed meanwhile is not in the backup, and nothing in it is torn."""

    def write():
        live.upsert([Fact("entity 1", "code", "changed meanwhile"), Fact("entity 9", "code", "new")])
        live.compact()
        # deltalake writes one every hundred versions, and puts its number into `_last_checkpoint`.
        DeltaTable(str(tmp_path / "bucket")).create_checkpoint()

    DeltaTable(str(tmp_path / "bucket")).create_checkpoint()
    version = live.version
    log, files = BACKUP
    sync(log, tmp_path, meanwhile=write)
    sync(files, tmp_path)
    backup = KnowledgeBase.open(str(tmp_path / "backup"))
    assert backup.version == version
    assert sorted(backup.snapshot().facts.column("value").to_pylist()) == ["0", "1", "2"]


def test_the_other_order_would_tear_it(live, tmp_path):
    log, files = BACKUP
    sync(files, tmp_path)
    live.upsert([Fact("entity 9", "code", "new")])
    sync(log, tmp_path)
    with pytest.raises(KblamError):
        KnowledgeBase.open(str(tmp_path / "backup")).snapshot()
