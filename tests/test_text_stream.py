"""Text streams: what is shown when, against a reference that looks at the whole text every time."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from guard_cases import (
    ODD,
    decode,
    matches,
    policy,
    program,
    random_regex_rules,
    random_rules,
    random_text,
    rule,
)
from hypothesis import given
from hypothesis import strategies as st

from streamguard import Guard, StreamguardError, TextStream
from streamguard.compiler.mapping import Mapping, is_word_character
from streamguard.compiler.program import Program
from streamguard.policy import SEVERITY, Policy, Rule
from streamguard.scanner import Scanner
from streamguard.text_stream import MARK, TextVerdict
from streamguard_kernels.hold import UNKNOWN

LITERALS = (
    "bomb", "omb", "b", "bob", "o b", "ss", "straße", "i\u0307", "k", "ﬁ", "e\u0301", "中文", "😀b",
    "-b", "- -", "\u0301", "bo mb", "1.0", "Sſ", "mbo", "bombom", "xyz",
)  # fmt: skip
BROKEN = (b"\xff", b"\x80", b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xc0")
MASKED = MARK.encode()


def characters(data: bytes, ended: bool) -> list[tuple[str, int, int]]:
    """What is read of the bytes so far: each character and its place."""
    found, at = [], 0
    for character in decode(data, ended):
        size = len(character.encode())
        if character == "\ufffd" and data[at : at + 3] != MASKED:
            with pytest.raises(UnicodeDecodeError) as caught:
                data[at:].decode()
            size = caught.value.end - caught.value.start
        found.append((character, at, at + size))
        at += size
    return found


class Reference:
    """What a stream must have shown after every byte. `segment` is the text since the last cut."""

    def __init__(self, one: Policy) -> None:
        self.rules = list(enumerate(one.rules))
        # Beside others literals without forms are followed by characters as well.
        self.in_bytes = all(Mapping(r.normalize, r.boundary).is_identity for r in one.rules)
        self.segment = b""
        self.base = self.released = 0
        self.known: set[tuple[int, int, int]] = set()
        self.shown = b""
        self.counts: Counter[str] = Counter()
        self.verdict: TextVerdict | None = None

    def feed(self, data: bytes) -> None:
        for byte in data:
            self.segment += bytes([byte])
            self._step(False)

    def finish(self) -> None:
        if self.verdict is None:
            self._step(True)

    def _step(self, ended: bool) -> None:
        if self.verdict is not None:
            return
        known = self._matches(self.segment, ended)
        new, self.known = sorted(known - self.known), known
        acting = [m for m in new if self.rules[m[1]][1].action != "observe"]
        if not acting:
            self._count(new)
            self._show(len(self.segment) if ended else self._settled(self._live_start()))
            return
        end, index, start = min(
            acting, key=lambda m: (SEVERITY.index(self.rules[m[1]][1].action), m[1], m[0])
        )
        what = self.rules[index][1]
        if what.action != "mask":
            self._count(new)
            self._show(self._settled(min(m[2] for m in acting)))
            self.shown += (what.message or "").encode()
            self.verdict = TextVerdict(
                what.id, what.category, what.action, self.base + start, self.base + end
            )
            return
        end = min(m[0] for m in acting)
        while any(m[2] < end < m[0] for m in acting):
            end = max(m[0] for m in acting if m[2] < end)
        self._count([m for m in new if m[2] < end])
        self._show(self._settled(min(m[2] for m in acting if m[2] < end)))
        self.shown += MASKED
        rest, self.base = self.segment[end:], self.base + end
        self.segment, self.released, self.known = b"", 0, set()
        self.feed(rest)
        if ended:
            self._step(True)

    def _count(self, found: list[tuple[int, int, int]]) -> None:
        self.counts.update(self.rules[index][1].id for _, index, _ in found)

    def _show(self, end: int) -> None:
        self.shown += self.segment[self.released : end]
        self.released = max(self.released, end)

    def _matches(self, data: bytes, ended: bool) -> set[tuple[int, int, int]]:
        text = characters(data, ended)
        starts, ends = [c[1] for c in text], [c[2] for c in text]
        return {
            (ends[end - 1], index, starts[start])
            for number, what in self.rules
            for end, index, start in matches(decode(data, ended), what, number, ended=ended)
        }

    def _live_start(self) -> int:
        """Where the longest end of the text begins that may still become part of a match."""
        text = characters(self.segment, False)
        earliest = text[-1][2] if text else 0  # an unfinished character begins there
        for _, what in self.rules:
            if what.action != "observe":
                earliest = min([earliest, *self._live(what, text)])
        return earliest

    def _live(self, what: Rule, text: list[tuple[str, int, int]]) -> list[int]:
        mapping = Mapping(what.normalize, what.boundary)
        if self.in_bytes:
            wanted = [literal.encode() for literal in what.literals]
            return [
                i
                for i in range(len(self.segment))
                for one in wanted
                if one != self.segment[i:] and one.startswith(self.segment[i:])
            ]
        folded = [(piece, i) for i, (c, _, _) in enumerate(text) for piece in mapping.fold(c)]
        starts = []
        for at, (_, i) in enumerate(folded):
            rest = "".join(piece for piece, _ in folded[at:])
            inside = at > 0 and folded[at - 1][1] == i
            if mapping.wrap and (inside or (i > 0 and is_word_character(text[i - 1][0]))):
                continue
            for literal in map(mapping.fold, what.literals):
                if literal.startswith(rest) and (mapping.wrap or rest != literal):
                    starts.append(text[i][1])
        return starts

    def _settled(self, end: int) -> int:
        """The last place up to `end` where the text, if it ended there, shows no match."""
        while end > self.released and any(
            m[0] == end and self.rules[m[1]][1].action != "observe"
            for m in self._matches(self.segment[:end], True)
        ):
            end = max(start for _, start, stop in characters(self.segment[:end], True))
        return end


def pieces(rng: random.Random, data: Any, longest: int) -> list[Any]:
    found = [data[:0]]  # says the type, if there is nothing else
    while data:
        size = rng.randint(1, longest)
        found.append(data[:size])
        data = data[size:]
    return found


def run(compiled: Program, parts: list[Any]) -> tuple[Any, TextVerdict | None, dict[str, int]]:
    stream = TextStream(compiled, 0)
    shown = [stream.feed(part) for part in parts]
    rest: Any = stream.finish()
    return rest[:0].join([*shown, rest]), stream.verdict, stream.counts


def closed_matches(compiled: Program, shown: bytes) -> list[Any]:
    scanner = Scanner(compiled)
    found = [*scanner.feed(shown), *scanner.finish()]
    return [m for m in found if compiled.rules[m.rule].rule.action != "observe"]


def random_data(rng: random.Random, num_parts: int, *, broken: bool) -> bytes:
    parts = []
    for _ in range(num_parts):
        kind = rng.random()
        if kind < 0.3:
            parts.append(rng.choice(LITERALS).encode())
        elif kind < 0.6:
            literal = rng.choice(LITERALS)
            parts.append(literal[: rng.randint(1, len(literal))].encode())
        elif kind < 0.93 or not broken:
            parts.append(random_text(rng, ODD, 4).encode())
        else:
            parts.append(rng.choice(BROKEN))
    return b"".join(parts)


ALL_KINDS = policy(
    rule("halt", "bombom", "中文k"),
    rule("mask", "Bomb", "straße", case=True),
    rule("redirect", "- bo", "😀b", "kick", word=True),
    rule("mask", "bob", "o b", word=True, case=True),
    rule("observe", "k", "İ", "o b", "ﬁ", "b", case=True, word=True),
    rule("observe", "s", "\u0301"),
)
ALL_KINDS_PROGRAM = program(ALL_KINDS)


def case_or_none(rng: random.Random) -> tuple[str, ...]:
    return rng.choice([(), ("case",)])


def shows_no_match(rng: random.Random, compiled: Program, text: str) -> bool:
    """Feed a text whole, in pieces and by characters; return whether anything was cut out.

    The outcome must be the same for all pieces, no match may ever show, and a text without one must
    come through as it is.
    """
    whole = run(compiled, [text])
    assert run(compiled, pieces(rng, text, rng.choice([1, 3]))) == whole
    assert not closed_matches(compiled, whole[0].encode()), (compiled.rules, text, whole)
    shown, stream = "", TextStream(compiled, 0)
    for character in text:
        shown += stream.feed(character)
        assert not closed_matches(compiled, shown.encode()), (compiled.rules, text, shown)
    if not closed_matches(compiled, text.encode()):
        assert whole[0] == text
    return whole[0] != text


def test_under_every_normal_form_no_match_is_ever_shown(seed: int) -> None:
    rng = random.Random(seed)
    num_cut = 0
    for _ in range(150):
        compiled = program(policy(*random_rules(rng, LITERALS, rng.randint(1, 3))))
        noise = [rng.choice(["", "", "\u200b", " ", " . ", "\u0301", "0"]) for _ in range(40)]
        text = "".join(c + rng.choice(noise) for c in random_data(rng, 8, broken=False).decode())
        num_cut += shows_no_match(rng, compiled, text)
    assert num_cut


def test_a_word_with_a_mark_behind_it_is_no_word_where_the_text_is_cut() -> None:
    # The k is cut out behind b and its accent: the b must not stand as a word of its own.
    one = program(policy(rule("halt", "b", forms=["marks"], word=True), rule("mask", "k")))
    assert run(one, list("a b\u0301k"))[0] == f"a {MARK}"
    assert run(one, list("a b\u0301x k"))[0] == f"a b\u0301x {MARK}"


def test_places_where_the_end_would_show_a_match_are_all_found(seed: int) -> None:
    rng = random.Random(seed)
    num_found = 0
    for _ in range(150):
        compiled = program(policy(*random_rules(rng, LITERALS, rng.randint(1, 3))))
        acting = [r.rule.action != "observe" for r in compiled.rules]
        noise = rng.choices(["", "", "\u200b", " ", " . ", "\u0301", "0"], k=40)
        text = "".join(c + rng.choice(noise) for c in random_data(rng, 8, broken=False).decode())
        scanner, data, done = Scanner(compiled, watching=True), text.encode(), 0
        places, decided = set(), False
        while done < len(data) and not decided:
            steps, rows = scanner.watch(data[done : done + 1], final=False)
            places.update(at for at, _ in scanner.closings())
            decided = rows is not None and any(acting[index] for index in rows[:, 2])
            done += steps
        for end in range(done - decided):  # the last byte made a match certain: nothing ends there
            whole = Scanner(compiled)
            list(whole.feed(data[:end]))
            if end and data[end] & 0xC0 != 0x80:  # between characters
                shows = any(acting[m.rule] for m in whole.finish())
                assert (end in places) == shows, (compiled.rules, data[:end])
                num_found += shows
    assert num_found


REGEXES = (r"[\w.%+-]+@(?:[\w-]+\.)+[a-z]{2}", r"\bb[o0]+m\b", r"[0-9]{4}(?:-[0-9]{4})*", r"k.k")


def test_regexes_hold_what_they_need_and_pieces_change_nothing(seed: int) -> None:
    rng = random.Random(seed)
    num_cut = 0
    for _ in range(60):
        rules = [rule(rng.choice(["mask", "halt", "redirect"]), regexes=[rng.choice(REGEXES)])]
        rules += random_rules(rng, LITERALS, rng.randint(0, 2), case_or_none)
        compiled = program(policy(*rules))
        parts = [
            "a@b.cd ",
            "boom",
            "b0m. ",
            "1234-",
            "5678",
            "kok",
            "k k",
            "bob@example.com",
            " x ",
        ]
        text = "".join(rng.choices([*parts, *LITERALS], k=8))
        num_cut += shows_no_match(rng, compiled, text)
    assert num_cut


@pytest.mark.parametrize("broken", [False, True])
def test_pieces_of_every_size_show_what_single_bytes_show(broken: bool, seed: int) -> None:
    rng = random.Random(f"{seed} {broken}")
    more = (r".\B", r"[^a]{2}\b", r"\b\w+@?\b", r"(?:bo)+c?", "x{2,}")
    for _ in range(25):
        rules = random_regex_rules(rng, (*REGEXES, *more), rng.randint(1, 2))
        rules += random_rules(rng, LITERALS, rng.randint(0, 2))
        compiled = program(policy(*rules))
        text = random_data(rng, 12, broken=broken) + b" bob@example.com 1234-5678 boom k k xx"
        data: Any = text if broken else text.decode()
        single, shown = TextStream(compiled, 0), [(data[:0], 0)]
        for at in range(len(data)):
            shown.append((shown[-1][0] + single.feed(data[at : at + 1]), single.num_held))
        end = single.finish()
        for size in (2, 3, 5, 8, 13, len(data)):
            stream, so_far = TextStream(compiled, 0), data[:0]
            for at in range(0, len(data), size):
                so_far += stream.feed(data[at : at + size])
                assert (so_far, stream.num_held) == shown[min(at + size, len(data))], (rules, data)
            assert (stream.finish(), stream.verdict) == (end, single.verdict), (rules, data)
            assert stream.counts == single.counts, (rules, data)


def test_what_is_behind_a_broken_character_alone_is_held() -> None:
    # One byte ends the broken character and begins the match.
    stream = TextStream(program(policy(rule("halt", regexes=["bo+m"]))), 0)
    assert (stream.feed(b"\xe4b"), stream.num_held) == (b"\xe4", 1)


def test_a_regex_cuts_out_its_match_and_no_more() -> None:
    one = program(policy(rule("mask", regexes=[REGEXES[0]])))
    assert run(one, ["Write to alice@example.co now"])[0] == f"Write to {MARK} now"
    assert run(one, list("Write to alice@example.co now"))[0] == f"Write to {MARK} now"
    stream = TextStream(one, 0)
    assert stream.feed("Write to ") == "Write to "


@pytest.mark.parametrize("broken", [False, True])
def test_after_every_piece_exactly_what_the_reference_shows_is_shown(
    broken: bool, seed: int
) -> None:
    rng = random.Random(f"{seed} {broken}")
    for _ in range(150):
        # The reference knows no runs of separators and no characters that are skipped.
        one = policy(*random_rules(rng, LITERALS, rng.randint(1, 4), case_or_none))
        compiled = program(one)
        data = random_data(rng, 8, broken=broken)
        stream, reference = TextStream(compiled, 0), Reference(one)
        shown = b""
        for part in pieces(rng, data if broken else data.decode(), rng.choice([1, 1, 3, 20])):
            now = stream.feed(part)
            shown += now if isinstance(now, bytes) else now.encode()
            reference.feed(part if isinstance(part, bytes) else part.encode())
            assert shown == reference.shown, (one.rules, data)
            assert not closed_matches(compiled, reference.shown), (one.rules, data)
        rest = stream.finish()
        reference.finish()
        assert shown + (rest if isinstance(rest, bytes) else rest.encode()) == reference.shown
        assert stream.counts == dict(reference.counts), (one.rules, data)
        if broken:
            assert stream.verdict == reference.verdict, (one.rules, data)
        elif reference.verdict:
            verdict = reference.verdict
            start, end = (len(data[:at].decode()) for at in (verdict.start, verdict.end))
            assert stream.verdict == verdict._replace(start=start, end=end)
        else:
            assert stream.verdict is None
        assert not closed_matches(compiled, reference.shown), (one.rules, data)


texts = st.lists(
    st.one_of(
        st.sampled_from(LITERALS).map(str.encode), st.text(ODD, max_size=4).map(str.encode),
        st.sampled_from(BROKEN), st.binary(max_size=3),
    )
).map(b"".join)  # fmt: skip


@given(texts, st.randoms(use_true_random=False), st.integers(1, 9))
def test_pieces_change_nothing(data: bytes, rng: random.Random, longest: int) -> None:
    whole = run(ALL_KINDS_PROGRAM, [data])
    assert run(ALL_KINDS_PROGRAM, pieces(rng, data, longest)) == whole
    assert not closed_matches(ALL_KINDS_PROGRAM, whole[0])


@given(st.lists(st.sampled_from([*LITERALS, *ODD, "\ud800", "\udfff"])).map("".join))
def test_str_and_bytes_streams_say_the_same(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    as_text, verdict, counts = run(ALL_KINDS_PROGRAM, list(text))
    as_bytes, of_bytes, counts_of_bytes = run(ALL_KINDS_PROGRAM, [data])
    assert as_text.encode("utf-8", "surrogatepass") == as_bytes
    assert counts == counts_of_bytes
    assert (verdict is None) == (of_bytes is None)
    if verdict and of_bytes:
        start, end = (len(text[:at].encode("utf-8", "surrogatepass")) for at in verdict[3:])
        assert of_bytes == verdict._replace(start=start, end=end)


@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=4).map(str.encode))))
def test_text_without_matches_comes_out_byte_for_byte(parts: list[bytes]) -> None:
    one = program(policy(rule("halt", "forbidden", case=True), rule("mask", "word", word=True)))
    data = b"".join(parts)
    if not closed_matches(one, data):
        assert run(one, parts)[0] == (data if parts else "")


def test_a_rule_that_only_counts_holds_nothing_back() -> None:
    stream = TextStream(program(policy(rule("observe", "bomb"), rule("halt", "omega"))), 0)
    assert [stream.feed(c) for c in "bombo"] == ["b", "", "", "omb", ""]
    assert stream.num_held == 1
    assert (stream.finish(), stream.verdict, stream.counts) == ("o", None, {"r0": 1})


def test_nothing_of_a_match_is_shown_and_everything_before_it_is() -> None:
    stream = TextStream(program(policy(rule("halt", "secret bombs", "bomb"))), 0)
    assert "".join(stream.feed(c) for c in "my secret bom") == "my "
    assert stream.feed("b and more") == "secret "
    assert stream.verdict == TextVerdict("r0", "custom", "halt", 10, 14)
    assert (stream.feed("more"), stream.finish(), stream.finish()) == ("", "", "")


def test_redirect_says_its_message_once() -> None:
    shown, verdict, _ = run(program(policy(rule("redirect", "bomb", word=True))), ["a bomb", "."])
    assert shown == "a no"
    assert verdict == TextVerdict("r0", "custom", "redirect", 2, 6)


def test_mask_cuts_the_match_out_and_goes_on_behind_its_mark() -> None:
    one = program(policy(rule("mask", "bomb"), rule("mask", "cat", word=True)))
    assert run(one, list("a bombomb, a cat. Cats"))[0] == f"a {MARK}omb, a {MARK}. Cats"
    assert run(one, ["a cat"])[0] == f"a {MARK}"
    # What stands on both sides of a cut is no match: the mark parts it.
    assert run(one, ["bobombmb"])[0] == f"bo{MARK}mb"


def test_of_matches_with_one_last_character_the_most_severe_decides_and_all_count() -> None:
    one = policy(rule("mask", "omb"), rule("redirect", "mb"), rule("halt", "b"), rule("halt", "mb"))
    shown, verdict, counts = run(program(one), ["a omb."])
    assert (shown, verdict) == ("a ", TextVerdict("r2", "custom", "halt", 4, 5))
    assert counts == {"r0": 1, "r1": 1, "r2": 1, "r3": 1}
    one = policy(rule("mask", "omb"), rule("redirect", "mb"), rule("observe", "b"))
    shown, verdict, counts = run(program(one), ["a bomb."])
    assert (shown, verdict and verdict.rule) == ("a bno", "r1")
    assert counts == {"r0": 1, "r1": 1, "r2": 2}


def test_a_word_that_goes_on_never_reads_as_the_forbidden_one_at_the_end() -> None:
    # "cats" is no "cat", but a stream that ends within it must not show "cat".
    one = program(policy(rule("halt", "cat", word=True), rule("halt", "s and dogs")))
    stream = TextStream(one, 0)
    assert stream.feed("the cats and dog") == "the ca"
    assert stream.feed("s") == ""
    assert stream.verdict == TextVerdict("r1", "custom", "halt", 7, 17)
    assert run(one, list("the cats and dots"))[0] == "the cats and dots"


def test_characters_cut_in_two_are_held_until_they_are_whole() -> None:
    stream = TextStream(program(policy(rule("halt", "straße", case=True))), 0)
    data = "é STRA\u1e9eN".encode()
    assert [stream.feed(data[i : i + 1]) for i in range(len(data))] == [
        b"", "é".encode(), b" ", b"", b"", b"", b"", b"", b"", b"", "STRAẞN".encode(),
    ]  # fmt: skip


def test_a_stream_is_one_text_of_one_type() -> None:
    guard = Guard(policy(rule("halt", "x")))
    stream = guard.text_stream()
    assert stream.finish() == ""
    with pytest.raises(StreamguardError, match=r"feed after finish.*text_stream\(\)"):
        stream.feed("a")
    stream = guard.text_stream("default")
    assert (stream.feed(b"a"), stream.feed(b"")) == (b"a", b"")
    with pytest.raises(StreamguardError, match="given str; this stream began with bytes"):
        stream.feed("a")  # type: ignore[call-overload]
    with pytest.raises(StreamguardError, match="'other' is not in this guard; it has: default"):
        guard.text_stream("other")
    with pytest.raises(StreamguardError, match="has no tokenizer"):
        guard.session()


def test_a_stream_follows_the_policy_it_is_given() -> None:
    compiled = program([policy(rule("halt", "a")), policy(rule("mask", "b"), name="other")])
    assert [TextStream(compiled, i).feed("bab") for i in (0, 1)] == ["b", f"{MARK}a{MARK}"]


def test_a_track_that_knows_no_depth_holds_all_since_it_was_last_quiet() -> None:
    compiled = program(policy(rule("halt", "bomb")))
    compiled.hold_depths[compiled.hold_depths > 0] = UNKNOWN
    stream = TextStream(compiled, 0)
    assert [stream.feed(piece) for piece in ("a ", "xbo", "m", "xx")] == ["a ", "", "", "xbomxx"]
    assert (stream.feed("a bomb"), stream.finish()) == ("a ", "")
    assert stream.verdict == TextVerdict("r0", "custom", "halt", 10, 14)


def test_the_example_of_the_readme_prints_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```python\n([^`]*text_stream[^`]*)```\n\n```\n([^`]*)```", readme)
    code, output = found
    exec(code, {})
    assert capsys.readouterr().out == output


def test_long_texts_keep_no_more_than_they_hold() -> None:
    stream = TextStream(program(policy(rule("halt", "needle", word=True), rule("mask", "aab"))), 0)
    text = "a needles heap " * 20_000
    shown = stream.feed(text)
    assert shown + stream.finish() == text
    assert stream.num_held == 0
