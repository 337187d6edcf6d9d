"""How a job reads its settings: flags, YAML, and what `--help` says of both."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.job import JobConfig, packages_of, parse


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


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(1, gt=0, description="of the part")
    shares: dict[str, float] = Field(default_factory=dict, description="of each kind")
    range: tuple[int, int] = Field((1, 2), description="from and to")
    tried: tuple[float, ...] = Field((0.5,), description="numbers to try")


class Nested(JobConfig):
    part: Part = Field(default_factory=Part, description="a part")
    many: list[str] = Field(default_factory=list, description="things")


def test_a_part_is_a_mapping_in_yaml_and_a_flag_per_field(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("part: {size: 2, range: [3, 4], shares: {two-word: 1}}\nmany: [a]\n")
    flags = ["--part-size", "5", "--part-tried", "0.1", "--part-tried", "0.2"]
    settings = parse("a_job", Nested, ["--config", str(config), *flags])
    assert settings == Nested(part=Part(size=5, range=(3, 4), shares={"two-word": 1}, tried=(0.1, 0.2)), many=["a"])
    settings = parse("a_job", Nested, ["--part-range", "7", "8", "--part-shares", "a=1", "--part-shares", "b=0.5"])
    assert settings == Nested(part=Part(range=(7, 8), shares={"a": 1, "b": 0.5}))


@pytest.mark.parametrize(
    ("arguments", "yaml", "named"),
    [
        (["--part-size", "0"], "", "--part-size"),
        (["--part-shares", "a"], "", "KEY=VALUE"),
        (["--part-shares", "a=b"], "", "--part-shares"),
        ([], "part: {misspelt: 1}", "--part-misspelt"),
        ([], "part: 3", "--part"),
        (["--part-size", "2"], "part: 3", "--part"),
    ],
)
def test_a_wrong_setting_of_a_part_is_named(tmp_path, arguments, yaml, named):
    (tmp_path / "job.yaml").write_text(yaml or "{}")
    with pytest.raises(InputError, match=named):
        parse("a_job", Nested, [*arguments, "--config", str(tmp_path / "job.yaml")])


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    told = r"training needs the package no_such_package.*kblam-ray\[train\]"
    with pytest.raises(MissingDependencyError, match=told), packages_of("train", "training needs"):
        import no_such_package  # noqa: F401
    with pytest.raises(ModuleNotFoundError), packages_of("train", "training needs"):
        import kblam_ray.no_such_module  # noqa: F401
