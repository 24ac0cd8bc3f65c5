"""Orthonormal matrices that spread a spectrum evenly over all dimensions, for PHI-S (arXiv 2410.01680, section 3).

Hadamard matrices where one is known to this file, and a seeded rotation for every other width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = χ(i − j), the quadratic character modulo the odd prime q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    i = torch.arange(q)
    return character[(i[:, None] - i) % q]


def _bordered(q: int, sign: float) -> Tensor:
    """The Jacobsthal matrix with a border of ones: skew for sign −1, symmetric for sign 1; zero diagonal."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, sign, _jacobsthal(q)
    return matrix


def _seed_matrix(n: int) -> Tensor | None:
    """±1 Hadamard matrix of order n by one construction: trivial, Paley I (n − 1 prime ≡ 3 mod 4) or Paley II."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1.0)
    half = n // 2
    if n % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1, 1.0), plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


def hadamard(n: int) -> Tensor:
    """Hadamard matrix of order n, scaled to be orthonormal (float64): Sylvester's doubling of a Paley matrix.

    Raises ValueError where these constructions give none; all of 192, 384, 576, 768, 1024, …, 4096 are covered.
    """
    doublings = max(0, (n & -n).bit_length() - 1) if n > 0 else -1
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for power in range(doublings, -1, -1):
        matrix = _seed_matrix(n >> power)
        if matrix is not None:
            for _ in range(power):
                matrix = torch.kron(sylvester, matrix)
            return matrix * n**-0.5
    raise ValueError(f"no Hadamard matrix of order {n} by Sylvester and Paley; use rotation_equal_variance")


def rotation_equal_variance(eigenvalues_D: Tensor, seed: int) -> Tensor:
    """Orthonormal H (float64) such that every diagonal entry of H·diag(eigenvalues)·Hᵀ is the mean eigenvalue.

    A seeded random rotation, then at most D − 1 plane rotations, each of which sets one entry to the mean (Bendel and
    Mickey 1978; Schur–Horn says that it can be done). Entries are computed afresh from H, so errors do not add up.
    """
    device, width = eigenvalues_D.device, len(eigenvalues_D)
    eigenvalues_D = eigenvalues_D.double().cpu()
    mean = eigenvalues_D.mean()
    normal = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    H_DD = torch.linalg.qr(normal).Q
    excess_D = H_DD.square() @ eigenvalues_D - mean
    for _ in range(width - 1):
        low, high = int(excess_D.argmin()), int(excess_D.argmax())
        if max(-excess_D[low], excess_D[high]) <= 1e-13 * mean:
            break
        # tan θ solves a·t² − 2·b·t + c = 0, entry `low` becoming the mean; c < 0 < a, so both roots are real.
        a, b, c = excess_D[high], (H_DD[low] * eigenvalues_D) @ H_DD[high], excess_D[low]
        pivot = b + torch.copysign(torch.sqrt(b * b - a * c), b)
        tangent = c / pivot
        cos = 1 / torch.sqrt(1 + tangent * tangent)
        H_DD[[low, high]] = cos * torch.stack([H_DD[low] - tangent * H_DD[high], H_DD[high] + tangent * H_DD[low]])
        excess_D[high] = H_DD[high].square() @ eigenvalues_D - mean
        excess_D[low] = 0.0
    return H_DD.to(device)
