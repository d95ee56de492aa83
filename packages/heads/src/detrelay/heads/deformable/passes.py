"""Decoder passes: what a deformable decoder refines next to its own queries during training.

A pass is a set of queries of its own, hidden from the others by an attention mask (denoising,
hybrid matching, query groups), or another run of the decoder's own queries (without self-attention,
or recollected from earlier stages). Each becomes a `StageGroup`; in evaluation only the decoder's
own pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from detrelay.core.structures import GroupFacts, Pairs, StageGroup, StagePrediction
from detrelay.heads.deformable.layers import (
    DecoderLayer,
    DeformableConfig,
    ReadFirstDecoderLayer,
    TokenGrid,
)
from detrelay.heads.query_sets import DECODER, RECOLLECTED

ALONE, BRANCH = "no_self_attention", "one_to_many"
Memory = tuple[Tensor, TokenGrid]


@strict
class PassesConfig(DeformableConfig):
    """Configuration of the additional passes that a decoder can train with.

    Attributes:
        without_self_attention: a second run of the same queries and layers without self-attention,
            stage group "no_self_attention" (DAC-DETR). The references of its stages are the boxes
            that the decoder's own run predicts for the same queries, by which DAC-DETR assigns.
        one_to_many_branch: layers run cross-attention before self-attention, and also predict from
            what lies between, stage group "one_to_many" (MS-DETR). It changes the layers, so
            weights trained without it do not fit.

    Reference:
        Hu et al. (DAC-DETR), NeurIPS 2023; Zhao et al. (MS-DETR), CVPR 2024.
    """

    model_type = "detrelay_passes"

    without_self_attention: bool = False
    one_to_many_branch: bool = False

    def validate_architecture(self) -> None:
        """Reject passes that cannot be combined."""
        super().validate_architecture()
        if self.without_self_attention and self.one_to_many_branch:
            raise ValueError(
                "without_self_attention runs layers that begin with self-attention, which those of "
                "one_to_many_branch do not; switch one of them off"
            )

    @property
    def pass_groups(self) -> tuple[GroupFacts, ...]:
        """The stage groups that training adds to those of decoder and head."""
        runs = {ALONE: self.without_self_attention, BRANCH: self.one_to_many_branch}
        added = (
            # the run without self-attention reports the decoder's boxes instead of its own
            GroupFacts(name, slots=DECODER, references=name == ALONE)
            for name, on in runs.items()
            if on
        )
        return (*super().pass_groups, *added)


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What one stage passes to the next.

    Attributes:
        queries: [B, Q, C].
        references: [B, Q, 2] points or [B, Q, 4] boxes in [0, 1] of the unpadded image, without
            gradient.
        position: [B, Q, C], where the position code is the same for all stages; None where a head
            makes it from the references.
        supervised: [B, Q, 4], the references with the gradient of the stage before; None where a
            head does not look forward twice.
    """

    queries: Tensor
    references: Tensor
    position: Tensor | None = None
    supervised: Tensor | None = None

    def rows(self, rows: slice) -> DecoderState:
        """The queries of a slice."""
        position, supervised = self.position, self.supervised
        return DecoderState(
            self.queries[:, rows],
            self.references[:, rows],
            None if position is None else position[:, rows],
            None if supervised is None else supervised[:, rows],
        )


def side_by_side(states: Sequence[DecoderState]) -> DecoderState:
    """All queries of several states in one."""
    if len(states) == 1:
        return states[0]

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present, dim=1) if len(present) == len(parts) else None

    return DecoderState(
        torch.cat([state.queries for state in states], dim=1),
        torch.cat([state.references for state in states], dim=1),
        joined([state.position for state in states]),
        joined([state.supervised for state in states]),
    )


@dataclass(frozen=True, slots=True)
class QuerySet:
    """Queries that a decoder refines next to others, as a stage group of their own.

    Attributes:
        name: of the stage group.
        start: the queries before the first stage.
        known_pairs: see `StageGroup`.
        sees: other sets that its queries may attend to, in addition to their own.
        parts: equal parts, in the order of the queries, that do not see each other.
    """

    name: str
    start: DecoderState
    known_pairs: Pairs | None = None
    sees: tuple[str, ...] = ()
    parts: int = 1

    def __len__(self) -> int:
        return self.start.queries.shape[1]


def attention_mask(sets: Sequence[QuerySet]) -> Tensor | None:
    """Bool [Q, Q] over the queries of all sets, True where the row must not attend to the column.

    None if all attend to all.
    """
    if len(sets) == 1 and sets[0].parts == 1:
        return None
    device = sets[0].start.queries.device
    rows = [[_hidden(row, column, device) for column in sets] for row in sets]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _hidden(row: QuerySet, column: QuerySet, device: torch.device) -> Tensor:
    shape = (len(row), len(column))
    if row is column:
        part = torch.arange(len(row), device=device) // max(len(row) // row.parts, 1)
        return part[:, None] != part
    return torch.full(shape, column.name not in row.sees, dtype=torch.bool, device=device)


def decoder_layers(config: PassesConfig) -> nn.ModuleList:
    """The layers of a decoder, of the kind that its passes need."""
    kind = ReadFirstDecoderLayer if config.one_to_many_branch else DecoderLayer
    return nn.ModuleList(kind(config) for _ in range(config.decoder_layers))


