"""Denoising queries: noisy copies of the targets that the decoder learns to correct.

Reference:
    Li et al., DN-DETR, CVPR 2022 (arXiv 2203.01305); Zhang et al., DINO, ICLR 2023 (arXiv
    2203.03605), section 3.3. Checked against the released code, IDEA-Research/DINO (Apache-2.0).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from detrelay.core.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrelay.core.detector.config import require_positive
from detrelay.core.structures import GroupFacts, Pairs, Targets
from detrelay.heads.deformable.layers import inverse_sigmoid
from detrelay.heads.deformable.passes import DecoderState, PassesConfig, QuerySet
from detrelay.heads.query_sets import DECODER

_log = logging.getLogger(__name__)
# more denoising queries than this per decoder query are reported
_MANY = 2


@strict
class DenoisingConfig(PassesConfig):
    """Configuration of detectors trained with denoising.

    Attributes:
        denoising_groups: groups, each with all targets of an image; 0 disables denoising, None
            makes as many as `denoising_queries` allows.
        denoising_queries: noisy targets in all groups together, used where `denoising_groups` is
            None: an image with n targets gets denoising_queries // n groups, at least one, where n
            is that of the fullest image of the batch.
        max_denoising_queries: limit on all denoising queries of an image; None for no limit, as in
            the released code, where one image with 1,500 objects gets 3,000 (DINO) or 7,500
            (DN-DETR). Beyond it there are fewer groups, and in the end a random choice of targets.
        denoising_padding: round the number of targets of the fullest image up to a power of two;
            the excess places stay unused. There are then few different numbers of queries to
            compile a model for. Where `denoising_groups` is None there are fewer groups than
            published: 6 instead of 11 for an image with 9 objects.
        label_flip_chance: share of queries whose label is redrawn from all classes.
        box_noise_scale: maximum shift of a box side, in half sides.
    """

    model_type = "detrelay_denoising"

    denoising_groups: int | None = None
    denoising_queries: int = 100
    max_denoising_queries: int | None = None
    denoising_padding: bool = False
    label_flip_chance: float | int = 0.25
    box_noise_scale: float | int = 1.0

    def validate_architecture(self) -> None:
        """Reject numbers that denoising cannot work with."""
        super().validate_architecture()
        require_positive(self, "denoising_queries")
        if self.denoising_groups is not None and self.denoising_groups < 0:
            raise ValueError(f"denoising_groups must be >= 0; found {self.denoising_groups}")
        if self.max_denoising_queries is not None:
            require_positive(self, "max_denoising_queries")
        if not 0 <= self.label_flip_chance <= 1:
            raise ValueError(
                f"label_flip_chance must lie in [0, 1]; found {self.label_flip_chance}"
            )
        if self.box_noise_scale < 0:
            raise ValueError(f"box_noise_scale must be >= 0; found {self.box_noise_scale}")

    def denoising_group(self) -> tuple[GroupFacts, ...]:
        """The group of denoising stages, if there is one."""
        if self.denoising_groups == 0:
            return ()
        return (GroupFacts("denoising", known_pairs=True),)


@dataclass(frozen=True, slots=True)
class Noise:
    """The random numbers of one batch, for N noisy copies of targets.

    Attributes:
        label_draw: [N], uniform in [0, 1): below the flip chance the label is replaced.
        label: int64 [N], the replacement.
        box_sign: [N, 4], -1 or 1.
        box_size: [N, 4], uniform in [0, 1).
    """

    label_draw: Tensor
    label: Tensor
    box_sign: Tensor
    box_size: Tensor


@dataclass(frozen=True, slots=True)
class DenoisingQueries:
    """What a decoder denoises next to its own Q queries: P queries placed before them.

    Images with fewer targets than the fullest one have unused queries.

    Attributes:
        content: [B, P, C], zero in unused queries.
        references: [B, P, 4], cxcywh in [0, 1]; 0.5 in unused queries.
        used: bool [B, P].
        groups: how many groups of equal size the queries form.
        pairs: the queries that must recover their target, and that target.
    """

    content: Tensor
    references: Tensor
    used: Tensor
    groups: int
    pairs: Pairs

    def query_set(self) -> QuerySet:
        """The queries as a decoder takes them: a group sees itself and the decoder's queries."""
        return QuerySet(
            "denoising",
            DecoderState(self.content, self.references, supervised=self.references),
            known_pairs=self.pairs,
            sees=(DECODER,),
            parts=self.groups,
        )


