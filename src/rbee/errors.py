"""Every error rbee raises on purpose, each with its code, HTTP status, exit code and remedy.

An error's docstring is its default message. `reason` is the word a job ends with when the error ends it.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any, ClassVar


class RbeeError(Exception):
    """Something went wrong inside rbee."""

    code: ClassVar[str] = "internal"
    type: ClassVar[str] = "server_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    reason: ClassVar[str] = "internal"
    remedy: ClassVar[str] = "Look at the job's log (rbee jobs follow) and at the logs under RBEE_HOME/logs."

    def __init__(
        self,
        message: str | None = None,
        *,
        remedy: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        details: dict[str, Any] | None = None,
        reason: str | None = None,
        code: str | None = None,
    ) -> None:
        self.message = message or cleandoc(self.__doc__ or "").splitlines()[0]
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = details or {}
        if remedy is not None:
            self.remedy = remedy  # type: ignore[misc]  # an instance may say more than its class
        if reason is not None:
            self.reason = reason  # type: ignore[misc]
        if code is not None:
            self.code = code  # type: ignore[misc]
        super().__init__(self.message)


class InvalidRequestError(RbeeError):
    """The request is not of the form that is asked for."""

    code = "invalid"
    type = "invalid_request_error"
    status = 400
    exit_code = 2
    reason = "invalid"
    remedy = "Mend the request; sending it again as it is will fail again."


class ContextExceededError(InvalidRequestError):
    """The prompt is longer than the model's context."""

    code = "context_length_exceeded"
    exit_code = 1
    remedy = "Shorten the prompt, or start the worker with a larger --context-tokens."


class AuthenticationError(RbeeError):
    """This needs a credential: send `Authorization: Bearer <RBEE_API_KEY>`."""

    code = "invalid_api_key"
    type = "authentication_error"
    status = 401
    exit_code = 2
    reason = "invalid"
    remedy = "Set RBEE_API_KEY to the key the server was started with."


class ForbiddenError(RbeeError):
    """This caller may not do that here."""

    code = "forbidden"
    type = "permission_error"
    status = 403
    exit_code = 2
    reason = "invalid"
    remedy = "Use a loopback address, or add the host or origin to the server's allowed ones."


class NotFoundError(RbeeError):
    """There is no such thing here."""

    code = "not_found"
    type = "invalid_request_error"
    status = 404
    exit_code = 2
    reason = "invalid"
    remedy = "List what there is (rbee jobs list, rbee workers list, rbee hives list)."


class ModelNotFoundError(NotFoundError):
    """No source knows this model."""

    code = "model_not_found"
    reason = "model_not_found"
    remedy = "Name a known model (smollm2:135m), hf:org/repo:QUANT, or the path of a .gguf file."


class MethodNotAllowedError(RbeeError):
    """This address does not take that method."""

    code = "method_not_allowed"
    type = "invalid_request_error"
    status = 405
    exit_code = 2
    reason = "invalid"
    remedy = "See /openapi.json for what each address takes."


class ConflictError(RbeeError):
    """The thing changed in the meantime, so the request no longer applies."""

    code = "conflict"
    type = "invalid_request_error"
    status = 409
    reason = "invalid"
    remedy = "Read the current state and decide again."


class GoneError(RbeeError):
    """That part of the log was forgotten by retention."""

    code = "gone"
    type = "invalid_request_error"
    status = 410
    reason = "invalid"
    remedy = "Read from the oldest number that is still kept, or keep logs for longer."


class PayloadTooLargeError(RbeeError):
    """The request body is larger than the 8 MiB that are taken."""

    code = "payload_too_large"
    type = "invalid_request_error"
    status = 413
    exit_code = 2
    reason = "invalid"
    remedy = "Send a shorter prompt."


class UnsupportedMediaTypeError(RbeeError):
    """A JSON body needs `Content-Type: application/json`."""

    code = "unsupported_media_type"
    type = "invalid_request_error"
    status = 415
    exit_code = 2
    reason = "invalid"
    remedy = "Send the header Content-Type: application/json."


class OverloadedError(RbeeError):
    """Too many jobs are waiting already."""

    code = "overloaded"
    type = "rate_limit_error"
    status = 429
    retryable = True
    reason = "overloaded"
    remedy = "Try again after the time in Retry-After."


class InternalError(RbeeError):
    """Something went wrong inside rbee."""


