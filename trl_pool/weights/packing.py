"""How tensors are packed into buffers: the rule that trainer and servers have in common.

The rule is vLLM's (`vllm/distributed/weight_transfer/packed_tensor.py`), since its own NCCL engine reads what is
packed here: tensors follow each other without padding, a buffer is cut as soon as it holds *more* than
`buffer_size_bytes`, and a tensor is never split. So a buffer exceeds the size by at most its last tensor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

DEFAULT_BUFFER_SIZE_BYTES: Final = 256 * 2**20
"""A quarter of vLLM's own: large enough for the network, small beside a model."""

DTYPE_SIZES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of an element, by the name that `torch` has the dtype under."""

Metadata: TypeAlias = Iterable[tuple[str, str, Sequence[int]]]
"""`(name, dtype name, shape)` of every tensor, in the order in which they are sent; dtypes read `"bfloat16"`."""


class Piece(NamedTuple):
    """One tensor's place in a buffer.

    Args:
        name (`str`): Of the parameter.
        dtype_name (`str`): As `torch` names it, `"bfloat16"`.
        shape (`tuple[int, ...]`): Empty for a scalar.
        nbytes (`int`): Bytes that it takes.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int


def chunks(metadata: Metadata, buffer_size_bytes: int) -> list[list[Piece]]:
    """Says which tensors share a buffer.

    Args:
        metadata (`Iterable[tuple[str, str, Sequence[int]]]`):
            `(name, dtype name, shape)` of every tensor, in order.
        buffer_size_bytes (`int`):
            A buffer that holds more than this is cut.

    Returns:
        `list[list[Piece]]`: One list per buffer, in order; none of them is empty.

    Raises:
        `ValueError`: for a size below 1, an unknown dtype or a negative extent.
    """
    if buffer_size_bytes < 1:
        raise ValueError(f"buffer_size_bytes must be at least 1, got {buffer_size_bytes}")
    found: list[list[Piece]] = []
    chunk: list[Piece] = []
    size = 0
    for name, dtype_name, shape in metadata:
        piece = _piece(name, dtype_name, shape)
        chunk.append(piece)
        size += piece.nbytes
        if size > buffer_size_bytes:
            found.append(chunk)
            chunk, size = [], 0
    if chunk:
        found.append(chunk)
    return found


def _piece(name: str, dtype_name: str, shape: Sequence[int]) -> Piece:
    item_size = DTYPE_SIZES.get(dtype_name)
    if item_size is None:
        raise ValueError(f"{name} has the unknown dtype {dtype_name!r}; known are {', '.join(sorted(DTYPE_SIZES))}")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{name} has a negative extent in its shape {list(shape)}")
    return Piece(name, dtype_name, tuple(shape), math.prod(shape) * item_size)


def chunk_nbytes(chunk: Sequence[Piece]) -> int:
    """Size of a chunk's buffer, in bytes."""
    return sum(piece.nbytes for piece in chunk)


