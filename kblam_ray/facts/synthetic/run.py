"""Write synthetic facts and questions: from templates in shards, or unit by unit from a chat model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field

from kblam_ray.errors import ChatAnswerError, InputError
from kblam_ray.facts.chat import ChatFields, ChatModel, Tokens
from kblam_ray.facts.fact import MAX_NAME_CHARS, Fact
from kblam_ray.facts.output import PART_FACTS, FactsOutput
from kblam_ray.facts.questions import Question, QuestionMaker
from kblam_ray.facts.synthetic.draws import Draws
from kblam_ray.facts.synthetic.generator import BLOCK_FACTS, MAX_FACTS, SyntheticFacts
from kblam_ray.facts.synthetic.recipe import PROPERTIES, Recipe, facts_of
from kblam_ray.facts.units import UnitStore, run_units
from kblam_ray.facts.writing import new_file, write_facts
from kblam_ray.ray_session import start_ray
from kblam_ray.storage import normalize, storage_errors

SHARD_FACTS = PART_FACTS // BLOCK_FACTS * BLOCK_FACTS
"""Facts in one shard: whole blocks, so that all facts of an entity are in one."""

WINDOW_FACTS = 100 * BLOCK_FACTS
"""Questions are asked about this many neighbouring facts at a time."""


class SynthesizeSettings(ChatFields):
    """What `jobs/synthesize_kb.py` takes."""

    output: str = Field(description="a .jsonl, .parquet, .csv or .json file, or a directory for Parquet parts")
    generator: Literal["templates", "openai"] = Field(
        "templates", description="templates need no account; openai asks a chat model"
    )
    num_facts: int = Field(10_000, ge=1, le=MAX_FACTS, description="facts to make")
    seed: int = Field(0, ge=0, lt=1 << 63, description="the same seed makes the same facts and questions")
    questions: str | None = Field(None, description="also write questions about the facts to this .jsonl file")
    num_questions: int = Field(1_000, ge=1, description="questions to write")
    entities_per_request: int = Field(5, ge=1, le=50, description="openai: entities asked for at a time, 3 facts each")
    num_workers: int | None = Field(None, ge=1, description="most workers at a time (default: one per CPU)")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="openai: what a request does to which no valid answer comes; finished ones are kept"
    )
    work_dir: str | None = Field(
        None, description="openai: where finished answers are kept (default: a hidden folder beside the output)"
    )


def synthesize(settings: SynthesizeSettings) -> dict[str, Any]:
    """Write the facts, and the questions if asked for; returns the job's summary.

    Raises:
        InputError: the output cannot be that, or the chat settings are wrong.
        ChatError, StorageError: the endpoint or the disk failed; a rerun asks only for what is missing.
    """
    output = FactsOutput(settings.output)
    if settings.questions and not settings.questions.endswith(".jsonl"):
        raise InputError("questions are JSON Lines", where="--questions", help="end the name in .jsonl")
    make = _from_templates if settings.generator == "templates" else _from_chat
    summary = make(settings, output)
    return {"generator": settings.generator, "seed": settings.seed, "output": output.uri, **summary}


# Templates


@dataclass(frozen=True)
class _Shard:
    """What a Ray task does with the numbers of shards: write each as a part, or hand its facts on."""

    seed: int
    num_facts: int
    output: FactsOutput | None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        maker = SyntheticFacts(self.seed)
        rows: list[dict[str, Any]] = []
        for shard in map(int, batch["id"]):
            facts = list(maker.facts(shard * SHARD_FACTS, min((shard + 1) * SHARD_FACTS, self.num_facts)))
            if self.output:
                write_facts(facts, self.output.part_uri(shard))
                rows.append({"properties": sorted({fact.property for fact in facts})})
            else:
                rows += [{"entity": f.entity, "property": f.property, "value": f.value} for f in facts]
        return {name: [row[name] for row in rows] for name in rows[0]}


def _from_templates(settings: SynthesizeSettings, output: FactsOutput) -> dict[str, Any]:
    num_shards = -(-settings.num_facts // SHARD_FACTS)
    maker = SyntheticFacts(settings.seed)
    properties: set[str] = set()
    start_ray()
    shard = _Shard(settings.seed, settings.num_facts, None if output.is_one_file else output)
    rows = _map_in_order(num_shards, shard, settings.num_workers)
    if output.is_one_file:

        def facts() -> Iterator[Fact]:
            for row in rows:
                properties.add(row["property"])
                yield Fact(**row)

        output.write(facts())
    else:
        for row in rows:
            properties.update(row["properties"])
        output.finish(num_shards)
    summary = {
        "num_facts": settings.num_facts,
        "num_entities": maker.num_entities(settings.num_facts),
        "num_properties": len(properties),
        "rejected": 0,
        "tokens": 0,
    }
    if settings.questions:
        num_windows = min(-(-settings.num_facts // WINDOW_FACTS), settings.num_questions)
        window = _Window(settings.seed, settings.num_facts, settings.num_questions, num_windows)
        lines = (row["line"] for row in _map_in_order(num_windows, window, settings.num_workers))
        summary |= _write_questions(lines, settings.questions)
    return summary


@dataclass(frozen=True)
class _Window:
    """What a Ray task does with the numbers of windows: ask about the facts of each."""

    seed: int
    num_facts: int
    num_questions: int
    num_windows: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"line": [line for number in map(int, batch["id"]) for line in self._lines(number)]}

    def _lines(self, number: int) -> Iterator[str]:
        # Windows lie evenly over all facts, each at the start of a block.
        step = -(-self.num_facts // BLOCK_FACTS) / self.num_windows
        start = int(number * step) * BLOCK_FACTS
        maker = SyntheticFacts(self.seed)
        facts = list(maker.facts(start, min(start + WINDOW_FACTS, self.num_facts)))
        first_unknown = maker.num_entities(self.num_facts)

        def unknown_entity(draws: Draws) -> str:
            # The entities just after the last one: as long as the known ones' names, and in none of the facts.
            return maker.entity_name(first_unknown + draws.below(max(first_unknown, 100)))

        asker = QuestionMaker(facts, self.seed, unknown_entity=unknown_entity)
        asked = range(
            number * self.num_questions // self.num_windows, (number + 1) * self.num_questions // self.num_windows
        )
        for question in asker.questions(asked.start, asked.stop):
            yield _question_line(replace(question, facts=tuple(start + each for each in question.facts)))


def _map_in_order(count: int, work: Any, num_workers: int | None) -> Iterator[dict[str, Any]]:
    """The rows that `work` makes of the numbers 0 to count - 1, on the running Ray, in the order of the numbers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before, context.execution_options.preserve_order = context.execution_options.preserve_order, True
    try:
        numbers = ray.data.range(count, override_num_blocks=count)
        yield from numbers.map_batches(work, batch_size=1, concurrency=num_workers).iter_rows()
    finally:
        context.execution_options.preserve_order = before


