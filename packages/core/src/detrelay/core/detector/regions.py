"""Classification of the annotated regions from the backbone's maps, a task for training only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detrelay.core.boxes import cxcywh_to_xyxy
from detrelay.core.losses import CLASS_PRIOR_BIAS
from detrelay.core.structures import (
    REGIONS,
    Pairs,
    StageGroup,
    StagePrediction,
    Targets,
    at_least_float32,
)

_SAMPLES = 7  # per side of a region, of which the mean is taken


class RegionClassifier(nn.Module):
    """Scores of each annotated region, linear in the mean of every backbone map over its box.

    A decoder passes few and weak gradients on while its queries still learn where to look; a region
    tells the backbone directly how its category differs from others. On a few hundred images that
    decides how fast categories are told apart.

    Args:
        channels: of each backbone map.
        num_labels: K, number of classes.

    Reference:
        An auxiliary head as in Zong et al. (Co-DETR), ICCV 2023, arXiv 2211.12860, reduced to one
        linear layer on annotated boxes (Girshick, Fast R-CNN, ICCV 2015).
    """

    def __init__(self, channels: Sequence[int], num_labels: int) -> None:
        super().__init__()
        self.classify = nn.Linear(sum(channels), num_labels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights, class scores at their prior."""
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.constant_(self.classify.bias, CLASS_PRIOR_BIAS)

    def forward(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        targets: Targets,
        image_sizes: Tensor,
    ) -> StageGroup:
        """Classify the regions of a batch.

        Args:
            maps: [B, C, H, W] for each number of channels.
            strides: of the maps, pixels.
            targets: N objects.
            image_sizes: [B, 2], height and width of the unpadded images, pixels.

        Returns:
            One stage of N queries: query n of its object's image is object n; those of other images
            are empty.
        """
        sizes = image_sizes.flip(-1).repeat(1, 2)[targets.image]
        corners = cxcywh_to_xyxy(targets.boxes) * sizes
        rois = torch.cat([targets.image[:, None], corners], dim=1)
        means = [
            roi_align(level, rois.to(level), 1, 1 / stride, _SAMPLES, aligned=True).flatten(1)
            for level, stride in zip(map(at_least_float32, maps), strides, strict=True)
        ]
        scores = self.classify(torch.cat(means, dim=1).to(self.classify.weight.dtype))
        shape = (len(image_sizes), len(targets))
        query = torch.arange(len(targets), device=targets.image.device)
        logits = scores.new_full((*shape, scores.shape[-1]), CLASS_PRIOR_BIAS)
        logits = logits.index_put((targets.image, query), scores)
        boxes = targets.boxes.expand(*shape, 4)
        pairs = Pairs(targets.image, query, query)
        return StageGroup(REGIONS.name, (StagePrediction(logits, boxes),), known_pairs=pairs)
