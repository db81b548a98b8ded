"""Security of code that runs on other machines: remote code and Space use no network, eval or environment (by ast)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {
    "modeling_granulon": {"torch", "transformers", "PIL", "numpy", "huggingface_hub"},
    "space": {"gradio", "granulon_model", "numpy", "overlay", "PIL", "spaces", "torch", "transformers"},
}
SETTINGS_READ = {
    "space/app.py": {"MODEL_NOTICE", "MODEL_ABOUT"},
    "space/granulon_model.py": {"MODEL_ID", "MODEL_REVISION"},
}
NETWORK = {
    "aiohttp", "asyncio", "ftplib", "gradio_client", "http", "httpx", "httpx2", "requests", "smtplib", "socket",
    "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "webbrowser", "websockets", "xmlrpc",
}  # fmt: skip
RUNS_CODE = {
    "builtins", "cloudpickle", "code", "ctypes", "dill", "importlib", "joblib", "marshal", "multiprocessing", "pickle",
    "pty", "runpy", "shelve", "subprocess",
}  # fmt: skip
CALLS = {"__import__", "compile", "eval", "exec", "globals", "vars"}
ATTRIBUTES = {
    "environb", "execl", "execv", "execve", "execvp", "execvpe", "fork", "forkpty", "getenv", "getenvb",
    "import_module", "popen", "posix_spawn", "posix_spawnp", "putenv", "spawnl", "spawnv", "spawnve", "startfile",
    "system", "unsetenv",
}  # fmt: skip
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "hub"), ("yaml", "load"), ("os", "putenv")}


def violations(source, may_read=frozenset()):
    """Descriptions of what a source does that code from the Hub must not do."""
    found, allowed = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in NETWORK | RUNS_CODE]
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                found += [f"imports {alias.name} from os" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                found.append(f"calls {called}")
            if called == "getattr" and node.args and ast.unparse(node.args[0]) == "os":
                found.append("accesses os by name")
            if called == "os.environ.get" and isinstance(node.args[0], ast.Constant):
                if node.args[0].value in may_read:
                    allowed.add(id(node.func.value))
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if node.attr in ATTRIBUTES or (owner, node.attr) in LOADERS:
                found.append(f"uses {ast.unparse(node)}")
            if node.attr == "environ" and id(node) not in allowed:
                found.append("reads the environment")
        elif isinstance(node, ast.Name) and node.id in ("__builtins__", "__loader__"):
            found.append(f"uses {node.id}")
    return found


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "modeling_granulon").glob("*.py"), *(ROOT / "space").rglob("*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_code_from_the_hub_calls_no_network_runs_no_text_and_reads_no_environment(path):
    name = f"{path.parent.name}/{path.name}"
    assert violations(path.read_text(), SETTINGS_READ.get(name, frozenset())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from urllib import request", "import subprocess as s", "eval('1')", "exec('1')",
        "import os; os.system('ls')", "import os; os.environ['HF_TOKEN']", "import os; os.environ.get('HF_TOKEN')",
        "from os import environ", "import os; os.getenv('X')", "import importlib", "torch.load('x')",
        "import http.client", "__builtins__['eval']('1')", "import os\ncopy = os.environ", "__import__('os')",
        "import os; getattr(os, 'environ')", "import os; os.execve('ls', [], {})",
        "import os; os.posix_spawn('ls', [], {})",
    ],
)  # fmt: skip
def test_the_check_finds(line):
    assert violations(line, {"MODEL_ID"})
    assert not violations("import os\nname = os.environ.get('MODEL_ID', 'x')\nmodel.eval()", {"MODEL_ID"})


@pytest.mark.parametrize(
    ("folder", "path"),
    [(folder, path) for folder in LIBRARIES for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda value: getattr(value, "name", value),
)
def test_only_known_libraries_are_imported(folder, path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.split(".")[0])
    assert imported <= set(sys.stdlib_module_names) | LIBRARIES[folder]