class WorkerError(RbeeError):
    """The worker failed."""

    code = "worker_failed"
    status = 502
    retryable = True
    reason = "worker_failed"
    remedy = "The last lines of the worker say why; rbee logs --worker ID has all of them."


class WorkerLostError(WorkerError):
    """The worker ended while it had this job."""

    code = "worker_lost"
    reason = "worker_lost"
    remedy = "Send the job again: a new worker will be started for it."


class ModelInvalidError(RbeeError):
    """The model file cannot be loaded."""

    code = "model_invalid"
    status = 502
    reason = "model_invalid"
    remedy = "Remove the file (rbee models rm) and pull it again, or name another."


class DownloadFailedError(RbeeError):
    """The model could not be downloaded."""

    code = "download_failed"
    status = 502
    retryable = True
    reason = "download_failed"
    remedy = "Check the network and the free disk space, then try again."


class DownloadRefusedError(DownloadFailedError):
    """The model is not given to this caller, and asking again will not help."""

    code = "download_refused"
    retryable = False
    remedy = "Accept the model's terms on its page and set HF_TOKEN for the hive to a token that may read it."


class NoCapacityError(RbeeError):
    """No hive can take this job."""

    code = "no_capacity"
    status = 503
    retryable = True
    reason = "no_capacity"
    remedy = "Start a hive (rbee up), or free memory on one."


class CrashLoopError(NoCapacityError):
    """The model's workers fail to start again and again."""

    code = "crash_loop"
    reason = "crash_loop"
    remedy = "The last lines say why; mend that (another file, fewer slots, a shorter context), then try again."


class UnavailableError(RbeeError):
    """The server is not ready for this now."""

    code = "unavailable"
    status = 503
    retryable = True
    reason = "internal"
    remedy = "Try again in a moment."


class HiveLostError(UnavailableError):
    """The hive cannot be reached."""

    code = "hive_lost"
    reason = "hive_lost"
    remedy = "See whether the hive still runs (rbee hives list), then send the job again."


class QueenLostError(UnavailableError):
    """The queen ended while it had this job."""

    code = "queen_lost"
    reason = "queen_lost"
    remedy = "Send the job again."


class DeadlineExceededError(RbeeError):
    """The job did not end within its time."""

    code = "timeout"
    type = "timeout_error"
    status = 504
    retryable = True
    reason = "timeout"
    remedy = "Allow more time (timeout_s), or ask for less."


class QueueTimeoutError(DeadlineExceededError):
    """The job still waited for its place when its time to wait was over."""

    code = "queue_timeout"
    reason = "queue_timeout"
    remedy = "Allow more time (queue_timeout_s), or start another hive."


class FirstTokenTimeoutError(DeadlineExceededError):
    """The answer did not begin within its time."""

    code = "first_token_timeout"
    reason = "first_token_timeout"
    remedy = "Allow more time (first_token_timeout_s), or shorten the prompt."


class StalledError(DeadlineExceededError):
    """The answer stood still for too long."""

    code = "stalled"
    reason = "stalled"
    remedy = "Send the job again, or allow more time between two tokens (idle_timeout_s)."


class StorageError(RbeeError):
    """The disk does not take what is to be kept."""

    code = "storage_failed"
    status = 507
    retryable = True
    reason = "overloaded"
    remedy = (
        "See whether the disk that holds RBEE_HOME is full, read-only or failing (dmesg tells), then try again."
    )


class StorageFullError(StorageError):
    """The disk is full, so nothing new can be kept."""

    code = "storage_full"
    remedy = "Free space on the disk that holds RBEE_HOME, then try again."


class ConfigurationError(RbeeError):
    """The configuration cannot be used."""

    code = "configuration"
    status = 500
    exit_code = 2
    reason = "invalid"
    remedy = "Mend the flag, environment variable or rbee.toml entry that the message names."


class StartError(RbeeError):
    """The program failed before it was ready."""

    code = "start_failed"
    exit_code = 3
    remedy = "The message says what stood in the way."


def error_classes() -> dict[str, type[RbeeError]]:
    """Return every error class by its code, so that a client can raise what a server sent."""
    found: dict[str, type[RbeeError]] = {}
    pending: list[type[RbeeError]] = [RbeeError]
    while pending:
        cls = pending.pop()
        found.setdefault(cls.code, cls)
        pending.extend(cls.__subclasses__())
    return found
