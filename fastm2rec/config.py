"""What a model is, as data: sizes, where the filter sits, how the gate mixes. One dataclass per model.

Each dataclass is the JSON beside a saved model, the YAML of a run and the flags of the command line, so a field is
checked here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

FilterPlacement: TypeAlias = Literal["inner", "input", "none"]
Mask: TypeAlias = Literal["hard", "soft", "straight_through"]
Basis: TypeAlias = Literal["fourier", "dct"]
Spectrum: TypeAlias = Literal["padded", "valid"]
Gate: TypeAlias = Literal["scalar", "vector", "context", "linear", "none"]
TextScale: TypeAlias = Literal["unit_variance", "none"]
Init: TypeAlias = Literal["mamba4rec", "mamba"]


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect_int(config: object, *names: str, least: int) -> None:
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _expect(whole and value >= least, name, f"an integer of at least {least}", value)


def _expect_word(config: object, name: str, words: object) -> None:
    value = getattr(config, name)
    _expect(value in get_args(words), name, f"one of {', '.join(get_args(words))}", value)


def _expect_type(config: object, *names: str, kind: type) -> None:
    for name in names:
        value = getattr(config, name)
        _expect(isinstance(value, kind), name, f"a {kind.__name__}", value)


def _expect_dropout(value: object) -> None:
    _expect(_is_number(value) and 0 <= value < 1, "dropout", "a number in [0, 1)", value)  # type: ignore[operator]


class _Config:
    """To and from plain dictionaries, shared by the dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` described.

        Raises:
            ValueError: a field that this config does not have (by name), or a value out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        strangers = sorted(set(values) - names)
        if strangers:
            raise ValueError(f"{cls.__name__} has no field {', '.join(strangers)}; it has {', '.join(sorted(names))}")
        return cls(**values)


@dataclass(frozen=True)
class M2RecConfig(_Config):
    """M2Rec (arXiv 2505.04445) and, with `filter_placement="none"` and `gate="none"`, Mamba4Rec.

    Args:
        n_items: catalogue size; 0 for an encoder that is fed embeddings.
        max_len: L, the number of most recent items that are read.
        d_model: D, width of the embeddings.
        d_state: N, states per channel of the scan.
        d_conv: J, taps of the causal convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the step-size projection; None means ceil(d_model / 16).
        n_layers: filter + Mamba + feed-forward layers.
        dropout: probability, on the embeddings, after the scan and in the feed-forward network.
        ffn_mult: hidden width of the feed-forward network, in units of d_model.
        filter_placement: "inner" filters the convolution's output before SiLU (the authors' figure), "input" filters
            the sequence before the block (the paper's text), "none" leaves the filter out (ablation w/o AFFT).
        theta: cutoff in cycles per sample, 0 to 0.5 (Eq. 12), the start value where it is learned; 0.5 keeps all.
        mask: "hard" (Eq. 12, fixed), "soft" (sigmoid((theta - f) / tau), theta learned) or "straight_through" (hard in
            the forward pass, soft in the backward pass, theta learned).
        tau: width of the soft mask's edge, cycles per sample.
        basis: "fourier" (the paper) or "dct" (even extension: no wrap-around at the last position).
        spectrum: "padded" transforms all max_len slots (published behaviour); "valid" transforms each row over its own
            length, so that its result never depends on the padding.
        stride: the last layer scans every stride-th position, counted back from the last item.
        scan_norm: LayerNorm on the scan's output (the authors' figure only).
        text_dim: T, width of the text embeddings; 0 without text.
        gate: "scalar" (Eq. 16), "vector" (one pair per feature), "context" (a sigmoid of both inputs), "linear" (the
            control: the output Linear without text) or "none" (ablation w/o GM).
        gate_residual: add the encoder's output to the gate's.
        text_scale: "unit_variance" standardises each text feature over the catalogue, "none" takes the table as it is.
        init: "mamba4rec" draws every Linear and Embedding from N(0, 0.02); "mamba" keeps Mamba's own dt_proj.

    Raises:
        ValueError: a field out of range; the message names it, what was expected and what came.
    """

    model_type: ClassVar[str] = "m2rec"

    n_items: int = 0
    max_len: int = 200
    d_model: int = 64
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    n_layers: int = 1
    dropout: float = 0.2
    ffn_mult: int = 4
    filter_placement: FilterPlacement = "inner"
    theta: float = 0.1
    mask: Mask = "hard"
    tau: float = 0.02
    basis: Basis = "fourier"
    spectrum: Spectrum = "padded"
    stride: int = 1
    scan_norm: bool = False
    text_dim: int = 0
    gate: Gate = "scalar"
    gate_residual: bool = False
    text_scale: TextScale = "unit_variance"
    init: Init = "mamba4rec"

    def __post_init__(self) -> None:
        _expect_int(self, "n_items", "text_dim", least=0)
        _expect_int(self, "max_len", "d_model", "d_state", "d_conv", "expand", least=1)
        _expect_int(self, "n_layers", "ffn_mult", "stride", least=1)
        if self.dt_rank is not None:
            _expect_int(self, "dt_rank", least=1)
        _expect_type(self, "scan_norm", "gate_residual", kind=bool)
        _expect_dropout(self.dropout)
        _expect(_is_number(self.theta) and 0 <= self.theta <= 0.5, "theta", "cycles per sample in [0, 0.5]", self.theta)
        _expect(_is_number(self.tau) and 0 < self.tau < math.inf, "tau", "a positive number", self.tau)
        _expect_word(self, "filter_placement", FilterPlacement)
        _expect_word(self, "mask", Mask)
        _expect_word(self, "basis", Basis)
        _expect_word(self, "spectrum", Spectrum)
        _expect_word(self, "gate", Gate)
        _expect_word(self, "text_scale", TextScale)
        _expect_word(self, "init", Init)
        start = f"a start value strictly between 0 and 0.5 with mask={self.mask!r}, which learns it"
        _expect(not self.learns_theta or 0 < self.theta < 0.5, "theta", start, self.theta)

    @property
    def d_inner(self) -> int:
        """E, the number of channels that are scanned."""
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        """`dt_rank`, or Mamba's ceil(d_model / 16)."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank

    @property
    def uses_text(self) -> bool:
        """Does the gate read text embeddings?"""
        return self.gate in ("scalar", "vector", "context")

    @property
    def learns_theta(self) -> bool:
        """Is the cutoff a parameter?"""
        return self.filter_placement != "none" and self.mask != "hard"

    @property
    def is_causal(self) -> bool:
        """Does position t see items up to t only? A filter that drops any frequency lets it see later ones."""
        identity = self.mask == "hard" and self.theta >= 0.5
        return self.filter_placement == "none" or identity

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> M2RecConfig:
        """A published setting: "ml1m", "beauty", "foursquare" or "paper_figure", with `overrides` on top.

        Sizes are M2Rec's (arXiv 2505.04445): D=64, N=32, J=4, expand 2, theta=0.1, L=200 for ML-1M and 50 elsewhere.
        Dropout follows Mamba4Rec (arXiv 2403.03900): 0.2, and 0.4 on sparse data. "paper_figure" is the block as the
        authors draw it, with a LayerNorm after the scan.

        Raises:
            ValueError: an unknown name, or an override that is out of range.
            TypeError: an override that is no field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "ml1m": {"max_len": 200, "dropout": 0.2},
    "beauty": {"max_len": 50, "dropout": 0.4},
    "foursquare": {"max_len": 50, "dropout": 0.4},
    "paper_figure": {"max_len": 200, "dropout": 0.2, "filter_placement": "inner", "scan_norm": True},
}


@dataclass(frozen=True)
class SASRecConfig(_Config):
    """SASRec (arXiv 1808.09781): causal Transformer, post-norm, GELU, softmax over all items.

    Args:
        n_items: catalogue size.
        max_len: L, the number of most recent items that are read.
        d_model: width of the embeddings; a multiple of n_heads.
        n_layers: Transformer layers.
        n_heads: attention heads.
        dropout: probability.

    Raises:
        ValueError: a field out of range.
    """

    model_type: ClassVar[str] = "sasrec"

    n_items: int = 0
    max_len: int = 200
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    dropout: float = 0.2

    def __post_init__(self) -> None:
        _expect_int(self, "n_items", least=0)
        _expect_int(self, "max_len", "d_model", "n_layers", "n_heads", least=1)
        _expect(self.d_model % self.n_heads == 0, "d_model", f"a multiple of n_heads ({self.n_heads})", self.d_model)
        _expect_dropout(self.dropout)


@dataclass(frozen=True)
class BERT4RecConfig(SASRecConfig):
    """BERT4Rec (arXiv 1904.06690): bidirectional Transformer trained by masking items.

    Args:
        mask_prob: share of the items that are masked in training.
    """

    model_type: ClassVar[str] = "bert4rec"

    mask_prob: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        share = _is_number(self.mask_prob) and 0 < self.mask_prob <= 1
        _expect(share, "mask_prob", "a number in (0, 1]", self.mask_prob)


@dataclass(frozen=True)
class GRU4RecConfig(_Config):
    """GRU4Rec (arXiv 1511.06939): a GRU, softmax over all items.

    Args:
        n_items: catalogue size.
        max_len: L, the number of most recent items that are read.
        d_model: width of the embeddings.
        gru_width: width of the GRU's state.
        n_layers: GRU layers.
        dropout: probability, on the embeddings.

    Raises:
        ValueError: a field out of range.
    """

    model_type: ClassVar[str] = "gru4rec"

    n_items: int = 0
    max_len: int = 200
    d_model: int = 64
    gru_width: int = 128
    n_layers: int = 1
    dropout: float = 0.2

    def __post_init__(self) -> None:
        _expect_int(self, "n_items", least=0)
        _expect_int(self, "max_len", "d_model", "gru_width", "n_layers", least=1)
        _expect_dropout(self.dropout)
