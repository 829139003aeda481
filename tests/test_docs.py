"""The documents say what is so: their examples run, their links and their picture name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the documents are not beside the tests")


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block of a language."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"(?ms)^```{language}\n(.*?)^```$", text)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def examples() -> list[object]:
    return [
        pytest.param(path, line, code, id=f"{path.relative_to(ROOT)}:{line}")
        for path in DOCUMENTS
        for line, code in blocks(path, "python")
    ]


def test_readme_has_an_example() -> None:
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize(("path", "line", "code"), examples())
def test_example_runs(path: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), {"__name__": "__main__"})


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ +(.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_exist(path: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{path.name} links to {target}: no such heading"


def picture() -> set[Path]:
    """Paths that the picture in CONTRIBUTING names: folders end in a slash, names stand before two blanks or more."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = text[text.index("## The house") :].split("```")[1]
    folders: list[str] = []
    named = set()
    for line in drawn.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        folders = folders[:depth]
        named |= {Path(*folders, name) for name in names}
        if names[0].endswith("/"):
            folders.append(names[0])
    return named


def test_picture_names_what_exists() -> None:
    named = picture()
    assert len(named) > 20
    assert not sorted(str(path) for path in named if not (ROOT / path).exists())


def test_picture_has_every_module() -> None:
    package = ROOT / "grank_kernels"
    modules = [path for path in package.iterdir() if path.suffix in (".py", ".pyi") or (path / "__init__.py").exists()]
    sources = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    missing = {path.relative_to(ROOT) for path in [*modules, *sources]} - picture()
    assert not sorted(map(str, missing))
