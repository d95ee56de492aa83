"""Pre- and post-processing as parts of an ONNX graph: an image in, detections out.

The image is resized by two matrix products whose entries are the weights of the triangle filter
that Pillow and torchvision average with when they make an image smaller. So every runtime resizes
alike, whether its own operator knows this filter or not.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from detrelay.core.export.pixels import PixelSettings

NAME = "with_processing"
_BILINEAR = 2  # Pillow's number
_TOP_K = 100


def add_processing(source: Path, target: Path, settings: PixelSettings) -> None:
    """Write an ONNX file that detects in one image.

    Its input is `image` uint8 [H, W, 3]; its outputs are the best detections, best first: `scores`
    float32 [n], `labels` int64 [n] and `boxes` float32 [n, 4], xyxy in pixels of the image, cut to
    it. n is 100, or all pairs of a query and a class if there are fewer.

    Args:
        source: the detector's ONNX file.
        target: the file to write.
        settings: what images go through.

    Raises:
        ValueError: the settings ask for what the graph does not do.
    """
    check_processing(settings)
    onnx = importlib.import_module("onnx")
    compose = importlib.import_module("onnx.compose")
    detector = onnx.load(source)
    opset = next(entry.version for entry in detector.opset_import if not entry.domain)
    head = f'<ir_version: {detector.ir_version}, opset_import: ["" : {opset}]>\n'
    before = _named(compose, onnx.parser.parse_model(head + _before(settings)), "before_")
    after = _named(compose, onnx.parser.parse_model(head + _AFTER), "after_")
    first = compose.merge_models(
        before,
        _named(compose, _plain(detector), "detector_"),
        io_map=[("pixel_values", "pixel_values"), ("pixel_mask", "pixel_mask")],
    )
    pairs = [(name, name) for name in ("logits", "pred_boxes", "sides")]
    onnx.save(compose.merge_models(first, after, io_map=pairs), target)


def check_processing(settings: PixelSettings) -> None:
    """Refuse settings that the graph cannot follow.

    Raises:
        ValueError: NMS, or resizing by another filter than the bilinear one.
    """
    if settings.nms_iou_threshold is not None:
        raise ValueError(
            "the image processor's nms_iou_threshold is not done inside the graph; export without "
            "--with-processing, or set it to null in preprocessor_config.json"
        )
    if settings.resample not in (None, _BILINEAR):
        raise ValueError(
            f"inside the graph images are resized bilinearly (Pillow's filter {_BILINEAR}), the "
            f"image processor has filter {settings.resample}; export without --with-processing"
        )


def _named(compose: Any, model: Any, prefix: str) -> Any:
    """A model whose inner names cannot be those of its neighbours."""
    return compose.add_prefix(model, prefix, rename_inputs=False, rename_outputs=False)


def _plain(model: Any) -> Any:
    """The detector without what its neighbours could not be joined to."""
    kept = [entry for entry in model.opset_import if not entry.domain]
    domains = {node.domain for node in model.graph.node}
    assert domains <= {""}, domains
    del model.opset_import[:], model.functions[:], model.metadata_props[:]
    model.opset_import.extend(kept)
    return model


def _before(settings: PixelSettings) -> str:
    """From `image` to `pixel_values` [1, 3, H, W], `pixel_mask` [1, H, W] and `sides` [2]."""
    size = ""
    if settings.resample is None:
        size = "new_high = Identity (high)\n new_wide = Identity (wide)\n"
    elif settings.shortest_edge:
        size = _EDGES.format(
            shortest=settings.shortest_edge, longest=settings.longest_edge or 2**31
        )
    else:
        size = _FIXED.format(height=settings.height, width=settings.width)
    return _BEFORE.format(
        size=size,
        by_high=_WEIGHTS.format(axis="high"),
        by_wide=_WEIGHTS.format(axis="wide"),
        mean=_numbers(value / settings.scale for value in settings.mean),
        std=_numbers(value / settings.scale for value in settings.std),
        divisor=settings.pad_size_divisor,
    )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.9g}" for value in values)


# sides by `resized_shape`, in whole numbers but for one rounding
_EDGES = """
  wanted = Constant <value_int = {shortest}> ()
  longest = Constant <value_int = {longest}> ()
  short = Min (high, wide)
  long = Max (high, wide)
  reach = Mul (long, wanted)
  limit = Mul (longest, short)
  beyond = Greater (reach, limit)
  limit_float = Cast <to = 11> (limit)
  long_float = Cast <to = 11> (long)
  ratio = Div (limit_float, long_float)
  nearest = Round (ratio)
  whole = Cast <to = 7> (nearest)
  least = Max (whole, one)
  side = Where (beyond, least, wanted)
  product = Mul (side, long)
  quotient = Div (product, short)
  unchanged = Equal (short, side)
  reached = Where (unchanged, long, quotient)
  cut = Min (reached, longest)
  sliver = Equal (side, one)
  other = Where (sliver, cut, reached)
  upright = Greater (high, wide)
  new_high = Where (upright, other, side)
  new_wide = Where (upright, side, other)
"""

_FIXED = """
  new_high = Constant <value_int = {height}> ()
  new_wide = Constant <value_int = {width}> ()
