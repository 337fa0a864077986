"""Weights & Biases: what it records, across a resume, and that a run never depends on it."""

import json
import struct
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

from plaingpt.metrics import read_metrics
from plaingpt.run_state import load_state


def wandb_records(folder: Path) -> list:
    """The records of an offline run, once wandb's service has written the last of them, which it may do after `finish`.

    They are protobuf messages in LevelDB's log format: 32 KiB blocks after 7 header bytes.
    """
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("*.wandb")
    for _ in range(600):
        content, at, found, message = path.read_bytes(), 7, [], b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # padding: no room for a header
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
            message += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4) and at <= len(content):  # a complete record, or its last fragment
                found.append(pb2.Record.FromString(message))
                message = b""
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} is incomplete")


def test_wandb_records_metrics_and_a_resumed_run_continues(tmp_path, train, resume, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out_dir = tmp_path / "run"
    settings = dict(wandb_log=True, wandb_project="tests", wandb_run_name="tiny")
    train(out_dir, max_iters=3, **settings)
    first = read_metrics(out_dir / "metrics.jsonl")
    time.sleep(1.1)  # wandb names the folder of a run by the second
    resume(out_dir, max_iters=6, learning_rate=1e-3)
    (identity,) = (out_dir / "wandb_run_id").read_text().split()
    folders = sorted((out_dir / "wandb").glob(f"offline-run-*-{identity}"), key=lambda path: path.stat().st_mtime)
    assert len(folders) == 2
    for folder, written in zip(folders, (first, read_metrics(out_dir / "metrics.jsonl")[len(first) :])):
        found = wandb_records(folder)
        (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (identity, "tests", "tiny")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["n_embd"] == TINY["n_embd"] and config["learning_rate"] == (
            1e-3 if folder is folders[1] else 1e-2
        )
        assert config["lr_decay_iters"] == config["max_iters"] and config["min_lr"] == 0  # not None
        histories = [
            {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            for record in found
            if record.WhichOneof("record_type") == "history"
        ]
        own = [{k: v for k, v in history.items() if not k.startswith("_")} for history in histories]
        assert own == written
    assert load_state(out_dir / "last")[0].step == 6


def test_a_new_run_has_a_new_id_in_wandb(tmp_path, train, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = set()
    for _ in range(2):
        train(tmp_path / "run", max_iters=1, wandb_log=True)
        found.add((tmp_path / "run" / "wandb_run_id").read_text())
    assert len(found) == 2


def test_the_settings_file_of_wandb_is_respected(tmp_path, train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its settings again
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` writes it
    ended = train(tmp_path / "run", max_iters=1, wandb_log=True)
    wandb.teardown()
    assert "wandb is off" not in ended.err
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_run_continues_without_wandb_installed(tmp_path, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    ended = train(tmp_path / "run", max_iters=1, wandb_log=True)
    assert "wandb is off: import of wandb halted" in ended.err


def test_a_run_continues_without_a_login_to_wandb(tmp_path, train, monkeypatch):
    pytest.importorskip("wandb").teardown()
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "none", "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    ended = train(tmp_path / "run", max_iters=1, wandb_log=True)
    assert "wandb is off: " in ended.err and "WANDB_MODE=offline" in ended.err


def test_an_error_in_wandb_does_not_stop_a_run(tmp_path, train, monkeypatch):
    pytest.importorskip("wandb").teardown()  # it reads the environment again
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    ended = train(tmp_path / "run", max_iters=2, wandb_log=True)
    assert "wandb is off: " in ended.err
    assert load_state(tmp_path / "run" / "last")[0].step == 2
