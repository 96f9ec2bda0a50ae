"""``ApiError``: what went wrong, as OpenAI's clients expect to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error",
          503: "server_error"}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        param: the field of the request at fault.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def headers(self) -> Mapping[str, str]:
        """To send along."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status == 503 else {}

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": str(self), "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip
