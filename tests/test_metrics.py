import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import run_main

from plaingpt.console import note
from plaingpt.metrics import Metrics, Stopwatch, curves, draw_runs, log_line, read_metrics

PNG = b"\x89PNG"


def write_run(out_dir, count=3):
    metrics = Metrics(out_dir, active=True)
    for step in range(1, count + 1):
        metrics.write(step=step, train_loss=3.0 / step, val_loss=None)
    metrics.write(step=count, val_loss=1.25)
    metrics.close()
    return metrics


def test_a_record_is_a_line_of_json_without_what_is_none(tmp_path):
    write_run(tmp_path / "run", 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "train_loss": 3.0}, {"step": 1, "val_loss": 1.25}]


def test_numbers_come_back_exactly(tmp_path):
    metrics = Metrics(tmp_path, active=True)
    metrics.write(step=1, train_loss=0.1 + 0.2, lr=1.23456789e-9)
    assert read_metrics(metrics.path) == [{"step": 1, "train_loss": 0.1 + 0.2, "lr": 1.23456789e-9}]


def test_a_new_record_starts_anew_and_a_resumed_one_keeps_the_lines_up_to_its_step(tmp_path):
    before = write_run(tmp_path).path.read_bytes()
    resumed = Metrics(tmp_path, active=True, resumed_from=2)
    resumed.write(step=3, train_loss=9.0)
    resumed.close()
    assert [record["train_loss"] for record in read_metrics(resumed.path)] == [3.0, 1.5, 9.0]
    assert resumed.path.read_bytes().startswith(before), "a record was lost"
    assert read_metrics(Metrics(tmp_path, active=True).path) == []


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = write_run(tmp_path, 2).path
    path.write_text(path.read_text() + '{"step": 3, "train_lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 2]
    Metrics(tmp_path, active=True, resumed_from=2).write(step=3, train_loss=1.0)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 2, 3]


@pytest.mark.skipif(os.name == "nt", reason="no limits for the size of a file")
def test_after_a_full_disk_no_record_is_appended_to_a_cut_one(tmp_path):
    path = write_run(tmp_path, 2).path
    metrics = Metrics(tmp_path, active=True, resumed_from=1)
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limits[1]))
        metrics.write(step=2, train_loss=7.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    metrics.write(step=3, train_loss=1.0)
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path / "run", active=False)
    metrics.track({"wandb_log": True})
    metrics.write(step=1, train_loss=1.0)
    metrics.draw()
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_a_picture_is_drawn_from_time_to_time_or_at_once(tmp_path, monkeypatch):
    metrics, picture = Metrics(tmp_path, active=True), tmp_path / "loss.png"
    metrics.write(step=8, train_loss=2.0)
    metrics.draw()
    assert not picture.exists()  # the run has just begun
    monkeypatch.setattr("plaingpt.metrics.SECONDS_BETWEEN_PICTURES", 0)
    metrics.draw()
    picture.unlink()
    metrics.draw()
    assert not picture.exists()  # nothing is new
    monkeypatch.undo()
    metrics.write(step=9, train_loss=1.0)
    metrics.draw()
    assert not picture.exists()
    metrics.draw(at_once=True)
    assert picture.read_bytes().startswith(PNG)


def test_no_picture_without_losses(tmp_path):
    Metrics(tmp_path, active=True).draw(at_once=True)
    assert not (tmp_path / "loss.png").exists()


def plotted(figure) -> dict[str, list]:
    """Label and points of each line."""
    return {line.get_label(): list(zip(*line.get_data())) for line in figure.axes[0].lines}


def test_the_curves_are_the_records(tmp_path):
    metrics = Metrics(tmp_path, active=True)
    metrics.write(step=2, val_loss=5.0, val_bpb=2.5)
    metrics.write(step=2, train_loss=4.0, lr=0.5, grad_norm=1.5, tokens_per_second=10.0)
    metrics.write(step=9, train_loss=1.0)  # lost: the run goes on from step 4
    metrics.close()
    metrics = Metrics(tmp_path, active=True, resumed_from=4)
    metrics.write(step=6, train_loss=3.0, lr=0.25, grad_norm=1.25, tokens_per_second=20.0)
    metrics.write(step=6, val_loss=4.5)
    metrics.write(step=8, train_loss=2.0)
    assert [record.get("resumed_from") for record in read_metrics(metrics.path)] == [None, None, 4, None, None]
    assert plotted(curves([tmp_path])) == {
        "training": [(2, 4.0), (6, 3.0), (8, 2.0)],
        "validation, lowest 4.500": [(2, 5.0), (6, 4.5)],
    }


def test_the_high_losses_of_the_start_do_not_flatten_the_rest(tmp_path):
    metrics = Metrics(tmp_path, active=True)
    for step in range(1, 101):
        metrics.write(step=step, train_loss=10.0 if step < 3 else 2.0 - step / 200)
    low, high = curves([tmp_path]).axes[0].get_ylim()
    assert 1 < low < 1.5 and high < 7


def test_the_loss_of_the_start_alone_is_not_late(tmp_path):
    metrics = Metrics(tmp_path, active=True)
    metrics.write(step=0, val_loss=10.0)
    for step in range(1, 101):
        metrics.write(step=step, train_loss=2.0 - step / 200)
    assert curves([tmp_path]).axes[0].get_ylim()[1] < 3


