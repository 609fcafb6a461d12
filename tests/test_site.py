"""The documentation site: built with warnings as errors, and walked in a browser."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

import aldrift_hf

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


class Parsed(HTMLParser):
    """What a page is known by, what it loads, and where it leads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids |= {named.get("id") or ""}
        self.loads += [url for url in (named.get("src"), tag == "link" and named.get("href")) if url]
        self.links += [url for url in (tag == "a" and named.get("href"),) if url]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    home = "http://site/"
    pages = {home + str(path.relative_to(site)): Parsed(path.read_text()) for path in site.rglob("*.html")}
    for url, page in pages.items():
        if url.endswith("/404.html"):  # its links begin at the root of a host
            continue
        for link in (*page.links, *page.loads):
            target, anchor = urldefrag(urljoin(url, link))
            if not target.startswith(home):
                assert urlsplit(target).scheme == "https", f"{url}: {link}"
                assert link not in page.loads, f"{url} loads {link}"
                continue
            target += "index.html" * target.endswith("/")
            assert (site / target.removeprefix(home)).is_file(), f"{url}: {link}"
            assert not anchor or unquote(anchor) in pages[target].ids, f"{url}: {link}"
    known = set().union(*(page.ids for page in pages.values()))
    assert {f"aldrift_hf.{name}" for name in aldrift_hf.__all__} <= known, "public names that the reference leaves out"


def test_it_works_in_a_browser(address, browser):
    with browser.new_context(permissions=["clipboard-read", "clipboard-write"]) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if address not in request.url else None)
        page.on("response", lambda response: complaints.append(response.url) if response.status >= 400 else None)

        def visit(path: str, width: int) -> None:
            page.set_viewport_size({"width": width, "height": 800})
            page.goto(address + path)
            scrolls = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert scrolls <= 0, f"{path} scrolls sideways at a width of {width}"

        visit("", 360)
        menu = [link.get_attribute("href") for link in page.locator(".md-nav--primary a.md-nav__link").all()]
        listed = {link for link in menu if not link.startswith((".", "#"))}
        assert {"concepts/", "recipes/", "recipes/which_sampler/", "api/trainer/", "faq/"} <= listed
        for path in sorted(listed):
            visit(path, 360)

        visit("recipes/", 1280)
        visit("concepts/", 1280)
        page.wait_for_load_state("networkidle")
        assert page.locator("math").count() > 100
        assert page.evaluate("document.fonts.check('12px \"Site Math\"')"), "the font for formulas is not there"
        assert page.locator(".arithmatex").count() == 0

        visit("", 1280)
        block = page.locator(".highlight").first
        block.hover()
        block.locator("button").click()
        copied = page.evaluate("navigator.clipboard.readText()").strip()
        assert copied == block.locator("code").inner_text().strip() != ""

        def ground() -> str:
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        light = ground()
        page.locator("label[for=__palette_1]").click()
        dark = ground()
        assert dark != light
        page.reload()
        assert ground() == dark

        page.locator(".md-search__input").fill("missing mass")
        page.locator(".md-search-result__link[href*='#missing-mass']").click()
        page.wait_for_url("**/concepts/*#missing-mass")
        page.locator("mark", has_text="missing").first.wait_for(timeout=5000)
        assert complaints == []
