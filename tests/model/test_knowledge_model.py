"""KnowledgeModel over a tiny random Llama and real tables: loading, refreshing, asking, tracing, errors."""

from __future__ import annotations

import copy
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_samples import ENCODER, FACTS, llama_tokenizer, make_kb, save_base, tiny_adapter, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

import kblam_ray
from kblam_ray import KnowledgeMemory
from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.trace import mean_shares, retrieval_scores
from kblam_ray.encoders import load_encoder
from kblam_ray.errors import (
    AdapterError,
    AdapterMismatchError,
    EncoderMismatchError,
    EncoderNotFoundError,
    InputError,
    TableNotFoundError,
)
from kblam_ray.model import KnowledgeModel, knowledge_model
from kblam_ray.model.asking import cite, parse_selection, refusal_statistic
from kblam_ray.table import KnowledgeBase

QUESTION = "What is the capital of Peru?"
ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[0, 5, 7, 9, 20, 31]])


@pytest.fixture
def model():
    base = tiny_llama()
    return KnowledgeModel(base, tiny_adapter(base), llama_tokenizer())


@pytest.fixture(scope="module")
def kb_uri(tmp_path_factory):
    return make_kb(tmp_path_factory.mktemp("tables") / "kb").uri


def test_it_is_a_public_name():
    assert kblam_ray.KnowledgeModel is KnowledgeModel


def test_without_knowledge_it_is_the_base_model(model, kb_uri):
    plain = tiny_llama()
    with torch.no_grad():
        expected = plain(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, expected)
        assert not torch.equal(model(IDS, knowledge=model.load(kb_uri)).logits, expected)
    generated = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, plain.generate(IDS, max_new_tokens=8, do_sample=False))


def test_generation_follows_the_knowledge(model, kb_uri):
    memory = model.load(kb_uri)
    ids = model.generate(IDS, max_new_tokens=8, do_sample=False, knowledge=memory)
    with torch.no_grad():
        greedy = IDS
        for _ in range(8):
            greedy = torch.cat([greedy, model(greedy, knowledge=memory).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, greedy)
    named = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ids, model.generate(**named, max_new_tokens=8, do_sample=False, knowledge=memory))
    assert not torch.equal(ids, model.generate(IDS, max_new_tokens=8, do_sample=False))


def test_rows_may_have_their_own_knowledge(model, kb_uri):
    memory = model.load(kb_uri)
    part = memory.select(memory.fact_ids[:2])
    rows = IDS.expand(3, -1)
    with torch.no_grad():
        logits = model(rows, knowledge=[memory, None, part]).logits
        for row, alone in enumerate([memory, None, part]):
            torch.testing.assert_close(logits[row], model(IDS, knowledge=alone).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_loading_keeps_the_tables_numbers(dtype, kept, kb_uri):
    base = tiny_llama().to(dtype)
    model = KnowledgeModel(base, tiny_adapter(tiny_llama()))
    kb = KnowledgeBase.open(kb_uri)
    memory = model.load(kb)
    snapshot = kb.snapshot()
    assert memory.dtype == kept
    assert memory.version == kb.version
    assert memory.fact_ids.tolist() == snapshot.fact_ids_M.tolist()
    keys = memory.views[0].chunk.keys_MP
    assert torch.equal(keys, torch.from_numpy(snapshot.key_embeddings_MP.copy()).to(kept))
    row = memory.lookup(memory.fact_ids[:1])[0]
    assert (row["entity"], row["property"], row["value"]) in FACTS
    with torch.no_grad():
        assert torch.isfinite(model(IDS, knowledge=memory).logits).all()


def test_the_tables_buffers_are_not_copied_for_a_float32_model(model, kb_uri):
    kb = KnowledgeBase.open(kb_uri)
    snapshot = kb.snapshot()
    kb.snapshot = lambda version=None: snapshot
    keys = model.load(kb).views[0].chunk.keys_MP
    assert keys.data_ptr() == snapshot.key_embeddings_MP.__array_interface__["data"][0]


def test_versions_and_refresh(model, tmp_path):
    kb = make_kb(tmp_path / "kb")
    first = model.load(kb)
    kb.upsert([{"entity": "Peru", "property": "capital", "value": "Cusco"}])
    newest = kb.upsert([{"entity": "Chile", "property": "capital", "value": "Santiago"}])
    kb.delete([("Ur", "founder")])
    handle = KnowledgeBase.open(kb.uri, None)
    refreshed = model.refresh(first, handle)
    assert refreshed.version == kb.version
    assert first.version == 0 < newest < refreshed.version
    fresh = model.load(kb.uri)
    assert sorted(refreshed.fact_ids.tolist()) == sorted(fresh.fact_ids.tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, knowledge=refreshed).logits, model(IDS, knowledge=fresh).logits)
        assert not torch.equal(model(IDS, knowledge=first).logits, model(IDS, knowledge=fresh).logits)
    assert model.refresh(refreshed, kb.uri) is model.refresh(refreshed, Path(kb.uri)) is refreshed
    assert model.load(Path(kb.uri)).version == kb.version
    assert model.load(kb.uri, version=0).num_facts == model.load(kb, version=0).num_facts == len(FACTS)
    with pytest.raises(TableNotFoundError):
        model.load(kb.uri, version=99)
    back = model.refresh(refreshed, KnowledgeBase.open(kb.uri, 0))
    assert back.version == 0
    assert sorted(back.fact_ids.tolist()) == sorted(first.fact_ids.tolist())


