# SPDX-License-Identifier: Apache-2.0
"""Text of a growing row of tokens: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What decoders give for bytes that are no (or not yet a whole) UTF-8 character.
_INCOMPLETE = "\ufffd"
#: Given tokens that stand before the new ones while these are decoded: whether a first token begins with a space, and
#: whether a character is continued, shows only there.
_CONTEXT = 6


class TextStream:
    """The text of one row's new tokens, piece by piece.

    Only the tokens since the last piece but one are decoded at a step, as in Hugging Face's text-generation-inference
    and ``tokenizers``' ``DecodeStream``; unlike there what is held back can be had at the end.

    Args:
        decode: token ids -> text, special tokens left out.
        context: the given own tokens.
        stop: strings that end the text.

    Attributes:
        stopped: the stop string that was found, None until then. Nothing may be pushed afterwards.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens = list(context[-_CONTEXT:])
        self._known = len(self._tokens)  # of which the text is out already
        self._before = decode(self._tokens).rstrip(_INCOMPLETE) if self._tokens else ""
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if len(text) <= len(self._before) or text.endswith(_INCOMPLETE):
            return ""
        new = text[len(self._before) :]
        del self._tokens[: self._known]
        self._known, self._before = len(self._tokens), self._decode(self._tokens)
        return self._certain(new)

    def finish(self) -> str:
        """What was held back, incomplete characters included; no token follows."""
        if self.stopped is not None:
            return ""
        rest = self._certain(self._decode(self._tokens)[len(self._before) :])
        if self.stopped is not None:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [(at, -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, _, self.stopped = min(found)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
