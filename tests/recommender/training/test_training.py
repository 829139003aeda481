"""Fitting: learning something, resuming exactly, stopping early, stopping when asked to."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from grank_kernels.recommender.data import Interactions, Split, TrainingWindows, leave_one_out
from grank_kernels.recommender.models import Recommender, Sequential, SequentialConfig, UniGRF, UniGRFConfig
from grank_kernels.recommender.training import lightning_files
from grank_kernels.recommender.training.checkpoint import read_checkpoint, read_weights
from grank_kernels.recommender.training.evaluation import metrics, recommend
from grank_kernels.recommender.training.fit import fit
from grank_kernels.recommender.training.settings import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainingConfig(epochs=4, targets=16, batch_items=128, learning_rate=0.01)


def circle(users: int = 40, items: int = 30, length: int = 20) -> Split:
    """Users who take the items in turns, each from a start of their own, and like every third."""
    rows = (torch.arange(users).unsqueeze(1) * 7 + torch.arange(length)) % items
    who = torch.arange(users).repeat_interleave(length)
    ratings = torch.where(rows.flatten() % 3 == 0, 5, 1)
    return leave_one_out(Interactions.from_columns(who, rows.flatten(), range(rows.numel()), ratings))


def sequential() -> Recommender:
    torch.manual_seed(1)
    return Sequential(30, SequentialConfig(dim=16, history=16))


def unigrf() -> Recommender:
    torch.manual_seed(1)
    return UniGRF(30, UniGRFConfig(dim=16, history=16, enhancer_after=3, enhancer_pool=8, weighter_interval=2))


def fitted(model: Recommender, split: Split, config: TrainingConfig, folder: Path | None = None) -> Recommender:
    assert fit(model, split, config, folder=folder, progress=False) > 0
    return model


class Interrupt(Callback):
    """Stops the process's work in the middle of an epoch, as a crash would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise RuntimeError("interrupted")


def test_learns_the_circle() -> None:
    split = circle()
    model = fitted(sequential(), split, TrainingConfig(epochs=25, targets=16, batch_items=128, learning_rate=0.01))
    assert not model.training
    found = recommend(model, split.test, 10)
    assert metrics(found.retrieved, split.test.targets, (1,))["hr@1"] > 0.9  # by chance it would be 1 in 11


