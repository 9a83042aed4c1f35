"""The public ops: the choice of an implementation, and an error by name for every argument that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastm2rec import ImplementationError, impl, ops

B, E, L, N, D, R = 2, 6, 5, 3, 4, 3
OPS = (
    "spectral_projection",
    "spectral_projection_fft",
    "causal_conv1d",
    "selective_scan",
    "last_scan",
    "filtered_last_scan",
    "last_state",
    "gated_fusion",
    "output_ffn",
)


def _arguments(op: str) -> dict[str, Any]:
    r = torch.randn
    scan = {"u": r(B, E, L), "delta": r(B, E, L), "A": -r(E, N).exp(), "B": r(B, N, L)}
    arguments: dict[str, dict[str, Any]] = {
        "spectral_projection": {
            "x": r(B, L, D), "basis": r(L, R), "mask": r(R), "weight": r(7, D), "bias": r(7), "conv_weight": r(7, 4),
            "conv_bias": r(7), "activation": "silu",
        },
        "spectral_projection_fft": {"x": r(B, L, D), "gain": r(R), "weight": r(7, D), "bias": r(7)},
        "causal_conv1d": {"x": r(B, E, L), "weight": r(E, 4), "bias": r(E), "activation": "silu"},
        "selective_scan": {
            **scan, "C": r(B, N, L), "D": r(E), "z": r(B, E, L), "delta_bias": r(E), "initial_state": r(B, E, N),
        },
        "last_scan": {
            "p": r(B, L, E), "x_proj_weight": r(2 + 2 * N, E), "dt_proj_weight": r(E, 2), "dt_proj_bias": r(E),
            "A": scan["A"], "D": r(E), "z": r(B, E), "lengths": torch.tensor([5, 1]), "stride": 2,
        },
        "filtered_last_scan": {
            "x": r(B, L, D), "lengths": torch.tensor([5, 1]), "basis": r(L, R), "mask": r(R), "weight": r(E, D),
            "bias": r(E), "conv_weight": r(E, 4), "conv_bias": r(E), "x_proj_weight": r(2 + 2 * N, E),
            "dt_proj_weight": r(E, 2), "dt_proj_bias": r(E), "A": scan["A"], "D": r(E), "z": r(B, E), "stride": 2,
        },
        "last_state": {
            **scan, "C": r(B, N), "D": r(E), "z": r(B, E), "delta_bias": r(E), "lengths": torch.tensor([5, 1]),
        },
        "gated_fusion": {
            "h": r(B, D), "text": r(B, D), "alpha": r(()), "beta": r(D), "weight": r(D, D), "bias": r(D),
        },
        "output_ffn": {
            "y": r(B, E), "residual": r(B, D), "out_weight": r(D, E), "out_bias": r(D), "norm_weight": r(D),
            "norm_bias": r(D), "fc1_weight": r(7, D), "fc1_bias": r(7), "fc2_weight": r(D, 7), "fc2_bias": r(D),
            "last_weight": r(D), "last_bias": r(D),
        },
    }  # fmt: skip
    return arguments[op]


@pytest.mark.parametrize("op", OPS)
def test_auto_is_what_it_says_it_takes(op: str) -> None:
    arguments = _arguments(op)
    taken = impl.chosen(op, "auto", "cpu")
    assert taken in impl.names()
    function: Callable[..., torch.Tensor] = getattr(ops, op)
    assert torch.equal(function(**arguments), function(**arguments, impl=taken))


@pytest.mark.parametrize("op", OPS)
def test_an_implementation_asked_for_by_name_runs_or_raises(op: str) -> None:
    arguments = _arguments(op)
    with pytest.raises(ImplementationError, match=f"impl='warp' was asked for {op} on cpu: there is no implementation"):
        getattr(ops, op)(**arguments, impl="warp")
    assert impl.unavailable(op, "warp", "cpu") is not None
    assert impl.unavailable(op, "reference", "cpu") is None


def test_an_op_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="op: expected one of .*, got 'scan'"):
        impl.chosen("scan", "reference", "cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_is_checked_for_shape_and_dtype(op: str) -> None:
    arguments = _arguments(op)
    function = getattr(ops, op)
    function(**arguments)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .* got "):
            function(**{**arguments, name: value.bool()})
        if value.dim() == 0:
            continue
        if name != next(iter(arguments)):  # the first one defines the sizes that the others must fit
            refused = []  # growing some axis must be refused by this tensor's name; a few axes are free
            for axis in range(value.dim()):
                try:
                    function(**{**arguments, name: torch.cat([value, value], dim=axis)})
                except ValueError as error:
                    refused.append(str(error).partition(": expected ")[0])
            assert name in refused
        with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
            function(**{**arguments, name: value.unsqueeze(0).unsqueeze(0)})


@pytest.mark.parametrize("lengths", [[0, 1], [6, 1], [-1, 1]])
def test_lengths_outside_the_sequence(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="^lengths: expected values from 1 to 5, got"):
        ops.last_state(**{**_arguments("last_state"), "lengths": torch.tensor(lengths)})


@pytest.mark.parametrize("op", ["selective_scan", "last_state"])
def test_an_empty_sequence(op: str) -> None:
    arguments = {
        name: value[..., :0] if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[2] == L else value
        for name, value in _arguments(op).items()
    }
    with pytest.raises(ValueError, match="^u: expected a seqlen of at least 1, got 0"):
        getattr(ops, op)(**arguments)


def test_gates_that_contradict_each_other() -> None:
    arguments = _arguments("gated_fusion")
    gate = {"gate_weight": torch.randn(2 * D, 2 * D), "gate_bias": torch.randn(2 * D)}
    for wrong in (
        {**arguments, **gate},
        {**arguments, "beta": None},
        {**arguments, "alpha": None, "beta": None},
        {**arguments, "alpha": None, "beta": None, "gate_weight": gate["gate_weight"]},
    ):
        with pytest.raises(ValueError, match="^alpha: expected either alpha and beta, or gate_weight and gate_bias"):
            ops.gated_fusion(**wrong)
    with pytest.raises(ValueError, match="^text: expected a tensor"):
        ops.gated_fusion(**{**arguments, "text": None})


def test_other_misfits() -> None:
    with pytest.raises(ValueError, match="activation: expected None or 'silu', got 'relu'"):
        ops.causal_conv1d(**{**_arguments("causal_conv1d"), "activation": "relu"})
    with pytest.raises(ValueError, match="^bias: expected None without a weight"):
        ops.spectral_projection(**{**_arguments("spectral_projection"), "weight": None})


def test_the_order_of_the_channels() -> None:
    arguments, function = _arguments("last_scan"), ops.last_scan
    function(**arguments, order=torch.arange(E).flip(0))
    for wrong, message in (
        (torch.zeros(E, dtype=torch.int64), f"^order: expected each of 0 to {E - 1} once, got 1 numbers from 0 to 0"),
        (torch.arange(1, E + 1), f"^order: expected each of 0 to {E - 1} once, got {E} numbers from 1 to {E}"),
        (torch.arange(E).double(), "^order: expected int64 on cpu, got torch.float64 on cpu"),
        (torch.arange(E, device="meta"), "^order: expected int64 on cpu, got torch.int64 on meta"),
        (torch.arange(E + 1), rf"^order: expected shape \[E={E}\], got \[{E + 1}\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(**arguments, order=wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"^dropout: expected a probability in \[0, 1\), got {wrong}"):
        ops.output_ffn(**_arguments("output_ffn"), dropout=wrong)


def test_the_gates_table_and_its_ids() -> None:
    arguments = {**_arguments("gated_fusion"), "text": torch.randn(5, D), "ids": torch.tensor([4, 0])}
    ops.gated_fusion(**arguments)
    ops.gated_fusion(**{**arguments, "ids": arguments["ids"].int()})
    for wrong, message in (
        ({"ids": torch.tensor([4, 5])}, "^ids: expected values from 0 to 4, got 4 to 5"),
        ({"ids": torch.tensor([-1, 0])}, "^ids: expected values from 0 to 4, got -1 to 0"),
        ({"ids": torch.tensor([0, 1, 2])}, r"^ids: expected shape \[2\], got \[3\]"),
        ({"ids": torch.zeros(2)}, "^ids: expected int32 or int64, got torch.float32"),
        ({"ids": torch.tensor([True, False])}, "^ids: expected int32 or int64, got torch.bool"),
        ({"ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "^ids: expected device cpu, got meta"),
        ({"ids": None}, "^text: expected shape"),
        ({"text": torch.randn(0, D)}, "^text: expected at least one row for ids, got none"),
        ({"text": None, "alpha": None, "beta": None}, "^ids: expected None without a text, got a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.gated_fusion(**{**arguments, **wrong})


def test_the_gates_norm() -> None:
    arguments = _arguments("gated_fusion")
    norm: dict[str, Any] = {"norm_weight": torch.randn(D), "norm_bias": torch.randn(D)}
    ops.gated_fusion(**arguments, **norm)
    for name, other in (("norm_weight", "norm_bias"), ("norm_bias", "norm_weight")):
        with pytest.raises(ValueError, match=f"^{name}: expected both norm_weight and norm_bias, or neither, got None"):
            ops.gated_fusion(**arguments, **{other: norm[other]})
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \[D=4\], got \[1, 4\]"):
            ops.gated_fusion(**arguments, **{**norm, name: norm[name][None]})


def _packed(cu_seqlens: Any) -> dict[str, Any]:
    one_row = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.dim() == 3 else value
        for name, value in _arguments("selective_scan").items()
    }
    return {**one_row, "initial_state": torch.randn(2, E, N), "cu_seqlens": cu_seqlens}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=dtype)
    y, state = ops.selective_scan(**_packed(cu_seqlens), return_last_state=True)
    assert (y.shape, state.shape) == ((1, E, L), (2, E, N))
    with pytest.raises(
        ValueError, match="^initial_state: expected shape .n_sequences=2, dim=6, dstate=3., got .1, 6, 3"
    ):
        ops.selective_scan(**{**_packed(cu_seqlens), "initial_state": torch.randn(1, E, N)})
    with pytest.raises(ValueError, match="^cu_seqlens: expected a batch of 1 .*, got 2 rows"):
        ops.selective_scan(**_arguments("selective_scan"), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0.0, 2.0, 5.0]), "int32 or int64 of shape .n_sequences . 1., got torch.float32 of shape .3."),
        (torch.tensor([0, 2, 5], dtype=torch.int16), "int32 or int64 of shape .*, got torch.int16"),
        (torch.tensor([[0, 2, 5]]), "int32 or int64 of shape .*, got torch.int64 of shape .1, 3."),
        (torch.tensor([0]), "int32 or int64 of shape .*, got torch.int64 of shape .1."),
        (torch.tensor([1, 2, 5]), "values from 0 to the seqlen 5, got 1 to 5"),
        (torch.tensor([0, 2, 6]), "values from 0 to the seqlen 5, got 0 to 6"),
        (torch.tensor([0, 4, 3, 5]), "strictly increasing values, got 4 then 3 at index 1"),
        (torch.tensor([0, 2, 2, 5]), "strictly increasing values, got 2 then 2 at index 1"),
    ],
)
def test_packed_sequences_that_do_not_fit(cu_seqlens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cu_seqlens: expected {message}"):
        ops.selective_scan(**_packed(cu_seqlens))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "relu"}, "activation: expected None or 'silu', got 'relu'"),
        ({"conv_weight": None}, "conv_bias: expected None without a conv_weight, got a tensor"),
        (
            {"conv_weight": None, "conv_bias": None, "conv_first": True},
            "conv_first: expected False without a conv_weight",
        ),
        ({"weight": None, "bias": None}, "conv_bias: expected shape .C_out=4., got .7."),
        ({"mask": torch.ones(R, 7)}, "mask: expected shape .R=3., .B=2, R. or .R, C=4., got .3, 7."),
        ({"mask": torch.ones(R, D), "conv_first": True}, "mask: expected .* or .R, C_out=7., got .3, 4."),
        (
            {"basis": torch.ones(L, R, requires_grad=True)},
            "basis: expected data, got a tensor that requires a gradient",
        ),
    ],
)
def test_projections_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.spectral_projection(**{**_arguments("spectral_projection"), **changed})


@pytest.mark.parametrize(("gain", "got"), [(torch.ones(0), 0), (torch.ones(4), 4), (torch.ones(4, D), 4)])
def test_bins_that_a_sequence_does_not_have(gain: torch.Tensor, got: int) -> None:
    with pytest.raises(ValueError, match=f"^gain: expected 1 to L // 2 . 1 = 3 bins, got {got}"):
        ops.spectral_projection_fft(**{**_arguments("spectral_projection_fft"), "gain": gain})
    with pytest.raises(ValueError, match="^x: expected an L of at least 1, got 0"):
        ops.spectral_projection_fft(torch.ones(B, 0, D), gain)


def test_how_the_last_state_is_computed() -> None:
    arguments = _arguments("last_state")
    last_state: Any = ops.last_state
    nodes = ops.fit_nodes(arguments["A"])
    exact = last_state(**arguments)
    for exponentials in ("exact", "nodes", "auto"):
        how: dict[str, Any] = {"exponentials": exponentials, "nodes": nodes, "splits": 2}
        assert torch.equal(last_state(**arguments, **how, impl="reference"), exact)
    for wrong, message in (
        ({"exponentials": "fast"}, "exponentials: expected one of exact, nodes, auto, got 'fast'"),
        ({"splits": 0}, "splits: expected at least 1, got 0"),
        ({"nodes": ops.fit_nodes(arguments["A"][1:])}, "nodes: expected shape .*count.*dstate=3, dim=6.*, got"),
        ({"exponentials": "nodes"}, r"nodes: expected fit_nodes\(A\) with exponentials='nodes', got None"),
        (
            {"exponentials": "nodes", "nodes": ops.fit_nodes(arguments["A"], tolerance=1e-9)},
            "nodes: expected a fit with an error of at most 1.0e-09, got .*e-0. with",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            last_state(**arguments, **wrong)
    with pytest.raises(TypeError, match="^nodes: expected what fit_nodes.* returns, got Tensor"):
        last_state(**arguments, nodes=nodes.coefficients)