def test_the_late_losses_of_each_run_are_within_the_axes(tmp_path):
    for name, steps, loss in (("long", 100, 1.0), ("short", 4, 3.0)):
        metrics = Metrics(tmp_path / name, active=True)
        for step in range(1, steps + 1):
            metrics.write(step=step, train_loss=loss - step / 1000)
    low, high = curves([tmp_path / "long", tmp_path / "short"]).axes[0].get_ylim()
    assert low < 0.9 and high > 3


def test_several_runs_are_told_apart_in_one_picture(tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        write_run(tmp_path / name, count)
    figure = curves([tmp_path / "a", tmp_path / "b"])
    kinds = ("training", "validation, lowest 1.250")
    assert [*plotted(figure)] == [f"{tmp_path}/{name}: {kind}" for name in "ab" for kind in kinds]
    colors = {line.get_label().partition(":")[0]: line.get_color() for line in figure.axes[0].lines}
    assert colors[f"{tmp_path}/a"] != colors[f"{tmp_path}/b"]


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    for name, loss in (("a", 3.0), ("b", 1.5)):
        metrics = Metrics(tmp_path / name, active=True)
        metrics.write(step=1, val_loss=loss, val_bpb=1.25)
    losses = plotted(curves([tmp_path / "a", tmp_path / "b"]))
    assert [*losses] == [f"{tmp_path}/{name}: validation, lowest 1.250" for name in ("a", "b")]


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    metrics = Metrics(tmp_path, active=True)
    metrics.write(step=1, train_loss=1.0)
    metrics.draw(at_once=True)
    assert capsys.readouterr().err.startswith("cannot draw loss.png: ")


def test_a_name_with_dollar_signs_is_not_mathematics(tmp_path):
    write_run(tmp_path / r"a$\frac{$")
    assert draw_runs([tmp_path / r"a$\frac{$", tmp_path / r"a$\frac{$"], tmp_path / "picture.png")


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("_a", "b"):
        write_run(Path(name))
    (axes,) = curves([Path("_a"), Path("b")]).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(texts) == len(axes.lines) and texts[0].startswith("_a: ")


def test_the_script_compares_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert run_main("tools.compare_runs", "a", "b").status == 0
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)


def test_the_script_names_a_folder_without_a_run(tmp_path):
    ended = run_main("tools.compare_runs", tmp_path)
    assert (ended.status, ended.err) == (2, f"compare_runs.py: {tmp_path} has no metrics.jsonl\n")
    assert run_main("tools.compare_runs").status == 2
    assert (helped := run_main("tools.compare_runs", "--help")).status == 0 and "directories of runs" in helped.out


def test_the_script_does_not_say_that_it_drew_what_it_did_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert run_main("tools.compare_runs", ".").err == "compare_runs.py: the runs have no losses to plot yet\n"
    write_run(tmp_path / "run")
    (tmp_path / "compare.png").mkdir()
    ended = run_main("tools.compare_runs", "run")
    assert (ended.status, ended.err.count("\n")) == (2, 1) and "compare.png: it exists but is not a file" in ended.err


def test_a_stopwatch_counts_only_while_it_goes():
    watch = Stopwatch(100.0)
    time.sleep(0.01)
    assert watch.seconds == 100.0
    watch.go()
    time.sleep(0.01)
    watch.go()  # it goes already
    watch.pause()
    stopped = watch.seconds
    assert stopped >= 100.01
    time.sleep(0.01)
    assert watch.seconds == stopped


def test_a_stopwatch_counts_updates_per_second_of_training():
    watch = Stopwatch(100.0, step=10)
    watch.go()
    time.sleep(0.05)
    watch.pause()
    assert 0 < watch.rate(15) <= 100
    watch.go()
    time.sleep(0.05)
    watch.pause()
    assert 0 < watch.rate(16) <= 20


def test_a_log_line_has_the_figures_and_the_time_left():
    record = dict(step=4, train_loss=2.5, lr=1e-3, grad_norm=0.5, tokens_per_second=1234.5)
    line = "step 4/10 | loss 2.5000 | lr 1.00e-03 | norm 0.50 | 1,234 tok/s"
    assert log_line(record, 10, 65) == f"{line} | 01:05 left"
    assert log_line(record | dict(mfu=0.4, skipped=2), 10, 65) == f"{line}, mfu 40.0% | 2 skipped | 01:05 left"


def test_a_run_goes_on_when_nobody_listens_any_more(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stderr = open(writer, "w", buffering=1)  # noqa: SIM115 (closing it fails too)
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(BrokenPipeError):
        print("nobody hears it", file=sys.stderr)
    note("nor this")
    with pytest.raises(BrokenPipeError):
        stderr.close()


def test_a_new_run_keeps_the_file_that_was_there_under_another_name(tmp_path):
    for i, content in enumerate(("my notes", '{"step": 1, "train_loss": 2}\n'), 1):
        (tmp_path / "metrics.jsonl").write_text(content)
        Metrics(tmp_path, True).close()
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        assert (tmp_path / f"metrics.jsonl.{i}").read_text() == content


def test_lines_that_are_no_records_are_left_out(tmp_path):
    lines = b'{"step": 1, "lr": 2}\n[]\n3\n{"lr": 1}\n{"step": "x"}\n\xff\n{"step": 2, "lr": NaN}\n'
    lines += b'{"step": 3, "lr": 1' + b"0" * 320 + b"}\n" + b"[" * 10**5  # a number too large to draw, and no JSON
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "lr": 2}]
