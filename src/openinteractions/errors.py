"""Every error that this program raises on purpose.

    AppError                     stable code; the message is safe to show
      RequestError               the caller can fix it: an HTTP 4xx
        Invalid 400 · QuotaReached 400 · Unauthenticated 401 · Forbidden 403 · NotFound 404
        WrongMethod 405 · Conflict 409 · TooLarge 413 · TooMany 429
      Unready                    503: this server cannot serve now, a retry may succeed
      EngineError                our side, while an interaction runs
        ModelError               the upstream model failed
          ModelUnavailable       transient: waiting, or another model, may help
          ModelRejected          final: the same request will fail again
          ContextOverflow        final: the input is too long for this model
        LeaseLost                another worker owns the run: write nothing more
      SetupError                 the operator can fix it: shown by the command line, exit code 2

Anything else is a bug: logged with its traceback and answered with a bare 500.
"""

from typing import ClassVar


class AppError(Exception):
    """Base of all errors raised on purpose."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(AppError):
    """The caller's request cannot be served as it is."""

    status: ClassVar[int] = 400
    rpc: ClassVar[str] = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Invalid(RequestError):
    """400: a field is wrong, missing, unknown, or asks for what this server cannot do."""

    code = "invalid_request"


class QuotaReached(RequestError):
    """400: there are as many as there may be; something has to go first.

    Not a 429, which SDKs send again and again: a quota does not get free by waiting a little, as a
    rate does. A 400 ends at once, with its message.
    """

    code = "failed_precondition"
    rpc = "FAILED_PRECONDITION"


class Unauthenticated(RequestError):
    """401: no key, or one that is unknown or revoked."""

    code = "unauthenticated"
    status = 401
    rpc = "UNAUTHENTICATED"


class Forbidden(RequestError):
    """403: the key is good, but not for this."""

    code = "permission_denied"
    status = 403
    rpc = "PERMISSION_DENIED"


class NotFound(RequestError):
    """404: absent, deleted, expired, or another project's."""

    code = "not_found"
    status = 404
    rpc = "NOT_FOUND"


class WrongMethod(RequestError):
    """405: the path exists, the method does not."""

    code = "method_not_allowed"
    status = 405
    rpc = "UNIMPLEMENTED"


class Conflict(RequestError):
    """409: only where the contract says so, since SDKs retry it for about seven seconds."""

    code = "aborted"
    status = 409
    rpc = "ABORTED"


class TooLarge(RequestError):
    """413: the body is over the configured limit."""

    code = "request_too_large"
    status = 413
    rpc = "OUT_OF_RANGE"


class TooMany(RequestError):
    """429: a rate or budget of the key or project is used up."""

    code = "too_many_requests"
    status = 429
    rpc = "RESOURCE_EXHAUSTED"


class Unready(RequestError):
    """503: the database is away or the server is stopping; nothing was accepted."""

    code = "unavailable"
    status = 503
    rpc = "UNAVAILABLE"


class EngineError(AppError):
    """Something on our side failed while an interaction ran."""


class ModelError(EngineError):
    """The upstream model failed. The message says what the upstream said, without secrets."""

    code = "model_error"

    def __init__(self, message: str, *, upstream_status: int | None = None) -> None:
        super().__init__(message)
        self.upstream_status = upstream_status


class ModelUnavailable(ModelError):
    """Transient: a 408, 429 or 5xx, a reset, a time-out, or a stream that ended too early."""

    code = "model_unavailable"

    def __init__(
        self,
        message: str,
        *,
        upstream_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, upstream_status=upstream_status)
        self.retry_after_s = retry_after_s


class ModelRejected(ModelError):
    """Final: the upstream refused the request or our credentials for it."""

    code = "model_rejected"


class ContextOverflow(ModelRejected):
    """Final: the conversation is longer than the model's window."""

    code = "context_overflow"


class LeaseLost(EngineError):
    """Another worker has taken this run over. Nothing more may be written for it."""

    code = "lease_lost"


class SetupError(AppError):
    """The installation or its configuration is wrong; the message names the fix."""

    code = "setup"
