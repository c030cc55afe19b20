"""Whether a tag may become a release: it names the version, and the changelog says what is in it.
`python tools/check_release.py v0.1.0` fails, and says why, where it may not.
"""

import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def section(changelog: str, version: str) -> str | None:
    """The text under ``## VERSION``, with a date behind it or not; None where there is none."""
    for part in re.split("^## ", changelog, flags=re.M)[1:]:
        heading, _, text = part.partition("\n")
        if heading.split(" ")[0] == version:
            return text
    return None


def complaint(tag: str, version: str, changelog: str) -> str | None:
    """Why there is no release, or None."""
    if tag != f"v{version}":
        return f"the tag must be v{version}, as lion_kernels/_version.py says, got {tag}"
    text = section(changelog, version)
    if text is None:
        return f"CHANGELOG.md has no section '## {version}'"
    if not re.sub(r"^#.*$", "", text, flags=re.M).strip():
        return f"the section '## {version}' of CHANGELOG.md is empty"
    return None


if __name__ == "__main__":
    version = runpy.run_path(str(ROOT / "lion_kernels" / "_version.py"))["__version__"]
    sys.exit(complaint(sys.argv[1], version, (ROOT / "CHANGELOG.md").read_text()))