class DecoderHead(nn.Module):
    """A head with decoder layers that can run passes.

    Subclasses build `layers` and say how a stage places its queries and what it predicts.

    Args:
        config: names the passes.
    """

    layers: nn.ModuleList

    def __init__(self, config: PassesConfig) -> None:
        super().__init__()
        self.hidden_sets = config.hidden_sets
        self.without_self_attention = config.without_self_attention
        self.recollect_queries = config.recollect_queries

    def place(self, state: DecoderState, memory: Memory) -> Tensor:
        """Position code [B, Q, C] that a stage adds to queries and keys."""
        raise NotImplementedError

    def predict(
        self, index: int, queries: Tensor, state: DecoderState
    ) -> tuple[StagePrediction, DecoderState]:
        """What stage `index` predicts from refined queries, and the state for the next one."""
        raise NotImplementedError

    def decode(self, sets: Sequence[QuerySet], memory: Memory) -> tuple[StageGroup, ...]:
        """Run all stages over the query sets, and in training the other passes.

        Args:
            sets: query sets in the order in which they lie side by side, "decoder" among them.
            memory: what the encoder returned.

        Returns:
            A group for each set, the decoder's first, then those of the other passes.
        """
        mask = attention_mask(sets)
        state = side_by_side([queries.start for queries in sets])
        stages: list[StagePrediction] = []
        tapped: list[StagePrediction] = []
        states = [state]
        for index, layer in enumerate(self.layers):
            refined, read = layer(
                state.queries, self.place(state, memory), state.references, memory, mask
            )
            if read is not None and self.training:
                tapped.append(self.predict(index, read, state)[0])
            prediction, state = self.predict(index, refined, state)
            stages.append(prediction)
            states.append(state)
        rows = _row_slices(sets)
        groups = [
            StageGroup(
                queries.name,
                tuple(_of_rows(stage, rows[queries.name]) for stage in stages),
                known_pairs=queries.known_pairs,
            )
            for queries in sets
        ]
        groups.sort(key=lambda group: group.name != DECODER)
        if self.training:
            own = rows[DECODER]
            if tapped:
                branch = tuple(_of_rows(stage, own) for stage in tapped)
                groups.append(StageGroup(BRANCH, branch, slots=DECODER))
            own_states = [each.rows(own) for each in states]
            if self.without_self_attention:
                alone = self._without_self_attention(own_states[0], memory)
                alone = tuple(
                    replace(stage, references=primary.boxes.detach())
                    for stage, primary in zip(alone, groups[0].stages, strict=True)
                )
                groups.append(StageGroup(ALONE, alone, slots=DECODER))
            if self.recollect_queries:
                again = self._recollect(own_states, memory)
                groups.append(StageGroup(RECOLLECTED, again, slots=DECODER))
        return tuple(groups)

    def _without_self_attention(
        self, state: DecoderState, memory: Memory
    ) -> tuple[StagePrediction, ...]:
        """The same queries through the same layers; only the first has self-attention.

        Reference:
            Hu et al., NeurIPS 2023, its "C-decoder".
        """
        stages = []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            position = self.place(state, memory)
            queries = state.queries
            if index == 0:
                queries = layer.attend(queries, position)
            queries = layer.ffn(layer.read(queries, position, state.references, memory))
            prediction, state = self.predict(index, queries, state)
            stages.append(prediction)
        return tuple(stages)

    def _recollect(
        self, states: Sequence[DecoderState], memory: Memory
    ) -> tuple[StagePrediction, ...]:
        """Queries that skipped a stage, refined by all later ones: 1, 2, 4, 7, 12 more sets.

        Stage s refines the sets that stage s - 1 has refined, and again those of stage s - 2.

        Args:
            states: of the decoder's own queries before the first stage and after each.
            memory: what the encoder returned.

        Returns:
            A prediction for each set of each stage from the second on.

        Reference:
            Chen et al., CVPR 2023: with the decoder's own, stages refine 1, 2, 3, 5, 8, 13 sets.
        """
        predictions: list[StagePrediction] = []
        refined: list[DecoderState] = []  # the recollected sets after the stage before
        skipping: list[DecoderState] = []  # those after the stage before that one
        for index, layer in enumerate(self.layers):
            if index == 0:
                continue
            entering = [*refined, states[index - 1], *skipping]
            sets = [QuerySet(str(number), state) for number, state in enumerate(entering)]
            state = side_by_side(entering)
            queries, _ = layer(
                state.queries,
                self.place(state, memory),
                state.references,
                memory,
                attention_mask(sets),
            )
            prediction, state = self.predict(index, queries, state)
            rows = list(_row_slices(sets).values())
            predictions += [_of_rows(prediction, part) for part in rows]
            skipping, refined = refined, [state.rows(part) for part in rows]
        return tuple(predictions)


def _row_slices(sets: Sequence[QuerySet]) -> dict[str, slice]:
    """Where each set lies among all queries."""
    slices, start = {}, 0
    for queries in sets:
        slices[queries.name] = slice(start, start + len(queries))
        start += len(queries)
    return slices


def _of_rows(stage: StagePrediction, rows: slice) -> StagePrediction:
    """The queries of a slice, as one stage."""
    references = stage.references
    return replace(
        stage,
        logits=stage.logits[:, rows],
        boxes=stage.boxes[:, rows],
        references=None if references is None else references[:, rows],
    )
