"""Who may import whom, read off the source with ast: nothing here is imported."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)

# What transformers runs over remote code: every match, in code or docstring, is a file that must exist.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import|from)\s+\.(\S+)", re.MULTILINE)

REMOTE_CODE = {"torch", "transformers", "PIL", "numpy", "huggingface_hub"}
TORCH_ONLY = {"adaptive_token_aggregation.py", "image_tokens.py", "joint_views.py"}  # for use with any encoder
OURS = {"modeling_granulon", "granulon.hub", "granulon.train", "granulon.evaluation"}
MAY_IMPORT = {
    "hub": {"modeling_granulon"},
    "train": {"modeling_granulon", "granulon.hub"},
    "evaluation": {"modeling_granulon", "granulon.hub", "granulon.train"},
    "space": set(),
}
NEEDS_LMMS_EVAL = {"engine.py", "images.py", "lmms_adapter.py"}
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


def ours(module):
    """The part of the project that an absolute import names, or None for an installed package."""
    return next((part for part in OURS if module == part or module.startswith(part + ".")), None)


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
    for path in sources(folder):
        # lmms-eval loads the functions of a task from their file, so that nothing is relative to them.
        alone = path.is_relative_to(ROOT / "evaluation" / "tasks")
        allowed = MAY_IMPORT[folder] | ({"granulon.evaluation"} if alone else set())
        for level, module, names in imports(path):
            where = f"{path.relative_to(ROOT)} imports {'.' * level}{module} {names}"
            assert level <= (0 if alone else 1), where
            if level == 0:
                assert module.split(".")[0] not in MAY_IMPORT, f"{where}; write granulon.{module}"
                assert ours(module) is None or ours(module) in allowed, where
                assert module != "granulon", where


def test_evaluation_needs_lmms_eval_only_where_tasks_are_run():
    for path in sources("evaluation"):
        if path.name not in NEEDS_LMMS_EVAL:
            for node in ast.parse(path.read_text()).body:  # what is imported with the module, not when it is called
                if isinstance(node, ast.Import | ast.ImportFrom):
                    named = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                    assert named.split(".")[0] != "lmms_eval" and f"{named}.py" not in NEEDS_LMMS_EVAL, path
