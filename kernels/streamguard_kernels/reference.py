"""Slow plain-Python references: what the compiled kernels must agree with, hit for hit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def find_matches(
    text: str,
    patterns: Sequence[tuple[int, str]],
    *,
    map_character: Callable[[str], str] = lambda c: c,
    is_word: Callable[[str], bool] | None = None,
) -> list[tuple[int, int, int]]:
    """Every match of every pattern in a whole text by comparison at each place.

    patterns  (rule, literal). map_character folds one character to a string. is_word given = the
    match must have no word character right before or after it.
    Returns sorted (end, rule, start) in characters of `text`; one entry per rule and end, the
    earliest start. A match covers every character that any of its mapped characters came from.
    """
    mapped: list[str] = []
    origin: list[int] = []
    for i, character in enumerate(text):
        for piece in map_character(character):
            mapped.append(piece)
            origin.append(i)
    stream = "".join(mapped)
    found: dict[tuple[int, int], int] = {}
    for rule, literal in patterns:
        wanted = "".join(map_character(c) for c in literal)
        at = stream.find(wanted)
        while at >= 0:
            start, end = origin[at], origin[at + len(wanted) - 1] + 1
            inside = is_word is not None and (
                # a folded character must be matched as a whole at a boundary
                (at > 0 and origin[at - 1] == start)
                or (at + len(wanted) < len(stream) and origin[at + len(wanted)] == end - 1)
                or (start > 0 and is_word(text[start - 1]))
                or (end < len(text) and is_word(text[end]))
            )
            if not inside:
                found[end, rule] = min(start, found.get((end, rule), start))
            at = stream.find(wanted, at + 1)
    return sorted((end, rule, start) for (end, rule), start in found.items())


def completing_tokens(completes: Callable[[int], bool], token_ids: Iterable[int]) -> list[int]:
    """The look-ahead mask by trying every token."""
    return [token for token in token_ids if completes(token)]


def longest_live_suffix(text: str, patterns: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a proper prefix of a pattern."""
    ends = [text[at:] for at in range(len(text))]
    return max(
        (len(end) for end in ends for p in patterns if end != p and p.startswith(end)), default=0
    )
