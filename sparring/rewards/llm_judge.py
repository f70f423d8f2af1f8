"""The reward `judge`: a language model behind an OpenAI-compatible API, asked where rules say no.

Rules go first: a sample that the rule accepted costs no call, so a judge can only turn a no into a
yes. A judge that is down, slow, garbled or out of budget gives None, never 0. The key is not read
here: the recipe names a variable (`api_key_env`), and whoever may read it calls `set_api_key`.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparring.errors import RewardError
from sparring.rewards.judge_api import ApiError, ApiKey, parse_endpoint, post
from sparring.rewards.judge_cache import JudgeCache, cache_key
from sparring.rewards.judge_prompt import (
    PROMPT_VERSION,
    JudgeVerdict,
    build_messages,
    clean,
    read_verdict,
    screen,
)
from sparring.rewards.math_extract import extract
from sparring.rewards.texts import after_thinking, full_texts

RULES = ("math", "code", "countdown")
"""Named rewards that decide on correctness: the first of them in the recipe is the rule."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOutcome:
    """A sample's value (None: no verdict), why, and the judge's own words."""

    value: float | None
    reason: str
    raw: str = ""


class JudgeReward:
    """What a rule missed: 1.0 where the rule said no and the judge says yes, else 0.0.

    None where there is no verdict. Without a rule among the rewards the judge decides alone.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        api_key_env: str = "",
        api_key: str = "",
        rule: str = "",
        answer: Literal["extracted", "final_text"] = "extracted",
        value: Literal["verdict", "probability"] = "verdict",
        threshold: float = 0.5,
        logprobs: bool = True,
        max_reply_tokens: int = 16,
        max_answer_characters: int = 2000,
        max_calls: int = 100_000,
        concurrency: int = 16,
        tries: int = 4,
        request_seconds: float = 15.0,
        batch_seconds: float = 25.0,
        cache: str = "runs/judge-cache",
    ) -> None:
        """Set the policy; nothing is sent before the first call.

        url: the API's base address. api_key_env: the variable that holds the key, "" for an API
        without one. rule: the reward that goes first, "" for the first of math, code, countdown.
        answer "final_text": all after the thinking instead of the extracted answer. value
        "probability": p(yes) instead of 1 above `threshold`. max_reply_tokens: raise it for a judge
        that reasons. max_calls: the budget of a run, retries included. tries: of one question.
        request_seconds: of one try; batch_seconds: of a whole batch, keep it below timeout_seconds.
        cache: folder for verdicts, "" for none.
        """
        if api_key:
            raise RewardError(
                "reward 'judge': a key does not belong in a recipe, which every run copies; "
                "put it into an environment variable and name that in api_key_env"
            )
        if api_key_env and not _VARIABLE.fullmatch(api_key_env):
            raise RewardError(
                "reward 'judge': api_key_env is not the name of a variable (letters, digits, _); "
                "if it is the key itself, remove it from the recipe and make a new key"
            )
        if not model:
            raise RewardError("reward 'judge': model is empty; name the model that the API serves")
        positive = {
            "max_reply_tokens": max_reply_tokens,
            "max_answer_characters": max_answer_characters,
            "max_calls": max_calls,
            "concurrency": concurrency,
            "tries": tries,
            "request_seconds": request_seconds,
            "batch_seconds": batch_seconds,
        }
        for name, number in positive.items():
            if number <= 0:
                raise RewardError(f"reward 'judge': {name} = {number} must be positive")
        if not 0 < threshold < 1:
            raise RewardError(f"reward 'judge': threshold = {threshold} must lie between 0 and 1")
        self.api_key_env = api_key_env
        self._key: ApiKey | None = None
        self._endpoint = parse_endpoint(url)
        self._url = url
        self._rule = rule
        self._takes_final_text = answer == "final_text"
        self._is_soft = value == "probability"
        self._threshold = threshold
        self._settings: dict[str, Any] = {
            "model": model,
            "temperature": 0.0,
            "max_tokens": max_reply_tokens,
        }
        if logprobs:
            self._settings |= {"logprobs": True, "top_logprobs": 10}
        self._max_answer_characters = max_answer_characters
        self._calls_left = max_calls
        self._concurrency = concurrency
        self._tries = tries
        self._request_seconds = request_seconds
        self._batch_seconds = batch_seconds
        self._cache = JudgeCache(Path(cache) if cache else None)
        self._jitter = random.Random(0)

    def set_api_key(self, key: str) -> None:
        """Give the value of the variable that `api_key_env` names; kept in memory alone."""
        self._key = ApiKey(key)

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        reference: Sequence[Any],
        prefills: Sequence[str] | None = None,
        judged: Mapping[str, Sequence[float | None]] | None = None,
        log_extra: Callable[..., None] | None = None,
        log_metric: Callable[..., None] | None = None,
    ) -> list[float | None]:
        """Judge a batch. Raises RewardError for what trying again cannot mend.

        That is a refused key, an unknown model, or a request that the API does not take.
        """
        if self.api_key_env and self._key is None:
            raise RewardError(
                f"reward 'judge': the variable {self.api_key_env} (api_key_env) was not read; set "
                "it and start the run by the command line, without isolate"
            )
        calls_before = self._calls_left
        rule = self._rule_values(judged, len(completions))
        texts = full_texts(completions, prefills)
        outcomes: list[JudgeOutcome | str] = []
        questions: dict[str, dict[str, Any]] = {}
        for prompt, text, wanted, ruled in zip(prompts, texts, reference, rule, strict=True):
            planned = self._without_judge(text, wanted, ruled)
            if isinstance(planned, str):
                messages = build_messages(_question_text(prompt), str(wanted), planned)
                body = {**self._settings, "messages": messages}
                key = cache_key([PROMPT_VERSION, self._url, body])
                questions[key] = body
                outcomes.append(key)
            else:
                outcomes.append(planned)
        answers = await self._ask_all(questions)
        found = [one if isinstance(one, JudgeOutcome) else answers[one] for one in outcomes]
        if log_extra is not None:
            log_extra("reason", [outcome.reason for outcome in found])
            log_extra("raw", [outcome.raw for outcome in found])
        if log_metric is not None:
            log_metric("questions", len(questions))
            log_metric("calls", calls_before - self._calls_left)
            log_metric("calls_left", self._calls_left)
            log_metric("cache_write_errors", self._cache.num_write_errors)
        return [outcome.value for outcome in found]

    def _rule_values(
        self, judged: Mapping[str, Sequence[float | None]] | None, num_samples: int
    ) -> Sequence[float | None] | list[str]:
        """The rule's values; a list of "" where there is no rule."""
        judged = judged or {}
        name = self._rule or next((name for name in judged if name in RULES), "")
        if not name:
            return [""] * num_samples
        if name not in judged:
            known = ", ".join(judged) or "none"
            raise RewardError(
                f"reward 'judge': rule = '{name}' is no other reward of this run; they are: {known}"
            )
        return judged[name]

    def _without_judge(
        self, text: str, reference: Any, ruled: float | str | None
    ) -> JudgeOutcome | str:
        """A sample's outcome if no judge need be asked, else the answer to show it."""
        if ruled is None:
            return JudgeOutcome(value=None, reason="the rule has no verdict")
        if not isinstance(ruled, str) and ruled > 0:
            return JudgeOutcome(value=0.0, reason="the rule accepted it: nothing to add")
        if reference is None or not str(reference).strip():
            return JudgeOutcome(value=None, reason="there is no reference")
        if self._takes_final_text:
            found = after_thinking(text)
            fault = "the thinking never ends" if found is None else ""
        else:
            extracted = extract(text, ("answer", "boxed", "hash", "answer_is", "bare"))
            found, fault = extracted.text, extracted.reason
        if found is None:
            return JudgeOutcome(value=0.0, reason=fault)
        answer = clean(found)
        fault = screen(answer, max_characters=self._max_answer_characters)
        return JudgeOutcome(value=0.0, reason=fault) if fault else answer

    async def _ask_all(self, questions: Mapping[str, dict[str, Any]]) -> dict[str, JudgeOutcome]:
        """An outcome for each question, within the batch's time."""
        if not questions:
            return {}
        deadline = time.monotonic() + self._batch_seconds
        gate = asyncio.Semaphore(self._concurrency)
        tasks = {
            key: asyncio.create_task(self._ask(key, body, gate, deadline))
            for key, body in questions.items()
        }
        try:
            await asyncio.wait(
                tasks.values(), timeout=self._batch_seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            outcomes = {}
            for key, task in tasks.items():
                if task.done():
                    outcomes[key] = task.result()
                else:
                    reason = f"not judged within batch_seconds = {self._batch_seconds:g}"
                    outcomes[key] = JudgeOutcome(value=None, reason=reason)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return outcomes

    async def _ask(
        self, key: str, body: dict[str, Any], gate: asyncio.Semaphore, deadline: float
    ) -> JudgeOutcome:
        known = self._cache.get(key)
        if known is not None:
            return self._outcome(known, "cached ")
        failure = ""
        async with gate:
            for attempt in range(self._tries):
                if self._calls_left <= 0:
                    return JudgeOutcome(value=None, reason="the budget of max_calls is spent")
                self._calls_left -= 1
                try:
                    left = max(0.05, deadline - time.monotonic())
                    seconds = min(self._request_seconds, left)
                    reply = await post(self._endpoint, body, key=self._key, seconds=seconds)
                except ApiError as error:
                    if not error.is_retried:
                        raise RewardError(
                            f"reward 'judge': {self._url} refused the request: {error}; check url, "
                            "model, the key, and logprobs = false for an API without them"
                        ) from None
                    failure = str(error)
                    wait = self._wait_seconds(attempt, error.retry_after)
                    if attempt + 1 < self._tries and time.monotonic() + wait < deadline:
                        await asyncio.sleep(wait)
                        continue
                    break
                verdict = read_verdict(reply)
                if verdict is not None:
                    raw = self._key.redact(verdict.raw) if self._key else verdict.raw
                    verdict = JudgeVerdict(verdict.probability, raw)
                    self._cache.put(key, verdict)
                    return self._outcome(verdict, "")
                return JudgeOutcome(value=None, reason="the judge's reply holds no verdict")
        return JudgeOutcome(value=None, reason=f"the judge failed: {failure}")

    def _wait_seconds(self, attempt: int, retry_after: float | None) -> float:
        """Doubling up to half a minute, with jitter, and at least what the server asked for."""
        wait = _FIRST_WAIT_SECONDS * 2.0**attempt * self._jitter.uniform(0.5, 1.5)
        return max(min(wait, _LONGEST_WAIT_SECONDS), retry_after or 0.0)

    def _outcome(self, verdict: JudgeVerdict, how: str) -> JudgeOutcome:
        is_yes = verdict.probability > self._threshold
        value = float(verdict.probability if self._is_soft else is_yes)
        reason = f"{how}judge: {'yes' if is_yes else 'no'} (p = {verdict.probability:.3f})"
        return JudgeOutcome(value=value, reason=reason, raw=verdict.raw)


def _question_text(prompt: Any) -> str:
    """The question as text: the prompt, or a conversation's turns without the system's."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn.get("role") != "system"]
    return "\n\n".join(str(turn.get("content") or "") for turn in turns)
