"""Upload the model of a run to the Hugging Face hub."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from pipelines.engine.preprocessing import model_folder, published
from pipelines.settings.push_to_hub import PushToHub

_FILES = ("config.json", "model.safetensors", "README.md")


def main(config: PushToHub, settings: str) -> dict[str, Any]:
    """Upload the files of the model and return the address. Nothing else of the run is uploaded."""
    assert config.run is not None
    folder = model_folder(config.run)
    for name in _FILES:
        if not (folder / name).is_file():
            raise ValueError(f"--run {config.run}: holds no finished model: {name} is missing")
    api = HfApi()
    with TemporaryDirectory(prefix="arvideo-hub-") as temporary:
        upload = Path(temporary)
        for name in _FILES:
            shutil.copy(folder / name, upload / name)
        notes = published(folder, upload)
        files = sorted(str(file.relative_to(upload)) for file in upload.rglob("*") if file.is_file())
        # Errors of the hub and of the network are OSError.
        url = api.create_repo(config.repo, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=config.repo, folder_path=upload, commit_message="Upload a model of arvideo")
    return {"run": str(config.run), "repo": config.repo, "url": str(url), "files": files, "notes": notes}