def test_refreshing_what_cannot_be(model, kb_uri, tmp_path):
    import numpy as np

    with pytest.raises(InputError, match="no KB version"):
        model.refresh(KnowledgeMemory.from_embeddings(model.adapter, np.ones((1, 64)), np.ones((1, 64))), kb_uri)
    kb = make_kb(tmp_path / "kb")
    part = model.load(kb).select([])
    kb.delete([("Ur", "founder")])
    with pytest.raises(InputError):
        model.refresh(part, kb)
    whole = model.load(kb)
    for another in (kb_uri, make_kb(tmp_path / "another")):
        with pytest.raises(InputError, match="another table"):
            model.refresh(whole, another)
    shutil.copytree(kb.uri, tmp_path / "copy")
    assert model.refresh(whole, tmp_path / "copy") is whole
    shutil.rmtree(kb.uri)
    anew = make_kb(kb.uri)
    anew.delete([("Ur", "founder"), ("France", "capital")])
    anew.delete([("Peru", "capital")])
    with pytest.raises(InputError, match="another table"):
        model.refresh(whole, anew)
    assert model.refresh(model.load(anew), anew.uri).num_facts == len(FACTS) - 3


def test_an_answer_is_the_greedy_one_with_the_facts_it_attended_to(model, kb_uri):
    memory = model.load(kb_uri)
    answer = model.ask(QUESTION, memory, max_citations=3, max_new_tokens=6)
    prompt = torch.tensor([model.chat.render([{"role": "user", "content": QUESTION}])])
    ids = model.generate(prompt, knowledge=memory, max_new_tokens=6, do_sample=False)
    start = prompt.shape[1]
    assert answer.text == llama_tokenizer().decode(ids[0, start:], skip_special_tokens=True).strip()
    assert answer.kb_version == memory.version
    shares = mean_shares(model.attachment, ids, memory, start)
    best = shares.argsort(descending=True)[:3]
    assert [citation.fact_id for citation in answer.citations] == memory.fact_ids[best.numpy()].tolist()
    assert [citation.score for citation in answer.citations] == pytest.approx(shares[best].tolist(), abs=1e-6)
    row = memory.lookup([answer.citations[0].fact_id])[0]
    assert (answer.citations[0].entity, answer.citations[0].value) == (row["entity"], row["value"])
    assert answer.to_json()["citations"][0]["fact_id"] == str(answer.citations[0].fact_id)


def test_groundings(model, kb_uri):
    memory = model.load(kb_uri)
    cited = model.ask(QUESTION, memory, max_new_tokens=4)
    assert len(cited.citations) == 5
    for settings in ({"grounding": "off"}, {"max_citations": 0}):
        other = model.ask(QUESTION, memory, max_new_tokens=4, **settings)
        assert other.citations == ()
        assert other.text == cited.text
    base_alone = model.ask(QUESTION, None, max_new_tokens=4)
    assert (base_alone.citations, base_alone.kb_version) == ((), None)
    assert model.ask(QUESTION, memory.select([]), max_new_tokens=4).text == base_alone.text


def test_the_answer_ends_where_the_turn_does(model, kb_uri, monkeypatch):
    memory = model.load(kb_uri)
    end = model.chat.end_of_turn_id
    first, second = llama_tokenizer().encode("Lima", add_special_tokens=False)[:2]
    prompt = torch.tensor([model.chat.render([{"role": "user", "content": QUESTION}])])
    fixed = torch.cat([prompt, torch.tensor([[first, second, end]])], 1)
    monkeypatch.setattr(model, "generate", lambda *_, **__: fixed)
    answer = model.ask(QUESTION, memory)
    assert answer.text == llama_tokenizer().decode([first, second])
    expected = cite(model, fixed[:, :-1], memory, prompt.shape[1], 5)
    assert answer.citations == expected  # the token that ends the turn is no part of the answer
    monkeypatch.setattr(model, "generate", lambda *_, **__: fixed[:, : prompt.shape[1]])
    assert model.ask(QUESTION, memory).citations == ()


def test_conversations_are_asked_like_questions(model, kb_uri):
    memory = model.load(kb_uri)
    by_text = model.ask(QUESTION, memory, max_new_tokens=4)
    assert model.ask([{"role": "user", "content": QUESTION}], memory, max_new_tokens=4) == by_text


def test_refusal_by_text(model, kb_uri, monkeypatch):
    memory = model.load(kb_uri)
    assert not model.ask(QUESTION, memory, max_new_tokens=4).refused
    prompt = model.chat.render([{"role": "user", "content": QUESTION}])
    said = llama_tokenizer().encode(
        "I am sorry  I cannot find relevant information in the KB", add_special_tokens=False
    )
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.tensor([prompt + said]))
    assert model.ask(QUESTION, memory).refused
    model.adapter.configure(refusal_text="No idea.")
    assert not model.ask(QUESTION, memory).refused


def test_refusal_by_threshold(model, kb_uri):
    memory = model.load(kb_uri)
    prompt = torch.tensor([model.chat.render([{"role": "user", "content": QUESTION}])])
    statistic = refusal_statistic(model, prompt, memory)
    assert statistic == pytest.approx(float(retrieval_scores(model.attachment, prompt, memory).max()))
    for threshold, refused in ((statistic + 0.01, True), (statistic - 0.01, False)):
        model.adapter.configure(refusal_threshold=threshold)
        answer = model.ask(QUESTION, model.load(kb_uri), max_new_tokens=4)
        assert answer.refused is refused
        assert answer.citations  # `cite` reports the decision and leaves the answer
    model.adapter.configure(refusal_threshold=0.1)
    assert model.ask(QUESTION, memory.select([]), max_new_tokens=2).refused
    assert not model.ask(QUESTION, None, max_new_tokens=2).refused


def test_similar_facts_only(model, kb_uri):
    memory = model.load(kb_uri)
    answer = model.ask(QUESTION, memory, selection="similar:2", max_new_tokens=4)
    assert {citation.entity for citation in answer.citations} <= {"Peru", "France"}
    assert answer.citations[0].entity == "Peru" or answer.citations[1].entity == "Peru"
    chosen = model.prior.similar(memory, QUESTION, 2)
    assert {citation.fact_id for citation in answer.citations} == set(chosen.tolist())
    assert model.prepare(memory, QUESTION, "similar:2").num_facts == 2
    assert model.prepare(memory, QUESTION, "similar:6") is memory
    assert model.prepare(memory, QUESTION) is memory
    assert model.prepare(None, QUESTION, "similar:2") is None


def test_the_adapters_question_prior_is_applied(model, kb_uri):
    memory = model.load(kb_uri)
    model.adapter.configure(question_prior=50.0)
    answer = model.ask(QUESTION, memory, max_new_tokens=4)
    assert (answer.citations[0].entity, answer.citations[0].property) == ("Peru", "capital")
    request = model.prepare(memory, QUESTION)
    expected = 50 * model.prior.cosines(memory, QUESTION)
    torch.testing.assert_close(request.priors[0], expected)
    model.adapter.configure(question_prior=0.0, prior_lexical=9.0)
    named = [row["entity"] == "Peru" for row in memory.lookup(memory.fact_ids)]
    assert model.prepare(memory, QUESTION).priors[0].tolist() == [9.0 * name for name in named]


def test_a_question_encoder_that_cannot_be_had_is_an_error(kb_uri):
    base = tiny_llama()
    adapter = tiny_adapter(base, question_prior=1.0)
    reference = adapter.config.encoder
    object.__setattr__(adapter.config, "encoder", reference.model_copy(update={"name": "no/such-encoder"}))
    model = KnowledgeModel(base, adapter, llama_tokenizer())
    memory = model.load(kb_uri)
    with pytest.raises(EncoderNotFoundError):
        model.ask(QUESTION, memory)
    object.__setattr__(adapter.config, "encoder", None)
    with pytest.raises(InputError, match="encoder"):
        KnowledgeModel(base, adapter, llama_tokenizer()).ask(QUESTION, memory)


