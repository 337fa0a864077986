"""Settings: where values come from, what is refused, and the messages."""

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from plaingpt.console import UserError
from plaingpt.settings import Fraction, NonNegativeInt, PathName, Positive, PositiveInt, Range, load_settings
from prepare_data import PrepareConfig
from sample import SampleConfig
from tools.to_gguf import ExportConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "config").glob("*.py"))


@dataclass
class Cake:
    layers: PositiveInt = 3
    """how many"""
    candles: NonNegativeInt | None = None
    """by default none are bought"""
    sugar: Positive = 0.5
    """kilograms"""
    glaze_share: Fraction = 0.25
    """of the surface"""
    flour: Annotated[float, Range("above 0, at most 2", lambda x: 0 < x <= 2)] | None = None
    """kilograms"""
    icing: Literal["plain", "lemon"] = "plain"
    """its taste"""
    sliced: bool = False
    """before it is sold"""
    warm: bool | None = None
    """None: as the oven decides"""
    label: str = "\n"
    """100% free text"""
    recipe_book: PathName = ""
    """where it is written"""

    RETIRED: ClassVar = {"lard": "not needed, butter is used"}


@dataclass
class Order:
    items: list[str] = field(default_factory=list)
    """what is wanted"""
    cheap: bool = False
    """look at the price"""


def load(*argv):
    return load_settings(Cake, list(map(str, argv)))[0]


def refusal(*argv) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.py") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


# where values come from


def test_without_arguments_the_defaults_hold():
    assert load() == Cake()


def test_files_override_defaults_later_files_earlier_ones_and_flags_all(recipe):
    first = recipe("layers = 1\nsugar = 0.1\nlabel = 'first'", "first.py")
    second = recipe("sugar = 0.2\nlabel = 'second'", "second.py")
    cake, given = load_settings(Cake, [str(first), "--label=flag", str(second)])
    assert cake == Cake(layers=1, sugar=0.2, label="flag")
    assert given == {"layers": str(first), "sugar": str(second), "label": "--label"}


def test_a_flag_with_its_default_value_still_overrides_a_file(recipe):
    assert load(recipe("layers = 7"), "--layers=3").layers == 3


def test_positional_arguments_can_be_a_field_instead_of_recipes():
    order, given = load_settings(Order, ["a.txt", "--cheap=True", "b.txt"], positional="items")
    assert (order.items, order.cheap) == (["a.txt", "b.txt"], True)
    assert given == {"cheap": "--cheap"}


# names


def test_a_misspelled_name_in_a_file_is_refused_with_the_file_and_the_nearest_name(recipe):
    path = recipe("glazeshare = 0.1")
    assert refusal(path) == f"{path}: unknown setting glazeshare; did you mean glaze_share? {own('glazeshare')}"


def own(name: str) -> str:
    return f"(for a variable of your own, write _{name})"


def test_a_name_similar_to_none_is_refused_with_a_hint_to_help(recipe):
    path = recipe("qqq = 1")
    assert refusal(path) == f"{path}: unknown setting qqq; --help lists them {own('qqq')}"


def test_a_retired_flag_gives_a_note_only(capsys):
    assert load("--lard", "1", "--layers=2") == Cake(layers=2)
    assert capsys.readouterr() == ("", "--lard: not needed, butter is used\n")


def test_a_retired_switch_needs_no_value(capsys):
    assert load("--lard", "--layers=2") == Cake(layers=2)
    assert "lard: not needed" in capsys.readouterr().err
    assert refusal("--lard", "nothing.py").startswith("nothing.py: recipe not found")


def test_a_retired_name_in_a_file_gives_a_note_only(recipe, capsys):
    path = recipe("lard = 1\nlayers = 2")
    assert load(path) == Cake(layers=2)
    assert capsys.readouterr() == ("", f"{path}: lard: not needed, butter is used\n")


# values


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--layers=12", "layers", 12),
        ("--candles=0", "candles", 0),
        ("--candles=None", "candles", None),
        ("--sugar=1", "sugar", 1.0),
        ("--sugar=2e-3", "sugar", 0.002),
        ("--glaze_share=1", "glaze_share", 1.0),
        ("--flour=2", "flour", 2.0),
        ("--icing=lemon", "icing", "lemon"),
        ("--sliced=True", "sliced", True),
        ("--sliced=1", "sliced", True),
        ("--warm=false", "warm", False),
        ("--warm=0", "warm", False),
        ("--label=12", "label", "12"),
        ("--label=None", "label", "None"),
        ("--label=a=b=c", "label", "a=b=c"),
        ("--label=--layers=9", "label", "--layers=9"),
        ("--label=", "label", ""),
    ],
)
def test_a_flag_is_read_as_its_type(flag, name, value):
    changed = Cake(candles=4, sliced=False, warm=True, label="x")  # differs from what most flags give
    cake = load("--candles=4", "--warm=True", "--label=x", flag)
    assert getattr(cake, name) == value and type(getattr(cake, name)) is type(value)
    assert all(getattr(cake, other) == getattr(changed, other) for other in vars(cake) if other != name)


