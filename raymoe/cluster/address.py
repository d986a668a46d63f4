"""Addresses of Ray clusters, checked before Ray connects: does a cluster answer, and does it take our token?

Ray itself tries for minutes if nobody answers, and for 20 s with a wrong token.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from raymoe.cluster.ray_internals import CLUSTER_ID_METHOD
from raymoe.config import Execution
from raymoe.schema import InputError

JOBS = "http://127.0.0.1:8265"
"""Address of a head's jobs API, to which `ray dashboard` forwards it, too."""
TIMEOUT = 10
"""Seconds after which a silent address counts as one where nobody is."""
_COPY = "copy the head's ~/.ray/auth_token to this machine, or set RAY_AUTH_TOKEN"


def token() -> str | None:
    """Return the token that Ray's clients here would show, from the same places; None if there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    try:
        file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return Path(file).read_text().strip() or None
    except OSError:
        return None


def keep_token_private() -> None:
    """Make sure that a token is in its usual place and only the user can read it: Ray would let everyone."""
    file = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # Ray says itself if it can't have one
        if token() is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                out.write(secrets.token_hex(32))
        file.chmod(0o600)


def no_token(where: str) -> InputError:
    """Return the error of a cluster that asks for a token while there is none here."""
    return InputError(f"{where} asks for a token, and there is none here: {_COPY}")


def refused_token(where: str) -> InputError:
    """Return the error of a cluster that has another token."""
    return InputError(f"{where} refuses this machine's token, which is wrong or has expired: {_COPY}")


def chosen(execution: Execution) -> tuple[str, str | None]:
    """Return (setting, address) of the cluster to work on; no address stands for a cluster of this machine alone."""
    key = "execution.address" if execution.address not in (None, "auto") else "RAY_ADDRESS"
    address = execution.address if key == "execution.address" else os.environ.get("RAY_ADDRESS")
    address = address or execution.address
    return key, None if address == "local" else address or None


def check(execution: Execution) -> bool:
    """Run `check_cluster` on the chosen address; False if there is none to ask."""
    key, address = chosen(execution)
    return address is not None and address != "auto" and check_cluster(key, address)


def check_cluster(key: str, address: str) -> bool:
    """Return True if the cluster at `address` (host:port of its head) asks for a token, and ours is right.

    Raises:
        InputError: not an address of a cluster, nobody there, or a missing or wrong token; names `key`.
    """
    if "://" in address:
        raise InputError(
            f"{key}: {address} is not host:port of a cluster's head, such as 10.0.0.1:6379"
            + ("; to submit a job there, add --submit to raymoe sweep" if address.startswith("http") else "")
        )
    where = f"{key}: the Ray cluster at {address}"
    if not _asks_for_more(key, address, None):
        return False
    if (found := token()) is None:
        raise no_token(where)
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise InputError(f"{where} asks for a token: set RAY_AUTH_MODE=token")
    if _asks_for_more(key, address, found):
        raise refused_token(where)
    return True


def _asks_for_more(key: str, address: str, shown: str | None) -> bool:
    """Ask the head for its cluster's id; True if it refuses for want of the right token."""
    import grpc

    metadata = [("authorization", f"Bearer {shown}")] if shown else None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            CLUSTER_ID_METHOD,
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            ask(b"", timeout=TIMEOUT, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise InputError(f"{key}: no Ray cluster at {address}: {_reason(error)}") from None
    return False


def _reason(error: Any) -> str:
    """Return the last of gRPC's chain of reasons, on one line."""
    if error.code().name == "DEADLINE_EXCEEDED":
        return f"no answer in {TIMEOUT} s"
    words = " ".join(str(error.details()).split())
    for known in ("Connection refused", "Domain name not found"):
        if known in words:
            return known.lower()
    return "what answers there is something else" if "HTTP/2" in words else words
