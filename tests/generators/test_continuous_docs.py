"""The snippets of the pages on MAR and Hi-MAR run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", ["mar", "himar"])
def test_snippets_run(page: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 2
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, f"{page}.md", "exec"), names)