def test_a_flag_and_its_value_may_be_two_arguments():
    assert load("--layers", "5").layers == 5
    assert load("--label", "-5").label == "-5"


def test_a_dash_in_a_name_is_an_underscore():
    cake, given = load_settings(Cake, ["--glaze-share=1"])
    assert cake.glaze_share == 1 and given == {"glaze_share": "--glaze_share"}


def test_a_tilde_is_the_home_directory_in_a_path_and_a_tilde_in_a_text(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/baker")
    assert load("--recipe_book=~/book", "--label=~/book").recipe_book == "/home/baker/book"
    assert load("--recipe_book=~/book", "--label=~/book").label == "~/book"
    assert load(recipe("recipe_book = '~/book'")).recipe_book == "/home/baker/book"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--suger=1", "--suger: unknown setting suger; did you mean sugar?"),
        ("--suger", "--suger: unknown setting suger; did you mean sugar?"),
        ("--layer=2", "--layer: unknown setting layer; did you mean layers?"),  # not an abbreviation
        ("--qqq=1", "--qqq: unknown setting qqq; --help lists them"),
        ("-sugar=2", "-sugar=2: flags begin with --"),
        ("--sugar", "--sugar needs a value: --sugar=…"),
        ("--sugar --sliced", "--sugar needs a value: --sugar=…"),
        ("--recipe_book=", "--recipe_book is empty"),
        ("--layers=0", "--layers must be int (at least 1), not 0"),
        ("--layers=2.5", "--layers must be int (at least 1), not 2.5"),
        ("--layers=True", "--layers must be int (at least 1), not 'True'"),
        ("--layers=None", "--layers must be int (at least 1), not 'None'"),
        ("--candles=-1", "--candles must be int (at least 0), not -1"),
        ("--sugar=0", "--sugar must be float (above 0, at most 1e30), not 0.0"),
        ("--sugar=inf", "--sugar must be float (above 0, at most 1e30), not inf"),
        ("--sugar=nan", "--sugar must be float (above 0, at most 1e30), not nan"),
        ("--sugar=much", "--sugar must be float (above 0, at most 1e30), not 'much'"),
        ("--glaze_share=1.01", "--glaze_share must be float (from 0 to 1), not 1.01"),
        ("--glaze_share=nan", "--glaze_share must be float (from 0 to 1), not nan"),
        ("--icing=rum", "--icing must be plain|lemon, not 'rum'"),
        ("--sliced=yes", "--sliced must be True|False, not 'yes'"),
        (f"--layers={'9' * 5000}", f"--layers must be int (at least 1), not '{'9' * 99}"),
    ],
)
def test_an_impossible_flag_is_refused_with_what_is_possible(flags, message):
    assert refusal(*flags.split()) == message


def test_a_bare_switch_is_true_and_takes_nothing_that_follows():
    assert load("--sliced").sliced is load("--sliced", "--layers=2").sliced is load("--warm").warm is True
    assert load("--sliced", "False").sliced is False
    order, _ = load_settings(Order, ["--cheap", "a.txt"], positional="items")
    assert (order.items, order.cheap) == (["a.txt"], True)


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("layers = 1e1", "layers", 10),
        ("sugar = 1", "sugar", 1.0),
        ("candles = None", "candles", None),
        ("warm = False", "warm", False),
        ("icing = 'lemon'", "icing", "lemon"),
    ],
)
def test_a_file_gives_python_values(recipe, assignment, name, value):
    cake = load(recipe(assignment))
    assert getattr(cake, name) == value and type(getattr(cake, name)) is type(value)


@pytest.mark.parametrize(
    ("assignment", "found"),
    [
        ("layers = '3'", "'3'"),
        ("layers = 2.5", "2.5"),
        ("layers = True", "True"),
        ("layers = None", "None"),
        ("layers = 0", "0"),
        ("layers = [3]", "[3]"),
        ("sugar = float('nan')", "nan"),
        ("sugar = True", "True"),
        ("sliced = 1", "1"),
        ("icing = 'rum'", "'rum'"),
        ("label = 5", "5"),
    ],
)
def test_an_impossible_value_in_a_file_is_refused_with_file_setting_and_value(recipe, assignment, found):
    path, name = recipe(assignment), assignment.split()[0]
    message = refusal(path)
    assert message.startswith(f"{path}: {name} must be ") and message.endswith(f", not {found}")


