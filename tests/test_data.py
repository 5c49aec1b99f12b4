"""`idlm data`: prompts, the split, reading samples, and the command on a real engine."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from vllm_idlm.cli import data as command
from vllm_idlm.data import files, keys, plan, prompts, recipe, record, samples
from vllm_idlm.data.errors import DataError
from vllm_idlm.fingerprint import FingerprintError, fingerprint

APP = typer.Typer()
APP.command()(command.data)
KINDS = 12


def _lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(**other):
    base = {"model": "m", "fingerprint": "f", "dtype": "float32", "chat_template": None}
    return plan.Settings(**{**base, "prompts": "p", "prompts_sha256": "s", "count": 10, **other})


# -- prompts


def test_recipe_is_distinct_balanced_and_deterministic():
    made = recipe.prompts("chat", 24000)
    assert len({text for text, _ in made}) == 24000
    assert set(Counter(kind for _, kind in made).values()) == {24000 // KINDS}
    assert recipe.prompts("chat", 100) == made[:100]
    assert len({text for text, _ in made[:600]} & {text for text, _ in recipe.prompts("chat", 600, seed=1)}) < 60
    assert not [text for text, _ in made if recipe._SLOT.search(text)]


def test_recipe_refuses_what_it_has_not(monkeypatch):
    monkeypatch.setattr(recipe, "_MOST", 5)
    with pytest.raises(DataError, match=r"--recipe songs.*allowed are chat"):
        recipe.prompts("songs", 1)
    with pytest.raises(DataError, match=r"--count 9999999: .* has \d+ different prompts"):
        recipe.prompts("chat", 9999999)
    with pytest.raises(DataError, match="'moon' to `slots`"):
        list(recipe._combinations("Go to the {moon}", {}, 0))


def test_prompts_from_each_kind_of_file(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\n two \none\n")
    assert [(p.index, p.messages[0]["content"]) for p in prompts.load(text)] == [(0, "one"), (1, "two")]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "one", "kind": "k"}, {"messages": [*chat, {"role": "assistant", "content": "a"}]}]
    read = prompts.load(_lines(tmp_path / "a.jsonl", *rows))
    assert [(list(p.messages), p.kind) for p in read] == [([{"role": "user", "content": "one"}], "k"), (chat, None)]
    assert len(prompts.load(text, count=1)) == 1
    assert read[0].key == prompts.load(text)[0].key


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r'line 1: no "prompt" text.*it has text'),
        ({"messages": []}, "line 1: messages: .* no list"),
        ({"messages": [{"role": "user"}]}, "lacks a text for role or content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing comes before the assistant"),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        prompts.load(_lines(tmp_path / "a.jsonl", row))


# -- plan and split


def test_split_hangs_on_the_prompt_alone():
    many = prompts.built_in("chat", 2000, 0)
    held = {p.key for p in many if keys.side(p.key, 0.05) == "eval"}
    assert 60 < len(held) < 140
    assert {p.key for p in many[:500] if keys.side(p.key, 0.05) == "eval"} == held & {p.key for p in many[:500]}
    assert held < {p.key for p in many if keys.side(p.key, 0.2) == "eval"}
    shards = plan.shards(many, _settings(shard=512))
    assert [(s.name, len(s.prompts)) for s in shards][:2] == [
        ("eval-00000.jsonl", len(held)),
        ("train-00000.jsonl", 512),
    ]
    assert sum(len(s.prompts) for s in shards) == 2000


def test_split_by_prompt_keeps_answers_together():
    made = [samples.Sample([i], [a], keys.prompt_key([i])) for i in range(300) for a in range(3)]
    train, held = samples.split_by_prompt(made, 0.2)
    assert len(train) + len(held) == 900
    assert {s.prompt_key for s in train}.isdisjoint(s.prompt_key for s in held)
    assert 100 < len(held) < 260
    with pytest.raises(DataError, match="fraction 1"):
        samples.split_by_prompt(made, 1)


def test_draws_are_seeded_one_by_one_and_greedy_once():
    many = prompts.built_in("chat", 600, 0)
    settings = _settings(answers=4)
    drawn = [plan.draws(prompt, settings) for prompt in many]
    assert drawn[5] == plan.draws(many[5], settings)
    assert all([d.temperature for d in four].count(0) == 1 for four in drawn)
    assert len({d.seed for four in drawn for d in four}) == 2400
    one = Counter((p.kind, plan.draws(p, _settings())[0].temperature) for p in many)
    assert len(one) == 3 * KINDS  # no kind sticks to one temperature
    assert all(150 < sum(n for (_, t), n in one.items() if t == value) < 250 for value in (0, 0.7, 1.0))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"temperatures": (-1.0,)}, "--temperatures -1"),
        ({"temperatures": (float("nan"),)}, "--temperatures nan"),
        ({"answers": 2, "temperatures": (0.0,)}, "would be the same"),
        ({"answers": 0}, "--answers 0: allowed is 1 to 1000"),
        ({"max_tokens": 0}, "--max-tokens 0: allowed is 1 and up"),
        ({"shard": 0}, "--shard 0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"format": "csv"}, "--format csv: allowed are jsonl, parquet"),
    ],
)
def test_impossible_settings_are_refused(other, said):
    with pytest.raises(DataError, match=said):
        plan.check(_settings(**other))


# -- samples


class _Letters:
    """A tokenizer of code points, with the chat template 'each content, then !'."""

    eos_token_id, chat_template = 0, "yes"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, **_):
        return [ord(c) for m in messages for c in m["content"] + "!"]


def test_ids_are_read_as_they_are(tmp_path):
    rows = [
        {"prompt_ids": [1, 2], "answer_ids": [3], "kind": "k", "temperature": 1, "prompt_key": "p"},
        {"prompt_ids": [1, 2], "answer_ids": [4]},
    ]
    first, second = samples.read(_lines(tmp_path / "a.jsonl", *rows))
    assert first == samples.Sample([1, 2], [3], "p", "k", 1.0)
    assert second == samples.Sample([1, 2], [4], keys.prompt_key([1, 2]))


def test_texts_need_a_tokenizer(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    file = _lines(tmp_path / "a.jsonl", {"messages": messages}, {"prompt": "q", "answer": "c"})
    first, second = samples.read([file], tokenizer=_Letters())
    assert (first.prompt_ids, first.answer_ids) == ([ord("q"), ord("!")], [ord("a"), ord("b"), 0])
    assert first.prompt_key == second.prompt_key
    with pytest.raises(DataError, match=r"line 1: it holds texts.*give a tokenizer"):
        samples.read(file)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt_ids": [1]}, "line 2: answer_ids: missing"),
        ({"prompt_ids": [1], "answer_ids": []}, "line 2: answer_ids: .* no list"),
        ({"prompt_ids": [1, -3], "answer_ids": [2]}, "line 2: prompt_ids: -3 is no token id"),
        ({"prompt_ids": [1, True], "answer_ids": [2]}, "prompt_ids: True is no token id"),
        ({"prompt": "q"}, r"line 2: no answer \(it has prompt\)"),
        ({"messages": [{"role": "user", "content": "q"}]}, "line 2: messages: no answer"),
        ([1], "line 2: list where an object is needed"),
    ],
)
def test_bad_samples_are_named(tmp_path, row, said):
    file = _lines(tmp_path / "a.jsonl", {"prompt_ids": [1], "answer_ids": [1]}, row)
    with pytest.raises(DataError, match=said):
        samples.read(file, tokenizer=_Letters())


def test_bad_sources_are_named(tmp_path):
    for path, said in [
        (tmp_path / "none", "no such file"),
        (tmp_path, "no train-"),
        (_lines(tmp_path / "a.csv"), "allowed are .jsonl and .parquet"),
        (_lines(tmp_path / "empty.jsonl"), "no sample"),
    ]:
        with pytest.raises(DataError, match=said):
            samples.read(path)
    (tmp_path / "torn.jsonl").write_text('{"prompt_ids": [1')
    with pytest.raises(DataError, match=r"torn.jsonl, line 1: not JSON"):
        samples.read(tmp_path / "torn.jsonl")
    with pytest.raises(DataError, match="split 'test'"):
        samples.read(tmp_path, split="test")


ROW = {
    "prompt_key": "p", "prompt_index": 0, "answer_index": 0, "kind": None, "temperature": 0.7, "seed": 5,
    "finish_reason": "stop", "prompt_ids": [1, 2], "answer_ids": [3], "text": "é",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}],
}  # fmt: skip


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_rows_come_back_as_written(tmp_path, suffix):
    file = tmp_path / f"train-00000.{suffix}"
    files.write(file, [ROW, {**ROW, "kind": "k"}])
    assert [row for _, row in files.rows(file)] == [ROW, {**ROW, "kind": "k"}]
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    assert samples.read(tmp_path)[0] == samples.Sample([1, 2], [3], "p", None, 0.7)
    assert prompts.load(file)[0].messages == ({"role": "user", "content": "q"},)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-00000"):
        samples.read(tmp_path)


def test_parquet_without_pyarrow_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow, or use jsonl"):
        plan.check(_settings(format="parquet"))


# -- fingerprint and record


def test_fingerprint_is_of_the_tensors_not_of_the_files(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    a, b = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
    for name, parts in {
        "one": [{"a": a, "b": b}],
        "two": [{"b": b}, {"a": a}],
        "other": [{"a": a.view(3, 2), "b": b}],
        "bit": [{"a": a, "b": b * 2}],
    }.items():
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            save_file(part, tmp_path / name / f"{i}.safetensors", {"format": "pt"})
    one, two, other, bit = (fingerprint(tmp_path / name) for name in ("one", "two", "other", "bit"))
    assert one == two
    assert len({one, other, bit}) == 3
    (tmp_path / "one" / "0.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(FingerprintError, match="no whole safetensors"):
        fingerprint(tmp_path / "one")
    with pytest.raises(FingerprintError, match=r"no \*.safetensors"):
        fingerprint(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    record.begin(tmp_path, _settings())
    record.begin(tmp_path, _settings(model="the same, by another name"))
    with pytest.raises(DataError, match=r"--max-tokens was 256, now 8; --seed was 0, now 1\. Give the same"):
        record.begin(tmp_path, _settings(max_tokens=8, seed=1))
    (tmp_path / record.FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        record.begin(tmp_path, _settings())
    (tmp_path / record.FILE).unlink()
    (tmp_path / "train-00000.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds train-00000.jsonl but no provenance.json"):
        record.begin(tmp_path, _settings())


def test_one_run_at_a_time(tmp_path):
    again = files.locked(tmp_path)
    with files.locked(tmp_path), pytest.raises(DataError, match="being written by another run"):
        again.__enter__()
    with files.locked(tmp_path):
        pass


# -- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperatures", "0;1"], "--temperatures 0;1"),
        (["--held-out", "2"], "--held-out 2"),
        (["--recipe", "songs"], "allowed are chat"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", "no/such-model"], "no zoo name, no folder"),
    ],
)
def test_wrong_options_end_the_command(tmp_path, options, said):
    shown = CliRunner().invoke(APP, [str(tmp_path / "out"), "--count", "4", *options])
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())
    assert not (tmp_path / "out").exists()


def _run(folder, *options):
    fixed = ["--count", "6", "--answers", "2", "--max-tokens", "16", "--shard", "2", "--held-out", "0.3"]
    return CliRunner().invoke(APP, [str(folder), *fixed, "--dtype", "float32", "--eager", *options])


@pytest.mark.vllm
def test_run_cut_short_goes_on_with_the_same_data(tmp_path, smol):
    """Six prompts, two answers each; then a shard is lost, then all are there, then the settings are others."""
    from transformers import AutoTokenizer

    shown = _run(tmp_path)
    assert shown.exit_code == 0, shown.output
    shards = sorted(file.name for file in tmp_path.glob("*.jsonl"))
    before = {name: (tmp_path / name).read_bytes() for name in shards}
    _check_rows(tmp_path, AutoTokenizer.from_pretrained(smol), shards)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in shards}

    (tmp_path / shards[-1]).unlink()
    (tmp_path / f".{shards[-1]}.tmp").write_text("half a li")
    shown = _run(tmp_path)
    assert shown.exit_code == 0, shown.output
    assert {name: (tmp_path / name).read_bytes() for name in shards} == before
    changed = [name for name in shards if (tmp_path / name).stat().st_mtime_ns != times[name]]
    assert changed == [shards[-1]]
    written = json.loads((tmp_path / record.FILE).read_text())
    assert [run["shards"] for run in written["runs"]] == [[*shards], [shards[-1]]]
    assert written["settings"]["fingerprint"] == fingerprint(smol)
    assert written["counts"]["samples"] == 12

    assert "shards are there already" in _run(tmp_path).output
    shown = _run(tmp_path, "--temperatures", "0,1")
    assert shown.exit_code == 2
    assert "--temperatures was 0,0.7,1, now 0,1" in " ".join(shown.output.split())


def _check_rows(folder, tokenizer, shards):
    """Every prompt twice on one side; the ids are the template's and the texts'; seeds and temperatures as planned."""
    rows = {name: [row for _, row in files.rows(folder / name)] for name in shards}
    asked = {p.key: p for p in prompts.built_in("chat", 6, 0)}
    assert Counter(row["prompt_key"] for found in rows.values() for row in found) == dict.fromkeys(asked, 2)
    for name, found in rows.items():
        assert len(found) in (2, 4)
        for row in found:
            prompt = asked[row["prompt_key"]]
            assert name.startswith(keys.side(prompt.key, 0.3))
            assert row["prompt_ids"] == samples.prompt_ids(tokenizer, prompt.messages, "")
            assert row["messages"][-1]["content"] == row["text"]
            text = tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
            assert text.rstrip("\ufffd") == row["text"].rstrip("\ufffd")  # vLLM leaves out half a character
            ended = row["answer_ids"][-1] == tokenizer.eos_token_id
            assert ended == (row["finish_reason"] == "stop")
            assert ended or len(row["answer_ids"]) == 16
    both = samples.read(folder, split=None)
    assert len(both) == 12
    assert {s.prompt_key for s in samples.read(folder, "eval")}.isdisjoint(
        s.prompt_key for s in samples.read(folder, "train")
    )
