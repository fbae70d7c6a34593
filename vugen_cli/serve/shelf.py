"""Pictures that clients fetch by URL: kept in memory, for a while."""

import secrets
import threading
import time


class Shelf:
    """PNG files under names that nobody can guess; the oldest leave first.

    Args:
        limit: bytes of all of them.
        seconds: that a file is kept.
    """

    def __init__(self, limit: int = 2**26, seconds: float = 3600):
        self.limit, self.seconds = limit, seconds
        self._files: dict[str, tuple[float, bytes]] = {}  # in order of age
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, file: bytes) -> str:
        """Keep a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.png"
        with self._lock:
            self._files[name] = (time.monotonic() + self.seconds, file)
            self._bytes += len(file)
            self._clear()
        return name

    def get(self, name: str) -> bytes | None:
        """A file, if it is still there."""
        with self._lock:
            self._clear()
            return self._files.get(name, (0.0, None))[1]

    def _clear(self) -> None:
        now = time.monotonic()
        while self._files:
            oldest = next(iter(self._files))
            until, file = self._files[oldest]
            if now < until and self._bytes <= self.limit:
                return
            del self._files[oldest]
            self._bytes -= len(file)