@pytest.mark.parametrize("make", [sequential, unigrf])
@pytest.mark.parametrize(("epoch", "validate_every"), [(0, 1), (2, 1), (2, 3), (3, 3)])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    make: object, epoch: int, validate_every: int, tmp_path: Path
) -> None:
    assert callable(make)
    split, config = circle(), replace(CONFIG, validate_every=validate_every)
    whole = fitted(make(), split, config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(make(), split, config, folder=tmp_path / "cut", progress=False, callbacks=[Interrupt(epoch)])
    assert (tmp_path / "cut" / "last.ckpt").exists() == (epoch > 0)
    if epoch > 0:
        assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["epoch"] == epoch - 1
    torch.manual_seed(99)  # nothing of this process's state may matter
    resumed = fitted(make(), split, config, tmp_path / "cut")
    for (name, expected), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    again = fitted(make(), split, config, tmp_path / "whole")  # done: nothing is trained
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def ends_as_one_that_was_not_cut_off(folder: Path) -> None:
    whole, resumed = fitted(sequential(), circle(), CONFIG), fitted(sequential(), circle(), CONFIG, folder)
    last = read_checkpoint(folder / "last.ckpt")
    assert last["epoch"] == CONFIG.epochs - 1
    for name, expected in whole.state_dict().items():
        assert torch.equal(last["state_dict"][f"model.{name}"], expected), name
    best = read_weights(folder / "best.ckpt")
    assert all(torch.equal(best[name], got) for name, got in resumed.state_dict().items())


@pytest.mark.parametrize("step", ["keep_previous", "BEST", "LAST"])
def test_a_run_that_was_cut_off_between_two_files(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third epoch is cut off before its best weights, before the second name of the last, or before the last."""
    write, keep = lightning_files.write_checkpoint, lightning_files.keep_previous
    epochs = iter(range(3))

    def cut_write(path: Path, checkpoint: dict[str, object]) -> None:
        if Path(path).name == getattr(lightning_files, step, None) and checkpoint["epoch"] == 2:
            raise RuntimeError("cut off")
        write(path, checkpoint)

    def cut_keep(folder: Path) -> None:
        if step == "keep_previous" and next(epochs) == 2:
            raise RuntimeError("cut off")
        keep(folder)

    with monkeypatch.context() as patch:
        patch.setattr(lightning_files, "write_checkpoint", cut_write)
        patch.setattr(lightning_files, "keep_previous", cut_keep)
        with pytest.raises(RuntimeError, match="cut off"):
            fit(sequential(), circle(), CONFIG, folder=tmp_path, progress=False)
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 1
    ends_as_one_that_was_not_cut_off(tmp_path)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run with two finished epochs of four."""
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(sequential(), circle(), CONFIG, folder=tmp_path, progress=False, callbacks=[Interrupt(2)])
    return tmp_path


@pytest.mark.parametrize("damage", ["gone", "empty", "cut off", "one bit"])
def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(damage: str, cut: Path) -> None:
    last = cut / "last.ckpt"
    data = bytearray(last.read_bytes())
    last.unlink()  # it has a second name
    if damage != "gone":
        data[-1] ^= 1
        last.write_bytes({"empty": b"", "cut off": data[: len(data) // 2], "one bit": data}[damage])
        with pytest.warns(RuntimeWarning, match=r"last\.ckpt: .*; the run goes on from .*previous\.ckpt"):
            ends_as_one_that_was_not_cut_off(cut)
    else:
        ends_as_one_that_was_not_cut_off(cut)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(cut: Path) -> None:
    for name in ("last", "previous"):
        (cut / f"{name}.ckpt").unlink()
        torch.save({"state_dict": {}}, cut / f"{name}.ckpt")  # as other programs write them
    with pytest.raises(
        ValueError, match=r"last\.ckpt: expected a checkpoint.*there is no other checkpoint to resume from"
    ):
        fit(sequential(), circle(), CONFIG, folder=cut, progress=False)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 5}, "seed 0 there, 5 here"),
        ({"learning_rate": 0.02}, "learning_rate 0.01 there, 0.02 here"),
        ({"targets": 8, "epochs": 9}, "epochs 4 there, 9 here, targets 16 there, 8 here"),
    ],
)
def test_a_folder_of_other_settings_is_refused(change: dict[str, Any], difference: str, cut: Path) -> None:
    with pytest.raises(ValueError, match=f"of the same training, got {cut} with {difference}$"):
        fit(sequential(), circle(), replace(CONFIG, **change), folder=cut, progress=False)


def test_a_folder_of_other_data_or_of_another_model_is_refused(cut: Path) -> None:
    changed = circle()
    changed.train.items[0] = 29 - changed.train.items[0]
    with pytest.raises(ValueError, match=f"got {cut} with data .* there, .* here$"):
        fit(sequential(), changed, CONFIG, folder=cut, progress=False)
    fit(sequential(), changed, CONFIG, folder=cut, progress=False, data_changed=True)
    with pytest.raises(ValueError, match=f"got {cut} with model Sequential there, UniGRF here$"):
        fit(unigrf(), changed, CONFIG, folder=cut, progress=False)


def test_a_run_that_was_moved_keeps_its_best_epoch(cut: Path, tmp_path: Path) -> None:
    ends_as_one_that_was_not_cut_off(cut.rename(tmp_path.with_name("moved")))


def _fit_in_a_child(folder: Path) -> None:
    torch.set_num_threads(1)
    fit(sequential(), circle(), replace(CONFIG, epochs=30), folder=folder, progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_that_is_killed_at_any_moment_resumes(tmp_path: Path) -> None:
    whole = fitted(sequential(), circle(), replace(CONFIG, epochs=30), tmp_path / "whole")
    process, random = get_context("fork"), Random(1)
    kills = 0
    for _ in range(200):
        child = process.Process(target=_fit_in_a_child, args=(tmp_path / "cut",))
        child.start()
        child.join(random.uniform(0.1, 1.0))
        if child.exitcode == 0:
            break
        assert child.exitcode is None
        child.kill()
        child.join()
        kills += 1
    assert kills > 3
    resumed = fitted(sequential(), circle(), replace(CONFIG, epochs=30), tmp_path / "cut")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {"best.ckpt", "last.ckpt", "previous.ckpt", "log"}  # no litter


@pytest.mark.parametrize("validate_every", [1, 2])
def test_the_best_epoch_is_kept_and_the_run_stops_early_for_good(validate_every: int, tmp_path: Path) -> None:
    config = TrainingConfig(
        epochs=50,
        targets=16,
        batch_items=128,
        learning_rate=0.01,
        patience=1,
        monitor="hr@10",
        validate_every=validate_every,
    )
    epochs = []
    for _ in range(2):  # the second time everything is done
        fit(sequential(), circle(), config, folder=tmp_path, progress=False, tensorboard=True)
        epochs.append([read_checkpoint(tmp_path / f"{name}.ckpt")["epoch"] for name in ("best", "last")])
    best, last = epochs[0]
    assert best <= last < 49
    assert epochs[1] == epochs[0]
    assert list((tmp_path / "log").rglob("metrics.csv"))
    assert list((tmp_path / "tensorboard").rglob("events*"))


def test_a_run_whose_loss_is_lost_stops_and_says_so(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=5, targets=16, batch_items=128, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"retrieval is nan after epoch 1 of 5: .*learning_rate=1e\+30"):
        fit(sequential(), circle(), config, folder=tmp_path, progress=False)


def test_a_monitor_of_a_stage_that_there_is_not() -> None:
    with pytest.raises(
        ValueError, match=r"monitor must be a metric of the retrieval.* does not rank, got 'ranked_mrr'"
    ):
        fit(sequential(), circle(), replace(CONFIG, monitor="ranked_mrr"), progress=False)


def test_training_leaves_the_precision_of_products_alone() -> None:
    config = TrainingConfig(epochs=1, targets=16, batch_items=128, matmul="medium")
    before = torch.get_float32_matmul_precision()
    assert before != config.matmul
    fitted(sequential(), circle(), config)
    assert torch.get_float32_matmul_precision() == before


def test_bf16_trains(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=25, targets=16, batch_items=128, learning_rate=0.01, precision="bf16-mixed")
    split = circle()
    model = fitted(sequential(), split, config)
    found = recommend(model, split.test, 10)
    assert metrics(found.retrieved, split.test.targets, (1,))["hr@1"] > 0.9


_ENDLESS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_training import *
config = TrainingConfig(epochs=10**6, targets=16, batch_items=128)
fit(sequential(), circle(), config, folder=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_sigterm_ends_with_its_status_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(Path(__file__).parent), str(tmp_path)])
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] >= 0


