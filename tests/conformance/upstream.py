"""transformers' own common tests as an importable package, fetched once for each installed version.

The wheel holds no tests. The source distribution on PyPI holds `tests/*.py` but none of its subfolders, so the few
names that these files take from elsewhere get a stand-in. Nothing fetched here ever enters the repository.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers
from PIL import Image

CACHE = Path(__file__).parents[2] / "build" / "conformance"
PACKAGE = "transformers_tests"


def fetch() -> Path:
    """The folder that holds the tests of the installed transformers, downloaded if it is not there yet.

    Raises:
        subprocess.CalledProcessError: if pip cannot fetch the source distribution.
    """
    release = f"transformers-{transformers.__version__}"
    target = CACHE / release
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fetched = Path(folder, release)
        (fetched / PACKAGE).mkdir(parents=True)
        _pip("download", "--no-deps", "--no-binary=transformers", f"--dest={folder}", release.replace("-", "=="))
        _pip("install", "--no-deps", f"--target={fetched}", "parameterized")
        with tarfile.open(Path(folder, f"{release}.tar.gz")) as sdist:
            for member in sdist:
                path = Path(member.name)
                if path.match(f"{release}/tests/*.py"):
                    Path(fetched, PACKAGE, path.name).write_bytes(sdist.extractfile(member).read())
        Path(fetched, PACKAGE, "__init__.py").touch()
        shutil.move(fetched, target)
    return target


def load(module: str) -> types.ModuleType:
    """A module of transformers' tests folder, such as `test_modeling_common`."""
    folder = fetch()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
        _stand_in("fetch_hub_objects_for_ci", url_to_local_path=_local_file)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _pip(*arguments: str):
    subprocess.run([sys.executable, "-m", "pip", "-qq", *arguments], check=True)


def _stand_in(name: str, **names):
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


def _local_file(url: str) -> str:
    """A picture of our own in place of one that the tests would download."""
    path = CACHE / Path(url).name
    if path.suffix == ".png" and not path.exists():
        Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(path)
    return str(path)
