"""What is said of an item: a template whose labels drop out with the fields that are missing.

A template is text with fields in braces. The text in front of a field is its label, the text behind the last field
belongs to that one. An item without a brand loses the label of the brand, too:

    {title}. Brand: {brand}. Category: {categories}      Soap. Brand: Acme. Category: Beauty, Bath
                                                         Soap. Category: Beauty, Bath
                                                         Category: Beauty, Bath

Where the first fields are missing, so are the separators that would now begin the text. What stands behind a colon
joins the parts of a list: `{categories: / }`; a comma and a space do so otherwise.
"""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FIELDS = ("title", "categories", "brand", "description")
# The description comes last, as it is what a limit on the length should cut.
DEFAULT_TEMPLATE = "{title}. Brand: {brand}. Category: {categories}. {description}"
JOIN = ", "
SEPARATORS = " \t\n.,;:|/-"


@dataclass(frozen=True)
class Template:
    """A template, read and checked.

    Args:
        text: with at least one of the fields `FIELDS` in braces; a brace itself is written twice.

    Raises:
        ValueError: braces that do not match, an unknown field, no field, or a bracket that is opened in one field's
            label and closed in another's.
    """

    text: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        fields = [field for _, field, _ in self._parts() if field is not None]
        unknown = [field for field in fields if field not in FIELDS]
        if unknown or not fields:
            wanted = ", ".join(f"{{{name}}}" for name in FIELDS)
            got = f"the field {{{unknown[0]}}}" if unknown else "no field"
            raise ValueError(f"template: expected some of {wanted}, got {got} in {self.text!r}")
        for label, _, _ in self._parts():
            if label.lstrip().startswith((")", "]", "}")):
                raise ValueError(
                    f"template: expected a label in front of each field, got a bracket around one in {self.text!r}; "
                    "it could not drop out with the field"
                )

    def _parts(self) -> list[tuple[str, str | None, str]]:
        """(label, field, what joins a list), and at last what stands behind the last field with None for a field."""
        parts: list[tuple[str, str | None, str]] = []
        label = ""
        try:
            for text, field, join, conversion in string.Formatter().parse(self.text):
                label += text  # an escaped brace ends a part, too
                if field is not None:
                    name = field if conversion is None else f"{field}!{conversion}"
                    parts.append((label, name, join or JOIN))
                    label = ""
        except ValueError as error:
            raise ValueError(f"template: {error} in {self.text!r}") from None
        return [*parts, (label, None, JOIN)]

    def render(self, item: Mapping[str, str | Iterable[str] | None]) -> str:
        """The text of an item, "" if it has none of the fields. HTML entities are resolved, white space is one blank.

        Args:
            item: the fields by name; those that are absent, None or blank are missing.
        """
        said = ""
        skipped = present = False
        for label, field, join in self._parts():
            if field is None:  # the end of the template, behind the last field
                said += label if present else ""
                continue
            value = _clean(item.get(field), join)
            present = value != ""
            if present:
                said += (label.lstrip(SEPARATORS) if skipped and not said else label) + value
            skipped = skipped or not present
        return said.strip()


def _clean(value: str | Iterable[str] | None, join: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(html.unescape(value).split())
    return join.join(dict.fromkeys(part for part in (_clean(part, join) for part in value) if part))
