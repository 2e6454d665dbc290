"""What to run for the Lottery Ticket Hypothesis (arXiv 1803.03635v5), and for late rewinding (arXiv 1903.01611).

A `Setting` is the experiment at one scale, one `Net` a network in it; the paper's are in NETS (figure 2, sections 1, 2
and 4, appendices B to I). An arm is what is trained of one trial: "lenet/imp", or with another recipe, a name of
VARIANTS, "lenet@sgd-0.8/imp"; its points are rounds of pruning, or the fraction removed in one shot.
The settings that the paper does not state: input scaling (ours: pixels in [0, 1] of MNIST, standardised ones of
CIFAR-10), Adam's β and ε (PyTorch's), the bias initialisation (zeros, as in the authors' code), the last incomplete
minibatch (dropped).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lottery import masks, models
from lottery.experiments.instability import Instability
from lottery.experiments.papers import Paper, Trials
from lottery.experiments.runs import INITS, Run, rates
from lottery.methods import need, whole
from lottery.training import Recipe

NETWORKS = {"lenet": "lenet_300_100", "resnet18": "resnet20"}  # by the paper's names; its "Resnet-18" has 20 layers
PLAIN = "lenet"
PRUNING = ("rate", "rate_conv", "rate_output", "scope", "rewind_to")
GUESSED = ("input scaling", "Adam β, ε", "bias initialisation", "incomplete last minibatch")


@dataclass(frozen=True)
class Net:
    """The trainings of one network at one scale.

    base: the dense Run of trial 0. rounds: of IMP. control_rounds: rounds at which the controls run. draws: random
    reinitialisations per ticket; random_draws: random sparse networks per trial. probe_rounds: rounds at which the
    appendix's controls, and the controls of VARIANTS, run. sweep_rounds: of VARIANTS; far_rounds: of the one that the
    paper follows below 1 %. one_shot: fractions p to remove in one step (None: the IMP density of round 10, or of the
    last one before). init: what the tickets of the "imp" arm start from; anything but "reset" is an exploration.
    """

    base: Run = field(default_factory=lambda: Run(recipe=Recipe(test_readings="all")))
    rounds: int = 20
    control_rounds: tuple[int, ...] = tuple(range(1, 21))
    draws: int = 3
    random_draws: int = 2
    probe_rounds: tuple[int, ...] = tuple(range(1, 21))
    sweep_rounds: int = 20
    far_rounds: int = 22
    one_shot: tuple[float | None, ...] = (0.05, 0.325, 0.5, 0.7, 0.825, None, 0.95, 0.98)
    init: str = "reset"
    trials: int | None = None

    def __post_init__(self):
        for name in ("rounds", "draws", "random_draws", "sweep_rounds", "far_rounds"):
            whole(name, getattr(self, name))
        shares = all(p is None or 0 < p < 1 for p in self.one_shot)
        need(self, "one_shot", shares, "give fractions to remove, 0 < p < 1")
        need(self, "init", self.init in INITS, f"give one of {', '.join(INITS)}")
        if (self.init == "rewind") != (self.base.rewind_to > 0):
            raise ValueError(f"Invalid rewind_to {self.base.rewind_to} with init {self.init!r}: they go together.")

    # The controls: what is trained of one trial at one level, as a list of Runs.

    def dense(self, seed: int, level: int = 0) -> list[Run]:
        """The whole network; how it would be pruned is no part of it."""
        unpruned = {name: getattr(Run, name) for name in PRUNING}
        return [dataclasses.replace(self.base, seed=seed, **unpruned)]

    def imp(self, seed: int, level: int) -> list[Run]:
        """The network after `level` rounds of iterative magnitude pruning."""
        return self._pruned(seed, level, self.init, self.base.recipe)

    def continued(self, seed: int, level: int) -> list[Run]:
        """Strategy 2 of appendix B: training goes on between rounds, and only the ticket of the level is reset."""
        return self._pruned(seed, level, "continue", self._off_trunk)

    def rewind(self, seed: int, level: int, k: int) -> list[Run]:
        """The network after `level` rounds whose survivors go back to θ_k (1903.01611, algorithm 1)."""
        base = dataclasses.replace(self.base, rewind_to=k)
        return dataclasses.replace(self, base=base, init="rewind").imp(seed, level)

    def instability(self, seed: int, level: int, k: int) -> list[Instability]:
        """Two copies from m ⊙ θ_k that differ in the order of the data (1912.05671); level 0: of the whole network."""
        if level:
            [one] = self.rewind(seed, level, k) if k else self.imp(seed, level)
        else:
            [dense] = self.dense(seed)
            where = {"init": "rewind", "rewind_to": k} if k else {}
            one = dataclasses.replace(dense, parent=dense, rate=0.0, rate_output=0.0, **where)
        return [Instability(one, dataclasses.replace(one, draw=1))]

    def _pruned(self, seed, level, last, recipe):
        """The network that starts from `last`, below the chain of rounds that goes with it."""
        chain = _chain(self, seed, level, last if last in ("rewind", "continue") else "reset", recipe)
        return [chain if not level else dataclasses.replace(chain, init="reset" if last == "continue" else last)]

    def reinit(self, seed: int, level: int) -> list[Run]:
        """The ticket's mask on fresh initialisations."""
        return self._control(self.imp(seed, level), "reinit", self.draws)

    def random(self, seed: int, level: int) -> list[Run]:
        """Random masks of the ticket's layer densities on fresh initialisations."""
        return self._control(self.imp(seed, level), "random", self.random_draws)

    def prune_at_init(self, seed: int, level: int) -> list[Run]:
        """As many weights of each layer as the ticket has, the largest of θ₀: pruned before any training."""
        share = {name: _after(n, rate, level) / n for name, (n, rate) in self._sizes.items()}
        [dense] = self.dense(seed)
        return [dataclasses.replace(dense, recipe=self._off_trunk, density=tuple(share.items()))]

    def dm_reinit(self, seed: int, level: int) -> list[Run]:
        """The ticket's mask on values drawn from its own initial values (appendix F)."""
        return self._control(self.imp(seed, level), "survivors", 1)

    def noise(self, seed: int, level: int, c: float) -> list[Run]:
        """The ticket with noise of c σ on its initial values (appendix F)."""
        return self._control(self.imp(seed, level), "noise", 1, noise=c)

    def oneshot(self, seed: int, p: float | None) -> list[Run]:
        """The dense network pruned once: fraction p of the hidden weights, p/2 of the output layer (appendix G.4)."""
        [dense] = self.dense(seed)
        p = self.one_shot_rate(self.density(min(10, self.rounds))) if p is None else p
        return [dataclasses.replace(dense, recipe=self._off_trunk, parent=dense, rate=p, rate_output=p / 2)]

    def oneshot_reinit(self, seed: int, p: float | None) -> list[Run]:
        return self._control(self.oneshot(seed, p), "reinit", self.draws)

    def _control(self, tickets, init, draws, **more):
        [ticket] = tickets
        drawn = ticket.level in CONTROL_CURVES and init in ("reinit", "random")
        recipe = ticket.recipe if drawn else self._off_trunk
        return [dataclasses.replace(ticket, recipe=recipe, init=init, draw=i, **more) for i in range(draws)]

    @property
    def _off_trunk(self):
        """The recipe where no figure draws curves: the test set is read at log-spaced iterations."""
        return dataclasses.replace(self.base.recipe, test_readings="log")

    # Other recipes.

    def variant(self, change: dict[str, Any], share: float = 1.0) -> "Net":
        """The Net of a point of VARIANTS; share: what part of the paper's iterations one training has here.

        It is pruned until as few weights are left as here after the sweep's rounds.
        """
        if not change:
            return self
        change = {"test_readings": "log"} | change
        rounds, until = change.pop("rounds", None), change.pop("until", "sweep_rounds")
        recipe = {k: change.pop(k) for k in RECIPE if k in change}
        recipe["iterations"] = self.base.recipe.iterations * change.pop("longer", 1)
        if "warmup" in recipe:
            recipe["warmup"] = round(share * recipe["warmup"])
        recipe = dataclasses.replace(self.base.recipe, **recipe)
        if "options" in change:
            change["options"] = tuple(sorted((dict(self.base.options) | change["options"]).items()))
        at = dataclasses.replace(self, base=dataclasses.replace(self.base, recipe=recipe, **change))
        left = self.weights(getattr(self, until))
        rounds = getattr(self, rounds) if rounds else next(r for r in itertools.count() if at.weights(r) <= left)
        probes = tuple(r for r in self.probe_rounds if r <= rounds)
        return dataclasses.replace(at, rounds=max(1, rounds), control_rounds=probes, probe_rounds=probes)

    # Densities, by counting.

    def weights(self, level: int) -> int:
        """How many weights are left after `level` rounds, by the counts that `lth.prune` keeps."""
        groups = list(self._sizes.values())
        if self.base.scope == "global":
            groups = [(sum(n for n, s in groups if s == rate), rate) for rate in {s for _, s in groups}]
        return sum(_after(n, rate, level) for n, rate in groups)

    def density(self, level: int) -> float:
        """Fraction of all weights kept after `level` rounds."""
        return self.weights(level) / self.weights(0)

    def one_shot_rate(self, density: float) -> float:
        """The p that leaves `density` when p of the hidden weights and p/2 of the output layer go."""
        *hidden, (out, _) = self._sizes.values()
        n = sum(n for n, _ in hidden)
        return (1 - density) * (n + out) / (n + out / 2)

    @functools.cached_property
    def _sizes(self):
        """{layer: (weights, rate per round)}."""
        model = models.sizes_only(self.base.model, self.base.dataset, self.base.options)
        each, layers = rates(model, self.base), masks.prunable(model)
        ranked = layers if self.base.layers is None else self.base.layers
        return {name: (layer.weight.numel(), each[name] if name in ranked else 0) for name, layer in layers.items()}


