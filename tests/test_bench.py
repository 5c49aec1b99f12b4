"""`idlm bench`: its arithmetic on made-up rounds, its configuration, and a whole comparison on real engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import publish
from vllm_idlm import planner
from vllm_idlm.bench import checks, config, counters, figures, plots, prompts, report
from vllm_idlm.bench.config import Bench, ConfigError
from vllm_idlm.bench.store import Place, Record, Store
from vllm_idlm.cli import app, provenance

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "bench"
RUNNER = CliRunner()


def asked(tmp_path, **fields):
    return Bench(**{"model": "m", "out": str(tmp_path / "out"), "methods": ["plain", "isd"], **fields})


def answer(events, step=0.1):
    """An answer that got `events` tokens at each engine step."""
    gaps = [step] * (len(events) - 1)
    tokens = list(range(sum(events)))
    times = {"ttft": 0.5, "latency": 0.5 + sum(gaps), "gaps": gaps}
    return {"token_ids": tokens, "prompt_tokens": 3, "first": events[0], **times}


def plain_round(answers=2, tokens=11, step=0.1):
    made = [answer([1] * tokens, step) for _ in range(answers)]
    vllm = dict.fromkeys([*counters.PLAIN.values()], 0) | {"accepted_by_place": []}
    vllm |= {"tokens": answers * tokens, "forwards": answers * (tokens - 1)}
    steps = [step] * (tokens - 1)
    return {
        "answers": made, "seconds": 0.5 + step * (tokens - 1), "steps": steps, "vllm": vllm, "isd": None,
        "resident_bytes": 10, "device_bytes": None,
    }  # fmt: skip


def isd_round(step=0.2):
    """Two answers at n = 3: cold, both accepted, one accepted, cold, none accepted (of one draft)."""
    made = plain_round()
    made["answers"] = [answer([1, 1, 3, 2, 1, 1], step) for _ in range(2)]
    made["steps"], made["seconds"] = [step] * 5, 0.5 + 5 * step
    made["vllm"] |= {"tokens": 18, "forwards": 10, "verify_forwards": 6, "drafts": 10, "accepted": 6}
    made["vllm"]["accepted_by_place"] = [4, 2, 0, 0]
    made["isd"] = {
        "accepted_all": 2, "rejected": 4, "cold": 4, "emitted": 16, "rows": 42, "drafted_per_position": [6, 4],
        "accepted_per_position": [4, 2], "seconds": 0.1, "steps": 5,
    }  # fmt: skip
    return made


# -- configuration


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_shipped_configurations_load(name):
    found = config.load(CONFIGS / f"{name}.yaml")
    assert found.methods[0].name == "plain"
    assert len(found.methods) >= 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods=[plain, spec]", "'spec' is no method known by name; known are plain, isd, isd-N, ngram, suffix"),
        ("methods=[eagle3]", "eagle3 needs its draft model"),
        ("methods=[plain, plain]", "plain is there twice"),
        ("concurrency=[0]", "concurrency from 1 on"),
        ("temperatures=[-1]", "temperatures from 0"),
        ("concurrency=[99]", "concurrency 99 is more than engine.max_num_seqs 16"),
        ("round=3", "round is no field; allowed are model, out"),
        ("rounds", "'rounds' is no override"),
        ("rounds=0", "rounds: 0 is not allowed"),
    ],
)
def test_wrong_settings_are_refused_by_name(override, said):
    shown = RUNNER.invoke(app, ["bench", "smollm2", override])
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())


def test_unknown_configuration_says_which_there_are():
    shown = RUNNER.invoke(app, ["bench", "nothing"])
    assert shown.exit_code == 2
    assert "shipped are qwen3-8b, smollm2" in " ".join(shown.output.split())


def test_methods_by_name_and_groups(tmp_path):
    made = asked(tmp_path, methods=["plain", "isd-8", "ngram", "suffix"], alive=3)
    assert made.methods[1].speculative == {"method": "isd", "n": 8}
    assert [[m.name for m in group] for group in made.groups()] == [["plain", "isd-8", "ngram"], ["plain", "suffix"]]
    fixed = {"method": "isd", "n": 3, "coverage": "all"}
    assert config.Method(name="x", speculative=fixed).fixed_rows == (3, 2)
    assert made.methods[1].fixed_rows is None  # coverage auto


def test_every_round_has_prompts_of_its_own_the_same_for_all(tmp_path):
    made = asked(tmp_path, concurrency=[1, 4], rounds=2, requests=3)
    found = prompts.rounds(made)
    assert {place[1]: len(chats) for place, chats in found.items()} == {1: 3, 4: 4}
    texts = [chat[-1]["content"] for chats in found.values() for chat in chats]
    assert len(set(texts)) == len(texts) == 28
    assert prompts.rounds(made) == found
    assert prompts.repeated(made) == 1


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    made = asked(tmp_path, prompts=str(tmp_path / "mine.txt"))
    assert prompts.repeated(made) > 1
    with pytest.raises(ConfigError, match=r"prompts: .*nowhere"):
        prompts.pool(asked(tmp_path, prompts=str(tmp_path / "nowhere.txt")))


# -- figures


def test_figures_of_plain_decoding():
    one = plain_round()
    found = figures.of([one], [one])
    assert found["TPF"] == found["rows"] == found["efficiency"] == 1
    assert found["tokens_per_s"]["median"] == pytest.approx(22 / 1.5)
    assert found["speedup"]["median"] == found["OH"]["median"] == 1
    assert found["itl_ms"]["p50"] == pytest.approx(100)
    assert found["ttft_ms"]["p99"] == pytest.approx(500)
    assert found["tokens_per_s_request"] == pytest.approx(10)
    assert (found["identical"], found["compared"], found["acceptance"], found["alpha"]) == (2, 2, [], None)


def test_figures_of_isd_counted_by_hand():
    found = figures.of([isd_round()], [plain_round()])
    assert found["TPF"] == 1.6
    assert found["OH"]["median"] == pytest.approx(2)
    assert found["rows"] == 4.2
    assert found["efficiency"] == pytest.approx(1.6**2 / 4.2)
    assert found["kinds"] == {"verify": 6, "cold": 4, "accepted_all": 2, "rejected": 4}
    assert found["accepted_length"] == 2
    assert found["acceptance"] == pytest.approx([4 / 6, 2 / 6])
    assert found["given_before"] == pytest.approx([4 / 6, 2 / 4])
    assert found["alpha"] == pytest.approx(6 / 10)
    assert found["identical"] == 0


def test_ratios_are_of_the_same_round():
    """A machine that is twice as slow in one round moves no ratio."""
    slow = [plain_round(step=0.1), plain_round(step=0.2)]
    found = figures.of([isd_round(step=0.2), isd_round(step=0.4)], slow)
    assert found["OH"] == pytest.approx({"median": 2, "min": 2, "max": 2})
    assert figures.of([isd_round()], [None])["OH"] is None


def test_percentiles():
    assert figures.percentiles(list(range(101))) == {"p50": 50, "p99": 99}
    assert figures.percentiles([]) is None


# -- checks


def test_checks_hold_where_counts_agree():
    found = checks.of(config.Method(name="isd", speculative={"method": "isd"}), [isd_round()])
    assert [check.ok for check in found] == [True] * 5 + [None]


@pytest.mark.parametrize(
    ("where", "name", "failing"),
    [
        ("vllm", "tokens", "tokens in the answers"),
        ("vllm", "forwards", "forwards seen"),
        ("vllm", "verify_forwards", "verify forwards"),
        ("vllm", "accepted", "TPF x forwards"),
        ("isd", "emitted", "TPF x forwards"),
        ("isd", "cold", "ISD's forwards"),
    ],
)
def test_a_wrong_count_is_found(where, name, failing):
    one = isd_round()
    one[where][name] += 1
    bad = [c.name for c in checks.of(config.Method(name="isd", speculative={"method": "isd"}), [one]) if c.ok is False]
    assert any(failing in name for name in bad)


@pytest.mark.parametrize(("off", "ok"), [(1.0, True), (1.03, False)])
def test_the_formula_is_held_against_the_tpf(off, ok):
    given, method = [0.6, 0.5], config.Method(name="x", speculative={"method": "isd", "n": 3, "coverage": "last"})
    found = {"TPF": planner.tpf(given) * off, "given_before": given, "forwards": 1000}
    assert checks._formula(method, found).ok is ok
    assert checks._formula(method, {**found, "forwards": 10}).ok is None


# -- what is kept


def place(number, group=0):
    return Place(group, 0.0, 1, number)


def test_going_on_keeps_rounds_and_refuses_another_configuration(tmp_path):
    made = asked(tmp_path)
    store = Store(made)
    store.begin(resume=False, fresh=False)
    store.add([Record(place(0), "plain", plain_round()), Record(place(0), "isd", isd_round())])
    with store.rounds.open("a") as file:
        file.write('{"place": [0, 0.0')  # cut off while it was written
    with pytest.raises(ConfigError, match="unfinished comparison: --resume goes on, --fresh begins anew"):
        Store(made).begin(resume=False, fresh=False)
    again = Store(made)
    again.begin(resume=True, fresh=False)
    assert again.lacks(place(0), ["plain", "isd"]) == []
    assert again.lacks(place(1), ["plain"]) == ["plain"]
    assert again.records[place(0), "isd"].figures == isd_round()
    with pytest.raises(ConfigError, match="another configuration"):
        Store(asked(tmp_path, rounds=9)).begin(resume=True, fresh=False)
    fresh = Store(made)
    fresh.begin(resume=False, fresh=True)
    assert not fresh.records


def test_report_has_tables_pictures_and_failures(tmp_path):
    made = asked(tmp_path, concurrency=[1], temperatures=[0.0])
    store = Store(made)
    store.begin(resume=False, fresh=False)
    for number in range(2):
        store.add([Record(place(number), "plain", plain_round()), Record(place(number), "isd", isd_round())])
    store.state["failures"]["suffix"] = {
        "where": "start",
        "message": "ImportError: no arctic\n[type=x]\nFor further information visit y",
    }
    facts = {"compiled": True, "dtype": "bfloat16"}
    store.state["facts"] = {"plain": facts, "isd": facts}
    found = report.make(store, provenance.collect())
    text = report.markdown(found)
    assert "| 1 | isd | 12.0 | 0.82 | 8.0 |" in text
    assert "`suffix` did not run (start); vLLM says: `ImportError: no arctic`" in text
    assert "Checks: 8 of 8 hold" in text
    assert len(plots.draw(found, tmp_path)) == 8
    assert all(file.stat().st_size > 3000 for file in plots.draw(found, tmp_path))
    assert report.load(report.write(found, tmp_path)) == json.loads((tmp_path / "report.json").read_text())


def test_results_in_the_documents_are_the_recorded_ones():
    """Between its marks, docs/benchmarks.md has the tables of the report in benchmarks/results, and nothing else."""
    root = CONFIGS.parent.parent
    page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- bench ([\w-]+) -->", page)
    assert names
    for name in names:
        record = root / "benchmarks" / "results" / f"{name}.json"
        if not record.is_file():  # nothing measured, nothing told
            assert f"<!-- bench {name} -->\n<!-- end -->" in page
            continue
        assert publish.insert(page, name, report.load(record)) == page
        pictures = re.findall(rf"\(images/({name}-[\w-]+\.png)\)", page)
        assert len(pictures) == 4
        assert all((root / "docs" / "images" / picture).is_file() for picture in pictures)


def test_publishing_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench it -->\nstale words\n<!-- end -->\nafter\n")
    store = Store(asked(tmp_path, concurrency=[1], temperatures=[0.0]))
    store.begin(resume=False, fresh=False)
    store.add([Record(place(0), "plain", plain_round()), Record(place(0), "isd", isd_round())])
    store.state["facts"] = {"plain": {"compiled": False, "dtype": "float32"}}
    report.write(report.make(store, provenance.collect()), tmp_path)
    publish.publish(tmp_path, "it", page, tmp_path / "results")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench it -->\n\n**Greedy: speed**")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "stale words" not in text
    assert (tmp_path / "results" / "it.json").is_file()
    assert (tmp_path / "images" / "it-speedup.png").is_file()
    with pytest.raises(ValueError, match="has no '<!-- bench other -->'"):
        publish.publish(tmp_path, "other", page, tmp_path / "results")


# -- for real


@pytest.fixture(scope="module")
def compared(smol, adapter, tmp_path_factory):
    """A small comparison by the command: three methods that run, one that cannot."""
    folder = tmp_path_factory.mktemp("bench")
    isd, eagle = {"method": "isd", "n": 3}, {"method": "eagle3", "num_speculative_tokens": 3}
    content = {
        "model": smol, "out": str(folder / "out"), "concurrency": [2], "requests": 4, "temperatures": [0, 1],
        "max_tokens": 24, "rounds": 1, "warm_up_tokens": 4,
        "engine": {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4,
            "kv_cache_memory_bytes": 200_000_000, "enable_prefix_caching": False,
        },
        "methods": [
            "plain",
            {"name": "last", "speculative": {**isd, "coverage": "last", "lora": adapter, "mask_token_id": 16}},
            "ngram",
            {"name": "gone", "speculative": {**eagle, "model": str(folder / "gone")}},
        ],
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(content))  # JSON is YAML
    ran = RUNNER.invoke(app, ["bench", str(folder / "c.yaml")])
    assert ran.exit_code == 0, ran.output
    return folder, report.load(folder / "out"), ran.output


@pytest.mark.vllm
def test_methods_run_side_by_side_and_all_counts_agree(compared):
    folder, found, _ = compared
    assert [(row["method"], row["temperature"]) for row in found["rows"]] == [
        (name, t) for name in ("plain", "last", "ngram") for t in (0.0, 1.0)
    ]
    for row in found["rows"]:
        assert row["tokens"] == 4 * 24
        assert [c for c in row["checks"] if c["ok"] is False] == []
        assert row["itl_ms"]["p50"] > 0
        assert row["ttft_ms"]["p50"] > 0
        if not row["temperature"]:
            assert (row["identical"], row["compared"]) == (4, 4)  # greedy, float32
    assert found["rows"][2]["TPF"] > 1.1
    assert found["engines"]["last"]["isd"]["coverage"] == "last"
    assert (folder / "out" / "speedup.png").stat().st_size > 3000


@pytest.mark.vllm
def test_a_method_that_fails_is_told_in_vllms_words(compared):
    _, found, shown = compared
    assert list(found["failures"]) == ["gone"]
    assert "Invalid repository ID or local directory specified" in found["failures"]["gone"]["message"]
    assert "gone failed (start)" in shown


@pytest.mark.vllm
def test_a_finished_comparison_is_only_shown_again(compared, tmp_path):
    folder, found, _ = compared
    without = ["methods=" + json.dumps(found["asked"]["methods"][:3]), f"out={tmp_path / 'out'}"]
    content = json.loads((folder / "c.yaml").read_text())
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    store = Store(config.load(tmp_path / "c.yaml", without))
    old = Store(config.load(folder / "c.yaml"))
    old._read()
    store.begin(resume=False, fresh=False)
    store.add(list(old.records.values()))
    store.state["facts"] = found["engines"]
    store.save()
    ran = RUNNER.invoke(app, ["bench", str(tmp_path / "c.yaml"), *without, "--resume"])
    assert ran.exit_code == 0, ran.output
    assert report.load(tmp_path / "out")["rows"] == found["rows"]
