"""The built wheel: what it holds, where, and that what it holds is enough to use the zoo."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ADAPTER = "vllm_idlm/configs/adapters/smollm2-135m-isd"
PARTS = ("vllm_idlm", "proposers", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built without network from a copy of the tree, so that no build product lands in it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        elif source.is_file():
            shutil.copy(source, tree / name)
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(out), str(tree)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.heavy
def test_nothing_at_the_top_but_the_package(contents):
    top = {name.split("/")[0] for name in contents}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vllm_idlm"}


@pytest.mark.parametrize("package", ["proposers", "kernels", "configs"])
def test_top_level_folders_are_below_the_package(contents, package):
    sources = {
        f"vllm_idlm/{package}/{file.relative_to(ROOT / package)}"
        for file in (ROOT / package).rglob("*")
        if file.suffix in {".py", ".cpp", ".yaml"}
    }
    assert sources <= contents
    assert f"vllm_idlm/{package}/__init__.py" in sources


def test_every_module_is_in_the_wheel(contents):
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "vllm_idlm").rglob("*.py")}
    assert modules <= contents


def test_adapter_and_licence_are_in_the_wheel(contents):
    assert {
        f"{ADAPTER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "isd.json")
    } <= contents
    assert any(name.endswith("/licenses/LICENSE") for name in contents)


def test_the_explorers_page_and_the_measurements_are_in_the_wheel(contents):
    assert "vllm_idlm/explorer.html" in contents
    assert "vllm_idlm/configs/measured/i-dlm-8b-h100.yaml" in contents


@pytest.mark.heavy
def test_installed_wheel_finds_its_zoo_and_plugin(wheel, tmp_path):
    """Unpacked into an empty environment that borrows only the dependencies, away from this tree."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    import yaml

    borrowed = Path(yaml.__file__).parent.parent
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from importlib.metadata import entry_points\n"
        "import vllm_idlm; from vllm_idlm import zoo\n"
        "entry = zoo.load('smollm2-135m-risd')\n"
        "(plugin,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'idlm']\n"
        "print(vllm_idlm.__file__, entry.lora_path(), plugin.value, sep='\\n')\n"
    )
    python = tmp_path / "env" / "bin" / "python"
    command = [str(python), "-I", "-c", code, str(borrowed)]
    module, adapter, plugin = subprocess.check_output(command, text=True, cwd=tmp_path).split()
    assert module == str(site / "vllm_idlm" / "__init__.py")
    assert adapter == str(site / ADAPTER)
    assert plugin == "vllm_idlm.plugin:register"