@functools.lru_cache(maxsize=10_000)
def _chain(at, seed, level, init, recipe):
    """The Run of a chain at a level; cached, because every level stands on the one before."""
    if not level:
        return at.dense(seed)[0]
    parent = _chain(at, seed, level - 1, init, recipe)
    pruning = {name: getattr(at.base, name) for name in PRUNING}
    return dataclasses.replace(parent, parent=parent, init=init, recipe=recipe, **pruning)


def _after(n, rate, level):
    for _ in range(level):
        n -= round(rate * n)
    return n


@dataclass(frozen=True)
class Setting(Trials):
    """All networks at one scale. nets: by the names of arms. trials: seeds seed … seed + trials − 1."""

    nets: dict[str, Net]
    trials: int = 5
    seed: int = 0

    def net(self, name: str) -> Net | None:
        """The Net "net" or "net@variant", or None where it is not here."""
        net, _, variant = name.partition("@")
        if net not in self.nets or (variant and variant not in VARIANTS[net]):
            return None
        return _variant(self.nets[net], net, variant) if variant else self.nets[net]

    def share(self, net: str) -> float:
        """What part of the paper's iterations one training of a network has here."""
        return _share(self.nets[net.partition("@")[0]], net.partition("@")[0])


@functools.lru_cache(maxsize=256)
def _variant(at, net, name):
    return at.variant(VARIANTS[net][name], _share(at, net))


