"""ROUGE and BERTScore of answers: by hand, and as their libraries called directly give them."""

from __future__ import annotations

import builtins

import pytest
import torch
from evaluation_samples import synthetic, tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.evaluation import wording
from kblam_ray.evaluation.outcomes import Outcome, System, judged, rows_table, with_bert_scores
from kblam_ray.evaluation.questions import Asked
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.evaluation.statements import ValueIndex
from kblam_ray.evaluation.summary import result
from kblam_ray.evaluation.wording import BertScore, references, rouge

SENTENCES = [
    ("The capital of Peru is Lima.", "Lima"),
    ("Lima", "Lima"),
    ("a small town near the coast", "a town near the northern coast"),
    ("It is Lima, the capital of Peru.", "Paris"),
]


def test_rouge_by_hand():
    found = rouge("the cat sat on the mat", "the cat lay on a mat")
    # Shared words: the, cat, on, mat of six and six; shared pairs: the cat, of five and five.
    assert found.rouge_1 == pytest.approx(4 / 6)
    assert found.rouge_2 == pytest.approx(1 / 5)
    assert found.rouge_l == pytest.approx(4 / 6)
    # All three words, none but one in its order: b c.
    turned = rouge("b c a", "a b c")
    assert (turned.rouge_1, turned.rouge_2, turned.rouge_l) == pytest.approx((1, 1 / 2, 2 / 3))
    # One word of six: precision 1/6, recall 1.
    assert rouge("The capital of Peru is Lima.", "Lima").rouge_1 == pytest.approx(2 * (1 / 6) / (1 / 6 + 1))


def test_the_nearest_reference_counts_measure_by_measure():
    both = references(["Lima"], "The capital of Peru is Lima.")
    assert both == ("Lima", "The capital of Peru is Lima.")
    assert references(["Lima", "Quito"], None) == ("Lima Quito",)
    for text in both:
        assert rouge(text, both).rouge_1 == rouge(text, both).rouge_l == 1
    other = "Peru: Lima is the capital"
    assert rouge(other, both) == wording.Rouge(
        *(max(getattr(rouge(other, one), name) for one in both) for name in ("rouge_1", "rouge_2", "rouge_l"))
    )


@pytest.mark.parametrize("text", ["", "?!", "Paris"])
def test_nothing_shared_is_worth_nothing(text):
    assert rouge(text, "Lima") == wording.Rouge(0, 0, 0)


