"""Imports go one way: a module uses only modules of the layers before its own."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["model", "plaingpt.startup"],
    ["plaingpt.console"],
    ["plaingpt.cpu", "plaingpt.graphs", "plaingpt.workarounds"],
    ["plaingpt.settings"],
    ["plaingpt.generate", "plaingpt.train_config"],
    ["plaingpt.files"],
    ["plaingpt.hub", "plaingpt.tokenizer"],
    ["plaingpt.tokens"],
    ["plaingpt.text.config"],
    ["plaingpt.text.streams"],
    ["plaingpt.text.readers", "plaingpt.text.bulk"],
    ["plaingpt.text.sources"],
    ["plaingpt.text.pipeline", "plaingpt.batches"],
    ["plaingpt.text.job"],
    ["plaingpt.distributed", "plaingpt.metrics", "plaingpt.checkpoint"],
    ["plaingpt.parallel"],
    ["plaingpt.optimizer", "plaingpt.evaluate"],
    ["plaingpt.run_state", "plaingpt.plan"],
    ["plaingpt.run"],
    ["plaingpt.budget"],
    ["train", "sample", "prepare_data", "tools.to_gguf", "tools.compare_runs", "tools.page", "tools.inspect_data"],
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}


def imports(module: str) -> set[str]:
    """What a module of ours imports of ours, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(LEVEL)


def test_every_module_has_a_layer():
    folders = [ROOT, ROOT / "plaingpt", ROOT / "plaingpt" / "text", ROOT / "tools"]
    paths = [path.relative_to(ROOT) for folder in folders for path in folder.glob("*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in paths if path.name != "__init__.py"}
    assert modules == set(LEVEL)


def test_contributing_says_where_everything_is():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert not [m for m in LEVEL if m.startswith("plaingpt") and f"`{m.split('.')[-1]}.py`" not in text]


def test_no_module_imports_one_of_its_own_layer_or_of_a_later_one():
    seen = {f"plaingpt.{name}" for name in ("settings", "batches", "files", "plan", "run_state")}
    assert seen <= imports("train")
    assert not [f"{m} imports {other}" for m in LEVEL for other in imports(m) if LEVEL[other] >= LEVEL[m]]


def test_the_model_imports_torch_alone():
    tree = ast.parse((ROOT / "model.py").read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}


def test_nothing_that_is_read_is_run():
    """No pickle, eval or exec anywhere; torch.load with weights_only; only recipes, the user's own code, are run."""
    found = []
    for module in LEVEL:
        for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"))):
            if isinstance(node, ast.Call):
                call, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                safe = call == "torch.load" and named.get("weights_only") == "True"
                runs = call in ("eval", "exec", "compile", "__import__", "runpy.run_path", "np.load", "numpy.load")
                if (runs or call == "torch.load" or "trust_remote_code" in named) and not safe:
                    found.append((module, call))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                found += [(module, name) for name in names if name in ("pickle", "dill", "marshal", "shelve", "joblib")]
    assert found == [("plaingpt.settings", "runpy.run_path")]
