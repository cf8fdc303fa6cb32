"""Tensors of a file, in place and past the page cache: always the same values, and buffers only where nobody reads them."""

from __future__ import annotations

import gc
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerate.offload.io import mmap_reader
from accelerate.offload.io.direct_io import BufferPool, DirectFile
from accelerate.offload.io.mmap_reader import (
    ByteRange,
    MmapFile,
    MmapWindowCache,
    ReadInterruptedError,
    Span,
    TensorLayout,
    never,
)
from accelerate.offload.io.tensor_reader import CachedFile, TensorRead
from accelerate.runtime.system.page_cache import CacheProbe, open_direct

SIZE = 3_000_001


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


def forget(path: Path) -> None:
    """Has the system's cache forget a file, or skips where that or reading past it is not to be had."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no posix_fadvise")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        for _ in range(20):  # pages that another processor has just put there stay at first
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if CacheProbe(file.fileno(), SIZE).cached_fraction(SIZE) == 0:
                break
            time.sleep(0.01)
        in_cache = CacheProbe(file.fileno(), SIZE).cached_fraction(SIZE) > 0
    past = open_direct(path)
    if in_cache or past is None:
        pytest.skip(f"{path.parent} is on a file system that lives in the page cache, or has no O_DIRECT")
    os.close(past)


def held(path: Path) -> bool:
    with open(path, "rb") as file:
        probe = CacheProbe(file.fileno(), SIZE)
        return all(probe.is_cached(place) for place in range(0, SIZE, mmap.PAGESIZE))


def reading(
    path: Path, spans: list[Span], room: bool = True, keep: bool = False, windows: MmapWindowCache | None = None
) -> TensorRead:
    buffers, windows = BufferPool(), windows or MmapWindowCache()
    return TensorRead(spans, lambda: CachedFile(path, buffers, windows), lambda: room, lambda _: None, keep)


def span(start: int, stop: int) -> Span:
    return Span(start, stop, torch.uint8, (stop - start,))


places = st.tuples(st.integers(0, SIZE), st.integers(0, 600_000)).map(lambda pair: span(pair[0], min(sum(pair), SIZE)))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(places, max_size=6))
def test_both_ways_give_what_is_in_the_file(path: Path, spans: list[Span]) -> None:
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for _ in range(2):
        for wanted, found in zip(spans, reading(path, spans).read(), strict=True):
            assert torch.equal(found, content[wanted.start : wanted.stop])
        with open(path, "rb") as file:
            direct = DirectFile(file.fileno(), BufferPool())
            layout = TensorLayout.of(spans, SIZE, mmap.PAGESIZE)
            parts = [part for run in layout.runs if (part := direct.part(run, never)) is not None]
        if len(parts) == len(layout.runs):
            for wanted, found in zip(spans, layout.tensors(parts), strict=True):
                assert torch.equal(found, content[wanted.start : wanted.stop])


def test_what_is_not_cached_is_read_past_the_cache_once(path: Path) -> None:
    windows = MmapWindowCache()
    wanted = reading(path, [span(5000, 2_500_000)], windows=windows)
    forget(path)
    assert not wanted.is_resident()
    first = wanted.read()[0].clone()
    assert not held(path)
    assert torch.equal(wanted.read()[0], first)
    assert wanted.is_resident()
    windows.close()  # what is mapped stays
    forget(path)
    assert torch.equal(wanted.read()[0], first) and not wanted.is_resident()


def test_without_room_the_cache_is_left_alone(path: Path) -> None:
    wanted = reading(path, [span(0, 2_500_000)], room=False)
    forget(path)
    for _ in range(3):
        wanted.read()
        assert not wanted.is_resident()


def test_a_buffer_is_used_again_when_nobody_reads_it() -> None:
    buffers = BufferPool()
    first = torch.frombuffer(buffers.take(5000), dtype=torch.uint8)
    view, address = first[10:20], first.data_ptr()
    other = torch.frombuffer(buffers.take(5000), dtype=torch.uint8)
    assert other.data_ptr() != address
    del first
    gc.collect()
    assert torch.frombuffer(buffers.take(5000), dtype=torch.uint8).data_ptr() != address  # the view is still there
    del view
    assert torch.frombuffer(buffers.take(6000), dtype=torch.uint8).data_ptr() == address


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_was_cut_short(path: Path, cached: bool) -> None:
    wanted = reading(path, [span(100_000, 2_500_000)])
    if not cached:
        forget(path)
    os.truncate(path, 2_000_000)
    with pytest.raises(RuntimeError, match=r"weights was truncated .* Keep the file unchanged"):
        wanted.read()


@pytest.mark.parametrize("cached", [True, False])
def test_giving_up(path: Path, cached: bool) -> None:
    wanted = reading(path, [span(0, 2_500_000)])
    if not cached:
        forget(path)
    with pytest.raises(ReadInterruptedError):
        wanted.read(stop=lambda: True)


def test_small_ones_are_kept_and_given_out_as_copies(path: Path) -> None:
    wanted = reading(path, [span(10, 1000)], keep=True)
    value = wanted.read()[0]
    before = value.clone()
    value.zero_()
    path.unlink()
    assert torch.equal(wanted.read()[0], before) and wanted.is_resident()


def whole(mapping: MmapFile, size: int) -> torch.Tensor:
    layout = TensorLayout.of([span(0, size)], size)
    return layout.tensors([mapping.part(run, never) for run in layout.runs])[0]


def test_what_others_read_in_small_pages_is_read_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap_reader, "_FAILED_REMAPS", {})
    path.write_bytes(path.read_bytes() * 3)
    forget(path)
    with open(path, "rb", buffering=0) as file:
        size, descriptor = os.fstat(file.fileno()).st_size, file.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        content = b"".join(os.pread(descriptor, 4096, place) for place in range(0, size, 4096))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
        expected = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        mapping, run = MmapFile(descriptor, MmapWindowCache()), ByteRange(0, size)
        used = whole(mapping, size)
        assert torch.equal(used, expected) and mapping.is_slow(run)
        assert not mapping.remap_huge_pages(run, never) and mapping.is_slow(run)  # not while somebody reads it there
        del used
        gc.collect()
        assert mapping.remap_huge_pages(run, never) and not mapping.is_slow(run) and held(path)
        assert torch.equal(whole(mapping, size), expected)
