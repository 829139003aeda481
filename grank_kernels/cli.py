"""`grank`: train, evaluate, retrieve, and see what can run here."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer  # commands from typed functions: help, errors and exit codes in one place

from grank_kernels.config import show_config
from grank_kernels.data import read
from grank_kernels.experiment import Experiment, evaluate, load, run

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment, see configs/")],
    folder: Annotated[Path, typer.Argument(help="folder of the run; one that was stopped goes on where it was")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. training.epochs=3")] = None,
    data: Annotated[Path | None, typer.Option(help="file or folder of the data set")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch")] = None,
) -> None:
    """Train a model and report on its test split."""
    if threads:
        torch.set_num_threads(threads)
    given = [*(overrides or []), *([f"data.path={data}"] if data else [])]
    print(json.dumps(_metrics(run(Experiment.load(config, given), folder)), indent=2))


@app.command(name="evaluate")
def evaluate_run(folder: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Report on the test split of a run, by the weights of its best epoch."""
    experiment = Experiment.load(folder / "experiment.yaml")
    split = experiment.data.split(read(experiment.data.name, experiment.data.path))
    print(json.dumps(evaluate(experiment, load(folder, split), split), indent=2))


@app.command()
def doctor() -> None:
    """Versions, processor, every backend: can run, or why not."""
    print(show_config())


def _metrics(report: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in report.items() if name != "machine"}


def main() -> None:
    """The console command: errors of the user's making are one line and exit status 1."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        print(f"grank: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
