"""Tokens become text that is never taken back, and stop texts are not said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import llama_tokenizer, phi_tokenizer
from serving_samples import demo_model

from kblam_ray.model.token_text import BROKEN, MOST_TOKENS, TokenText
from kblam_ray.serving.engine.stops import StopFilter

TEXTS = [
    "The capital of France is Paris.",
    "人工智能是模拟人类智能的技术, naïve café.",
    "👩‍👩‍👧‍👦 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f1f0\U0001f1ea!",
    "two  blanks\n\nand lines\ttoo",
    "word " * 300,
]
TOKENIZERS = {"demo": lambda: demo_model().tokenizer, "llama": llama_tokenizer, "phi": phi_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_one_by_one_make_the_text_of_all_of_them(name: str, text: str):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    token_text = TokenText(tokenizer)
    pieces = [token_text.feed([token]) for token in ids] + [token_text.finish()]
    assert "".join(pieces) == whole
    assert token_text.num_letters == len(whole)
    if BROKEN not in whole:
        assert not any(BROKEN in piece for piece in pieces)


def test_long_answers_are_not_decoded_from_their_beginning_each_time():
    tokenizer = demo_model().tokenizer
    longest = 0

    class Watched:
        clean_up_tokenization_spaces = False

        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer.encode("word " * 600, add_special_tokens=False)
    token_text = TokenText(Watched())
    said = "".join(token_text.feed([token]) for token in ids) + token_text.finish()
    assert said == tokenizer.decode(ids).lstrip()
    assert longest <= MOST_TOKENS + 1 < len(ids)


def test_a_tokenizer_that_tidies_blanks_does_not_take_letters_back():
    class Tidying:
        clean_up_tokenization_spaces = True

        def decode(self, ids, **options):
            words = ["I", " do", " n't", " know", " ,", " it", " 's", " late", " ."]
            text = "".join(words[place] for place in ids)
            for dirty, tidy in ((" n't", "n't"), (" ,", ","), (" 's", "'s"), (" .", ".")):
                text = text.replace(dirty, tidy)
            return text

    token_text = TokenText(Tidying())
    said = "".join(token_text.feed([token]) for token in range(9)) + token_text.finish()
    assert said == "I don't know, it's late."


def test_bytes_that_never_become_a_character_are_said_at_the_end():
    tokenizer = demo_model().tokenizer
    ids = tokenizer.encode("a👩", add_special_tokens=False)
    assert len(ids) > 2, "the character is one token: this shows nothing"
    token_text = TokenText(tokenizer)
    assert [token_text.feed([token]) for token in ids[:-1]][1:] == [""] * (len(ids) - 2)
    assert token_text.finish() == tokenizer.decode(ids[:-1])[1:]


@pytest.mark.parametrize(
    ("pieces", "stops", "said", "is_stopped"),
    [
        (["The cap", "ital is Na", "irobi."], ["is N"], "The capital", True),
        (["The"], ["The"], "", True),
        (["The capital"], [], "The capital", False),
        (["one\n", "\ntwo"], ["\n\n"], "one", True),
        (["one\n", "two"], ["\n\n"], "one\ntwo", False),
        (["a", "b", "c", "d"], ["bd", "cd"], "ab", True),
        (["abc"], ["b", "abc"], "a", True),
        (["abab", "ac"], ["abac"], "ab", True),
        (["ends with its ", "beginning"], ["beginnings"], "ends with its beginning", False),
        (["text ", " "], [], "text", False),
    ],
)
def test_stop_texts(pieces: list[str], stops: list[str], said: str, is_stopped: bool):
    stop_filter = StopFilter(stops)
    parts = [stop_filter.feed(piece) for piece in pieces] + [stop_filter.finish()]
    assert "".join(parts) == stop_filter.text == said
    assert stop_filter.is_stopped is is_stopped


@given(
    text=st.text("ab \n", max_size=12),
    stops=st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_it_does_not_matter_how_a_text_is_cut(text: str, stops: list[str], data: st.DataObject):
    whole = StopFilter(stops)
    whole.finish(text)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        shortest = text[: min(ends)]
        longest = max((stop for stop in stops if shortest.endswith(stop)), key=len)
        assert whole.text == shortest.removesuffix(longest).rstrip()
    else:
        assert whole.text == text.rstrip()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    bounds = [0, *cuts, len(text)]
    parts = StopFilter(stops)
    said = "".join(parts.feed(text[start:stop]) for start, stop in itertools.pairwise(bounds))
    said += parts.finish()
    assert (said, parts.is_stopped) == (whole.text, whole.is_stopped)
