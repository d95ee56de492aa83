"""Pictures: sizes, and names that a font cannot draw."""

from __future__ import annotations

import pytest
import torch

from detrelay.apps import drawing
from detrelay.apps.drawing import class_color, draw_boxes, drawable


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((100, 200), (320, 640)),
        ((1, 3000), (1, 3000)),
        ((20_000, 1), (20_000, 1)),
        ((10, 500), (40, 2000)),
        ((700, 900), (700, 900)),
    ],
)
def test_small_images_are_enlarged_but_thin_ones_stay_thin(
    size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    box = torch.tensor([[0.0, 0.0, float(size[1]), float(size[0])]])
    assert draw_boxes(image, box, [0], ["cat 0.50"]).shape[-2:] == drawn
    assert draw_boxes(image, box[:0], [], []).shape[-2:] == drawn


@pytest.fixture
def one_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has only the font of matplotlib."""
    monkeypatch.setattr(drawing, "_font_with", lambda needed: None)
    drawing._say_not_drawn.cache_clear()


def test_names_that_no_font_can_draw_are_said_once(
    one_font: None, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["猫 0.93", "Größe 0.80", "แมว", "🐈 0.70"]
    for _ in range(2):
        shown = [text for _, text in drawable([4, 5, 6, 7], captions)]
        assert shown == ["class 4 0.93", "Größe 0.80", "class 6", "class 7 0.70"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "no font here can draw '猫': it is drawn as class 4",
        "no font here can draw 'แมว': it is drawn as class 6",
        "no font here can draw '🐈': it is drawn as class 7",
    ]
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    box = torch.tensor([[50.0, 50.0, 200.0, 200.0]])
    unnamed, named = (draw_boxes(image, box, [4], [name]) for name in ("", "猫 0.93"))
    assert not torch.equal(unnamed, named)


def test_each_name_gets_a_font_of_the_machine_that_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((usual, _),) = drawable([0], ["cat"])
    characters = {
        usual: frozenset("cat"),
        "chinese.ttf": frozenset("cat猫"),
        "thai.ttf": frozenset("แมว"),
    }
    monkeypatch.setattr(drawing, "_characters", lambda font: characters.get(font, frozenset()))
    entries = [type("Entry", (), {"fname": name}) for name in characters if name != usual]
    monkeypatch.setattr(drawing.font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(drawing, "_scales", lambda font: True)
    drawing._font_with.cache_clear()
    names = ["cat", "猫 cat", "แมว"]
    fonts = [usual, "chinese.ttf", "thai.ttf"]
    assert drawable([0, 1, 2], names) == list(zip(fonts, names, strict=True))
    assert capsys.readouterr().err == ""
    drawing._font_with.cache_clear()


def test_drawn_labels_lie_on_the_colour_of_their_class() -> None:
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    box = torch.tensor([[50.0, 50.0, 300.0, 200.0]])
    unnamed, named = (draw_boxes(image, box, [4], [name]) for name in ("", "cat"))
    label = (unnamed != named).any(0).nonzero()
    assert label[:, 0].max() == 49  # all above the box
    assert label[:, 1].min() == 50
    assert torch.equal(named[:, label[0, 0], 50], torch.tensor(class_color(4)))