# recipes


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    (run := tmp_path / "out-quickstart").mkdir()  # and not config/quickstart.py
    assert refusal(run) == f"{run}: recipe not found; settings are written --name=value, such as --out_dir={run}"
    assert refusal("config/nowhere.py") == "config/nowhere.py: recipe not found; settings are written --name=value"
    assert refusal("config/quikstart.py").startswith(
        "config/quikstart.py: recipe not found; did you mean config/quickstart.py?"
    )


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("layers = 1 / 0", ", line 1", "ZeroDivisionError"),
        ("layers = ", "", "SyntaxError"),  # its own message ends with the line
        ("_a = 1\n\n_c = b", ", line 3", "NameError"),
        ("def f():\n    return 1 / 0\n\nlayers = f()", ", line 2", "ZeroDivisionError"),
    ],
)
def test_a_recipe_that_does_not_run_is_refused_with_its_error(recipe, text, line, error):
    path = recipe(text)
    assert refusal(path).startswith(f"{path}{line}: the recipe failed: {error}: ")


def test_a_recipe_in_nanogpts_style_loads(recipe):
    path = recipe(
        "import time\n"
        "from math import sqrt\n"
        "out_dir = 'out-shakespeare'\n"
        "gradient_accumulation_steps = 5 * 8\n"
        "_half = 6\n"
        "def double(x): return 2 * x\n"
        "n_layer = double(_half)\n"
        "wandb_run_name = 'ft-' + str(time.time())\n"
        "learning_rate = sqrt(1e-6)\n"
        "always_save_checkpoint = False\n"
    )
    config, given = load_settings(TrainConfig, [str(path)])
    assert (config.out_dir, config.gradient_accumulation_steps, config.n_layer) == ("out-shakespeare", 40, 12)
    assert config.wandb_run_name.startswith("ft-") and float(config.wandb_run_name[3:]) > 0
    assert config.learning_rate == pytest.approx(1e-3)
    assert "_half" not in given and "double" not in given and "time" not in given


def test_a_recipe_has_the_names_that_nanogpt_gave_it(recipe):
    path = recipe(
        "dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float32'\n"
        "learning_rate = 1e-3\n"
        "min_lr = learning_rate / 10\n"  # assigned above
        "batch_size *= 2\n"  # a default
        "def steps(): return max_iters // 100\n"
        "warmup_iters = steps()\n"
        "out_dir = os.path.join('out', str(int(np.sqrt(4) + math.floor(time.time() * 0))))\n"
    )
    config, given = load_settings(TrainConfig, [str(path)])
    assert config.dtype in ("bfloat16", "float32") and config.min_lr == pytest.approx(1e-4)
    assert (config.batch_size, config.warmup_iters, config.out_dir) == (24, 6000, os.path.join("out", "2"))
    assert given.keys() == {"dtype", "learning_rate", "min_lr", "batch_size", "warmup_iters", "out_dir"}


def test_numbers_of_numpy_are_numbers(recipe):
    config = load(recipe("sugar = np.sqrt(4)\nlayers = np.int64(7)\nsliced = np.bool_(True)"))
    assert repr((config.sugar, config.layers, config.sliced)) == "(2.0, 7, True)"


def test_a_recipe_sees_what_an_earlier_one_assigned(recipe):
    first, second = recipe("layers = 5", "first.py"), recipe("candles = 2 * layers", "second.py")
    assert load(first, second).candles == 10
    assert load(second, first, "--layers=1").candles == 6


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (TrainConfig, ["out_dir", "data_dir", "init_from"]),
        (SampleConfig, ["out_dir", "init_from", "prompts"]),
        (ExportConfig, ["out"]),
    ],
)
def test_every_path_may_begin_with_a_tilde(cls, names, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    config, _ = load_settings(cls, [f"--{name}=~/x" for name in names])
    assert [getattr(config, name) for name in names] == ["/home/user/x"] * len(names)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_loads_without_a_note(path, capsys):
    _, given = load_settings(TrainConfig, [str(path)])
    assert given
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig, PrepareConfig])
def test_help_explains_every_setting_and_fits_the_terminal(cls, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["x.py"])
    positional = "sources" if cls is PrepareConfig else "recipes"
    with pytest.raises(SystemExit) as ended:
        load_settings(cls, ["--help"], positional)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(len(line) <= columns for line in text.splitlines() if line.startswith("  "))
    words = " ".join(text.split())
    for name in {setting.name for setting in dataclasses.fields(cls)} - {positional}:
        assert re.search(rf" --{name} [\w|]+ (?!--)\S", words), name


def test_help_shows_a_percent_sign_and_a_line_break_as_they_are_written(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    text = capsys.readouterr().out
    assert "100% free text" in text and r"(default: '\n')" in text


def test_a_misspelled_flag_of_a_script_is_status_2_and_one_line():
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--vocab=3"]
    ended = subprocess.run(command, capture_output=True, text=True)
    line = "prepare_data.py: --vocab: unknown setting vocab; did you mean vocab_size?\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