def test_the_encoder_is_loaded_once_whoever_asks_first(model, kb_uri, monkeypatch):
    loads = []
    load = knowledge_model.load_encoder
    monkeypatch.setattr(knowledge_model, "load_encoder", lambda named: loads.append(named) or load(named))
    memory = model.load(kb_uri)
    with ThreadPoolExecutor(4) as threads:
        priors = list(threads.map(lambda _: model.prior, range(8)))
        answers = list(threads.map(lambda _: model.ask(QUESTION, memory, "off", "similar:2", 5, 3), range(4)))
    assert len(loads) == len(set(map(id, priors))) == len(set(answers)) == 1
    model.adapter.configure(question_prior=2.0)
    assert model.prior.beta == 2.0
    assert model.prior._encoding is priors[0]._encoding  # one encoder serves one thread at a time, whichever prior asks
    assert len(loads) == 1


def test_a_copy_attends_by_itself_and_shares_the_encoder(model, kb_uri):
    memory = model.load(kb_uri)
    expected = model.ask(QUESTION, memory, selection="similar:2", max_new_tokens=3)
    copied = copy.deepcopy(model)
    assert copied.prior is model.prior
    with pytest.raises(AdapterMismatchError):
        copied.ask(QUESTION, memory, max_new_tokens=1)
    model.detach()
    assert copied.ask(QUESTION, copied.load(kb_uri), selection="similar:2", max_new_tokens=3) == expected


def test_wrong_encoders(tmp_path):
    base = tiny_llama()
    adapter = tiny_adapter(base)
    other = KnowledgeBase.create(str(tmp_path / "kb"), "hashing:32")
    other.upsert([{"entity": "Peru", "property": "capital", "value": "Lima"}])
    with pytest.raises(EncoderMismatchError, match="hashing:32"):
        KnowledgeModel(base, adapter).load(other)
    with pytest.raises(EncoderMismatchError):
        KnowledgeModel(base, adapter, encoder=load_encoder("hashing:32"))
    with pytest.raises(EncoderMismatchError):
        KnowledgeModel(base, adapter, encoder="hashing:32").prior  # noqa: B018
    assert KnowledgeModel(base, adapter, encoder=ENCODER).prior.encoder.spec.dim == 64


def test_what_ask_refuses(model, kb_uri):
    memory = model.load(kb_uri)
    for wrong in (
        {"grounding": "loose"},
        {"selection": "similar"},
        {"selection": "similar:0"},
        {"selection": "similar:-3"},
        {"max_citations": -1},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "3"},
        {"question": "  \n"},
        {"question": b"What?"},
        {"question": "half of \ud83d"},
        {"max_new_tokens": 0},
        {"selection": None},
        {"question": []},
        {"question": None},
        {"question": [QUESTION]},
        {"question": {"role": "user", "content": QUESTION}},
        {"memory": kb_uri},
        {"memory": [memory]},
    ):
        with pytest.raises(InputError):
            model.ask(**{"question": QUESTION, "memory": memory, **wrong})
    model.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        model.ask(QUESTION, memory)
    assert parse_selection("similar:12") == 12


def test_questions_longer_than_the_base_model_has_positions_for():
    sizes = {"vocab_size": len(llama_tokenizer()), "num_hidden_layers": 2, "num_attention_heads": 4}
    gpt2 = GPT2Config(**sizes, n_embd=32, n_positions=96, eos_token_id=None)
    opt = OPTConfig(**sizes, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=96)
    rotary = GPTNeoXConfig(**sizes, hidden_size=32, intermediate_size=48, max_position_embeddings=96)
    for config in (gpt2, opt, rotary):
        base = AutoModelForCausalLM.from_config(config).eval()
        model = KnowledgeModel(base, tiny_adapter(base), llama_tokenizer())
        memory = KnowledgeMemory.from_embeddings(model.adapter, torch.eye(64), torch.eye(64))
        prompt = len(model.chat.render([{"role": "user", "content": QUESTION}]))
        assert model.ask(QUESTION, memory, max_new_tokens=96 - prompt).kb_version is None
        if config is rotary:
            assert model.ask(QUESTION, memory, max_new_tokens=97 - prompt).kb_version is None
        else:
            with pytest.raises(InputError, match="97 tokens, the base model has positions for 96"):
                model.ask(QUESTION, memory, max_new_tokens=97 - prompt)


