"""Local paths and `s3://` URIs behind one pyarrow filesystem, with boto3's way of finding credentials.

boto3 looks in the environment, the shared profiles and the instance or container role, and takes the
endpoint from `AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_S3` or the profile, so an S3-compatible store needs
no setting of ours. What it finds is handed to pyarrow (data files) and to deltalake (the log). Every
process resolves for itself and again after a minute, so short-lived credentials never travel or go stale.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow.fs as pafs

from kblam_ray.errors import InputError, StorageError

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 60
MAX_ATTEMPTS = 4
DELTA_MAX_RETRIES = 6
RETRY_TIMEOUT_S = 30

RESOLVE_EVERY_S = 60
"""Resolving takes 70-200 ms, a hundred times a small read. boto3 renews credentials minutes before they expire."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def normalize(uri: str | os.PathLike[str]) -> str:
    """`uri` as an absolute local path or an `s3://bucket/key` URI without a trailing slash.

    Raises:
        InputError: another scheme than `s3` or `file`.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise InputError("an empty path", help="give a local path or s3://bucket/prefix")
    if is_s3(text):
        if not urlparse(text).netloc:
            raise InputError("an S3 URI without a bucket", where=text, help="write s3://bucket/prefix")
        return text.rstrip("/")
    if text.startswith("file://"):
        parsed = urlparse(text)
        if parsed.netloc not in ("", "localhost"):
            raise InputError("a file URI of another host", where=text, help="write file:///path, with three slashes")
        text = unquote(parsed.path)
    elif "://" in text:
        raise InputError(
            "an unsupported storage scheme", where=text, help="use a local path or s3:// (any S3-compatible store)"
        )
    return str(Path(text).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def beside(uri: str, kind: str, name: str) -> str:
    """Where what belongs to a table and is no part of it goes: a folder next to it, or inside one that is a bucket."""
    is_bucket = is_s3(uri) and "/" not in uri.removeprefix("s3://")
    return join(uri, f"_{kind}", name) if is_bucket else join(f"{uri}.{kind}", name)


@dataclass(frozen=True)
class S3Settings:
    """What boto3 resolved: credentials (None: anonymous), region and endpoint."""

    access_key: str | None
    secret_key: str | None
    session_token: str | None
    region: str
    endpoint: str | None


def resolve_s3() -> S3Settings:
    """Ask boto3 for credentials, region and endpoint, as the AWS command line would find them.

    Raises:
        StorageError: no such profile, a sign-in that has run out, an endpoint that is no URL.
    """
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _resolve_s3(environment, int(time.monotonic() // RESOLVE_EVERY_S))


@lru_cache(maxsize=4)
def _resolve_s3(environment: tuple[tuple[str, str], ...], period: int) -> S3Settings:
    # The arguments are what makes an answer out of date; boto3 reads the environment itself.
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        session = boto3.Session()
        found = session.get_credentials()
        frozen = found.get_frozen_credentials() if found else None
        region = session.region_name or "us-east-1"
        endpoint = session.client("s3", region_name=region).meta.endpoint_url
    except (BotoCoreError, ClientError, ValueError) as error:
        raise StorageError(
            f"the S3 settings or credentials cannot be used: {error}",
            where=f"AWS profile {os.environ.get('AWS_PROFILE', 'default')}",
            help="check AWS_PROFILE, AWS_ENDPOINT_URL and the AWS configuration files, or sign in again",
        ) from error
    own_hosts = [host + ending for host in ("s3", f"s3.{region}") for ending in (".amazonaws.com", ".amazonaws.com.cn")]
    return S3Settings(
        access_key=frozen.access_key if frozen else None,
        secret_key=frozen.secret_key if frozen else None,
        session_token=frozen.token if frozen else None,
        region=region,
        # Not every name of Amazon's is the default: private (VPC), dual-stack and FIPS endpoints are asked for.
        endpoint=None if urlparse(endpoint).netloc in own_hosts else endpoint,
    )


def filesystem(uri: str, *, is_small: bool = False) -> tuple[pafs.FileSystem, str]:
    """A pyarrow filesystem for `uri`, and the path of `uri` inside it.

    Args:
        is_small: an object that fits one request is put by one, when its stream is closed, not by a multipart upload.
    """
    uri = normalize(uri)
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    settings = resolve_s3()
    options = {
        "region": settings.region,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": REQUEST_TIMEOUT_S,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        "allow_delayed_open": is_small,
    }
    if settings.access_key:
        options["access_key"] = settings.access_key
        options["secret_key"] = settings.secret_key
        if settings.session_token:
            options["session_token"] = settings.session_token
    else:
        options["anonymous"] = True
    if settings.endpoint:
        url = urlparse(settings.endpoint)
        options["endpoint_override"] = url.netloc
        options["scheme"] = url.scheme
    return pafs.S3FileSystem(**options), uri.removeprefix("s3://")


def delta_storage_options(uri: str) -> dict[str, str] | None:
    """deltalake's `storage_options` for `uri`; None for a local path."""
    if not is_s3(uri):
        return None
    settings = resolve_s3()
    options = {
        "aws_region": settings.region,
        # Without a lock table the log is safe only if a commit's file is put on condition that it is not there yet.
        "aws_conditional_put": "etag",
        "timeout": f"{REQUEST_TIMEOUT_S}s",
        "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
        "max_retries": str(DELTA_MAX_RETRIES),
        "retry_timeout": f"{RETRY_TIMEOUT_S}s",
    }
    if settings.access_key and settings.secret_key:
        options["aws_access_key_id"] = settings.access_key
        options["aws_secret_access_key"] = settings.secret_key
        if settings.session_token:
            options["aws_session_token"] = settings.session_token
    else:
        options["aws_skip_signature"] = "true"
    if settings.endpoint:
        options["aws_endpoint"] = settings.endpoint
        if settings.endpoint.startswith("http://"):
            options["aws_allow_http"] = "true"
    return options


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn the operating system's and the object store's failures at `uri` into a StorageError."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"cannot read or write: {reason}",
            where=uri,
            help="check that the place exists, that you may write there, and, for S3, the endpoint "
            "(AWS_ENDPOINT_URL), region and credentials: `python -m kblam_ray.check --kb URI`",
        ) from error


