"""Taobao UserBehavior and the Amazon ratings, in their published formats."""

from pathlib import Path

from grank_kernels.recommender.data.delimited import Layout, find, read_columns
from grank_kernels.recommender.data.interactions import BEHAVIOURS, Interactions

_USER_BEHAVIOR = Layout(
    {"user": "int32", "item": "int32", "category": "int32", "behaviour": BEHAVIOURS, "timestamp": "int32"},
    separator=",",
)
_AMAZON = Layout({"user": "text", "item": "text", "rating": "float32", "timestamp": "int64"}, separator=",")


def read_user_behavior(path: str | Path) -> Interactions:
    """Taobao UserBehavior: 987,994 users, 4,162,024 items, 100,150,807 rows in nine days of 2017.

    There are no ratings; `behaviours` has the kind of each row. Categories are validated and dropped. A few timestamps
    of the published file are outside the nine days, some before 1970; they are kept as they are. Reading needs at most
    29 bytes a row and 400 MB.

    Args:
        path: the published `UserBehavior.csv` or `UserBehavior.csv.gz`, or its folder.
    """
    columns = read_columns(find(path, "UserBehavior.csv"), _USER_BEHAVIOR)
    del columns["category"]
    return Interactions.take(columns)


def read_amazon(path: str | Path) -> Interactions:
    """Amazon reviews of 2014, ratings only, of one category: ratings from 1 to 5, days as timestamps.

    Args:
        path: the published `ratings_<category>.csv` or `ratings_<category>.csv.gz`, or a folder with one such file.
    """
    return Interactions.take(read_columns(find(path, "ratings_*.csv"), _AMAZON))
