"""Sampling in an ONNX graph a chunk at a time, so that what is read stays in a CPU's cache.

A detector's graph gathers the rows of all samples and then sums them by a matrix product, see
`detrelay.core.ops.traced`. In one piece that writes and reads many times the memory of the maps,
which is what its time goes to. In a loop over chunks onnxruntime and OpenVINO take a fifth to a
third of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from typing import Any

_NUMBERS_READ = 2**17  # of a chunk: half a megabyte
_PRODUCT, _RESHAPE, _GATHER = "MatMul", "Reshape", "Gather"

# sums [N, 1, D] of rows [N * K] of a table [S, D] with shares [N, 1, K], {chunk} at a time
_LOOP = """
<ir_version: 10, opset_import: ["" : {opset}]>
sums (float[S, {dim}] table, {integer}[NK] rows, float[N, 1, {corners}] shares)
  => (float[N, 1, {dim}] sums) {{
  first = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  none = Constant <value_ints = [0, 0, 0, 0]> ()
  chunk = Constant <value_ints = [{chunk}]> ()
  almost = Constant <value_ints = [{almost}]> ()
  row_shape = Constant <value_ints = [-1, {corners}]> ()
  row_chunks = Constant <value_ints = [-1, {chunk}, {corners}]> ()
  share_chunks = Constant <value_ints = [-1, {chunk}, 1, {corners}]> ()
  sum_shape = Constant <value_ints = [-1, 1, {dim}]> ()
  yes = Constant <value = bool {{1}}> ()
  count = Shape <start = 0, end = 1> (shares)
  reaching = Add (count, almost)
  times = Div (reaching, chunk)
  whole = Mul (times, chunk)
  missing = Sub (whole, count)
  row_pads = Concat <axis = 0> (first, first, missing, first)
  share_pads = Concat <axis = 0> (first, first, first, missing, first, first)
  row_lines = Reshape (rows, row_shape)
  row_padded = Pad (row_lines, row_pads)
  row_cut = Reshape (row_padded, row_chunks)
  share_padded = Pad (shares, share_pads)
  share_cut = Reshape (share_padded, share_chunks)
  trips = Squeeze (times, first)
  summed = Loop (trips, yes) <body = each (int64 number, bool going)
      => (bool still, float[{chunk}, 1, {dim}] found) {{
    still = Identity (going)
    row = Gather <axis = 0> (row_cut, number)
    share = Gather <axis = 0> (share_cut, number)
    read = Gather <axis = 0> (table, row)
    found = MatMul (share, read)
  }}>
  joined = Reshape (summed, sum_shape)
  sums = Slice (joined, first, count, first)
}}
"""


def sum_in_chunks(model: Any) -> int:
    """Put the sums of sampled rows of an ONNX model into loops, in place.

    Args:
        model: as `torch.onnx.export` wrote it.

    Returns:
        How many there were.
    """
    onnx = importlib.import_module("onnx")
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    known = (*graph.value_info, *graph.input, *graph.output)
    shapes = {value.name: value.type.tensor_type for value in known}
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    nodes: list[Any] = []
    count = 0
    for node in graph.node:
        gather = _gathered(node, made_by)
        if gather is None:
            nodes.append(node)
            continue
        corners = shapes[node.input[0]].shape.dim[-1].dim_value
        dim = shapes[node.output[0]].shape.dim[-1].dim_value
        assert corners, node.name
        assert dim, node.name
        chunk = max(1, _NUMBERS_READ // (corners * dim))
        integer = shapes[gather.input[1]].elem_type
        text = _LOOP.format(
            opset=opset,
            dim=dim,
            corners=corners,
            chunk=chunk,
            almost=chunk - 1,
            integer="int32" if integer == onnx.TensorProto.INT32 else "int64",
        )
        part = onnx.parser.parse_model(text).graph
        names = {
            "table": gather.input[0],
            "rows": gather.input[1],
            "shares": node.input[0],
            "sums": node.output[0],
        }
        nodes.extend(_renamed(part, names, f"{node.name}_"))
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return count


def sort_nodes(model: Any) -> None:
    """Put the nodes of an ONNX model behind those that they read from, in place.

    onnxruntime's tools sort nodes too, but without a look at what the body of a loop reads.
    """
    graph = model.graph
    nodes = list(graph.node)
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output}
    reads_from = {
        index: {made_by[name] for name in _read(node) if name in made_by}
        for index, node in enumerate(nodes)
    }
    ordered = [nodes[index] for index in TopologicalSorter(reads_from).static_order()]
    del graph.node[:]
    graph.node.extend(ordered)


def _gathered(node: Any, made_by: dict[str, Any]) -> Any | None:
    """The gather whose rows a product sums up, if the node is such a product."""
    if node.op_type != _PRODUCT:
        return None
    shaped = made_by.get(node.input[1])
    if shaped is None or shaped.op_type != _RESHAPE:
        return None
    gather = made_by.get(shaped.input[0])
    return gather if gather is not None and gather.op_type == _GATHER else None


def _renamed(graph: Any, names: dict[str, str], prefix: str) -> Iterator[Any]:
    """The nodes of a graph under other names: those given, and a prefix for the rest."""

    def new(name: str) -> str:
        return names.get(name, prefix + name) if name else name

    for node in graph.node:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        node.name = prefix + node.output[0]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in (*attribute.g.input, *attribute.g.output):
                    value.name = new(value.name)
                inner = list(_renamed(attribute.g, names, prefix))
                assert inner
        yield node


def _drop_unused(graph: Any) -> None:
    """Remove what nothing reads any more."""
    while True:
        read = {name for node in graph.node for name in _read(node)}
        read |= {value.name for value in graph.output}
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(kept)


def _read(node: Any) -> Iterator[str]:
    """Names that a node reads, the nodes in its body included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)
