"""--minutes: the model, the batch and the number of steps that reach the lowest loss in a given time.

python train.py --dataset=books --minutes=10
"""

from plaingpt.startup import STARTED

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator

from plaingpt.console import TooLittleMemory, UserError, note, out_of_memory
from plaingpt.distributed import Distributed
from plaingpt.metrics import Stopwatch
from plaingpt.run import initial_model, write_recipe
from plaingpt.run_state import RunState
from plaingpt.settings import flags_of
from plaingpt.tokens import DataSet
from plaingpt.train_config import TrainConfig, muon_learning_rate

WIDTHS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1600)
SEQUENCES_PER_STEP = 32
FEW_TOKENS = 5e6  # BPE tokens. Up to this many, one layer beats two of equal cost; more do not improve it
TRAINING_SHARE = 0.85  # of the time; the rest is for evaluations and saves
END = 1.0  # seconds for the last picture and the exit
EVALUATIONS, MORE_EVALUATIONS = 4, 12  # besides the one at the start: in a run of few epochs, and of more
FEW_EPOCHS = 4  # until then a rising validation loss is noise, not overfitting
EVALUATION_SHARE = 0.03  # an evaluation reads at most this share of the training tokens: 1% of the time
# Ratios of predicted losses to the lowest. If the last model is below CLOSE, a larger one is timed. Models below
# UNCERTAIN are timed again: the speed of some machines varies briefly, and half the speed raises a loss by up to 15%.
CLOSE, UNCERTAIN = 1.06, 1.15

# Trains with these settings for that many seconds. Returns tokens per second; TooLittleMemory if it does not fit
Measure = Callable[[TrainConfig, float], float]


def predicted_loss(config: TrainConfig, tokens: float, text_tokens: int) -> float:
    """Predicted loss after training on `tokens` tokens of a text of `text_tokens`, up to an offset and a factor.

    Fitted to 45 runs (docs/scaling.md). Hoffmann et al. 2022 add a term for size and one for data; here a power mean
    combines them: more parameters without more tokens help less. Repeated tokens count less (Muennighoff et al. 2023).
    """
    repeated = max(tokens / text_tokens - 1, 0)
    effective_tokens = min(tokens, text_tokens) + text_tokens * 5 * (1 - math.exp(-repeated / 5))
    if config.n_layer == 1:
        effective_tokens = min(effective_tokens, FEW_TOKENS)
    of_size, of_tokens = (block_parameters(config) / 1e6) ** -0.18, 1.7 * (effective_tokens / 1e6) ** -0.2
    return (of_size**3.7 + of_tokens**3.7) ** (1 / 3.7) * (0.97 if config.n_layer == 1 else 1)


def block_parameters(config: TrainConfig) -> int:
    return 12 * config.n_layer * config.n_embd**2


def choose_settings(
    config: TrainConfig, given: dict[str, str], data: DataSet, dist: Distributed, measure: Measure
) -> TrainConfig:
    """The settings of a run that ends in time. All ranks."""
    check_flags(given)
    if dist.device.type == "cuda" and config.minutes < 10:
        config = unless_given(config, given, compile=False)  # compiling takes up to half a minute
    seconds = TRAINING_SHARE * max(1.0, time_left(config.minutes, dist))
    timed = time_candidates(config, given, seconds, data, dist, measure)
    best = min(timed, key=lambda c: predicted_loss(c, timed[c] * seconds, len(data.train)))
    seconds = TRAINING_SHARE * max(1.0, time_left(config.minutes, dist))  # without those that timing took
    config = with_schedule(best, given, timed[best] * seconds, data)
    tried = "; ".join(f"{c.n_layer} x {c.n_embd}: {rate:,.0f}" for c, rate in timed.items())
    note(f"tokens/s of the models tried (layers x width, not compiled): {tried}")
    chosen = f"block_size {config.block_size}, learning_rate {config.peak_lr:g}, weight_decay {config.weight_decay:g}"
    shape = f"{config.n_layer} x {config.n_embd}, {chosen}, dropout {config.dropout:g}"
    note(f"lowest predicted loss in {config.minutes:g} min: {shape}")
    return config