"""

# [new, old]: how much of each old row goes into each new one
_WEIGHTS = """
  {axis}_old = Cast <to = 1> ({axis})
  {axis}_new = Cast <to = 1> (new_{axis})
  {axis}_scale = Div ({axis}_old, {axis}_new)
  {axis}_reach = Max ({axis}_scale, one_float)
  {axis}_range = Range (zero, new_{axis}, one)
  {axis}_number = Cast <to = 1> ({axis}_range)
  {axis}_middle = Add ({axis}_number, half)
  {axis}_flat = Mul ({axis}_middle, {axis}_scale)
  {axis}_centre = Unsqueeze ({axis}_flat, last)
  {axis}_cells = Range (zero, {axis}, one)
  {axis}_cell = Cast <to = 1> ({axis}_cells)
  {axis}_at = Add ({axis}_cell, half)
  {axis}_apart = Sub ({axis}_at, {axis}_centre)
  {axis}_far = Abs ({axis}_apart)
  {axis}_share = Div ({axis}_far, {axis}_reach)
  {axis}_near = Sub (one_float, {axis}_share)
  {axis}_weight = Relu ({axis}_near)
  {axis}_sum = ReduceSum <keepdims = 1> ({axis}_weight, last)
  {axis}_by = Div ({axis}_weight, {axis}_sum)
"""

_BEFORE = """
before (uint8[height, width, 3] image)
  => (float[1, 3, padded_height, padded_width] pixel_values,
      int64[1, padded_height, padded_width] pixel_mask, int64[2] sides) {{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  last = Constant <value_ints = [1]> ()
  first = Constant <value_ints = [0]> ()
  half = Constant <value_float = 0.5> ()
  one_float = Constant <value_float = 1.0> ()
  white = Constant <value_float = 255.0> ()
  black = Constant <value_float = 0.0> ()
  sides = Shape <start = 0, end = 2> (image)
  high = Gather <axis = 0> (sides, zero)
  wide = Gather <axis = 0> (sides, one)
  {size}
  {by_high}
  {by_wide}
  floats = Cast <to = 1> (image)
  planes = Transpose <perm = [2, 0, 1]> (floats)
  wide_turned = Transpose <perm = [1, 0]> (wide_by)
  lines = MatMul (planes, wide_turned)
  line_halves = Add (lines, half)
  line_levels = Floor (line_halves)
  blended = MatMul (high_by, line_levels)
  level_halves = Add (blended, half)
  levels = Floor (level_halves)
  resized = Clip (levels, black, white)
  mean = Constant <value = float[3, 1, 1] {{{mean}}}> ()
  std = Constant <value = float[3, 1, 1] {{{std}}}> ()
  centred = Sub (resized, mean)
  normalised = Div (centred, std)
  divisor = Constant <value_ints = [{divisor}]> ()
  before_divisor = Sub (divisor, last)
  new_high_one = Unsqueeze (new_high, first)
  new_wide_one = Unsqueeze (new_wide, first)
  new_sides = Concat <axis = 0> (new_high_one, new_wide_one)
  reaching = Add (new_sides, before_divisor)
  times = Div (reaching, divisor)
  padded = Mul (times, divisor)
  amount = Sub (padded, new_sides)
  none = Constant <value_ints = [0, 0, 0, 0]> ()
  pads = Concat <axis = 0> (none, amount)
  padded_planes = Pad (normalised, pads, black)
  pixel_values = Unsqueeze (padded_planes, first)
  mask_shape = Concat <axis = 0> (last, new_sides)
  real = Expand (last, mask_shape)
  pixel_mask = Pad (real, pads, zero)
}}
"""

_AFTER = f"""
after (float[1, queries, classes] logits, float[1, queries, 4] pred_boxes, int64[2] sides)
  => (float[n] scores, int64[n] labels, float[n, 4] boxes) {{
  first = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  two = Constant <value_int = 2> ()
  most = Constant <value_int = {_TOP_K}> ()
  black = Constant <value_float = 0.0> ()
  one_float = Constant <value_float = 1.0> ()
  shape = Shape (logits)
  classes = Gather <axis = 0> (shape, two)
  pairs = Size (logits)
  count = Min (pairs, most)
  counts = Unsqueeze (count, first)
  probabilities = Sigmoid (logits)
  flat = Reshape (probabilities, any)
  scores, index = TopK <axis = 0> (flat, counts)
  labels = Mod (index, classes)
  query = Div (index, classes)
  of_image = Squeeze (pred_boxes, first)
  chosen = Gather <axis = 0> (of_image, query)
  halves = Constant <value_ints = [2, 2]> ()
  centre, extent = Split <axis = 1> (chosen, halves)
  two_float = Add (one_float, one_float)
  reach = Div (extent, two_float)
  low = Sub (centre, reach)
  far = Add (centre, reach)
  corners = Concat <axis = 1> (low, far)
  inside = Clip (corners, black, one_float)
  order = Constant <value_ints = [1, 0, 1, 0]> ()
  units = Gather <axis = 0> (sides, order)
  units_float = Cast <to = 1> (units)
  boxes = Mul (inside, units_float)
}}
"""
