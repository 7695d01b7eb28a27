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
from streamguard.policy_regexes import needs_next_character
from streamguard.scanner import Scanner

#: Stands where a mask rule's match was cut out. No pattern can hold it (`policy_schema.text_fault`)
#: and it is no word character: what stands on its two sides never joins to a match.
MARK = "\ufffd"
#: After a cut the rest of its block is read again, so that blocks must not be long.
_BLOCK = 4096


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
        self._scanner = Scanner(program, policy)
        self._withholds = np.array([r.group in (MASK, STOP) for r in program.rules], bool)
        self._ranks = np.array([r.rank for r in program.rules], np.int64)
        name = program.policies[policy]
        # Only a match that is certain one character late can be shown by what ends right behind it.
        self._late = any(
            r.policy == name and r.group in (MASK, STOP) and needs_next_character(r.rule)
            for r in program.rules
        )
        # Where a regex's match begins is known only by what was held before each byte.
        regexes = any(
            r.policy == name and r.group in (MASK, STOP) and r.rule.regexes for r in program.rules
        )
        self._block = 1 if regexes else _BLOCK
        self._behind = Scanner(program, policy) if self._late else None
        self._counts = np.zeros(len(program.rules), np.int64)
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
        return self._units(len(self._held))

    @overload
    def feed(self, piece: str) -> str: ...

    @overload
    def feed(self, piece: bytes) -> bytes: ...

    def feed(self, piece: str | bytes) -> str | bytes:
        """Take in the next piece of the text; return what may be shown of all held until now.

        Empty after a verdict. Cost: some 30 µs a call and some nanoseconds a byte; with regexes
        some 30 µs a byte. Raises StreamError for a piece of the other type than the first, and
        after `finish`.
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
        scanner = self._scanner
        while True:
            at = scanner.position - self._released
            block = bytes(self._held[at : at + self._block])
            last = final and at + len(block) == len(self._held)
            if not block and not last:
                return shown
            parts = list(scanner.rows(block, final=last))
            if parts:
                rows = np.concatenate(parts)
                decided = self._withholds[rows[:, 2]]
                if decided.any():
                    shown += self._decide(rows, decided)
                    if self._verdict is not None:
                        return shown
                    continue
                self._count(rows)
            shown += self._release(
                scanner.position if last else self._settled(scanner.hold_start())
            )
            if last:
                return shown

    def _decide(self, rows: np.ndarray, decided: np.ndarray) -> bytes:
        """Act on the first character that makes matches of withholding rules certain."""
        known = rows[np.argmax(decided), 0]
        decided &= rows[:, 0] == known
        rows, decided = rows[rows[:, 0] <= known], decided[rows[:, 0] <= known]
        matches = rows[decided]
        # A track that does not know where its match starts has had all of it held.
        starts = np.maximum(matches[:, 3], self._released)
        best = int(np.argmin(self._ranks[matches[:, 2]]))
        _, end, index, _ = map(int, matches[best])
        rule = self._program.rules[index].rule
        if rule.action != "mask":
            self._count(rows)
            start = self._released_units + self._units(int(starts[best]) - self._released)
            end = self._released_units + self._units(end - self._released)
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
        self._drop(end)
        return shown + MARK.encode()

    def _settled(self, end: int) -> int:
        """The last place up to `end` at which the text may stop without showing a match.

        A word that goes on may be shown; if nothing but its first half is, it must not read as the
        word that is forbidden. Concerns `boundary: word` rules alone.
        """
        if self._behind is None or end == self._scanner.position:
            return end  # where nothing has begun, nothing can be complete but for its boundary
        place = self._behind.save()
        while end > self._released:
            begun = bytes(self._held[: end - self._released])
            rows = [*self._behind.rows(begun, final=True)]
            self._behind.load(place)
            if not any((self._withholds[r[:, 2]] & (r[:, 1] == end)).any() for r in rows):
                break
            end -= _last_character(begun)
        return end

    def _release(self, end: int) -> bytes:
        shown = bytes(self._held[: end - self._released])
        if self._behind is not None and shown:
            if end == self._scanner.position:
                self._behind.load(self._scanner.save())
            else:
                for _ in self._behind.rows(shown, final=False):
                    pass
        self._forget(end)
        return shown

    def _drop(self, end: int) -> None:
        self._forget(end)
        self._scanner.restart(end)
        if self._behind is not None:
            self._behind.restart(end)

    def _forget(self, end: int) -> None:
        size = end - self._released
        self._released_units += self._units(size)
        self._released = end
        del self._held[:size]

    def _count(self, rows: np.ndarray) -> None:
        np.add.at(self._counts, rows[:, 2], 1)

    def _units(self, num_bytes: int) -> int:
        if self._kind is not str:
            return num_bytes
        return len(self._held[:num_bytes].decode("utf-8", "surrogatepass"))

    def _text(self, shown: bytes) -> str | bytes:
        return shown if self._kind is bytes else shown.decode("utf-8", "surrogatepass")


def _last_character(text: bytes) -> int:
    """Bytes of the last character of a text that ends in a whole one."""
    size = 1
    while text[-size] & 0xC0 == 0x80:
        size += 1
    return size
