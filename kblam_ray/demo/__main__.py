"""`make demo`: a real knowledge base embedded by Ray, committed, changed, and read back.

Every step prints the command or the Python that does it, so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from kblam_ray import Fact, KnowledgeBase, load_encoder
from kblam_ray.demo.world import ATTRIBUTION, world_facts
from kblam_ray.facts import write_facts
from kblam_ray.table import LIVE_FACTS_SQL

ROOT = Path(__file__).parents[2]
FOLDER = Path("demo-kb")
QUESTIONS = ["What is the capital of Kenya?", "Which currency do people use in Japan?", "How many live in Lagos?"]


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    facts_file, table = FOLDER / "world.jsonl", FOLDER / "world"

    step("Facts on the world's countries and cities")
    count = write_facts(world_facts(), str(facts_file))
    print(f"{count:,} facts in {facts_file}\n{ATTRIBUTION}")
    with facts_file.open(encoding="utf-8") as lines:
        print(next(lines).strip())

    step("Embed them: Ray Data shards the work, all-MiniLM-L6-v2 embeds, one commit makes version 0")
    embed = ["--kb", str(table), "--input", str(facts_file), "--num-workers", "2"]
    run_job("embed_kb.py", embed)

    step("Again: nothing changed, so nothing is embedded and no version is made")
    run_job("embed_kb.py", embed)

    step("Read back: the facts whose key embedding is nearest to a question's")
    kb = KnowledgeBase.open(str(table))
    ask(kb)

    step("Change one fact, delete another: each write is one small new version")
    kb.upsert([Fact("Kenya", "capital", "Mombasa", '{"source":"the demo"}')])
    kb.delete([("Japan", "telephone prefix")])
    kb = KnowledgeBase.open(str(table))
    difference = kb.changes(0, kb.version)
    print(f"version 0 -> {kb.version}: {difference.upserts.num_facts} changed, {len(difference.deleted_ids)} deleted")
    ask(kb, QUESTIONS[:1])
    print("and version 0 still says:")
    ask(KnowledgeBase.open(str(table), version=0), QUESTIONS[:1])

    step("Sync with the source again: only the difference is embedded; then compact")
    run_job("embed_kb.py", [*embed, "--mode", "sync"])
    run_job("compact_kb.py", ["--kb", str(table)])

    step("Any engine that reads Delta tables reads it; this is SQL through the deltalake package alone")
    query_with_sql(str(table))
    return 0


def step(title: str) -> None:
    print(f"\n\033[1m== {title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def run_job(job: str, arguments: list[str]) -> None:
    """Run a job as a user would and show its summary; a job that fails ends the demo."""
    print(f"$ python jobs/{job} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
    # Ray's native log speaks on stderr of what it does to recover; a demonstration shows the job's own progress.
    environment = {**os.environ, "RAY_BACKEND_LOG_LEVEL": "fatal"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    summary = json.loads(done.stdout.splitlines()[-1])
    print("  ".join(f"{name}={value}" for name, value in summary.items() if value not in (None, "")), flush=True)
    if not summary["ok"]:
        sys.exit(done.returncode)


def ask(kb: KnowledgeBase, questions: list[str] = QUESTIONS) -> None:
    """Plain nearest-key search by cosine: what the attention of a trained adapter will do better."""
    encoder = load_encoder(kb.encoder.name)
    snapshot = kb.snapshot()
    keys_MP = snapshot.key_embeddings_MP.astype(np.float32)
    for question, embedding_P in zip(questions, encoder.encode(questions), strict=True):
        scores_M = keys_MP @ embedding_P
        fact = snapshot.facts.slice(int(scores_M.argmax()), 1).to_pylist()[0]
        print(
            f"  {question}\n    {fact['value']}   <- the {fact['property']} of {fact['entity']}"
            f"  (cosine {scores_M.max():.2f}, version {snapshot.version}, fact {fact['fact_id']})"
        )


def query_with_sql(table: str) -> None:
    from deltalake import DeltaTable, QueryBuilder

    sql = f"SELECT property, count(*) AS facts FROM ({LIVE_FACTS_SQL}) GROUP BY property ORDER BY facts DESC LIMIT 5"
    rows = QueryBuilder().register("kb", DeltaTable(table)).execute(sql).read_all()
    for name, count in zip(rows["property"].to_pylist(), rows["facts"].to_pylist(), strict=True):
        print(f"  {count:5,}  {name}")


if __name__ == "__main__":
    sys.exit(main())
