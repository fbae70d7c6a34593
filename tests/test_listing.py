"""Listings on disk: what was listed, in its order, in no more memory than a few numbers."""

import os
import pickle
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vugen_cli.data.folder import image_paths
from vugen_cli.data.listing import Listing, by_first
from vugen_cli.errors import VugenError


def test_values_come_back_by_number_in_another_process_too_and_go_with_their_maker() -> None:
    values = ["a/b.jpg", ["ü.png", ["two", "captions"]], None, ""]
    listing = Listing(values)
    assert list(pickle.loads(pickle.dumps(listing))) == list(listing) == values
    assert listing[2] is None and len(listing) == 4
    assert listing.fingerprint != Listing(values[::-1]).fingerprint
    folder = listing.folder
    del listing
    assert not folder.exists()
    assert list(Listing([])) == []


def test_what_killed_processes_left_is_cleared_away_and_what_others_use_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept, new = Listing(["a"]), tmp_path / "vugen-listing-new"
    left, other = tmp_path / "vugen-listing-left", tmp_path / "other"
    for folder in (new, left, other):
        folder.mkdir()
    for folder in (kept.folder, left, other):
        os.utime(folder, (0, 0))
    Listing([])
    assert kept[0] == "a" and new.exists() and other.exists() and not left.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = lambda path, mode: open("/dev/full", mode)  # noqa: E731, SIM115
    monkeypatch.setattr("vugen_cli.data.listing.open", full, raising=False)
    with pytest.raises(VugenError, match=f"no space is left in {tempfile.gettempdir()}.*TMPDIR"):
        Listing(["a"])


def test_a_long_listing_is_not_held_in_memory() -> None:
    tracemalloc.start()
    listing = Listing(f"folder/{number:060d}.jpg" for number in range(50_000))  # 3.5 MB of text
    assert listing[49_999] == f"folder/{49_999:060d}.jpg"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


@given(st.lists(st.sampled_from("abcdef")))
def test_rows_of_one_key_come_together_keys_as_they_were_first_seen(keys: list[str]) -> None:
    expected: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        expected.setdefault(key, []).append(row)
    rows, bounds = by_first(keys)
    assert [rows[a:b].tolist() for a, b in pairwise(bounds)] == list(expected.values())


def test_paths_are_listed_in_the_order_of_the_whole_paths(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "a-b.jpg", "a.jpg", "a/c/d.png", "a/c-d.png", "a0/x.gif", "b/.y.jpg", ".z/w.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.symlink(tmp_path / "a" / "c", tmp_path / "linked")

    def walked() -> Iterator[str]:
        for where, folders, files in os.walk(tmp_path, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    yield Path(where, name).relative_to(tmp_path).as_posix()

    assert list(image_paths(tmp_path)) == sorted(walked())
    assert len(list(image_paths(tmp_path))) == 7
