"""What features look like before anything is learned from them, and how far gradients agree.

Shape suffixes: N samples, D width, T teachers. Everything is computed in float64; what is
not defined is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agglom.core.normalise import Moments

# Darcet et al. 2024 (arXiv 2309.16588, section 2.1) cut the two peaks of the norms of one model at 150. Raw scales of
# teachers differ by two orders of magnitude, so here the cut is relative to the teacher's own ordinary token.
HIGH_NORM = 3.0


def rms(moments: Moments) -> float:
    """Root mean square of the raw features, over samples and dimensions."""
    if moments.count == 0:
        return math.nan
    square = moments.scatter_DD.diagonal().sum() / moments.count + moments.mean_D.square().sum()
    return float((square / len(moments.mean_D)).sqrt())


def effective_rank(moments: Moments) -> float:
    """exp H(p), p the singular values of the centred features over their sum: how many directions are in use.

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1; after Roy and Vetterli 2007), without its ε and after
    centring: an offset that all samples share is no direction to learn. From the scatter matrix, whose eigenvalues are
    the squares of the singular values: at most min(D, N − 1). NaN of features that are all alike.
    """
    sigma_D = torch.linalg.eigvalsh(moments.scatter_DD).clamp(min=0.0).sqrt()
    total = sigma_D.sum()
    # Features that are all alike leave rounding errors, relative to their mean.
    noise = torch.finfo(torch.float32).eps * math.sqrt(max(1, moments.count)) * moments.mean_D.norm()
    if not total > noise:
        return math.nan
    p_D = sigma_D / total
    return float(torch.exp(-torch.xlogy(p_D, p_D).sum()))


def high_norm(norm_N: Tensor) -> tuple[float, float]:
    """The share of tokens whose norm exceeds `HIGH_NORM` times the median, and the largest norm over the median.

    NaN without tokens, or where half of them are zero.
    """
    if len(norm_N) == 0 or not norm_N.median() > 0:
        return math.nan, math.nan
    ratio_N = norm_N.double() / norm_N.double().median()
    return float((ratio_N > HIGH_NORM).double().mean()), float(ratio_N.max())


def centred_cosine(x_ND: Tensor, y_ND: Tensor) -> float:
    """Mean cosine of x and y row by row, each less its own mean: 1 where they agree, about 0 where nothing does.

    Without centring, an offset that all rows share would look like agreement.
    """
    x_ND, y_ND = (_centred(z_ND) for z_ND in (x_ND, y_ND))
    return float(torch.nn.functional.cosine_similarity(x_ND, y_ND, dim=1, eps=1e-30).mean()) if len(x_ND) else math.nan


def linear_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """Similarity of two representations of the same samples up to rotation and scale; widths may differ.

    Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) with the unbiased estimator of HSIC (Song
    et al. 2012, JMLR 13, equation 5): the plain one tends to 1 where N is not far above D, whatever the features. May
    fall slightly below 0. NaN for fewer than four samples, or features that are all alike.
    """
    if len(x_ND) < 4:
        return math.nan
    k_NN, l_NN = (_kernel(z_ND) for z_ND in (x_ND, y_ND))
    cross, own_x, own_y = (_hsic(a_NN, b_NN) for a_NN, b_NN in ((k_NN, l_NN), (k_NN, k_NN), (l_NN, l_NN)))
    return float(cross / (own_x * own_y).sqrt()) if own_x > 0 and own_y > 0 else math.nan


def _centred(z_ND: Tensor) -> Tensor:
    return z_ND.double() - z_ND.double().mean(0)


def _kernel(z_ND: Tensor) -> Tensor:
    """Inner products without the diagonal."""
    centred_ND = _centred(z_ND)
    return (centred_ND @ centred_ND.T).fill_diagonal_(0.0)


def _hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    n = len(k_NN)
    trace = (k_NN * l_NN).sum()
    means = k_NN.sum() * l_NN.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * (k_NN.sum(0) * l_NN.sum(0)).sum()
    return (trace + means - rows) / (n * (n - 3))


def cosines(gram_TT: Tensor) -> Tensor:
    """The cosines between vectors, (T, T), from their inner products; NaN for a vector of zeros."""
    norm_T = gram_TT.double().diagonal().sqrt()
    found_TT = gram_TT.double() / torch.outer(norm_T, norm_T)
    return found_TT.clamp(-1, 1).where(torch.outer(norm_T, norm_T) > 0, math.nan)
