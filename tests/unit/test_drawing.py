"""Pictures: sizes, and names that a font cannot draw."""

from __future__ import annotations

import itertools

import pytest
import torch

from detrelay.apps import drawing
from detrelay.apps.drawing import class_color, draw_boxes, drawable
from detrelay.apps.labels import Rectangle, place_labels


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


def overlap(one: Rectangle, other: Rectangle) -> bool:
    return (
        min(one[2], other[2]) > max(one[0], other[0])
        and min(one[3], other[3]) > max(one[1], other[1])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((50, 60, 150, 160), (50, 48, 80, 60)),  # above
        ((50, 5, 150, 160), (50, 5, 80, 17)),  # no room above: inside
        ((190, 60, 199, 160), (169, 48, 199, 60)),  # no room to the right: flush right
        ((0, 0, 199, 199), (0, 0, 30, 12)),  # at the corner
        ((0, 0, 20, 10), (0, 10, 30, 22)),  # no room inside either: below
    ],
)
def test_a_label_goes_above_its_box_if_there_is_room(
    box: tuple[float, float, float, float], place: Rectangle
) -> None:
    assert place_labels([box], [(30, 12)], (200, 200)) == [place]


def test_labels_of_boxes_in_one_place_do_not_hide_each_other() -> None:
    box = (50.0, 60.0, 150.0, 160.0)
    places = place_labels([box] * 8, [(30, 12)] * 8, (200, 200))
    assert places[:3] == [(50, 48, 80, 60), (50, 60, 80, 72), (50, 160, 80, 172)]
    pairs = itertools.combinations(places, 2)
    assert not any(overlap(one, other) for one, other in pairs)


def test_drawn_labels_lie_on_the_colour_of_their_class() -> None:
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    box = torch.tensor([[50.0, 50.0, 300.0, 200.0]])
    unnamed, named = (draw_boxes(image, box, [4], [name]) for name in ("", "cat"))
    label = (unnamed != named).any(0).nonzero()
    assert label[:, 0].max() == 49  # all above the box
    assert label[:, 1].min() == 50
    assert torch.equal(named[:, label[0, 0], 50], torch.tensor(class_color(4)))
