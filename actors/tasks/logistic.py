"""Logistic: binary logistic regression with an L2 penalty; convex, with an optimum that is known to rounding.

With samples (x_k, y_k), y_k = ±1, of all nodes together, one minimises

    f(θ) = mean_k log(1 + exp(−y_k θᵀx_k)) + ½ ``l2`` ‖θ‖²

Coordinate j of a feature vector has the variance λ_j, from 1 down to 1/``condition``, evenly spaced on a logarithmic
scale. Its mean is the node's own: ``feature_shift`` · √λ_j · u_mj. Node m labels by the sign of θ_mᵀx, θ_m = θ* +
``heterogeneity`` · z_m, and gets each label wrong with probability ``noise``; θ*, z_m and u_m are standard normal. A
node's problem depends on ``problem_seed`` and its index, and not on how many nodes there are.

Held-out data are the training data. All nodes have equally many samples, so the validation loss is f(θ), which comes
down to ``optimum`` and never below. θ starts at zero, where the loss is log 2.
"""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from starling.actors.data.samples import TensorSamples
from starling.actors.tasks.base import Task
from starling.algorithms.errors import SettingsError
from starling.algorithms.seeds import generator

_MAX_GRADIENT_NORM = 1e-11
_MAX_NEWTON_STEPS = 100
_MAX_HALVINGS = 40

# Products θ_j x_j of as many features are formed at a time: they stay in a core's cache.
_AT_ONCE = 512 * 1024


