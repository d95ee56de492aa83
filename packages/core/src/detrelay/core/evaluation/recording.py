"""Run a detector over a dataset and record the predictions of every decoder stage in arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detrelay.core.criterion import Assigner
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorOutput
from detrelay.core.evaluation.cascade import Cascade, Labels, StageSimilarity
from detrelay.core.evaluation.query_features import QueryFeatures
from detrelay.core.evaluation.tables import Detections, Ints
from detrelay.core.structures import Assignment, StageGroup, StagePrediction, Targets

# the layers that compute class scores from a query's features, in every head of this project
_CLASSIFIER = re.compile(r"(^|\.)classify(\.\d+)?$")
# per image, evenly spaced: the time for the similarity of stages is proportional to it
_MOST_COMPARED_QUERIES = 100


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What S stages predicted for all images.

    Attributes:
        image_ids: int64 [I], ascending; the order of the cascade's images.
        seen: int64 [I], position of each image in the recording.
        detections: S post-processed outputs, as if the decoder ended there.
        cascade: boxes and labels of every stage.
        similarity: of query features between stages; None if the head does not expose them.
        features: of the queries matched in the last stage, in the order of its own labels; None if
            the head does not expose them.
    """

    image_ids: Ints
    seen: Ints
    detections: tuple[Detections, ...]
    cascade: Cascade
    similarity: StageSimilarity | None
    features: QueryFeatures | None


@torch.no_grad()
def record_stages(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    processor: DetrelayImageProcessor,
    category_ids: Sequence[int],
    class_indices: Sequence[int],
    own: Assigner,
    learned: Assigner,
    max_detections: int,
    on_batch: Callable[[], object] | None = None,
) -> Recording:
    """Run the model over all batches.

    Args:
        model: on the device of the batches; its part `head` returns the groups of stages.
        batches: `pixel_values`, `pixel_mask` and `labels` each.
        processor: turns outputs into boxes in pixels of the original image.
        category_ids: original category id by class index of the model.
        class_indices: class index of the model by class index of the labels.
        own: the assigner that matches every stage on its own.
        learned: the assigner whose labels are compared with the own ones.
        max_detections: boxes per image and stage, best scores first.
        on_batch: called after each batch.

    Raises:
        ValueError: there is no batch.
    """
    was_training = model.training
    model.eval()
    recorder = _Recorder(
        processor, category_ids, torch.tensor(class_indices), (own, learned), max_detections
    )
    try:
        with _captured(model) as (groups, features):
            for loaded in batches:
                batch = processor.normalize_batch(loaded)
                groups.clear()
                features.clear()
                model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
                recorder.add(groups[0][0].stages, features, batch["labels"])
                if on_batch is not None:
                    on_batch()
    finally:
        model.train(was_training)
    return recorder.finish()


