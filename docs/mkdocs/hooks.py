"""The site from the repository's own files: pages where they stand, source code that they name, formulas as MathML.

A page's name in the site is its path in the repository, so that relative links between pages hold in both.
"""

from __future__ import annotations

import html
import re
from importlib import resources
from pathlib import Path

from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ".github/CONTRIBUTING.md"
BADGE = re.compile(r"^\[!\[.*\]\(\.\./\.\./actions/.*\n", re.MULTILINE)
"""A link that GitHub alone resolves."""
SOURCE = r"(?:accelerate_configs|aldrift_hf|recipes)/(?:\w+/)*\w+\.(?:py|yaml)"
NAMED = re.compile(rf"`({SOURCE})`")
LINK = re.compile(r"(?<=\]\()([\w./-]+\.(?:py|yaml))(?=\))")
FUNCTION = re.compile(r"(\[`[^\]]+`\])\((?:\.\./)*(aldrift_hf/[\w/]+)\.py#([\w.]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LATEX = LatexToMathML()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of the repository, and the source files that they name, as pages that neither menu nor search lists."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        page = File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path)
        page.dest_uri = file.dest_uri
        files.append(page)
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / CONTRIBUTING,
        *sorted((ROOT / "recipes").glob("*.md")),
    ):
        name, included = str(path.relative_to(ROOT)), InclusionLevel.INCLUDED  # in a hidden folder, too
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=included))
    files.src_uris[CONTRIBUTING].dest_uri = "contributing/index.html"  # hidden folders are not always published
    font = resources.files("ziamath.fonts") / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, "mkdocs/math.ttf", content=font.read_bytes()))
    named: set[str] = set()
    for page in files.documentation_pages():
        text = page.content_string
        linked = ((ROOT / page.src_uri).parent.joinpath(target).resolve() for target in LINK.findall(text))
        named |= {*NAMED.findall(text), *(str(path.relative_to(ROOT)) for path in linked)}
    for name in sorted(named):
        files.append(
            File.generated(config, f"{name}.md", content=_source_page(name), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to a function lead to its place in the API, those to a file to its page."""

    def to_api(match: re.Match[str]) -> str:
        return f"{match[1]}[{match[2].replace('/', '.')}.{match[3]}]"

    return LINK.sub(r"\1.md", FUNCTION.sub(to_api, BADGE.sub("", markdown)))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML, which browsers draw without a script; files that are named become links."""

    def formula(match: re.Match[str]) -> str:
        drawn = LATEX.convert_with_local_state(html.unescape(match[2]), displaystyle=match[1] == "div")
        return f'<div class="formula">{drawn}</div>' if match[1] == "div" else drawn

    def link(match: re.Match[str]) -> str:
        target = files.get_file_from_path(match[2]) or files.get_file_from_path(f"{match[2]}.md")
        if target is None or target is page.file:
            return match[1]
        return f'<a href="{get_relative_url(target.url, page.url)}">{match[1]}</a>'

    content = FORMULA.sub(formula, content)
    return re.sub(rf"(<code>({SOURCE}|(?:recipes|\.github)/\w+\.md)</code>)(?!</a>)", link, content)


def _source_page(name: str) -> str:
    code = (ROOT / name).read_text(encoding="utf-8")
    language = "python" if name.endswith(".py") else "yaml"
    settings = f"---\nsearch: {{exclude: true}}\nhide: [toc]\ntitle: {name}\n---\n"
    return f"{settings}\n# `{name}`\n\n~~~~{language}\n{code}~~~~\n"
