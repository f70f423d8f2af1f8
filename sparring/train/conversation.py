"""A conversation with a policy: messages so far, and answers whose text arrives as it is written.

One engine serves all turns. No terminal lives here (cli/chatting.py), and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sparring.data.chat import ChatTemplate
from sparring.errors import UserError
from sparring.rollout.sampler import Sampling
from sparring.rollout.text_stream import TextStream
from sparring.train.inference import build_prompt, sampling_engine
from sparring.train.kv_budget import Memory
from sparring.train.policy import Policy
from sparring.types import Message, Rollout


class Conversation:
    """Turns of a user and a policy, in the policy's conversation format.

    sampling: how answers are drawn; turn n takes the seed n higher, so that a question asked twice
    is answered twice. memory: as in `kv_budget`. Raises UserError where the format has no template.
    """

    def __init__(
        self,
        policy: Policy,
        template: ChatTemplate,
        sampling: Sampling,
        *,
        memory: Memory = "auto",
    ) -> None:
        if template.source is None:
            raise UserError(
                "this model has no chat template, so it cannot be told who speaks. Continue plain"
                " text with --prompt TEXT, or train it with a template (data.template) first"
            )
        self._policy = policy.speaking(template)
        self._template = template
        self._sampling = sampling
        self._turn = 0
        self._engine = sampling_engine(
            self._policy,
            (),
            max_completion_tokens=sampling.max_completion_tokens,
            memory=memory,
        )
        self.messages: list[Message] = []

    def clear(self) -> None:
        """Forgets all messages."""
        self.messages = []

    def answer(self, text: str, on_text: Callable[[str], None]) -> Rollout:
        """The policy's answer to a message; on_text gets its pieces, what opens it included.

        Message and answer join the conversation. Where the answer is interrupted, what was written
        joins it; where the message cannot be answered (UserError), neither does.
        """
        asked: Message = {"role": "user", "content": text}
        messages = [*self.messages, asked]
        prompt = build_prompt(0, messages, self._template)
        sampling = replace(self._sampling, seed=(self._sampling.seed + self._turn) % 2**64)
        stream = TextStream(self._policy.decode, stop=sampling.stop, stop_ids=self._policy.stop_ids)
        written: list[str] = []

        def write(piece: str) -> None:
            if piece:
                written.append(piece)
                on_text(piece)

        def follow(_: int, __: int, token_ids: Sequence[int]) -> None:
            write(stream.add(token_ids))

        try:
            write(prompt.prefill)
            rollout = self._engine.generate([prompt], sampling, on_tokens=follow)[0][0]
            write(stream.finish(rollout.text))
        except KeyboardInterrupt:
            self._keep(asked, "".join(written))
            raise
        self._keep(asked, prompt.prefill + rollout.text)
        return rollout

    def _keep(self, asked: Message, answer: str) -> None:
        self.messages += [asked, {"role": "assistant", "content": answer}]
        self._turn += 1