@contextmanager
def _captured(
    model: nn.Module,
) -> Iterator[tuple[list[tuple[StageGroup, ...]], list[Tensor]]]:
    """The head's output, and the inputs of its classifiers in the order of the calls."""
    groups: list[tuple[StageGroup, ...]] = []
    features: list[Tensor] = []
    head = model.head
    assert isinstance(head, nn.Module)
    handles = [head.register_forward_hook(lambda _, __, output: groups.append(output))]
    for name, module in head.named_modules():
        if _CLASSIFIER.search(name) and not isinstance(module, nn.ModuleList):
            handles.append(
                module.register_forward_pre_hook(lambda _, given: features.append(given[0]))
            )
    try:
        yield groups, features
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Collects batches; the result of `finish` does not depend on their order."""

    def __init__(
        self,
        processor: DetrelayImageProcessor,
        category_ids: Sequence[int],
        class_indices: Tensor,
        assigners: tuple[Assigner, Assigner],
        max_detections: int,
    ) -> None:
        self.processor, self.category_ids = processor, category_ids
        self.class_indices, self.assigners = class_indices, assigners
        self.max_detections = max_detections
        self.image_ids: list[int] = []
        self.image_sizes: list[Any] = []
        self.detections: list[list[Detections]] = []
        self.boxes: list[Any] = []
        self.objects: list[tuple[Any, Any, Any]] = []
        self.labels: tuple[list[list[Labels]], ...] = ([], [])
        self.count = 0  # objects so far
        self.similarity: StageSimilarity | None = StageSimilarity()
        self.features: list[Any] = []

    def add(
        self,
        stages: Sequence[StagePrediction],
        features: Sequence[Tensor],
        labels: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Record what the stages predicted for one batch."""
        sizes = torch.stack([label["orig_size"] for label in labels])
        ids = torch.cat([label["image_id"].reshape(-1) for label in labels]).tolist()
        targets = Targets.from_labels(labels)
        scale = sizes.flip(1).repeat(1, 2).cpu().double()  # [B, 4]: width, height twice
        known = replace(
            targets, labels=self.class_indices.to(targets.labels.device)[targets.labels]
        )
        self.detections.append([self._detect(stage, sizes, ids) for stage in stages])
        slots = [stage.by_slot() for stage in stages]
        boxes = torch.stack([stage.boxes.cpu().double() for stage in slots])
        self.boxes.append(_corner_boxes(boxes * scale[:, None]).float().numpy())
        image = targets.image.cpu()
        target_boxes = _corner_boxes(targets.boxes.cpu().double() * scale[image])
        self.objects.append(
            (
                (image + len(self.image_ids)).numpy(),
                targets.labels.cpu().numpy(),
                target_boxes.numpy(),
            )
        )
        for kept, assigner in zip(self.labels, self.assigners, strict=True):
            kept.append([self._labels(part) for part in assigner(slots, known)])
        own = _of_stages(features, stages)
        last = self.labels[0][-1][-1]
        self._look_at(own, image.numpy()[last.object - self.count], last.query)
        self.image_ids += ids
        self.image_sizes.append(scale[:, :2].numpy())
        self.count += len(targets)

    def _detect(
        self, stage: StagePrediction, sizes: Tensor, image_ids: Sequence[int]
    ) -> Detections:
        output: Any = DetectorOutput(logits=stage.logits, pred_boxes=stage.boxes)
        results = self.processor.post_process_object_detection(
            output, 0.0, sizes, self.max_detections
        )
        on_cpu = [{key: value.cpu() for key, value in result.items()} for result in results]
        return Detections.from_results(on_cpu, image_ids, self.category_ids)

    def _labels(self, assignment: Assignment) -> Labels:
        pairs = assignment.classes
        return Labels(pairs.target.cpu().numpy() + self.count, pairs.query.cpu().numpy())

    def _look_at(self, features: list[Tensor] | None, image: Ints, query: Ints) -> None:
        """Compare the queries of all stages, and keep the features of the given ones."""
        if features is None:
            self.similarity = None
        if self.similarity is None or features is None:
            return
        step = -(-features[0].shape[1] // _MOST_COMPARED_QUERIES)
        self.similarity.add(
            [values[:, ::step].flatten(0, 1).double().cpu().numpy() for values in features]
        )
        self.features.append(
            np.stack([values[image, query].float().cpu().numpy() for values in features])
        )

    def finish(self) -> Recording:
        """All batches together, by image id."""
        if not self.boxes:
            raise ValueError("there is no image to evaluate")
        seen = np.argsort(np.array(self.image_ids, dtype=np.int64), kind="stable")
        image_ids = np.array(self.image_ids, dtype=np.int64)[seen]
        image, category, target_boxes = (
            np.concatenate([part[column] for part in self.objects]) for column in range(3)
        )
        image = np.argsort(seen)[image]
        objects = np.argsort(image, kind="stable")
        place = np.argsort(objects)  # new row of each object
        own, learned = (
            tuple(_joined(parts, place)[0] for parts in zip(*kept, strict=True))
            for kept in self.labels
        )
        order = _joined([stages[-1] for stages in self.labels[0]], place)[1]
        cascade = Cascade(
            image=image[objects],
            category=category[objects],
            target_boxes=target_boxes[objects],
            image_sizes=np.concatenate(self.image_sizes)[seen],
            boxes=np.concatenate(self.boxes, axis=1)[:, seen],
            own=own,
            learned=learned,
        )
        features = None
        if self.similarity is not None:
            row = own[-1].object
            features = QueryFeatures(
                np.concatenate(self.features, axis=1)[:, order],
                cascade.category[row],
                cascade.image[row],
            )
        return Recording(
            image_ids=image_ids,
            seen=seen,
            detections=tuple(_by_image(parts) for parts in zip(*self.detections, strict=True)),
            cascade=cascade,
            similarity=self.similarity,
            features=features,
        )


def _of_stages(
    features: Sequence[Tensor], stages: Sequence[StagePrediction]
) -> list[Tensor] | None:
    """The features [B, Q, C] of the decoder's queries by slot, if every stage has some."""
    shape = stages[0].logits.shape[:2]
    own = [values for values in features if values.shape[:2] == shape][-len(stages) :]
    if len(own) < len(stages):
        return None
    return [
        values
        if stage.slot is None
        else values.gather(1, stage.slot.argsort(dim=1)[..., None].expand_as(values))
        for values, stage in zip(own, stages, strict=True)
    ]


def _joined(parts: Sequence[Labels], place: Ints) -> tuple[Labels, Ints]:
    """Labels of all batches sorted by object and query, and the order that sorts them.

    Args:
        parts: labels whose objects are numbered in order of arrival.
        place: new index of each object.
    """
    rows = place[np.concatenate([part.object for part in parts])]
    query = np.concatenate([part.query for part in parts])
    order = np.lexsort((query, rows))
    return Labels(rows[order], query[order]), order


def _by_image(parts: Sequence[Detections]) -> Detections:
    together = Detections.concatenate(parts)
    return together.select(np.argsort(together.image_ids, kind="stable"))


def _corner_boxes(boxes: Tensor) -> Tensor:
    """Boxes cxcywh as xywh."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, size], dim=-1)
