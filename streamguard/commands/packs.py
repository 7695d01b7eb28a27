"""`streamguard packs`: the rule packs that a policy can extend."""

from __future__ import annotations

from typing import Annotated

import typer

from streamguard.commands.terminal import print_table


def list_command() -> None:
    """Print every rule pack with its version, rules and patterns.

    \b
    Example:
      streamguard packs list
    """
    from streamguard.policy import Policy
    from streamguard.rule_packs import load_pack, pack_names

    rows = []
    for name in pack_names():
        pack = load_pack(name)
        policy = Policy.from_dict(pack.policy, source=f"pack {name}")
        rows.append(
            (name, pack.release, f"{len(policy.rules)}", f"{policy.num_patterns}", pack.description)
        )
    print_table(("pack", "version", "rules", "patterns", "what it finds"), rows)


def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pack; see packs list.")],
) -> None:
    """Print a rule pack as it is written, to read it or to copy rules from it.

    \b
    Example:
      streamguard packs show secrets
    """
    from streamguard.rule_packs import load_pack

    print(load_pack(name).text, end="")
