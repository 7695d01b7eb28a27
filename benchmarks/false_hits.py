"""`python -m benchmarks.false_hits [FOLDER…]`: how often do normal forms and rule packs hit benign text?

Reads what the machine has: prose (documentation, licences, man pages as pods, docstrings) and code (Python's
standard library) from the given folders, or from the places where packages leave theirs. Paragraphs
are taken once however many packages ship them. Another machine has other packages, so that figures differ
in detail; sizes are printed with them.

Forms: a block list of 200 words and phrases, each form alone and all together. A hit is false if what
stands there does not read as the word to somebody who ignores case and the width of white space.
Packs: texts in which a rule hits (ends at most three bytes apart are one); what a hit is worth is for
people to judge, so --show prints a sample.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.workload import _RARE
from streamguard import Policy
from streamguard.compiler.program import Program, compile_program
from streamguard.policy import NORMAL_FORMS, PolicySet
from streamguard.rule_packs import pack_names
from streamguard.scanner import Scanner

#: Most bytes of one file, so that no single one sets the tone.
_PER_FILE = 200_000
_PROSE_NAMES = re.compile(
    r"\.(?:txt|md|rst|pod)$|^(?:METADATA|COPYING|copyright)|^(?:LICEN[CS]E|README|NEWS|CHANGE)",
    re.I,
)
# fmt: off
_COMMON = (
    "bomb kill murder gun rifle pistol knife shooting weapon grenade ammo assassin massacre terror jihad "
    "drug cocaine heroin meth crack weed ecstasy opium morphine ketamine cannabis overdosing dealer junkie "
    "suicide selfharm anorexia bulimia strangle hanging slit bleed torture behead mutilate stab choke "
    "rape molest incest porn nude naked sex slut whore bitch bastard fuck shit crap damn ass dick cock cunt "
    "nazi fascist racist slave lynch genocide holocaust hitler stalin isis qaeda taliban klan "
    "hack crack exploit virus worm ransomware phish steal fraud scam launder bribe forge smuggle traffick "
    "abortion gambling casino betting poker lottery escort brothel stripper fetish bondage "
    "poison arsenic anthrax sarin napalm cyanides dynamite gunman hitman sniper bomber arsonist "
    "Falcon Bluebird Starfish Redwood Nimbus Kestrel Obsidian Juniper Tornado Phoenix"
).split()
_PHRASES = (
    "kill him", "kill yourself", "make a bomb", "buy a gun", "credit card", "social security", "hate them",
    "die slowly", "white power", "date rape", "car bomb", "pipe bomb", "launch code", "Project Falcon",
    "carbon dioxide", "internal use only", "Coca-Cola", "insider trading", "money mule", "burn it down",
)
# fmt: on


def words() -> list[str]:
    """The block list: 200 distinct words and phrases, short and common ones among them."""
    found = list(dict.fromkeys([*_COMMON, *_PHRASES, *_RARE]))
    return found[:200]


def _default_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    # The standard library first: of what site-packages has, much is of one kind.
    shared = (f"/usr/share/{name}" for name in ("doc", "perl", "perl5"))
    places = [paths["stdlib"], *shared, paths["purelib"]]
    return [Path(place) for place in places if Path(place).is_dir()]


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path


def _docstrings(code: str) -> str:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def gather(folders: Iterable[Path], most_prose: int, most_code: int) -> tuple[bytes, bytes]:
    """Prose and code, of at most so many bytes each, every paragraph once."""
    seen: set[bytes] = set()
    parts: dict[str, list[str]] = {"prose": [], "code": []}
    sizes = Counter[str]()

    def take(kind: str, text: str, most: int) -> None:
        for paragraph in re.split(r"\n\s*\n", text[:_PER_FILE]):
            key = hashlib.sha256(" ".join(paragraph.split()).encode(errors="replace")).digest()
            if sizes[kind] < most and key not in seen and (kind == "code" or _reads(paragraph)):
                seen.add(key)
                parts[kind].append(paragraph)
                sizes[kind] += len(paragraph.encode(errors="replace")) + 2

    for path in _files(folders):
        if sizes["prose"] >= most_prose and sizes["code"] >= most_code:
            break
        python = path.suffix == ".py" and "site-packages" not in path.parts
        if not python and not _PROSE_NAMES.search(path.name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not python:
            take("prose", text, most_prose)
        else:
            take("prose", _docstrings(text), most_prose)
            take("code", text, most_code)
    prose, code = ("\n\n".join(parts[kind]).encode(errors="replace") for kind in ("prose", "code"))
    return prose, code


def _reads(paragraph: str) -> bool:
    """Whether it is sentences: eight words or more, and mostly letters and spaces."""
    letters = sum(c.isalpha() or c in " \n,.'" for c in paragraph)
    return len(paragraph.split()) >= 8 and letters >= 0.85 * len(paragraph)


def _program(chosen: list[str], forms: tuple[str, ...], boundary: str) -> Program:
    rules = [
        {"id": f"w{i}", "literals": [word], "normalize": list(forms), "boundary": boundary,
         "action": "observe"}
        for i, word in enumerate(chosen)
    ]  # fmt: skip
    content = {"version": 1, "name": "words", "rules": rules}
    return compile_program(PolicySet.from_policies([Policy.from_dict(content)]))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def form_hits(
    text: bytes, forms: tuple[str, ...], boundary: str
) -> tuple[int, Counter[str], list[str]]:
    """Number of hits, false ones by word, and what stood in the text at each false one."""
    chosen = words()
    program = _program(chosen, forms, boundary)
    scanner = Scanner(program)
    total, false, shown = 0, Counter[str](), []
    for match in [*scanner.feed(text), *scanner.finish()]:
        word = chosen[int(program.rules[match.rule].rule.id[1:])]
        stood = text[match.start : match.end].decode(errors="replace")
        total += 1
        if _plain(stood) != _plain(word):
            false[word] += 1
            shown.append(f"{word}: {stood!r}")
    return total, false, shown


def pack_hits(text: bytes) -> dict[str, list[str]]:
    """What each rule of all packs hits, with some text before it."""
    chosen = Policy.from_dict({"version": 1, "name": "packs", "extends": list(pack_names())})
    program = compile_program(PolicySet.from_policies([chosen]))
    found: dict[str, list[str]] = {r.rule.id: [] for r in program.rules}
    before: dict[str, int] = {}
    scanner = Scanner(program)
    for match in [*scanner.feed(text), *scanner.finish()]:
        name = program.rules[match.rule].rule.id
        if match.end - before.get(name, -9) > 3:
            found[name].append(text[max(0, match.end - 40) : match.end].decode(errors="replace"))
        before[name] = match.end
    return found


def main() -> None:
    """Gather, count, print two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_hits", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="N hits of each kind")
    parser.add_argument("--most", type=float, default=6, metavar="MB", help="of prose, and of code")
    options = parser.parse_args()
    console = Console(width=max(120, Console().width))
    rng = random.Random(1)

    most = int(options.most * 1e6)
    texts = gather(options.folders or _default_folders(), most, most)
    prose, code = texts
    console.print(
        f"{len(prose) / 1e6:.1f} MB of prose, {len(code) / 1e6:.1f} MB of code, {len(words())} words"
    )

    def sample(lines: list[str]) -> None:
        for line in rng.sample(lines, min(options.show, len(lines))):
            console.print("   ", repr(line), highlight=False, markup=False)

    table = Table("normal forms", "boundary", *(f"{kind}: {what}" for kind in ("prose", "code")
                  for what in ("hits", "false", "mostly")))  # fmt: skip
    columns = [(), *((form,) for form in NORMAL_FORMS), NORMAL_FORMS]
    cases = [(forms, boundary) for forms in columns for boundary in ("none", "word")]
    for forms, boundary in track(cases, "forms", console=Console(stderr=True)):
        name = "all" if len(forms) > 1 else "".join(forms) or "none"
        row: list[str] = [name, boundary]
        for text in texts:
            total, false, shown = form_hits(text, forms, boundary)
            mostly = ", ".join(f"{word} {n}" for word, n in false.most_common(3))
            row += [f"{total:,}", f"{false.total():,}", mostly]
            if options.show and shown:
                console.print(name, boundary)
                sample(shown)
        table.add_row(*row)
    console.print(table)
    table = Table("pack rule", "prose", "code")
    of_prose, of_code = map(pack_hits, texts)
    for name, hits in of_prose.items():
        if hits or of_code[name]:
            table.add_row(name, f"{len(hits):,}", f"{len(of_code[name]):,}")
            if options.show:
                console.print(name)
                sample(hits + of_code[name])
    console.print(table)
    console.print(f"{sum(not (of_prose[n] or of_code[n]) for n in of_prose)} other rules: no hit")


if __name__ == "__main__":
    main()
