"""The settings of the training loop."""

import dataclasses

#: Optimizers of torch by our names, and the learning rate's schedules (see `learning_rate`).
OPTIMIZERS = ("adam", "radam", "adamw")
SCHEDULES = ("constant", "cosine", "linear-tail", "inverse-square-root")

#: Fields that change what is written on the way, and nothing of the weights.
WITHOUT_EFFECT = ("log_interval", "checkpoint_interval", "keep_checkpoints", "snapshot_interval")


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What the loop does, whatever the method.

    Attributes:
        iterations: updates.
        batch_size: samples an update, over all processes and parts.
        accumulation: parts that each process evaluates one after another, to need less memory.
        optimizer: "adam" (Kingma and Ba 2015), "radam" (Liu et al. 2020) or "adamw" (Loshchilov and Hutter 2019).
        betas: of the optimizer, decays of its two moments.
        eps: of the optimizer.
        weight_decay: of the optimizer: decoupled for adamw, added to the gradient for the others.
        learning_rate: the highest one.
        schedule: of the learning rate: "constant", "cosine" to 0, "linear-tail" to 0, or "inverse-square-root".
        warmup: updates over which the learning rate rises linearly.
        linear_tail: fraction of training at the end over which "linear-tail" falls to 0.
        decay_start: updates for which "inverse-square-root" stays at its highest.
        gradient_clip: bound of the gradient's norm; None does not clip.
        ema_decays: of the exponential averages of the weights, each of which is a model "ema-DECAY".
        ema_warmup: update u counts for at least 10 / (u + 10), so that an average forgets its start.
        power_ema: relative lengths (sigma_rel) of power-function averages, each a model "power-SIGMA_REL"; two, such
            as 0.05 and 0.1, from which averages of any length are made afterwards (see `snapshots.reconstruct`).
        autocast: "bfloat16": evaluate in it what torch.autocast does; None: in the weights' float32.
        compile: backend by which torch.compile compiles the network, such as "inductor"; None does not.
        horizontal_flip: mirror each image with probability one half as it is drawn.
        seed: of the batches' order, the method's random numbers and dropout; 0 ≤ seed < 2³².
        log_interval: updates between rows of the log.
        checkpoint_interval: updates between checkpoints to resume from.
        keep_checkpoints: how many of them are kept, the last ones.
        snapshot_interval: updates between snapshots of the power-function averages, which are all kept.

    Raises:
        ValueError: a setting out of its range; the message names it.
    """

    iterations: int = 10000
    batch_size: int = 128
    accumulation: int = 1
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    linear_tail: float = 0.5
    decay_start: int = 10000
    gradient_clip: float | None = None
    ema_decays: tuple[float, ...] = (0.999,)
    ema_warmup: bool = True
    power_ema: tuple[float, ...] = ()
    autocast: str | None = None
    compile: str | None = None
    horizontal_flip: bool = False
    seed: int = 0
    log_interval: int = 50
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2
    snapshot_interval: int = 1000

    def __post_init__(self) -> None:
        counts = ("iterations", "batch_size", "accumulation", "log_interval", "checkpoint_interval")
        for name in (*counts, "keep_checkpoints", "snapshot_interval", "decay_start"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._check("autocast", self.autocast in (None, "bfloat16"), 'None or "bfloat16"')
        self._check("linear_tail", 0 < self.linear_tail <= 1, "a fraction in (0, 1]")
        self._check("seed", 0 <= self.seed < 1 << 32, "0 ≤ seed < 2³²")
        self._check("ema_decays", all(0 <= d < 1 for d in self.ema_decays), "numbers in [0, 1)")
        self._check("power_ema", all(0 < s <= 0.28 for s in self.power_ema), "numbers in (0, 0.28]")
        for name in ("warmup", "weight_decay", "learning_rate", "eps"):
            self._check(name, getattr(self, name) >= 0, "not negative")
        self._check("gradient_clip", self.gradient_clip is None or self.gradient_clip > 0, "positive, or None")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def of_the_weights(self) -> dict[str, object]:
        """The settings that the weights depend on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in WITHOUT_EFFECT}
