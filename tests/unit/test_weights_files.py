"""Which state dict of a file is taken, and under which names."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from detrelay.core.weights.files import Which, read_weights


def tensors(value: float, prefix: str = "") -> dict[str, Tensor]:
    return OrderedDict({f"{prefix}{name}": torch.full((2,), value) for name in ("a.weight", "b")})


PLAIN, AVERAGE = tensors(1.0), tensors(2.0)


def saved(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "file.pth"
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("content", "average", "plain"),
    [
        ({"model": PLAIN, "ema": AVERAGE}, "ema", "model"),
        ({"model": PLAIN, "ema": {"module": AVERAGE, "updates": 5}}, "ema.module", "model"),
        ({"model": PLAIN, "ema": {"module": AVERAGE}}, "ema.module", "model"),
        ({"model": PLAIN, "ema_model": AVERAGE, "epoch": 3}, "ema_model", "model"),
        ({"model": PLAIN, "model_ema": AVERAGE}, "model_ema", "model"),
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGE}, "state_dict_ema", "state_dict"),
        (
            {"state_dict": AVERAGE, "ema_state_dict": tensors(1.0, "module.")},
            "state_dict",
            "ema_state_dict",
        ),
    ],
)
def test_an_average_is_taken_where_there_is_one(
    content: dict[str, Any], average: str, plain: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, content)
    choices: tuple[tuple[Which | None, float, str, str], ...] = (
        (None, 2.0, average, plain),
        ("average", 2.0, average, plain),
        ("plain", 1.0, plain, average),
    )
    for which, value, place, other in choices:
        weights = read_weights(file, which)
        assert (weights.place, weights.other) == (place, other)
        assert weights.state.keys() == PLAIN.keys()
        assert all(v.eq(value).all() for v in weights.state.values())


@pytest.mark.parametrize("content", [PLAIN, {"model": PLAIN}, {"model": PLAIN, "ema": None}])
def test_what_is_not_there_is_not_taken(content: dict[str, Any], tmp_path: Path) -> None:
    file = saved(tmp_path, content)
    weights = read_weights(file)
    assert (weights.which, weights.other) == ("plain", None)
    assert read_weights(file, "plain").place == weights.place
    with pytest.raises(ValueError, match=r"file.pth: holds no average of the weights"):
        read_weights(file, "average")
    file = saved(tmp_path, {"ema": AVERAGE})
    assert read_weights(file).which == "average"
    with pytest.raises(ValueError, match=r"file.pth: holds no plain weights"):
        read_weights(file, "plain")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_what_wrappers_put_before_all_names_is_cut_off(prefix: str, tmp_path: Path) -> None:
    for content in (tensors(1.0, prefix), {"model": PLAIN, "ema": tensors(1.0, prefix)}):
        assert read_weights(saved(tmp_path, content)).state.keys() == PLAIN.keys()
    file = tmp_path / "file.safetensors"
    save_file(tensors(1.0, prefix), file)
    assert read_weights(file).state.keys() == PLAIN.keys()
    some = {**tensors(1.0, prefix), "c": torch.zeros(1)}
    assert read_weights(saved(tmp_path, some)).state.keys() == some.keys()


def test_the_average_of_torch_is_read(tmp_path: Path) -> None:
    average = AveragedModel(nn.Linear(1, 1))
    weights = read_weights(saved(tmp_path, {"ema": average.state_dict()}))
    assert weights.state.keys() == {"weight", "bias"}
