"""Taobao UserBehavior and the Amazon ratings, as their owners publish them."""

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

    There are no ratings, but `behaviours` says what a row was. Categories are checked and dropped. A few timestamps of
    the published file lie outside the nine days, some before 1970: they are kept, and sorted by. Reading holds at most
    29 bytes a row and some 400 MB.

    Args:
        path: the owner's `UserBehavior.csv` or `UserBehavior.csv.gz`, or the folder that holds it.
    """
    columns = read_columns(find(path, "UserBehavior.csv"), _USER_BEHAVIOR)
    del columns["category"]
    return Interactions.take(columns)


def read_amazon(path: str | Path) -> Interactions:
    """Amazon reviews of 2014, ratings only, of one category: ratings from 1 to 5, days as timestamps.

    Args:
        path: the owner's `ratings_<category>.csv` or the same with `.gz`, or the folder that holds one of them.
    """
    return Interactions.take(read_columns(find(path, "ratings_*.csv"), _AMAZON))
