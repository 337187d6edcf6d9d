"""`python -m kblam_ray.check` says what is wrong and what to do, whatever is missing, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import boto3
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from kblam_ray import KnowledgeBase
from kblam_ray.check import main
from kblam_ray.encoders import load_encoder


def problems(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the check prints, after making sure that it found a problem, with a remedy."""
    assert main(list(arguments)) == 1
    said = capsys.readouterr().out
    assert "  !! " in said
    assert "Help: " in said.split("  !! ", 1)[1]
    return said


def test_a_machine_that_is_ready(tmp_path, capsys):
    kb = tmp_path / "deep" / "kb"
    assert main(["--encoder", "hashing", "--kb", str(kb)]) == 0
    assert "none yet at" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    KnowledgeBase.create(str(kb), load_encoder("hashing")).upsert([("France", "capital", "Paris")])
    before = sorted(tmp_path.rglob("*"))
    assert main(["--encoder", "hashing", "--kb", str(kb)]) == 0
    assert "version 0, 1 facts, encoder hashing" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


_CHECK_WITHOUT = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == {package!r} else find_spec(name, *rest)

from kblam_ray.check import main
sys.exit(main(["--encoder", "hashing", "--kb", {kb!r}]))
"""


@pytest.mark.parametrize("package", ["pyarrow", "boto3"])
def test_a_package_of_the_core_that_is_missing(tmp_path, package):
    script = _CHECK_WITHOUT.format(package=package, kb="s3://bucket/kb")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"cannot be checked: No module named '{package}'" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("encoder", "says"),
    [("no-such-model", "HF_HUB_OFFLINE forbids the hub"), ("openai:text-embedding-3-small", "set OPENAI_API_KEY")],
)
def test_an_encoder_that_cannot_be_had(encoder, says):
    # A process of its own: the hub's library reads HF_HUB_OFFLINE once, when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": ""}
    command = [sys.executable, "-m", "kblam_ray.check", "--encoder", encoder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stdout
    assert "Traceback" not in done.stderr


def test_places_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "Not a directory" in problems(capsys, "--encoder", "hashing", "--kb", str(tmp_path / "file" / "kb"))
    assert "an empty path" in problems(capsys, "--encoder", "hashing", "--kb", "")
    write_deltalake(tmp_path / "foreign", pa.table({"a": [1]}))
    assert "not one of kblam-ray's" in problems(capsys, "--encoder", "hashing", "--kb", str(tmp_path / "foreign"))


def test_object_storage(s3_uri, capsys, monkeypatch):
    bucket = s3_uri.removeprefix("s3://")
    for uri in (s3_uri, f"{s3_uri}/team/kb"):
        assert main(["--encoder", "hashing", "--kb", uri]) == 0
        assert "can write, read and delete" in capsys.readouterr().out
    left = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
    assert [item["Key"] for item in left if not item["Key"].endswith("/")] == []
    said = problems(capsys, "--encoder", "hashing", "--kb", "s3://no-such-bucket-here/kb")
    assert "bucket does not exist" in said
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "profile (nobody) could not be found" in problems(capsys, "--encoder", "hashing", "--kb", s3_uri)


@pytest.fixture
def refusing_endpoint(monkeypatch) -> Iterator[None]:
    """A store that does not know the key."""

    class Refuse(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = refuse

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "wrong",
        "AWS_SECRET_ACCESS_KEY": "wrong",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    server.shutdown()
    server.server_close()


def test_credentials_that_the_store_refuses(refusing_endpoint, capsys):
    said = problems(capsys, "--encoder", "hashing", "--kb", "s3://bucket/kb")
    assert "key wron..." in said
    assert "The key does not exist" in said
