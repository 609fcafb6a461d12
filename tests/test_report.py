"""The report of a run: what the page says, and that it works in a real browser."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from conftest import count_a, lora_config, tiny_gpt2
from matplotlib.figure import Figure
from playwright.sync_api import Error
from transformers import TrainerControl, TrainerState, TrainingArguments

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.reporting import report as report_page
from aldrift_hf.reporting.draw_figures import plots_of_draws, relative_weights
from aldrift_hf.reporting.figure_style import BLUE, GREEN, ORANGE, PALETTE, Plot, styled
from aldrift_hf.reporting.figures import plots_along_ladder
from aldrift_hf.reporting.record import MAX_PROMPTS, RunRecord
from aldrift_hf.reporting.report import LADDER_FILE, REPORT_FILE, render
from aldrift_hf.reporting.writers import ReportWriter

CHAT = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "A riddle,\nplease"}]
SETTINGS = {
    "base_model": "gpt2",
    "objective": ["cost"],
    "prompts": 1,
    "sampler": "metropolis_hastings",
    "corrects": True,
    "success_threshold": 0.0,
    "tau_max": 3.0,
    "objective_range": None,
    "objective_weights": None,
    "num_generations": 1024,
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
        "draws": 64,
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
        "loss": 1.5,
        "kl_to_prior": 0.1 * tau,
        "target_objective_mean": 1.4 - 0.3 * tau,
        "target_kl_to_prior": 0.12 * tau,
        "diversity": 0.8,
        "kl_to_target": 0.05,
        "entropy": 1.2 - 0.1 * tau,
        "completions/mean_length": 9.0 - tau,
        **changes,
    }


def draw(completion: str, cost: float, **changes) -> dict:
    log_prior, log_model = -10.0 - cost, -9.5 + 0.1 * cost
    weights = {"log_prior": log_prior, "log_model": log_model, "log_weight": log_prior - 3 * cost - log_model}
    weights["weight"] = math.exp(0.1 - cost)
    return {"prompt": "", "completion": completion, "objective": cost, **weights, "tau": 3.0, **changes}


def of_prompt(prompt, kl: float) -> dict:
    shares = {"success": 0.5, "ess": 0.25, "distinct": 1.0}
    return {"prompt": prompt, "objective": 2.0 - kl, **shares, "log_z": -1.0, "kl": kl, "missing_mass": 0.1}


@pytest.fixture
def record() -> RunRecord:
    """A finished run; costs of its draws sort otherwise as text than as numbers."""
    costs = [10.0, 2.0, 0.5, 1.0, 9.0, 0.0] * 5
    metrics = {"draws": 64, "objective": 0.6, "success": 0.48, "ess": 0.65, "distinct": 0.8, "missing_mass": -0.02}
    return RunRecord(
        settings=dict(SETTINGS),
        objective_range=10.0,
        tau_max=3.0,
        finished=True,
        metrics=metrics,
        rungs=[rung(i, 0.5 * (i + 1)) for i in range(6)],
        draws=[draw(f"text  {i}\n two", cost) for i, cost in enumerate(costs)],
        prior_costs=[3.0, 2.0, 10.0, 4.0],
        prompt_metrics=[of_prompt("worst", 1.5), of_prompt("better", 0.5)],
    )


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """For pages of which only the text is looked at: figures take most of the time."""
    monkeypatch.setattr(Plot, "svg", lambda plot: "")


def plots(record: RunRecord) -> list[Plot]:
    return [*plots_of_draws(record), *plots_along_ladder(record)]


def names(record: RunRecord) -> list[str]:
    return [plot.name for plot in plots(record)]


# ---- What it says ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_a_report_and_touches_no_setting_of_matplotlib(config, tokenizer, tmp_path):
    before = dict(matplotlib.rcParams)
    model = tiny_gpt2()
    args = config(output_dir=str(tmp_path), num_rungs=1)
    ALDRIFTTrainer(model, count_a, args, processing_class=tokenizer, peft_config=lora_config(model)).train()
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert "After 1 rung, " in page
    assert page.count("<figure") == len(plots(RunRecord.read(tmp_path))) > 6
    assert (tmp_path / LADDER_FILE).read_bytes().startswith(b"\x89PNG")
    assert not [*tmp_path.rglob("*.tmp")]
    assert dict(matplotlib.rcParams) == before


def test_it_is_drawn_once_a_minute_and_at_the_end_and_never_ends_a_run(record, tmp_path, monkeypatch, caplog):
    calls: list[bool] = []
    monkeypatch.setattr(report_page, "write_report", lambda record, *args: calls.append(record.finished))
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    writer, record.finished = ReportWriter(), False
    event = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), TrainerControl()
    for clock[0] in (10.0, 61.0, 100.0, 125.0):
        writer.on_rung_learned(*event, record=record)
    record.finished = True
    writer.on_run_end(*event, record=record)
    assert calls == [False, False, True]

    monkeypatch.setattr(report_page, "write_report", lambda *args: 1 / 0)
    writer.on_run_end(*event, record=record)
    assert "could not be written" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_warnings_come_first(record, no_figures):
    assert "No warnings. Checked: missing mass" in render(record)
    record.metrics["missing_mass"] = 3.0
    page = render(record)
    assert "No warnings" not in page
    assert page.index("has lost 3.00 nats") < page.index("After 6 rungs") < page.index("<figure")


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_under_way(record, no_figures, count):
    record.finished, record.metrics, record.rungs = False, {}, record.rungs[:count]
    page = render(record)
    assert "Running" in page
    assert ("The first rung is still running." if count == 0 else "So far, after 1 rung, ") in page
    assert [plot.name for plot in plots_of_draws(record)] == ["costs", *["frontier"] * count, "weights"]
    assert len(plots_along_ladder(record)) == 13 * count


@pytest.mark.slow
def test_what_a_run_does_not_have_is_left_out(record):
    for each in record.rungs:
        each["khat"] = each["acceptance_rate"] = math.nan
        each["archive_ess"] = 0.4
        each["completions/mean_length"] = 9.0
    for one in record.draws[:3]:
        one["log_weight"], one["weight"] = None, 0.0
    page = render(record)
    assert {"khat", "acceptance", "length"}.isdisjoint(names(record))  # a length that is always the same says nothing
    assert "acceptance rate" not in page
    assert any(">archive</text>" in svg for svg in images(page).values())
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page).split("<script")[0].lower()
    assert page.count(">–</td>") == 3


def test_a_ladder_that_stays_at_one_temperature_is_drawn_by_rungs(record):
    assert "tau" not in names(record)
    record.rungs += [rung(6, 3.0), rung(7, 3.0)]
    axes = Figure().add_subplot()
    first = plots_along_ladder(record)[0]
    assert first.name == "tau"
    first.draw(axes)
    assert axes.get_xlabel() == "rung"
    assert axes.lines[0].get_xydata().tolist() == [[rung["rung"], rung["tau"]] for rung in record.rungs]


def test_long_numbers_fit_the_fixed_margins(record):
    for number, rung in enumerate(record.rungs):
        rung["loss"], rung["log_z"] = -0.00025 + 0.0001 * number, -1000.0 * number
        rung["completions/mean_length"] = 14.97 + 0.01 * number
    with styled():
        for plot in plots(record):
            figure = plot.figure()
            around = figure.get_tightbbox()  # in inches
            width, height = figure.get_size_inches()
            assert 0 <= around.x0 < around.x1 <= width, plot.name
            assert 0 <= around.y0 < around.y1 <= height, plot.name


@pytest.mark.slow
def test_several_objectives_and_chat_prompts(record):
    record.settings["objective"] = ["length", "<lambda>"]
    for each in record.rungs:
        each |= {"objective/length": 1.0, "objective/<lambda>": 2.0}
    record.draws += [draw("text", 1.0, prompt=CHAT)]
    page = render(record)
    assert "objectives" in names(record)
    assert "<h1>ALDRIFT: length + &lt;lambda&gt;</h1>" in page
    assert "&lt;lambda&gt;</text>" in images(page)["Cost by objective"]
    assert '<b>user</b><div class="text">A riddle,\nplease</div>' in page
    assert '<b>system</b><div class="text">Be  brief.</div>' in page


def test_weights_of_too_few_draws_per_prompt_are_not_shown(record):
    record.draws[0]["weight"] = None  # null: no draw of its prompt has any
    assert relative_weights(record).tolist() == [0.0, *(draw["weight"] for draw in record.draws[1:])]
    record.settings["num_generations"] = 9
    assert "weights" not in names(record)


def test_costs_of_prior_model_and_target(record):
    """Bars around the costs where these are evenly spaced; 25 of them otherwise. Each histogram adds up to 1."""
    record.prior_costs = [0.0, 1.0, 1.0, 3.0]
    record.draws = [draw("a", 0.0, weight=1.5), draw("b", 2.0, weight=0.5)]
    assert histograms(record) == [[0.25, 0.5, 0, 0.25], [0.5, 0, 0.5, 0], [0.75, 0, 0.25, 0]]
    record.draws[0]["objective"] = 0.1
    assert [len(shares) for shares in histograms(record)] == [25] * 3
    assert [sum(shares) for shares in histograms(record)] == pytest.approx([1.0] * 3)
    for each in record.draws:
        each["weight"] = None
    assert len(histograms(record)) == 2, "where the draws have no weights, nothing is known of the target"


def histograms(record: RunRecord) -> list[list[float]]:
    axes, drawn = Figure().add_subplot(), []
    hist = axes.hist
    axes.hist = lambda *args, **kwargs: drawn.append(hist(*args, **kwargs)[0].tolist())
    (plot,) = (plot for plot in plots_of_draws(record) if plot.name == "costs")
    plot.draw(axes)
    return drawn


def test_cost_against_kl(record):
    record.rungs += [rung(6, 3.0, target_kl_to_prior=9.0, target_objective_mean=-1.0)]  # τ = 3 again: the newest counts
    record.metrics["kl_to_prior"] = 0.4
    axes = Figure().add_subplot()
    (plot,) = (plot for plot in plots_of_draws(record) if plot.name == "frontier")
    plot.draw(axes)
    target, model, newest = (line.get_xydata() for line in axes.lines)
    assert target[[0, 1, -1]].tolist() == pytest.approx(np.array([[0.0, 1.85], [0.06, 1.25], [9.0, -1.0]]))
    assert len(target) == 7
    assert model[-1].tolist() == newest[0].tolist() == [0.4, 0.6]
    assert len(model) == 8


def test_messages_of_all_kinds_are_shown(record, no_figures):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "你好"}}}
    parts = [{"type": "text", "text": "What of"}, {"type": "text", "text": "the weather?"}]
    for each in record.draws:
        each["prompt"] = [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}]
    page = render(record)
    assert "What of\nthe weather?" in page
    assert "你好" in page


def test_messages_that_all_prompts_share_are_shown_once(record, no_figures):
    for number, each in enumerate(record.draws):
        each["prompt"] = [CHAT[0], {"role": "user", "content": f"Riddle {number % 5}"}]
    page = render(record)
    examples = page[page.index('id="examples"') : page.index('id="plots-draws"')]
    assert examples.count("Be  brief.") == 1
    asked = re.findall(r"Riddle (\d)", examples)
    assert len(asked) == 9
    assert all(len({*asked[group : group + 3]}) == 3 for group in (0, 3, 6)), "a group shows different prompts"


def test_a_table_of_prompts(record, no_figures):
    page = render(record)
    table = page[page.index('id="by-prompt"') : page.index('id="newest"')]
    assert table.index("worst") < table.index("better")
    assert [float(value) for value in re.findall(r'data-value="([^"]+)"', table)[:6]] == [1.5, 0.5, 0.5, 0.25, 0.1, 1.0]
    record.prompt_metrics = [of_prompt("one of many", 1.0)] * MAX_PROMPTS
    assert "The 200 prompts farthest from their target" in render(record)
    record.prompt_metrics = [of_prompt("alone", 1.0)]
    assert "by-prompt" not in render(record)


def test_a_picture_of_completions(record, no_figures):
    seen = []

    def picture(completions, weights):
        seen.append((completions, weights))
        return f"<svg><text>{len(completions)}</text></svg>"

    page = render(record, picture)
    assert page.count("<svg><text>1</text></svg>") == 9
    assert page.count("<svg><text>30</text></svg>") == 2
    texts = [draw["completion"] for draw in record.draws]
    (of_model, evenly), (of_target, weights) = (each for each in seen if len(each[0]) > 1)
    assert of_model == of_target == texts
    assert evenly == pytest.approx([1 / 30] * 30)
    assert sum(weights) == pytest.approx(1)
    assert weights[5] / weights[3] == pytest.approx(math.e)


def test_a_notebook_shows_it_in_a_frame(record, no_figures):
    report = report_page.Report(record)
    assert repr(report).startswith("Report: After 6 rungs, ")
    (frame,) = Frames(report._repr_html_()).frames
    assert frame["srcdoc"].startswith("<!doctype html>")
    assert frame["sandbox"] == "allow-scripts"


class Frames(HTMLParser):
    """The attributes of all frames of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.frames: list[dict[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "iframe":
            self.frames.append(dict(attrs))


def test_a_range_that_was_measured_is_shown(record, no_figures):
    assert "<dd>not set; measured: 10</dd>" in render(record)
    record.settings["objective_range"] = 12.0
    assert "<dd>12</dd>" in render(record)
    assert "measured" not in render(record)


def test_a_resumed_run_without_draws_has_a_page(record, no_figures):
    record.draws = record.prompt_metrics = []
    page = render(record)
    assert "After 6 rungs" in page
    assert "<table" not in page
    assert "<script" not in page


class Images(HTMLParser):
    """The attributes of all images of a page, and all ids in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        self.ids += [value for name, value in attrs if name == "id"]


def images(page: str) -> dict[str, str]:
    """The SVG documents in a page, by what their alternative texts begin with."""
    header = "data:image/svg+xml;base64,"
    found = Images(page).images
    assert all(image["src"].startswith(header) for image in found)
    return {
        re.split(r"\.? ?[(.]", image["alt"])[0]: base64.b64decode(image["src"].removeprefix(header)).decode()
        for image in found
    }


@pytest.mark.slow
def test_a_plot_is_an_image_that_needs_nothing_from_the_page_and_no_network(record):
    page = render(record)
    ids, drawn = Images(page).ids, images(page)
    assert len(ids) == len(set(ids))
    assert len(drawn) == len(plots(record)) == page.count("<figure")
    for svg in drawn.values():
        elements = [*ElementTree.fromstring(svg).iter()]
        own = {element.get("id") for element in elements}
        links = [value for element in elements for name, value in element.attrib.items() if name.endswith("href")]
        asked = {link.removeprefix("#") for link in links} | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert asked
        assert asked <= own
        tags = {element.tag.rsplit("}")[-1] for element in elements}
        assert tags.isdisjoint({"script", "foreignObject", "image"})
        assert "text" in tags
        colours = {colour.upper() for colour in re.findall(r"(?:fill|stroke): (#\w+)", svg)}
        assert colours <= set(PALETTE)
        assert colours & {BLUE, ORANGE, GREEN}


@pytest.mark.slow
def test_a_plot_is_told_in_words_too(record):
    (cost,) = (image["alt"] for image in Images(render(record)).images if image["alt"].startswith("Cost."))
    assert cost == (
        "Cost. proposals, mean: 1.85 on rung 0, 1.1 on rung 5; samples, mean: 1.35 on rung 0, 0.6 on rung 5; "
        "best: 0 on rung 0, 0 on rung 5."
    )
    (weights,) = (image["alt"] for image in Images(render(record)).images if image["alt"].startswith("Weights"))
    assert re.search(r"\d+% of the draws have a weight between 1/2 and 2; the largest weight is \d", weights)


# ---- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def look(browser, record, tmp_path):
    """Opens the record's report, in which nothing may be fetched, said or thrown."""
    complaints: list[str] = []

    def open_page():
        (tmp_path / REPORT_FILE).write_text(render(record), encoding="utf-8")
        address = (tmp_path / REPORT_FILE).as_uri()
        page = browser.new_page(device_scale_factor=3)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != address else None)
        page.goto(address)
        return page

    yield open_page
    assert complaints == []


def test_a_completion_is_text_whatever_it_says(look, record, no_figures):
    record.draws[0]["completion"] = record.draws[1]["prompt"] = record.prompt_metrics[0]["prompt"] = EVIL
    record.draws[5] |= {"completion": EVIL, "log_prior": 0.0, "prompt": [{"role": EVIL, "content": EVIL}]}
    record.settings["base_model"] = record.settings["objective"][0] = EVIL
    page = look()
    assert page.locator("#draws td.text").first.inner_text() == EVIL
    assert page.locator("article").first.locator(".text").all_inner_texts() == [EVIL] * 2
    assert page.locator("article b").first.inner_text() == EVIL
    assert page.locator("h1").inner_text() == f"ALDRIFT: {EVIL}"
    assert page.evaluate("window.x") is None
    assert page.locator("img").count() == page.locator("figure > img").count() == len(plots(record))
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


@pytest.mark.slow
def test_it_fits_a_phone_and_a_desk(look, record):
    record.draws[0]["completion"] = "a" * 300 + " b" * 300
    record.settings["base_model"] = "/a/very/long/path" * 10
    record.draws[1]["prompt"] = CHAT
    page = look()
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        drawn = page.locator("figure img").all()
        boxes = [image.bounding_box() for image in drawn]
        assert len(boxes) == len(plots(record)) == 16
        assert all(box["width"] > 250 and box["height"] > 150 for box in boxes)
        assert all(image.evaluate("image => image.complete && image.naturalWidth") == 346 for image in drawn)
        assert all(abs(box["width"] / box["height"] - 3.6 / 2.4) < 0.01 for box in boxes)
    ground, _, series = colours(page)
    assert ground == (255, 255, 255)
    assert {"#{:02X}{:02X}{:02X}".format(*colour) for colour in series} == {BLUE, ORANGE, GREEN}


@pytest.mark.slow
def test_dark_mode(look):
    """The page and its plots change their colours, and stay readable: WCAG asks for a contrast of 7 for text (AAA), and
    of 3 for curves."""
    page, seen = look(), []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        text = page.locator("body").evaluate(
            "body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]"
        )
        assert contrast(*map(channels, text)) > 7
        ground, ink, series = colours(page)
        assert ground == channels(page.locator("figure").first.evaluate("x => getComputedStyle(x).backgroundColor"))
        assert contrast(ground, ink) > 7
        assert all(contrast(ground, colour) > 3 for colour in series)
        seen.append([ground, ink, *series])
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def colours(page) -> tuple[tuple, tuple, list[tuple]]:
    """Of the plot of costs as it is shown: the ground, the text's colour, and those of the three curves."""
    page.set_viewport_size({"width": 1280, "height": 800})
    shot = matplotlib.image.imread(io.BytesIO(page.locator("#plot-cost img").screenshot()), format="png")
    pixels = Counter(map(tuple, (255 * shot[..., :3]).round().astype(int).reshape(-1, 3).tolist()))
    ((ground, _),) = pixels.most_common(1)
    ink = max(pixels, key=lambda pixel: contrast(ground, pixel))
    series: list[tuple] = []
    for pixel, _ in pixels.most_common():  # those at the edge of a curve, mixed with the ground, are fewer
        if max(pixel) - min(pixel) > 80 and all(math.dist(pixel, other) > 60 for other in series):
            series.append(pixel)
    return ground, ink, series[:3]


def channels(colour: str) -> tuple[int, ...]:
    return tuple(int(value) for value in re.findall(r"\d+", colour)[:3])


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(colour: tuple[int, ...]) -> float:
        shares = np.array(colour) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
