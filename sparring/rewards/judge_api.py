"""One call of an OpenAI-compatible chat API over asyncio: a request, a deadline, a JSON answer.

Redirects are not followed and proxies are not looked for, so a key goes to the host that the recipe
names and to no other. What a server sends is bounded in size and believed in nothing.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sparring.errors import RewardError

MAX_REPLY_BYTES = 1 << 20
_MAX_HEAD_BYTES = 64 << 10
_RETRIED = frozenset({408, 409, 425, 429})


class ApiKey:
    """Holds a key so that it is not shown, logged or pickled by accident."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise RewardError(
                "the judge's API key is empty or holds blanks or control characters; set the "
                "variable that api_key_env names to the key alone"
            )
        self._text = text

    def __repr__(self) -> str:
        return "ApiKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not pickled")

    def header(self) -> str:
        """The value of the Authorization header."""
        return f"Bearer {self._text}"

    def redact(self, text: str) -> str:
        """`text` without the key, should a server send it back."""
        return text.replace(self._text, "(key)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the API is: scheme "http" or "https", host, port, and the path of chat completions."""

    scheme: str
    host: str
    port: int
    path: str


def parse_endpoint(url: str) -> Endpoint:
    """Read a base address such as https://api.example.com/v1. Raises RewardError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RewardError(f"reward 'judge': url cannot be read: {error}") from error
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RewardError(
            "reward 'judge': url holds a user, password or query; it must be the bare address, and "
            "a key is named by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(
            f"reward 'judge': url = {url!r} must start with http:// or https:// and name a host, "
            "for example http://127.0.0.1:8000/v1"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    if not (path.isascii() and path.isprintable()) or " " in path:
        raise RewardError(
            f"reward 'judge': url = {url!r} has a path with blanks or strange letters"
        )
    standard = 443 if parts.scheme == "https" else 80
    return Endpoint(scheme=parts.scheme, host=parts.hostname, port=port or standard, path=path)


class ApiError(Exception):
    """A call failed. is_retried: trying again may help; retry_after: seconds asked for."""

    def __init__(self, text: str, *, is_retried: bool, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.is_retried = is_retried
        self.retry_after = retry_after


async def post(endpoint: Endpoint, body: Any, *, key: ApiKey | None, seconds: float) -> Any:
    """Post `body` as JSON and return the answer's JSON. Raises ApiError, TimeoutError never.

    seconds: for everything together, from the connection to the last byte.
    """
    try:
        async with asyncio.timeout(seconds):
            status, headers, content = await _exchange(endpoint, body, key)
    except TimeoutError as error:
        raise ApiError(f"no answer within {seconds:g} s", is_retried=True) from error
    except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
        text = f"{type(error).__name__}: {error}"
        raise ApiError(key.redact(text) if key else text, is_retried=True) from error
    if status != 200:
        text = content[:300].decode("utf-8", "replace")
        is_retried = status in _RETRIED or status >= 500
        raise ApiError(
            f"status {status}: {key.redact(text) if key else text}",
            is_retried=is_retried,
            retry_after=_seconds(headers.get("Retry-After")),
        )
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError("the answer is no JSON", is_retried=True) from error


async def _exchange(
    endpoint: Endpoint, body: Any, key: ApiKey | None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    content = json.dumps(body).encode()
    context = ssl.create_default_context() if endpoint.scheme == "https" else None
    reader, writer = await asyncio.open_connection(
        endpoint.host, endpoint.port, ssl=context, limit=_MAX_HEAD_BYTES
    )
    try:
        head = [
            f"POST {endpoint.path} HTTP/1.1",
            f"Host: {endpoint.host}:{endpoint.port}",
            "Content-Type: application/json",
            "Accept: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        ]
        if key is not None:
            head.append(f"Authorization: {key.header()}")
        writer.write("\r\n".join([*head, "", ""]).encode("ascii") + content)
        await writer.drain()
        return await _read_reply(reader)
    finally:
        writer.close()


async def _read_reply(
    reader: asyncio.StreamReader,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    while True:
        first, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise ValueError("the answer is not HTTP")
        status = int(words[1])
        if status != 100:  # "go on" comes before the answer
            break
    headers = http.client.parse_headers(io.BytesIO(rest))
    if "chunked" in headers.get("Transfer-Encoding", "").lower():
        return status, headers, await _read_chunks(reader)
    length = headers.get("Content-Length")
    if length is not None:
        if not length.isdigit() or int(length) > MAX_REPLY_BYTES:
            raise ValueError(f"the answer's length is {length[:20]!r}")
        return status, headers, await reader.readexactly(int(length))
    content = bytearray()
    while chunk := await reader.read(65536):
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise ValueError("the answer is too long")
    return status, headers, bytes(content)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    content = bytearray()
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if size < 0 or len(content) + size > MAX_REPLY_BYTES:
            raise ValueError("the answer is too long")
        if size == 0:
            return bytes(content)
        content += await reader.readexactly(size)
        await reader.readexactly(2)


def _seconds(text: str | None) -> float | None:
    """Retry-After as seconds; a date is not read."""
    try:
        seconds = float(text) if text else -1.0
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e6 else None
