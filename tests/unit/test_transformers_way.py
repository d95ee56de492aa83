"""What users of transformers expect of a detector: losses by labels, its trainer, LoRA, options."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrImageProcessor,
    Trainer,
    TrainingArguments,
)

from detrelay.apps.build import build_criterion
from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.data.collate import EncodedSample, collate
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.losses import GIoUBoxLoss
from detrelay.core.recipes.recipe import Recipe
from detrelay.core.structures import Targets
from detrelay.heads import HEADS
from factories import make_boxes, small_head_config

NAMES = sorted(HEADS)


def make_model(name: str, **changes: Any) -> DetectorForObjectDetection:
    torch.manual_seed(0)
    return HEADS[name].model(small_head_config(name, **changes))


def make_batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, :, 70:] = 0
    labels = [
        {
            "class_labels": torch.randint(4, (count,), generator=generator),
            "boxes": make_boxes(count, generator=generator),
        }
        for count in (3, 0)
    ]
    pixel_values = torch.randn(2, 3, 64, 96, generator=generator)
    return {"pixel_values": pixel_values, "pixel_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", NAMES)
def test_labels_give_the_loss_of_the_published_criterion(name: str) -> None:
    model, batch = make_model(name).train(), make_batch()
    torch.manual_seed(1)
    output = model(**batch)
    torch.manual_seed(1)
    targets = Targets.from_labels(batch["labels"])
    groups = model(batch["pixel_values"], batch["pixel_mask"], targets).groups
    expected = build_criterion(Recipe(head=name))(groups, targets)
    assert torch.equal(output.loss, expected.total)
    torch.testing.assert_close(output.loss_dict, expected.losses, atol=0, rtol=0)
    assert output[0] is output.loss
    assert output.groups is None
    output.loss.backward()
    assert model.backbone.conv1.weight.grad is not None


def test_evaluation_has_a_loss_too_and_no_unrequested_list() -> None:
    model, batch = make_model("dino").eval(), make_batch()
    output = model(**batch)
    assert set(output) == {"loss", "loss_dict", "logits", "pred_boxes"}
    assert not [key for key in output.loss_dict if key.startswith("denoising")]
    assert set(model(batch["pixel_values"])) == {"logits", "pred_boxes"}


def test_labels_without_an_assigner_for_a_group_are_refused_in_training_only() -> None:
    model, batch = make_model("dino", hybrid_queries=4), make_batch()
    with pytest.raises(ValueError, match=r"no assigner for stage groups hybrid; .* loss_function"):
        model.train()(**batch)
    assert model.eval()(**batch).loss.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_auxiliary_outputs_are_the_stages_before_the_last(name: str) -> None:
    model, batch = make_model(name).train(), make_batch()
    torch.manual_seed(1)
    groups = model(batch["pixel_values"], batch["pixel_mask"]).groups
    torch.manual_seed(1)
    output = model(batch["pixel_values"], batch["pixel_mask"], output_auxiliary=True)
    stages = groups[0].stages
    assert len(output.auxiliary_outputs) == len(stages) - 1
    for found, stage in zip(output.auxiliary_outputs, stages, strict=False):
        assert torch.equal(found["logits"], stage.logits)
        assert torch.equal(found["pred_boxes"], stage.boxes)


def test_another_criterion_replaces_the_published_one() -> None:
    model, batch = make_model("deformable_detr"), make_batch()
    assigners = model.loss_function.assigners  # type: ignore[attr-defined]
    model.loss_function = Criterion([GIoUBoxLoss()], assigners)
    output = model(**batch)
    assert {key.rpartition("/")[2] for key in output.loss_dict} == {"giou"}
    assert model.get_submodule("head") is model.head


def test_a_loss_that_is_a_module_is_used_and_not_saved_with_the_model() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, groups: Any, targets: Targets, image_ids: Any = None) -> CriterionOutput:
            total = self.factor * groups[0].stages[-1].boxes.sum()
            return CriterionOutput(total, {"sum": total}, {})

    model = make_model("stageinteractor")
    keys = set(model.state_dict())
    model.loss_function = Small()
    assert list(model(**make_batch()).loss_dict) == ["sum"]
    assert set(model.state_dict()) == keys


def test_objects_in_two_forms_are_refused() -> None:
    batch = make_batch()
    targets = Targets.from_labels(batch["labels"])
    with pytest.raises(ValueError, match="given twice, as targets and as labels"):
        make_model("stageinteractor")(**batch, targets=targets)


def test_return_dict_false_gives_a_tuple() -> None:
    output = make_model("stageinteractor")(**make_batch(), return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].ndim == 0


class _Images(torch.utils.data.Dataset[EncodedSample]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> EncodedSample:
        batch = make_batch(index)
        return {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0]}


@pytest.mark.parametrize("name", ["stageinteractor", pytest.param("dino", marks=pytest.mark.slow)])
def test_the_trainer_of_transformers_trains_a_head(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=_Images(), eval_dataset=_Images(), data_collator=collate
    )
    before_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 10
    assert all(torch.isfinite(torch.tensor(losses)))
    assert trainer.evaluate()["eval_loss"] < before_loss
    prediction = trainer.predict(_Images()).predictions
    assert [array.shape for array in prediction] == [(4, 8, 4), (4, 8, 4)]
    moved = [
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert any(key.startswith("backbone.") for key in moved)
    assert any(key.startswith("head.") for key in moved)


def test_lora_wraps_a_head_and_trains_next_to_frozen_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make_model("dino", backbone_norm="eval")
    config = peft.LoraConfig(
        r=2, target_modules=["value_proj", "output_proj"], modules_to_save=["classify"]
    )
    model = peft.get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or "classify" in name for name in trained)
    batch = make_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        make_model("dino", backbone_norm="eval"), tmp_path
    ).eval()
    with torch.no_grad():
        ours, theirs = model.eval()(batch["pixel_values"]), again(batch["pixel_values"])
    torch.testing.assert_close(ours.logits, theirs.logits)


@pytest.mark.parametrize(
    "name",
    [
        "stageinteractor",
        "dino",
        pytest.param("deformable_detr", marks=pytest.mark.slow),
        pytest.param("dn_detr", marks=pytest.mark.slow),
    ],
)
def test_activation_checkpointing_keeps_loss_and_gradients(name: str) -> None:
    def run(model: DetectorForObjectDetection) -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(1)
        model.zero_grad()
        batch = make_batch()
        loss = model(**batch | {"pixel_values": batch["pixel_values"].double()}).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    model = make_model(name, backbone_norm="eval").double().train()
    plain = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older name is still the known one
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    saving = run(model)
    torch.testing.assert_close(saving, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(run(model), plain)


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_device_map_change_no_result_and_unknown_attention_is_refused(
    name: str, tmp_path: Path
) -> None:
    make_model(name).save_pretrained(tmp_path)
    pixels = make_batch()["pixel_values"]
    results = []
    for attention, placement in (("eager", {"": "cpu"}), ("sdpa", "auto")):
        model = AutoModelForObjectDetection.from_pretrained(
            tmp_path, attn_implementation=attention, device_map=placement
        )
        assert model.config._attn_implementation == attention
        assert len({p.device for p in model.parameters()}) == 1
        with torch.no_grad():
            results.append(model(pixels.to(model.device)).logits.cpu())
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash"):
        AutoModelForObjectDetection.from_pretrained(
            tmp_path, attn_implementation="flash_attention_2"
        )


@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_that_of_weights_and_scores(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        output = model(**make_batch() | {"pixel_values": make_batch()["pixel_values"].bfloat16()})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32


def test_post_processing_has_the_signature_of_transformers() -> None:
    ours = inspect.signature(DetrelayImageProcessor.post_process_object_detection).parameters
    theirs = inspect.signature(
        DeformableDetrImageProcessor.post_process_object_detection
    ).parameters
    common = list(theirs)[1:]  # beside self
    assert list(ours)[1 : 1 + len(common)] == common
    for name in common[1:]:  # the outputs have no default
        assert ours[name].default == theirs[name].default, name
    assert all(ours[name].default is not inspect.Parameter.empty for name in list(ours)[2:])
