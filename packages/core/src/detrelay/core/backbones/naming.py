"""Convert backbone weights between other projects' names and ours.

Names after the first part, such as "backbone.": ResNets of torchvision, mmdetection and
transformers; Swin transformers of their authors, mmdetection, torchvision and transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detrelay.core.backbones import RESNETS, SWINS, build_backbone
from detrelay.core.weights.key_table import KeyTable

State = dict[str, Tensor]

_INDEX = {r"relative_position_index$": "table of constants, rebuilt"}
_MASK = {r"attn_mask$": "table of constants, rebuilt"}
_PACKED = re.compile(r"(.*\.)qkv\.(weight|bias)$")
_PART = re.compile(r"(.*\.)(q|k|v)\.(weight|bias)$")
_MERGING = re.compile(r"downsample\.(norm|reduction)\.(weight|bias)$")


@dataclass(frozen=True)
class Naming:
    """How one project stores a kind of backbone.

    Attributes:
        kind: "resnet" or "swin".
        telltale: a parameter that all files of the kind have and others lack.
        table: its names and ours.
        dropped: patterns of names that affect no output, with the reason.
        packs_attention: queries, keys and values are one tensor, `qkv`.
        interleaves_merging: where four tokens are merged, channels are ordered channel by channel
            instead of token by token.
    """

    kind: str
    telltale: str
    table: KeyTable
    dropped: Mapping[str, str] = field(default_factory=dict)
    packs_attention: bool = False
    interleaves_merging: bool = False

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, dict[str, str], dict[str, str]]:
        """Translate a backbone's weights.

        Args:
            state: under their names, without the prefix of the backbone.

        Returns:
            Our state; the entry of `state` that each of its entries comes from; and the entries
            that were left out, with the reason.

        Raises:
            ValueError: a name is unknown.
        """
        ours: State = {}
        sources: dict[str, str] = {}
        dropped: dict[str, str] = {}
        for key, value in state.items():
            reason = next((why for what, why in self.dropped.items() if re.search(what, key)), None)
            if reason is not None:
                dropped[key] = reason
                continue
            for part, tensor in self._parts(key, value).items():
                name = self.table.ours(part)
                if name is None:
                    raise ValueError(f"{key}: not a weight of such a {self.kind}")
                ours[name], sources[name] = tensor, key
        return ours, sources, dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """The inverse of `to_ours`, without the entries that it leaves out.

        Raises:
            ValueError: a name is not one of ours.
        """
        theirs: State = {}
        for name, value in state.items():
            key = self.table.theirs(name)
            if key is None:
                raise ValueError(f"{name}: not a weight of a {self.kind} backbone")
            theirs[key] = value
        if self.interleaves_merging:
            theirs = {key: _interleaved(key, value) for key, value in theirs.items()}
        return _with_indices(_packed(theirs)) if self.packs_attention else theirs

    def _parts(self, key: str, value: Tensor) -> State:
        """One entry in the table's layout: attention split, merging token by token."""
        if self.packs_attention and (match := _PACKED.match(key)):
            parts = zip("qkv", value.chunk(3), strict=True)
            # copies: tensors in a file must not share memory
            return {f"{match[1]}{part}.{match[2]}": tensor.clone() for part, tensor in parts}
        if self.interleaves_merging and _MERGING.search(key):
            # the four tokens are ordered row by row there, column by column here
            tokens = value.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]
            return {key: tokens.flatten(-2)}
        return {key: value}


def _interleaved(key: str, value: Tensor) -> Tensor:
    if not _MERGING.search(key):
        return value
    return value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


def _packed(state: State) -> State:
    packed: State = {}
    for key, value in state.items():
        match = _PART.match(key)
        if match is None:
            packed[key] = value
        elif match[2] == "q":
            parts = [state[f"{match[1]}{part}.{match[3]}"] for part in "qkv"]
            packed[f"{match[1]}qkv.{match[3]}"] = torch.cat(parts)
    return packed


def _with_indices(state: State) -> State:
    """Add to each table of relative positions the row that a pair of tokens reads."""
    indices: State = {}
    for key, table in state.items():
        if key.endswith("relative_position_bias_table"):
            window = (math.isqrt(len(table)) + 1) // 2
            row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
            steps = (row[:, None] - row) * (2 * window - 1) + column[:, None] - column
            name = key.replace("relative_position_bias_table", "relative_position_index")
            indices[name] = steps - steps.min()
    return state | indices


