"""`make demo`: a real knowledge base embedded by Ray, asked and changed, an adapter fitted to another, and a server.

Every step prints the command or the Python that does it, so that it can be repeated by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kblam_ray import Fact, KnowledgeBase
from kblam_ray.demo import server
from kblam_ray.demo.server import FOLDER, ROOT, TABLE
from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL
from kblam_ray.demo.world import ATTRIBUTION, write_world
from kblam_ray.table import LIVE_FACTS_SQL

if TYPE_CHECKING:
    from kblam_ray import KnowledgeMemory, KnowledgeModel

RELIABLE = "So small a model is reliable here on plain questions, with the question prior."
QUESTIONS = [
    "What is the capital of Kenya?",
    "Which currency code does Japan have?",
    "What is the capital of Atlantis?",
]


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    facts_file, table = FOLDER / "world.jsonl", TABLE

    step("Facts on the world's countries and cities")
    count = write_world(facts_file)
    print(f"{count:,} facts in {facts_file}\n{ATTRIBUTION}")
    with facts_file.open(encoding="utf-8") as lines:
        print(next(lines).strip())

    step("Embed them: Ray Data shards the work, all-MiniLM-L6-v2 embeds, one commit makes version 0")
    embed = ["--kb", str(table), "--input", str(facts_file), "--num-workers", "2"]
    run_job("embed_kb.py", embed)

    step("Again: nothing changed, so nothing is embedded and no version is made")
    run_job("embed_kb.py", embed)

    step("Ask: a frozen model of 8 million parameters attends to all facts at once, and names those it used")
    from kblam_ray import KnowledgeModel

    kb = KnowledgeBase.open(str(table))
    model = KnowledgeModel.from_pretrained(BASE_MODEL, ADAPTER)
    memory = model.load(kb)
    print(f"{memory.num_facts:,} facts in {memory.nbytes / 1e6:.1f} MB. {RELIABLE}")
    ask(model, memory, QUESTIONS)

    step("Change one fact, delete another: each write is one small new version, nothing is trained or started again")
    kb.upsert([Fact("Kenya", "capital", "Mombasa", '{"source":"the demo"}')])
    kb.delete([("Japan", "telephone prefix")])
    difference = kb.changes(0, KnowledgeBase.open(str(table)).version)
    print(f"{difference.upserts.num_facts} changed, {len(difference.deleted_ids)} deleted")
    ask(model, model.refresh(memory, str(table)), QUESTIONS[:1])
    print("and version 0 still says:")
    ask(model, memory, QUESTIONS[:1])

    step("Sync with the source again: only the difference is embedded; then compact")
    run_job("embed_kb.py", [*embed, "--mode", "sync"])
    run_job("compact_kb.py", ["--kb", str(table)])

    step("Another knowledge base, made up, and an adapter fitted to it in closed form: regressions, no gradient")
    fit_adapter(FOLDER / "made-up")

    step("Any engine that reads Delta tables reads it; this is SQL through the deltalake package alone")
    query_with_sql(str(table))

    step("Serve it: Ray Serve, the OpenAI interface, and a fact that changes while it runs")
    port = server.free_port()
    print(f"$ {' '.join(['python', *server.serve_command(port)[1:]]).replace(f'{ROOT}/', '')}", flush=True)
    with server.running(port) as address:
        server.converse(address)
    print("`make serve` leaves it running, with a page to ask and to change facts.")
    return 0


def step(title: str) -> None:
    print(f"\n\033[1m== {title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def fit_adapter(table: Path) -> None:
    """Make facts up, embed them, fit an adapter on nine tenths of the entities and ask about the others."""
    facts_file = f"{table}.jsonl"
    run_job("synthesize_kb.py", ["--num-facts", "3000", "--seed", "5", "--output", facts_file])
    run_job("embed_kb.py", ["--kb", str(table), "--input", facts_file, "--num-workers", "2"])
    fit = ["--kb", str(table), "--output", f"{table}-adapter", "--method", "closed-form", "--num-workers", "0"]
    fit += ["--closed-form-num-questions", "1000", "--no-calibrate", "--evaluation-num-facts", "200"]
    fit += ["--evaluation-num-questions", "40", "--evaluation-retrieval-only", "--no-evaluation-prior"]
    summary = run_job("train_adapter.py", fit, shown=("adapter", "kb_layers", "num_facts", "seconds"))
    for row in summary["evaluation"]:
        found = f"{row['retrieval @1']:.0%} first, {row['retrieval @5']:.0%} among the first five"
        print(
            f"  {row['system']}: of questions about entities never fitted on, the fact is {found} of {row['num_facts']}"
        )


def run_job(job: str, arguments: list[str], shown: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a job as a user would and show its summary, or some of it; a job that fails ends the demo."""
    print(f"$ python jobs/{job} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=server.quiet_environment())
    summary = json.loads(done.stdout.splitlines()[-1])
    if not summary["ok"]:
        print(summary["error"]["message"], flush=True)
        sys.exit(done.returncode)
    named = {name: summary[name] for name in shown} if shown else summary
    print("  ".join(f"{name}={value}" for name, value in named.items() if value not in (None, "")), flush=True)
    return summary


def ask(model: KnowledgeModel, memory: KnowledgeMemory, questions: list[str]) -> None:
    """Questions and answers, with the facts that each answer rests on."""
    for question in questions:
        answer = model.ask(question, memory, grounding="verbatim")
        print(f"  {question}\n    {answer.text}")
        for fact in answer.citations:
            told = f"the {fact.property} of {fact.entity}: {fact.value}"
            print(f"      <- {told}  (share {fact.score:.2f}, fact {fact.fact_id})")
        print(f"      {'refused, ' if answer.refused else ''}version {answer.kb_version}")


def query_with_sql(table: str) -> None:
    from deltalake import DeltaTable, QueryBuilder

    sql = f"SELECT property, count(*) AS facts FROM ({LIVE_FACTS_SQL}) GROUP BY property ORDER BY facts DESC LIMIT 5"
    rows = QueryBuilder().register("kb", DeltaTable(table)).execute(sql).read_all()
    for name, count in zip(rows["property"].to_pylist(), rows["facts"].to_pylist(), strict=True):
        print(f"  {count:5,}  {name}")


if __name__ == "__main__":
    sys.exit(main())
