"""A small client of OpenAI's chat protocol: what vLLM, SGLang, llama.cpp and others serve.

Standard library only. A request is tried again after an error that may pass (connection, timeout,
429, 5xx), waiting twice as long each time.
"""

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from pipeline.data.images import open_image

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP codes that may be gone in a moment
FATAL = (401, 403, 404, 405)  # no sample can succeed


class NoAnswer(Exception):
    """This request has no answer; `reason` is a short word for counting. down: no server at all."""

    def __init__(self, reason: str, detail: str = "", *, down: bool = False):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.down = reason, down


class ChatServer:
    """url: up to the version, e.g. http://localhost:8000/v1. key_variable: the environment variable
    that holds the key, if one is needed. timeout_seconds: of one try. attempts: tries in all.
    backoff_seconds: the first wait.
    """

    def __init__(
        self,
        *,
        url: str,
        key_variable: str | None = None,
        timeout_seconds: float = 120.0,
        attempts: int = 4,
        backoff_seconds: float = 1.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url {url!r}: give http://HOST:PORT/v1")
        if timeout_seconds <= 0 or attempts < 1 or backoff_seconds < 0:
            raise ValueError(
                f"timeout_seconds={timeout_seconds}, attempts={attempts}, "
                f"backoff_seconds={backoff_seconds}: positive, at least 1, not negative"
            )
        self.url, self.key_variable = url.rstrip("/"), key_variable
        self.timeout_seconds, self.attempts = timeout_seconds, attempts
        self.backoff_seconds = backoff_seconds

    def complete(self, body: Mapping[str, Any]) -> str:
        """The text of the answer to /chat/completions.

        Raises NoAnswer for this request alone (or, with `down`, when nobody listens), ValueError
        for what no request can survive: wrong address, model or key.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.attempts):
            try:
                return self._once(data)
            except NoAnswer as error:
                code = error.reason.removeprefix("http_")
                passing = error.reason in ("timeout", "no_connection") or (
                    code.isdigit() and int(code) in PASSING
                )
                if not passing or attempt == self.attempts - 1:
                    raise
                time.sleep(self.backoff_seconds * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            key = os.environ.get(self.key_variable)
            if not key:
                raise ValueError(
                    f"key_variable={self.key_variable}: no such environment variable; export it"
                )
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace")
            if error.code in FATAL:
                raise ValueError(
                    f"{self.url} refuses every request (HTTP {error.code}: {detail}): check url, "
                    "model and key_variable"
                ) from error
            raise NoAnswer(f"http_{error.code}", detail) from error
        except TimeoutError as error:
            raise NoAnswer("timeout", f"{self.timeout_seconds:g} s") from error
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise NoAnswer("timeout", f"{self.timeout_seconds:g} s") from error
            raise NoAnswer("no_connection", str(error), down=True) from error
        return content_of(content)


def content_of(response: bytes) -> str:
    """The answer's text in a response body. Raises NoAnswer("bad_answer")."""
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NoAnswer("bad_answer", response[:200].decode(errors="replace")) from error
    if not isinstance(text, str):
        raise NoAnswer("bad_answer", f"content is {text!r}")
    return text


def chat_messages(text: str, system: str | None, image: bytes | None) -> list[dict[str, Any]]:
    """A question as messages; the image goes along as a data URL, its bytes unchanged.

    Raises BadImage for bytes that are no image we know.
    """
    content: Any = text
    if image is not None:
        kind = open_image(image).get_format_mimetype()
        url = f"data:{kind};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        if text:
            content.append({"type": "text", "text": text})
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": content}]