def _transformers_resnet() -> KeyTable:
    rows = [
        ("embedder.embedder.convolution.", "conv1."),
        ("embedder.embedder.normalization.", "bn1."),
    ]
    for stage in range(4):
        theirs, ours = f"encoder.stages.{stage}.layers.{{}}.", f"layer{stage + 1}.{{}}."
        rows += [
            (f"{theirs}shortcut.convolution.", f"{ours}downsample.0."),
            (f"{theirs}shortcut.normalization.", f"{ours}downsample.1."),
        ]
        for index in range(3):
            layer = f"{theirs}layer.{index}."
            rows += [
                (f"{layer}convolution.", f"{ours}conv{index + 1}."),
                (f"{layer}normalization.", f"{ours}bn{index + 1}."),
            ]
    return KeyTable(*rows)


# a Swin block: norms, position table, attention, feed-forward
_BLOCK = (
    *("layernorm_before.", "layernorm_after."),
    "attention.relative_position_bias.relative_position_bias_table",
    *("attention.q_proj.", "attention.k_proj.", "attention.v_proj.", "attention.o_proj."),
    *("mlp.fc1.", "mlp.fc2."),
)
_TRANSFORMERS_4_BLOCK = (
    *("layernorm_before.", "layernorm_after.", "attention.self.relative_position_bias_table"),
    *("attention.self.query.", "attention.self.key.", "attention.self.value."),
    *("attention.output.dense.", "intermediate.dense.", "output.dense."),
)
_ATTENTION = ("relative_position_bias_table", "q.", "k.", "v.", "proj.")
_AUTHORS_BLOCK = ("norm1.", "norm2.", *(f"attn.{a}" for a in _ATTENTION), "mlp.fc1.", "mlp.fc2.")
_TORCHVISION_BLOCK = (*_AUTHORS_BLOCK[:-2], "mlp.0.", "mlp.3.")
_MMDETECTION_BLOCK = (
    *("norm1.", "norm2.", *(f"attn.w_msa.{a}" for a in _ATTENTION)),
    *("ffn.layers.0.0.", "ffn.layers.1."),
)
_SWIN = "network.swin."


def _swin_table(
    embedding: tuple[str, str],
    stages: tuple[str, ...],
    merging: tuple[str, ...],
    block: tuple[str, ...],
    maps: tuple[str, ...],
) -> KeyTable:
    """Rows of a Swin transformer.

    Args:
        embedding: their names of the patches' convolution and norm.
        stages: prefix of the blocks of each stage.
        merging: the layer that follows each stage.
        block: the name of each part of `_BLOCK`.
        maps: the norm of each stage's map.
    """
    ours = f"{_SWIN}encoder.layers."
    rows = [
        (embedding[0], f"{_SWIN}embeddings.patch_embeddings.projection."),
        (embedding[1], f"{_SWIN}embeddings.norm."),
    ]
    for stage in range(4):
        rows += [
            (f"{stages[stage]}{{}}.{theirs}", f"{ours}{stage}.blocks.{{}}.{name}")
            for theirs, name in zip(block, _BLOCK, strict=True)
        ]
        rows.append((merging[stage], f"{ours}{stage}.downsample."))
        rows.append((maps[stage], f"network.hidden_states_norms.stage{stage + 1}."))
    return KeyTable(*rows)


def _numbered(beginning: str, end: str) -> tuple[str, ...]:
    return tuple(f"{beginning}{stage}.{end}" for stage in range(4))


def _transformers_swin(block: tuple[str, ...]) -> KeyTable:
    return _swin_table(
        ("embeddings.patch_embeddings.projection.", "embeddings.norm."),
        _numbered("encoder.layers.", "blocks."),
        _numbered("encoder.layers.", "downsample."),
        block,
        tuple(f"hidden_states_norms.stage{stage}." for stage in range(1, 5)),
    )


