"""Graphs that leave PyTorch: any batch, height and width from one trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from detrelay.core.export.chunks import sort_nodes, sum_in_chunks


def sampling_graph(dim: int, corners: int) -> onnx.ModelProto:
    """Sums [N, 1, D] of rows of a table, as the exporter of torch writes them."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 18]>
    sampling (float[S, {dim}] table, int32[NK] rows, float[N, 1, {corners}] shares)
      => (float[N, 1, {dim}] doubled)
      <float[NK, {dim}] gathered, float[N, {corners}, {dim}] read, float[N, 1, {dim}] sums> {{
      gathered = Gather <axis = 0> (table, rows)
      shape = Constant <value_ints = [-1, {corners}, {dim}]> ()
      read = Reshape (gathered, shape)
      sums = MatMul (shares, read)
      doubled = Add (sums, sums)
    }}
    """
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_sums_in_chunks_equal_sums_at_once(count: int, tmp_path: Path) -> None:
    dim, corners = 32, 64  # 64 sums are a chunk
    graph = sampling_graph(dim, corners)
    generator = np.random.default_rng(0)
    table = generator.standard_normal((50, dim), dtype=np.float32)
    rows = generator.integers(0, 50, count * corners, dtype=np.int32)
    shares = generator.standard_normal((count, 1, corners), dtype=np.float32)
    expected = 2 * shares @ table[rows].reshape(count, corners, dim)
    assert sum_in_chunks(graph) == 1
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Loop") == 1
    assert "MatMul" not in kinds
    assert "Gather" not in kinds
    onnx.checker.check_model(graph)
    onnx.save(graph, tmp_path / "chunks.onnx")
    feed = {"table": table, "rows": rows, "shares": shares}
    session = onnxruntime.InferenceSession(tmp_path / "chunks.onnx")
    assert np.abs(session.run(None, feed)[0] - expected).max() < 1e-4
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(tmp_path / "chunks.onnx"), "CPU", settings)
    assert np.abs(compiled(feed)[0] - expected).max() < 1e-4


def test_other_products_stay_as_they_are() -> None:
    graph = sampling_graph(4, 3)
    graph.graph.node[3].input[1] = "elsewhere"
    before = [node.op_type for node in graph.graph.node]
    assert sum_in_chunks(graph) == 0
    assert [node.op_type for node in graph.graph.node][-2:] == before[-2:]


def test_nodes_are_sorted_by_what_loops_read() -> None:
    graph = sampling_graph(32, 64)
    sum_in_chunks(graph)
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(reversed(nodes))
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(graph)
    sort_nodes(graph)
    onnx.checker.check_model(graph)
    assert len(graph.graph.node) == len(nodes)
