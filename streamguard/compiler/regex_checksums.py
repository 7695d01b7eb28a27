"""Checksums as a part of the automaton: which matches of a regex end in a number that adds up.

Each position of the regex is split by what the rest of the match must still add up to. Counted from
the end of a match a digit's weight is known wherever the number of digits behind it is; so a copy
of a position is (position, how many counted characters so far, digits behind, what these must add
up to), and a guess at the digits behind is dropped where the match ends otherwise. Which copy may
come next depends on the value of the next character: `Nfa.values`. Kernels, masks and artefacts
know nothing of it (DESIGN section 11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from streamguard.compiler.regex_classes import CharSet, category, common, make, negate
from streamguard.compiler.regex_dfa import TooLargeError
from streamguard.compiler.regex_nfa import ALL_GAPS, INNER_GAPS, Nfa, RegexError, bits

#: Most copies of positions, and most moves between them: some tenths of a second and 100 MB.
MAX_COPIES, MAX_MOVES = 6_000, 300_000


@dataclass(frozen=True)
class Checksum:
    """How the counted characters of a match add up to `remainder` modulo `modulus`.

    letters  whether A-Z and a-z count, as 10 to 35; 0-9 always count. A match that holds a digit of
             another script, or another letter where letters count, is no number; all else is
             ignored.
    lead     so many counted characters have a term that depends on their place from the start;
             a match needs one more than `lead`, or it is none.
    period   the weight of the others depends on the number of digits behind modulo this.
    term     (place from the start, at most lead + 1; digits behind; value) -> what is added, or
             None where no such character may stand.
    """

    modulus: int
    remainder: int
    letters: bool
    lead: int
    period: int
    term: Callable[[int, int, int], int | None]


def _luhn(_place: int, behind: int, value: int) -> int:
    """ISO/IEC 7812-1, annex B: every other digit doubled, less 9 where that has two digits."""
    doubled = 2 * value * (behind % 2) or value
    return doubled - 9 if doubled > 9 else doubled


def _iban(place: int, behind: int, value: int) -> int | None:
    """ISO 13616: country and check digits behind the rest, letters as two digits, 1 modulo 97."""
    if place <= 2:
        return value * (10_000, 100)[place - 1] if value > 9 else None
    if place <= 4:
        return value * (10, 1)[place - 3] if value < 10 else None
    return int(value * pow(10, 6 + behind, 97))


#: By the words of `validate` in a policy.
CHECKSUMS = {
    "luhn": Checksum(10, 0, letters=False, lead=0, period=2, term=_luhn),
    "iban": Checksum(97, 1, letters=True, lead=4, period=96, term=_iban),
}
#: A position, counted characters up to and with it (at most lead + 1), digits behind (0 in the
#: lead), and in a copy what they must add up to.
_Kind = tuple[int, int, int]
_Copy = tuple[int, int, int, int]


def with_checksum(nfa: Nfa, name: str) -> Nfa:
    """The automaton of those matches of `nfa` whose checksum `name` of CHECKSUMS holds.

    Raises RegexError where a character's part in the sum cannot be told or a match has no longest
    length, TooLargeError beyond MAX_COPIES and MAX_MOVES.
    """
    checksum = CHECKSUMS[name]
    if nfa.longest is None:
        raise RegexError(
            f"has no longest match, but a number with a checksum (validate: {name}) has a length. "
            f"Give one: {{13,19}} instead of {{13,}} or +."
        )
    if not checksum.letters:
        _refuse_mixed(nfa, name)
    return _Product(_merged(nfa), checksum).run()


def _in_words() -> CharSet:
    """Characters of words, less the _ that separates."""
    return common(category("CATEGORY_WORD", False), negate(((ord("_"), ord("_")),)))


@cache
def _values(letters: bool) -> tuple[dict[int, CharSet], CharSet]:
    """Characters by value, and those that stand in no number."""
    counted: dict[int, CharSet] = {
        value: ((c, c),) for value, c in enumerate(range(ord("0"), ord("9") + 1))
    }
    if letters:
        for value in range(10, 36):
            upper, lower = ord("A") + value - 10, ord("a") + value - 10
            counted[value] = ((upper, upper), (lower, lower))
    known = negate(make(pair for chars in counted.values() for pair in chars))
    never = _in_words() if letters else category("CATEGORY_DIGIT", False)
    return counted, common(never, known)


def _refuse_mixed(nfa: Nfa, name: str) -> None:
    """Refuse places that take digits and letters, of which only digits would count."""
    letters = common(_in_words(), category("CATEGORY_NOT_DIGIT", False))
    for chars in set(nfa.classes):
        both = common(chars, letters)
        if both and common(chars, ((ord("0"), ord("9")),)):
            first = both[0][0]
            shown = f'"{chr(first)}"' if first < 127 else f"U+{first:04X}"
            raise RegexError(
                f"takes digits at a place that {shown} may stand at as well, but only digits count "
                f"in a number with validate: {name}. Write [0-9] for what is a part of the number, "
                f"and \\D or [^\\w.] for what is none."
            )


def _merged(nfa: Nfa) -> Nfa:
    """Make one of all positions that take the same and go on alike, such as the ends of branches."""
    num = len(nfa.classes)
    if sum(mask.bit_count() for (follow,) in nfa.follow for mask in follow) > MAX_MOVES:
        raise TooLargeError
    place = list(range(num))  # of each position, the one that stands for it
    while True:
        seen: dict[object, int] = {}
        for position in range(num):
            follow = tuple(_renamed(mask, place) for mask in nfa.follow[position][0])
            last = tuple(mask >> position & 1 for mask in nfa.last)
            seen.setdefault((nfa.classes[position], follow, last), position)
            place[position] = seen[nfa.classes[position], follow, last]
        if len(seen) == num:
            break
        num, before = len(seen), num
        kept = sorted(seen.values())
        order = {position: index for index, position in enumerate(kept)}
        place = [order[place[position]] for position in range(before)]
        nfa = Nfa(
            tuple(nfa.classes[p] for p in kept),
            (tuple(_renamed(mask, place) for mask in nfa.first[0]),),
            tuple((tuple(_renamed(mask, place) for mask in nfa.follow[p][0]),) for p in kept),
            tuple(_renamed(mask, place) for mask in nfa.last),
            nfa.marks,
            nfa.starts,
            nfa.longest,
        )
        place = list(range(num))
    return nfa


def _renamed(mask: int, place: list[int]) -> int:
    renamed = 0
    for position in bits(mask):
        renamed |= 1 << place[position]
    return renamed


class _Product:
    def __init__(self, nfa: Nfa, checksum: Checksum) -> None:
        self.nfa, self.checksum = nfa, checksum
        counted, never = _values(checksum.letters)
        # Only characters that occur are told apart.
        occurring = make(pair for chars in set(nfa.classes) for pair in chars)
        values: list[tuple[int | None, CharSet]] = []
        for value, chars in counted.items():
            if here := common(chars, occurring):
                values.append((value, here))
        others = negate(make(pair for _, chars in values for pair in chars))
        # Last those that no place takes.
        values += [(None, common(others, negate(never))), (None, common(others, never))]
        self.values = values
        takes = {
            chars: [v for v, (_, mine) in enumerate(values[:-1]) if common(chars, mine)]
            for chars in set(nfa.classes)
        }
        self.takes = [takes[chars] for chars in nfa.classes]

    def run(self) -> Nfa:
        """Make the copies that a match can come to, from its start on."""
        possible = self._possible()
        number: dict[_Copy, int] = {}
        copies: list[_Copy] = []
        first = [[0] * len(ALL_GAPS) for _ in self.values]
        follow: list[tuple[tuple[int, ...], ...]] = []
        last = [0] * len(INNER_GAPS)
        num_moves = 0

        def link(moves: list[list[int]], of_gap: tuple[int, ...], copy: _Copy) -> None:
            nonlocal num_moves
            _, place, behind, rest = copy
            following = 0
            for mask in of_gap:
                following |= mask
            for position in bits(following):
                gaps = [gap for gap, mask in enumerate(of_gap) if mask >> position & 1]
                for value, after in self._after((position, place, behind, rest), possible):
                    num_moves += 1
                    target = number.setdefault(after, len(copies))
                    if target == len(copies):
                        copies.append(after)
                    if len(copies) > MAX_COPIES or num_moves > MAX_MOVES:
                        raise TooLargeError
                    for gap in gaps:
                        moves[value][gap] |= 1 << target

        link(first, self.nfa.first[0], (-1, 0, 0, self.checksum.remainder))
        for index, copy in enumerate(copies):  # grows as we go
            position, place, behind, rest = copy
            moves = [[0] * len(INNER_GAPS) for _ in self.values]
            link(moves, self.nfa.follow[position][0], copy)
            follow.append(tuple(map(tuple, moves)))
            if place > self.checksum.lead and behind == rest == 0:
                for gap in INNER_GAPS:
                    last[gap] |= (self.nfa.last[gap] >> position & 1) << index
        return Nfa(
            tuple(self.nfa.classes[position] for position, _, _, _ in copies),
            tuple(map(tuple, first)),
            tuple(follow),
            tuple(last),
            self.nfa.marks,
            self.nfa.starts,
            self.nfa.longest,
            tuple(chars for _, chars in self.values),
        )

    def _after(self, copy: _Copy, possible: set[_Kind]) -> Iterator[tuple[int, _Copy]]:
        """Copies of a position that may come next. copy: with the rest of that before it instead."""
        position, place, behind, rest = copy
        checksum = self.checksum
        for index in self.takes[position]:
            value = self.values[index][0]
            if value is None:
                if (position, place, behind) in possible:
                    yield index, copy
                continue
            here = min(place + 1, checksum.lead + 1)
            # Where the lead ends, any number of digits may be to come.
            later: Sequence[int] = (0,)
            if here > checksum.lead:
                digits = 2 if value > 9 else 1
                later = ((behind - digits) % checksum.period,)
                if place <= checksum.lead:
                    later = range(checksum.period)
            for left in later:
                if (position, here, left) in possible:
                    term = checksum.term(here, left, value)
                    if term is not None:
                        yield index, (position, here, left, (rest - term) % checksum.modulus)

    def _possible(self) -> set[_Kind]:
        """From the ends of the regex backwards: how many digits may be behind each position."""
        before: list[set[int]] = [set() for _ in self.nfa.classes]
        num_moves = 0
        for position, (follow,) in enumerate(self.nfa.follow):
            for mask in follow:
                for following in bits(mask):
                    before[following].add(position)
        whole, period = self.checksum.lead + 1, self.checksum.period
        found: set[_Kind] = set()
        todo = [(p, whole, 0) for mask in self.nfa.last for p in bits(mask)]
        while todo:
            kind = todo.pop()
            if kind in found:
                continue
            if len(found) == MAX_COPIES:
                raise TooLargeError
            found.add(kind)
            position, place, behind = kind
            befores = set()
            for index in self.takes[position]:
                value = self.values[index][0]
                if value is None:
                    befores.add((place, behind))
                    continue
                if place:
                    befores.add((place - 1, 0))
                if place == whole:
                    befores.add((whole, (behind + (2 if value > 9 else 1)) % period))
            num_moves += len(befores) * len(before[position])
            if num_moves > MAX_MOVES:
                raise TooLargeError
            todo += [(p, *kind) for p in before[position] for kind in befores]
        return found
