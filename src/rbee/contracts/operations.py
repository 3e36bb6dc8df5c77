"""The operations: what a job can ask for, as the body of `POST /v1/jobs`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from rbee.contracts.heartbeats import Purpose
from rbee.contracts.strict import decode_strict

MAX_BODY_BYTES = 8 * 1024 * 1024

Seconds = Annotated[float, Meta(gt=0, le=365 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
ModelReference = Annotated[str, Meta(min_length=1, max_length=1024)]
Label = Annotated[str, Meta(max_length=256)]
Labels = Annotated[dict[Label, Label], Meta(max_length=64)]
KeepAlive = Annotated[float, Meta(ge=-1, le=365 * 24 * 3600)]


class Operation(
    Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="operation", omit_defaults=True
):
    """What every operation takes.

    Attributes:
        timeout_s: Seconds from acceptance until the job fails with `timeout`; none by default.
        queue_timeout_s: Seconds from acceptance until the job fails with `queue_timeout`, if it is still queued
            then; none by default.
        attempts: How often an answer may be placed on a worker; a start that fails counts as well.
        priority: -10 to 10, higher first.
        labels: Up to 64 free words of the caller's, kept with the job.
        store: Keep request, log and result after the end.
        parent_job_id: The queen's job that this one, given to a hive, belongs to.
    """

    timeout_s: Seconds | None = None
    queue_timeout_s: Seconds | None = None
    attempts: Annotated[int, Meta(ge=1, le=100)] = 2
    priority: Annotated[int, Meta(ge=-10, le=10)] = 0
    labels: Labels = {}
    store: bool = True
    parent_job_id: str | None = None


class Message(Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One message of a conversation, as the engine's chat template takes it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Generation(Operation, frozen=True):
    """What every operation takes that asks a model for an answer.

    Attributes:
        model: The model's reference; the configured one by default.
        first_token_timeout_s: Seconds from placement until the job fails with `first_token_timeout`, if no token
            came; the server's setting by default.
        idle_timeout_s: Seconds without a token, after the first, until the job fails with `stalled`; the server's
            setting by default.
    """

    model: ModelReference | None = None
    first_token_timeout_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None


class Infer(Generation, tag="infer", frozen=True):
    """Ask a model for an answer. Either `prompt` or `messages`; what is absent is the engine's choice."""

    prompt: str | None = None
    messages: list[Message] | None = None
    system: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    stop: list[str] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    keep_alive: KeepAlive | None = None

    def __post_init__(self) -> None:
        """Refuse an infer that asks nothing, or asks twice."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of `prompt` and `messages` is needed")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if self.messages is not None and not self.messages:
            raise ValueError("`messages` is empty")


class ApiCall(Generation, frozen=True):
    """A call of a route that the clients of OpenAI and Anthropic know; an engine answers it as it is.

    Attributes:
        path: The route.
        purpose: What a worker has to be started for to answer it.
        keep_alive: Seconds the worker may be idle afterwards, negative for ever.
        parameters: The numbers and switches of what is asked; no words, which may be a prompt or a key.
        request: The whole body of a call that is kept; of a relayed one nothing but the parameters is.
    """

    path: ClassVar[str]
    purpose: ClassVar[Purpose] = "generate"
    keep_alive: KeepAlive | None = None
    parameters: dict[str, Any] = {}
    request: dict[str, Any] | None = None


class ChatCompletion(ApiCall, tag="chat_completion", frozen=True):
    """A call of `/v1/chat/completions`."""

    path: ClassVar[str] = "/v1/chat/completions"


class Completion(ApiCall, tag="completion", frozen=True):
    """A call of `/v1/completions`."""

    path: ClassVar[str] = "/v1/completions"


class ResponseCall(ApiCall, tag="response", frozen=True):
    """A call of `/v1/responses`."""

    path: ClassVar[str] = "/v1/responses"


class MessagesCall(ApiCall, tag="message", frozen=True):
    """A call of Anthropic's `/v1/messages`."""

    path: ClassVar[str] = "/v1/messages"


