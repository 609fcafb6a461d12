"""The report of a run: what the page says, and that it works in a real browser."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import count_a, lora_config, tiny_gpt2
from matplotlib.figure import Figure
from playwright.sync_api import Error, sync_playwright

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.reporting import report as report_page
from aldrift_hf.reporting.figures import Plot, plots, relative_weights
from aldrift_hf.reporting.record import RunRecord
from aldrift_hf.reporting.report import LADDER_FILE, REPORT_FILE, LiveReport, render, write_report

CHAT = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "A riddle,\nplease"}]
SETTINGS = {
    "base_model": "gpt2",
    "objective": ["cost"],
    "prompts": 1,
    "sampler": "metropolis_hastings",
    "tau_max": 3.0,
    "objective_weights": None,
    "num_chains": 128,
    "chain_length": 8,
    "versions": {"aldrift_hf": "0.1.0"},
}
EVIL = "<script>window.x = 1</script><img src=x onerror='window.x = 1'>"


def rung(index: int, tau: float, **changes: float) -> dict[str, float]:
    """A rung of a run that goes well."""
    return {
        "rung": index,
        "tau": tau,
        "objective_mean": 2.0 - 0.3 * tau,
        "objective_best": 0.0,
        "success": 0.2 * tau,
        "ess": 0.7,
        "khat": 0.2,
        "sample_objective_mean": 1.5 - 0.3 * tau,
        "acceptance_rate": 0.6,
        "log_z": -1.3 * tau,
        "missing_mass": 0.02,
        "distinct_proposals": 0.9,
        "distinct_samples": 0.95,
        "proposals": 1024 * (index + 1),
        "objective_calls": 900 * (index + 1),
        "sft_loss": 1.5,
        **changes,
    }


def draw(completion: str, cost: float, **changes) -> dict:
    log_prior, log_model = -10.0 - cost, -9.5 + 0.1 * cost
    weights = {"log_prior": log_prior, "log_model": log_model, "log_weight": log_prior - 3 * cost - log_model}
    return {"prompt": "", "completion": completion, "objective": cost, **weights, "tau": 3.0, **changes}


@pytest.fixture
def record() -> RunRecord:
    """A finished run; costs of its draws sort otherwise as text than as numbers."""
    costs = [10.0, 2.0, 0.5, 1.0, 9.0, 0.0] * 5
    metrics = {"objective": 0.6, "success": 0.48, "ess": 0.65, "distinct": 0.8, "missing_mass": -0.02}
    return RunRecord(
        settings=dict(SETTINGS),
        finished=True,
        metrics=metrics,
        rungs=[rung(i, 0.5 * (i + 1)) for i in range(6)],
        draws=[draw(f"text  {i}\n two", cost) for i, cost in enumerate(costs)],
    )


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """For pages of which only the text is looked at: figures take most of the time."""
    monkeypatch.setattr(Plot, "svg", lambda plot: "")


def names(record: RunRecord) -> list[str]:
    return [plot.name for plot in plots(record)]


# ---- What it says ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_report_and_touches_no_setting_of_matplotlib(config, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(report_page, "write_report", write_report)
    before = dict(matplotlib.rcParams)
    model = tiny_gpt2()
    args = config(output_dir=str(tmp_path), num_train_epochs=1)
    ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model)).train()
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert "After 1 rung, " in page
    assert page.count("<figure") == len(plots(RunRecord.read(tmp_path))) > 6
    assert (tmp_path / LADDER_FILE).read_bytes().startswith(b"\x89PNG")
    assert not [*tmp_path.rglob("*.tmp")]
    assert dict(matplotlib.rcParams) == before


def test_it_is_drawn_once_a_minute_and_at_the_end_and_never_ends_a_run(record, tmp_path, monkeypatch, caplog):
    calls: list[bool] = []
    monkeypatch.setattr(report_page, "write_report", lambda record, folder: calls.append(record.finished))
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    live, record.finished = LiveReport(), False
    for clock[0] in (10.0, 61.0, 100.0, 125.0):
        live.update(record, tmp_path)
    record.finished = True
    live.update(record, tmp_path)
    assert calls == [False, False, True]

    monkeypatch.setattr(report_page, "write_report", lambda record, folder: 1 / 0)
    live.update(record, tmp_path)
    assert "could not be written" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_warnings_come_first(record, no_figures):
    assert "No warnings. Looked at: missing mass" in render(record)
    record.metrics["missing_mass"] = 3.0
    page = render(record)
    assert "No warnings" not in page
    assert page.index("has lost 3.00 nats") < page.index("After 6 rungs") < page.index("<figure")


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_under_way(record, no_figures, count):
    record.finished, record.metrics, record.rungs = False, {}, record.rungs[:count]
    page = render(record)
    assert "Under way" in page
    assert ("The first rung is under way." if count == 0 else "So far, after 1 rung, ") in page
    assert names(record)[-1] == "weights"
    assert len(names(record)) == 1 + 9 * count


def test_what_a_run_does_not_have_is_left_out(record):
    for each in record.rungs:
        each["khat"] = each["acceptance_rate"] = math.nan
        each["archive_ess"] = 0.4
    for one in record.draws[:3]:
        one["log_weight"] = None
    page = render(record)
    assert {"khat", "acceptance"}.isdisjoint(names(record))
    assert "accepted by chains" not in page
    assert ">archive</text>" in page
    assert "nan" not in page.split("<svg")[0].lower()
    assert page.count(">–</td>") == 3


def test_a_ladder_that_stays_at_one_temperature_is_drawn_by_rungs(record):
    assert "tau" not in names(record)
    record.rungs += [rung(6, 3.0), rung(7, 3.0)]
    assert names(record)[0] == "tau"
    axes = Figure().add_subplot()
    plots(record)[0].draw(axes)
    assert axes.get_xlabel() == "rung"
    assert axes.lines[0].get_xydata().tolist() == [[rung["rung"], rung["tau"]] for rung in record.rungs]


def test_several_objectives_and_chat_prompts(record):
    record.settings["objective"] = ["length", "<lambda>"]
    for each in record.rungs:
        each |= {"objective/length": 1.0, "objective/<lambda>": 2.0}
    record.draws += [draw("text", 1.0, prompt=CHAT)]
    page = render(record)
    assert "objectives" in names(record)
    assert "<h1>ALDRIFT: length + &lt;lambda&gt;</h1>" in page
    assert "&lt;lambda&gt;</text>" in page
    assert '<b>user</b><div class="text">A riddle,\nplease</div>' in page
    assert '<b>system</b><div class="text">Be  brief.</div>' in page


def test_weights_are_multiples_of_their_prompts_mean(record):
    record.draws = [
        draw("a", 0.0, prompt=prompt, log_weight=offset + math.log(weight) if weight else None)
        for prompt, offset in (("one", 700.0), ("other", -900.0))
        for weight in [4.0, 0.0] + [1.0] * 8
    ] + [draw("a", 0.0, prompt="few draws")]
    expected = np.array([4.0, 0.0] + [1.0] * 8) / 1.2
    np.testing.assert_allclose(relative_weights(record), [*expected, *expected], rtol=1e-9)


def test_figures_in_one_page_share_neither_ids_nor_colours_of_their_own(record):
    page = render(record)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in asked} <= set(ids)
    drawn = "".join(re.findall("<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+|DejaVu|<style", drawn)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn))
    assert colours == {"none", "currentColor", *(f"var(--series-{i})" for i in (0, 1, 2, 7))}


# ---- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        installed = map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))
        found = next((path for path in (own if own.exists() else None, *installed) if path), None)
        if found is None:
            pytest.skip("no Chromium found: apt-get install chromium-headless-shell, or playwright install chromium")
        with playwright.chromium.launch(executable_path=found) as chromium:
            yield chromium


@pytest.fixture
def look(browser, record, tmp_path):
    """Opens the record's report, in which nothing may be fetched, said or thrown."""
    complaints: list[str] = []

    def open_page():
        (tmp_path / REPORT_FILE).write_text(render(record), encoding="utf-8")
        address = (tmp_path / REPORT_FILE).as_uri()
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != address else None)
        page.goto(address)
        return page

    yield open_page
    assert complaints == []


