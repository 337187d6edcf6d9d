"""Bundles: what goes in comes back, paths count from the bundle, and nothing half-made stays."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_samples import make_kb, save_base, tiny_adapter, tiny_llama

from kblam_ray.errors import AdapterMismatchError, EncoderMismatchError, InputError, StorageError, TableNotFoundError
from kblam_ray.model import Bundle, KnowledgeModel, load_bundle, write_bundle
from kblam_ray.model import bundle as bundle_module
from kblam_ray.table import KnowledgeBase

IDS = torch.tensor([[0, 5, 7, 9]])


@pytest.fixture
def parts(tmp_path):
    tiny_adapter(tiny_llama()).save_pretrained(str(tmp_path / "adapter"))
    kb = make_kb(tmp_path / "kb")
    kb.upsert([{"entity": "Chile", "property": "capital", "value": "Santiago"}])
    return {"base_model": save_base(tmp_path / "base"), "adapter": str(tmp_path / "adapter"), "kb": kb.uri}


def logits(model, memory):
    with torch.no_grad():
        return model(IDS, knowledge=memory).logits


def test_a_bundle_loads_back_in_one_call(parts, tmp_path):
    written = write_bundle(tmp_path / "out" / "bundle", **parts)
    separate = KnowledgeModel.from_pretrained(parts["base_model"], parts["adapter"])
    memory = separate.load(parts["kb"])
    for part in ("base", "adapter"):
        shutil.rmtree(tmp_path / part)  # the bundle has copies of its own
    model, loaded = load_bundle(tmp_path / "out" / "bundle")
    assert loaded.version == memory.version == written.kb.version
    assert torch.equal(logits(model, loaded), logits(separate, memory))
    assert model.bundle == written
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bundle"]
    assert model.ask("What is the capital of Peru?", loaded, max_new_tokens=3).citations
    with pytest.raises(InputError, match="has its own"):
        KnowledgeModel.from_pretrained(tmp_path / "out" / "bundle", separate.adapter)


def test_another_version_is_an_edit_of_one_line(parts, tmp_path):
    write_bundle(tmp_path / "bundle", **parts)
    file = tmp_path / "bundle" / "knowledge_model.json"
    lines = file.read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines) if '"version"' in text]
    assert lines[line].strip() == '"version": 1'
    for edit, num_facts in (('"version": 0', 6), ('"version": null', 7)):
        lines[line] = edit
        file.write_text("\n".join(lines))
        model = KnowledgeModel.from_pretrained(tmp_path / "bundle")
        assert model.knowledge().num_facts == num_facts
    KnowledgeBase.open(parts["kb"]).delete([("Chile", "capital"), ("Ur", "founder")])
    assert model.knowledge().num_facts == 5
    assert model.knowledge(version=0, form="materialized").form == "materialized"


def test_relative_paths_count_from_the_bundle(parts, tmp_path, monkeypatch):
    write_bundle(tmp_path / "bundle", **parts)
    shutil.move(parts["kb"], tmp_path / "bundle" / "kb")
    file = tmp_path / "bundle" / "knowledge_model.json"
    given = json.loads(file.read_text())
    assert (given["base_model"], given["adapter"]) == ("./base", "./adapter")
    file.write_text(json.dumps({**given, "base_model": "base", "kb": {"uri": "kb", "version": None}}))
    shutil.move(tmp_path / "bundle", tmp_path / "moved")
    monkeypatch.chdir("/")
    assert load_bundle(tmp_path / "moved")[1].num_facts == 7


def test_without_a_copy_the_bundle_refers_to_the_base_model(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bundle("bundle", **{**parts, "base_model": "base"}, copy_base=False, version=0)
    assert not (tmp_path / "bundle" / "base").exists()
    monkeypatch.chdir("/")
    model, memory = load_bundle(tmp_path / "bundle")
    assert (memory.version, memory.num_facts) == (0, 6)
    assert torch.isfinite(logits(model, memory)).all()


def test_following_the_newest(parts, tmp_path):
    assert write_bundle(tmp_path / "bundle", **parts, follow=True).kb.version is None


def test_only_what_loading_needs_is_copied(parts, tmp_path):
    base = tmp_path / "base"
    for name in ("pytorch_model.bin", "optimizer.pt", "model.gguf", "consolidated.safetensors"):
        (base / name).write_bytes(b"not needed")
    (base / "checkpoint-1").mkdir()
    (base / "checkpoint-1" / "model.safetensors").write_bytes(b"not needed")
    write_bundle(tmp_path / "bundle", **parts)
    copied = {str(path.relative_to(tmp_path / "bundle" / "base")) for path in (tmp_path / "bundle" / "base").rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= copied
    assert not copied & {"pytorch_model.bin", "optimizer.pt", "model.gguf", "consolidated.safetensors", "checkpoint-1"}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "bundle" / "base" / name).read_bytes() == (base / name).read_bytes()


def test_what_does_not_fit_makes_no_bundle(parts, tmp_path):
    tiny_adapter(tiny_llama(num_layers=6)).save_pretrained(str(tmp_path / "larger"))
    other = KnowledgeBase.create(str(tmp_path / "other"), "hashing:32")
    other.upsert([{"entity": "Peru", "property": "capital", "value": "Lima"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for wrong, error in (
        ({"adapter": str(tmp_path / "larger")}, AdapterMismatchError),
        ({"kb": other.uri}, EncoderMismatchError),
        ({"version": 9}, TableNotFoundError),
        ({"kb": str(tmp_path / "nothing")}, TableNotFoundError),
        ({"base_model": str(tmp_path / "nothing")}, InputError),
        ({"output": tmp_path / "full"}, InputError),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error):
            write_bundle(**{"output": tmp_path / "bundle", **parts, **wrong})
        assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        write_bundle(tmp_path / "bundle", **parts)


def test_a_copy_that_fails_leaves_nothing(parts, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module.shutil, "copyfile", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="No space"):
        write_bundle(tmp_path / "bundle", **parts)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "dictionary"),
        ('{"format_version": 2, "something": "new"}', "format 2"),
        ('{"base_model": "gpt2", "adapter": "./adapter", "typo": 1}', "typo"),
        ('{"base_model": "./base", "adapter": "./adapter"}', "refers to ./base"),
        ('{"base_model": "gpt2", "adapter": "a/b", "kb": {"uri": "kb", "version": -1}}', r"kb\.version"),
    ],
)
def test_damaged_bundles(tmp_path, text, message):
    (tmp_path / "knowledge_model.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Bundle.read(tmp_path)
    with pytest.raises(InputError, match="no bundle"):
        Bundle.read(tmp_path / "nothing")


def test_names_on_the_hub_stay_names_and_stores_stay_stores(tmp_path):
    given = {"base_model": "org/model", "adapter": "org/adapter", "kb": {"uri": "s3://bucket/kb", "version": 4}}
    (tmp_path / "knowledge_model.json").write_text(json.dumps(given))
    bundle = Bundle.read(tmp_path)
    assert (bundle.base_model, bundle.adapter, bundle.kb.uri) == ("org/model", "org/adapter", "s3://bucket/kb")


def test_a_bundle_without_a_knowledge_base(parts, tmp_path):
    write_bundle(tmp_path / "bundle", **parts)
    file = tmp_path / "bundle" / "knowledge_model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kb": None}))
    model = KnowledgeModel.from_pretrained(tmp_path / "bundle")
    with pytest.raises(InputError, match="no bundle names"):
        model.knowledge()