class Denoising(nn.Module):
    """Makes denoising queries.

    Args:
        config: numbers of groups and noise.
        label_dim: width of the label code; where it is less than C, the rest is filled with ones
            that mark denoising queries.
        contrastive: each group holds every target twice, with noise below one half side and
            between one and two: the second must learn to be background (DINO). Otherwise once, with
            noise on centre and size (DN-DETR).
        epsilon: keeps boxes away from 0 and 1.
    """

    def __init__(
        self, config: DenoisingConfig, label_dim: int, contrastive: bool, epsilon: float
    ) -> None:
        super().__init__()
        self.labels = nn.Embedding(config.num_labels or 0, label_dim)
        self.dim = config.d_model
        self.groups = config.denoising_groups
        self.queries = config.denoising_queries
        self.limit = config.max_denoising_queries
        self.is_padded = config.denoising_padding
        self._warned = False
        self.flip_chance = config.label_flip_chance
        self.box_scale = config.box_noise_scale
        self.contrastive = contrastive
        self.epsilon = epsilon

    def forward(self, targets: Targets, num_queries: int) -> DenoisingQueries:
        """Make the queries of one batch; none where no image has a target.

        Args:
            targets: T objects.
            num_queries: Q, the decoder's own queries.
        """
        targets.check(self.labels.num_embeddings)  # on a GPU an index error would kill the process
        in_image = targets.image[:, None] == targets.image
        rank = in_image.tril().sum(1) - 1  # index among the targets of its image
        fullest = int(rank.max()) + 1 if len(targets) else 0
        if self.is_padded and fullest:
            fullest = 1 << (fullest - 1).bit_length()
        groups = self._groups(fullest)
        copies = 2 * groups if self.contrastive else groups
        kept = torch.arange(len(targets), device=rank.device)
        if self.limit is not None and copies * fullest > self.limit:
            fullest = max(1, self.limit // copies)
            draw = torch.randperm(len(targets), device=rank.device)
            rank = (in_image & (draw < draw[:, None])).sum(1)
            kept = (rank < fullest).nonzero().flatten()
        else:
            self._warn_of_many(copies * fullest, fullest, num_queries)
        # copy by copy: where copies alternate between near and far ones, groups are pairs of them
        copy = torch.arange(copies, device=rank.device).repeat_interleave(len(kept))
        target = kept.repeat(copies)
        image = targets.image[target]
        query = copy * fullest + rank[target]
        far = copy % 2 if self.contrastive else torch.zeros_like(copy)
        noise = self.draw_noise(len(copy), targets.boxes)
        labels = torch.where(
            noise.label_draw < self.flip_chance, noise.label, targets.labels[target]
        )
        boxes = self._move(targets.boxes[target], noise, far)

        shape = (targets.batch_size, copies * fullest)
        code = F.pad(self.labels(labels), (0, self.dim - self.labels.embedding_dim), value=1.0)
        content = code.new_zeros(*shape, self.dim).index_put((image, query), code)
        references = boxes.new_full((*shape, 4), 0.5).index_put((image, query), boxes)
        used = torch.zeros(shape, dtype=torch.bool, device=image.device)
        used[image, query] = True
        pairs = Pairs(image=image, query=query, target=target)
        return DenoisingQueries(
            content=content,
            references=references,
            used=used,
            groups=groups,
            pairs=pairs.select(far == 0),
        )

    def _groups(self, fullest: int) -> int:
        """How many groups the fullest image of a batch leaves room for."""
        groups = self.groups or max(1, self.queries // max(fullest, 1))
        if self.limit is None:
            return groups
        one = (2 if self.contrastive else 1) * max(fullest, 1)
        return max(1, min(groups, self.limit // one))

    def _warn_of_many(self, count: int, fullest: int, own: int) -> None:
        if self.limit is None and count > _MANY * own and not self._warned:
            self._warned = True
            _log.warning(
                "an image with %d objects makes %d denoising queries next to the decoder's own %d: "
                "steps with such images take many times the time and memory; "
                "model.max_denoising_queries limits them",
                *(fullest, count, own),
            )

    def draw_noise(self, count: int, like: Tensor) -> Noise:
        """Random numbers for `count` noisy targets, of the dtype and on the device of `like`."""
        return Noise(
            label_draw=torch.rand(count, dtype=like.dtype, device=like.device),
            label=torch.randint(self.labels.num_embeddings, (count,), device=like.device),
            box_sign=torch.randint(2, (count, 4), device=like.device).to(like.dtype) * 2 - 1,
            box_size=torch.rand(count, 4, dtype=like.dtype, device=like.device),
        )

    def _move(self, boxes: Tensor, noise: Noise, far: Tensor) -> Tensor:
        step = noise.box_sign * (noise.box_size + far[:, None]) * self.box_scale
        half = boxes[:, 2:] / 2
        if self.contrastive:
            corners = cxcywh_to_xyxy(boxes) + step * torch.cat([half, half], dim=1)
            boxes = xyxy_to_cxcywh(corners.clamp(0, 1))
        else:
            boxes = boxes + step * torch.cat([half, boxes[:, 2:]], dim=1)
        return inverse_sigmoid(boxes, self.epsilon).sigmoid()


def no_targets(batch_size: int, like: Tensor) -> Targets:
    """Targets of a batch without objects, on the device of `like`."""
    empty = torch.zeros(0, dtype=torch.int64, device=like.device)
    return Targets(empty, like.new_zeros(0, 4), empty, batch_size)
