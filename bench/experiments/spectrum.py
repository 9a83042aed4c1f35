"""How a user's sequence varies along its positions: power spectra, before and after the filter, and of what is read.

The power at k / L cycles per step of sequences x [n, L, D], their means over L taken away, is |rfft(x)[k]|^2 summed
over D and averaged over n, as a share of the total over k >= 1 (both sides of the spectrum counted). Shuffling each
sequence in time removes all structure: its spectrum is flat, and is what the real one is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.experiments.execute import Store
from bench.experiments.plan import Run
from fastm2rec import M2Rec, M2RecConfig, ops
from fastm2rec.data import PrefixSamples, SequenceDataset, synthetic
from fastm2rec.training import load_inputs

_MOST_USERS = 1000


def power(x: Tensor) -> Tensor:
    """[L // 2] shares of the power of x [n, L, D] at 1 / L, 2 / L, ... cycles per step; they sum to 1."""
    length = x.shape[1]
    found = (
        torch.fft.rfft((x - x.mean(dim=1, keepdim=True)).double(), dim=1)[:, 1:].abs().square().sum(dim=2).mean(dim=0)
    )
    found[: (length - 1) // 2] *= 2  # all but the Nyquist frequency stand for their negative, too
    return found / found.sum()


def slow_share(x: Tensor, theta: float) -> dict[str, float]:
    """The share of its power that a sequence has up to `theta` cycles per step: the mean over x [n, L, D], its 95 %
    interval (1.96 standard errors), and `chance`, what it is for sequences whose order is random."""
    length, kept = x.shape[1], int(theta * x.shape[1] + 1e-9)
    varies = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2)) > 0
    shares = torch.stack([power(one.unsqueeze(0))[:kept].sum() for one in x[varies]])
    mean, error = float(shares.mean()), float(shares.std() / len(shares) ** 0.5)
    chance = min(2 * kept, length - 1) / (length - 1)
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error, "chance": chance}


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """x [n, L, D] with each sequence's positions in random order."""
    order = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return x.gather(1, order.unsqueeze(2).expand_as(x))


def windows(dataset: SequenceDataset, length: int) -> Tensor:
    """[n, length] int64: the last `length` events before the test item of the users who have as many."""
    samples = PrefixSamples(dataset, length, "test")
    batch = samples.batch(torch.arange(len(samples)))
    return batch.item_ids[batch.lengths == length][:_MOST_USERS]


@torch.no_grad()
def around_the_filter(model: M2Rec, item_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer's filter reads and what it hands on, each [n, L, C], for full windows item_ids [n, L]."""
    layer: Any = model.encoder.layers[0]
    x = model.input_norm(model.item_embedding(item_ids))
    if model.config.filter_placement == "inner":
        u = layer.mamba.in_proj(x)[..., : model.config.d_inner].transpose(1, 2)
        conv = layer.mamba.conv1d
        x = ops.causal_conv1d(u, conv.weight.squeeze(1), conv.bias).transpose(1, 2)
    return x, layer.filter(x, torch.full((len(x),), x.shape[1]))


def _variation(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)).square().sum()


def analyse(options: Mapping[str, Any], runs: list[Run], store: Store) -> dict[str, Any]:
    """Spectra by data set: of the items' text, of the same shuffled, and around the filter of the last run's model."""
    length = options["length"]
    rows = cycle(options["cycle"])
    theta = next((run.config.model.theta for run in runs if isinstance(run.config.model, M2RecConfig)), 0.5)
    for dataset, run in {run.dataset: run for run in runs}.items():
        inputs = load_inputs(run.config.data, with_text=True)
        ids = windows(inputs.dataset, length)
        assert inputs.text is not None
        text = inputs.text[ids]
        row = {"dataset": dataset, "length": length, "users": len(ids)}
        slow = slow_share(text, theta)
        rows.append({**row, "signal": "text of the items", "power": power(text).tolist(), "slow_share": slow})
        rows.append({**row, "signal": "text, shuffled in time", "power": power(shuffled(text)).tolist()})
        model = store.model(run)
        if isinstance(model, M2Rec) and model.config.filter_placement != "none" and model.max_len == length:
            before, after = around_the_filter(model, ids)
            row |= {"label": run.label, "seed": run.seed}
            rows.append({**row, "signal": "before the filter", "power": power(before).tolist()})
            # As a share of the power before the filter, so that what was removed is seen.
            kept = float(_variation(after) / _variation(before))
            rows.append({**row, "signal": "after the filter", "power": (kept * power(after)).tolist()})
    return {"kind": "spectrum", "theta": theta, "rows": rows}


def cycle(period: int) -> list[dict[str, Any]]:
    """Spectra of users who walk around a cycle of so many kinds of items.

    Where the kinds lie on a circle, as the days of a week do, one frequency is all there is: 1 / period. Where they
    have nothing to do with each other, its multiples are about as strong.
    """
    length = 10 * period
    made = synthetic(200, 20 * period, length, periods=(period,), noise=0.1)
    dataset = SequenceDataset.from_log(made.log)
    ids = torch.tensor(dataset.vocab.items)[dataset.items - 1].view(200, length)
    angle = (2 * torch.pi / period) * ((ids - 1) % period)  # `synthetic` deals the kinds out in turn
    signals = {"kinds on a circle": torch.stack([angle.cos(), angle.sin()], dim=2), "unrelated kinds": made.text[ids]}
    row = {"dataset": f"cycle of {period}", "length": length, "users": 200}
    return [
        {**row, "signal": name, "power": power(x).tolist(), "peak": slowest_peak(power(x), length)}
        for name, x in signals.items()
    ]


def slowest_peak(found: Tensor, length: int) -> float:
    """The lowest frequency, in cycles per step, with at least half of the power of the strongest one."""
    return (int((found >= 0.5 * found.max()).nonzero()[0]) + 1) / length