class Logistic(Task, name="logistic"):
    """Classify into two classes by a linear function without intercept."""

    dimension: PositiveInt = 100
    heterogeneity: NonNegativeFloat = 1.0  # standard deviation of θ_m around θ*; 0: all nodes label alike
    feature_shift: NonNegativeFloat = 0.0  # of the nodes' mean features, in standard deviations; 0: no shift
    condition: float = Field(default=10.0, ge=1)  # largest by smallest variance of a feature
    noise: float = Field(default=0.1, ge=0, le=0.5)  # probability of a wrong label
    l2: float = Field(default=1e-3, ge=1e-8)  # the objective is at least so strongly convex
    samples_per_node: PositiveInt = 64
    problem_seed: int = 0

    def train_samples(self, num_nodes: int) -> TensorSamples:
        """``samples_per_node`` pairs of features, float32 of shape (n, d), and a label ±1 for each node."""
        features, labels = zip(*(self._samples(node) for node in range(num_nodes)), strict=True)
        owners = torch.arange(num_nodes).repeat_interleave(self.samples_per_node)
        classes = (torch.cat(labels) > 0).long()
        return TensorSamples(torch.cat(features), torch.cat(labels), owners=owners, labels=classes)

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        """The training data."""
        return self.train_samples(num_nodes)

    def build(self) -> nn.Module:
        """θ = 0."""
        return _Linear(self.dimension)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean of log(1 + exp(−y θᵀx)), and the penalty."""
        features, labels = batch
        scores, squared_norm = module(features)
        return self.l2 / 2 * squared_norm - nn.functional.logsigmoid(labels * scores).mean()

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """``loss``, and ``accuracy``, the share of labels that have the sign of θᵀx."""
        features, labels = batch
        scores, _ = module(features)
        return {"loss": self.loss(module, batch), "accuracy": (labels * scores > 0).to(scores.dtype).mean()}

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The gradients, shape (n, P), and losses, shape (n,), of n nodes at ``parameters``, shape (n, P)."""
        features, labels = (tensor.to(parameters.dtype).contiguous() for tensor in batch)
        gradients, losses = torch.empty_like(parameters), torch.empty_like(parameters[:, 0])
        step = max(1, _AT_ONCE // max(1, features[0].numel()))
        for start in range(0, len(parameters), step):
            here = slice(start, start + step)
            x, y, theta = features[here], labels[here], parameters[here].contiguous()
            # A node's bits must not depend on which nodes are computed with it. Products and sums along a row keep to
            # that, and so do exp and log1p; a batched matrix product does not, and neither does sigmoid or softplus.
            margins = (x * theta.unsqueeze(1)).sum(dim=2) * y
            pulls = y / (margins.exp() + 1) / -margins.shape[1]
            torch.add((x * pulls.unsqueeze(2)).sum(dim=1), theta * self.l2, out=gradients[here])
            surprise = margins.abs().neg_().exp_().log1p_() + (-margins).clamp_(min=0)
            torch.add(surprise.mean(dim=1), theta.square().sum(dim=1) * (self.l2 / 2), out=losses[here])
        return gradients, losses

    def objective(self, parameters: Tensor, num_nodes: int) -> float:
        """The loss f over all data at ``parameters``, shape (d,), in float64."""
        features, labels = self._everything(num_nodes)
        theta = parameters.double()
        return float(self.l2 / 2 * theta.dot(theta) - nn.functional.logsigmoid(labels * (features @ theta)).mean())

    def optimum(self, num_nodes: int) -> Tensor:
        """The minimiser of f, shape (d,), float64, by Newton's method; the gradient's norm there is below 1e-11.

        It takes O(n·d²) for n samples and O(d³): about a second for 1000 nodes and the default sizes.

        Raises:
            SettingsError: the features are so large that float64 is not precise enough.
        """
        features, labels = self._everything(num_nodes)
        signed = features * labels.unsqueeze(1)
        theta: Tensor | None = torch.zeros(self.dimension, dtype=torch.float64)
        for _ in range(_MAX_NEWTON_STEPS):
            gradient, curvature = self._derivatives(signed, theta)
            if float(gradient.norm()) < _MAX_GRADIENT_NORM:
                return theta
            hessian = signed.T @ (signed * curvature.unsqueeze(1))
            hessian.diagonal().add_(self.l2)
            # A factorization that rounding spoils gives a direction in which nothing falls.
            factor = torch.linalg.cholesky_ex(hessian).L
            theta = self._search(signed, theta, torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1))
            if theta is None:
                break
        message = f"logistic: the optimum cannot be found to a gradient of {_MAX_GRADIENT_NORM:g} in float64"
        raise SettingsError(f"{message}; lower feature_shift, or raise l2")

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """The least possible validation loss."""
        return {"optimum": self.objective(self.optimum(num_nodes), num_nodes)}

    def _derivatives(self, signed: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """∇f at ``theta`` and each sample's share in the Hessian, from the y_k x_k, shape (n, d)."""
        wrong = torch.sigmoid(-(signed @ theta))
        return self.l2 * theta - wrong @ signed / len(signed), wrong * (1 - wrong) / len(signed)

    def _search(self, signed: Tensor, theta: Tensor, direction: Tensor) -> Tensor | None:
        """Go back along a Newton direction; halved until ‖∇f‖ falls, as a short enough step makes it do anywhere."""
        norm = float(self._derivatives(signed, theta)[0].norm())
        for halvings in range(_MAX_HALVINGS):
            step = 0.5**halvings
            there = theta - step * direction
            if float(self._derivatives(signed, there)[0].norm()) <= (1 - step / 4) * norm:
                return there
        return None

    def _everything(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """Features, shape (n, d), and labels of all nodes, in float64."""
        features, labels = self.train_samples(num_nodes).tensors
        return features.double(), labels.double()

    def _samples(self, node: int) -> tuple[Tensor, Tensor]:
        """Features and labels of node ``node``, rounded to float32 before anything is computed from them."""
        spread = self.condition ** (-torch.linspace(0, 0.5, self.dimension, dtype=torch.float64))
        teacher = self._normal(1, "teacher") + self.heterogeneity * self._normal(1, "teacher", node)
        shift = self.feature_shift * self._normal(1, "shift", node)
        features = (self._normal(self.samples_per_node, "features", node) + shift) * spread
        rng = generator("logistic", self.problem_seed, "noise", node)
        wrong = torch.rand(self.samples_per_node, dtype=torch.float64, generator=rng) < self.noise
        positive = (features @ teacher.T).squeeze(1) > 0
        return features.float(), (positive ^ wrong).float() * 2 - 1

    def _normal(self, count: int, *labels: int | str) -> Tensor:
        rng = generator("logistic", self.problem_seed, *labels)
        return torch.randn(count, self.dimension, dtype=torch.float64, generator=rng)


class _Linear(nn.Module):
    """Maps features, shape (b, d), to scores θᵀx, shape (b,), and ‖θ‖²."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features @ self.theta, self.theta.dot(self.theta)
