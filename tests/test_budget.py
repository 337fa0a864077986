"""--minutes: what it chooses, that the run ends in time, and that its recipe repeats it."""

import collections
import dataclasses
import gc
import math
import runpy
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import edit_json, flags, run_main

from model import GPT
from plaingpt import budget
from plaingpt.budget import (
    Deadline,
    block_parameters,
    candidates,
    choose_settings,
    extend_run,
    predicted_loss,
    write_recipe,
)
from plaingpt.console import TooLittleMemory, UserError
from plaingpt.distributed import Distributed, connect
from plaingpt.run import resumed_settings
from plaingpt.run_state import RunState, load_state
from plaingpt.tokens import open_data_set
from plaingpt.train_config import TrainConfig, muon_learning_rate

DIST = connect("cpu", "float32")


@pytest.fixture(autouse=True)
def starts_now(monkeypatch):
    """The process of the tests may have run for minutes."""
    monkeypatch.setattr(budget, "STARTED", time.monotonic())


@pytest.fixture
def data():
    """A text of so many tokens: more is not needed to choose."""
    return SimpleNamespace(train=range(10**9), val=range(10**7), tokenizer=SimpleNamespace(vocab_size=2048))


def chosen(data, minutes: float, given: dict | None = None, flop_per_second: float = 1e12) -> TrainConfig:
    """By `choose_settings`, on a machine of that speed."""
    given = given or {}

    def tokens_per_second(config, seconds):
        return flop_per_second / (6 * block_parameters(config))

    config = TrainConfig(minutes=minutes, **given)
    return choose_settings(config, dict.fromkeys(given, "recipe.py"), data, DIST, tokens_per_second)