def time_candidates(
    config: TrainConfig, given: dict[str, str], seconds: float, data: DataSet, dist: Distributed, measure: Measure
) -> dict[TrainConfig, float]:
    """Tokens per second of candidates, until larger ones look worse or time is short. seconds: of training."""
    period = min(0.5, 0.15 * config.minutes)  # seconds per timing: 0.25% of the time, at most 0.5
    timed, tokens = {}, 3e6  # tokens that the last candidate could train on; at first, a guess

    def late() -> bool:
        return TRAINING_SHARE * time_left(config.minutes, dist) < 0.75 * seconds

    def promising(factor: float) -> list[TrainConfig]:
        losses = {c: predicted_loss(c, statistics.median(timed[c]) * seconds, len(data.train)) for c in timed}
        return [candidate for candidate, loss in losses.items() if loss < factor * min(losses.values())]

    def speed(candidate: TrainConfig) -> float:
        """Tokens per second; 0 if memory is too small and there is another model or batch to choose."""
        try:
            return measure(candidate, period)
        except Exception as error:
            # TooLittleMemory is raised by all processes. If memory runs out in one of several, the others wait for it.
            needs_memory = isinstance(error, TooLittleMemory) or (dist.world_size == 1 and out_of_memory(error))
            if not needs_memory or not (timed or halved(candidate, given)):
                raise
            return 0.0

    def fitting(candidate: TrainConfig) -> tuple[TrainConfig, float]:
        """`candidate`, its micro-steps halved until they fit in memory, and its speed."""
        while not (rate := speed(candidate)) and (smaller := halved(candidate, given)):
            candidate = smaller
        return candidate, rate

    for candidate in candidates(config, given, data, dist):
        one_layer = candidate.n_layer == 1 and "n_layer" not in given
        if one_layer and tokens > FEW_TOKENS:
            continue
        if timed and block_parameters(candidate) > 12 * len(data.train):
            break  # it would memorize the text
        fitted, rate = fitting(first := with_batch(candidate, given, tokens, data, dist))
        # The measured speed implies a batch, which in turn changes the speed.
        if rate and not late() and (second := with_batch(candidate, given, rate * seconds, data, dist)) != first:
            fitted, rate = fitting(second)
        if not rate:
            break  # larger models need more memory still
        timed[fitted], tokens = [rate], rate * seconds
        if late() or not (one_layer or fitted in promising(CLOSE)):
            break
    for _ in range(2 if len(timed) > 1 else 0):  # in turn, so that a change of the machine's speed affects all of them
        # Timing the largest takes longest, so it is timed again only if it is close.
        for candidate in dict.fromkeys([*promising(UNCERTAIN)[:-1], *promising(CLOSE)]):
            agree = len(timed[candidate]) > 1 and max(timed[candidate]) < 1.05 * min(timed[candidate])
            if not agree and not late() and (rate := speed(candidate)):
                timed[candidate].append(rate)
    return {candidate: statistics.median(rates) for candidate, rates in timed.items()}


