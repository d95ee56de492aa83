"""One-to-many rule by score and overlap combined (MS-DETR, DAC-DETR, Mr. DETR)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.owners import OwnerAssigner
from detrelay.assigners.tables import (
    BoxSource,
    Table,
    check_box_source,
    overlap_table,
    score_table,
    with_boxes,
)
from detrelay.core.structures import StagePrediction, Targets


class OneToManyAssigner(OwnerAssigner):
    """Gives a target up to `at_most` queries whose combined score of box and class is good.

    The score of query and target is `iou_weight` IoU + (1 - `iou_weight`) p. A query is positive
    where its best score reaches `threshold` or it is some target's best; see `OwnerAssigner` for
    how positives become pairs. Made for predictions without self-attention: if these are used at
    inference, they need NMS.

    Args:
        threshold: see above.
        at_most: maximum queries per target.
        iou_weight: share of the IoU in the score.
        max_positives: maximum positive queries per image; None for a quarter of the queries, 0 for
            no limit. 75 in DAC-DETR.
        one_class: a query that serves several targets learns the class of the best one only
            (MS-DETR); False lets it learn all (DAC-DETR).
        boxes: whose IoU: the "predicted" boxes', or the stage's "references" (DAC-DETR: boxes of
            the primary decoder).

    Raises:
        ValueError: a number out of range or an unknown choice of boxes.

    Reference:
        Zhao et al., MS-DETR, CVPR 2024 (arXiv 2401.03989), checked against Atten4Vis/MS-DETR; Hu
        et al., DAC-DETR, NeurIPS 2023, checked against huzhengdongcs/DAC-DETR.
    """

    def __init__(
        self,
        threshold: float = 0.4,
        at_most: int = 6,
        iou_weight: float = 0.7,
        max_positives: int | None = None,
        one_class: bool = True,
        boxes: BoxSource = "predicted",
    ) -> None:
        super().__init__(threshold, at_most, max_positives, one_class)
        if not 0 <= iou_weight <= 1:
            raise ValueError(f"iou_weight must lie in [0, 1], found {iou_weight}")
        check_box_source(boxes)
        self.iou_weight = iou_weight
        self.boxes = boxes

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """The combined score, [1, T, Q]."""
        overlap = overlap_table(with_boxes(stage, self.boxes), targets)
        score = score_table(stage, targets)
        return (self.iou_weight * overlap + (1 - self.iou_weight) * score)[None]

    def positives(self, score: Table) -> NDArray[np.bool_]:
        """Good enough for its owner, or the best of some target."""
        positive: NDArray[np.bool_] = score.max(0) >= self.threshold
        positive[score.argmax(1)] = True
        return positive
