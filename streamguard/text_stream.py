"""Guard text without an engine: `Guard.text_stream`. What may be shown is released at once.

Hold-back is minimal. What is withheld at any time is the longest end of the text that may still
become part of a match, and not a character more; DESIGN section 10 says how, and what `mask` means
where no other token can be chosen.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import numpy as np

from streamguard.compiler.program import Program
from streamguard.compiler.rules import MASK, STOP
from streamguard.errors import StreamError
from streamguard.scanner import WATCHED, Scanner

#: Stands where a mask rule's match was cut out. No pattern can hold it (`policy_schema.text_fault`)
#: and it is no word character: what stands on its two sides never joins to a match.
MARK = "\ufffd"


class TextVerdict(NamedTuple):
    """Why a stream has ended: the rule, and its match at start..end (exclusive) of what was fed.

    start, end  characters of str streams, bytes of bytes streams.
    """

    rule: str
    category: str
    action: str
    start: int
    end: int


class TextStream:
    """One text, str or bytes, that arrives in pieces. Make one with `Guard.text_stream`.

    The first `feed` says which of both it is; bytes may be cut anywhere, within characters too.
    What is released, counted and decided does not depend on how the text is cut into pieces.

    observe   counts.
    mask      cuts its match out and puts U+FFFD in its place; the text after it is read as a text
              of its own.
    redirect  ends the stream before its match, with the rule's message.
    halt      ends the stream before its match.

    Of matches that become certain with one character the most severe rule decides. The released
    text shows no match of the last three at any time, not even if it ended there.
    """

    def __init__(self, program: Program, policy: int) -> None:
        self._program = program
        self._scanner = Scanner(program, policy, watching=True)
        self._withholds = np.array([r.group in (MASK, STOP) for r in program.rules], bool)
        self._ranks = np.array([r.rank for r in program.rules], np.int64)
        self._counts = np.zeros(len(program.rules), np.int64)
        # Places in the held text where it must not end, and where the character before each begins.
        self._closings: dict[int, int] = {}
        self._held = bytearray()
        self._released = 0  # offset in bytes of the first one held
        self._released_units = 0  # the same in characters if the text is a str
        self._kind: type[str] | type[bytes] | None = None
        self._verdict: TextVerdict | None = None
        self._finished = False

    @property
    def verdict(self) -> TextVerdict | None:
        """What ended the stream, None while nothing did."""
        return self._verdict

    @property
    def counts(self) -> dict[str, int]:
        """Matches by rule id, up to the verdict: one per rule and end, `observe` included."""
        return {
            self._program.rules[index].rule.id: int(self._counts[index])
            for index in np.flatnonzero(self._counts)
        }

    @property
    def num_held(self) -> int:
        """Characters (bytes of a bytes stream) that are withheld right now."""
        return self._units(self._held)

    @overload
    def feed(self, piece: str) -> str: ...

    @overload
    def feed(self, piece: bytes) -> bytes: ...

    def feed(self, piece: str | bytes) -> str | bytes:
        """Take in the next piece of the text; return what may be shown of all held until now.

        Empty after a verdict. Cost: some 4 µs a call and some nanoseconds a byte and track. Raises
        StreamError for a piece of the other type than the first, and after `finish`.
        """
        if self._finished:
            raise StreamError(
                "feed after finish; a stream is one text, and its end may already have completed a "
                "match. Make another one with text_stream()."
            )
        kind = str if isinstance(piece, str) else bytes
        if self._kind is None:
            self._kind = kind
        elif kind is not self._kind:
            raise StreamError(
                f"feed was given {kind.__name__}; this stream began with {self._kind.__name__}, and "
                f"offsets count one or the other. Encode or decode before feeding."
            )
        if self._verdict is not None:
            return kind()
        # A lone surrogate is no character and part of no pattern, but it must come out again.
        self._held += piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
        return self._text(self._advance(final=False))

    def finish(self) -> str | bytes:
        """End the text; return the rest that may be shown. Empty after a verdict, or a second time."""
        if self._finished or self._verdict is not None:
            self._finished = True
            return self._text(b"")
        self._finished = True
        return self._text(self._advance(final=True))

    def _advance(self, *, final: bool) -> bytes:
        shown = b""
        scanner, held = self._scanner, self._held
        while True:
            at = scanner.position - self._released
            block = held[at : at + WATCHED]
            last = final and at + len(block) == len(held)
            if not block and not last:
                return shown
            steps, rows = scanner.watch(block, final=last)
            if closings := scanner.closings():
                self._closings.update(closings)
            ended = steps > len(block)
            if rows is not None:
                decided = self._withholds[rows[:, 2]]
                if decided.any():
                    shown += self._decide(rows, decided)
                    if self._verdict is not None:
                        return shown
                    continue
                self._count(rows)
            shown += self._release(scanner.position if ended else self._settled(scanner.hold_start))
            if ended:
                return shown

    def _decide(self, rows: np.ndarray, decided: np.ndarray) -> bytes:
        """Act on what one character makes certain: matches, of withholding rules where `decided`."""
        matches = rows[decided]
        # A track that does not know where its match starts has had all of it held.
        starts = np.maximum(matches[:, 3], self._released)
        best = int(np.argmin(self._ranks[matches[:, 2]]))
        _, end, index, _ = map(int, matches[best])
        rule = self._program.rules[index].rule
        if rule.action != "mask":
            self._count(rows)
            start = self._released_units + self._units(
                self._held[: int(starts[best]) - self._released]
            )
            end = self._released_units + self._units(self._held[: end - self._released])
            shown = self._release(self._settled(int(starts.min())))
            self._held.clear()
            self._verdict = TextVerdict(rule.id, rule.category, rule.action, start, end)
            return shown + (rule.message or "").encode()
        # The first match to end, and all that overlap it: what begins later is read again.
        end = int(matches[:, 1].min())
        while (further := int(matches[starts < end, 1].max())) > end:
            end = further
        self._count(rows[rows[:, 3] < end])
        shown = self._release(self._settled(int(starts[starts < end].min())))
        self._release(end)
        self._scanner.restart(end)
        self._closings.clear()
        return shown + MARK.encode()

    def _settled(self, end: int) -> int:
        """The last place up to `end` at which the text may stop without showing a match.

        A word that goes on may be shown; if nothing but its first half is, it must not read as the
        word that is forbidden. Concerns rules that look at the next character alone.
        """
        while end > self._released and end in self._closings:
            end = self._closings[end]
        return end

    def _release(self, end: int) -> bytes:
        """Take the text up to `end` out of what is held."""
        size = end - self._released
        if not size:
            return b""
        shown = bytes(self._held[:size])
        self._released_units += self._units(shown)
        self._released = end
        del self._held[:size]
        if self._closings:
            self._closings = {at: before for at, before in self._closings.items() if at > end}
        return shown

    def _count(self, rows: np.ndarray) -> None:
        np.add.at(self._counts, rows[:, 2], 1)

    def _units(self, held: bytes | bytearray) -> int:
        """What a stretch of the held text counts."""
        if self._kind is not str or held.isascii():
            return len(held)
        return len(held.decode("utf-8", "surrogatepass"))

    def _text(self, shown: bytes) -> str | bytes:
        return shown if self._kind is bytes else shown.decode("utf-8", "surrogatepass")
