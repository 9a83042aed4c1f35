"""What a request holds, what an answer holds, and how a fault in a request is put into words."""

from __future__ import annotations

import json
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

# fail_fast: of a history with a million faults the first is told.
History = Annotated[list[StrictInt | StrictStr], Field(fail_fast=True)]


class RecommendRequest(BaseModel):
    """Histories of item ids, oldest item first, and what is wanted for them."""

    model_config = ConfigDict(extra="forbid")

    history: History | None = Field(None, description="one history")
    histories: Annotated[list[History], Field(fail_fast=True)] | None = Field(None, description="or several")
    k: StrictInt = Field(10, ge=1, description="items wanted, at most the size of the catalogue")
    exclude_seen: StrictBool = Field(True, description="leave out the items of the history")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.history is None) == (self.histories is None):
            raise ValueError("expected either history or histories")
        return self

    @property
    def rows(self) -> list[list[int | str]]:
        return [self.history] if self.history is not None else self.histories or []


class ScoredItem(BaseModel):
    """A recommendation; a higher score is better, the scale is the model's own."""

    item: int | str
    score: float
    title: str | None = None


class Result(BaseModel):
    """The answer to one history."""

    items: list[ScoredItem]
    skipped: int = Field(description="ids of the history that the catalogue does not hold")
    fallback: bool = Field(description="the most popular items, since the history has no known item")


class RecommendResponse(BaseModel):
    model: str = Field(description="which weights answered")
    results: list[Result]


class CatalogueItem(BaseModel):
    item: int | str
    title: str | None = None


class ItemsResponse(BaseModel):
    items: list[CatalogueItem]


class Problem(BaseModel):
    """Every answer of status 400 and above."""

    detail: str


def explain(error: ValidationError) -> tuple[int, str]:
    """The status and the words for a request that is not what `RecommendRequest` describes."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return 400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    if not first["loc"]:
        return 422, first["msg"].removeprefix("Value error, ")
    place = list(first["loc"])
    what = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if len(place) > 1 and place[-1] in ("int", "str"):  # a union ends the place with the member that was tried
        place.pop()
        what = "expected an item id, a whole number or a string"
    name = str(place[0])[:60] + "".join(f"[{part}]" for part in place[1:])
    return 422, f"{name}: {what}, got {_short(first['input'])}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
