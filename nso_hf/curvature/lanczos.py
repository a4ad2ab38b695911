r"""Lanczos iteration: an orthonormal basis Q of span{v, H v, H^2 v, ...} and T = Q' H Q.

With full reorthogonalisation. An eigenpair (theta, s) of T gives the Ritz value theta of H, with
the residual ||H Q s - theta Q s|| = beta |s_last|: an eigenvalue of H lies as close to theta as
that. When the basis is full, the best Ritz vectors are kept and the iteration goes on from them
(thick restart, Wu and Simon 2000).
"""

import torch
from torch import Tensor

from nso_hf.curvature.hessian import Hessian
from nso_hf.curvature.vectors import Vectors

_CHUNK = 2**20  # columns of the basis that are rotated at a time


class Lanczos:
    """A basis of at most `size` vectors, and one that continues it."""

    def __init__(self, hessian: Hessian, start: Tensor, size: int) -> None:
        self._hessian = hessian
        self._vectors: Vectors = hessian.objective.vectors
        self._basis = start.new_empty(size + 1, len(start))
        self._basis[0] = start / self._vectors.norm(start)
        self._T = torch.zeros(size, size, dtype=torch.float64)
        self.length = 0  # vectors H has been applied to
        # Norm of what continues the basis; 0 where the basis spans an invariant subspace.
        self.beta = 0.0

    def extend(self) -> None:
        """Apply H to the last vector."""
        j = self.length
        basis = self._basis[: j + 1]
        w = self._hessian.times(basis[j])
        before = self._vectors.norm(w)
        for _ in range(2):  # once more, since the first subtraction leaves rounding behind
            h = self._vectors.coefficients(basis, w)
            self._T[: j + 1, j] += h
            w -= basis.T @ h.to(basis)
        self._T[j, :j] = self._T[:j, j]
        self.length = j + 1
        self.beta = self._vectors.norm(w)
        if self.beta <= 10 * torch.finfo(basis.dtype).eps * max(before, self._scale()):
            self.beta = 0.0
        else:
            self._basis[j + 1] = w / self.beta

    def renew(self, vector: Tensor) -> None:
        """Where the basis spans an invariant subspace, go on outside of it."""
        basis = self._basis[: self.length]
        for _ in range(2):
            vector = vector - basis.T @ self._vectors.coefficients(basis, vector).to(basis)
        self._basis[self.length] = vector / self._vectors.norm(vector)

    def _scale(self) -> float:
        return self._T[: self.length, : self.length].abs().max().item()

    @property
    def is_full(self) -> bool:
        return self.length == len(self._T)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and the coefficients of their vectors as columns: float64."""
        values, vectors = torch.linalg.eigh(self._T[: self.length, : self.length])
        return values, vectors

    def residuals(self, coefficients: Tensor) -> Tensor:
        return self.beta * coefficients[-1].abs()

    def restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Go on from these Ritz pairs alone."""
        keep, length = len(values), self.length
        rotation = coefficients.T.to(self._basis)
        for first in range(0, self._basis.shape[1], _CHUNK):
            columns = self._basis[:, first : first + _CHUNK]
            columns[:keep] = rotation @ columns[:length]
        self._basis[keep] = self._basis[length]
        self._T.zero_()
        self._T[:keep, :keep] = torch.diag(values)
        self.length = keep
