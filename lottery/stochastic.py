"""Masks that are drawn anew in every step: stochastic L0, and supermasks on weights that are never trained.

L0 (Louizos, Welling & Kingma, ICLR 2018, arXiv 1712.01312). A weight is w ⊙ z, its gate z a hard concrete variable:

    u ~ U(0, 1), s = σ((log u − log(1 − u) + log α) / β), s̄ = s(ζ − γ) + γ, z = min(1, max(0, s̄))     (eq. 10 and 11)

so that z can be 0 and 1 exactly and has a gradient in between. The expected number of gates that are not 0 is

    Σ σ(log α − β log(−γ / ζ))                                                                          (eq. 12)

and λ times that is added to the loss. For testing, z = min(1, max(0, σ(log α)(ζ − γ) + γ))               (eq. 13).
Here every weight has its gate, as Continuous Sparsification compares with; theirs are one to an input unit or feature
map.

Supermask (Zhou, Lan, Liu & Yosinski, NeurIPS 2019, arXiv 1905.01067, section 5). All parameters stay at their random
values; a mask is drawn, m ~ Bernoulli(σ(s)), and s is trained as if m were σ(s): the gradient goes straight through.
`FrozenCS` is the deterministic counterpart: Continuous Sparsification's σ(βs), annealed, on weights that stay.

How dense the result is, is an outcome of both, of λ and s0: `Method.masks` counts it.

Differs from the authors' code in:

* L0: log α starts at one value; theirs adds noise of deviation 0.01. Weight decay is the optimiser's, on weights
  only; theirs weighs it by the gates' probabilities. No average of the weights over time;
* supermask: a test uses the likelier value of each mask entry, s > 0; theirs draws, and averages ten draws.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lottery import cs
from lottery import masks as M
from lottery.methods import Method, densities, need, number

if TYPE_CHECKING:
    from lottery.training import Recipe, Step

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md


EPSILON = 1e-6  # u stays this far from 0 and 1, as in the authors' code of L0


class Drawn(M.Parametrization):
    """A parametrization w ↦ m ⊙ w whose m is drawn before each training step, and is fixed in evaluation.

    logits: the parameter that m depends on, of the weight's shape. The noise is no part of the state: a training that
    goes on draws it anew, from its own key.
    """

    prunes = True
    noise = None

    def draw(self, generator: torch.Generator) -> None:
        """New noise u ~ U(0, 1) for training, in place from the second time on."""
        u = torch.rand(self.logits.shape, generator=generator, dtype=self.logits.dtype)
        u.clamp_(EPSILON, 1 - EPSILON)
        if self.noise is None or self.noise.device != self.logits.device:
            self.noise = u.to(self.logits.device)
        else:
            self.noise.copy_(u)

    def mask(self) -> torch.Tensor:
        """m: `drawn` in training once there is noise, else `fixed`."""
        return self.drawn() if self.training and self.noise is not None else self.fixed()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask()

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class HardConcrete(Drawn):
    """The parametrization w ↦ z ⊙ w with hard concrete gates z in [0, 1]; parameter `log_alpha`."""

    numbers = ("beta", "gamma", "zeta")

    def __init__(
        self, weight: torch.Tensor, drop: float = 0.5, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
    ):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full_like(weight, math.log(1 / drop - 1)))
        self.beta, self.gamma, self.zeta = beta, gamma, zeta

    @property
    def logits(self) -> nn.Parameter:
        return self.log_alpha

    def drawn(self) -> torch.Tensor:
        """z of the noise u (eq. 10 and 11)."""
        return self._stretched((torch.logit(self.noise) + self.log_alpha) / self.beta)

    def fixed(self) -> torch.Tensor:
        """z of a test (eq. 13)."""
        return self._stretched(self.log_alpha)

    def active(self) -> torch.Tensor:
        """P(z ≠ 0) = σ(log α − β log(−γ / ζ)) of each gate (eq. 12), with gradient."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    def _stretched(self, logits):
        return (torch.sigmoid(logits) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


class Bernoulli(Drawn):
    """The parametrization w ↦ m ⊙ w, m ~ Bernoulli(σ(s)) with the gradient of σ(s); parameter `s`.

    rescale: times the layer's size over the number of ones, the paper's dynamic weight rescaling.
    """

    numbers = ("rescale",)

    def __init__(self, weight: torch.Tensor, s0: float = 0.0, rescale: bool = False):
        super().__init__()
        self.s, self.rescale = nn.Parameter(torch.full_like(weight, s0)), rescale

    @property
    def logits(self) -> nn.Parameter:
        return self.s

    def drawn(self) -> torch.Tensor:
        """1 where u < σ(s)."""
        p = self.active()
        return self._rescaled((self.noise < p).to(p) + (p - p.detach()))

    def fixed(self) -> torch.Tensor:
        """1 where it is likelier than 0: s > 0."""
        return self._rescaled((self.s > 0).to(self.s))

    def active(self) -> torch.Tensor:
        """P(m = 1) = σ(s) of each entry, with gradient."""
        return torch.sigmoid(self.s)

    def _rescaled(self, m):
        return m * (m.numel() / m.sum().clamp(min=1)) if self.rescale else m


@dataclass(frozen=True)
class _Drawn(Method):
    """What L0 and supermasks share: masks drawn before each step, whose parameters do not decay.

    rate: the gates' learning rate, in units of the recipe's.
    """

    layers: tuple[str, ...] | None = None
    rate: float = field(default=1.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        need(self, "rate", number(self.rate) and self.rate > 0, "give a number above 0")

    def gate(self, weight: torch.Tensor) -> Drawn:
        """A new parametrization for a weight."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> nn.Module:
        """Put gates on `layers`, anew where there are some.

        Raises ValueError: nothing prunable, unknown names, complex weights.
        """
        M.check_real(found := M.chosen(model, self.layers))
        gates = {name: self.gate(M.original(layer).detach()) for name, layer in found.items()}
        for name, new in gates.items():
            M.check_free({name: found[name]}, type(new))
        for name, new in gates.items():
            if old := M.on(found[name], type(new)):
                own = {k: v for k, v in new.__dict__.items() if not k.startswith("_") and k != "training"}
                old.__dict__.update(own, noise=None)
                old.logits.data.copy_(new.logits)
            else:
                M.put(model, found[name], new)
        return model

    def param_groups(self, model: nn.Module, recipe: "Recipe") -> list[dict[str, Any]]:
        """Two groups: the gates' parameters, without weight decay and at their own rate, and all others trained."""
        own = {id(gate.logits): gate.logits for gate in gates(model).values()}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        decays = [{"params": rest, "weight_decay": recipe.weight_decay}] if rest else []
        return [*decays, {"params": list(own.values()), "weight_decay": 0.0, "rate": self.rate}]

    def before_step(self, t: int, step: "Step") -> None:
        """Draw the noise of the step, layer by layer, from the training's own key."""
        generator = step.generator
        for gate in gates(step.model).values():
            gate.draw(generator)

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Where the mask of a test is not 0, for the layers with gates."""
        return {name: gate.fixed().detach() != 0 for name, gate in gates(model).items()}

    def reading(self, model: nn.Module) -> dict[str, float]:
        """Densities of a test's masks, over all and of each layer, and "expected": the mean probability of a weight."""
        p = torch.cat([gate.active().detach().flatten() for gate in gates(model).values()])
        return {**densities(self.masks(model)), "expected": p.mean().item()}

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """Nothing is promised. The last noise goes: from now on the weights are a test's, in any mode."""
        for gate in gates(model).values():
            gate.noise = None


@dataclass(frozen=True)
class L0(_Drawn):
    """Stochastic L0 regularisation with one hard concrete gate for each weight.

    lam: λ, of the expected number of weights: 0.1 / N for N = 60,000 images, an order of magnitude to start from; which
        value the paper prints for a LeNet was not to be checked.
    drop: 1 − σ(log α) at the start, the gates' drop rate; 0.5 in the authors' code (0.2 for the inputs of their MLP).
    beta, gamma, zeta: β, γ < 0, ζ > 1 of the hard concrete distribution.
    layers: names of the layers that get gates, the denominator of densities; None: all prunable ones.
    rate: the gates' learning rate, in units of the recipe's. SGD at the weights' own moves a gate by little more than
        the penalty, which is the same for all of them: none closes, or all do. At 1,000 λ sets the density by degrees.
    """

    lam: float = 0.1 / 60_000
    drop: float = 0.5
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self):
        super().__post_init__()
        need(self, "lam", number(self.lam) and self.lam >= 0, "give the weight of the penalty, a number from 0")
        need(self, "drop", number(self.drop) and 0 < self.drop < 1, "give a drop rate, 0 < drop < 1")
        need(self, "beta", number(self.beta) and 0 < self.beta <= 1, "give a temperature, 0 < beta <= 1")
        need(self, "gamma", number(self.gamma) and self.gamma < 0, "give a number below 0")
        need(self, "zeta", number(self.zeta) and self.zeta > 1, "give a number above 1")

    def gate(self, weight: torch.Tensor) -> HardConcrete:
        return HardConcrete(weight, self.drop, self.beta, self.gamma, self.zeta)

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """λ Σ P(z ≠ 0), a scalar with gradient."""
        return self.lam * cs.total(gate.active() for gate in gates(model).values())

    def before_step(self, t: int, step: "Step") -> None:
        """Clip log α to [log 0.01, log 100], as the authors' code does after every step, and draw."""
        for gate in gates(step.model).values():
            gate.log_alpha.data.clamp_(math.log(1e-2), math.log(1e2))
        super().before_step(t, step)


@dataclass(frozen=True)
class Supermask(_Drawn):
    """A mask on weights that are never trained, drawn from Bernoulli(σ(s)) in every step; only s learns.

    s0: where every s starts; 0 in the authors' code, a mask of density ½.
    rescale: multiply a layer's weights by its size over the number of ones in its mask (dynamic weight rescaling).
    layers, rate: as of `L0`.

    `attach` freezes all parameters of the model but s, biases among them; batch norm keeps its running statistics. The
    authors train s by SGD with a learning rate of 100.
    """

    s0: float = 0.0
    rescale: bool = False

    def __post_init__(self):
        super().__post_init__()
        need(self, "s0", number(self.s0) and abs(self.s0) <= 80, "give a number near 0, at most 80 in size")
        need(self, "rescale", isinstance(self.rescale, bool), "give True or False")

    def gate(self, weight: torch.Tensor) -> Bernoulli:
        return Bernoulli(weight, self.s0, self.rescale)

    def attach(self, model: nn.Module) -> nn.Module:
        return freeze(super().attach(model))


@dataclass(frozen=True)
class FrozenCS(cs.CS):
    """Continuous Sparsification of weights that are never trained: the deterministic counterpart of `Supermask`.

    Fields as of `cs.CS`. `attach` freezes all parameters of the model but s.
    """

    def attach(self, model: nn.Module) -> nn.Module:
        return freeze(super().attach(model))

    def param_groups(self, model: nn.Module, recipe: "Recipe") -> list[dict[str, Any]]:
        return [group for group in super().param_groups(model, recipe) if group["params"]]


def gates(model: nn.Module) -> dict[str, Drawn]:
    """`{layer: gate}` of the layers whose mask is drawn. Raises ValueError when there is none."""
    found = {name: gate for name, layer in M.prunable(model).items() if (gate := M.on(layer, Drawn))}
    if not found:
        raise ValueError("No gates on the model: call the method's attach(model) first.")
    return found


def freeze(model: nn.Module) -> nn.Module:
    """Let nothing train, in place, but the gates of supermasks and of Continuous Sparsification."""
    own = {id(gate.s) for gate in model.modules() if isinstance(gate, Bernoulli | cs.Gate)}
    for p in model.parameters():
        p.requires_grad_(id(p) in own)
    return model
