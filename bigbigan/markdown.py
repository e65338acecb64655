"""Foreign text in Markdown documents: shown as it is, never as markup or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote


def one_line(text: str) -> str:
    """One line of printable characters; others, such as terminal codes, become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def escape(text: str) -> str:
    """One line that reads as `text` once it is rendered, also in a table or a list.

    Backslashes go before Markdown's marks where they would act: not before underscores inside of words, nor brackets
    that end no link's text. `<` and what would be an entity are written as entities, which every dialect knows.
    """
    text = re.sub(r"&(?=#?\w+;)", "&amp;", one_line(text)).replace("\\", "\\\\")
    text = re.sub(r"([`*|]|\](?=[(:\[])|~(?=~)|(?<=~)~|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text).replace("<", "&lt;")
    # What would open a heading, a list, a quotation or a rule; a lone dash is an empty cell of our tables.
    text = re.sub(r"^(?=>|\[[ xX]\]\s|(?:#{1,6}|[+-]|=+)\s|-{2,}$|=+$)", r"\\", text)
    return re.sub(r"^(\d{1,9})(?=[.)]\s)", r"\1\\", text)


def code(text: str) -> str:
    """One line in a code span, whatever backticks it holds."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def target(name: str) -> str:
    """A file's name as the address of a link."""
    return quote(name, safe="/~")


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "unnamed"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, ready: bool = False) -> Iterator[str]:
    """The lines of a table; cells are escaped unless they are `ready` Markdown."""
    for number, row in enumerate((header, *rows)):
        yield "| " + " | ".join(cell if ready else escape(cell) for cell in row) + " |"
        if not number:
            yield "| " + " | ".join(["---"] * len(header)) + " |"
