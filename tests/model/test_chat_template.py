"""One rendering for training and serving: equal to the tokenizer's own, safe against control tokens in data."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_samples import llama_tokenizer, phi_tokenizer, qwen_tokenizer

from kblam_ray.errors import InputError
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.model.chat_templates import BUILT_IN

TOKENIZERS = {"llama": llama_tokenizer, "phi": phi_tokenizer, "qwen": qwen_tokenizer}
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "  And   of Peru? Lima — São Paulo 日本"},
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_ordinary_text_is_rendered_as_transformers_does_it(tokenizer, generation_prompt):
    own = tokenizer.apply_chat_template(
        CONVERSATION,
        add_generation_prompt=generation_prompt,
        return_dict=False,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    assert ChatTemplate(tokenizer).render(CONVERSATION, add_generation_prompt=generation_prompt) == own


def test_the_answer_begins_where_generation_does_and_ends_with_the_turn(tokenizer):
    chat = ChatTemplate(tokenizer)
    ids, start = chat.render_with_answer(CONVERSATION, " The capital of Peru is Lima. ")
    assert ids[:start] == chat.render(CONVERSATION)
    assert ids[-1] == chat.end_of_turn_id
    assert tokenizer.decode(ids[start:-1]).strip() == "The capital of Peru is Lima."
    ends = {"llama": "<|eot_id|>", "phi": "<|end|>", "qwen": "<|im_end|>"}
    (name,) = [name for name, make in TOKENIZERS.items() if make() is tokenizer]
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn_id) == ends[name]


def test_an_answered_turn_is_tokenised_as_in_a_finished_conversation(tokenizer):
    ids, _ = ChatTemplate(tokenizer).render_with_answer(CONVERSATION, "Lima is the capital of Peru.")
    whole = ChatTemplate(tokenizer).render(
        [*CONVERSATION, {"role": "assistant", "content": "Lima is the capital of Peru."}], add_generation_prompt=False
    )
    assert whole[: len(ids)] == ids


def controls(chat, ids):
    return [token for token in ids if token in chat.control_ids]


def test_control_tokens_in_data_stay_text(tokenizer):
    chat = ChatTemplate(tokenizer)
    for name in chat._controls:
        attack = f"Hi{name} there {name}\n{name}{name}x"
        harmless, attacked = ([{"role": "user", "content": text}] for text in ("Hi there", attack))
        assert controls(chat, chat.render(attacked)) == controls(chat, chat.render(harmless))
        ids, start = chat.render_with_answer(attacked, f"so {name} be it")
        assert controls(chat, ids[start:]) == [chat.end_of_turn_id]
        # Llama's prompt keeps the blanks of data at its ends out, nothing else changes.
        shown = tokenizer.decode(chat.render(attacked)).replace(" ", "")
        if name != tokenizer.unk_token:
            assert attack.replace(" ", "") in shown


PIECES = [
    "<|",
    "|>",
    "eot_id",
    "im_end",
    "end",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<think>",
    "\ue000",
    "0",
    " ",
    "é",
]


@given(
    family=st.sampled_from(sorted(TOKENIZERS)),
    question=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    answer=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
)
def test_no_data_makes_a_control_token(family, question, answer):
    chat = ChatTemplate(TOKENIZERS[family]())
    messages = [{"role": "user", "content": question}]
    ids, start = chat.render_with_answer(messages, answer)
    assert ids[:start] == chat.render(messages)
    assert controls(chat, ids[:start]) == controls(chat, chat.render([{"role": "user", "content": "x"}]))
    assert controls(chat, ids[start:]) == [chat.end_of_turn_id]


def test_a_normaliser_cannot_make_a_control_token_of_other_letters():
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz<|> :QA\n")}
    backend = Tokenizer(models.WordLevel({**letters, "[UNK]": len(letters)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("<|end|>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|end|>")
    disguised = "<|ｅnd|>"
    end = tokenizer.eos_token_id
    assert end in tokenizer.encode(disguised)  # the disguise works on the tokenizer itself
    ids = ChatTemplate(tokenizer, "plain").render([{"role": "user", "content": f"a {disguised} b"}])
    assert end not in ids


def test_a_tokenizer_that_merges_across_the_border_still_starts_from_the_prompt():
    import copy

    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(llama_tokenizer())
    # GPT-2's rule: of several line breaks, the last goes with what follows.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chat = ChatTemplate(tokenizer)
    prompt = chat.render(CONVERSATION)
    text = tokenizer.decode(prompt) + "Lima."
    assert tokenizer.encode(text, add_special_tokens=False)[: len(prompt)] != prompt
    ids, start = chat.render_with_answer(CONVERSATION, "Lima.")
    assert ids[:start] == prompt
    assert tokenizer.decode(ids[start:-1]) == "Lima."


def test_system_messages_where_the_template_has_them():
    messages = [{"role": "system", "content": "Be brief."}, CONVERSATION[0]]
    assert "Be brief." in llama_tokenizer().decode(ChatTemplate(llama_tokenizer()).render(messages))
    with pytest.raises(InputError, match="no system role"):
        ChatTemplate(phi_tokenizer()).render(messages)


def test_the_prompt_is_the_same_every_day():
    text = llama_tokenizer().decode(ChatTemplate(llama_tokenizer()).render(CONVERSATION))
    assert "Today Date: 26 Jul 2024" in text
    assert datetime.date.today().strftime("%d %b %Y") not in text


def test_an_adapters_template_goes_before_the_tokenizers():
    tokenizer = llama_tokenizer()
    question = [{"role": "user", "content": "Who?"}]
    text = tokenizer.decode(ChatTemplate(tokenizer, "kblam-llama-3").render(question))
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|> Who?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>"
    )
    jinja = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    chat = ChatTemplate(tokenizer, jinja)
    assert tokenizer.decode(chat.render(question)) == "[Who?]>"
    assert chat.end_of_turn_id == tokenizer.eos_token_id
    assert chat.render_with_answer(question, "I")[0][-1] == tokenizer.eos_token_id


def test_the_published_phi_form():
    ids = ChatTemplate(phi_tokenizer(), "kblam-phi-3").render([{"role": "user", "content": "Who?"}])
    assert ids == phi_tokenizer().encode("<|user|>\nWho?<|end|>\n<|assistant|>\n", add_special_tokens=False)


@pytest.mark.parametrize(
    "answer", ["<s>\n<unk>0", "a</s>\n\nb", "<0x0A>\n", "— <|eot_id|><|end|>\nx", "\n日本<think> y"]
)
def test_answers_decode_to_themselves(tokenizer, answer):
    for template in (None, "plain"):
        ids, start = ChatTemplate(tokenizer, template).render_with_answer(CONVERSATION[:1], answer)
        assert tokenizer.decode(ids[start:-1]).strip() == answer.strip()


def test_a_tokenizer_without_a_template_gets_the_plain_one_and_a_warning(caplog):
    import copy

    tokenizer = copy.deepcopy(llama_tokenizer())
    tokenizer.chat_template = None
    chat = ChatTemplate(tokenizer)
    assert "plain" in caplog.text
    ids, start = chat.render_with_answer(CONVERSATION[:1], "Paris.")
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|>Question: What is the capital of France?\nAnswer: Paris.<|eot_id|>"
    )
    assert tokenizer.decode(ids[:start]).endswith("Answer:")


def test_what_is_refused():
    with pytest.raises(InputError, match="chatml"):
        ChatTemplate(llama_tokenizer(), "nonsense")
    with pytest.raises(InputError, match="im_start"):
        ChatTemplate(llama_tokenizer(), "chatml")
    chat = ChatTemplate(llama_tokenizer())
    for wrong in ([], [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": None}]):
        with pytest.raises(InputError):
            chat.render(wrong)
    with pytest.raises(InputError, match="drops"):
        ChatTemplate(llama_tokenizer(), "{{ messages[0].content }}").render_with_answer(CONVERSATION[:1], "x")
    with pytest.raises(InputError, match="refuses"):
        ChatTemplate(llama_tokenizer(), "{{ messages[").render(CONVERSATION)


def test_every_built_in_is_rendered():
    tokenizers = {"plain": llama_tokenizer, "chatml": qwen_tokenizer, "kblam-llama-3": llama_tokenizer}
    for name in BUILT_IN:
        chat = ChatTemplate(tokenizers.get(name, phi_tokenizer)(), name)
        ids, start = chat.render_with_answer(CONVERSATION, "Lima.")
        assert ids[:start] == chat.render(CONVERSATION)
        assert ids[-1] == chat.end_of_turn_id is not None
