"""Slow plain-Python references: what the compiled kernels must agree with, hit for hit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def find_matches(
    text: str,
    patterns: Sequence[tuple[int, str]],
    *,
    map_character: Callable[[str], str] = lambda c: c,
    is_word: Callable[[str], bool] | None = None,
    separator: str = "",
    ended: bool = True,
) -> list[tuple[int, int, int]]:
    """Every match of every pattern in a whole text by comparison at each place.

    patterns  (rule, what a literal is mapped to). map_character maps one character to a string. is_word
    given = the match must have no word character right before or after it, in what was mapped.
    separator given = a run of it is read as one. ended False = more text may follow, so what bounds
    a word at the very end is not known.
    Returns sorted (end, rule, start) in characters of `text`; one entry per rule and end, the
    earliest start. A match covers every character that any of its mapped characters came from.
    """
    mapped: list[str] = []
    origin: list[int] = []
    for i, character in enumerate(text):
        for piece in map_character(character):
            if separator and piece == separator and mapped[-1:] == [separator]:
                continue
            mapped.append(piece)
            origin.append(i)
    stream = "".join(mapped)
    found: dict[tuple[int, int], int] = {}
    for rule, wanted in patterns:
        at = stream.find(wanted)
        while at >= 0:
            start, end = origin[at], origin[at + len(wanted) - 1] + 1
            before, after = stream[at - 1 : at] if at else "", stream[at + len(wanted) :][:1]
            inside = is_word is not None and (
                (before != "" and is_word(before))
                or (after != "" and is_word(after))
                or (after == "" and not ended)
            )
            if not inside:
                found[end, rule] = min(start, found.get((end, rule), start))
            at = stream.find(wanted, at + 1)
    return sorted((end, rule, start) for (end, rule), start in found.items())


def spellings(literal: Sequence[str], separator: str) -> list[str]:
    """The mapped strings that stand for a literal where separators may be more, fewer or none.

    literal  what each of its letters is mapped to, in order; of a separator, some `separator`s.
    """
    words = separator.join(filter(None, "".join(literal).split(separator)))
    letters = [letter.replace(separator, "") for letter in literal]
    kinds = [words, words.replace(separator, ""), separator.join(filter(None, letters))]
    return [kind for i, kind in enumerate(kinds) if kind and kind not in kinds[:i]]


def completing_tokens(completes: Callable[[int], bool], token_ids: Iterable[int]) -> list[int]:
    """The look-ahead mask by trying every token."""
    return [token for token in token_ids if completes(token)]


def longest_live_suffix(text: str, patterns: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a proper prefix of a pattern."""
    ends = [text[at:] for at in range(len(text))]
    return max(
        (len(end) for end in ends for p in patterns if end != p and p.startswith(end)), default=0
    )
