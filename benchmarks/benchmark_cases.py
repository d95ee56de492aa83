"""What `benchmark.py` can measure: each function builds one model and returns one timed action."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig as TransformersConfig
from transformers import DeformableDetrForObjectDetection as TransformersModel
from transformers import ResNetConfig

from detrelay.assigners import build_assigners
from detrelay.core.criterion import Criterion
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.structures import FeaturePyramid, Targets
from detrelay.heads import (
    HEADS,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DinoConfig,
    DinoForObjectDetection,
)
from detrelay.heads.convert.conversion import translate
from detrelay.heads.convert.transformers_folder import to_official_names
from detrelay.heads.stageinteractor.config import StageInteractorConfig
from detrelay.heads.stageinteractor.head import StageInteractorHead

Action = Callable[[], object]

_STRIDES = (4, 8, 16, 32)
_CLASSES = 91
_OBJECTS = 7  # the average of a COCO image


def stageinteractor_decoder(height: int, width: int, queries: int, bfloat16: bool) -> Action:
    """A pass of the StageInteractor decoder over the features of one image."""
    torch.manual_seed(0)
    head = StageInteractorHead(StageInteractorConfig(num_queries=queries)).eval()
    pyramid = make_pyramid(height, width)

    def action() -> object:
        precision = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
        with torch.no_grad(), precision:
            return head(pyramid)

    return action


def make_pyramid(height: int, width: int) -> FeaturePyramid:
    """Random features of one image, laid out channels-last as the neck returns them."""
    shapes = [(height // stride, width // stride) for stride in _STRIDES]
    return FeaturePyramid(
        levels=tuple(
            torch.randn(1, 256, *shape).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        ),
        strides=_STRIDES,
        valid=tuple(torch.ones(1, *shape, dtype=torch.bool) for shape in shapes),
        image_sizes=torch.tensor([[height, width]]),
    )


def deformable_detr(height: int, width: int, train: bool) -> Action:
    """Deformable DETR (base), ours: a forward pass, or one with losses and gradients."""
    official, _ = to_official_names(make_transformers_model(train=False).state_dict())
    config = DeformableDetrConfig(num_labels=_CLASSES, dropout=0)
    model = DeformableDetrForObjectDetection(config)
    model.load_state_dict(translate(official, config).state)
    return our_action(model, height, width, train)


def deformable_detr_of_transformers(height: int, width: int, train: bool) -> Action:
    """The same with the model and the losses of transformers, and the same weights."""
    model = make_transformers_model(train)
    labels = make_labels()
    return make_action(
        model, make_image(height, width), lambda x: model(x, labels=labels).loss, train
    )


def dino(height: int, width: int, train: bool) -> Action:
    """DINO, 4-scale: a forward pass, or one with denoising, losses and gradients."""
    torch.manual_seed(0)
    model = DinoForObjectDetection(DinoConfig(num_labels=_CLASSES))
    return our_action(model, height, width, train)


def whole_detector(
    name: str, height: int, width: int, options: dict[str, int], folded: bool
) -> Action:
    """A detector with a ResNet-50 from image to boxes."""
    torch.manual_seed(0)
    entry = HEADS[name]
    model = entry.model(entry.config(backbone_name="resnet50", num_labels=_CLASSES, **options))
    if not folded:  # a module with a hook is not left out
        for module in model.backbone.modules():
            module.register_forward_hook(lambda *_: None)
    return our_action(model, height, width, False)


def our_action(model: DetectorForObjectDetection, height: int, width: int, train: bool) -> Action:
    """A forward pass of one of our models, or one with losses and gradients."""
    model.train(train)
    if not train:
        model.requires_grad_(False)
    targets = Targets.from_labels(make_labels())
    losses = model.loss_config
    criterion = Criterion(losses.terms(), build_assigners("hungarian", losses))
    return make_action(
        model,
        make_image(height, width),
        lambda x: criterion(model(x, targets=targets).groups, targets).total,
        train,
    )


def make_action(
    model: nn.Module, pixels: Tensor, loss_of: Callable[[Tensor], Tensor], train: bool
) -> Action:
    """A pass without gradients, or one that computes the gradients of a loss."""

    def forward() -> object:
        with torch.no_grad():
            output = model(pixels)
        return output.logits, output.pred_boxes

    def step() -> object:
        model.zero_grad()
        loss = loss_of(pixels)
        loss.backward()
        return loss

    return step if train else forward


def make_transformers_model(train: bool) -> TransformersModel:
    """Deformable DETR of transformers with a ResNet-50, from a fixed seed.

    Its backbone is trained from the second stage on, as ours and as published; with this kind of
    backbone transformers would freeze all of it.
    """
    torch.manual_seed(0)
    config = TransformersConfig(
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        num_labels=_CLASSES,
        auxiliary_loss=True,
        class_cost=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = TransformersModel(config).train(train).requires_grad_(train)
    for name, parameter in model.model.backbone.named_parameters():
        learns = "convolution" in name and "stages." in name and "stages.0." not in name
        parameter.requires_grad_(train and learns)
    return model


def make_image(height: int, width: int) -> Tensor:
    """Noise in place of an image."""
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def make_labels() -> list[dict[str, Tensor]]:
    """Objects of that image."""
    generator = torch.Generator().manual_seed(2)
    boxes = 0.2 + 0.5 * torch.rand(_OBJECTS, 4, generator=generator)
    return [
        {"class_labels": torch.randint(_CLASSES, (_OBJECTS,), generator=generator), "boxes": boxes}
    ]