def _share(at, net):
    return at.base.recipe.iterations / NETS[net].base.recipe.iterations


CONTROL_CURVES = (3, 7)  # levels at which figure 3 draws reinitialised networks reading by reading
RECIPE = ("optimizer", "lr", "momentum", "batch_size", "warmup", "test_readings")


# The networks of the paper --------------------------------------------------------------------------------------------


def conv(model: str, iterations: int, lr: float, rate_conv: float, rounds: int) -> Net:
    """Conv-2, -4 or -6 on CIFAR-10: Adam, batches of 60, layer-wise pruning."""
    recipe = Recipe(lr=lr, iterations=iterations, inputs="standard", test_readings="log")
    every = tuple(range(1, rounds + 1))
    base = Run(model=model, dataset="cifar10", recipe=recipe, rate_conv=rate_conv)
    return Net(base, rounds=rounds, control_rounds=every, probe_rounds=every, sweep_rounds=rounds)


def deep(
    model: str,
    layers: tuple[str, ...],
    batch_size: int,
    iterations: int,
    milestones: tuple[int, ...],
    eval_every: int,
    rounds: int,
) -> Net:
    """The residual network or VGG-19 on CIFAR-10: SGD at 0.1, all convolutions of `layers` pruned together.

    The test set is read at the end and after most multiples of `eval_every` iterations. What figures 7 and 8 draw is
    among them: 30K and 60K of VGG-19, 10K and 20K, a third and two thirds, of the residual network.
    """
    recipe = Recipe(
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, batch_size=batch_size, iterations=iterations,
        milestones=milestones, eval_every=eval_every, inputs="standard", augment="flip-crop", test_readings="log",
    )  # fmt: skip
    every = tuple(range(1, rounds + 1))
    base = Run(model=model, dataset="cifar10", recipe=recipe, scope="global", rate_output=None, layers=layers)
    return Net(base, rounds=rounds, control_rounds=every, probe_rounds=every, sweep_rounds=rounds)


