"""Additional query sets for training: configuration shared by all heads."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from detrelay.core.detector.config import DetectorConfig
from detrelay.core.structures import GroupFacts

DECODER, HYBRID, RECOLLECTED = "decoder", "hybrid", "recollected"


@strict
class QuerySetsConfig(DetectorConfig):
    """Configuration of query sets that exist only in training.

    Attributes:
        num_queries: Q, the decoder's own queries.
        hybrid_queries: queries of a second set, stage group "hybrid", that see only each other; 0
            for none. H-DETR matches them to repeated targets.
        query_groups: sets of `num_queries` queries that see only their own set; the first is the
            decoder's, the others are the stage groups "group/1", "group/2", ... (Group DETR).
        recollect_queries: every stage also refines queries that skipped the stage before it, stage
            group "recollected" (SQR).

    Reference:
        Jia et al. (H-DETR), CVPR 2023; Chen et al. (Group DETR), ICCV 2023; Chen et al. (SQR), CVPR
        2023.
    """

    model_type = "detrelay_query_sets"
    only_in_training = DetectorConfig.only_in_training | {
        *("hybrid_queries", "query_groups", "recollect_queries")
    }

    num_queries: int = 100
    hybrid_queries: int = 0
    query_groups: int = 1
    recollect_queries: bool = False

    def validate_architecture(self) -> None:
        """Reject impossible numbers of queries."""
        super().validate_architecture()
        if self.hybrid_queries < 0:
            raise ValueError(f"hybrid_queries must be >= 0; found {self.hybrid_queries}")
        if self.query_groups < 1:
            raise ValueError(f"query_groups must be at least 1; found {self.query_groups}")

    @property
    def hidden_sets(self) -> dict[str, int]:
        """Number of queries of every set except the decoder's own, by stage group."""
        hybrid = {HYBRID: self.hybrid_queries} if self.hybrid_queries else {}
        groups = {f"group/{index}": self.num_queries for index in range(1, self.query_groups)}
        return {**hybrid, **groups}

    @property
    def pass_groups(self) -> tuple[GroupFacts, ...]:
        """The stage groups that training adds to those of decoder and head."""
        own = tuple(GroupFacts(name) for name in self.hidden_sets)
        if not self.recollect_queries:
            return own
        return (*own, GroupFacts(RECOLLECTED, slots=DECODER))