# A chat model


def _from_chat(settings: SynthesizeSettings, output: FactsOutput) -> dict[str, Any]:
    chat = ChatFields(**{name: getattr(settings, name) for name in ChatFields.model_fields})
    ChatModel(chat)
    recipe = Recipe(chat, settings.seed, settings.entities_per_request)
    store = UnitStore(settings.work_dir or output.work_uri)
    start_ray()
    harvest = _Harvest(settings.num_facts)
    num_units = failed = reused = 0
    while len(harvest.facts) < settings.num_facts:
        missing = settings.num_facts - len(harvest.facts)
        wanted = -(-missing // (len(PROPERTIES) * settings.entities_per_request))
        units = [recipe.unit(number) for number in range(num_units, num_units + wanted)]
        num_units += wanted
        errors, old = _ask(units, recipe, store, settings)
        failed, reused = failed + len(errors), reused + old
        if errors and settings.on_error == "fail":
            raise errors[0]
        before = len(harvest.facts)
        for unit in units:
            if store.has(unit["key"]):
                harvest.add(store.get(unit["key"]))
        if len(harvest.facts) == before:
            raise ChatAnswerError(
                f"the last {wanted} requests brought no new fact ({before} of {settings.num_facts} are there)",
                where=store.uri,
                help="ask for fewer facts, try another --seed or model, or see the answers in the folder named",
            )
    output.write(harvest.facts)
    summary = {
        "num_facts": len(harvest.facts),
        "num_entities": len({fact.entity for fact in harvest.facts}),
        "num_properties": len({fact.property for fact in harvest.facts}),
        "rejected": harvest.rejected,
        "duplicates": harvest.duplicates,
        "requests": num_units,
        "requests_reused": reused,
        "requests_failed": failed,
        "answers_repeated": harvest.tokens.repeats,
        "tokens": harvest.tokens.prompt + harvest.tokens.completion,
        "prompt_tokens": harvest.tokens.prompt,
        "completion_tokens": harvest.tokens.completion,
        "work_dir": store.uri,
    }
    if settings.questions:
        asker = QuestionMaker(harvest.facts, settings.seed)
        lines = map(_question_line, asker.questions(0, settings.num_questions))
        summary |= _write_questions(lines, settings.questions)
    return summary


def _ask(
    units: list[dict[str, Any]], recipe: Recipe, store: UnitStore, settings: SynthesizeSettings
) -> tuple[list[ChatAnswerError], int]:
    """Do the units; the answers that never became valid, and how many units were there already."""
    there = store.keys()
    missing = [unit for unit in units if unit["key"] not in there]
    errors: list[ChatAnswerError] = []
    outcomes = run_units(
        missing,
        recipe,
        store,
        what="requests",
        num_threads=settings.chat_concurrency,
        num_workers=settings.num_workers,
    )
    for outcome in outcomes:
        if isinstance(outcome.error, ChatAnswerError):
            errors.append(outcome.error)
        elif outcome.error:
            raise outcome.error
    return errors, len(units) - len(missing)


class _Harvest:
    """The facts of stored answers, each entity once, up to a number; and what was left out."""

    def __init__(self, num_facts: int) -> None:
        self.facts: list[Fact] = []
        self.rejected = self.duplicates = 0
        self.tokens = Tokens()
        self._num_facts = num_facts
        self._names: set[str] = set()

    def add(self, result: dict[str, Any]) -> None:
        self.tokens += Tokens(**result["tokens"])
        new: set[str] = set()
        for fact in facts_of(result):
            if len(fact.entity) > MAX_NAME_CHARS:
                self.rejected += 1
            elif (folded := fact.entity.casefold()) in self._names:
                self.duplicates += 1
            elif len(self.facts) < self._num_facts:
                self.facts.append(fact)
                new.add(folded)
        self._names |= new


# Questions


def _question_line(question: Question) -> str:
    return json.dumps(asdict(question), ensure_ascii=False)


def _write_questions(lines: Iterable[str], place: str) -> dict[str, Any]:
    uri, count = normalize(place), 0
    with new_file(uri) as file:
        for line in lines:
            with storage_errors(uri):
                file.write(f"{line}\n".encode())
            count += 1
    return {"questions": uri, "num_questions": count}