class TokenCount(ApiCall, tag="token_count", frozen=True):
    """A call of Anthropic's `/v1/messages/count_tokens`."""

    path: ClassVar[str] = "/v1/messages/count_tokens"


class Embedding(ApiCall, tag="embedding", frozen=True):
    """A call of `/v1/embeddings`."""

    path: ClassVar[str] = "/v1/embeddings"
    purpose: ClassVar[Purpose] = "embed"


class Rerank(ApiCall, tag="rerank", frozen=True):
    """A call of `/v1/rerank`."""

    path: ClassVar[str] = "/v1/rerank"
    purpose: ClassVar[Purpose] = "rerank"


class WorkerSpawn(Operation, tag="worker_spawn", frozen=True):
    """Start a worker with a model loaded. The queen names the worker before the hive is asked.

    Attributes:
        engine: `llama_cpp`, or an engine of the hive's configuration (`[engines.NAME]`).
        purpose: What its answers are: text, embeddings or rankings.
        slots: How many requests it answers at the same time.
        context_tokens: How many tokens one request may use, prompt and answer together.
        device: Where it is to run, such as `cuda:0`; the hive's choice by default.
    """

    model: ModelReference
    hive_id: str | None = None
    worker_id: str | None = None
    engine: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = "llama_cpp"
    purpose: Purpose = "generate"
    slots: Annotated[int, Meta(ge=1, le=256)] = 4
    context_tokens: Annotated[int, Meta(ge=16, le=10_000_000)] = 4096
    device: str | None = None
    keep_alive: KeepAlive | None = None


class WorkerStop(Operation, tag="worker_stop", frozen=True):
    """Stop a worker: drain for up to `drain_s` seconds, then TERM, then KILL."""

    worker_id: str
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class ModelDownload(Operation, tag="model_download", frozen=True):
    """Bring a model's file to a hive."""

    model: ModelReference
    hive_id: str | None = None


class ModelDelete(Operation, tag="model_delete", frozen=True):
    """Remove a model's file from a hive."""

    model: ModelReference
    hive_id: str | None = None


class QueenCheck(Operation, tag="queen_check", frozen=True):
    """Let the queen narrate `lines` sentences, and complete."""

    lines: Annotated[int, Meta(ge=0, le=100_000)] = 3


class HiveCheck(Operation, tag="hive_check", frozen=True):
    """Let a hive narrate `lines` sentences, and complete."""

    hive_id: str | None = None
    lines: Annotated[int, Meta(ge=0, le=100_000)] = 3


SUBMITTABLE = (Infer, WorkerSpawn, WorkerStop, ModelDownload, ModelDelete, QueenCheck, HiveCheck)
API_CALLS = (ChatCompletion, Completion, ResponseCall, MessagesCall, TokenCount, Embedding, Rerank)
OPERATIONS = (*SUBMITTABLE, *API_CALLS)
AnyApiCall = ChatCompletion | Completion | ResponseCall | MessagesCall | TokenCount | Embedding | Rerank
AnyOperation = Infer | AnyApiCall | WorkerSpawn | WorkerStop | ModelDownload | ModelDelete | QueenCheck | HiveCheck


def purpose_of(operation: Operation) -> Purpose:
    """Return what a worker has to be started for to answer an operation."""
    return operation.purpose if isinstance(operation, ApiCall) else "generate"


def operation_name(operation: Operation | type[Operation]) -> str:
    """Return the word that names this operation on the wire."""
    return str(operation.__struct_config__.tag)


def parse_operation(body: bytes) -> AnyOperation:
    """Read the body of `POST /v1/jobs`.

    Raises:
        InvalidRequestError: The body is no JSON, names no known operation, or has a wrong or unknown field;
            the message names the path and, for a misspelt word, the nearest known one.
    """
    return decode_strict(body, SUBMITTABLE)  # type: ignore[return-value]  # it returns one of them