def test_a_completion_is_text_whatever_it_says(look, record, no_figures):
    record.draws[0]["completion"] = record.draws[1]["prompt"] = EVIL
    record.settings["base_model"] = record.settings["objective"][0] = EVIL
    page = look()
    assert page.locator("td.text").first.inner_text() == EVIL
    assert page.locator("h1").inner_text() == f"ALDRIFT: {EVIL}"
    assert page.evaluate("window.x") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched(browser, record, tmp_path, no_figures):
    (tmp_path / REPORT_FILE).write_text(render(record).replace("</main>", f"{EVIL}</main>"), encoding="utf-8")
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / REPORT_FILE).as_uri())
    assert page.evaluate("window.x") is None
    assert len([text for text in said if "Content Security Policy" in text]) >= 2
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate("fetch('data:,anything')")


def test_the_table_sorts_and_filters(look, record, no_figures):
    record.draws[3]["log_prior"] = None
    page = look()

    def column(number: int) -> list[str]:
        return page.locator(f"#draws tbody tr:visible td:nth-child({number})").all_inner_texts()

    cost, header = sorted(row["objective"] for row in record.draws), page.locator("#draws th", has_text="cost")
    assert column(1)[0] == "text  0\n two"
    header.locator("button").click()
    assert [float(text) for text in column(2)] == cost
    assert header.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [float(text) for text in column(2)] == cost[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    for _ in range(2):
        page.get_by_role("button", name="log prior").click()
        assert column(3)[-1] == "–"
    assert header.get_attribute("aria-sort") is None
    page.get_by_role("searchbox").fill("TEXT  2")
    assert len(column(1)) == 11
    assert page.locator("#shown").inner_text() == "11 of 30"


def test_it_fits_a_phone_and_a_desk(look, record):
    record.draws[0]["completion"] = "a" * 300 + " b" * 300
    record.settings["base_model"] = "/a/very/long/path" * 10
    record.draws[1]["prompt"] = CHAT
    page = look()
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        boxes = [figure.bounding_box() for figure in page.locator("figure svg").all()]
        assert len(boxes) == len(plots(record)) == 10
        assert all(box["width"] > 250 and box["height"] > 150 for box in boxes)
    curve = page.locator("#plot-cost path[style*='--series-0']").first
    assert curve.bounding_box()["width"] > 200
    assert curve.evaluate("path => getComputedStyle(path).stroke") == "rgb(0, 114, 178)"


def test_dark_mode(look):
    """The page and the text in its figures change their colours, and stay readable: contrast of 7 to 1 (WCAG AAA)."""
    page, seen = look(), []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        ink = page.locator("#plot-cost text").first.evaluate("text => getComputedStyle(text).fill")
        assert contrast(ground, ink) > 7
        seen += [ground, ink]
    assert len(set(seen)) == 4


def contrast(one: str, other: str) -> float:
    """Of two CSS colours, by WCAG 2."""

    def luminance(colour: str) -> float:
        channels = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
