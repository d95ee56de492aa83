"""The table of hostile data in the docs is what the program says; readers survive random damage."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import WRITERS, write_format

DOCS = Path(__file__).parents[2] / "docs"
# what damage in the wild looks like
SPLINTERS = [
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"[",
    b"<",
    b"-",
    b"1e400",
    b"NaN",
    b"null",
    b"&a;",
    b"/..",
]
# a load by `datasets` takes a second, so it gets fewer tries
SLOW_READERS = ("imagefolder",)


def hostile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile", DOCS / "hostile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


HOSTILE = hostile()
TABLE = (DOCS / "hostile_data.md").read_text(encoding="utf-8").splitlines()[8:]


def test_the_table_has_all_cases() -> None:
    assert len(TABLE) == len(HOSTILE.CASES) >= 80
    assert len({(case.format, case.what) for case in HOSTILE.CASES}) == len(TABLE)


@pytest.mark.parametrize("name", sorted({case.format for case in HOSTILE.CASES}))
def test_a_user_sees_what_the_table_says(name: str, tmp_path: Path) -> None:
    for number, (case, row) in enumerate(zip(HOSTILE.CASES, TABLE, strict=True)):
        if case.format == name:
            folder = tmp_path / str(number)
            folder.mkdir()
            line = HOSTILE.row_of(case, folder)
            assert line == row
            assert "\n" not in line


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, removed, repeated or put in."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.randint(0, 12))
        kind = chance.randrange(4)
        if kind == 0:
            data = data[:start] + bytes(chance.randrange(256) for _ in range(3)) + data[end:]
        elif kind == 1:
            data = data[:start] + data[end:]
        elif kind == 2:
            data = data[:end] + data[start:]
        else:
            data = data[:start] + chance.choice(SPLINTERS) + data[end:]
    return data


def survive(name: str, folder: Path, seconds: float, seed: int) -> int:
    """Damage the annotations of a format again and again; how often they were read."""
    place, _ = write_format(name, folder)
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".json", ".jsonl", ".xml", ".txt", ".csv", ".yaml", ".data", ".names")
    ]
    chance, said = random.Random(seed), list[str]()
    open_place(place)  # imports take their time once
    end, tries = time.monotonic() + seconds, 0
    while time.monotonic() < end or tries == 0:
        file = chance.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, chance))
        try:
            for part in open_place(place).splits.values():
                AnnotatedImages(part)
        except DataError as error:
            said.append(str(error))
        except Exception as error:
            pytest.fail(f"{name}, {file.name}: {file.read_bytes()!r} raised {error!r}")
        file.write_bytes(whole)
        tries += 1
    assert not any("\n" in line for line in said)
    return tries


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in SLOW_READERS])
def test_readers_survive_damage(name: str, tmp_path: Path) -> None:
    assert survive(name, tmp_path, seconds=0.1, seed=0) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_readers_survive_much_damage(name: str, tmp_path: Path) -> None:
    assert survive(name, tmp_path, seconds=10, seed=1) > 5


def test_the_page_of_pains_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (DOCS / "pains.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    files = Path(__file__).parents[1].rglob("test_*.py")
    known = set(re.findall(r"def (test_\w+)", "".join(map(Path.read_text, files))))
    assert set(named) <= known