@pytest.mark.parametrize(("text", "wanted"), SENTENCES)
def test_of_ascii_words_rouge_is_the_library_s(text, wanted):
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(wanted, text)
    found = rouge(text, wanted)
    assert (found.rouge_1, found.rouge_2, found.rouge_l) == tuple(
        expected[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")
    )


def test_words_of_every_script_count():
    # Two of three letters, and both of the wanted ones.
    chinese = rouge("北京市", "北京")
    assert (chinese.rouge_1, chinese.rouge_2, chinese.rouge_l) == pytest.approx((0.8, 2 / 3, 0.8))
    assert rouge("Это Москва", "МОСКВА").rouge_1 == pytest.approx(2 / 3)
    assert rouge("Ürümqi", "Urumqi").rouge_1 == 0
    assert rouge("नई दिल्ली", "नई दिल्ली").rouge_2 == 1
    assert rouge("Ürümqi", "ürümqi").rouge_l == 1


def _bert(folder) -> str:
    """A tiny random BERT whose tokenizer does not say how much it reads."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [text for pair in SENTENCES for text in pair]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=120, max_position_embeddings=40, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def _roberta(folder) -> str:
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for pair in SENTENCES for text in pair]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=42, initializer_range=0.5, **sizes)
    RobertaModel(config).save_pretrained(folder)
    RobertaTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return _bert(tmp_path_factory.mktemp("models") / "bert-base-cased-finetuned-mrpc-like")


def library_f1(folder: str, layer: int, pairs, most_tokens: int = 38) -> list[float]:
    """bert-score called directly; it does not run on a tokenizer that states no length."""
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=folder, num_layers=layer, device="cpu")
    scorer._tokenizer.model_max_length = most_tokens
    return scorer.score([text for text, _ in pairs], [wanted for _, wanted in pairs])[2].tolist()


@pytest.mark.parametrize("layer", [1, 3])
def test_bert_score_is_the_library_s(bert, layer):
    scorer = BertScore.load(bert, layer)
    assert scorer.layer == layer
    found = scorer.f1(*zip(*SENTENCES, strict=True))
    assert found == pytest.approx(library_f1(bert, layer, SENTENCES), abs=1e-5)
    assert found[1] == pytest.approx(1)
    assert len({round(score, 4) for score in found}) == 4


def test_other_encoders_too(tmp_path):
    folder = _roberta(tmp_path / "roberta")
    long = [*SENTENCES, ("Lima " * 60, "Lima")]  # cut where the model ends
    found = BertScore(folder, 2).f1(*zip(*long, strict=True))
    assert found == pytest.approx(library_f1(folder, 2, long, 40), abs=1e-5)


def test_bert_score_by_hand(bert):
    from transformers import AutoModel, AutoTokenizer

    text, wanted = SENTENCES[2]
    model, tokenizer = AutoModel.from_pretrained(bert).requires_grad_(False), AutoTokenizer.from_pretrained(bert)
    sides = []
    for sentence in (text, wanted):
        hidden = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        sides.append(torch.nn.functional.normalize(hidden, dim=1))
    cosines = sides[0] @ sides[1].T
    # Of each token the most similar one; the marks at the ends may be matched, but do not count themselves.
    precision, recall = cosines.max(1).values[1:-1].mean(), cosines.max(0).values[1:-1].mean()
    (found,) = BertScore.load(bert, 2).f1([text], [wanted])
    assert found == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-5)


def test_many_answers_are_scored_in_parts(bert, monkeypatch):
    scorer = BertScore.load(bert, 2)
    whole = scorer.f1(*zip(*SENTENCES, strict=True))
    monkeypatch.setattr(wording, "PAIRS_PER_CALL", 3)
    assert scorer.f1(*zip(*SENTENCES, strict=True)) == pytest.approx(whole, abs=1e-5)


def test_blank_answers_score_nothing(bert):
    scorer = BertScore.load(bert, 1)
    assert scorer.f1(["", " \n", "Lima"], ["Lima", "Lima", "Lima"]) == [0, 0, pytest.approx(1)]
    assert scorer.f1([], []) == []


def test_a_model_is_loaded_once(bert):
    assert BertScore.load(bert, 1) is BertScore.load(bert, 1)
    assert BertScore.load(bert, 2) is not BertScore.load(bert, 1)


def test_the_layer_is_the_published_one_or_the_last(bert, tmp_path):
    assert BertScore.load(bert).layer == 4
    # The library's table has layer 9 for that name.
    with pytest.raises(InputError, match="layer 9 of a model that has 4"):
        BertScore(_bert(tmp_path / "bert-base-uncased"))
    with pytest.raises(InputError, match="bert_score_layer"):
        BertScore(bert, 5)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot be had.*Help: give the folder of an encoder"):
        BertScore(str(tmp_path))
    asked = EvaluationSettings(bert_score_model=str(tmp_path / "none"), num_questions=1)
    with pytest.raises(InputError, match="cannot be had"):
        evaluate(tiny_model(), synthetic(8), asked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bert_score_layer": 1}, "a layer of no model"),
        ({"bert_score_model": "x", "retrieval_only": True}, "and no answers"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        evaluate(tiny_model(), synthetic(8), EvaluationSettings(**given))


def test_a_library_that_is_missing_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(("rouge_score", "bert_score")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, *args, **kwargs)

    wording._rouge_scorer.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"rouge_score.*kblam-ray\[evaluate\]"):
        evaluate(tiny_model(), synthetic(8), EvaluationSettings(num_questions=1, baseline=[]))
    with pytest.raises(MissingDependencyError, match=r"bert_score.*kblam-ray\[evaluate\]"):
        BertScore("bert")


def asked(values=("Lima",)) -> Asked:
    message = {"role": "user", "content": "What is the capital of Peru?"}
    return Asked("simple", (message,), bool(values), (0,) if values else (), values, ("Peru", "capital"))


def test_outcomes_rows_and_figures_have_the_measures(bert):
    questions = [asked(), asked(("Lima", "Callao")), asked(()), asked()]
    texts = ["Lima", "Lima and Callao", "No idea.", None]
    outcomes = [
        Outcome() if text is None else judged(question, ValueIndex([]), text, refused=False)
        for question, text in zip(questions, texts, strict=True)
    ]
    assert outcomes[0].rouge_1 == outcomes[0].rouge_l == 1
    # Two of three words, in their order.
    assert (outcomes[1].rouge_1, outcomes[1].rouge_l) == (pytest.approx(0.8), pytest.approx(0.8))
    assert [outcome.rouge_2 for outcome in outcomes[2:]] == [None, None]
    before = result(System("bm25"), questions, outcomes)["answers"]["all"]
    assert "bert_score" not in before
    assert before["rouge_1"] == {"value": 0.9, "low": 0.8, "high": 1.0, "count": 2}
    scorer = BertScore.load(bert, 2)
    found = with_bert_scores(questions, {System("bm25"): outcomes, System("cosine"): [Outcome()] * 4}, scorer)
    expected = scorer.f1(texts[:2], ["Lima", "Lima Callao"])
    assert [outcome.bert_score for outcome in found[System("bm25")]] == [*map(pytest.approx, expected), None, None]
    assert found[System("cosine")] == [Outcome()] * 4
    figures = result(System("bm25"), questions, found[System("bm25")])["answers"]["all"]
    assert figures["bert_score"]["value"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    rows = rows_table(3, questions, found).slice(0, 4)
    assert rows["rouge_l"].to_pylist() == [1.0, pytest.approx(0.8), None, None]
    assert rows["bert_score"].to_pylist() == [*map(pytest.approx, expected), None, None]


def test_an_evaluation_measures_the_wording_of_every_system(bert):
    asked_for = EvaluationSettings(
        num_facts=[12], num_questions=2, kinds=["simple", "unanswerable"], grounding=["off"], baseline=["dense"],
        bert_score_model=bert, max_new_tokens=3,
    )  # fmt: skip
    found = evaluate(tiny_model(), synthetic(16), asked_for)
    (size,) = found.summary()["sizes"]
    answering = {part["system"]: part["answers"]["all"] for part in size["results"] if "answers" in part}
    assert set(answering) == {"attention", "dense"}
    for figures in answering.values():
        assert {"rouge_1", "rouge_2", "rouge_l", "bert_score"} <= set(figures)
        assert figures["bert_score"]["count"] == 2
    rows = found.rows.to_pylist()
    for row in rows:
        is_judged = row["text"] is not None and row["should_answer"]
        assert (row["bert_score"] is not None) is (row["rouge_1"] is not None) is bool(is_judged)
    judged_rows = [row for row in rows if row["rouge_1"] is not None]
    texts = [row["text"] for row in judged_rows]
    in_short, as_sentence = (
        BertScore.load(bert).f1(texts, wanted)
        for wanted in ([" ".join(row["wanted"]) for row in judged_rows], [row["sentence"] for row in judged_rows])
    )
    again = [*map(max, in_short, as_sentence)]
    assert [row["bert_score"] for row in judged_rows] == pytest.approx(again, abs=1e-5)
