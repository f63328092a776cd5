"""What a failed request to a store over a network means, and how to say it.

What obstore says is understood here, what a NameNode says in `namenode`. obstore tells the status and the
body of an answer only in the text of its exception. That text may hold parts of credentials (an access key, a
signed string), so nothing of it is passed on but the status and the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from everstep.errors import EverstepError, Mismatch, NotFound, Unavailable, Unsupported

MISSING, TAKEN, PAST_END, PASSING, REFUSED, UNABLE, NO_BUCKET = (
    "missing", "taken", "past the end", "passing", "refused", "unable", "no bucket",
)  # fmt: skip
"""There is no such object; there is one already; the range begins after the object's end; worth another try;
not for these credentials or this request; nothing that this store can do; there is no such bucket."""

_STATUS = re.compile(r"(?:status code|status): (\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_PASSING = {
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "ServerBusy", "OperationTimedOut", "OperationAborted", "NoSuchUpload",
}  # fmt: skip
_PASSING_STATUSES = {408, 409, 425, 429}
_NO_CREDENTIALS = ("169.254.169.254", "metadata.google.internal", "credential")
_REASONS = {
    "certificate": "its certificate is not trusted",
    "invalidpath": "an object's name there is no path",
    "dns error": "its name is not known",
    "connection refused": "the connection was refused",
    "connection reset": "the connection was reset",
    "broken pipe": "the connection was cut",
    "connection closed": "the connection was cut",
    "timed out": "no answer in time",
    "timedout": "no answer in time",
}


@dataclass(frozen=True)
class Answer:
    """`kind` is one of the seven above; `reason` is for people, and free of secrets."""

    kind: str
    reason: str


def understood(error: Exception) -> Answer | None:
    """What an exception of obstore means; None for one that is no answer of a store, but a bug."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"BaseError", "OSError", "NotImplementedError"}:
        return None
    text = str(error)
    status = int(match[1]) if (match := _STATUS.search(text)) else 0
    code = match[1] if (match := _CODE.search(text)) else ""
    reason = " ".join(filter(None, [str(status or ""), code])) or _spoken(text)
    return Answer(_kind(names, status, code, text), reason)


def _kind(names: set[str], status: int, code: str, text: str) -> str:
    if code in _NO_BUCKET:
        return NO_BUCKET
    if code in _PASSING:
        return PASSING
    if names & {"NotFoundError", "FileNotFoundError"}:
        return MISSING
    if names & {"AlreadyExistsError", "PreconditionError", "NotModifiedError"}:
        return TAKEN
    if status == 416 or code == "InvalidRange" or "StartTooLarge" in text:
        return PAST_END
    if status == 501 or "NotImplementedError" in names or "NotPartial" in text:
        return UNABLE
    if names & {"PermissionDeniedError", "UnauthenticatedError", "InvalidPathError"}:
        return REFUSED
    if status:
        return PASSING if status >= 500 or status in _PASSING_STATUSES else REFUSED
    # No answer at all: waiting helps where the network is to blame, and not where we are.
    return REFUSED if _is_ours(text) else PASSING


def _is_ours(text: str) -> bool:
    return "certificate" in text.lower() or any(sign in text.lower() for sign in _NO_CREDENTIALS)


def _spoken(text: str) -> str:
    low = text.lower()
    if any(sign in low for sign in _NO_CREDENTIALS):
        return "no credentials were found"
    return next((reason for sign, reason in _REASONS.items() if sign in low), "no answer")


@dataclass(frozen=True)
class Place:
    """What the sentences name: the store, its bucket, what to look at where it refuses, and what to do where
    it is unable."""

    url: str
    bucket: str
    credentials: str
    instead: str = "EVERSTEP_UNSAFE_SINGLE_WRITER=1, if nobody else ever writes there; or another store"


KEPT = "what was committed before is intact"


def sentence(answer: Answer, place: Place, verb: str, key: str) -> EverstepError:
    """The error for an answer that no other try will change."""
    where = f"{place.url}/{key}" if key else place.url
    if answer.kind == MISSING:
        return NotFound(f"{place.url} has no object {key}", key=key)
    if answer.kind == NO_BUCKET:
        return Mismatch(
            f"there is no bucket {place.bucket!r} for {place.url}",
            kept="nothing was touched",
            next="create the bucket, or name another",
            key=key,
        )
    if answer.kind == UNABLE:
        return Unsupported(
            f"{place.url} cannot {verb} as a chain needs it ({answer.reason})",
            kept=KEPT,
            next=place.instead,
            key=key,
        )
    return Unavailable(
        f"cannot {verb} {where} ({answer.reason})",
        kept=KEPT,
        next=f"check {place.credentials}",
        key=key,
    )


def given_up(answer: Answer, place: Place, verb: str, key: str, after_s: float) -> Unavailable:
    """The error for a store that was away for too long."""
    where = f"{place.url}/{key}" if key else place.url
    return Unavailable(
        f"cannot {verb} {where}: {answer.reason}, tried for {after_s:.0f} s",
        kept=KEPT,
        next=f"everstep doctor {place.url}",
        key=key,
        away=True,
    )
