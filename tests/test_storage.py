"""Places are named one way, and settings for object stores are found where boto3 finds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kblam_ray import storage
from kblam_ray.errors import InputError, StorageError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("/tmp/kb/", "/tmp/kb"),
        (Path("/tmp/kb"), "/tmp/kb"),
        ("file:///tmp/kb", "/tmp/kb"),
        ("file:///tmp/my%20kb", "/tmp/my kb"),
        ("kb", os.path.join(os.getcwd(), "kb")),
        ("~/kb", os.path.expanduser("~/kb")),
    ],
)
def test_normalize(given, expected):
    assert storage.normalize(given) == expected


@pytest.mark.parametrize("bad", ["", "  ", "gs://bucket/kb", "http://host/kb", "s3://", "s3:///kb", "file://host/kb"])
def test_places_that_are_none(bad):
    with pytest.raises(InputError, match="Help:"):
        storage.normalize(bad)


def test_the_operating_systems_failure_is_said_in_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"No such file.*\(/place\)\. Help:"), storage.storage_errors("/place"):
        (tmp_path / "missing").read_bytes()


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def test_a_shared_profile_with_an_endpoint(clean_environment, monkeypatch):
    (clean_environment / "credentials").write_text("[team]\naws_access_key_id = AK\naws_secret_access_key = SK\n")
    (clean_environment / "config").write_text(
        "[profile team]\nregion = eu-north-1\nendpoint_url = https://store.example:9000\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "team")
    found = storage.resolve_s3()
    assert found == storage.S3Settings("AK", "SK", None, "eu-north-1", "https://store.example:9000")
    options = storage.delta_storage_options("s3://bucket/kb")
    assert options["aws_endpoint"] == "https://store.example:9000"
    assert "aws_allow_http" not in options
    assert "aws_skip_signature" not in options


def test_temporary_credentials_and_plain_http(clean_environment, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AK",
        "AWS_SECRET_ACCESS_KEY": "SK",
        "AWS_SESSION_TOKEN": "ST",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
    }.items():
        monkeypatch.setenv(name, value)
    options = storage.delta_storage_options("s3://bucket/kb")
    assert (options["aws_session_token"], options["aws_allow_http"]) == ("ST", "true")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "renewed")
    assert storage.delta_storage_options("s3://bucket/kb")["aws_session_token"] == "renewed"


def test_no_credentials_at_all_is_anonymous_access_to_aws(clean_environment):
    found = storage.resolve_s3()
    assert (found.access_key, found.endpoint, found.region) == (None, None, "us-east-1")
    assert storage.delta_storage_options("s3://bucket/kb")["aws_skip_signature"] == "true"


def test_a_local_path_needs_no_options():
    assert storage.delta_storage_options("/tmp/kb") is None


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("missing", "could not be found"),
        ("half", "aws_secret_access_key"),
        ("failing", "custom-process"),
        ("signed-out", "SSO"),
        ("odd-endpoint", "Invalid endpoint"),
    ],
)
def test_settings_that_boto3_refuses_are_said_with_the_profile(clean_environment, monkeypatch, profile, says):
    (clean_environment / "config").write_text(
        "[profile half]\naws_access_key_id = AK\n"
        "[profile failing]\ncredential_process = false\n"
        "[profile signed-out]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\nregion = us-east-1\n"
        "[sso-session s]\nsso_start_url = https://example.invalid/start\nsso_region = us-east-1\n"
        "[profile odd-endpoint]\nendpoint_url = minio:9000\n"
    )
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(StorageError, match=rf"{says}.*AWS profile {profile}\)\. Help:"):
        storage.filesystem("s3://bucket/kb")


@pytest.mark.parametrize(
    ("asked", "passed_on"),
    [
        ("https://s3.eu-north-1.amazonaws.com", None),
        ("https://bucket.vpce-1a2b.s3.eu-north-1.vpce.amazonaws.com", "same"),
        ("https://s3-fips.eu-north-1.amazonaws.com", "same"),
        ("https://s3.us-west-2.amazonaws.com", "same"),
    ],
)
def test_an_endpoint_of_amazons_that_is_not_the_regions_own_is_used(clean_environment, monkeypatch, asked, passed_on):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", asked)
    assert storage.resolve_s3().endpoint == (asked if passed_on else None)