_MAP_NORMS = ("norm0.", "norm1.", "norm2.", "norm3.")
_CLASSIFIER = "of the classifier"
NAMINGS = {
    "torchvision_resnet": Naming(
        "resnet",
        "layer1.0.conv1.weight",
        KeyTable(
            ("layer{}.{}.conv2_offset.", "layer{}.{}.conv2.conv_offset."),  # old mmdetection
            *[(name, name) for name in ("conv1.", "bn1.", "layer{}.")],
        ),
        {r"^fc\.": _CLASSIFIER},
    ),
    "transformers_resnet": Naming(
        "resnet",
        "embedder.embedder.convolution.weight",
        _transformers_resnet(),
        {r"^classifier\.": _CLASSIFIER},
    ),
    "swin": Naming(
        "swin",
        "patch_embed.proj.weight",
        _swin_table(
            ("patch_embed.proj.", "patch_embed.norm."),
            _numbered("layers.", "blocks."),
            _numbered("layers.", "downsample."),
            _AUTHORS_BLOCK,
            _MAP_NORMS,
        ),
        {**_INDEX, **_MASK, r"^(norm|head)\.": _CLASSIFIER},
        packs_attention=True,
    ),
    "mmdetection_swin": Naming(
        "swin",
        "patch_embed.projection.weight",
        _swin_table(
            ("patch_embed.projection.", "patch_embed.norm."),
            _numbered("stages.", "blocks."),
            _numbered("stages.", "downsample."),
            _MMDETECTION_BLOCK,
            _MAP_NORMS,
        ),
        _INDEX,
        packs_attention=True,
        interleaves_merging=True,
    ),
    "torchvision_swin": Naming(
        "swin",
        "features.0.0.weight",
        _swin_table(
            ("features.0.0.", "features.0.2."),
            ("features.1.", "features.3.", "features.5.", "features.7."),
            ("features.2.", "features.4.", "features.6.", "features.8."),
            _TORCHVISION_BLOCK,
            _MAP_NORMS,
        ),
        {**_INDEX, r"^(norm|head)\.": _CLASSIFIER},
        packs_attention=True,
    ),
    "transformers_swin": Naming(
        "swin",
        "encoder.layers.0.blocks.0.attention.q_proj.weight",
        _transformers_swin(_BLOCK),
        {**_INDEX, r"^(layernorm|classifier)\.": _CLASSIFIER},
    ),
    "transformers_4_swin": Naming(
        "swin",
        "encoder.layers.0.blocks.0.attention.self.query.weight",
        _transformers_swin(_TRANSFORMERS_4_BLOCK),
        {**_INDEX, r"^(layernorm|classifier)\.": _CLASSIFIER},
    ),
}


def find_naming(state: Mapping[str, Tensor]) -> tuple[Naming, str]:
    """The naming of these backbone weights, and the prefix of their names.

    Weights of a whole detector are fine: entries without that prefix belong to its other parts.

    Raises:
        ValueError: no backbone is known by these names.
    """
    for naming in NAMINGS.values():
        ends = [key for key in state if f".{key}".endswith(f".{naming.telltale}")]
        if ends:
            return naming, min(ends, key=len).removesuffix(naming.telltale)
    raise ValueError(
        f"no backbone is known by these names, such as {', '.join(sorted(state)[:3])}; expected a "
        f"ResNet of torchvision, mmdetection or transformers, or a Swin transformer of its "
        f"authors, torchvision, mmdetection or transformers"
    )


def find_backbone(state: Mapping[str, Tensor]) -> str:
    """The name of weights under our names, inferred from their shapes.

    Raises:
        ValueError: none has these shapes.
    """
    found = {key: value.shape for key, value in state.items() if not _may_differ(key)}
    swin = any(key.startswith("network.") for key in found)
    for name in SWINS if swin else RESNETS:
        with torch.device("meta"):
            backbone = build_backbone(name, "eval", 0)
        shapes = {key: v.shape for key, v in backbone.state_dict().items() if not _may_differ(key)}
        if shapes == found:
            return name
    raise ValueError(f"a backbone of other sizes than any of {', '.join([*RESNETS, *SWINS])}")


def _may_differ(name: str) -> bool:
    return is_optional(name) and "conv_offset." not in name


def is_optional(name: str) -> bool:
    """Whether weights may lack an entry of a backbone.

    Frozen norms do not count batches; classifiers have neither norms on maps nor offsets.
    """
    return (
        name.endswith("num_batches_tracked")
        or "hidden_states_norms." in name
        or "conv_offset." in name
    )
