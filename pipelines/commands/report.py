"""Write one self-contained HTML page about a pre-training run."""

from typing import Any

from pipelines.engine.console import say
from pipelines.engine.device import start_accelerator
from pipelines.engine.run_files import find_run
from pipelines.reporting.run_page import write_run_page
from pipelines.settings.report import Report


def main(config: Report, settings: str) -> dict[str, Any]:
    """Write the page and return its path."""
    accelerator = start_accelerator()
    folder = find_run(config.run, "pretrain_ar")
    page = (config.out or folder / "report") / "index.html"
    if accelerator.is_main_process:
        write_run_page(folder, page, trust=config.trust)
        say(accelerator, f"open {page}")
    accelerator.wait_for_everyone()
    return {"page": str(page), "run": str(folder)}