def test_a_memory_of_another_adapter_is_refused(model, kb_uri):
    base = tiny_llama()
    other = KnowledgeModel(base, tiny_adapter(base)).load(kb_uri)
    with pytest.raises(AdapterMismatchError):
        model(IDS, knowledge=other)
    with pytest.raises(AdapterMismatchError):
        model.refresh(other, kb_uri)


def test_trace(model, kb_uri):
    memory = model.load(kb_uri)
    traced = model.trace(IDS, memory, 3, top_n=2)
    layers = len(model.adapter.config.retrieval_layers)
    assert traced.fact_ids.shape == traced.shares.shape == (1, layers, 3, 2)
    assert set(traced.fact_ids.flatten().tolist()) <= set(memory.fact_ids.tolist())


def test_detaching_gives_the_base_model_back(model, kb_uri):
    memory = model.load(kb_uri)
    model.detach()
    model.detach()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    for attempt in (lambda: model(IDS, knowledge=memory), lambda: model.generate(IDS, knowledge=memory)):
        with pytest.raises(AdapterMismatchError, match="detached"):
            attempt()


def test_from_folders(model, kb_uri, tmp_path):
    base, adapter = save_base(tmp_path / "base"), str(tmp_path / "adapter")
    model.adapter.save_pretrained(adapter)
    loaded = KnowledgeModel.from_pretrained(base, adapter, device="cpu")
    assert loaded.dtype == torch.float32
    expected = model.ask(QUESTION, model.load(kb_uri), max_new_tokens=4)
    assert loaded.ask(QUESTION, loaded.load(kb_uri), max_new_tokens=4).text == expected.text
    half = KnowledgeModel.from_pretrained(base, KnowledgeAdapter.from_pretrained(adapter), "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.ask(QUESTION, half.load(kb_uri), max_new_tokens=4).citations


def test_what_does_not_fit_is_refused_before_the_weights(tmp_path):
    base, adapter = save_base(tmp_path / "base"), str(tmp_path / "adapter")
    tiny_adapter(tiny_llama(num_layers=6)).save_pretrained(adapter)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(AdapterMismatchError, match="num_layers 4 instead of 6"):
        KnowledgeModel.from_pretrained(base, adapter)
    tiny_adapter(tiny_llama()).save_pretrained(str(tmp_path / "fits"))
    with pytest.raises(EncoderMismatchError):
        KnowledgeModel.from_pretrained(base, str(tmp_path / "fits"), encoder=load_encoder("hashing:32"))
    with pytest.raises(InputError, match="cannot be loaded"):
        KnowledgeModel.from_pretrained(base, str(tmp_path / "fits"))
    with pytest.raises(InputError, match="no base model"):
        KnowledgeModel.from_pretrained(str(tmp_path / "nothing"), str(tmp_path / "fits"))
    with pytest.raises(AdapterError):
        KnowledgeModel.from_pretrained(base, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="not a bundled folder"):
        KnowledgeModel.from_pretrained(base)
    for device in ("cuda", "cuda:99", "mps", "nowhere"):
        if getattr(torch, device, torch.cuda).is_available() and device in ("cuda", "mps"):
            continue
        with pytest.raises(InputError, match="no such device"):
            KnowledgeModel.from_pretrained(base, str(tmp_path / "fits"), device=device)
    with pytest.raises(InputError, match="no dtype 'float33'"):
        KnowledgeModel.from_pretrained(base, str(tmp_path / "fits"), dtype="float33")


@pytest.mark.parametrize("damage", ["cut short", "empty", "no safetensors", "not the configuration's", "tokenizer"])
def test_a_damaged_base_model_is_named(damage, tmp_path):
    base = tmp_path / "base"
    save_base(base)
    weights, config = base / "model.safetensors", base / "config.json"
    if damage == "not the configuration's":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 50}))
    elif damage == "tokenizer":
        (base / "tokenizer.json").write_text("{}")
    else:
        kept = {"cut short": weights.read_bytes()[:1000], "empty": b"", "no safetensors": bytes(500)}
        weights.write_bytes(kept[damage])
    with pytest.raises(InputError, match=r"cannot be loaded.*base\)"):
        KnowledgeModel.from_pretrained(base, tiny_adapter(tiny_llama()))


def test_the_readme_runs_as_printed(kb_uri, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "KnowledgeModel" in block]
    save_base(tmp_path / "models" / "llama")
    tiny_adapter(tiny_llama()).save_pretrained(tmp_path / "adapters" / "world")
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / "world").symlink_to(kb_uri)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["answer"].citations
    assert names["logits"].shape[0] == 3
