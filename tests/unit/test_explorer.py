"""The explorer: its tables are the planner's, its script agrees with the planner, and a person can use it."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from typer.testing import CliRunner

from tests.support import chromium
from vllm_idlm import explorer, measured, planner
from vllm_idlm.cli import app

START = {"model": "smollm2-135m", "hardware": "cpu-2-cores", "rates": [0.5], "n": 4, "groups": 0}
START |= {"requests": 1, "context": 80, "tp": 1, "rank": 32}


@pytest.fixture(scope="module")
def tables():
    return explorer.tables(START, planner.shape(START["model"]), planner.hardware(START["hardware"]), None)


@pytest.fixture(scope="module")
def page(tables, tmp_path_factory):
    file = tmp_path_factory.mktemp("explorer") / "explorer.html"
    file.write_text(explorer.page(tables), encoding="utf-8")
    return file


def test_tables_are_enough_to_plan_with(tables):
    """Step time from the exported tables alone, as the page's script computes it, against the planner's answers."""
    for c in tables["checks"]:
        m, hw, n, groups, tp = (
            tables["models"][c["model"]],
            tables["hardware"][c["hardware"]],
            c["n"],
            c["groups"],
            c["tp"],
        )
        rows = c["requests"] * (2 * n - 1 + groups * (n - 1))
        keys = c["requests"] * c["context"] * m["kv_bytes"]
        moved, fixed = m["params"] * m["bytes"] + keys * (2 if groups else 1), hw["step_ms"]
        done = 2 * m["params"] * rows + 4 * c["context"] * rows * m["layers"] * m["queries"]
        if n > 1:
            masks, lora = c["requests"] * (n - 1), m["lora_per_rank"] * c["rank"]
            share = hw["lora_efficiency"] or hw["flops_efficiency"]
            fixed += hw["isd_ms"] + 2e3 * lora * masks * (1 + groups) / (hw["flops"] * share * tp)
            moved += lora * m["bytes"] + 3 * masks * m["vocab"] * m["bytes"]
        if tp > 1:
            sent = 2 * rows * m["hidden"] * m["bytes"] / hw["link"]
            fixed += 2 * m["layers"] * (hw["allreduce_us"] * 1e-3 + sent * 1e3)
        rates = hw["bandwidth"] * hw["bandwidth_efficiency"] * tp, hw["flops"] * hw["flops_efficiency"] * tp
        assert (moved / rates[0] + done / rates[1]) * 1e3 + fixed == pytest.approx(c["expect"]["ms"], rel=1e-12)


def test_checks_cover_every_slider(tables):
    for key, values in {"n": 4, "groups": 3, "tp": 3, "rank": 3, "context": 4, "requests": 4, "model": 3}.items():
        assert len({json.dumps(c[key]) for c in tables["checks"]}) >= values, key


def test_measured_points_are_on_it(tables):
    """Every one of ours, and the authors', at names that the page's menus have."""
    assert {p["source"] for p in tables["points"]} >= {"overhead-cpu.json", "coverage-cpu.json"}
    assert len(tables["points"]) == len(measured.points()) >= 15
    for p in tables["points"]:
        assert p["model"] in tables["models"]
        assert p["hardware"] in tables["hardware"]


def test_page_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(
        r"https?://|<link|<img|@import|\bsrc=|\bfetch\(|XMLHttpRequest|url\((?!#)", text.replace("'", '"')
    )


def test_a_name_cannot_break_out_of_the_script(tables):
    assert "</script><b>" not in explorer.page({**tables, "version": "</script><b>"})


def test_the_command(tmp_path):
    file = tmp_path / "plan.html"
    done = CliRunner().invoke(app, ["plan", "qwen3-8b", "--acceptance", "0.9,0.8", "--html", str(file)])
    assert done.exit_code == 0, done.output
    assert '"rates": [0.9, 0.8]' in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--acceptance", "-1,2"], "--acceptance"),
        (["--hardware", "abacus"], "neither a file nor one of"),
        (["--results", "no-such-folder"], "does not exist"),
    ],
)
def test_bad_input_is_refused(arguments, says, tmp_path):
    file = tmp_path / "x.html"
    done = CliRunner().invoke(app, ["plan", "qwen3-8b", "--html", str(file), *arguments])
    assert done.exit_code == 2
    assert says in done.output
    assert not file.exists()


def test_a_place_that_cannot_be_written(tmp_path):
    done = CliRunner().invoke(app, ["plan", "qwen3-8b", "--html", str(tmp_path / "no" / "x.html")])
    assert done.exit_code == 2
    assert "No such file" in done.output


# -- in a browser


browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine (apt install chromium)")


def browse(file, steps):
    pytest.importorskip("aiohttp", reason="the browser is driven through aiohttp's web socket")

    async def run():
        async with chromium.opened(file) as opened:
            return await steps(opened)

    return asyncio.run(run())


@browser
def test_script_agrees_with_the_planner(page, tables):
    async def steps(opened):
        return float(await opened.value("document.documentElement.dataset.check")), await opened.value(
            "check.toString()"
        )

    worst, script = browse(page, steps)
    assert worst < 1e-9
    assert "DATA.checks" in script


@browser
def test_a_wrong_script_says_so(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    assert text.count("requests * (2 * n - 1 + groups") == 1
    wrong = tmp_path / "wrong.html"
    wrong.write_text(text.replace("requests * (2 * n - 1 + groups", "requests * (2 * n + groups"), encoding="utf-8")

    async def steps(opened):
        return await opened.value("document.getElementById('check').textContent")

    assert "disagrees with the Python planner" in browse(wrong, steps)


@browser
def test_keyboard_alone_moves_it(page):
    """Tab reaches every control in order, with a visible focus; arrows move sliders, and the answer follows."""

    async def steps(opened):
        seen, before = [], await opened.value("document.getElementById('answer').textContent")
        for _ in range(12):
            await opened.press("Tab")
            seen.append(await opened.value("document.activeElement.id"))
            if seen[-1] == "requests":
                outline = await opened.value("getComputedStyle(document.activeElement).outlineStyle")
                for _ in range(8):
                    await opened.press("ArrowRight")
        return seen, before, await opened.value("document.getElementById('answer').textContent"), outline

    seen, before, after, outline = browse(page, steps)
    order = ["theme", "model", "hardware", "tp", "rank", "alpha", "rates", "n", "groups", "requests", "context"]
    assert seen[: len(order)] == order
    assert outline == "solid"
    assert before.startswith("At 1 request at a time")
    assert after.startswith("At 10 requests at a time")


@browser
def test_the_answer_is_the_planners(page):
    async def steps(opened):
        answer = "document.getElementById('answer').textContent"
        before = await opened.value(answer)
        await opened.value("location.hash = '#n=4&groups=0&requests=1&rates=0.8&context=80&rank=0'")
        for _ in range(100):  # a busy machine takes its time to hear of it
            await asyncio.sleep(0.1)
            if (said := await opened.value(answer)) != before:
                break
        return said

    plan = planner.Plan(planner.shape("smollm2-135m"), planner.hardware("cpu-2-cores"), context=80)
    faster = [c for c in range(1, 513) if plan.point(c, 4, [0.8] * 3)["speedup"] >= 1]
    assert faster == list(range(1, len(faster) + 1))
    said = browse(page, steps)
    assert f"{plan.point(1, 4, [0.8] * 3)['speedup']:.2f} times as fast" in said
    assert f"faster up to {len(faster)} requests" in said


@browser
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_fits_the_window(page, width):
    """Nothing runs out sideways, every chart is drawn, and no text in one is below 11 pixels."""

    async def steps(opened):
        await opened.size(width, 900)
        await asyncio.sleep(0.3)
        wide = await opened.value("document.documentElement.scrollWidth")
        charts = "[...document.querySelectorAll('svg')]"
        paths = await opened.value(f"{charts}.map((s) => s.querySelectorAll('path').length)")
        ratio = f"{charts}.map((s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
        return wide, paths, await opened.value(ratio)

    wide, paths, scale = browse(page, steps)
    assert wide <= width
    assert len(paths) == 4
    assert min(paths) >= 2
    assert min(scale) * 12 >= 11
