"""The rooms of the package and which way imports may point between them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "grank_kernels"

ARROWS = {  # a room may import itself and the rooms named here; "public" is the op files at the root
    "common": set(),
    "table": {"common"},
    "backends": {"common", "table"},
    "ops": {"common", "table", "backends"},
    "distributed": {"common", "table", "backends", "ops"},
    "adapters": {"common", "table", "backends", "ops", "distributed", "public"},
    "public": {"common", "table", "backends", "ops", "distributed"},
    "recommender": {"common", "table", "backends", "ops", "distributed", "public", "adapters", "doctor"},
    "doctor": {"common", "backends"},
    "__main__": {"recommender", "doctor"},
}
WITHIN_RECOMMENDER = {  # the same for the rooms of `recommender`; its files outside of them are "settings"
    "settings": set(),
    "data": {"settings"},
    "models": {"settings", "data"},
    "training": {"settings", "data", "models"},
    "serving": {"settings", "data", "models", "training"},
    "cli": {"settings", "data", "models", "training", "serving"},
}
PUBLIC = {"mips_topk", "candidate_cross_attention", "score_candidates", "corpus_cross_entropy", "sample_negatives"}
NATIVE = {"grank_kernels._cpu", "grank_kernels._cuda", "grank_kernels._version"}


def _name(path: Path) -> str:
    parts = ("grank_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py")}


def _typing_only(tree: ast.AST) -> set[int]:
    guarded = (
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    return {id(inner) for guard in guarded for statement in guard.body for inner in ast.walk(statement)}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports when it is loaded or later; imports for types alone are left out."""
    tree = ast.parse(MODULES[module].read_text())
    skipped, found = _typing_only(tree), set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "grank_kernels"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grank_kernels":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in MODULES or full in NATIVE else node.module)
    return found - NATIVE - {module}


def room(module: str) -> str:
    """The part of the package that a module is in."""
    parts = module.split(".")
    if len(parts) == 1:
        return "face"
    if parts[1] in (
        "candidate_cross_attention",
        "score_candidates",
        "mips_topk",
        "corpus_cross_entropy",
        "sample_negatives",
    ):
        return "public"
    return parts[1]


def _recommender_room(module: str) -> str:
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and (PACKAGE / "recommender" / parts[2]).is_dir() else "settings"


def fault(module: str, seen: str) -> str | None:
    """What is wrong with `module` importing `seen`, or None."""
    own = room(module)
    if seen not in MODULES:
        return f"{module} imports {seen}, which does not exist"
    if room(seen) == "face":
        return f"{module} imports the package's public names; import the module that defines them"
    if room(seen) != own and room(seen) not in ARROWS[own]:
        return f"{module} imports {seen}: {own} may import {', '.join(sorted(ARROWS[own])) or 'nothing'}"
    here, there = _recommender_room(module), _recommender_room(seen)
    if own == room(seen) == "recommender" and here != there and there not in WITHIN_RECOMMENDER[here]:
        return f"{module} imports {seen}: {here} may import {', '.join(sorted(WITHIN_RECOMMENDER[here])) or 'nothing'}"
    return None


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) not in ("face", "_version")))
def test_imports_point_down(module: str) -> None:
    assert [wrong for seen in imports(module) if (wrong := fault(module, seen))] == []


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        ("grank_kernels.table.item_table", "grank_kernels.mips_topk"),
        ("grank_kernels.ops.mips_topk", "grank_kernels.recommender.data"),
        ("grank_kernels.backends.cpu", "grank_kernels.ops.dispatch"),
        ("grank_kernels.recommender.data.splits", "grank_kernels.recommender.models"),
        ("grank_kernels.adapters.faiss", "grank_kernels"),
    ],
)
def test_an_import_that_points_up_is_noticed(module: str, seen: str) -> None:
    assert fault(module, seen) is not None


def test_no_circle_of_imports() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_the_root_holds_the_public_ops_and_little_else() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10
