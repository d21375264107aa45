"""Memory in large pages: as torch.empty's, and given back when its tensor is gone."""

import gc
import mmap
import threading
from collections.abc import Callable

import pytest
import torch

from cluster.kernels import large_pages
from cluster.kernels.large_pages import Arena

SIZE = 3 << 20  # an expert's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_a_tensor_is_as_torchs(dtype: torch.dtype) -> None:
    made = [large_pages.empty(700, 513, dtype=dtype) for _ in range(3)]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all(tensor.shape == (700, 513) and tensor.dtype == dtype for tensor in made)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in made)


@pytest.mark.parametrize("shape", [(0,), (0, 2048), (1,), (3, 5)])
def test_small_tensors_are_torchs(shape: tuple[int, ...]) -> None:
    assert large_pages.empty(*shape, dtype=torch.float32).shape == shape


def test_without_large_pages_memory_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_ADVICE", None)
    assert large_pages.empty(1024, 1024, dtype=torch.float32).fill_(1).sum() == 1 << 20


def test_a_system_that_refuses_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_ADVICE", 9999)  # no advice has this number
    assert bytes(Arena().take(SIZE)[:16]) == bytes(16)


def test_the_place_of_a_freed_piece_is_the_next_ones() -> None:
    arena = Arena()
    first, second = arena.take(SIZE), arena.take(SIZE)
    place = address(first)
    second[:] = b"2" * SIZE
    first[:] = b"1" * SIZE
    del first
    again = arena.take(SIZE)
    assert address(again) == place
    assert address(arena.take(SIZE + 64)) != place
    assert bytes(second) == b"2" * SIZE, "its neighbour keeps what it has"


def test_a_freed_pieces_memory_goes_back_to_the_system() -> None:
    arena = Arena()
    piece = arena.take(SIZE)
    piece[:] = b"1" * SIZE
    chunk = piece.obj
    assert isinstance(chunk, mmap.mmap)
    begin = address(piece) - address(memoryview(chunk))
    del piece
    page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    assert not any(chunk[page : begin + SIZE - mmap.PAGESIZE]), "fresh pages are zero"


@pytest.mark.parametrize(
    "keep", [torch.Tensor.detach, lambda tensor: tensor[5:], torch.Tensor.t], ids=["all", "rows", "t"]
)
def test_a_view_keeps_the_memory(keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = large_pages.empty(1024, 1024, dtype=torch.float32).fill_(1)
    kept = keep(tensor)
    del tensor
    gc.collect()
    other = large_pages.empty(1024, 1024, dtype=torch.float32).fill_(2)
    assert bool((kept == 1).all())
    assert bool((other == 2).all())


def test_large_memory_is_a_mapping_of_its_own() -> None:
    arena = Arena()
    whole, piece = arena.take(1 << 28), arena.take(SIZE)
    assert whole.obj is not piece.obj


def test_threads_get_places_of_their_own() -> None:
    arena, taken = Arena(), []

    def take(number: int) -> None:
        for _ in range(20):
            piece = arena.take(1 << 19)
            piece[:8] = bytes([number]) * 8
            taken.append((number, piece))
            del piece
            arena.take(1 << 19)[:8] = bytes(8)  # and frees it

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bytes(piece[:8]) == bytes([number]) * 8 for number, piece in taken)
    assert len({address(piece) for _, piece in taken}) == 80


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()
