"""What runs on other people's machines opens no door: the remote code and the Space, read off the source with ast."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = {
    "asyncio", "ctypes", "dill", "ftplib", "http", "joblib", "marshal", "multiprocessing", "pickle", "shelve",
    "smtplib", "socket", "ssl", "subprocess", "urllib", "xmlrpc",
}  # fmt: skip
BUILT_IN = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"system", "popen", "getenv", "putenv", "execv", "spawnv", "fork", "import_module"}
SETTINGS = {"modeling_granulon": set(), "space": {"MODEL_ID", "MODEL_REVISION"}}
LIBRARIES = {
    "modeling_granulon": {"torch", "transformers", "PIL", "numpy", "huggingface_hub"},
    "space": {"gradio", "numpy", "overlay", "PIL", "spaces", "torch", "transformers"},
}

files = pytest.mark.parametrize(
    ("folder", "path"),
    [(folder, path) for folder in SETTINGS for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda value: getattr(value, "name", value),
)


def nodes(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def modules(path):
    for node in nodes(path, (ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif not node.level:
            yield node.module.split(".")[0]


@files
def test_only_known_libraries_are_imported_and_none_that_opens_a_door(folder, path):
    assert set(modules(path)) <= set(sys.stdlib_module_names) - DOORS | LIBRARIES[folder]


@files
def test_no_text_is_run_and_no_pickle_read(folder, path):
    for call in nodes(path, ast.Call):
        name = ast.unparse(call.func)
        assert name not in BUILT_IN and name not in {"torch.load", "numpy.load", "np.load"}, f"{path}:{call.lineno}"
    for node in nodes(path, ast.Attribute):
        assert node.attr not in ATTRIBUTES, f"{path}:{node.lineno}"


@files
def test_only_the_named_settings_are_read_from_the_environment(folder, path):
    reads = [node for node in nodes(path, ast.Attribute) if node.attr == "environ"]
    named = [
        call.args[0].value
        for call in nodes(path, ast.Call)
        if ast.unparse(call.func) == "os.environ.get" and isinstance(call.args[0], ast.Constant)
    ]
    assert len(reads) == len(named), "every use of the environment names its setting"
    assert set(named) <= SETTINGS[folder]
    assert not any(alias.name in ("environ", "getenv") for node in nodes(path, ast.ImportFrom) for alias in node.names)


def test_the_check_sees_what_it_is_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os, socket\nfrom os import environ\nexec('1')\nos.system('ls')\nos.environ['TOKEN']\n")
    checks = [
        test_only_known_libraries_are_imported_and_none_that_opens_a_door,
        test_no_text_is_run_and_no_pickle_read,
        test_only_the_named_settings_are_read_from_the_environment,
    ]
    for check in checks:
        with pytest.raises(AssertionError):
            check("space", bad)
