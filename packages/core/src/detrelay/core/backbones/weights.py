"""Pre-trained weights of backbones."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor

from detrelay.core.backbones import Backbone, ResNetBackbone, SwinBackbone, build_backbone
from detrelay.core.backbones.naming import find_naming, is_optional
from detrelay.core.weights.files import read_weights


def load_backbone_weights(backbone: Backbone, source: str) -> None:
    """Fill a backbone with pre-trained weights.

    Norms of a Swin transformer's maps stay as they are if the weights lack them, as a classifier's
    do.

    Args:
        backbone: filled in place.
        source: "imagenet" (torchvision's weights, downloaded once and cached), "none" (left as it
            is), or a `.pth` / `.safetensors` file under one of the `NAMINGS`; it may be that of a
            whole detector. For backbones of other libraries see their `load_pretrained`.

    Raises:
        OSError: the download failed; says how to continue without a network.
        ValueError: the file is missing, unreadable, or belongs to another network.
    """
    if source == "none":
        return
    if not isinstance(backbone, ResNetBackbone | SwinBackbone):
        backbone.load_pretrained(source)
        return
    theirs = _imagenet_weights(backbone.name) if source == "imagenet" else _read_weights(source)
    try:
        naming, prefix = find_naming(theirs)
        state, _, _ = naming.to_ours(
            {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
        )
    except ValueError as error:
        raise ValueError(f"{source}: not the weights of a {backbone.name}: {error}") from error
    expected = backbone.state_dict()
    with torch.device("meta"):
        whole = build_backbone(backbone.name, "eval", 0).state_dict()
    # stages that this backbone omits
    state = {key: value for key, value in state.items() if key in expected or key not in whole}
    wrong = sorted(
        [key for key in expected if key not in state and not is_optional(key)]
        + [key for key in state if key not in expected or state[key].shape != expected[key].shape]
    )
    if wrong:
        raise ValueError(
            f"{source}: not the weights of a {backbone.name}: {len(wrong)} entries are missing, "
            f"unknown or of another shape, such as {', '.join(wrong[:3])}"
        )
    backbone.load_state_dict(state, strict=False)


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    if name not in torchvision.models.list_models():
        raise ValueError(
            f'torchvision has no weights of {name}; train with backbone weights "none" or the '
            f"path of a local file"
        )
    # V1: the weights the published recipes started from
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"could not download the ImageNet weights of {name} ({error}); put "
            f"{Path(weights.url).name} from {weights.url} into {cache}, or train with backbone "
            f'weights "none" or the path of a local file'
        ) from error


def _read_weights(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f'{source}: no such file; backbone weights are "imagenet", "none" or a local file'
        )
    return read_weights(path).state
