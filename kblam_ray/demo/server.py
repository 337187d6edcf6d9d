"""The demo's server: started as a user would start it, asked through the official client, changed while it runs.

`make serve` runs this module: the demo's knowledge base is embedded if it is not there yet, and the server stays up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kblam_ray.demo.world import ATTRIBUTION, write_world

ROOT = Path(__file__).parents[2]
FOLDER = Path("demo-kb")
TABLE = FOLDER / "world"
KB = "world"
START_S = 300
"""Longest start: Ray, Serve and a model on a busy machine."""

ANSWERED = "What is the capital of Kenya?"
REFUSED = "What is the capital of Atlantis?"
CHANGED = "What is the population of Iceland?"
CHANGE = {"entity": "Iceland", "property": "population", "value": "412,345", "metadata": {"source": "the demo"}}


def serve_command(port: int) -> list[str]:
    """What serves the demo's knowledge base; verbatim, because so small a model cannot spell what it attends to."""
    return [
        *(sys.executable, str(ROOT / "jobs" / "serve.py")),
        *("--kb", f"{KB}={TABLE}", "--port", str(port), "--grounding", "verbatim"),
        *("--state-uri", str(FOLDER / "state.json")),
    ]


@contextmanager
def running(port: int) -> Iterator[str]:
    """A server that answers, until the block is left; gives its address and takes it down by SIGTERM, as a scheduler.

    Raises:
        RuntimeError: it ended, or does not answer within START_S.
    """
    process = subprocess.Popen(serve_command(port), stdout=subprocess.PIPE, text=True, env=quiet_environment())
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(process, address)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        summary = process.communicate()[0].splitlines()
        print(summary[-1] if summary else f"the server ended with {process.returncode}", flush=True)


def quiet_environment() -> dict[str, str]:
    """Ray's native log speaks on stderr of what it does to recover; a demonstration shows the job's own progress."""
    return {**os.environ, "RAY_BACKEND_LOG_LEVEL": "fatal"}


def converse(address: str) -> None:
    """Three questions through the official `openai` client, and a fact changed between two answers."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none-needed-on-loopback")
    models = [model.id for model in client.models.list()]
    model = next(name for name in models if name.endswith(f":{KB}"))
    print(f"models: {', '.join(models)}")
    for question in (ANSWERED, REFUSED, CHANGED):
        _ask(client, model, question)
    print(f"  POST {KB}/facts?wait=true  {json.dumps(CHANGE)}")
    written = post(f"{address}/v1/knowledge_bases/{KB}/facts?wait=true", {"facts": [CHANGE]})
    print(f"    {json.dumps(written)}")
    _ask(client, model, CHANGED)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON body."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ask(client: Any, model: str, question: str) -> None:
    asked = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    print(f"  {question}\n    {asked.choices[0].message.content}")
    for fact in asked.citations:
        print(f"      <- the {fact['property']} of {fact['entity']}: {fact['value']}  (share {fact['score']:.2f})")
    print(f"      {'refused, ' if asked.refused else ''}version {asked.kb_version}", flush=True)


def _wait_until_it_answers(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered; its messages say why")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server does not answer within {START_S} s")


def main() -> int:
    if not (TABLE / "_delta_log").exists():
        facts_file = FOLDER / "world.jsonl"
        print(f"{write_world(facts_file):,} facts\n{ATTRIBUTION}", flush=True)
        embed = [sys.executable, str(ROOT / "jobs" / "embed_kb.py"), "--kb", str(TABLE), "--input", str(facts_file)]
        done = subprocess.run(embed, env=quiet_environment(), check=False)
        if done.returncode:
            return done.returncode
    port = int(os.environ.get("PORT", "8000"))
    print(f"Open http://127.0.0.1:{port}/ when the server says that it answers; Ctrl-C stops it.", flush=True)
    os.environ.update(quiet_environment())
    command = serve_command(port)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