def residual(blocks: int) -> tuple[str, ...]:
    """The 3x3 convolutions of a residual network with so many blocks in each of three stages."""
    places = itertools.product((1, 2, 3), range(blocks), (1, 2))
    return ("conv1", *(f"layer{stage}.{block}.conv{conv}" for stage, block, conv in places))


NETS = {
    "lenet": Net(),
    "conv2": conv("conv2", 20_000, 2e-4, 0.1, 18),
    "conv4": conv("conv4", 25_000, 3e-4, 0.1, 21),
    "conv6": conv("conv6", 30_000, 3e-4, 0.15, 21),
    "resnet18": deep("resnet20", residual(3), 128, 30_000, (20_000, 25_000), 2_000, 15),
    "vgg19": deep("vgg19", tuple(f"conv{i}" for i in range(1, 17)), 64, 112_480, (56_240, 84_360), 10_000, 20),
}

# Points of the sweeps: what differs from a network's base Run and its recipe. until: which rounds of the base say how
# few weights are left at the end; rounds: which give their number. longer: times the iterations.
DROPOUT = {"longer": 3, "options": {"dropout": 0.5}}
LAYERWISE = {"scope": "layer"}
CONVS = {  # appendix H; which learning rates SGD had is not stated
    "sgd": {"optimizer": "sgd", "lr": 0.01},
    **{f"momentum-{lr}": {"optimizer": "sgd", "momentum": 0.9, "lr": lr} for lr in (0.001, 0.005, 0.008)},
    "conv-only": {"rate": 0.0, "rate_output": 0.0, "rounds": "sweep_rounds"},
    "fc-only": {"rate_conv": 0.0, "rounds": "sweep_rounds"},
    **{f"conv{percent}": {"rate_conv": percent / 100, "rounds": "sweep_rounds"} for percent in (10, 15, 20)},
}
RATES = {"0.1": {}, "0.03": {"lr": 0.03}, "0.01": {"lr": 0.01}}  # of learning; warmup: to the paper's chosen lengths
DEEP = {
    "resnet18": RATES | {"warmup": {"lr": 0.03, "warmup": 20_000}, "warmup-5000": {"lr": 0.03, "warmup": 5_000}},
    "vgg19": RATES | {"warmup": {"warmup": 10_000}, "warmup-5000": {"warmup": 5_000}},
}
VARIANTS = {
    "lenet": {
        **{f"lr{lr}": {"lr": float(lr)} for lr in ("2.5e-5", "2e-4", "2e-3", "6.4e-3")},
        **{f"sgd-{lr}": {"optimizer": "sgd", "lr": lr} for lr in (0.1, 0.4)},
        # figures 16, 22 and 24 look at its masks
        "sgd-0.8": {"optimizer": "sgd", "lr": 0.8, "until": "far_rounds", "test_readings": "all"},
        **{f"momentum-{lr}": {"optimizer": "sgd", "momentum": 0.9, "lr": lr} for lr in (0.025, 0.1)},
        "rate0.1": {"rate": 0.1, "rate_output": 0.05},
        "rate0.4": {"rate": 0.4, "rate_output": 0.2, "until": "rounds"},
        **{f"sigma{s}": {"options": {"init": "normal", "sigma": s}} for s in (0.03, 0.1, 0.3)},
        **{f"hidden{n}-{n // 3}": {"options": {"hidden": (n, n // 3)}, "until": "rounds"} for n in (75, 150)},
        "kaiming": {"options": {"init": "kaiming fan_in"}},
    },
    "conv2": CONVS
    | {"lr4e-4": {"lr": 4e-4}, "dropout": DROPOUT | {"lr": 3e-4}}
    | {f"dropout-lr{lr}": DROPOUT | {"lr": float(lr)} for lr in ("1e-4", "2e-4", "4e-4")},
    "conv4": CONVS | {"lr2e-4": {"lr": 2e-4}, "lr4e-4": {"lr": 4e-4}, "dropout": DROPOUT | {"lr": 2e-4}},
    "conv6": CONVS
    | {f"conv10-lr{lr}": CONVS["conv10"] | {"lr": float(lr)} for lr in ("2e-4", "4e-4")}
    | {"dropout": DROPOUT | {"lr": 2e-4}},
    **{
        net: some | {f"{name}-layerwise": change | LAYERWISE for name, change in some.items()}
        for net, some in DEEP.items()
    },
}
# The paper's own points are not stated in its text.
GUESSED_POINTS = ("sigma0.03", "sigma0.3", "hidden75-25", "hidden150-50", "sgd", "conv15", "conv20")


# The scales -----------------------------------------------------------------------------------------------------------


def smaller(
    net: str,
    iterations: int,
    eval_every: int,
    recipe: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **changes: Any,
) -> Net:
    """A network of the paper trained for less, its milestones at the same fractions, with other changes."""
    base = NETS[net].base
    share = iterations / base.recipe.iterations
    given = {"iterations": iterations, "eval_every": eval_every} | (recipe or {})
    given |= {"milestones": tuple(round(share * t) for t in base.recipe.milestones)}
    base = dataclasses.replace(base, recipe=dataclasses.replace(base.recipe, **given), **(run or {}))
    return dataclasses.replace(NETS[net], base=base, **changes)


ONCE = {"draws": 1, "random_draws": 1}
LAPTOP = ONCE | {
    "rounds": 15,
    "control_rounds": (3, 7, 9, 10, 12, 15),
    "probe_rounds": (7, 12, 15),
    "sweep_rounds": 7,
    "far_rounds": 21,
    "one_shot": (0.825, None, 0.95),
}
SMOKE = LAPTOP | {"rounds": 7, "control_rounds": (3, 7), "probe_rounds": (7,), "sweep_rounds": 1, "far_rounds": 7}
BFLOAT16 = {"precision": "bfloat16"}
# Written down, with these levels and trials, before any of them ran. Conv-2 trains for 40 % of the paper's iterations:
# a dense pilot's validation loss was nearly flat at its end, 2,750; a random network's at 4.6 % still fell at 4,000.
# Three trials, because a chain of 16 trainings takes hours; a negative result is then inconclusive.
CONV = ONCE | {"trials": 3, "sweep_rounds": 7}
LAPTOP_CONV = {
    "conv2": smaller(
        "conv2", 8_000, 200, BFLOAT16, rounds=15, control_rounds=(3, 7, 15), probe_rounds=(7, 15), **CONV
    ),
    "conv4": smaller("conv4", 10_000, 250, BFLOAT16, rounds=12, control_rounds=(3, 12), probe_rounds=(12,), **CONV),
    "conv6": smaller("conv6", 12_000, 300, BFLOAT16, rounds=10, control_rounds=(3, 10), probe_rounds=(10,), **CONV),
    "resnet18": smaller(  # the stand-in for the residual network: a fifth of its iterations
        "resnet18", 6_000, 400, BFLOAT16, {"model": "resnet8", "dataset": "cifar10_16", "layers": residual(1)},
        rounds=10, control_rounds=(2, 4, 6, 8, 10), probe_rounds=(8,), sweep_rounds=8, **ONCE,
    ),
}  # fmt: skip
FEW = ONCE | {"rounds": 2, "control_rounds": (2,), "probe_rounds": (2,), "sweep_rounds": 1}
QUICK = {"batch_size": 20}
NARROW = {"dataset": "digits", "options": (("width", 4),)}
SMOKE_CONV = {net: smaller(net, 15, 5, QUICK, NARROW, **FEW) for net in ("conv2", "conv4", "conv6")}
SMOKE_CONV["resnet18"] = smaller(
    "resnet18", 30, 2, QUICK,
    NARROW | {"model": "resnet8", "layers": residual(1)}, **FEW,
)  # fmt: skip
SETTINGS = {  # highest scale first
    "paper": Setting(NETS),
    # The paper's trainings that decide LeNet's primary claims, with twice its trials: figure 4 is 180 runs.
    "primary": Setting(
        {"lenet": Net(rounds=15, control_rounds=(7,), draws=1, probe_rounds=(7,), sweep_rounds=7, one_shot=(None,))},
        trials=10,
    ),
    "laptop": Setting(
        {"lenet": Net(Run(recipe=Recipe(iterations=15_000, test_readings="all")), **LAPTOP)} | LAPTOP_CONV
    ),
    "smoke": Setting(
        {"lenet": Net(Run(dataset="digits", recipe=Recipe(iterations=60, eval_every=10, test_readings="all")), **SMOKE)}
        | SMOKE_CONV,
        trials=2,
    ),
}
SCALES = tuple(SETTINGS)


# What each figure draws: arm → levels (None: all that the setting has) ------------------------------------------------


def arms(nets: Iterable[str], *controls: str) -> dict[str, None]:
    """Every control of every network, or net@variant, at all levels."""
    return {f"{net}/{control}": None for net in nets for control in controls}


def variants(net: str, *names: str) -> list[str]:
    return [f"{net}@{name}" for name in names]


# MAIN: LeNet's of the main text, and 14.
MAIN = ("fig1", "fig3", "fig4", "fig11", "fig12", "fig14")
CURVES = {"lenet/imp": (0, 3, 7, 12, 15, 18), "lenet/reinit": (3, 7)}
SGD = ["lenet@sgd-0.8"]
ITEMS = {
    "fig1": arms(["lenet"], "imp", "random"),
    "fig3": CURVES,
    "fig4": arms(["lenet"], "imp", "reinit", "oneshot"),
    "fig11": CURVES,
    "fig12": arms(["lenet"], "imp", "reinit"),
    "fig14": arms(["lenet"], "imp", "reinit", "random"),
    "fig9": arms(["lenet"], "imp", "continued"),
    "fig15": arms(["lenet"], "imp"),
    "fig16": arms(SGD, "imp"),
    "fig17": arms(["lenet", *SGD], "imp", "reinit", "dm-reinit"),
    "fig18": arms(["lenet"], "imp", "reinit", "prune-at-init"),
    "fig19": arms(["lenet"], "dm-reinit"),  # whose rows hold what is drawn, see tickets.moves
    "fig20": arms(["lenet"], "dm-reinit"),
    "fig21": arms(["lenet"], "imp"),
    "fig22": arms(SGD, "imp"),
    "fig23": arms(["lenet"], "imp"),
    "fig24": arms(SGD, "imp"),
    "fig25": arms(["lenet"], "imp", "reinit", *(f"noise-{c}" for c in (0.5, 1, 2, 3))),
}
ITEMS |= {
    item: arms(["lenet", *variants("lenet", *names)], "imp")
    for item, names in {
        "fig26": ("lr2.5e-5", "lr2e-4", "lr2e-3", "lr6.4e-3"),
        "fig27": ("sgd-0.4", "sgd-0.8"),
        "fig28": ("momentum-0.025", "momentum-0.1"),
        "fig29": ("rate0.1", "rate0.4"),
        "fig30": ("sigma0.03", "sigma0.1", "sigma0.3"),
        "fig31": ("hidden75-25", "hidden150-50"),
        "code": ("sgd-0.1", "kaiming"),  # no figure: settings of released code, beside the paper's
    }.items()
}


def _convolutional(net):
    """Conv-2, -4 or -6: an item for each figure and network, since one may be run without the others."""
    rates = [name for name in VARIANTS[net] if name.startswith("conv") and "only" not in name]
    also = {1: ["random"], 5: ["reinit"], 10: ["continued"], 13: ["reinit"], 14: ["reinit", "random"]}
    names = {
        6: ["dropout"],
        32: [name for name in VARIANTS[net] if name.startswith("lr")],
        33: ["sgd"],
        34: [name for name in VARIANTS[net] if name.startswith("momentum")],
        35: [name for name in rates if "lr" not in name],
        36: [name for name in VARIANTS[net] if name.startswith("dropout")],
        37: ["conv-only", "fc-only"],
    }
    if net == "conv6":  # which prunes 15 % of its convolutions a round everywhere else
        names[32] = [name for name in rates if "lr" in name or name == "conv10"]
    return {f"fig{n}-{net}": arms([net], "imp", *controls) for n, controls in also.items()} | {
        f"fig{n}-{net}": arms([net, *variants(net, *some)], "imp") for n, some in names.items()
    }


def _deep(net, first, without, k, level):
    """The residual network or VGG-19; `first`: the number of its figure in the main text.

    without: the variant without warmup. k, level: where survivors go back to, and how sparse figure 4 of "Stabilizing
    the Lottery Ticket Hypothesis" is; its figures 3 and 5 are "rewinding".
    """
    three = variants(net, "0.1", "0.01", "warmup")
    layerwise = [f"{name}-layerwise" for name in three]
    shift = 0 if net == "vgg19" else 1  # figures 38 to 45 show the two in turn
    return {
        f"fig{first}": arms(three, "imp", "reinit"),
        f"fig14-{net}": arms(three, "imp", "reinit", "random"),
        f"fig{38 + shift}": arms([*three, *layerwise], "imp"),
        f"fig{40 + shift}": arms(layerwise, "imp", "reinit"),
        f"fig{43 - shift}": arms(variants(net, *RATES), "imp"),
        f"fig{45 - shift}": arms(variants(net, without, "warmup-5000", "warmup"), "imp"),
        f"rewinding-{net}": arms(three[:1], "imp", f"rewind-{k}", "reinit", "random"),
        f"rewinding-to-{net}": dict.fromkeys(arms(three[:1], "imp", *(f"rewind-{k}" for k in REWIND)), (0, level)),
    }


REWIND = (100, 500, 2000)  # in the paper's iterations
for network in ("conv2", "conv4", "conv6"):
    ITEMS |= _convolutional(network)
ITEMS |= _deep("resnet18", 8, "0.03", 500, 8) | _deep("vgg19", 7, "0.1", 100, 17)
# Figures 3 and 5 of arXiv 1912.05671: the whole network at five k, and the ticket reset and rewound.
ITEMS["instability-resnet18"] = {
    f"resnet18@0.1/instability-{k}": (0, 8) if k in (0, 500) else (0,) for k in (0, 100, 500, 2000, 5000)
}


def cells(item: str, at: Setting) -> list[tuple[str, float, float | None]]:
    """(arm, x, point): the networks of which one trial of an item consists; none where its networks are not here.

    x is the density of the paper's network at the point; a stand-in stands in for it after as many rounds.
    """
    return [
        (arm, _density(arm, at, point), point)
        for arm, levels in ITEMS[item].items()
        for point in points(arm, at)
        if levels is None or point in levels
    ]


def seeds(item: str, at: Setting) -> range:
    """The seeds of an item's trials, of which a network may have fewer than the others."""
    names = {arm.split("/")[0].partition("@")[0] for arm in ITEMS[item]} & at.nets.keys()
    return range(at.seed, at.seed + min((at.nets[name].trials or at.trials for name in names), default=at.trials))


def points(arm: str, at: Setting) -> Sequence[float | None]:
    """Where an arm has networks: levels, or fractions p for one-shot pruning."""
    name, control = arm.split("/")
    if "hidden" in name and at.nets["lenet"].base.model != "lenet_300_100":
        return ()
    if not (net := at.net(name)):
        return ()
    if control.startswith("oneshot"):
        return net.one_shot
    levels = range(net.rounds + 1)
    every = {"imp": levels, "reinit": net.control_rounds, "random": net.control_rounds}
    return levels if control.startswith(("rewind", "instability")) else every.get(control, net.probe_rounds)


def _density(arm, at, point):
    (name, control), theirs = arm.split("/"), Setting(NETS).net(arm.split("/")[0])
    net, pruning = at.net(name), ("rate", "rate_conv", "rate_output", "scope")
    if all(getattr(net.base, field) == getattr(theirs.base, field) for field in pruning):
        net = theirs
    if control.startswith("oneshot"):  # p = 0.825 leaves 17.6 %: the output layer loses half as much
        return net.density(10) if point is None else 1 - point / net.one_shot_rate(0)
    return net.density(point)


def trial(arm: str, at: Setting, seed: int, point: float | None) -> list[Run] | list[Instability]:
    """The Runs of one arm and trial at one of its `points`."""
    name, control = arm.split("/")
    net = at.net(name)
    if net.trials is not None and seed >= at.seed + net.trials:
        return []
    return list(_trial(net, at.share(name), control, seed, point))


@functools.lru_cache(maxsize=100_000)
def _trial(net, share, control, seed, point):
    """Cached: many figures draw the same networks, and a key takes longer to compute than to compare."""
    kind, _, number = control.partition("-")
    if kind == "noise":
        return net.noise(seed, point, float(number))
    if kind in ("rewind", "instability"):
        k = int(number)
        return getattr(net, kind)(seed, point, k and max(1, round(k * share)))
    return getattr(net, control.replace("-", "_"))(seed, point)


def override(at: Setting, **given: Any) -> Setting:
    """A Setting with a notebook's parameters in place of its own; those that are None change nothing.

    All but `trials` and `seed` are LeNet's: with any of them the other networks are left out.
    """
    given = {name: value for name, value in given.items() if value is not None}
    whole = {name: given.pop(name) for name in ("trials", "seed") if name in given}
    if "trials" in whole:
        whole["nets"] = {name: dataclasses.replace(net, trials=None) for name, net in at.nets.items()}
    at = dataclasses.replace(at, **whole)
    return dataclasses.replace(at, nets={"lenet": _changed(at.nets["lenet"], given)}) if given else at


def called(changed: dict[str, Any]) -> dict[str, str]:
    """What arms are called where their experiment is another: a ticket that starts elsewhere than at θ₀."""
    init = changed.get("init", "reset")
    return {} if init == "reset" else {"imp": f"ticket, init {init}"}


def _changed(at, given):
    for name in ("iterations", "rounds"):
        if name in given:
            whole(name, given[name])
    recipe = {name: given.pop(name) for name in ("iterations", "batch_size", "lr") if name in given}
    in_base = ("model", "dataset", "train_fraction", "rate", "rate_output", "scope", "rewind_to")
    base = {name: given.pop(name) for name in in_base if name in given}
    if "iterations" in recipe:
        recipe["eval_every"] = min(at.base.recipe.eval_every, recipe["iterations"])
    run = dataclasses.replace(at.base, **base, recipe=dataclasses.replace(at.base.recipe, **recipe))
    if "rounds" in given:
        for name in ("control_rounds", "probe_rounds"):
            given[name] = tuple(r for r in getattr(at, name) if r <= given["rounds"]) or (given["rounds"],)
        for name in ("sweep_rounds", "far_rounds"):
            given[name] = min(getattr(at, name), given["rounds"])
    densities = given.pop("one_shot_densities", None)
    at = dataclasses.replace(at, base=run, **given)
    if at.one_shot_rate(least := at.density(min(10, at.rounds))) >= 1:
        raise ValueError(
            f"Invalid rate {run.rate} with {at.rounds} rounds: one-shot pruning cannot go down to {100 * least:.2g} %, "
            "since the output layer then loses half as much as the others; lower one of them."
        )
    return at if densities is None else dataclasses.replace(at, one_shot=_one_shot(at, densities))


def _one_shot(at, densities):
    """Fractions to remove in one step for a list of densities."""
    listed = isinstance(densities, list | tuple) and all(isinstance(d, float) for d in densities)
    rates = tuple(map(at.one_shot_rate, densities)) if listed else ()
    if not rates or not all(0 < p < 1 for p in rates):
        least = 1 - 1 / at.one_shot_rate(0)
        raise ValueError(f"Invalid one_shot_densities {densities!r}: give a list of fractions, {least:.2g} < kept < 1.")
    return rates


PAPER = Paper(__name__)
setting, runs, arm = PAPER.setting, PAPER.runs, PAPER.arm