def halved(config: TrainConfig, given: dict[str, str]) -> TrainConfig | None:
    """`config` with micro-steps of half the size, which need less memory; None if they cannot be halved."""
    if config.batch_size == 1 or {"batch_size", "gradient_accumulation_steps"} & given.keys():
        return None
    micro_steps = 2 * config.gradient_accumulation_steps
    return dataclasses.replace(config, batch_size=config.batch_size // 2, gradient_accumulation_steps=micro_steps)


def candidates(config: TrainConfig, given: dict[str, str], data: DataSet, dist: Distributed) -> Iterator[TrainConfig]:
    """Models of about one layer per 80 channels, or of a single layer; or the shape of a trained model."""
    if not config.is_new_model:
        # [1] drops the model: timing needs its memory. batch_size=1 because the chosen batch is checked later.
        found = initial_model(dataclasses.replace(config, batch_size=1), given, data, None, dist)[1]
        yield dataclasses.replace(found, batch_size=config.batch_size)
        return
    widths = [config.n_embd] if "n_embd" in given else WIDTHS
    widths = [n_embd for n_embd in widths if "n_head" not in given or n_embd % config.n_head == 0]
    if not widths:
        raise UserError(f"--n_head={config.n_head} needs an --n_embd that is a multiple of it")
    more = 0.3 * max(0, 11 - math.log2(data.tokenizer.vocab_size))  # layers that combine characters, if time allows
    for n_embd in widths:
        heads = [n for n in range(1, max(1, n_embd // 64) + 1) if n_embd % n == 0]
        layers = [config.n_layer] if "n_layer" in given else [max(2, round(n_embd / 80 + extra)) for extra in (0, more)]
        single = [] if more or n_embd < WIDTHS[1] or "n_layer" in given else [1]
        for n_layer in dict.fromkeys([*single, *layers]):
            yield unless_given(config, given, n_layer=n_layer, n_embd=n_embd, n_head=heads[-1])


def unless_given(config: TrainConfig, given: Collection[str], **chosen) -> TrainConfig:
    """`config` with the `chosen` values of the settings that are not in `given`."""
    return dataclasses.replace(config, **{name: value for name, value in chosen.items() if name not in given})


def with_batch(
    config: TrainConfig, given: dict[str, str], tokens: float, data: DataSet, dist: Distributed
) -> TrainConfig:
    """`config` with the batch for that many training tokens: its context is 128 for 3 million, 1,024 for a billion."""
    longest = min(len(data.train), len(data.val)) - 1
    block = max(64, 2 ** round(math.log2(64 * (tokens / 1e6) ** 0.4)))
    if config.is_new_model:
        config = unless_given(config, given, block_size=max(1, min(block, 1024, longest)))
    config = unless_given(config, given, gradient_accumulation_steps=dist.world_size)
    sequences = SEQUENCES_PER_STEP * block // config.block_size // config.gradient_accumulation_steps
    return unless_given(config, given, batch_size=max(1, sequences))


def with_schedule(config: TrainConfig, given: dict[str, str], tokens: float, data: DataSet) -> TrainConfig:
    """`config` with what follows from the number of training tokens. Intervals are kept only if flags give them."""
    steps = int(tokens / config.tokens_per_step)
    if steps < 2:
        problem = f"--minutes={config.minutes:g} is too short for two steps of {config.tokens_per_step:,} tokens"
        raise UserError(f"{problem}: give more time, or a smaller model, --batch_size or --gradient_accumulation_steps")
    lr = muon_learning_rate(config.n_embd, steps) / (1 if config.optimizer == "muon" else 4)
    epochs = tokens / len(data.train)
    # With this learning rate, weights are an average of the updates of the last 1 / (lr * weight_decay) steps. About an
    # epoch of them, or fewer in a shorter run, beats the usual decay of 0.1 (Wang and Aitchison 2024; docs/scaling.md).
    averaged = max(50, steps / (1 + epochs))
    evaluations = MORE_EVALUATIONS if epochs > FEW_EPOCHS else EVALUATIONS
    evaluations = max(evaluations, math.ceil(config.minutes / 15))  # each saves: a kill loses at most 15 minutes
    sequences = int(EVALUATION_SHARE * min(1, MORE_EVALUATIONS / evaluations) * tokens / config.block_size)
    chosen = dict(
        learning_rate=lr if config.is_new_model else float(f"{lr / 3:.2g}"),
        weight_decay=float(f"{1 / (lr * averaged):.2g}") if config.is_new_model else config.weight_decay,
        momentum=0.85 if steps < 500 else 0.95,
        # In narrow models and shorter runs, dropout costs more than the overfitting that it prevents.
        dropout=0.2 if epochs > 40 and config.n_embd >= 384 else config.dropout,
    )
    intervals = dict(
        eval_iters=0 if sequences * config.block_size > len(data.val) else max(1, sequences // config.batch_size),
        log_interval=max(1, steps // max(50, math.ceil(config.minutes))),
        eval_interval=math.ceil(steps / evaluations),
    )
    config = unless_given(unless_given(config, given, **chosen), flags_of(given), **intervals)
    # The warmup stays the same if the number of steps is corrected.
    return dataclasses.replace(config, max_iters=steps, warmup_iters=steps // 20, lr_decay_iters=None)


def extend_run(config: TrainConfig, given: dict[str, str], state: RunState) -> tuple[TrainConfig, dict[str, str]]:
    """Settings that continue a run for `config.minutes`, at the speed it had so far."""
    check_flags(given)
    steps = state.step + max(1, int(TRAINING_SHARE * 60 * config.minutes * state.step / max(state.seconds, 1.0)))
    warmup = min(state.settings.get("warmup_iters") or 0, max(state.step, steps // 20))  # it may not be over yet
    changed = {"max_iters": steps, "warmup_iters": warmup, "lr_decay_iters": None}
    return dataclasses.replace(config, **changed), given | dict.fromkeys(changed, "--minutes")


def check_flags(given: dict[str, str]) -> None:
    for name in ("max_iters", "warmup_iters", "lr_decay_iters"):
        if name in flags_of(given):
            raise UserError(f"--minutes determines {name}: leave out --{name}, or --minutes")


def time_left(minutes: float, dist: Distributed) -> float:
    """Seconds until `minutes` after the start, equal on all processes so that they choose the same."""
    return dist.max(int(1000 * (STARTED + 60 * minutes - time.monotonic()))) / 1000


class Deadline:
    """Makes a run with --minutes end in time, by correcting the number of steps.

    The first correction comes after 5% of the steps, when a new run's warmup ends. Learning rates before it do not
    depend on the number of steps (if it is 40 or more), so a recipe corrected only then trains the same model. Later
    ones are made if the run would miss its time by more than 2%, which is checked at each evaluation, and more often
    near the end. A new run ends early if, after a few epochs, the loss has not fallen for an eighth of the run and two
    evaluations: its learning rate drops, and decays within an eighth of the steps so far.
    """

    def __init__(self, config: TrainConfig, state: RunState, dist: Distributed, watch: Stopwatch, epoch_tokens: int):
        self.state, self.dist, self.watch, self.start = state, dist, watch, state.step
        steps = config.max_iters - state.step
        self.measured_from = state.step + max(1, steps // 40)  # the steps before it include compilation
        self.first_correction = state.step + max(2, steps // 20)
        self.may_end_after = max(FEW_EPOCHS * epoch_tokens / config.tokens_per_step, self.first_correction)
        self.measured = state.step, watch.seconds, time.monotonic()  # when speed was last measured
        self.evaluation_seconds, self.ending = 0.0, False  # of one evaluation, with its save

    def corrected(self, config: TrainConfig) -> TrainConfig:
        """The settings from here on. All ranks, before each step."""
        step, state = self.state.step, self.state
        if not config.minutes or self.ending or step >= config.max_iters:
            return config
        flat = max(2, math.ceil(config.max_iters / 8 / config.eval_interval))  # evaluations without a lower loss
        if not self.start and state.evaluations_since_lowest >= flat and state.evaluated_at > self.may_end_after:
            self.ending = True
            note("ending early: the validation loss no longer falls")
            return self.with_steps(config, min(step + math.ceil(step / 8), config.max_iters))
        often = 4 if config.max_iters - step < config.eval_interval else 1
        due = step > self.first_correction and step % max(1, config.eval_interval // often) == 0
        if step == self.measured[0] or not (due or step in (self.measured_from, self.first_correction)):
            return config
        per_step = self.measure_step(config)
        if step == self.measured_from:  # only begins the measurement, after compilation
            return config
        steps = step + max(1, int(self.seconds_for_steps(config) / per_step))
        misses_time = abs(steps - config.max_iters) * per_step > 0.02 * 60 * config.minutes
        decided = self.dist.is_main and (step == self.first_correction or misses_time)
        steps = self.dist.max(steps if decided else 0)  # the main process decides
        return self.with_steps(config, steps) if steps else config

    def measure_step(self, config: TrainConfig) -> float:
        """Seconds per step since the last call, plus a step's share of an evaluation with its save, once one has been
        timed."""
        self.dist.synchronize()
        before, self.measured = self.measured, (self.state.step, self.watch.seconds, time.monotonic())
        steps, trained, passed = (new - old for new, old in zip(self.measured, before))
        # `passed` includes the evaluation of step before[0], if any. The first is slow on a GPU, or precedes a resume.
        first = before[0] == self.start and (self.start or self.dist.device.type == "cuda")
        if self.state.evaluated_at == before[0] and not first:
            self.evaluation_seconds = passed - trained
        return trained / steps + self.evaluation_seconds / config.eval_interval

    def seconds_for_steps(self, config: TrainConfig) -> float:
        """What is left of the time, without the evaluations that `measure_step` does not include."""
        left = time_left(config.minutes, self.dist) - END
        if not self.evaluation_seconds:
            return TRAINING_SHARE * left
        # For the interval that is partly over, a last one that is half as long on average, and the final evaluation
        to_next = -self.state.step % config.eval_interval / config.eval_interval
        return left - (1.5 - to_next) * self.evaluation_seconds

    def with_steps(self, config: TrainConfig, steps: int) -> TrainConfig:
        """`config` with another number of steps, also in the state and, unless the run was resumed, in the recipe."""
        if steps != config.max_iters:
            note(f"corrected the number of steps to {steps:,}")
        self.state.settings = self.state.settings | {"max_iters": steps}  # a save may still read the old dictionary
        config = dataclasses.replace(config, max_iters=steps)
        if self.dist.is_main and self.start == 0:
            write_recipe(config)
        return config
