"""An upload holds the files of a model and no paths of this machine, and is loaded from the hub as from its folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from pipelines.inference import load_model, video_model
from tests.helpers.commands import Call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the hub: uploads are copied to it, and downloads are paths in it."""
    folder = tmp_path / "hub"

    def create_repo(self: HfApi, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (folder / "private").write_text(str(private))
        return f"https://hub/{repo_id}"

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> None:
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id: str, **_: Any) -> str:
        if not (folder / repo_id).is_dir():
            raise OSError("404 Client Error: not found")
        return str(folder / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(video_model, "snapshot_download", snapshot_download)
    return folder


def test_an_uploaded_model_is_loaded_from_the_hub(
    call: Call,
    finished_project: Path,
    answers: dict[str, Any],
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished_project / answers["pretrain_ar"]["run"]
    pushed = call("push_to_hub", "--run", str(run), "--repo", "me/my-model")
    assert (
        pushed["url"] == "https://hub/me/my-model" and pushed["notes"] == [] and (hub / "private").read_text() == "True"
    )
    assert pushed["files"] == [
        *("README.md", "config.json", "model.safetensors", "preprocessing.json"),
        *("tokenizer/README.md", "tokenizer/config.json", "tokenizer/model.safetensors"),
    ]
    for file in (hub / "me/my-model").rglob("*"):
        assert file.is_dir() or str(finished_project).encode() not in file.read_bytes()
    frames = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(load_model("me/my-model").features(frames).tokens, load_model(run).features(frames).tokens)


def test_a_tokenizer_is_uploaded(call: Call, finished_project: Path, answers: dict[str, Any], hub: Path) -> None:
    run = str(finished_project / answers["train_tokenizer"]["run"])
    pushed = call("push_to_hub", "--run", run, "--repo", "me/tokenizer", "--private", "false")
    assert (
        pushed["files"] == ["README.md", "config.json", "model.safetensors"]
        and (hub / "private").read_text() == "False"
    )


def test_a_model_without_a_copy_of_its_tokenizer_says_so(
    call: Call, copy_of: Any, answers: dict[str, Any], hub: Path
) -> None:
    run = copy_of() / answers["pretrain_ar"]["run"]
    shutil.rmtree(run / "model/tokenizer")
    (note,) = call("push_to_hub", "--run", str(run), "--repo", "me/codes")["notes"]
    assert Path(answers["train_tokenizer"]["run"]).name in note


def test_mistakes_are_one_line(
    call: Call,
    finished_project: Path,
    answers: dict[str, Any],
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "holds no finished model: config.json is missing" in call(
        "push_to_hub", "--run", str(tmp_path), "--repo", "a/b"
    )
    with pytest.raises(ValueError, match="me/absent: no such folder, and cannot be fetched from the hub: 404"):
        load_model("me/absent")

    def refused(self: HfApi, *_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError("Token is required, but no token found")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    run = str(finished_project / answers["pretrain_ar"]["run"])
    assert issubclass(HfHubHTTPError, OSError)  # other refusals of the hub end in the same way
    assert "no token found" in call("push_to_hub", "--run", run, "--repo", "me/my-model")
