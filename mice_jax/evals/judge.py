"""Asks a judge at an OpenAI-compatible chat endpoint, with retries, and reads the score in its answer.

urllib3 waits and retries on 429 (with Retry-After), on 5xx and on timeouts. The key comes from an environment variable,
and is removed from error messages of the endpoint before they are shown.
"""

import dataclasses
import json
import os
import re
from typing import Any

import urllib3
from urllib3.util import parse_url

from mice_jax.cli.flag_checks import check_judge
from mice_jax.errors import UserError, one_line

RETRIED = (408, 429, 500, 502, 503, 504)
# These statuses mean that the key, the model or the address is wrong, so that other questions would fail too.
FATAL_STATUS = (401, 403, 404)
SCORE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")  # MT-Bench's prompts require this form.
MIN_SCORE, MAX_SCORE = 1, 10
LIMITS = ("max_tokens", "max_completion_tokens")  # Names of the longest answer; newer endpoints take only the second.
MAX_QUOTED_CHARS = 200  # An error quotes at most this much of an endpoint's response.


class Unusable(Exception):
    """The endpoint gave no usable judgement; the message says why."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """The model of an endpoint, with the settings of requests and retries.

    Attributes:
      url: The address, without /chat/completions.
      model: The model's name at the endpoint.
      key: The key; "" sends none.
      timeout_s: Seconds to wait for an answer.
      retries: The maximum number of retries of a question.
      backoff_s: Seconds before the first retry, doubled with each further one up to a minute.
      max_tokens: The longest answer, in tokens.
      parallel: The number of questions that are asked at once.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    timeout_s: float = 120.0
    retries: int = 6
    backoff_s: float = 1.0
    max_tokens: int = 2048
    parallel: int = 8
    _pool: urllib3.PoolManager = dataclasses.field(init=False, repr=False, compare=False)
    # The one name in LIMITS that the endpoint accepts, in a list because the class is frozen.
    _limit: list[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pool", urllib3.PoolManager(maxsize=self.parallel))
        object.__setattr__(self, "_limit", [LIMITS[0]])

    def check(self) -> None:
        """Asks one short question; raises UserError if the endpoint cannot be reached or does not accept it."""
        try:
            retries = urllib3.Retry(min(self.retries, 2), connect=0, **self._retry_arguments())
            self._ask([{"role": "user", "content": "Say yes."}], retries)
        except Unusable as e:
            raise UserError(f"--judge_url={self.url}: {e}. Nothing was generated yet.") from None

    def ask(self, system: str, prompt: str) -> str:
        """Asks the judge a question.

        Args:
          system: The system message; "" sends none.
          prompt: The question.

        Returns:
          The judge's answer.

        Raises:
          Unusable: There is no answer to this question.
          UserError: The endpoint would not accept any question.
        """
        system_messages = [{"role": "system", "content": system}] if system else []
        retries = urllib3.Retry(self.retries, **self._retry_arguments())
        content = self._ask([*system_messages, {"role": "user", "content": prompt}], retries).get("content")
        if not isinstance(content, str):  # A reasoning model may end before its answer.
            raise Unusable("a chat completion without a text")
        return content

    def _retry_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `urllib3.Retry` apart from the number of retries."""
        return {
            "redirect": False,
            "allowed_methods": None,  # All methods are retried: a repeated question costs money, but changes nothing.
            "status_forcelist": RETRIED,
            "backoff_factor": self.backoff_s,
            "backoff_max": 60,
            "backoff_jitter": self.backoff_s / 4,
            "retry_after_max": 600,
            "raise_on_status": False,
        }

    def _ask(self, messages: list[dict[str, str]], retries: urllib3.Retry) -> dict[str, Any]:
        """Sends messages and returns the message of the answer."""
        limit = self._limit[0]
        answer = self._post(messages, limit, retries)
        if answer.status == 400 and limit == LIMITS[0] and any(name.encode() in answer.data for name in LIMITS):
            other = self._post(messages, LIMITS[1], retries)
            if other.status != 400:  # Otherwise the error has another cause.
                self._limit[0], answer = LIMITS[1], other
        if answer.status in FATAL_STATUS:
            raise UserError(f"--judge_url={self.url} refuses: {self._status(answer)}")
        if answer.status != 200:
            raise Unusable(self._status(answer))
        return _message(answer.data)

    def _post(self, messages: list[dict[str, str]], limit: str, retries: urllib3.Retry) -> Any:
        """Sends one request; raises Unusable if there is no response."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        asked = {"model": self.model, "messages": messages, "temperature": 0, limit: self.max_tokens}
        try:
            return self._pool.request(
                "POST",
                f"{self.url}/chat/completions",
                body=json.dumps(asked),
                headers=headers,
                timeout=self.timeout_s,
                retries=retries,
            )
        except urllib3.exceptions.HTTPError as e:
            cause = e.reason if isinstance(e, urllib3.exceptions.MaxRetryError) and e.reason else e
            raise Unusable(self._cleared(f"no answer: {type(cause).__name__}, {one_line(cause)}")) from None

    def _status(self, answer: Any) -> str:
        """Returns the status and the beginning of a response, for an error message."""
        text = " ".join(answer.data.decode("utf-8", "replace").split())
        return self._cleared(f"status {answer.status}, {text[:MAX_QUOTED_CHARS]!r}")

    def _cleared(self, text: str) -> str:
        """Returns a text with the key replaced by ***."""
        return text.replace(self.key, "***") if self.key else text


def make_judge(url: str | None, model: str | None, key_env: str, **fields: Any) -> Judge:
    """Makes a judge, with the key from an environment variable.

    Args:
      url: The endpoint's address, without /chat/completions.
      model: The model's name at the endpoint.
      key_env: The name of the environment variable with the key; if it is not set, no key is sent.
      **fields: Further fields of `Judge`.

    Returns:
      The judge, to which nothing has been sent yet.

    Raises:
      UserError: The address, the model or the key is missing or not valid.
    """
    check_judge(url, model)
    assert url and model
    parsed = parse_url(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"--judge_url={url!r} must begin with http:// or https:// and name a host.")
    if parsed.auth or parsed.query:
        raise UserError("--judge_url holds a name or a key; give the key in an environment variable (--judge_key_env).")
    key = os.environ.get(key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the environment variable {key_env} contains characters that an HTTP header cannot have, so it is not a "
            "valid key."
        )
    return Judge(url.rstrip("/"), model, key, **fields)


def score_of(judgement: str) -> float:
    """Returns the first `[[n]]` of a judgement; raises Unusable if there is none, or it is out of range."""
    found = SCORE.search(judgement)
    if not found:
        raise Unusable("no [[score]] in the judgement")
    score = float(found[1])
    if not MIN_SCORE <= score <= MAX_SCORE:
        raise Unusable(f"a score that is not from {MIN_SCORE} to {MAX_SCORE}")
    return score


def _message(data: bytes) -> dict[str, Any]:
    """Returns the message in a response; raises Unusable if there is none."""
    try:
        message = json.loads(data)["choices"][0]["message"]
    except (ValueError, LookupError, TypeError):
        message = None
    if not isinstance(message, dict):
        raise Unusable("an answer that is not a chat completion")
    return message
