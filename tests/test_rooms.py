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
    "__main__": {"recommender"},
}
WITHIN_RECOMMENDER = {  # the same for the rooms of `recommender`; its files outside of them are "settings"
    "settings": set(),
    "data": {"settings"},
    "models": {"settings", "data"},
    "training": {"settings", "data", "models"},
    "serving": {"settings", "data", "models", "training"},
    "cli": {"settings", "data", "models", "training", "serving"},
}
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


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) not in ("face", "_version")))
def test_imports_point_down(module: str) -> None:
    own = room(module)
    for seen in imports(module):
        assert seen in MODULES, f"{module} imports {seen}, which does not exist"
        assert room(seen) != "face", f"{module} imports the package's public names; import the module that defines them"
        assert room(seen) == own or room(seen) in ARROWS[own], f"{module} imports {seen}"
        if own == "recommender" and room(seen) == "recommender":
            here, there = _recommender_room(module), _recommender_room(seen)
            assert here == there or there in WITHIN_RECOMMENDER[here], f"{module} imports {seen}"


def test_no_circle_of_imports() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_the_root_holds_the_public_ops_and_little_else() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("wrong", ["ops", "table"])
def test_an_import_that_points_up_is_noticed(wrong: str) -> None:
    assert "recommender" not in ARROWS[wrong]
    assert "public" not in ARROWS[wrong]