_TWO_RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_training import *
from torch import distributed
from grank_kernels.distributed.ranks import leave
if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = Sequential(31, SequentialConfig(dim=16, history=16, softmax="batch"))
    sharded, cut = sys.argv[3] == "sharded", [Interrupt(2)] if "cut" in sys.argv else []
    config = TrainingConfig(
        epochs=4, targets=16, batch_items=128, learning_rate=0.01, validate_every=2, devices=2, shard_items=sharded
    )
    fit(model, circle(), config, folder=sys.argv[2], progress=False, callbacks=cut)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    distributed.all_gather(both, weights)
    assert torch.equal(*both)
    assert model.group is None
    if distributed.get_rank() == 0:
        torch.save(weights, sys.argv[2] + ".weights")
    leave()
    threads = {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.slow
@pytest.mark.parametrize("table", ["whole", "sharded"])
def test_two_processes_train_together_and_resume(table: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_TWO_RANKS)

    def launch(run: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / run), table, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    done = launch("run")
    assert done.returncode == 0, done.stderr
    checkpoint = read_checkpoint(tmp_path / "run" / "last.ckpt")
    alone = len(TrainingWindows(circle().train, targets=16, batch_items=128))
    assert checkpoint["global_step"] == 4 * -(-alone // 2)
    assert checkpoint["state_dict"]["model.items"].shape == (31, 16)

    cut = launch("cut", "cut")
    assert cut.returncode != 0
    assert "interrupted" in cut.stderr
    resumed = launch("cut")
    assert resumed.returncode == 0, resumed.stderr
    assert torch.equal(torch.load(tmp_path / "cut.weights"), torch.load(tmp_path / "run.weights"))


@pytest.mark.parametrize(
    ("settings", "folder", "text"),
    [
        ({"devices": 1}, True, "shard_items takes devices of 2 or more, got 1"),
        ({"devices": 2}, False, "shard_items takes a folder"),
        ({"devices": 2}, True, 'shard_items takes a model of softmax="batch"'),
    ],
)
def test_what_cannot_be_split(settings: dict[str, int], folder: bool, text: str, tmp_path: Path) -> None:
    config = TrainingConfig(shard_items=True, **settings)
    with pytest.raises(ValueError, match=text):
        fit(sequential(), circle(), config, folder=tmp_path if folder else None)
