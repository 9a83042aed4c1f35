"""What a template says of an item, with and without its fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastm2rec.text import DEFAULT_TEMPLATE, Template


@pytest.mark.parametrize(
    ("template", "item", "text"),
    [
        (DEFAULT_TEMPLATE, {"title": "Soap", "brand": "Acme", "categories": ["Bath", "Care"], "description": "Mild."},
         "Soap. Brand: Acme. Category: Bath, Care. Mild."),
        (DEFAULT_TEMPLATE, {"title": "Soap", "brand": None, "categories": ["Bath"]}, "Soap. Category: Bath"),
        (DEFAULT_TEMPLATE, {"title": " ", "brand": "Acme", "description": "Mild."}, "Brand: Acme. Mild."),
        (DEFAULT_TEMPLATE, {"description": "Mild."}, "Mild."),
        (DEFAULT_TEMPLATE, {"title": None, "brand": "", "categories": [], "description": " \n"}, ""),
        (DEFAULT_TEMPLATE, {}, ""),
        ("{title}, {categories: }", {"title": "Toy Story (1995)", "categories": ["Animation", "Comedy"]},
         "Toy Story (1995), Animation Comedy"),
        ("{title}", {"title": "Caf&egrave; &amp; T&#39;s\n  bar", "brand": "x"}, "Cafè & T's bar"),
        ("{categories: / }", {"categories": ["a", None, "b", "a", " "]}, "a / b"),
        ("A film, {title}!", {"title": "Up"}, "A film, Up!"),
        ("A film, {title}!", {"brand": "Up"}, ""),
        ("{title} by {brand}!", {"title": "Up"}, "Up"),
        ("{{{title}", {"title": "Up"}, "{Up"),
        ("{title}", {"title": "{brand}", "brand": "x"}, "{brand}"),
    ],
)  # fmt: skip
def test_a_missing_field_drops_out_with_its_label(template: str, item: dict, text: str) -> None:
    assert Template(template).render(item) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel}", "expected some of {title}.*got the field {titel}"),
        ("{}", "got the field {}"),
        ("{title.real}", "got the field {title.real}"),
        ("{title!r}", "got the field {title!r}"),
        ("a film", "got no field"),
        ("", "got no field"),
        ("{title", "template: expected '}' before end of string"),
        ("{title} ({brand}), {categories}", "a bracket around one"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(template)


word = st.text("abc", min_size=1, max_size=3)


@given(st.fixed_dictionaries({}, optional={"title": word, "brand": word, "categories": word, "description": word}))
def test_nothing_but_the_present_parts_is_said(item: dict[str, str]) -> None:
    labelled = {"title": "{}", "brand": "Brand: {}", "categories": "Category: {}", "description": "{}"}
    expected = [label.format(item[name]) for name, label in labelled.items() if name in item]
    assert Template().render({**item, "categories": [item["categories"]] if "categories" in item else None}) == (
        ". ".join(expected)
    )
