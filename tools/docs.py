"""Writes the pages of docs/ that come from code: `make docs`."""

from pathlib import Path

from lion_kernels.options import BOTH, DISTRIBUTED_LION, OPTIONS

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """# Options

Written by `make docs` from the table in `lion_kernels/options.py`, from which the constructors'
checks and the agreement of ranks come too. *Agreed*: compared over the ranks at construction; a
difference is an error on every rank. *At a load*: whose value a group has after `load_state_dict`,
the saved state's or the optimizer's own.
"""


def options_page() -> str:
    lines = [HEAD]
    for kind in BOTH:
        lines += [f"## {kind}", "", "| option | default | rule | what it is | agreed | at a load |"]
        lines.append("|---|---|---|---|---|---|")
        for option in OPTIONS[kind].values():
            if option.is_fixed:
                continue
            loaded = "" if not option.in_group else "own" if option.kept_at_load else "saved"
            agreed = "yes" if option.agreed and kind == DISTRIBUTED_LION else ""
            cells = (f"`{option.name}`", f"`{option.default!r}`", option.rule, option.means, agreed)
            lines.append(f"| {' | '.join(cells)} | {loaded} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "options.md").write_text(options_page())
