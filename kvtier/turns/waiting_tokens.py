"""How much the requests have to compute that wait for their blocks."""

from __future__ import annotations


class WaitingTokens:
    """Tokens of waiting requests, by request; their sum is known at any time.

    Attributes:
        total: Of all requests.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self.total = 0

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return len(self._tokens)

    def add(self, request_id: str, n_tokens: int) -> None:
        """A request waits; one of the same name waits no more."""
        self.remove(request_id)
        self._tokens[request_id] = n_tokens
        self.total += n_tokens

    def remove(self, request_id: str) -> None:
        """A request waits no more. Harmless where it did not."""
        self.total -= self._tokens.pop(request_id, 0)