class Packer:
    """Copies tensors into buffers and checks each against what was announced.

    The receivers have sized their buffers from the announcement: one tensor that differs from it and the two sides
    would read the stream differently, which is a hang or garbage. So it is found out here, before it is sent.

    Args:
        metadata (`Iterable[tuple[str, str, Sequence[int]]]`):
            What was announced: `(name, dtype name, shape)` of every tensor, in order.
        buffer_size_bytes (`int`, *optional*, defaults to 256 MiB):
            As the receivers were told.
        device (`str` or `torch.device`, *optional*):
            Where the buffers lie; `"cpu"` for gloo. By default that of the first tensor in each.
    """

    def __init__(
        self,
        metadata: Metadata,
        buffer_size_bytes: int = DEFAULT_BUFFER_SIZE_BYTES,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        self.chunks = chunks(metadata, buffer_size_bytes)
        self._buffer_size_bytes = buffer_size_bytes
        self._device = device
        self._pieces = [piece for chunk in self.chunks for piece in chunk]
        self._taken = 0  # tensors
        self._handed_over = 0  # buffers
        self._buffer: torch.Tensor | None = None
        self._offset = 0

    def __repr__(self) -> str:
        tensors, buffers = f"{self._taken} of {len(self._pieces)}", f"{self._handed_over} of {len(self.chunks)}"
        return f"<Packer {tensors} tensors taken, {buffers} buffers handed over>"

    def add(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Copies one tensor; the caller may free or change it afterwards.

        Args:
            name (`str`): Of the parameter.
            tensor (`torch.Tensor`): On any device, contiguous or not.

        Returns:
            `torch.Tensor` or `None`: A `uint8` buffer that is cut here; its bytes are there for other threads and
            streams too.

        Raises:
            `ValueError`: naming the first tensor that differs from what was announced.
        """
        import torch

        piece = self._check(name, tensor)
        if self._buffer is None:
            size = chunk_nbytes(self.chunks[self._handed_over])
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device or tensor.device)
            self._offset = 0
        # Flattened first: a scalar cannot be viewed as bytes.
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if flat.is_cpu and self._buffer.is_cpu:
            # Torch would share even a small copy among its threads, and wait, spinning, for each of them: on a machine
            # that is busy, and a training keeps it busy, that takes a time slice per tensor.
            ctypes.memmove(self._buffer.data_ptr() + self._offset, flat.data_ptr(), piece.nbytes)
        else:
            self._buffer[self._offset : self._offset + piece.nbytes].copy_(flat)
        self._offset += piece.nbytes
        self._taken += 1
        return self._hand_over() if self._offset > self._buffer_size_bytes else None

    def flush(self) -> torch.Tensor | None:
        """Ends the stream.

        Returns:
            `torch.Tensor` or `None`: The last buffer, if it was not cut by its last tensor.

        Raises:
            `ValueError`: naming the first announced tensor that never came.
        """
        if self._taken < len(self._pieces):
            missing = self._pieces[self._taken]
            raise ValueError(
                f"{missing.name} was announced and never came: the stream ended after {self._taken} of "
                f"{len(self._pieces)} tensors"
            )
        return None if self._buffer is None else self._hand_over()

    def _check(self, name: str, tensor: torch.Tensor) -> Piece:
        if self._taken == len(self._pieces):
            raise ValueError(f"{name} was not announced: the metadata ended after {len(self._pieces)} tensors")
        piece = self._pieces[self._taken]
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        if (name, dtype_name, tuple(tensor.shape)) != piece[:3]:
            raise ValueError(
                f"Tensor {self._taken} differs from the metadata: {name} {dtype_name} {list(tensor.shape)} came, "
                f"{piece.name} {piece.dtype_name} {list(piece.shape)} was announced"
            )
        return piece

    def _hand_over(self) -> torch.Tensor:
        import torch

        assert self._buffer is not None
        buffer, self._buffer = self._buffer, None
        self._handed_over += 1
        if buffer.is_cuda:
            # The copies are only queued; whoever sends the buffer does so on another stream and thread.
            torch.cuda.current_stream(buffer.device).synchronize()
        return buffer


def unpack(buffer: torch.Tensor, chunk: Sequence[Piece]) -> list[tuple[str, torch.Tensor]]:
    """Reads the tensors of a buffer.

    Args:
        buffer (`torch.Tensor`): `uint8`, as a [`Packer`] made it.
        chunk (`Sequence[Piece]`): What is in it, from [`chunks`].

    Returns:
        `list[tuple[str, torch.Tensor]]`:
            Views of the buffer, so it must not be overwritten while they are used. A tensor that does not begin at a
            multiple of its element's size is a copy: torch has no views on such places.

    Raises:
        `ValueError`: when the buffer has another size than the chunk.
    """
    import torch

    if buffer.numel() != chunk_nbytes(chunk):
        raise ValueError(f"The buffer has {buffer.numel()} bytes, its tensors take {chunk_nbytes(chunk)}")
    found, offset = [], 0
    for piece in chunk:
        part = buffer[offset : offset + piece.nbytes]
        if (buffer.storage_offset() + offset) % DTYPE_SIZES[piece.dtype_name]:
            part = part.clone()
        dtype: Any = getattr(torch, piece.dtype_name)
        found.append((piece.name, part.view(dtype).view(piece.shape)))
        offset += piece.nbytes
    return found
