"""Sections that later commands add to an encoder folder's model card."""

import filecmp
import hashlib
import re
from pathlib import Path

from foreseen.files import write_atomically

_SECTION = re.compile(r"<!-- section (\w+) -->\n.*?<!-- end of \1 -->\n", re.DOTALL)


def add_section(folder: Path, heading: str, text: str) -> None:
    """Add a section to README.md, in the place of an older one with the same heading.

    Args:
        folder: an encoder folder.
        heading: of one line.
        text: Markdown.
    """
    card = folder / "README.md"
    content = card.read_text(encoding="utf-8")
    name = hashlib.blake2b(heading.encode(), digest_size=6).hexdigest()
    begin, end = f"<!-- section {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n## {heading}\n\n{text}\n{end}\n"
    if begin in content and end in content:
        before, rest = content.split(begin, 1)
        content = before + section + rest.split(end, 1)[1].removeprefix("\n")
    else:
        content = f"{content.rstrip()}\n\n{section}"
    write_atomically(card, content)


def keep_sections(old: Path, new: Path) -> None:
    """Carry added sections over to a card that is written anew, if the weights are the same.

    Args:
        old, new: encoder folders.
    """
    weights = "model.safetensors"
    if (old / "README.md").is_file() and filecmp.cmp(old / weights, new / weights, shallow=False):
        card = (old / "README.md").read_text(encoding="utf-8")
        found = [match[0] for match in _SECTION.finditer(card)]
        text = (new / "README.md").read_text(encoding="utf-8")
        write_atomically(new / "README.md", "\n".join([text.rstrip() + "\n", *found]))
