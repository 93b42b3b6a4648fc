"""Turns whatever a store's library raises into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moebius_batch.errors import StoreError
from moebius_runtime.errors import MoebiusError, RuntimeUnavailableError, one_line

_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "TokenRetrieval")
_UNREACHABLE = ("EndpointConnection", "ConnectTimeout", "ConnectionError", "ConnectionRefused", "ClientConnector")
CLOUD = "pip install 'moebius-edge[cloud]'"


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return one_line(str(getattr(error, "strerror", None) or error or type(error).__name__))[:300]


def _chain(error: BaseException | None) -> list[str]:
    """Names of the classes of an error and of those that it came from."""
    found: list[str] = []
    while error is not None and len(found) < 10:
        found.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def refusals(url: str, missing: type[MoebiusError], failing: type[MoebiusError] = StoreError) -> Iterator[None]:
    """Turns whatever a store's library raises into one sentence.

    Args:
        url: for the message.
        missing: the error for a file that is not there or locked.
        failing: the error for all else.
    """
    try:
        yield
    except MoebiusError:
        raise
    except ImportError as error:
        raise RuntimeUnavailableError(f"{url}: {reason(error)}. Install it: {CLOUD}") from error
    except Exception as error:  # each library has its own classes
        names = " ".join(_chain(error))
        if isinstance(error, FileNotFoundError) and not any(name in names for name in _UNREACHABLE):
            raise missing(f"there is no {url}; check its name") from error
        if isinstance(error, PermissionError):
            raise missing(f"{url}: access denied ({reason(error)}); check the credentials and their rights") from error
        if any(name in names for name in _CREDENTIALS):
            raise failing(
                f"{url}: no credentials were found ({reason(error)}); set them as the store's own tools expect, such "
                "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        if any(name in names for name in _UNREACHABLE):
            raise failing(f"{url} cannot be reached ({reason(error)}); check the network and the endpoint") from error
        raise failing(f"{url}: the store fails ({type(error).__name__}: {reason(error)})") from error
