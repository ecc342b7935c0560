"""A judge behind any OpenAI-compatible chat endpoint: asked with retries, and never trusted to answer well.

Waiting and asking again (on 429 with Retry-After, on 5xx, when nothing comes in time) is urllib3's. The key comes from
an environment variable; whatever an endpoint says is cleared of it before it is shown or kept.
"""

import dataclasses
import json
import os
import re
from typing import Any

import urllib3
from urllib3.util import parse_url

from mice_jax.errors import UserError, one_line

RETRIED = (408, 429, 500, 502, 503, 504)
REFUSED = (401, 403, 404)  # a key, a model or an address that is wrong: no other question fares better
SCORE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")  # what MT-Bench's prompts ask for
LEAST, MOST = 1, 10
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the longest answer; newer endpoints take the second alone
SHOWN = 200  # characters of an endpoint's word that an error quotes


class Unusable(Exception):
    """Why an endpoint's answer, or its want of one, is no judgement."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """An endpoint, a model of it, and how patiently it is asked."""

    url: str  # up to what comes before /chat/completions
    model: str
    key: str = dataclasses.field(default="", repr=False)
    timeout_s: float = 120.0
    retries: int = 6
    backoff_s: float = 1.0  # doubled with each retry, up to a minute
    max_tokens: int = 2048
    parallel: int = 8  # questions that are asked at once
    _pool: urllib3.PoolManager = dataclasses.field(init=False, repr=False, compare=False)
    _limit: list[str] = dataclasses.field(init=False, repr=False, compare=False)  # the one that the endpoint takes

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pool", urllib3.PoolManager(maxsize=self.parallel))
        object.__setattr__(self, "_limit", [LIMITS[0]])

    def check(self) -> None:
        """One short question, asked as judgements are; UserError where the endpoint cannot be reached or refuses."""
        try:
            retries = urllib3.Retry(min(self.retries, 2), connect=0, **self._patience())
            self._ask([{"role": "user", "content": "Say yes."}], retries)
        except Unusable as e:
            raise UserError(f"--judge_url={self.url}: {e}. Nothing was generated yet.") from None

    def ask(self, system: str, prompt: str) -> str:
        """What the judge says; Unusable where it says nothing, UserError where it refuses whatever is asked."""
        said = [{"role": "system", "content": system}] if system else []
        retries = urllib3.Retry(self.retries, **self._patience())
        content = self._ask([*said, {"role": "user", "content": prompt}], retries).get("content")
        if not isinstance(content, str):  # one that thinks may have come to no word
            raise Unusable("a chat completion without a text")
        return content

    def _patience(self) -> dict[str, Any]:
        return {
            "redirect": False,
            "allowed_methods": None,  # all: a question asked twice costs money, and changes nothing
            "status_forcelist": RETRIED,
            "backoff_factor": self.backoff_s,
            "backoff_max": 60,
            "backoff_jitter": self.backoff_s / 4,
            "retry_after_max": 600,
            "raise_on_status": False,
        }

    def _ask(self, messages: list[dict[str, str]], retries: urllib3.Retry) -> dict[str, Any]:
        """The message that is answered."""
        limit = self._limit[0]
        answer = self._post(messages, limit, retries)
        if answer.status == 400 and limit == LIMITS[0] and any(name.encode() in answer.data for name in LIMITS):
            other = self._post(messages, LIMITS[1], retries)
            if other.status != 400:  # else it minds something else
                self._limit[0], answer = LIMITS[1], other
        if answer.status in REFUSED:
            raise UserError(f"--judge_url={self.url} refuses: {self._status(answer)}")
        if answer.status != 200:
            raise Unusable(self._status(answer))
        return _message(answer.data)

    def _post(self, messages: list[dict[str, str]], limit: str, retries: urllib3.Retry) -> Any:
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
        text = " ".join(answer.data.decode("utf-8", "replace").split())
        return self._cleared(f"status {answer.status}, {text[:SHOWN]!r}")

    def _cleared(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def make_judge(url: str | None, model: str | None, key_env: str, **patience: Any) -> Judge:
    """The judge that flags describe, with the key from an environment variable."""
    if not url or not model:
        raise UserError("a judge is needed: give --judge_url=https://host/v1 and --judge_model=NAME.")
    parsed = parse_url(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"--judge_url={url!r} must begin with http:// or https:// and name a host.")
    if parsed.auth or parsed.query:
        raise UserError("--judge_url holds a name or a key; give the key in an environment variable (--judge_key_env).")
    key = os.environ.get(key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {key_env} holds signs that no header may have: it is no key.")
    return Judge(url.rstrip("/"), model, key, **patience)


def score_of(said: str) -> float:
    """The first `[[n]]`; Unusable where there is none, or one that is no score."""
    found = SCORE.search(said)
    if not found:
        raise Unusable("no [[score]] in what the judge said")
    score = float(found[1])
    if not LEAST <= score <= MOST:
        raise Unusable(f"a score that is not from {LEAST} to {MOST}")
    return score


def _message(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)["choices"][0]["message"]
    except (ValueError, LookupError, TypeError):
        message = None
    if not isinstance(message, dict):
        raise Unusable("an answer that is no chat completion")
    return message
