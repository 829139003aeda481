"""Documentation: examples run; links, names and commands exist; figures match the recorded runs."""

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest
import torch

import grank_kernels
from benchmarks.report import SECTIONS, in_the_middle, ratios, summary_table, write_section
from benchmarks.results import TABLES, Row, collect, known
from benchmarks.runs import read
from grank_kernels import adapters
from grank_kernels.recommender import models
from grank_kernels.recommender.models import neighbours
from grank_kernels.recommender.serving import Retriever

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the documents are not beside the tests")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=DOCUMENTS, ids=name_of)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block of a language."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"(?ms)^```{language}\n(.*?)^```$", text)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def prose(path: Path) -> str:
    """A document without fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"))


# ---- examples ----


def examples() -> list[object]:
    return [
        pytest.param(path, line, code, id=f"{name_of(path)}:{line}")
        for path in DOCUMENTS
        for line, code in blocks(path, "python")
    ]


def test_readme_has_a_short_example() -> None:
    (_, code), *others = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line]) <= 6
    assert not others


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("path", "line", "code"), examples())
def test_example_runs(path: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), {"__name__": "__main__"})


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# ---- links ----


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"(?m)^#+ +(.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_local_links_exist(document: Path) -> None:
    text = prose(document)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = document.parent / file if file else document
        assert linked.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{document.name} links to {target}: no such heading"


# ---- names ----

PUBLIC = {name: getattr(grank_kernels, name) for name in grank_kernels.__all__}
PUBLIC |= {"Retriever": Retriever, "models": models, "neighbours": neighbours, "adapters": adapters, "torch": torch}
PUBLIC |= {"IndexFlatIP": adapters.IndexFlatIP, "grank_kernels": grank_kernels}


def problem_with(span: str) -> str | None:
    """The missing name in a code span such as `ItemTable.rows(ids)`; None if all exist or none is public."""
    try:
        tree = ast.parse(span, mode="eval").body
    except SyntaxError:
        return None
    arguments = [*tree.args, *tree.keywords] if isinstance(tree, ast.Call) else []
    names = ast.unparse(tree.func if isinstance(tree, ast.Call) else tree).split(".")
    if names[0] not in PUBLIC or not all(map(str.isidentifier, names)):
        return None
    found = PUBLIC[names[0]]
    for name in names[1:]:
        if isinstance(found, ModuleType) and not hasattr(found, name):
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except ModuleNotFoundError:
                return f"{span}: no {name}"
        if not hasattr(found, name):
            return f"{span}: no {name}"
        found = getattr(found, name)
    if arguments and not names[0].startswith("torch"):
        known = set(inspect.signature(found).parameters)
        given = {each.arg if isinstance(each, ast.keyword) else getattr(each, "id", None) for each in arguments}
        missing = {name for name in given if name and name.isidentifier()} - known
        if missing and not all(isinstance(each, ast.keyword) for each in arguments):
            return f"{span}: no parameter {', '.join(sorted(missing))}"
    return None


def test_a_missing_name_is_noticed() -> None:
    assert problem_with("ItemTable.find(ids)") == "ItemTable.find(ids): no find"
    assert problem_with("mips_topk(queries, rows, k)") == "mips_topk(queries, rows, k): no parameter rows"
    assert problem_with("models.Nothing") == "models.Nothing: no Nothing"
    assert problem_with("ItemTable.rows(ids)") is None


def test_names_in_code_spans_exist(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("the changelog names removed functions too")
    spans = re.findall(r"`([^`\n]+)`", prose(document))
    assert not [problem for span in spans if (problem := problem_with(span))]


def test_api_names_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert not [name for name in grank_kernels.__all__ if name not in text]


def test_api_arguments_are_those_of_the_function() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    table = text[text.index("## Arguments of `mips_topk`") :].split("\n\n")[1]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == list(inspect.signature(grank_kernels.mips_topk).parameters)


def test_api_lists_existing_modules() -> None:
    for name in re.findall(r"(?m)^::: (\S+)$", (ROOT / "docs" / "api.md").read_text()):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


# ---- commands ----


def commands() -> list[object]:
    """Every command of a `sh` block, with joined continuation lines and without comments."""
    found = []
    for path in DOCUMENTS:
        for line, block in blocks(path, "sh"):
            for text in block.replace("\\\n", " ").splitlines():
                words = shlex.split(text, comments=True)
                for i, word in enumerate(words):
                    if word in ("make", "grank") or word.startswith("grank_kernels.") or word.startswith("benchmarks."):
                        found.append(pytest.param(words[i:], id=f"{name_of(path)}:{line} {' '.join(words[i : i + 2])}"))
                        break
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
        assert {word for word in rest[:1] if "=" not in word} <= targets
    elif program.startswith("benchmarks."):
        source = (ROOT / f"{program.replace('.', '/')}.py").read_text()
        options = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert {option for option in options if f'"{option}"' not in source} == set()
    else:
        click_command = grank()
        names = {option for parameter in click_command.commands[rest[0]].params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest[1:] if re.match(r"--[a-z]", word)} <= names


def grank():  # type: ignore[no-untyped-def] # typer's classes are untyped
    typer = pytest.importorskip("typer")
    from grank_kernels.recommender.cli.commands import app

    return typer.main.get_command(app)


# ---- figures ----

RUN = read(ROOT / "docs" / "benchmarks.json")
RESULTS = known(ROOT / "docs" / "results.json", ROOT / "no runs")


def ratio(case: str, rows: str) -> str:
    (value,) = (r.value for r in ratios(RUN) if f"{r.ours['op']} {r.ours['case']}" == case and r.rows == rows)
    return f"{value:.2f}"


def result(row: str, table: str, figure: str) -> str:
    """The mean over seeds, as printed in the tables of docs/results.md."""
    (found,) = (each for each in TABLES[table] if each.name == row)
    return mean_of(found, figure)


def mean_of(row: Row, figure: str) -> str:
    return f"{mean(collect(RESULTS, row)[figure]):.4f}".replace("0.", ".", 1)


def united(task: str, figure: str) -> Callable[[], str]:
    return lambda: result(f"UniGRF, HSTU{task}", "ml-1m leave-one-out", figure)


def grank_at(row: str, figure: str) -> Callable[[], str]:
    return lambda: result(f"GRank, {row}", "ml-1m half-and-half", figure)


HR, AUC, RETRIEVED, RANKED = "retrieved hr@10", "auc", "retrieved recall@50", "ranked_200 recall@50"
CLAIMS = [  # page, sentence with one group per figure, recorded figures
    (
        "README.md",
        r"takes ([\d.]+) of the time of the fastest exact peer",
        [lambda: ratio("mips_topk cpu 1_000_000 x 64 B=16 k=100", "float32 rows")],
    ),
    (
        "docs/results.md",
        r"HR@10 is (\.\d+) with retrieval only and (\.\d+) with both, "
        r"AUC (\.\d+) with ranking only and (\.\d+) with both",
        [united(", retrieval only", HR), united("", HR), united(", ranking only", AUC), united("", AUC)],
    ),
    (
        "docs/results.md",
        r"\(\*neither\*: (\.\d+) and (\.\d+)\)",
        [united(", neither", HR), united(", neither", AUC)],
    ),
    (
        "docs/results.md",
        r"Recall@50 is (\.\d+) for the Generator alone, (\.\d+) with the Ranker, "
        r"(\.\d+) with the auxiliary branch and (\.\d+) with both",
        [
            grank_at("Generator", RETRIEVED),
            grank_at("Generator + Ranker", RANKED),
            grank_at("Generator + auxiliary", RANKED),
            grank_at("whole", RANKED),
        ],
    ),
]


@pytest.mark.parametrize(("page", "text", "figures"), CLAIMS)
def test_figures_in_prose_match_the_record(page: str, text: str, figures: list[Callable[[], str]]) -> None:
    found = re.search(text.replace(" ", r"\s+"), (ROOT / page).read_text())
    assert found is not None, f"{page} does not say {text}"
    assert list(found.groups()) == [figure() for figure in figures]


def test_readme_quotes_no_other_figure() -> None:
    """Every decimal number in its prose is in CLAIMS or is a version."""
    text = re.sub(r"(?m)^\|.*$|\]\([^)]*\)|arXiv [\d.]+|Python [\d.]+|Apache-[\d.]+", "", prose(ROOT / "README.md"))
    claimed = [figure() for page, _, figures in CLAIMS if page == "README.md" for figure in figures]
    assert re.findall(r"\d+\.\d+", text) == claimed


def test_page_of_benchmarks_matches_the_record(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    for stem, (section, _) in SECTIONS.items():
        write_section(page, stem, section(RUN))
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_table_of_the_readme_matches_the_record(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text())
    write_section(page, "summary", summary_table(RUN))
    assert page.read_text() == (ROOT / "README.md").read_text()
    assert in_the_middle(RUN, "cpu")[0]["N"] == 1_000_000


# ---- the picture of the house ----


def picture() -> set[Path]:
    """Paths in CONTRIBUTING's picture: folders end in a slash, two spaces end the names of a line."""
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


def test_picture_names_existing_paths() -> None:
    named = picture()
    assert len(named) > 20
    assert not sorted(str(path) for path in named if not (ROOT / path).exists())


def test_picture_has_every_folder() -> None:
    sources = [path for room in ("grank_kernels", "csrc", "tests") for path in (ROOT / room).rglob("*")]
    folders = {path.parent.relative_to(ROOT) for path in sources if path.suffix in (".py", ".cpp", ".cu", ".h")}
    modules = {path.relative_to(ROOT) for path in (ROOT / "grank_kernels").glob("*.py")}
    assert not sorted(map(str, (folders | modules) - picture()))
