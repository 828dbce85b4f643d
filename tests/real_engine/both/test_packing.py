"""Our buffers are byte for byte those that vLLM's own code makes, and are read as it reads them."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

from trl_pool.weights.packing import DTYPE_SIZES, Packer, chunk_nbytes, chunks, unpack

# Of one alignment, as vLLM's reading needs it.
DTYPES = (torch.bfloat16, torch.float16, torch.int16)


def random_tensors(seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[tuple[str, torch.Tensor]]:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(rng.randint(1, 30)):
        # Of one element at least: vLLM's own packing fails on some empty tensors.
        shape = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
        values = torch.randn(shape, generator=generator) * 50
        found.append((f"p{i}", values.to(rng.choice(dtypes))))
    return found


def metadata(tensors: list[tuple[str, torch.Tensor]]) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors]


def pack(tensors: list[tuple[str, torch.Tensor]], size: int) -> list[torch.Tensor]:
    packer = Packer(metadata(tensors), size)
    buffers = [buffer for name, t in tensors if (buffer := packer.add(name, t)) is not None]
    return buffers if (last := packer.flush()) is None else [*buffers, last]


def same(found: list[tuple[str, torch.Tensor]], expected: list[tuple[str, torch.Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        name == other and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for (name, a), (other, b) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("seed", range(40))
def test_chunks_and_buffers_are_vllms(seed: int) -> None:
    tensors = random_tensors(seed)
    size = random.Random(seed).choice([1, 16, 200, 1000, 10**6])
    iterator = iter(tensors)
    theirs: list[Any] = []
    with warnings.catch_warnings():
        # Of tensors larger than a buffer.
        warnings.simplefilter("ignore")
        while (chunk := pack_tensors(iterator, lambda item: item[1], size)) is not None:
            theirs.append(chunk)

    ours = chunks(metadata(tensors), size)
    assert [[p.name for p in chunk] for chunk in ours] == [chunk.names for chunk in theirs]
    assert [[p.nbytes for p in chunk] for chunk in ours] == [chunk.tensor_sizes for chunk in theirs]
    buffers = pack(tensors, size)
    assert len(buffers) == len(theirs)
    read: list[tuple[str, torch.Tensor]] = []
    for buffer, chunk, mine in zip(buffers, theirs, ours, strict=True):
        assert torch.equal(buffer, chunk.packed_tensor)
        read += unpack(buffer, mine)
        assert same(
            unpack_tensor(buffer, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes), unpack(buffer, mine)
        )
    assert same(read, tensors)


@pytest.mark.parametrize("seed", range(20))
def test_tensors_survive_at_any_alignment(seed: int) -> None:
    """A lone byte before a wider dtype: vLLM's own reading fails there, ours copies that tensor."""
    tensors = random_tensors(seed, (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.complex128))
    for size in (1, 64, 10**6):
        read: list[tuple[str, torch.Tensor]] = []
        for buffer, chunk in zip(pack(tensors, size), chunks(metadata(tensors), size), strict=True):
            read += unpack(buffer, chunk)
        assert same(read, tensors)


def test_aligned_tensors_are_views() -> None:
    tensors = [("a", torch.ones(4, dtype=torch.bfloat16)), ("b", torch.ones(2))]
    (buffer,) = pack(tensors, 100)
    read = dict(unpack(buffer, chunks(metadata(tensors), 100)[0]))
    buffer.zero_()
    assert not read["a"].any()
    assert not read["b"].any()


def test_table_of_dtypes_is_torchs() -> None:
    for name, size in DTYPE_SIZES.items():
        assert getattr(torch, name).itemsize == size


def test_scalars_and_views_are_packed() -> None:
    tensors = [
        ("scalar", torch.tensor(3.5)),
        ("transposed", torch.arange(6.0).view(2, 3).T),
        ("every other", torch.arange(6.0)[::2]),
        ("part of a row", torch.arange(6.0)[1:4]),
        ("none", torch.ones(0)),
    ]
    (buffer,) = pack(tensors, 100)
    assert same(unpack(buffer, chunks(metadata(tensors), 100)[0]), tensors)


def test_buffer_is_a_copy() -> None:
    tensor = torch.ones(4, requires_grad=True)
    packer = Packer([("w", "float32", [4]), ("v", "float32", [1])], 16)
    assert packer.add("w", tensor) is None
    with torch.no_grad():
        tensor.zero_()
    buffer = packer.add("v", torch.ones(1))
    assert buffer is not None
    assert packer.flush() is None
    assert buffer.view(torch.float32).tolist() == [1.0] * 5


def test_trailing_empty_tensors_are_in_the_last_buffer() -> None:
    tensors = [("a", torch.ones(2)), ("b", torch.ones(0)), ("c", torch.ones(0))]
    assert [buffer.numel() for buffer in pack(tensors, 8)] == [8]
    assert [buffer.numel() for buffer in pack(tensors, 7)] == [8, 0]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("other", torch.ones(2, 3)),
        ("w", torch.ones(3, 2)),
        ("w", torch.ones(2, 3, dtype=torch.bfloat16)),
    ],
)
def test_first_tensor_that_differs_is_named(name: str, tensor: torch.Tensor) -> None:
    packer = Packer([("v", "float32", [1]), ("w", "float32", [2, 3])], 100)
    packer.add("v", torch.ones(1))
    with pytest.raises(ValueError, match=r"Tensor 1 .*: \w+ .* came, w float32 \[2, 3\] was announced"):
        packer.add(name, tensor)


def test_missing_and_surplus_tensors_are_named() -> None:
    packer = Packer([("v", "float32", [1]), ("w", "float32", [1])], 100)
    packer.add("v", torch.ones(1))
    with pytest.raises(ValueError, match=r"w was announced and never came: .* 1 of 2"):
        packer.flush()
    packer.add("w", torch.ones(1))
    with pytest.raises(ValueError, match=r"x was not announced"):
        packer.add("x", torch.ones(1))
    assert packer.flush() is not None


def test_buffer_of_another_size_is_refused() -> None:
    (chunk,) = chunks([("v", "float32", [3])], 100)
    assert chunk_nbytes(chunk) == 12
    with pytest.raises(ValueError, match="11 bytes"):
        unpack(torch.zeros(11, dtype=torch.uint8), chunk)
