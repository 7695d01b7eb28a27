"""Streaming UTF-8 and the map from characters to matched bytes, one byte at a time.

`pending` is a character that is not finished yet: count of its bytes in bits 24..31, the bytes
themselves in bits 0..23 (first byte lowest); 0 = none. Broken sequences read as U+FFFD, the way
every decoder with errors="replace" shows them (maximal subparts: Unicode 16, 3.9, D93b).
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled

REPLACEMENT = 0xFFFD
#: Bytes that never occur in UTF-8, used as marks in the mapped stream of `boundary: word` tracks.
AFTER_NONWORD = 0xFE
BEFORE_NONWORD = 0xFF
#: What a run of separators is mapped to, where a mapping has them.
SEPARATOR_BYTE = 0x20
#: Characters below it can be looked up when they were cut in two: two planes, emoji included. The
#: beginnings of them have a `prefix_number` below NUM_PREFIXES.
CHARACTERS = 0x20000
NUM_PREFIXES = 64 + 0x540 + 0x400
#: Most bytes that one character maps to: the 18 letters and spaces of U+FDFA, with marks, fit.
MAX_MAPPED_BYTES = 64


@borrowing
def longer(pending, byte):
    """An unfinished character with one more byte."""
    return (pending + (1 << 24)) | (byte << (8 * (pending >> 24)))


@borrowing
def utf8_step(pending, byte):
    """Feed one byte; return (pending, broken, code_point).

    broken is 1 when the pending character turned out to be broken (a U+FFFD comes first), then
    code_point, or -1 while a character is unfinished. A byte can thus end two characters.
    """
    broken = 0
    if pending != 0:
        count = pending >> 24
        lead = pending & 0xFF
        low, high = 0x80, 0xBF
        if count == 1:  # the second byte is the narrow one: no overlongs, surrogates or > U+10FFFF
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
            elif lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        if low <= byte <= high:
            need = 2 if lead < 0xE0 else (3 if lead < 0xF0 else 4)
            if count + 1 < need:
                return longer(pending, byte), 0, -1
            if need == 2:
                return 0, 0, ((lead & 0x1F) << 6) | (byte & 0x3F)
            second = (pending >> 8) & 0x3F
            if need == 3:
                return 0, 0, ((lead & 0x0F) << 12) | (second << 6) | (byte & 0x3F)
            third = (pending >> 16) & 0x3F
            return 0, 0, ((lead & 0x07) << 18) | (second << 12) | (third << 6) | (byte & 0x3F)
        broken = 1
    if byte < 0x80:
        return 0, broken, byte
    if 0xC2 <= byte <= 0xF4:
        return (1 << 24) | byte, broken, -1
    return 0, broken, REPLACEMENT


@borrowing
def prefix_number(pending):
    """The number of an unfinished character, which no other has, by count of bytes and these.

    Without a branch, which would be guessed wrong often: tokens cut characters anywhere.
    """
    count, lead = pending >> 24, pending & 0xFF
    two = (lead << 6) | ((pending >> 8) & 0x3F)
    three = (two << 6) | ((pending >> 16) & 0x3F)
    number = two - 0x3800 + 64 if count == 2 else three - 0xF0400 + 64 + 0x540
    return lead - 0xC0 if count == 1 else number


@borrowing
def numbered_prefix(number):
    """The unfinished character of 1 + its `prefix_number`; 0 = none."""
    if number == 0:
        return 0
    number -= 1
    if number < 64:
        return (1 << 24) | (number + 0xC0)
    if number < 64 + 0x540:
        number += 0x3800 - 64
        return (2 << 24) | (number >> 6) | ((0x80 | (number & 0x3F)) << 8)
    number += 0xF0400 - 64 - 0x540
    return (
        (3 << 24)
        | (number >> 12)
        | ((0x80 | ((number >> 6) & 0x3F)) << 8)
        | ((0x80 | (number & 0x3F)) << 16)
    )


@borrowing
def map_character(code_point, page_of, entries, map_offsets, map_data, out):
    """Write the mapped bytes of one character to `out`, uint8[MAX_MAPPED_BYTES]; return the count.

    page_of      int32[0x1100]: code_point >> 8 -> page of `entries`.
    entries      int32[num_pages * 256]: the entry over 2 = index into `map_offsets` of the string
                 that the character maps to, maybe an empty one; 0 = the character itself. Then bit
                 0 puts marks around it: on `boundary: word` tracks a non-word character c becomes
                 FF c FE, so that "not preceded / followed by a word character" is a byte like any
                 other and needs no look-behind (DESIGN section 3). Strings hold their marks.
    """
    entry = entries[page_of[code_point >> 8] * 256 + (code_point & 0xFF)]
    nonword = (entry & 1) == 1
    n = 0
    if nonword:
        out[0] = BEFORE_NONWORD
        n = 1
    index = entry >> 1
    if index != 0:
        for i in range(map_offsets[index], map_offsets[index + 1]):
            out[n] = map_data[i]
            n += 1
    elif code_point < 0x80:
        out[n] = code_point
        n += 1
    elif code_point < 0x800:
        out[n] = 0xC0 | (code_point >> 6)
        out[n + 1] = 0x80 | (code_point & 0x3F)
        n += 2
    elif code_point < 0x10000:
        out[n] = 0xE0 | (code_point >> 12)
        out[n + 1] = 0x80 | ((code_point >> 6) & 0x3F)
        out[n + 2] = 0x80 | (code_point & 0x3F)
        n += 3
    else:
        out[n] = 0xF0 | (code_point >> 18)
        out[n + 1] = 0x80 | ((code_point >> 12) & 0x3F)
        out[n + 2] = 0x80 | ((code_point >> 6) & 0x3F)
        out[n + 3] = 0x80 | (code_point & 0x3F)
        n += 4
    if nonword:
        out[n] = AFTER_NONWORD
        n += 1
    return n


@compiled
def map_tokens(data, offsets, separators, page_of, entries, map_offsets, map_data):
    """Map every token's bytes as if a character began with it.

    data, offsets  uint8[], int64[num_tokens + 1]: raw token bytes.
    separators     1 = a run of SEPARATOR_BYTE within a token becomes a single one.
    Returns mapped uint8[], mapped_offsets int64[num_tokens + 1], pending uint32[num_tokens]: the
    unfinished character at each token's end (its bytes are not in `mapped` yet).
    """
    num_tokens = offsets.shape[0] - 1
    out_offsets = np.zeros(num_tokens + 1, np.int64)
    pending_out = np.zeros(num_tokens, np.uint32)
    capacity = data.shape[0] * 3 + 1024
    mapped = np.empty(capacity, np.uint8)
    buffer = np.empty(MAX_MAPPED_BYTES, np.uint8)
    used = 0
    for token in range(num_tokens):
        pending = 0
        for i in range(offsets[token], offsets[token + 1]):
            pending, broken, code_point = utf8_step(pending, np.int64(data[i]))
            for turn in range(2):
                if turn == 0 and broken == 0:
                    continue
                if turn == 1 and code_point < 0:
                    continue
                cp = REPLACEMENT if turn == 0 else code_point
                n = map_character(cp, page_of, entries, map_offsets, map_data, buffer)
                if used + n > capacity:
                    grown = np.empty(2 * capacity + n, np.uint8)
                    grown[:used] = mapped[:used]
                    mapped = grown
                    capacity = grown.shape[0]
                for j in range(n):
                    if (
                        separators
                        and buffer[j] == SEPARATOR_BYTE
                        and used > out_offsets[token]
                        and mapped[used - 1] == SEPARATOR_BYTE
                    ):
                        continue
                    mapped[used] = buffer[j]
                    used += 1
        pending_out[token] = pending
        out_offsets[token + 1] = used
    return mapped[:used].copy(), out_offsets, pending_out
