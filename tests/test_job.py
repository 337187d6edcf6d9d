"""How a job reads its settings: flags, YAML, and what `--help` says of both."""

from __future__ import annotations

import pytest
from pydantic import Field

from kblam_ray.errors import InputError
from kblam_ray.job import JobConfig, parse


class Settings(JobConfig):
    kb: str = Field(description="the table")
    input: list[str] = Field(default_factory=list, description="facts")
    num_workers: int = Field(2, gt=0, description="workers, 100 % of them")
    vacuum: bool = Field(False, description="tidy")


def test_flags_win_over_yaml(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("kb: from-yaml\nnum-workers: 3\nvacuum: true\ninput: [a, b]\n")
    settings = parse("a_job", Settings, ["--config", str(config), "--kb", "from-flag", "--no-vacuum"])
    assert settings == Settings(kb="from-flag", num_workers=3, vacuum=False, input=["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "yaml", "named"),
    [
        ([], "", "--kb"),
        (["--kb", "x", "--num-workers", "0"], "", "--num-workers"),
        (["--kb", "x", "--num-workers", "many"], "", "--num-workers"),
        (["--kb", "x", "--misspelt", "1"], "", "--misspelt"),
        (["--kb", "x", "--num", "1"], "", "--num"),
        ([], "kb: x\nmisspelt: 1\n", "--misspelt"),
        ([], "just a text\n", "mapping"),
        ([], "kb: [\n", "configuration"),
        (["--config", "/no/such/file.yaml"], "", r"no/such/file\.yaml"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, arguments, yaml, named):
    if yaml:
        (tmp_path / "job.yaml").write_text(yaml)
        arguments = [*arguments, "--config", str(tmp_path / "job.yaml")]
    with pytest.raises(InputError, match=named):
        parse("a_job", Settings, arguments)


def test_help_says_what_must_be_given_and_what_is_taken_otherwise(capsys):
    with pytest.raises(SystemExit) as done:
        parse("a_job", Settings, ["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the table (required)" in text
    assert "workers, 100 % of them (default: 2)" in text
    assert "facts (repeatable)" in text
    assert "Undefined" not in text
