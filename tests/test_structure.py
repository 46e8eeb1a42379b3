"""Imports point one way, without cycles or back doors. Files stay short. Optional packages are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tokenizer", "data", "ar_model", "pipelines")
BELOW = {
    "tokenizer": ["tokenizer"],
    "data": ["data"],
    "ar_model": ["ar_model"],
    "pipelines": ["tokenizer", "data", "ar_model"],
}
"""Packages that each package may import. `LAYERS` limits imports within pipelines."""
LAYERS = ["settings", "engine", "inference", "evaluation", "reporting", "commands", "benchmarks", "gpu", ""]
"""Folders of pipelines. Each may import the ones before it. The last is the top, with the commands that a user starts."""
COMMANDS = {
    *("train_tokenizer", "fit_tokenizer", "evaluate_tokenizer", "tokenize", "pretrain_ar"),
    *("probe", "compare", "report", "export", "extract_features", "search", "finetune", "evaluate"),
    *("push_to_hub", "benchmark"),
    *("doctor", "runs"),
}
BACK_DOORS = {"importlib", "import_module", "__import__", "runpy", "exec", "eval"}
"""Names that no module may use. importlib.metadata is allowed, because it only reads version numbers."""
OPTIONAL = ("xformers", "taming", "torchvision", "torchmetrics", "magvit2_pytorch", "faiss")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for path in FILES}


def _imports(path: Path) -> set[str]:
    """Modules of this project that a file imports anywhere: at its top, in a function, for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {part if part in MODULES else node.module for part in parts}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def _layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1] if module.count(".") > 1 or module.split(".")[-1] in LAYERS else "")


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    package = module.split(".")[0]
    for imported in IMPORTS[module]:
        if package == imported.split(".")[0] == "pipelines":
            assert _layer(imported) <= _layer(module), f"{module} imports {imported}"
        else:
            assert imported.split(".")[0] in BELOW[package], f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {module: set(imports) for module, imports in IMPORTS.items()}
    while free := [module for module, imports in left.items() if not imports & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_imported_by_its_name_in_a_string(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr != "eval"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "importlib.metadata":
            used |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
    assert not used & BACK_DOORS


def test_the_top_of_pipelines_has_only_commands() -> None:
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py")} == {*COMMANDS, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_under_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipelines.settings")])
def test_settings_import_no_torch(module: str) -> None:
    """Importing torch would make `--help` take seconds."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_module_imports_without_optional_packages() -> None:
    """xformers, taming and others are imported where they are used, not when a module is loaded."""
    code = (
        "import sys, importlib\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {OPTIONAL!r}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for name in {list(MODULES)!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
