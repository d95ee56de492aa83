"""Swin transformers of the transformers library, with a norm on every map that is returned."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import SwinBackbone as SwinNetwork
from transformers import SwinConfig

from detrelay.core.backbones.base import Backbone, stage_maps


class SwinSizes(NamedTuple):
    """The sizes in which Swin transformers differ.

    Attributes:
        width: channels of the first stage; doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window: side of the attention windows, tokens.
    """

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int


# Liu et al., Swin Transformer, ICCV 2021; base and large as pre-trained on 384 pixels
SWINS = {
    "swin_t": SwinSizes(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_s": SwinSizes(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_b": SwinSizes(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_l": SwinSizes(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class _Config(SwinConfig):
    # transformers saves parameters of "swin" models under older names; a detector's files use the
    # names of its state dict
    model_type = "detrelay_swin"


class _Network(SwinNetwork):
    config: _Config


class SwinBackbone(Backbone):
    """A Swin transformer without its classifier; parameter names are those of transformers.

    It has no batch norm, so the norm setting does not apply.

    Args:
        name: one of `SWINS`.
        frozen_stages: number of stages that are not trained, including the patch embedding.
        num_stages: how many stages there are; fewer than four omit the last ones.
        num_maps: how many maps are returned, counted from the last stage; None for all.
        drop_path: chance in training that the last block is skipped; rises linearly from 0 at
            the first block.
    """

    def __init__(
        self,
        name: str,
        frozen_stages: int,
        num_stages: int = 4,
        num_maps: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        sizes = SWINS[name]
        widths = [sizes.width << stage for stage in range(num_stages)]
        super().__init__(name, *stage_maps(widths, num_maps))
        first = num_stages - len(self.channels)
        config = _Config(
            embed_dim=sizes.width,
            depths=sizes.depths[:num_stages],
            num_heads=sizes.num_heads[:num_stages],
            window_size=sizes.window,
            drop_path_rate=drop_path,
        )
        config.out_features = [f"stage{stage + 1}" for stage in range(first, num_stages)]
        self.network = _Network(config)
        # belongs to the classifier, unused here
        self.network.swin.layernorm = nn.Identity()  # type: ignore[assignment]
        self.frozen_stages = frozen_stages
        self.freeze()

    def freeze(self) -> None:
        """Freeze the patch embedding and the first stages as set."""
        if self.frozen_stages:
            self.network.swin.embeddings.requires_grad_(False)
            for stage in self.network.swin.encoder.layers[: self.frozen_stages]:
                stage.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one [B, channels[i], H / strides[i], ...] per map."""
        return tuple(self.network(pixel_values).feature_maps)
