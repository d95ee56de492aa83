"""Any backbone of transformers that `AutoBackbone` knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig

from detrelay.core.backbones.library import LibraryBackbone
from detrelay.core.errors import one_line


class TransformersBackbone(LibraryBackbone):
    """`transformers/MODEL_TYPE`, such as transformers/convnext, transformers/dinov2.

    Its options are fields of that type's config, such as `depths`; the stages to return are chosen
    here.
    """

    library = "transformers"

    def _network(self, options: Mapping[str, Any], indices: Sequence[int] | None) -> nn.Module:
        config = AutoConfig.for_model(self.model, **options)
        for key, value in vars(config).items():
            if isinstance(value, tuple) and not key.startswith("_"):
                setattr(config, key, list(value))  # ConvNeXt takes no tuples, not even its defaults
        # the first name is that of the stem
        names = list(config.stage_names)[1:]
        config.out_features = [
            names[i] for i in (indices if indices is not None else range(len(names)))
        ]
        network: nn.Module = AutoBackbone.from_config(config)
        return network

    def _maps(self, network: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(pixel_values).feature_maps)

    def load_pretrained(self, source: str) -> None:
        """Load the weights of a model of this type.

        Args:
            source: folder of a saved model, or its name on the Hub.

        Raises:
            ValueError: it cannot be loaded, or is of another type or size.
        """
        network: Any = self.network
        try:
            found = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
            if found != self.model:
                raise ValueError(f"it holds a {found}")
            theirs = type(network).from_pretrained(
                source, out_features=list(network.config.out_features), use_safetensors=True
            )
            self._take(theirs.state_dict())
        except Exception as error:  # may come from any library below
            raise ValueError(
                f"{source}: not the weights of a {self.name}: {one_line(error)}"
            ) from error
