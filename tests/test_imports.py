"""Who may import whom, read off the source with ast: nothing here is imported."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)

# What transformers runs over remote code: every match, in code or docstring, is a file that must exist.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import|from)\s+\.(\S+)", re.MULTILINE)

REMOTE_CODE = {"torch", "transformers", "PIL", "numpy", "huggingface_hub"}
TORCH_ONLY = {"adaptive_token_aggregation.py", "image_tokens.py", "joint_views.py"}  # for use with any encoder
# What of ours a folder's files import beside their own folder; of two folders that hold a file the inner one counts.
MAY_IMPORT = {
    "hub": {"modeling_granulon"},
    "hub/vllm_plugin": {"modeling_granulon"},
    "train": {"modeling_granulon", "granulon.train.controller", "granulon.train.data"}
    | {
        f"granulon.hub.{module}"
        for module in ("assemble", "files", "inference", "manifest", "publish", "text", "visualize")
    },
    "train/controller": {"modeling_granulon", "granulon.train.data"}
    | {f"granulon.hub.{module}" for module in ("files", "inference", "licences", "manifest", "text")},
    "train/data": {"modeling_granulon", "granulon.hub.files"},
    "evaluation": {"modeling_granulon", "granulon.hub", "granulon.train"},
    "evaluation/analyses": {"modeling_granulon", "granulon.hub", "granulon.train", "granulon.evaluation"},
    "evaluation/judge": {"modeling_granulon", "granulon.hub", "granulon.train", "granulon.evaluation"},
    "evaluation/tasks": {"modeling_granulon", "granulon.hub", "granulon.train", "granulon.evaluation"},
    "space": set(),
    "studies": {"modeling_granulon", "granulon.hub", "granulon.train", "granulon.evaluation"},
}
ALONE = "evaluation/tasks"  # lmms-eval loads the functions of a task from their file, so that nothing is relative
NEEDS_LMMS_EVAL = {"engine.py", "images.py", "lmms_model.py", "runner.py"}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "asyncio", "subprocess"}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """Every import of a file as (level, module, names), wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def folder_of(path):
    """The innermost folder of `MAY_IMPORT` that holds a file."""
    return max((folder for folder in MAY_IMPORT if path.is_relative_to(ROOT / folder)), key=len)


def within(module, packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


remote_code = pytest.mark.parametrize("path", sources("modeling_granulon"), ids=lambda path: path.name)


@remote_code
def test_remote_code_imports_only_what_every_user_has(path):
    allowed = STDLIB - NETWORK | ({"torch"} if path.name in TORCH_ONLY else REMOTE_CODE)
    for level, module, names in imports(path):
        if level == 0:
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"
            if module.startswith("huggingface_hub"):
                assert names == ["strict"], f"{path.name} imports {names} from {module}"


@remote_code
def test_remote_code_is_flat(path):
    assert path.parent == ROOT / "modeling_granulon"
    files = {file.stem for file in sources("modeling_granulon")} - {"__init__"}
    for level, module, names in imports(path):
        if level > 0:
            assert path.name not in TORCH_ONLY or f"{module}.py" in TORCH_ONLY, f"{path.name} imports {module}"
            assert level == 1 and module in files, f"{path.name}: from {'.' * level}{module} import {', '.join(names)}"


@remote_code
def test_every_line_that_looks_like_a_relative_import_is_one_at_the_top(path):
    source = path.read_text()
    at_top = [node.module for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and node.level]
    assert RELATIVE_IMPORT.findall(source) == at_top


@remote_code
def test_remote_code_does_not_look_at_the_environment_or_run_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "getenv", "system", "popen"}, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_in_one_direction(folder):
    top_level = {name.split("/")[0] for name in MAY_IMPORT}
    for path in (path for path in sources(folder) if folder_of(path) == folder):
        own = ".".join(("granulon", *path.relative_to(ROOT).parent.parts))
        beside = {file.stem for file in path.parent.glob("*.py")}
        for level, module, names in imports(path):
            where = f"{path.relative_to(ROOT)} imports {'.' * level}{module} {names}"
            if level:
                assert level == 1 and folder != ALONE, where
                assert ({module} if module else set(names)) <= beside, f"{where}; across folders write granulon.FOLDER"
                continue
            assert module.split(".")[0] not in top_level, f"{where}; write granulon.{module}"
            if within(module, {"granulon", "modeling_granulon"}):
                assert within(module, MAY_IMPORT[folder]), where
                parent, _, name = module.rpartition(".")
                assert module != own and (parent != own or name not in beside), f"{where}; inside a folder write ."


def test_no_modules_import_each_other():
    graph = {}
    for path in (path for folder in MAY_IMPORT if "/" not in folder for path in sources(folder)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        of_folder = ".".join(("granulon", *parts[:-1]))
        needed = graph.setdefault(of_folder if parts[-1] == "__init__" else f"{of_folder}.{parts[-1]}", set())
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                module = ".".join(filter(None, (of_folder if node.level else "", node.module)))
                needed |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    TopologicalSorter(graph).prepare()


def test_evaluation_needs_lmms_eval_only_where_tasks_are_run():
    for path in sources("evaluation"):
        if path.name not in NEEDS_LMMS_EVAL:
            for node in ast.parse(path.read_text()).body:  # what is imported with the module, not when it is called
                if isinstance(node, ast.Import | ast.ImportFrom):
                    named = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                    assert named.split(".")[0] != "lmms_eval", path
                    assert f"{named.rpartition('.')[2]}.py" not in NEEDS_LMMS_EVAL, path
