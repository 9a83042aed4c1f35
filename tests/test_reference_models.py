"""The reference models: names and shapes that others rely on, attention written out, causality, padding, stride."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastm2rec import M2RecConfig
from fastm2rec.reference._transformer import TransformerLayer
from fastm2rec.reference.bert4rec import BERT4Rec
from fastm2rec.reference.m2rec import M2Rec
from fastm2rec.reference.mamba import Mamba, every
from fastm2rec.reference.mamba4rec import Mamba4Rec
from fastm2rec.reference.sasrec import SASRec

# Names and shapes of mamba_ssm.Mamba(d_model=64, d_state=16, d_conv=4, expand=2), read from its source.
MAMBA_SSM = {
    "A_log": (128, 16), "D": (128,), "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,),
    "x_proj.weight": (36, 128), "dt_proj.weight": (128, 4), "dt_proj.bias": (128,), "out_proj.weight": (64, 128),
}  # fmt: skip


def test_block_has_the_names_and_shapes_of_mamba_ssm() -> None:
    assert {name: tuple(value.shape) for name, value in Mamba(64, 16).state_dict().items()} == MAMBA_SSM
    with_bias = Mamba(64, 16, bias=True, conv_bias=False).state_dict()
    assert {"in_proj.bias", "out_proj.bias"} <= with_bias.keys()
    assert "conv1d.bias" not in with_bias


def test_block_starts_as_mamba_does() -> None:
    block = Mamba(64, 16)
    assert torch.equal(block.A_log[3].exp().round(), torch.arange(1.0, 17.0))
    steps = F.softplus(block.dt_proj.bias)
    assert 0.001 * 0.999 <= steps.min() <= steps.max() <= 0.1 * 1.001
    assert steps.log().std() > 1, "log-uniform over two decades"
    assert block.dt_proj.weight.abs().max() <= 0.5


def _written_out(block: Mamba, x: Tensor) -> Tensor:
    """The block one row, one position, one channel and one state at a time."""
    state = {name: value.detach() for name, value in block.state_dict().items()}
    N, rank, E = block.d_state, block.dt_rank, block.d_inner
    y = torch.zeros(x.shape[1], E, dtype=x.dtype)
    xz = x[0] @ state["in_proj.weight"].T
    h = torch.zeros(E, N, dtype=x.dtype)
    for t in range(x.shape[1]):
        u = state["conv1d.bias"].clone()
        for j in range(4):
            if t - 3 + j >= 0:
                u += state["conv1d.weight"][:, 0, j] * xz[t - 3 + j, :E]
        u = u * torch.sigmoid(u)
        projected = state["x_proj.weight"] @ u
        step = torch.log1p(torch.exp(state["dt_proj.weight"] @ projected[:rank] + state["dt_proj.bias"]))
        for e in range(E):
            for n in range(N):
                decay = math.exp(-float(step[e]) * math.exp(float(state["A_log"][e, n])))
                h[e, n] = decay * h[e, n] + step[e] * projected[rank + n] * u[e]
                y[t, e] += projected[rank + N + n] * h[e, n]
        z = xz[t, E:]
        y[t] = (y[t] + state["D"] * u) * z * torch.sigmoid(z)
    return y @ state["out_proj.weight"].T


def test_block_is_the_formula_written_out() -> None:
    block = Mamba(6, 3, dt_rank=2).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x)[0], _written_out(block, x), rtol=1e-11, atol=1e-11)


def test_stride_keeps_the_last_position() -> None:
    x = torch.arange(1.0, 11.0).view(1, 10, 1).repeat(3, 1, 1)
    kept = every(x, torch.tensor([10, 7, 1]), 3)
    assert kept[..., 0].tolist() == [[1, 4, 7, 10], [1, 4, 7, 0], [1, 0, 0, 0]]
    block = Mamba(4, 2).double()
    sequence = torch.randn(2, 10, 4, dtype=torch.float64)
    strided = block(sequence, torch.tensor([10, 4]), stride=20)
    assert strided.shape == (2, 1, 4), "one position left: a scan of length one"


def _attention(layer: TransformerLayer, x: Tensor, allowed: Tensor) -> Tensor:
    """The layer with softmax, heads and norms written out; allowed [L, L] bool."""
    L, D = x.shape
    q = layer.query(x)
    k, v = layer.key_value(x)[:, :D], layer.key_value(x)[:, D:]
    width = D // layer.n_heads
    heads = []
    for i in range(layer.n_heads):
        part = slice(i * width, (i + 1) * width)
        weight = torch.zeros(L, L, dtype=x.dtype)
        for t in range(L):
            scores = torch.stack([(q[t, part] * k[s, part]).sum() / math.sqrt(width) for s in range(L)])
            exponentials = torch.where(allowed[t], scores.exp(), torch.zeros_like(scores))
            weight[t] = exponentials / exponentials.sum()
        heads.append(weight @ v[:, part])
    x = layer.attention_norm(x + layer.out(torch.cat(heads, dim=1)))
    return layer.ffn_norm(x + layer.fc2(F.gelu(layer.fc1(x))))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_written_out(causal: bool) -> None:
    layer = TransformerLayer(8, 2, 0.3, 16).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() if causal else torch.arange(6).expand(6, 6) < 4
    actual = layer(x, causal=True) if causal else layer(x, mask=allowed)
    for row in range(2):
        torch.testing.assert_close(actual[row], _attention(layer, x[row], allowed), rtol=1e-10, atol=1e-10)


def _batch(lengths: list[int], seqlen: int, n_items: int = 9) -> tuple[Tensor, Tensor]:
    n = torch.tensor(lengths)
    ids = torch.randint(1, n_items + 1, (len(lengths), seqlen))
    return ids.masked_fill(torch.arange(seqlen) >= n[:, None], 0), n


@pytest.mark.parametrize("kind", [SASRec, BERT4Rec])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_pruned_last_layer_changes_nothing(kind: type[SASRec | BERT4Rec], n_layers: int) -> None:
    model = kind(9, 12, 8, n_layers).double().eval()
    for seqlen in (12, 7, 1):
        ids, n = _batch([seqlen, 1, max(1, seqlen // 2)], seqlen)
        torch.testing.assert_close(model.encode(ids, n), model.encode(ids, n, pruned=False), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [SASRec, BERT4Rec])
def test_transformers_do_not_read_their_padding(kind: type[SASRec | BERT4Rec]) -> None:
    model = kind(9, 12, 8).double().eval()
    ids, n = _batch([5, 3], 5)
    padded = F.pad(ids, (0, 7))
    torch.testing.assert_close(model.encode(padded, n), model.encode(ids, n), rtol=1e-10, atol=1e-10)
    padded[0, 6:] = 4  # garbage behind the row
    torch.testing.assert_close(model.encode(padded, n), model.encode(ids, n), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.encode(ids[1:], n[1:])[0], model.encode(ids, n)[1], rtol=1e-10, atol=1e-10)


def test_sasrec_and_mamba4rec_are_causal_bert4rec_and_m2rec_are_not() -> None:
    config = M2RecConfig(n_items=9, max_len=12, d_model=8, d_state=2, gate="none", theta=0.2)
    models: dict[str, tuple[Any, bool]] = {
        "sasrec": (SASRec(9, 12, 8), True),
        "bert4rec": (BERT4Rec(9, 12, 8), False),
        "mamba4rec": (Mamba4Rec(config), True),
        "m2rec": (M2Rec(config), False),
    }
    ids, n = _batch([12], 12)
    later = ids.clone()
    later[0, 8:] = later[0, 8:] % 9 + 1
    for name, (model, causal) in models.items():
        model = model.double().eval()
        before, after = model.hidden(ids, n)[0, :8], model.hidden(later, n)[0, :8]
        assert torch.allclose(before, after, atol=1e-12) is causal, name


def test_bert4rec_asks_at_a_mask_token_after_the_last_item() -> None:
    model = BERT4Rec(9, 5, 8).double().eval()
    ids = torch.tensor([[3, 1, 2, 0, 0]])
    asked = torch.tensor([[3, 1, 2, 10, 0]])
    expected = model.hidden(asked, torch.tensor([4]))[0, 3]
    torch.testing.assert_close(model.encode(ids, torch.tensor([3]))[0], expected, rtol=1e-12, atol=1e-12)
    full = torch.tensor([[1, 2, 3, 4, 5]])
    assert model.encode(full, torch.tensor([5])).shape == (1, 8)
