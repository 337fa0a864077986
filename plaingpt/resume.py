"""Which settings a resumed run takes over from its checkpoint, and which may change."""

import dataclasses
import typing
from typing import Any

from plaingpt.console import UserError, counted, note
from plaingpt.settings import check_value

# These belong to the place where the run goes on, not to the run.
LOCAL = {"out_dir", "init_from", "eval_only", "dry_run", "device", "timeout"}
# These may differ from the checkpoint's; any other setting decides what is trained.
CHANGEABLE = LOCAL | {
    "data_dir", "dtype", "compile", "eval_interval", "eval_iters", "log_interval", "sample_tokens",
    "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "batch_size",
    "gradient_accumulation_steps", "learning_rate", "max_iters", "patience", "keep_every", "decay_lr", "lr_schedule",
    "warmup_iters", "lr_decay_iters", "min_lr", "weight_decay", "grad_clip", "dropout", "momentum", "sharding",
    "reduce_dtype", "recompute",
}  # fmt: skip


def resumed_settings(config: Any, given: dict[str, str], training: dict) -> Any:
    """`config` with all that no flag gave taken from the checkpoint's `training.json`.

    A flag that changes something is told; one that contradicts the checkpoint raises UserError.
    """
    trained, where = training["settings"], f"{training['directory']}/training.json"
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name in hints.keys() & trained.keys():
        check_value(name, trained[name], hints[name], where)
    if missing := {"gradient_accumulation_steps", "batch_size"} - trained.keys():
        raise UserError(f"{where}: settings lack {', '.join(sorted(missing))}")
    differing = {name for name in given if name in trained and getattr(config, name) != trained[name]} - LOCAL
    of_flags = {name for name in given if given[name].startswith("--")}
    flags = differing & of_flags
    for name in sorted(differing):
        asked = f"{given[name]}: {name}={getattr(config, name)}"
        if name not in flags:
            note(f"kept from the checkpoint: {name}={trained[name]} (not {asked}; a flag would change it)")
        elif name in CHANGEABLE:
            note(f"changed on resume: {asked}, until now {trained[name]}")
        else:
            raise UserError(
                f"{asked}, but the checkpoint was trained with {trained[name]}; "
                "leave it out, choose another --out_dir, or start anew with --init_from=scratch"
            )
    fields = {field.name for field in dataclasses.fields(config)}
    kept = {name: value for name, value in trained.items() if name in fields - flags - LOCAL | {"init_from"}}
    for field in dataclasses.fields(config):  # what was derived is derived again, from what may have changed
        if field.default is None and field.name in training["derived"] and field.name not in of_flags:
            kept[field.name] = None
    config = dataclasses.replace(config, **kept)
    before = trained["gradient_accumulation_steps"] * trained["batch_size"]
    now = config.gradient_accumulation_steps * config.batch_size
    if now != before:
        raise UserError(
            f"gradient_accumulation_steps x batch_size is {now}, but the checkpoint was trained with {before} "
            "sequences an update: keep the product"
        )
    done = training["step"]
    if config.max_iters < done:
        raise UserError(
            f"max_iters={config.max_iters}, but the checkpoint in {training['directory']} has {counted(done, 'update')}"
        )
    if config.max_iters == done and not config.eval_only:
        note(f"the run has {counted(done, 'update')} already: --max_iters=… for more, or --init_from=scratch")
    return config
