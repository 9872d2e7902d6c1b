"""What is wrong with a parameter, its gradient or its state."""

from __future__ import annotations


class Problem(Exception):
    """Raised by checks, which know what is wrong but not where; whoever asks for the check says
    which parameter it is, and raises ``kind``."""

    def __init__(self, kind: type[Exception], text: str) -> None:
        super().__init__(text)
        self.kind = kind

    def at(self, where: str) -> Exception:
        """The error for users."""
        return self.kind(f"{where}: {self}")
