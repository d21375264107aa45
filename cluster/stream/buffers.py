"""Memory for rows on their way through a socket. Knows no frames and no sockets."""

import torch
from torch import Tensor


def memory(rows: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return rows.view(torch.uint8).numpy().data.cast("B")


class ReceiveBuffers:
    """Memory for payloads, used again and again. With CUDA it is pinned, for copies at full speed."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """At least num_bytes of uint8, with old contents."""
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(i)
        if self._free:
            self._free.pop()  # too small for what comes now: let it go
        return torch.empty(1 << max(num_bytes - 1, 4095).bit_length(), dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Staging:
    """Pinned memory for rows on their way from a GPU to a socket; rows of a CPU tensor need none."""

    def __init__(self) -> None:
        self._pinned = ReceiveBuffers(True)

    def copy(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows, contiguous on the CPU: [T, H], from a GPU once the current stream has come so far. Beside them the
        memory to give back when they are sent, if any."""
        if not rows.is_cuda:
            return rows.contiguous(), None
        buffer = self._pinned.take(rows.nbytes)
        staged = buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)
        return staged.copy_(rows, non_blocking=True), buffer

    def give_back(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._pinned.give(buffer)
