"""The house rules on imports: who may import whom, and what `import vistok` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vistok

PACKAGE = Path(vistok.__file__).parent
# Each room may import the rooms of the levels before its own; rooms of one level are siblings.
LEVELS = [
    {"kernels", "tokens"},
    {"nn"},
    {"data"},
    {"tokenizers", "generators", "controllers", "pruners"},
    {"hub"},
    {"metrics"},
    {"training"},
    {"reproduce"},
    {"cli", "app"},
]
ROOTS = {"errors", "files", "registry", "attach", "lazy"}
# The package itself and its entry point are the lobby: they hand out every room.
LOBBY = {"__init__", "__main__"}
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, through absolute or relative imports, at any depth of the code."""
    package = ("vistok", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "vistok" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("vistok.")}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_lies_below_them(path: Path) -> None:
    room = room_of(path)
    if room in LOBBY:
        return
    for other in imported_rooms(path) - {room}:
        if other in ROOTS or other == "__version__":
            continue
        assert room not in ROOTS, f"the root module {room} imports the room {other}"
        assert other in LEVEL, f"{path.name} imports vistok.{other}, which is no known room"
        assert LEVEL[other] < LEVEL[room], f"{room} imports {other}, which is not below it"


def test_the_rule_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vistok" / "nn"
    folder.mkdir(parents=True)
    lines = ["import vistok.hub", "from vistok import metrics", "from ..cli import app"]
    lines += ["def f():", "    from vistok.training.ema import EMA"]
    (folder / "bad.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "vistok")
    assert imported_rooms(folder / "bad.py") == {"hub", "metrics", "cli", "training"}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "diffusers", "numpy", "PIL", "rich", "typer"}
    assert not loaded_after("import vistok") & heavy


def test_every_export_resolves() -> None:
    for name in vistok.__all__:
        assert getattr(vistok, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vistok.nonsense  # noqa: B018
