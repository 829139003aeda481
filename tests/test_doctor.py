"""The import, show_config, and a package without its native modules."""

import importlib
import platform
import sys

import torch
from oracle import isas, run_python

import grank_kernels as gk
from grank_kernels.backends import cpu


def test_show_config() -> None:
    text = gk.show_config()
    for fact in (gk.__version__, torch.__version__, platform.python_version(), f"{torch.get_num_threads()} threads"):
        assert fact in text
    assert "backend cpu: can run" in text
    assert "backend reference: can run" in text
    assert f"cpu instruction set: {cpu.isa()}, of baseline" in text
    for isa, runs_here in cpu.isas().items():
        assert isa in text
        assert (f"{isa} (not on this processor)" in text) != runs_here
    assert "GRANK_CPU_ISA" in text


def test_baseline_runs_everywhere() -> None:
    assert isas()[0] == "baseline"
    assert cpu.isa() in isas()


def test_public_names() -> None:
    for name in gk.__all__:
        assert getattr(gk, name).__doc__ or name == "__version__"
    for op in ("candidate_cross_attention", "mips_topk", "score_candidates"):
        importlib.import_module(f"grank_kernels.{op}")  # the module has the op's name; the attribute stays the function
        assert callable(getattr(gk, op))


def test_import_does_not_touch_cuda_nor_threads() -> None:
    done = run_python(
        "import torch; before = torch.get_num_threads()\n"
        "import grank_kernels as gk\n"
        "assert not torch.cuda.is_initialized(), 'import initialised CUDA'\n"
        "text = gk.show_config()\n"
        "assert not torch.cuda.is_initialized(), 'show_config initialised CUDA'\n"
        "assert torch.get_num_threads() == before\n"
        "print(text)"
    )
    assert done.returncode == 0, done.stderr
    assert "backend cpu: can run" in done.stdout


SEARCH = """
import sys, torch
of_torch = set(sys.modules)
import grank_kernels as gk
rows = torch.randn(20, 8)
tables = [gk.ItemTable.from_rows(rows, **more) for more in ({}, {"dtype": torch.int8}, {"coarse": torch.int8})]
for items in (rows, rows.numpy(), *tables):
    assert gk.mips_topk(rows, items, 3).indices.shape == (20, 3)
print(*{name.split(".")[0] for name in set(sys.modules) - of_torch})
"""


def test_import_and_search_load_little_and_do_not_warn() -> None:
    """No third-party package but the two small dependencies; `run_python` turns warnings into errors."""
    done = run_python(SEARCH)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded = {name for name in done.stdout.split() if name not in sys.stdlib_module_names}
    assert loaded <= {"grank_kernels", "xxhash", "numpy"}, loaded


def test_the_package_as_a_program_lists_the_backends() -> None:
    done = run_python(
        "import runpy, sys; sys.argv[1:] = ['doctor']; runpy.run_module('grank_kernels', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"grank_kernels {gk.__version__}\n")
    assert "backend cpu: can run" in done.stdout


WITHOUT_LIBRARY = """
import sys, warnings

class NoLibrary:
    def find_spec(self, name, path=None, target=None):
        if name == "grank_kernels._cpu":
            raise ImportError("libdoesnotexist.so.1: cannot open shared object file")

sys.meta_path.insert(0, NoLibrary())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    before = len(caught)
    import grank_kernels as gk
    print(*[f"{w.category.__name__}: {w.message}" for w in caught[before:]], sep="\\n")
print("--")
queries, rows = torch.randn(3, 8), torch.randn(50, 8)
top = gk.mips_topk(queries, rows, 5)
assert torch.equal(top.values, gk.mips_topk(queries, rows, 5, backend="reference").values)
assert torch.equal(top.indices, torch.topk(queries @ rows.T, 5).indices)
history = rows[:48].view(3, 16, 1, 8)
assert gk.candidate_cross_attention(queries[:, None, None], history, history).shape == (3, 1, 1, 8)
try:
    gk.mips_topk(queries, rows, 5, backend="cpu")
except ValueError as error:
    print(error)
print("--")
print(gk.show_config())
"""


def test_package_works_without_its_native_library() -> None:
    done = run_python(WITHOUT_LIBRARY)
    assert done.returncode == 0, done.stderr
    warned, refused, config = (part.strip() for part in done.stdout.split("--\n"))
    reason = "libdoesnotexist.so.1: cannot open shared object file"
    assert len(warned.splitlines()) == 1
    assert warned.startswith("RuntimeWarning: ")
    assert reason in warned
    assert "'reference' backend" in warned
    assert refused.startswith("backend 'cpu' cannot run: the native library could not be loaded")
    assert reason in refused
    assert f"backend cpu: the native library could not be loaded: {reason}" in config
    assert "backend reference: can run" in config
    assert "instruction set" not in config


WITHOUT_CUDA_MODULE = """
import importlib.util, sys
find_spec, name = importlib.util.find_spec, "grank_kernels._cuda"
importlib.util.find_spec = lambda wanted, *package: None if wanted == name else find_spec(wanted, *package)
sys.modules[name] = None  # importing it fails
import torch, grank_kernels as gk
try:
    gk.score_candidates(*[torch.zeros(1, 1, dtype=torch.int64)] + [torch.zeros(1, 16)] * 3, backend="cuda",
        cu_seqlens=torch.tensor([0, 1]), user_hidden=torch.zeros(1, 16), item_weight=torch.zeros(16, 16),
        out_weight=torch.zeros(16))
except ValueError as error:
    print(error)
print(gk.show_config())
"""


def test_package_works_without_the_cuda_module() -> None:
    done = run_python(WITHOUT_CUDA_MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend 'cuda' cannot run: ")
    assert "backend cuda: the CUDA module could not be loaded" in done.stdout
    assert "cuda module: not built" in done.stdout


def test_show_config_names_an_impossible_instruction_set() -> None:
    """show_config reports the error instead of raising it."""
    done = run_python("import grank_kernels as gk; print(gk.show_config())", GRANK_CPU_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "GRANK_CPU_ISA must be one of baseline" in done.stdout