def replace_file(uri: str, data: bytes) -> None:
    """Write a small file, in the place of one that may be there: readers see the old one or the new one, whole.

    Raises:
        StorageError: the place cannot be written.
    """
    with storage_errors(uri):
        if is_s3(uri):
            # One small object in one request: it appears whole or not at all.
            store, path = filesystem(uri, is_small=True)
            with store.open_output_stream(path) as stream:
                stream.write(data)
            return
        place = Path(uri)
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            unfinished.write_bytes(data)
            sync(str(unfinished))
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)


def read_file(uri: str) -> bytes | None:
    """The bytes of a small file; None if it is not there.

    Raises:
        StorageError: the place cannot be read.
    """
    with storage_errors(uri):
        store, path = filesystem(uri)
        try:
            with store.open_input_stream(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None


@contextmanager
def whole_or_gone(uri: str) -> Iterator[None]:
    """Remove the local file `uri` if what writes it fails: an unfinished one that stayed could fill the disk for good.

    An object store shows no unfinished object.
    """
    with ExitStack() as removal:
        if not is_s3(uri):
            removal.callback(_remove, Path(uri))
        yield
        removal.pop_all()


def _remove(place: Path) -> None:
    with suppress(OSError):
        place.unlink()


def sync(uri: str) -> None:
    """Make a finished local file or folder, and its entry in its folder, survive a loss of power.

    An object store has done as much when it answers.
    """
    if is_s3(uri):
        return
    for path in (uri, os.path.dirname(uri)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
