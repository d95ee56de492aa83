"""Base of the overlap rules: every query is owned by the target it suits best."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrelay.assigners.tables import Rows, Table, TableAssigner, rows_of

_SHARE_OF_POSITIVES = 4  # a quarter of the queries, in MS-DETR, DAC-DETR and DETA


class OwnerAssigner(TableAssigner):
    """Positive queries vote for their owners; each target takes as many of its best queries.

    A target takes as many of its best-scoring queries as it owns positive ones, up to `at_most`. So
    a query may serve two targets, and a target whose best query belongs to another may get none.

    Args:
        threshold: a query whose best score reaches it is positive.
        at_most: maximum queries per target; None gives every positive query to its owner instead.
        max_positives: maximum positive queries per image, those with the best scores; None for a
            quarter of the queries, 0 for no limit. (The released code drops some at random.)
        one_class: a query that serves several targets learns the class of the best one only.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        threshold: float,
        at_most: int | None,
        max_positives: int | None,
        one_class: bool,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], found {threshold}")
        if at_most is not None and at_most < 1:
            raise ValueError(f"at_most must be 1 or more, found {at_most}")
        if max_positives is not None and max_positives < 0:
            raise ValueError(f"max_positives must be 0 or more, found {max_positives}")
        self.threshold = threshold
        self.at_most = at_most
        self.max_positives = max_positives
        self.one_class = one_class

    @abstractmethod
    def positives(self, score: Table) -> NDArray[np.bool_]:
        """Which queries are positive, [Q], from scores [T, Q]."""

    def kept(self, positive: NDArray[np.int64], best: Table, limit: int) -> NDArray[np.int64]:
        """The `limit` positive queries with the best scores.

        Args:
            positive: positive queries, ascending.
            best: [Q], every query's score with its owner.
            limit: how many may stay.
        """
        return positive[np.argsort(-best[positive], kind="stable")[:limit]]

    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """Pairs by the rule above."""
        score = tables[0]
        num_targets, num_queries = score.shape
        owner = score.argmax(0)
        positive = np.flatnonzero(self.positives(score))
        limit = self.max_positives
        if limit is None:
            limit = num_queries // _SHARE_OF_POSITIVES
        if limit or self.max_positives is None:
            positive = self.kept(positive, score.max(0), limit)
        if self.at_most is None:
            pairs = rows_of(positive, owner[positive])
        else:
            votes = np.bincount(owner[positive], minlength=num_targets)
            best = np.argsort(-score, axis=1, kind="stable")[:, : self.at_most]
            taken = np.arange(best.shape[1]) < votes[:, None]
            pairs = rows_of(best[taken], np.nonzero(taken)[0])
        return self._single_class(pairs, score) if self.one_class else (pairs, pairs)

    def _single_class(self, pairs: Rows, score: Table) -> tuple[Rows, Rows]:
        """Class pairs, only the best-scoring one of each query, and box pairs."""
        value = score[pairs[:, 1], pairs[:, 0]]
        pairs = pairs[np.argsort(value, kind="stable")]
        return last_of_query(pairs), pairs


def last_of_query(pairs: NDArray[Any]) -> Rows:
    """The last pair of every query."""
    newest = len(pairs) - 1 - np.unique(pairs[::-1, 0], return_index=True)[1]
    return pairs[np.sort(newest)]
