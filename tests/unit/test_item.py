"""File names for the results of an image."""

from __future__ import annotations

from detrelay.apps.sources.item import flat_name


def test_paths_and_addresses_become_names_of_files() -> None:
    assert flat_name("../a\\b/./c.png") == "a__b__c.png"
    assert flat_name("https://host:80/a.png?size=1") == "https__host80__a.png_size=1"
    assert len(flat_name("x" * 400)) == 120
