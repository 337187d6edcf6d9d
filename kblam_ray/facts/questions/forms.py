"""How questions and answers are worded: paraphrases of every kind of question, and sentences that answer them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kblam_ray.facts.fact import Fact

SIMPLE_FORMS = (
    "What is the {p} of {e}?",
    "what is the {p} of {e}",
    "What's {e}'s {p}?",
    "Tell me the {p} of {e}.",
    "Could you tell me the {p} of {e}?",
    "{e}: {p}?",
    "{p} of {e}?",
    "I would like to know the {p} of {e}.",
    "Do you know {e}'s {p}?",
    "Which {p} does {e} have?",
    "What {p} is recorded for {e}?",
    "For {e}, what is the {p}?",
    "Please look up {e} and give me the {p}.",
    "As for {e}, I am looking for the {p}.",
    "Regarding {e}: what do we have as {p}?",
    "My colleague asked about {e}. What should I tell her about the {p}?",
    "Give me one thing about {e}: the {p}.",
    "Concerning {e}, which {p} is right?",
    "How would you fill in the field \"{p}\" for {e}?",
    "If somebody wanted the {p} of {e}, what would you say?",
    "Can you find out what the {p} of {e} is?",
    "{e} has a {p}. What is it?",
    "In the case of {e}, name the {p}.",
    "What do you have under {p} for {e}?",
)  # fmt: skip
"""Plain questions: `{e}` the entity, `{p}` the property. All of them name both."""

SYNONYM_FORMS = (
    "What is the {s} of {e}?",
    "Tell me the {s} of {e}.",
    "{e}: {s}?",
    "I need {e}'s {s}.",
    "Do you know the {s} of {e}?",
    "For {e}, what is the {s}?",
)
"""Paraphrases: `{s}` is a synonym of the property."""

NATIVE_FORMS = {
    "ja": ("{e}の{p}は何ですか?", "{e}の{p}を教えてください。"),
    "ko": ("{e}의 {p}은(는) 무엇인가요?", "{e}의 {p}을(를) 알려 주세요."),
    "zh": ("{e}的{p}是什么?", "请告诉我{e}的{p}。", "{e}的{p}?"),
}
NATIVE_DESCRIPTIONS = {
    "ja": ("{e}とは何ですか?", "{e}って何?"),
    "ko": ("{e}은(는) 무엇인가요?", "{e}이(가) 뭐예요?"),
    "zh": ("{e}是什么?", "什么是{e}?", "介绍一下{e}。"),
}
"""For facts whose value is Japanese, Korean or Chinese: a property in that script, and a description."""

DESCRIPTIVE = ("description", "definition")
"""Properties that say what the entity is: "What is {e}?" is the plain question for them."""

NATIVE_DESCRIPTIVE = ("説明", "定義", "설명", "정의", "描述", "定义", "简介")
"""The same in Japanese, Korean and Chinese."""

TWO_ENTITY_FORMS = (
    "What is the {p1} of {e1} and the {p2} of {e2}?",
    "Tell me the {p1} of {e1} and also {e2}'s {p2}.",
    "I need two things: {e1}'s {p1} and {e2}'s {p2}.",
    "{p1} of {e1}, {p2} of {e2}?",
    "Could you look up the {p1} of {e1}, and then the {p2} of {e2}?",
    "First {e1}: what is the {p1}? Then {e2}: what is the {p2}?",
)
SAME_PROPERTY_FORMS = (
    "What is the {p1} of {e1} and of {e2}?",
    "Compare {e1} and {e2}: what {p1} does each have?",
    "Do {e1} and {e2} have the same {p1}? Name both.",
    "Give me the {p1} for {e1} as well as for {e2}.",
)

OPEN_ENDED_FORMS = (
    "What do you know about {e}?",
    "Tell me about {e}.",
    "Describe {e}.",
    "Write a short note on {e}.",
    "I am preparing a talk on {e}. What should I mention?",
    "Who or what is {e}? Tell me everything you have.",
    "Give me an overview of {e}.",
    "Summarize what is known about {e}.",
)

FOLLOW_UP_FORMS = (
    "And the {p}?",
    "What about the {p}?",
    "And what is the {p}?",
    "Thanks. The {p} too, please.",
    "I also need the {p}.",
    "The {p} as well?",
)


def native_language(text: str) -> str | None:
    """`ja`, `ko` or `zh` for text in their scripts, else None."""
    for language, script in (("ja", "[ぁ-ゖァ-ヺ]"), ("ko", "[가-힣]"), ("zh", "[㐀-鿿]")):
        if re.search(script, text):
            return language
    return None


def is_description(property: str) -> bool:
    """Whether a property says what its entity is, in English, Japanese, Korean or Chinese."""
    return property.casefold() in DESCRIPTIVE or property in NATIVE_DESCRIPTIVE


_WHAT_IT_IS = (
    "What is {e}?",
    "What's {e}?",
    "Who is {e}?",
    "What is meant by {e}?",
    "What does {e} mean?",
    "Define {e}.",
    "Explain {e}.",
    *OPEN_ENDED_FORMS,
    *(form for forms in NATIVE_DESCRIPTIONS.values() for form in forms),
)


def _bare(text: str) -> str:
    """A question without marks, blanks, case, and the Korean particle that its entity takes."""
    text = re.sub(r"(?<=\{e\})(은\(는\)|이\(가\)|이란|란|은|는|이|가)", "", text)
    return re.sub(r"[\s?!.,:¿¡？！。，、：]+", " ", text).strip().casefold()


_WHAT_IT_IS_BARE = frozenset(map(_bare, _WHAT_IT_IS))


def asks_what_it_is(question: str, start: int, stop: int) -> bool:
    """Whether a question asks what an entity is, and for nothing else: "What is AI?" wants a description.

    Args:
        start, stop: where in the question the entity's name stands.
    """
    return _bare(f"{question[:start]}{{e}}{question[stop:]}") in _WHAT_IT_IS_BARE


def plain_forms(fact: Fact, asks: Sequence[str]) -> tuple[str, ...]:
    """The simple questions that fit a fact: in the language of its value, where that has forms of its own.

    Args:
        asks: whole questions for the property; they are plain ones if it is a description.
    """
    language = native_language(fact.value)
    if fact.property in DESCRIPTIVE:
        if language:
            return NATIVE_DESCRIPTIONS[language]
        return (*SIMPLE_FORMS, *asks)
    if language and native_language(fact.property):
        return NATIVE_FORMS[language]
    return SIMPLE_FORMS


def listed(texts: Sequence[str]) -> str:
    """Several texts as a sentence lists them."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def answer_sentence(entity: str, property: str, values: Sequence[str]) -> str:
    """The sentence that states a fact, in the words of its key text: `The {property} of {entity} is {value}.`

    A Japanese, Korean or Chinese description says by itself what it describes, and is stated as it stands: an English
    sentence around it would be none in either language.
    """
    if is_description(property) and all(map(_is_native, values)):
        return " ".join(values)
    text = f"The {property} of {entity} is {listed(values)}"
    return text if text.endswith((".", "!", "?", "。")) else text + "."


def _is_native(text: str) -> bool:
    """Whether a text is Japanese, Korean or Chinese; one in another language may yet have a name in their scripts."""
    letters = re.findall("[ぁ-ゖァ-ヺー가-힣㐀-鿿]", text)
    return len(letters) >= 2 * max(1, len(re.findall(r"[^\W\d_ぁ-ゖァ-ヺー가-힣㐀-鿿]+", text)))
