"""Docstrings in the style of Hugging Face's libraries, as mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, GriffeLoader, Module, NameResolutionError, Object

REFERENCE = re.compile(r"\[`([\w.]+)`\](?![(\[])")
PARAMETER = re.compile(r"^( +[\w, ]+) \((\[?`.*?)\):", re.MULTILINE)
ERRORS = re.compile(r"^ +[A-Z]\w+Error(?:, [A-Z]\w+Error)+:", re.MULTILINE)
HEADING = re.compile(r"^ +\*\*(Parameters.*)\*\*\n+", re.MULTILINE)


class HuggingFaceStyle(Extension):
    """References become links where they lead to something here; types of parameters are plain; groups are sections."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        """Once all modules are loaded: names are looked up in them."""
        self._visit(pkg)

    def _visit(self, thing: Object) -> None:
        if thing.docstring:
            thing.docstring.value = self._rewritten(thing.docstring.value, thing)
        for member in thing.members.values():
            if not member.is_alias:
                self._visit(member)

    def _rewritten(self, text: str, scope: Object) -> str:
        if HEADING.search(text):
            text = HEADING.sub(r"Parameters: \1\n", text.replace("Parameters:\n", ""))
        text = PARAMETER.sub(self._plain_type, text)
        text = ERRORS.sub(lambda match: match[0].replace(", ", " | "), text)
        return REFERENCE.sub(lambda match: self._reference(match[1], scope), text)

    @staticmethod
    def _plain_type(match: re.Match[str]) -> str:
        types = re.findall("`([^`]+)`", match[2].partition(", *optional*")[0])
        return f"{match[1]} ({' | '.join(types)}):"

    @staticmethod
    def _reference(name: str, scope: Object) -> str:
        try:
            path = scope.resolve(name)
            scope.package[path.removeprefix(f"{scope.package.path}.")]
        except (KeyError, NameResolutionError):
            return f"`{name}`"
        return f"[`{name}`][{path}]"
