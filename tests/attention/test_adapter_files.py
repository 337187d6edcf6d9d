"""Adapters in folders and on the hub: what is written comes back, and what is wrong is said."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_samples import ENCODER, adapter
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.errors import AdapterError, StorageError

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def assert_same(one: KnowledgeAdapter, other: KnowledgeAdapter) -> None:
    assert one.config == other.config
    for (name, tensor), (name_too, tensor_too) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == name_too
        assert tensor.dtype == tensor_too.dtype
        assert torch.equal(tensor, tensor_too)


@pytest.fixture
def saved(tmp_path) -> Path:
    adapter().save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("kind", ["paper", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path, kind, dtype):
    made = adapter(kind=kind, encoder=ENCODER, kb_scale=50.0, base_model="owner/base").to(dtype)
    made.save_pretrained(tmp_path / "deep" / "mine")
    assert sorted(os.listdir(tmp_path / "deep" / "mine")) == FILES
    assert os.listdir(tmp_path / "deep") == ["mine"]
    loaded = KnowledgeAdapter.from_pretrained(tmp_path / "deep" / "mine")
    assert_same(loaded, made)
    assert not loaded.training


def test_a_dtype_can_be_asked_for(saved):
    loaded = KnowledgeAdapter.from_pretrained(str(saved), dtype=torch.float64, device="cpu")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float64}
    assert torch.equal(loaded.value_projection.weight.float(), adapter().value_projection.weight)


def test_a_dtype_that_cannot_hold_the_numbers_is_refused(saved):
    state = load_file(saved / "adapter_model.safetensors")
    state["value_projection.weight"][3, 1] = 70_000
    save_file(state, saved / "adapter_model.safetensors")
    assert KnowledgeAdapter.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(AdapterError, match=r"value_projection\.weight holds numbers that are not finite in float16"):
        KnowledgeAdapter.from_pretrained(saved, dtype=torch.float16)
    for dtype in (torch.int8, "float16"):
        with pytest.raises(AdapterError, match="cannot be"):
            KnowledgeAdapter.from_pretrained(saved, dtype=dtype)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_scores_cannot_be_divided_by_is_refused(tmp_path, scale):
    made = adapter(kind="shared")
    made.save_pretrained(tmp_path / "mine")
    save_file({**made.state_dict(), "key_scale": torch.tensor([scale])}, tmp_path / "mine/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"key_scale is {scale:g}"):
        KnowledgeAdapter.from_pretrained(tmp_path / "mine")


def test_an_adapter_loaded_in_inference_mode_can_be_trained(saved):
    with torch.inference_mode():
        loaded = KnowledgeAdapter.from_pretrained(saved)
    loaded.value_projection(torch.ones(10)).sum().backward()
    assert loaded.value_projection.weight.grad.abs().sum() > 0


def test_a_loaded_adapter_does_not_depend_on_its_file(saved):
    loaded = KnowledgeAdapter.from_pretrained(saved)
    path = saved / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(loaded, adapter())


def test_all_files_have_the_rights_that_new_files_get(saved):
    assert len({(saved / name).stat().st_mode for name in FILES}) == 1


def test_saving_again_replaces_the_adapter_and_nothing_else(saved):
    (saved / "notes.txt").write_text("mine")
    again = adapter(kind="shared", kb_scale=7.0)
    again.save_pretrained(saved)
    assert_same(KnowledgeAdapter.from_pretrained(saved), again)
    assert (saved / "notes.txt").read_text() == "mine"
    assert "| Kind | shared |" in (saved / "README.md").read_text()
    assert os.listdir(saved.parent) == ["mine"]


def test_an_edited_model_card_is_kept(saved):
    card = saved / "README.md"
    card.write_text(card.read_text() + "\nTrained by us, licence: MIT.\n")
    edited = card.read_text()
    adapter(kind="shared").save_pretrained(saved)
    assert card.read_text() == edited


def test_the_model_card_states_the_facts(tmp_path):
    adapter(
        encoder=ENCODER, base_model="owner/base", kb_scale=100.0, training_kb_range=(10, 200), refusal_text="No | idea"
    ).save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kblam-ray\nbase_model: owner/base\n")
    for fact in (
        "owner/base (llama: 5 layers",
        "tiny, revision abc",
        "0, 2, 4 (4 slots)",
        "log 100 - log M",
        "10 to 200",
    ):
        assert fact in card
    assert "No \\| idea" in card
    assert "licence" in card


def test_a_card_names_no_local_path_as_the_hubs_base_model(tmp_path):
    adapter(base_model="/models/base").save_pretrained(tmp_path / "mine")
    assert "base_model:" not in (tmp_path / "mine" / "README.md").read_text()


def test_gathered_tensors_can_be_saved_instead_of_the_adapters_own(tmp_path):
    gathered = {name: tensor + 1 for name, tensor in adapter().state_dict().items()}
    adapter().save_pretrained(tmp_path / "mine", state_dict=gathered)
    loaded = KnowledgeAdapter.from_pretrained(tmp_path / "mine")
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(AdapterError, match="lacks the tensors"):
        adapter().save_pretrained(tmp_path / "other", state_dict={})


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kblam_ray.attention.adapter.saving.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        adapter().save_pretrained(tmp_path / "mine")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kblam_ray.attention.adapter.saving.model_card", full)
    with pytest.raises(StorageError):
        adapter(kind="shared").save_pretrained(saved)
    monkeypatch.undo()
    assert_same(KnowledgeAdapter.from_pretrained(saved), adapter())
    assert os.listdir(saved.parent) == ["mine"]


def test_a_folder_that_exists_is_written_from_within(saved, monkeypatch):
    # It may be a mount of its own, or a link to another disk, onto which nothing can be renamed from outside.
    replace, sources = os.replace, []
    monkeypatch.setattr(os, "replace", lambda source, goal: (sources.append(Path(source)), replace(source, goal)))
    made = adapter(kind="shared")
    link = saved.parent / "link"
    link.symlink_to(saved)
    made.save_pretrained(link)
    assert {source.parent.parent for source in sources} == {link}
    assert_same(KnowledgeAdapter.from_pretrained(saved), made)
    assert sorted(os.listdir(saved)) == FILES


def test_many_savers_of_a_new_folder_leave_one_adapter(tmp_path):
    barrier = threading.Barrier(6)

    def save(made: KnowledgeAdapter) -> None:
        barrier.wait()
        made.save_pretrained(tmp_path / "mine")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(save, [adapter() for _ in range(6)]))
    assert_same(KnowledgeAdapter.from_pretrained(tmp_path / "mine"), adapter())
    assert (os.listdir(tmp_path), sorted(os.listdir(tmp_path / "mine"))) == (["mine"], FILES)


def test_a_diverged_adapter_is_not_saved(tmp_path):
    made = adapter()
    torch.nn.init.constant_(made.query_heads["2"].weight, float("nan"))
    with pytest.raises(AdapterError, match=r"query_heads\.2\.weight holds numbers that are not finite"):
        made.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(AdapterError, match="a file is where"):
        adapter().save_pretrained(tmp_path / "mine")
    with pytest.raises(AdapterError, match="this is a file"):
        KnowledgeAdapter.from_pretrained(tmp_path / "mine")


def test_no_such_folder(tmp_path):
    with pytest.raises(AdapterError, match="there is no such folder"):
        KnowledgeAdapter.from_pretrained(tmp_path / "mine")


def test_a_folder_without_settings(saved):
    (saved / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has adapter_config\.json in it"):
        KnowledgeAdapter.from_pretrained(saved)


def test_a_folder_without_tensors(saved):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        KnowledgeAdapter.from_pretrained(saved)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "weights.pkl"])
def test_a_pickle_where_safetensors_belong_is_refused_by_name(saved, name):
    (saved / "adapter_model.safetensors").unlink()
    torch.save(adapter().state_dict(), saved / name)
    with pytest.raises(AdapterError, match=f"{name}.*could run any code"):
        KnowledgeAdapter.from_pretrained(saved)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_pickle_under_the_name_of_safetensors_is_refused(saved, write):
    write(adapter().state_dict(), saved / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="a pickle under the name of safetensors"):
        KnowledgeAdapter.from_pretrained(saved)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:40], lambda data: b"", lambda data: b"{}"]
)
def test_damaged_safetensors(saved, damage):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterError, match=r"damaged.*adapter_model\.safetensors"):
        KnowledgeAdapter.from_pretrained(saved)


CHANGES = {
    "missing": (lambda state: state.pop("query_heads.2.weight"), r"lacks the tensors query_heads\.2\.weight"),
    "extra": (lambda state: state.update(other=torch.zeros(1)), "has also the tensors other"),
    "shape": (
        lambda state: state.update({"query_heads.2.weight": torch.zeros(24, 23)}),
        r"query_heads\.2\.weight has the shape \[24, 23\], the settings make it \[24, 24\]",
    ),
    "integers": (
        lambda state: state.update({"key_projection.bias": torch.zeros(96, dtype=torch.int8)}),
        "cannot be int8",
    ),
    "infinite": (lambda state: state["key_projection.bias"].fill_(float("inf")), r"key_projection\.bias.*not finite"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_the_settings(saved, change):
    make, message = CHANGES[change]
    state = load_file(saved / "adapter_model.safetensors")
    make(state)
    save_file(state, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message) as error:
        KnowledgeAdapter.from_pretrained(saved)
    assert str(saved) in str(error.value)


def test_settings_of_another_adapter(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"slots": 5}))
    with pytest.raises(AdapterError, match=r"has the shape \[96.*make it \[120"):
        KnowledgeAdapter.from_pretrained(saved)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield server


def test_an_adapter_from_the_hub(hub, saved):
    hub.repositories["owner/adapter"] = {file.name: file.read_bytes() for file in saved.iterdir()} | {"big.bin": b"x"}
    assert_same(KnowledgeAdapter.from_pretrained("owner/adapter"), adapter())
    assert not any("big.bin" in path for path in hub.asked)
    hub.close()
    # What was downloaded is at hand when the hub is not.
    assert_same(KnowledgeAdapter.from_pretrained("owner/adapter"), adapter())


def test_the_hub_has_no_such_repository(hub):
    with pytest.raises(AdapterError, match="the hub has no such repository"):
        KnowledgeAdapter.from_pretrained("owner/nothing")


def test_the_hub_has_no_such_revision(hub, saved):
    hub.repositories["owner/adapter"] = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(AdapterError, match="no such revision"):
        KnowledgeAdapter.from_pretrained("owner/adapter", revision="v9")


def test_a_repository_of_the_hub_without_tensors(hub, saved):
    hub.repositories["owner/adapter"] = {"adapter_config.json": (saved / "adapter_config.json").read_bytes()}
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        KnowledgeAdapter.from_pretrained("owner/adapter")


def test_the_hub_cannot_be_reached(hub):
    hub.close()
    with pytest.raises(StorageError, match="the hub cannot be reached"):
        KnowledgeAdapter.from_pretrained("owner/adapter")


def test_the_hub_is_forbidden(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE"):
        KnowledgeAdapter.from_pretrained("owner/adapter")


class RecordedUploads:
    """Stands in for `HfApi`: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        (self.root / name).mkdir(parents=True, exist_ok=True)
        self.private = private
        return SimpleNamespace(repo_id=name)

    def file_exists(self, name, file, *, revision):
        return (self.root / name / file).exists()

    def hf_hub_download(self, name, file, *, revision, local_dir):
        shutil.copy(self.root / name / file, local_dir)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, ignore_patterns):
        for file in folder_path.iterdir():
            if file.name not in (ignore_patterns or []):
                shutil.copy(file, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    recorded = RecordedUploads(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", recorded)
    return recorded


def test_an_adapter_is_pushed_to_the_hub(uploads):
    address = adapter().push_to_hub("owner/adapter", private=True, token="secret")
    assert address == "https://hub/owner/adapter/commit/1"
    assert (uploads.private, uploads.token) == (True, "secret")
    assert_same(KnowledgeAdapter.from_pretrained(uploads.root / "owner/adapter"), adapter())


def test_pushing_again_keeps_an_edited_model_card_only(uploads):
    adapter().push_to_hub("owner/adapter")
    adapter(kind="shared").push_to_hub("owner/adapter")
    card = uploads.root / "owner/adapter/README.md"
    assert "| Kind | shared |" in card.read_text()
    card.write_text("our own words")
    adapter().push_to_hub("owner/adapter")
    assert card.read_text() == "our own words"
    assert KnowledgeAdapter.from_pretrained(uploads.root / "owner/adapter").config.kind == "paper"


def test_what_the_hub_refuses_when_pushing(hub):
    # The server knows no uploads: its answer is that of a hub that refuses them.
    with pytest.raises(AdapterError, match="refused"):
        adapter().push_to_hub("owner/adapter", token="hf_wrong")
    with pytest.raises(AdapterError, match="not a name"):
        adapter().push_to_hub("owner/adapter/too/long", token="hf_wrong")
    hub.close()
    with pytest.raises(StorageError, match="cannot be reached"):
        adapter().push_to_hub("owner/adapter", token="hf_wrong")