def test_more_time_or_a_faster_machine_trains_a_larger_model(data):
    sizes = [block_parameters(chosen(data, minutes)) for minutes in (1, 30, 10_000)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert block_parameters(chosen(data, 1, None, 1e15)) > sizes[0]


@pytest.mark.parametrize("until", [64, 128, 192])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_another_speed_for_seconds_while_models_are_timed_does_not_change_the_choice(data, until, factor):
    """Half or twice the speed, until a model of this width has been timed once."""
    speeds = {64: 45_000, 128: 27_000, 192: 19_000, 256: 9_000, 320: 4_500, 384: 3_000}  # of two CPU cores

    def choose(changed_until: int) -> TrainConfig:
        timed = set()

        def tokens_per_second(config, seconds):
            changed = not timed.issuperset(width for width in speeds if width <= changed_until)
            timed.add(config.n_embd)
            return speeds[config.n_embd] * (factor if changed else 1)

        return choose_settings(TrainConfig(minutes=1), {}, data, DIST, tokens_per_second)

    best, found = choose(0), choose(until)
    tokens = [config.max_iters * config.tokens_per_step for config in (best, found)]
    assert best.n_embd == 128 == found.n_embd and abs(tokens[1] / tokens[0] - 1) < 0.01


@pytest.mark.parametrize(("change", "given", "most"), [(1.2, {}, 3), (1, {}, 2), (1.2, dict(n_embd=128, n_layer=2), 1)])
def test_a_model_is_timed_until_two_speeds_agree_if_there_is_a_choice(data, change, given, most):
    timings = collections.Counter()

    def tokens_per_second(config, seconds):
        timings[config] += 1
        return 3e9 / block_parameters(config) * (change if timings[config] == 2 else 1)

    choose_settings(TrainConfig(minutes=1, **given), dict.fromkeys(given, "--n_embd"), data, DIST, tokens_per_second)
    assert max(timings.values()) == most


def test_a_time_that_is_too_short_for_the_steps_is_refused(data):
    given = dict(n_layer=12, n_embd=768, batch_size=12, gradient_accumulation_steps=40)
    with pytest.raises(UserError, match="--minutes=1 is too short for two steps of 491,520 tokens: give more time, or"):
        chosen(data, 1, given | dict(block_size=1024))


def test_micro_steps_that_are_given_divide_the_sequences_of_a_step(data):
    one, four = chosen(data, 1), chosen(data, 1, dict(gradient_accumulation_steps=4))
    assert four.gradient_accumulation_steps == 4 and four.tokens_per_step == one.tokens_per_step


def test_a_small_text_gets_a_small_model(data):
    data.train = range(1_000_000)
    assert block_parameters(chosen(data, 10_000)) <= 12_000_000
    data.train = range(1_000)
    assert chosen(data, 10_000).n_embd == 64


def test_steps_fill_the_time(data):
    config = chosen(data, 30)
    rate = 1e12 / (6 * block_parameters(config))
    tokens = config.max_iters * config.batch_size * config.gradient_accumulation_steps * config.block_size
    assert 0.8 * 1800 < tokens / rate < 0.9 * 1800
    assert config.decay_end == config.max_iters and config.warmup_iters == config.max_iters // 20


def test_what_is_given_stays(data):
    given = dict(n_embd=96, n_head=2, learning_rate=0.5, batch_size=5, dropout=0.3, block_size=17)
    config = chosen(data, 1, given)
    assert given.items() <= vars(config).items()
    assert chosen(data, 1, dict(n_layer=7)).n_layer == 7
    with pytest.raises(UserError, match="--n_head=3 needs an --n_embd that is a multiple of it"):
        chosen(data, 1, dict(n_embd=100, n_head=3))
    assert chosen(data, 1, dict(n_head=6)).n_embd % 6 == 0


@pytest.mark.parametrize(("ids", "layers"), [(66, [2, 3]), (257, [2]), (2048, [1, 2]), (50257, [1, 2])])
def test_characters_get_more_layers_where_there_is_time_and_longer_tokens_one_where_there_is_little(data, ids, layers):
    data.tokenizer.vocab_size = ids
    found = candidates(TrainConfig(n_embd=128), {"n_embd": "recipe.py"}, data, DIST)
    assert [candidate.n_layer for candidate in found] == layers
    assert chosen(data, 0.1, dict(n_embd=128), 1e11).n_layer == layers[0]
    assert chosen(data, 10, dict(n_embd=128)).n_layer == layers[-1]
    assert chosen(data, 0.1, dict(n_embd=128, n_layer=2), 1e11).n_layer == 2


@pytest.mark.parametrize(("better", "worse"), [((1, 128, 0.75e6), (2, 64, 1.12e6)), ((2, 192, 6.8e6), (1, 256, 7.5e6))])
def test_the_law_ranks_a_single_layer_as_measured(better, worse):
    """Layers, channels and tokens of runs on perl and python (bench/results/2026-11-30-minutes.md)."""
    losses = [predicted_loss(TrainConfig(n_layer=n, n_embd=c), tokens, 3_500_000) for n, c, tokens in (better, worse)]
    assert losses[0] < losses[1]


def test_only_wide_models_in_very_long_runs_get_dropout(data):
    text = SimpleNamespace(train=range(10**6), val=range(10**5), tokenizer=data.tokenizer)
    found = [chosen(text, 10, dict(n_embd=width), speed) for width in (128, 512) for speed in (1e11, 1e13)]
    assert [config.dropout for config in found] == [0, 0, 0, 0.2]
    epochs = [config.max_iters * config.tokens_per_step / 1e6 for config in found]
    assert epochs[1] > 100 and epochs[2] < 40 < epochs[3]
    assert chosen(text, 10, dict(n_embd=512, dropout=0.1), 1e13).dropout == 0.1


@pytest.mark.parametrize("text_tokens", [10**6, 10**9])
def test_long_runs_save_every_quarter_of_an_hour_and_print_a_line_every_minute(data, text_tokens):
    data.train, data.val = range(text_tokens), range(10**10)
    for minutes in (3, 30, 600):
        config = chosen(data, minutes, dict(n_embd=64))
        steps_per_minute = config.max_iters / minutes
        intervals = (12 if text_tokens == 10**6 else 4) if minutes < 100 else 40
        assert math.ceil(config.max_iters / intervals) == config.eval_interval <= 15.1 * steps_per_minute
        assert config.log_interval <= steps_per_minute
        evaluated = config.eval_iters * config.batch_size * config.block_size
        assert 0 < evaluated <= 0.03 * min(1, 12 / intervals) * config.max_iters * config.tokens_per_step


def test_a_model_for_which_memory_is_short_is_not_chosen(data):
    def tokens_per_second(config, seconds):
        if config.n_layer > 2:
            raise TooLittleMemory("take at least")
        return 1e9

    assert choose_settings(TrainConfig(minutes=9), {}, data, DIST, tokens_per_second).n_layer == 2
    with pytest.raises(TooLittleMemory, match="take at least"):
        choose_settings(TrainConfig(minutes=9, n_layer=3), {"n_layer": "--n_layer"}, data, DIST, tokens_per_second)


def test_damaged_data_is_not_taken_for_a_lack_of_memory(data):
    def tokens_per_second(config, seconds):
        if config.n_layer > 2:
            raise UserError("the data set has the id 70")
        return 1e9

    with pytest.raises(UserError, match="the id 70"):
        choose_settings(TrainConfig(minutes=9), {}, data, DIST, tokens_per_second)


@pytest.mark.parametrize("error", [TooLittleMemory("take at least"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("processes", [1, 2])
def test_only_what_all_processes_notice_is_survived_by_several(data, monkeypatch, error, processes):
    """If one alone runs out of memory, the others wait for it in a collective operation."""
    monkeypatch.setattr(Distributed, "max", lambda self, number: number)  # no other process is there
    dist = dataclasses.replace(DIST, world_size=processes)

    def tokens_per_second(config, seconds):
        if config.n_layer > 2:
            raise error
        return 1e9

    if processes == 2 and not isinstance(error, TooLittleMemory):
        with pytest.raises(torch.OutOfMemoryError):
            choose_settings(TrainConfig(minutes=9), {}, data, dist, tokens_per_second)
    else:
        assert choose_settings(TrainConfig(minutes=9), {}, data, dist, tokens_per_second).n_layer == 2


def test_short_runs_on_cuda_are_not_compiled(data):
    cuda = Distributed(torch.device("cuda"), torch.bfloat16)

    def compiled(minutes, given=None, dist=cuda):
        config = TrainConfig(minutes=minutes, **(given or {}))
        found = choose_settings(config, dict.fromkeys(given or {}, "--"), data, dist, lambda *_: 1e6)
        return found.compiles_on(dist.device.type)

    assert not compiled(9) and compiled(10)
    assert compiled(9, {"compile": True}) and not compiled(10, dist=DIST)
    found = choose_settings(TrainConfig(minutes=9), {}, data, cuda, lambda *_: 1e6)
    assert found.compile is False  # which recipe.py says, too


def test_micro_batches_are_halved_until_they_fit(data):
    def tokens_per_second(config, seconds):
        if config.batch_size > 3:
            raise TooLittleMemory("take at least")
        return 1e6

    config = choose_settings(TrainConfig(minutes=1), {}, data, DIST, tokens_per_second)
    without_limit = choose_settings(TrainConfig(minutes=1), {}, data, DIST, lambda *_: 1e6)
    assert 1 <= config.batch_size <= 3
    sequences = [c.batch_size * c.gradient_accumulation_steps for c in (config, without_limit)]
    assert sequences[0] == sequences[1] > 3


@pytest.mark.parametrize("name", ["max_iters", "warmup_iters", "lr_decay_iters"])
def test_a_number_of_steps_contradicts_a_time(data, name):
    for plan in (
        lambda *given: extend_run(*given, RunState()),
        lambda *given: choose_settings(*given, data, DIST, None),
    ):
        with pytest.raises(UserError, match=f"--minutes determines {name}: leave out --{name}, or --minutes"):
            plan(TrainConfig(minutes=1), {name: f"--{name}"})


@pytest.fixture
def clock(monkeypatch):
    """The time that `budget` sees: seconds since the start."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(budget, "STARTED", 100.0)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: 100 + now.seconds))
    return now


def test_a_run_ends_early_once_the_loss_rises_after_a_few_epochs(tmp_path, clock, capsys):
    config = TrainConfig(minutes=10, max_iters=1000, eval_interval=100, warmup_iters=50, out_dir=str(tmp_path))
    state, watch = RunState(settings=dataclasses.asdict(config)), SimpleNamespace(seconds=0.0)
    deadline = Deadline(config, state, DIST, watch, epoch_tokens=50 * config.tokens_per_step)
    cases = ((1, 0, 1000), (101, 2, 1000), (301, 0, 1000), (401, 1, 1000), (501, 2, 564), (510, 2, 564))
    for step, since, steps in cases:
        state.step, state.evaluated_at, state.evaluations_since_lowest = step, step - 1, since
        assert deadline.corrected(config).max_iters == steps
        if steps < 1000:
            assert state.settings["max_iters"] == steps
            assert runpy.run_path(tmp_path / "recipe.py")["max_iters"] == steps
            config = dataclasses.replace(config, max_iters=steps)
    assert "ending early: " in (printed := capsys.readouterr().err) and "steps to 564" in printed


def test_many_evaluations_end_a_run_only_if_none_of_an_eighth_of_it_is_lower(tmp_path, clock):
    config = TrainConfig(minutes=10_000, max_iters=100_000, eval_interval=100, warmup_iters=50, out_dir=str(tmp_path))
    state, watch = RunState(settings=dataclasses.asdict(config)), SimpleNamespace(seconds=0.0)
    deadline = Deadline(config, state, DIST, watch, epoch_tokens=50 * config.tokens_per_step)
    for since, steps in ((2, 100_000), (124, 100_000), (125, 90_002)):
        state.step, state.evaluated_at, state.evaluations_since_lowest = 80_001, 80_000, since
        deadline.measured = (80_001, 0.0, 0.0)  # no correction is due
        assert deadline.corrected(config).max_iters == steps


def test_a_resumed_run_does_not_end_early(clock):
    config = TrainConfig(minutes=10, max_iters=1000, eval_interval=100, warmup_iters=50)
    state, watch = RunState(step=400, settings=dataclasses.asdict(config)), SimpleNamespace(seconds=0.0)
    deadline = Deadline(config, state, DIST, watch, epoch_tokens=50 * config.tokens_per_step)
    state.step, state.evaluated_at, state.evaluations_since_lowest = 601, 600, 5
    assert deadline.corrected(config).max_iters == 1000


def simulated(
    clock, config, state, step, first_step, evaluation, first_evaluation, dist=DIST
) -> tuple[TrainConfig, set[int]]:
    """Run to the end, with the seconds that each part takes; `step` depends on the time. Returns every `max_iters`."""
    watch, start, numbers = SimpleNamespace(seconds=0.0), state.step, set()
    deadline = Deadline(config, state, dist, watch, epoch_tokens=math.inf)
    while True:
        config = deadline.corrected(config)
        numbers.add(config.max_iters)
        due = state.step == config.max_iters or state.step % config.eval_interval == 0
        if due and state.step != state.evaluated_at:
            clock.seconds += first_evaluation or evaluation
            state.evaluated_at, first_evaluation = state.step, 0.0
        if state.step >= config.max_iters:
            return config, numbers
        per_step = step(clock.seconds) if state.step > start else first_step
        clock.seconds, watch.seconds, state.step = clock.seconds + per_step, watch.seconds + per_step, state.step + 1


def test_timing_models_takes_a_quarter_of_the_time_at_most(data, clock):
    tried = []

    def tokens_per_second(config, seconds):
        clock.seconds += 7  # as two steps of a large --batch_size may take
        tried.append(config.n_embd)
        return 1e12 / (6 * block_parameters(config))

    choose_settings(TrainConfig(minutes=1), {}, data, DIST, tokens_per_second)
    assert tried == [64, 64, 128]


def test_the_context_of_a_given_shape_follows_from_its_speed(data):
    for flop_per_second, block_size in ((2e10, 64), (1e11, 128), (1e12, 256)):
        config = chosen(data, 10, dict(n_layer=4, n_embd=256), flop_per_second)
        assert config.block_size == block_size


@pytest.mark.parametrize("given", [{}, {"block_size": 512}])
def test_context_and_batch_follow_from_the_speed_of_the_model_that_is_chosen(data, given):
    for minutes in (0.2, 1, 3, 10, 30, 100):
        config = chosen(data, minutes, given)
        millions = config.max_iters * config.tokens_per_step / 1e6
        context = max(64, 2 ** round(math.log2(64 * millions**0.4)))
        assert config.block_size == given.get("block_size", context) and config.tokens_per_step == 32 * context


@pytest.mark.parametrize("given", [{}, {"learning_rate": 0.02}, {"optimizer": "adamw"}])
@pytest.mark.parametrize("text_tokens", [10**4, 10**6, 10**9])
def test_weights_average_over_an_epoch_or_a_shorter_run(data, given, text_tokens):
    data.train = range(text_tokens)
    config = chosen(data, 3, given)
    steps_per_epoch = text_tokens / config.tokens_per_step
    rate = muon_learning_rate(config.n_embd, config.max_iters) / (4 if "optimizer" in given else 1)
    averaged = 1 / (rate * config.weight_decay)
    assert averaged == pytest.approx(max(50, 1 / (1 / config.max_iters + 1 / steps_per_epoch)), rel=0.06)
    assert chosen(data, 3, given | {"weight_decay": 0.05}).weight_decay == 0.05


@pytest.mark.parametrize("slower", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("changes", [math.inf, 200, 500])
@pytest.mark.parametrize("first_evaluation", [4, 20])
def test_a_run_ends_in_time_on_a_machine_of_another_speed(tmp_path, clock, slower, changes, first_evaluation):
    """changes: when steps begin to take 1.5 times as long. The other evaluations take 4 seconds."""
    config = TrainConfig(minutes=10, max_iters=1000, eval_interval=200, warmup_iters=50, out_dir=str(tmp_path))
    state = RunState(settings=dataclasses.asdict(config))
    first_step = 0.5 * slower
    config, numbers = simulated(
        clock,
        config,
        state,
        lambda t: first_step * (1.5 if t > changes else 1),
        first_step,
        4,
        first_evaluation,
    )
    assert abs(clock.seconds - 600) < (0.03 if changes == 500 else 0.02) * 600
    assert len(numbers) <= (2 if first_evaluation == 4 else 3) or changes < math.inf  # with the first one
    assert state.settings["max_iters"] == config.max_iters == config.decay_end


def test_on_a_gpu_the_slow_first_evaluation_does_not_count_for_the_others(tmp_path, clock):
    config = TrainConfig(minutes=5, max_iters=1000, eval_interval=84, warmup_iters=50, out_dir=str(tmp_path))
    state = RunState(settings=dataclasses.asdict(config))
    cuda = SimpleNamespace(device=torch.device("cuda"), max=DIST.max, synchronize=lambda: None, is_main=True)
    _, corrections = simulated(clock, config, state, lambda now: 0.255, 0.255, 1, 30, cuda)
    assert min(corrections) > 850 and 291 < clock.seconds < 309


@pytest.mark.parametrize("evaluated_at", [None, 1000])
def test_a_slow_first_step_of_few_does_not_end_a_resumed_run(clock, evaluated_at):
    config = TrainConfig(minutes=3, max_iters=1020, eval_interval=2000, warmup_iters=50)
    state = RunState(step=1000, evaluated_at=evaluated_at, settings=dataclasses.asdict(config))
    simulated(clock, config, state, lambda now: 6.0, 40.0, 3, 3)
    assert 150 < clock.seconds < 190


def test_a_run_whose_time_is_over_ends_after_the_next_step(tmp_path, clock):
    config = TrainConfig(minutes=0.2, max_iters=240, eval_interval=60, warmup_iters=12, out_dir=str(tmp_path))
    state = RunState(settings=dataclasses.asdict(config))
    simulated(clock, config, state, lambda now: 0.05, 13.0, 0.5, 0.5)
    assert state.step == 12 + 1  # the number is first corrected after a twentieth of the steps


def run_for(data_dir, out_dir, minutes, *more, **settings):
    here = dict(out_dir=out_dir, data_dir=data_dir, device="cpu", dtype="float32", sample_tokens=0, minutes=minutes)
    ended = run_main("train", *more, *flags(**here | settings))
    assert ended.status == 0, ended.err
    return ended


SMALL = dict(dataset="tiny", n_layer=1, n_embd=8, n_head=1, block_size=8, batch_size=2)


def test_its_recipe_trains_the_same_model_again(tmp_path, data_dir):
    ended = run_for(data_dir, tmp_path / "run", 0.05, **SMALL, eval_interval=10**6)
    assert "lowest predicted loss in 0.05 min" in ended.err
    recipe = tmp_path / "recipe.py"
    (tmp_path / "run" / "recipe.py").rename(recipe)
    state = load_state(tmp_path / "run" / "last")[0]
    assert runpy.run_path(str(recipe))["max_iters"] == state.step == state.settings["max_iters"]
    weights = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    again = run_main("train", recipe, *flags(data_dir=data_dir, device="cpu", sample_tokens=0))
    assert again.status == 0, again.err
    assert (tmp_path / "run.1").exists()
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == weights


def test_a_finished_run_goes_on_for_a_time(tmp_path, data_dir, train):
    train(tmp_path / "run")
    ended = run_for(data_dir, tmp_path / "run", 0.02, init_from="resume")
    state = load_state(tmp_path / "run" / "last")[0]
    assert state.step == state.settings["max_iters"] > 6 and state.settings["lr_decay_iters"] is None, ended.err
    assert "changed on resume: max_iters=" in ended.err


def test_a_run_that_is_restarted_keeps_its_number_of_steps(tmp_path, data_dir):
    """As torchrun or Slurm do with the same command, after a failure or at its end."""
    run_for(data_dir, tmp_path / "run", 0.03, **SMALL, init_from="auto")
    before = load_state(tmp_path / "run" / "last")[0]
    ended = run_for(data_dir, tmp_path / "run", 0.03, **SMALL, init_from="auto")
    assert "--minutes is ignored: the run keeps its number of steps" in ended.err
    assert f"the run is complete at step {before.step}; to train longer: --init_from=resume" in ended.err
    assert load_state(tmp_path / "run" / "last")[0] == before


def test_a_run_that_continues_another_is_compiled_if_that_was():
    for given, compiled in (False, False), (None, True):
        state = RunState(step=5, settings=dataclasses.asdict(TrainConfig(compile=given)))
        config, _ = resumed_settings(TrainConfig(minutes=600), {}, state, Path("last"))
        assert config.compiles_on("cuda") == compiled


def test_a_model_that_is_timed_is_in_memory_once(tmp_path, data_dir, tiny_run):
    def models() -> int:
        return sum(type(thing) is GPT for thing in gc.get_objects())

    found, before = [], models()
    config = TrainConfig(minutes=1, dataset="tiny", init_from=str(tiny_run / "best"))
    data = open_data_set(data_dir / "tiny")
    choose_settings(config, {}, data, DIST, lambda *_: found.append(models()) or 1e6)
    assert found and max(found) <= before


def test_a_model_is_finetuned_for_a_time_with_a_recipe(tmp_path, data_dir, tiny_run):
    recipe = "max_iters = 1000000000\nwarmup_iters = 1000000\nlog_interval = 7\nbeta2 = 0.9\n"
    (tmp_path / "recipe.py").write_text(recipe)
    model = dict(dataset="tiny", init_from=tiny_run / "best", learning_rate=1e-3)
    run_for(data_dir, tmp_path / "run", 0.03, tmp_path / "recipe.py", **model)
    state = load_state(tmp_path / "run" / "last")[0]
    settings = state.settings
    assert settings["max_iters"] == state.step < 1e9 and settings["warmup_iters"] < 1e6
    assert settings["beta2"] == 0.9 and settings["n_embd"] == 16 and settings["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(dataset="other"), "not prepared with the tokenizer of {}/best"),
        (dict(n_layer=5), "n_layer=5: {}/best has another shape; give --n_layer=2, or leave"),
        (dict(block_size=64), "block_size=64: {}/best has 16 positions"),
        (dict(init_from="scratch", block_size=1000), "the val split has 400 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_models_are_timed(tmp_path, data_dir, tiny_run, changed, message):
    here = dict(dataset="tiny", data_dir=data_dir, out_dir=tmp_path / "run", device="cpu", minutes=1)
    ended = run_main("train", *flags(**here | {"init_from": tiny_run / "best"} | changed))
    assert ended.status == 2 and message.format(tiny_run) in ended.err and len(ended.err.splitlines()) == 1


def test_the_dropout_of_a_pretrained_model_is_not_taken_over(tmp_path, data_dir, tiny_run):
    shutil.copytree(tiny_run / "best", tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", resid_pdrop=None)
    run_for(data_dir, tmp_path / "run", 0.03, dataset="tiny", init_from=tmp_path / "model", learning_rate=1e-9)
    assert load_state(tmp_path / "run" / "last")[0].settings["dropout"] in (0, 0.2)  # 0.2: for many epochs


def test_the_rate_that_is_chosen_for_finetuning_has_two_digits(tmp_path, data_dir, tiny_run):
    run_for(data_dir, tmp_path / "run", 0.03, dataset="tiny", init_from=tiny_run / "best", optimizer="adamw")
    rate = load_state(tmp_path / "run" / "last")[0].settings["learning_rate"]
    assert 0 < rate == float(f"{rate:.2g}")


def test_a_dry_run_writes_nothing(tmp_path, data_dir):
    assert "lowest predicted loss" in run_for(data_dir, tmp_path / "run", 0.05, **SMALL, dry_run=True).err
    assert not (tmp_path / "run").exists()


def test_the_rest_of_the_time_of_a_run_of_no_seconds_is_positive():
    state = RunState(step=5, seconds=0.0, settings=dataclasses.asdict(TrainConfig(warmup_iters=2)))
    config, given = extend_run(TrainConfig(minutes=0.001), {}, state)
    assert config.max_iters > 5 and config.warmup_iters == 2
    assert given.keys() == {"max_iters", "warmup_iters", "lr_decay_iters"}


def test_a_run_that_goes_on_from_its_warmup_for_a_short_time_decays():
    state = RunState(step=20, seconds=20.0, settings=dataclasses.asdict(TrainConfig(warmup_iters=200)))
    assert extend_run(TrainConfig(minutes=1), {}, state)[0].warmup_iters == 20


def test_a_recipe_has_every_setting_that_is_not_a_default(tmp_path):
    given = dict(learning_rate=0.01, lr_schedule="cosine", min_lr=0.0, init_from="auto")
    config = TrainConfig(minutes=1, **given, out_dir=str(tmp_path))
    write_recipe(config)
    names = runpy.run_path(str(tmp_path / "recipe.py"))
    assert (names["min_lr"], names["init_from"], names["learning_rate"]) == (0.0, "scratch", 0.01)
    assert {"minutes", "n_embd", "lr_decay_iters"}.isdisjoint(names)


def test_adamw_gets_a_lower_learning_rate_than_muon(data):
    assert chosen(data, 1, dict(optimizer="adamw")).learning_rate == chosen(data, 1).learning_rate / 4


def test_a_recipe_of_the_user_stays_and_a_full_disk_is_only_noted(tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("n_embd = 32\n")
    write_recipe(TrainConfig(minutes=1, out_dir=str(tmp_path)))
    assert recipe.read_text() == "n_embd = 32\n" and "it is not replaced" in capsys.readouterr().err
    recipe.unlink()
    recipe.mkdir()
    write_recipe(TrainConfig(minutes=1, out_dir=str(tmp_path)))
    assert "the settings are not saved: " in capsys.readouterr().err
