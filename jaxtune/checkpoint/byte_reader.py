"""Takes numbers, text and lines from bytes that a stranger wrote; every end is checked."""

from typing import Any, NoReturn

from jaxtune.errors import CheckpointError

DAMAGED = "The file is damaged or was not written by torch.save; download or write it again."
MAX_LINE_BYTES = 1000


class ByteReader:
    """A position in bytes, or in a mapped file.

    Attributes:
        data: bytes or an mmap.
        where: What is read, as messages name it.
        position: The next byte.
        end: Nothing from here on is read.
    """

    def __init__(self, data: Any, where: str, position: int, end: int):
        self.data, self.where, self.position, self.end = data, where, position, end

    def refuse(self, what: str, advice: str = DAMAGED) -> NoReturn:
        """Raises `CheckpointError` that names the place."""
        raise CheckpointError(f"{self.where}, before byte {self.position}: {what}. {advice}")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        stop = self.position + count
        if stop > self.end:
            self.refuse(
                f"expected {count} more bytes, found the end: the file is cut off, or this part of it too large"
            )
        data = self.data[self.position : stop]
        self.position = stop
        return data

    def number(self, size: int) -> int:
        """An integer of `size` bytes, little-endian, not negative."""
        return int.from_bytes(self.take(size), "little")

    def text(self, size: int) -> str:
        """Text after its length, a number of `size` bytes."""
        return self._decode(self.take(self.number(size)))

    def line(self) -> str:
        """Text up to the next new line."""
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + MAX_LINE_BYTES))
        if stop < 0:
            self.refuse(f"expected a name of at most {MAX_LINE_BYTES} bytes and a new line")
        return self._decode(self.take(stop + 1 - self.position)[:-1])

    def _decode(self, data):
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.refuse("expected UTF-8 text")
