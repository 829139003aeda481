"""`Comparison`: a model beside popularity and item-kNN on the same test users."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grank_kernels.recommender.data import Cases, Split
from grank_kernels.recommender.models.neighbours import ItemKNN, Popularity
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.training.evaluation import metrics_of_users, recommend
from grank_kernels.recommender.training.experiment import KS, Experiment

CURVE = (1, 2, 5, 10, 20, 50, 100, 200)
"""The cuts k of the curves."""
COVERED = 10  # length of the lists of which the coverage is taken
LABELS = {"model": "model", "popularity": "popularity", "item_knn": "item-kNN"}
_KNN_ROWS = 5_000_000  # training rows above which co-occurrences take longer than the evaluation of the model
_USERS = 1024  # at a time


@dataclass(frozen=True)
class Contender:
    """Metrics of one recommender.

    Attributes:
        values: metric -> (U,) float64, one for each test user.
        coverage: share of the items that are among the first 10 of any user.
    """

    values: dict[str, Tensor]
    coverage: float


@dataclass(frozen=True)
class Comparison:
    """Metrics of the model and of the baselines, user by user.

    Attributes:
        contenders: "model", "popularity" and, up to 5 million training rows, "item_knn".
        lengths: (U,) int64, length of each user's history.
        popularity: (U,) float64, mean number of training rows of each user's targets.
        ks: cuts of the protocol.
    """

    contenders: dict[str, Contender]
    lengths: Tensor
    popularity: Tensor
    ks: tuple[int, ...]

    @classmethod
    def of(
        cls, experiment: Experiment, model: Recommender, split: Split, *, allow: Tensor | None = None
    ) -> "Comparison":
        """Evaluate the last stage of the model and the baselines on the test users.

        Args:
            experiment: settings of the protocol, and the numbers of candidates of the second stage; the largest counts.
            model: in evaluation mode.
            split: data; the baselines count its training histories.
            allow: (N,) bool: items that the model may recommend; None for all.
        """
        cases, N, ks = split.test, split.num_items, KS[experiment.data.protocol]
        ranks = model.ranks and bool(experiment.k1)
        length = max(experiment.k1) if ranks else max(*ks, *CURVE)

        def of_model(part: Cases) -> Tensor:
            found = recommend(model, part, length, rank=ranks, allow=allow)
            return found.retrieved if found.ranked is None else found.ranked

        popularity = Popularity.fit(split.train, N)
        lists = {"model": of_model, "popularity": lambda part: popularity.recommend(part.histories, max(ks)).indices}
        if len(split.train.items) <= _KNN_ROWS:
            knn = ItemKNN.fit(split.train, N)
            lists["item_knn"] = lambda part: knn.recommend(part.histories, max(ks)).indices
        contenders = {name: _evaluated(of, cases, N, ks) for name, of in lists.items()}
        targets = cases.targets
        counts = torch.zeros(len(cases), dtype=torch.float64)
        counts.index_add_(0, targets.users, popularity.counts[targets.items].double())
        return cls(contenders, cases.histories.lengths, counts / targets.lengths, tuple(ks))

    @property
    def best_baseline(self) -> str:
        """The baseline with the largest NDCG at the first cut."""
        metric = f"ndcg@{self.ks[0]}"
        names = [name for name in self.contenders if name != "model"]
        return max(names, key=lambda name: float(self.contenders[name].values[metric].mean()))

    def to_dict(self) -> dict[str, Any]:
        """Means, standard errors and coverage of each, and paired differences of the model to each baseline."""
        sections: dict[str, Any] = {"best_baseline": self.best_baseline, "compared": {}, "differences": {}}
        for name, each in self.contenders.items():
            pairs = {metric: _mean(values) for metric, values in each.values.items()}
            sections["compared"][name] = {
                **{metric: mean for metric, (mean, _) in pairs.items()},
                f"coverage@{COVERED}": each.coverage,
                "standard_errors": {metric: error for metric, (_, error) in pairs.items()},
            }
            if name != "model":
                own = self.contenders["model"].values
                paired = {metric: _mean(own[metric] - x) for metric, x in each.values.items() if metric in own}
                sections["differences"][name] = {
                    metric: {"mean": mean, "standard_error": error} for metric, (mean, error) in paired.items()
                }
        return sections


def table(report: dict[str, Any]) -> list[list[str]]:
    """The table of a report with a comparison: header, a row for each recommender, the model's paired difference."""
    compared, best = report["compared"], report["best_baseline"]
    cuts = [name for name in compared["model"] if name.startswith("hr@") and name[3:] != "1"]
    first = min((int(name[3:]) for name in cuts if int(name[3:]) >= COVERED), default=COVERED)
    names = [f"hr@{first}", f"ndcg@{first}", f"recall@{50 if first < 50 else first}", "mrr"]
    names = [name for name in names if name in compared["model"]]
    rows = [["", *(name.upper() for name in names), f"coverage@{COVERED}"]]
    for name, own in compared.items():
        figures = [_figure(own.get(metric), own["standard_errors"].get(metric)) for metric in names]
        rows.append([LABELS[name], *figures, f"{own[f'coverage@{COVERED}']:.1%}"])
    paired = report["differences"][best]
    figures = [
        _figure(paired[name]["mean"], paired[name]["standard_error"], "+") if name in paired else "" for name in names
    ]
    rows.append([f"model - {LABELS[best]}, paired", *figures, ""])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text, its columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return "\n".join(lines)


def _evaluated(lists: Any, cases: Cases, N: int, ks: Sequence[int]) -> Contender:
    parts: list[dict[str, Tensor]] = []
    covered = torch.zeros(N, dtype=torch.bool)
    for rows in torch.split(torch.arange(len(cases)), _USERS):
        part = cases.select(rows)
        found: Tensor = lists(part)
        cuts = sorted(k for k in {*ks, *CURVE} if k <= found.shape[1])
        parts.append(metrics_of_users(found, part.targets, cuts))
        first = found[:, :COVERED]
        covered[first[first >= 0]] = True
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Contender(values, float(covered.double().mean()))


def _mean(values: Tensor) -> tuple[float, float | None]:
    """Mean and its standard error; None for fewer than two users."""
    n = len(values)
    return float(values.mean()), float(values.std()) / n**0.5 if n > 1 else None


def _figure(mean: float | None, error: float | None, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
