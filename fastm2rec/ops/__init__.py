"""The ops of M2Rec: one public function each, with its shapes, its checks and the choice of an implementation.

Symbols: B batch, L = seqlen, C channels, R basis columns, D = d_model, E = dim = d_inner, N = d_state. The scan and the
convolution take mamba_ssm's channel-first layout (batch, dim, seqlen) with any strides, so a transposed view of a
[B, L, E] tensor costs nothing.

Every function takes `impl`: "auto", or the name of an implementation, which then runs or raises
`fastm2rec.impl.ImplementationError`. All checks of an op are in its function; implementations trust them.

An op has a file of its own; the underscore keeps a file from taking the name of its function.
"""

from __future__ import annotations

from ..kernels._nodes import fit_nodes
from ._causal_conv1d import causal_conv1d
from ._cross_entropy import cross_entropy
from ._embed_norm import embed_norm
from ._encode_last import encode_last
from ._filtered_last_scan import filtered_last_scan
from ._gated_fusion import gated_fusion
from ._last_scan import last_scan
from ._last_state import last_state
from ._output_ffn import output_ffn
from ._selective_scan import selective_scan
from ._spectral_projection import FFT_COLUMNS, spectral_projection, spectral_projection_fft

__all__ = [
    "FFT_COLUMNS",
    "causal_conv1d",
    "cross_entropy",
    "embed_norm",
    "encode_last",
    "filtered_last_scan",
    "fit_nodes",
    "gated_fusion",
    "last_scan",
    "last_state",
    "output_ffn",
    "selective_scan",
    "spectral_projection",
    "spectral_projection_fft",
]
