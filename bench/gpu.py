"""What to run first on a real GPU: every check that needs one, and every figure, in two halves of under ten minutes.

python bench/gpu.py --half=1        # the card; correctness; GPT-2 124M's training step; sampling
python bench/gpu.py --half=2        # train.py as people run it: Tiny Shakespeare, resume, dry runs
python bench/gpu.py --quick=True    # both, small: a rehearsal on a simulated card, where no number means anything

Each result is one JSON line on standard output and in `out`, and a table of all follows. A check that fails does not
stop the others. Only torch, numpy, tokenizers, safetensors, xxhash, filelock and tqdm are needed, torch 2.11 or later.
Tiny Shakespeare has to be prepared (python prepare_data.py shakespeare_char); other data is made up.
"""

import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, IGNORED, GPTConfig
from plaingpt.console import run_script
from plaingpt.distributed import Distributed, connect
from plaingpt.generate import Batch, Decoder, Sampling
from plaingpt.optimizer import ELEMENTS_AT_ONCE, SkippedSteps, apply_gradients, make_optimizers
from plaingpt.parallel import wrap
from plaingpt.run import MODEL_SETTINGS, new_shape
from plaingpt.settings import load_settings
from plaingpt.tokens import open_data_set
from train import Run, TrainConfig, train_step

SMALL = GPTConfig(block_size=128, vocab_size=1000, n_layer=2, n_head=2, n_embd=128)


def memory(
    batch_size: int, optimizer: str, recompute: bool, compiled: bool, shards: int, c: GPTConfig
) -> dict[str, float]:
    """Bytes, by purpose, that torch reserves in each of `shards` processes to train a model, in 16-bit precision.

    The constants match runs of 124M to 1.5B within 10% (bench/results/2026-11-27-gpu-simulated.md). Per token, each
    block stores 34 C bytes for the backward pass (36 if not compiled): two LayerNorm inputs in float32, the rest in 16
    bits; dropout masks add 2 C. With recomputation, each block stores 4 C bytes, and one block at a time all of it. A
    logit takes 2 bytes; if not compiled, 4, and the loss needs float32 copies of 2**26 logits at a time.
    """
    matrices = 12 * c.n_embd**2  # parameters of a block
    of_block = matrices + (13 if c.bias else 2) * c.n_embd
    embeddings = (c.padded_vocab_size + c.block_size + (2 if c.bias else 1)) * c.n_embd  # and ln_f
    parameters, of_muon = embeddings + c.n_layer * of_block, c.n_layer * matrices * (optimizer == "muon")
    parts = {
        "weights": 4 * parameters / shards,
        "gradients": 4 * parameters / shards,
        "optimizer": (8 * (parameters - of_muon) + 4 * of_muon) / shards,  # AdamW has two moments, Muon one
    }
    tokens, logits = batch_size * c.block_size, batch_size * c.block_size * c.padded_vocab_size
    block = tokens * c.n_embd * ((34 if compiled else 36) + 2 * (c.dropout > 0))
    head = tokens * c.n_embd * 12 + (2 * logits if compiled else 4 * logits + 12 * min(logits, 2**26))
    inputs = tokens * c.n_embd * 4
    activations = inputs * c.n_layer + max(block, head) if recompute else block * c.n_layer + head
    if shards > 1:  # embeddings and their gradient in float32, and two blocks: the one at work and the next
        copies = 8 * embeddings + 4 * of_block
    else:
        copies = 2 * (embeddings + of_block if recompute and compiled else parameters)
    muon = 16 * min(ELEMENTS_AT_ONCE, 4 * c.n_embd**2 * c.n_layer) / shards if optimizer == "muon" else 0
    parts |= {"16-bit copies": copies, "activations": max(activations, muon - copies)}
    # Gradients are allocated where the logits were, which then need new space: the allocator does not move blocks.
    unused = (0.08 if recompute else 0.04) * sum(parts.values()) + (1.4 * logits if compiled else 0)
    return parts | {"unused by the allocator": unused}


@dataclass(frozen=True)
class BenchConfig:
    half: int = 0
    """1 or 2; 0: both"""
    quick: bool = False
    """everything small, for a simulated card"""
    data_dir: str = "data"
    """folder with the data set shakespeare_char"""
    nanogpt: str | None = None
    """a checkout of nanoGPT, to time its compiled step beside ours"""
    out: str = "gpu.jsonl"
    """file that the results are added to; the kernel table goes beside it"""


class Bench:
    """Runs parts, and reports each result and each failure."""

    def __init__(self, config: BenchConfig):
        self.config, self.quick, self.results = config, config.quick, []
        self.dist = connect("cuda", "bfloat16")
        self.bandwidth = math.nan  # bytes/s, measured

    def report(self, name: str, ok: bool | None = None, **values) -> None:
        """ok: whether a check passed; None for a figure."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        result = {"name": name} | ({} if ok is None else {"ok": ok}) | rounded
        self.results.append(result)
        print(json.dumps(result, default=str), flush=True)
        with open(self.config.out, "a") as file:
            print(json.dumps(result, default=str), file=file)

    def run(self, *parts: Callable[["Bench"], None]) -> None:
        for part in parts:
            started = time.perf_counter()
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                part(self)
            except Exception as error:
                traceback.print_exc()
                self.report(part.__name__, ok=False, error=f"{type(error).__name__}: {error}"[:300])
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    def table(self) -> str:
        lines = ["", "| result | | values |", "| --- | --- | --- |"]
        for result in self.results:
            verdict = {True: "ok", False: "**failed**", None: ""}[result.get("ok")]
            values = ", ".join(f"{k} {v}" for k, v in result.items() if k not in ("name", "ok"))
            lines.append(f"| {result['name']} | {verdict} | {values} |")
        return "\n".join(lines)

    def seconds(self, run: Callable[[], object], times: int = 10) -> float:
        """Median seconds of a call, after two that warm up."""
        spans = []
        for _ in range(2 + (2 if self.quick else times)):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            spans.append(time.perf_counter() - started)
        return statistics.median(spans[2:])


# Half 1: correctness


def card(bench: Bench) -> None:
    """What the card does with a large copy and a large matrix product."""
    n = 1024 if bench.quick else 8192
    x = torch.randn(n, n, 8, device="cuda")
    y, a = torch.empty_like(x), x[..., 0].bfloat16()
    bench.bandwidth = 2 * x.nbytes / bench.seconds(lambda: y.copy_(x))
    speeds = dict(GB_per_s=bench.bandwidth / 1e9, bf16_TFLOPS=2 * n**3 / bench.seconds(lambda: a @ a) / 1e12)
    versions = dict(torch=torch.__version__, cudnn=torch.backends.cudnn.version(), python=sys.version.split()[0])
    bench.report("card", card=torch.cuda.get_device_name(), commit=os.environ.get("COMMIT"), **versions, **speeds)


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(f.detach().double().cpu(), e.detach().double().cpu()) for f, e in zip(found, expected, strict=True)]
    difference = sum((f - e).square().sum() for f, e in pairs).sqrt()
    return (difference / sum(e.square().sum() for _, e in pairs).sqrt()).item()


def gradients(bench: Bench) -> None:
    """Loss and gradients against the CPU's in float32; the padded rows of the embedding get none."""
    torch.manual_seed(0)
    reference = GPT(SMALL)
    ids = torch.randint(SMALL.vocab_size, (8, SMALL.block_size + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :50] = IGNORED
    loss = reference(inputs, targets)[1]
    loss.backward()
    expected = [p.grad for p in reference.parameters()]
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, most in (("float32", 1e-4), ("bfloat16", 3e-2), ("float16", 1e-2)):
        for compiled in (False, True):
            dist = Distributed(torch.device("cuda"), getattr(torch, dtype))
            model = wrap(copy.deepcopy(reference), dist, compiled=compiled)
            model.zero_grad()
            scale = 1024 if dtype == "float16" else 1
            with dist.autocast():
                found = model(inputs.cuda(), targets.cuda(), need_logits=False)[1]
            (found * scale).backward()
            error = relative_error([p.grad / scale for p in model.parameters()], expected)
            padded = model.transformer.wte.weight.grad[SMALL.vocab_size :].abs().sum().item()
            apart = abs(found.item() / loss.item() - 1)
            ok = error < most and apart < most and padded == 0
            bench.report(f"gradients {dtype} {'compiled' if compiled else 'eager'}", ok, error=error, loss=apart)


def state(model: GPT, optimizers: list) -> list[Tensor]:
    moments = [value for o in optimizers for s in o.state.values() for value in s.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]


def optimizers(bench: Bench) -> None:
    """Three updates against the CPU's, then one with infinite gradients, which must change nothing."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind, dtype, most in (("adamw", "float32", 1e-4), ("muon", "float32", 1e-3), ("muon", "bfloat16", 5e-2)):
        torch.manual_seed(0)
        start = GPT(SMALL)
        noise = [[torch.randn_like(p) for p in start.parameters()] for _ in range(3)]
        moved, unchanged = [], True
        for device in ("cpu", "cuda"):
            model = copy.deepcopy(start).to(device)
            both = make_optimizers(model, kind, 1e-2, 0.1, (0.9, 0.95), dtype=getattr(torch, dtype))
            scaler = torch.amp.GradScaler(device, enabled=False)

            def update(gradients: list[Tensor], model=model, both=both, scaler=scaler) -> None:
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = gradient.to(p.device, copy=True)
                apply_gradients(list(model.parameters()), both, scaler, 1e-2, 1.0)

            for gradients in noise:
                update(gradients)
            moved.append([p.cpu() - s for p, s in zip(model.parameters(), start.parameters(), strict=True)])
            before = state(model, both)
            update([gradient * math.inf for gradient in noise[0]])
            unchanged &= all(map(torch.equal, before, state(model, both)))
        error = relative_error(moved[1], moved[0])
        bench.report(f"{kind} {dtype}", error < most and unchanged, error=error, skips_infinite=unchanged)


def greedy(bench: Bench) -> None:
    """Captured steps write the argmax of the model's own logits, alone and in a batch that changes its shape."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=50257, block_size=512)).cuda().eval()
    prompts, expected = [[7, 8, 9], list(range(118)), list(range(250))], []
    for prompt in prompts:
        text = list(prompt)
        with torch.inference_mode():
            for _ in range(20):
                text.append(int(model(torch.tensor([text]).cuda())[0][0, -1].argmax()))
        expected.append(text)
    batches = [batch_of(model, lists, 20, torch.float32, Sampling(0.0)) for lists in ([p] for p in prompts)]
    for batch in [*batches, together := batch_of(model, [*prompts, [1]], 20, torch.float32, Sampling(0.0))]:
        write(batch, 20)
    alone, together = [batch.texts[0] for batch in batches], together.texts[:3]
    bench.report("greedy", alone == expected, same=sum(map(list.__eq__, alone, expected)), of=3)
    bench.report("greedy in a ragged batch", together == expected, same=sum(map(list.__eq__, together, expected)), of=3)


# Half 1: GPT-2 124M's training step


def random_tokens(folder: Path) -> Path:
    """A data set of GPT-2's tokens."""
    folder.mkdir()
    for split in ("train", "val"):
        ids = np.random.default_rng(0).integers(0, 50257, 2_000_000)
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


def updates(config: TrainConfig, model: GPT, dist: Distributed) -> Callable[[int], None]:
    """update(micro_steps), as train.py makes it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, open_data_set(random_tokens(Path(folder) / "random")).train, model, dist)
    skipped = SkippedSteps(0, dist.device)

    def update(micro_steps: int) -> None:
        skipped.count(train_step(run, 0, micro_steps=micro_steps)[1])

    return update


def training_step(bench: Bench) -> None:
    """Speed and memory of config/train_gpt2.py; an update must not wait for the device."""
    config, _ = load_settings(TrainConfig, [str(ROOT / "config/train_gpt2.py")])
    if bench.quick:
        config = replace(config, n_layer=2, batch_size=2)
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    model = GPT(GPTConfig(vocab_size=50257, **shape))
    update = updates(config, model, bench.dist)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    update(1)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    update(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bench.report("124M: an update does not wait", ok=True)
    one, two = (bench.seconds(lambda n=n: update(n)) for n in (1, 2))
    micro_steps = config.gradient_accumulation_steps
    seconds, tokens = one + (micro_steps - 1) * (two - one), config.batch_size * config.block_size
    speed = micro_steps * tokens / seconds
    planned = sum(memory(config.batch_size, config.optimizer, False, True, 1, model.config).values())
    mfu = speed * model.flop_per_token() / (bench.dist.peak_flops or math.nan)
    times = dict(micro_step_ms=(two - one) * 1e3, optimizer_ms=(2 * one - two) * 1e3, first_step_s=first)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    sizes = dict(peak_GB=peak / 1e9, reserved_GB=reserved / 1e9, planned_GB=planned / 1e9)
    bench.report("124M: training", tokens_per_s=speed, mfu=mfu, **times, **sizes)
    if not bench.quick:  # torch's profiler does not work on a simulated card
        with torch.profiler.profile() as profile:
            update(2)
            torch.cuda.synchronize()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60)
        Path(bench.config.out).with_suffix(".kernels.txt").write_text(table)


def small_steps(bench: Bench) -> None:
    """Steps of config/train_shakespeare_char.py with micro-steps as CUDA graphs, and launched kernel by kernel."""
    config, _ = load_settings(TrainConfig, [str(ROOT / "config/train_shakespeare_char.py")])
    data = open_data_set(Path(bench.config.data_dir) / "shakespeare_char")
    steps, losses = 5 if bench.quick else 100, []
    for name in ("graphs", "kernel by kernel"):
        torch.manual_seed(0)
        model = GPT(new_shape(config, data))
        run = Run(config, data.train, model, bench.dist)
        if run.gradients and name != "graphs":
            run.gradients, run.micro_step, run.update = [], run.micro_step.function, run.update.function
        for step in range(5):
            loss, _ = train_step(run, step)
        losses.append(loss.item())
        started = time.perf_counter()
        for step in range(steps):
            train_step(run, step)
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        times = dict(step_ms=seconds / steps * 1e3, host_ms=host / steps * 1e3)
        bench.report(f"10.6M: {name}", tokens_per_s=config.tokens_per_step * steps / seconds, **times, loss=losses[-1])
    bench.report("10.6M: graphs change nothing", abs(losses[0] - losses[1]) < 1e-3)


def attention_backends(bench: Bench) -> None:
    """Attention of the recipe's shape, forward and backward."""
    batch = 2 if bench.quick else 30
    q, k, v = (torch.randn(batch, 12, 1024, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    times = {"default": bench.seconds(run) * 1e3}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):  # not on every card
            times[backend.name.partition("_")[0].lower()] = bench.seconds(run) * 1e3
    bench.report("attention, ms a layer", **times)


def nanogpt_step(bench: Bench) -> None:
    """nanoGPT's compiled micro-step with our batch."""
    if bench.config.nanogpt is None:
        return
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(bench.config.nanogpt) / "model.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    batch, n_layer = (2, 2) if bench.quick else (30, 12)
    shape = module.GPTConfig(block_size=1024, vocab_size=50304, n_layer=n_layer, bias=False)
    model = module.GPT(shape).cuda()
    compiled = torch.compile(model)
    ids = torch.randint(50257, (batch, 1024)).cuda()

    def micro_step() -> None:
        with bench.dist.autocast():
            compiled(ids, ids)[1].backward()

    torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(micro_step)
    peak = torch.cuda.max_memory_allocated() / 1e9
    bench.report("124M: nanoGPT", micro_step_ms=seconds * 1e3, tokens_per_s=ids.numel() / seconds, peak_GB=peak)


# Half 1: sampling


def batch_of(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, dtype: torch.dtype, sampling: Sampling
) -> Batch:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return Batch(Decoder(copy.deepcopy(model), dtype), prompts, max_new_tokens, sampling, generators)


def write(batch: Batch, tokens: int) -> None:
    for _ in range(tokens):
        batch.step()


def sampling(bench: Bench) -> None:
    """ms of a token for 1, 16 and 64 texts, of equal and of different lengths; the limit is one pass over weights.

    Medians of the third to the fifth hundred tokens, so attention reads 512 to 1,024 positions.
    """
    model = GPT(GPTConfig(n_layer=2 if bench.quick else 12)).cuda()
    limit = 2 * model.num_parameters() / bench.bandwidth * 1e3
    tokens = 4 if bench.quick else 100
    for count, step in ((1, 0), (16, 0), (16, 7), (64, 0), (64, 7)):
        prompts = [[1] * (5 + step * i) for i in range(count)]
        batch = batch_of(model, prompts, 5 * tokens, torch.bfloat16, Sampling(0.8, top_k=200))
        ms = bench.seconds(lambda batch=batch: write(batch, tokens), 3) / tokens * 1e3
        name = f"sampling: {count} texts, {'ragged' if step else 'equal'} lengths"
        bench.report(name, ms_per_token=ms, tokens_per_s=count / ms * 1e3, limit_ms=limit)


def transformers_sampling(bench: Bench) -> None:
    """transformers with a static cache, which compiles the step."""
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2 if bench.quick else 12)).cuda().bfloat16().eval()
    how = dict(do_sample=True, top_k=200, temperature=0.8, cache_implementation="static", pad_token_id=0)
    short, long = (4, 8) if bench.quick else (20, 120)  # the difference leaves out the prompt and the set-up
    for count in (1, 16, 64):
        ids = torch.ones(count, 5, dtype=torch.long, device="cuda")
        given = how | dict(inputs=ids, attention_mask=torch.ones_like(ids))
        spans = [
            bench.seconds(lambda n=n, given=given: model.generate(**given, min_new_tokens=n, max_new_tokens=n), 3)
            for n in (short, long)
        ]
        ms = (spans[1] - spans[0]) / (long - short) * 1e3
        bench.report(f"transformers: {count} texts", ms_per_token=ms, tokens_per_s=count / ms * 1e3)


# Half 2: the commands


def command(bench: Bench, limit: float, *words: object) -> tuple[str, float]:
    """Run a script of ours for at most `limit` seconds: what it wrote, and seconds. Raises if it fails."""
    started = time.perf_counter()
    everything = [sys.executable, *map(str, words)]
    done = subprocess.run(everything, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    text = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(everything[1:3])} ended with {done.returncode}: {text[-400:]}"
    return text, time.perf_counter() - started


def shakespeare(bench: Bench) -> None:
    """The recipe, and nanoGPT's settings: nanoGPT reached 1.4697 on an A100 in three minutes."""
    data = ("config/train_shakespeare_char.py", f"--data_dir={bench.config.data_dir}")
    quick = ("--max_iters=20", "--eval_interval=10", "--warmup_iters=2") if bench.quick else ()
    adamw = ("--optimizer=adamw", "--lr_schedule=cosine", "--learning_rate=1e-3", "--min_lr=1e-4", "--max_iters=5000")
    for name, changes in (("muon", ()), ("nanoGPT's settings", adamw)):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            _, seconds = command(bench, 180, "train.py", *data, f"--out_dir={run}", *changes, *quick)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            loss, step = min((line["val_loss"], line["step"]) for line in lines if "val_loss" in line and line["step"])
            speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            figures = dict(val_loss=loss, step=step, command_s=seconds, tokens_per_s=speed)
            bench.report(f"shakespeare_char: {name}", loss < 1.48, **figures)
            text, _ = command(bench, 60, "sample.py", f"--out_dir={run}", "--num_samples=2", "--max_new_tokens=100")
    bench.report("sample.py", ok=True, text=text[:60])


def resume(bench: Bench) -> None:
    """A run that is resumed against one that is not: the largest difference of a weight, 0 if bit-identical."""
    from safetensors.torch import load_file

    recipe = ("train.py", "config/train_shakespeare_char.py", f"--data_dir={bench.config.data_dir}", "--eval_iters=5")
    length = ("--max_iters=30", "--keep_every=10", "--eval_interval=10", "--warmup_iters=2")
    for dtype in ("bfloat16", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            run, weights = Path(folder) / "run", []
            for again in ((), ("--init_from=resume:step-000020",)):
                command(bench, 100, *recipe, f"--out_dir={run}", f"--dtype={dtype}", *length, *again)
                weights.append(load_file(run / "last" / "model.safetensors"))
            apart = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0])
            bench.report(f"resume {dtype}", apart < 1e-3, largest_difference=apart)


def dry_runs(bench: Bench) -> None:
    """Memory of the recipes against the prediction."""
    quick = ("--n_layer=2", "--batch_size=2", "--gradient_accumulation_steps=2") if bench.quick else ()
    with tempfile.TemporaryDirectory() as folder:
        random_tokens(Path(folder) / "fineweb10B-gpt2")
        for size in ("", "_medium", "_xl"):
            words = (f"config/train_gpt2{size}.py", f"--data_dir={folder}", "--dry_run=True", *quick)
            text, seconds = command(bench, 150, "train.py", *words)
            peak, reserved = map(float, re.search(r"peak ([\d.]+) GB, reserved ([\d.]+) GB", text).groups())
            speed = re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")
            c, _ = load_settings(TrainConfig, list(words))
            shape = GPTConfig(vocab_size=50257, **{name: getattr(c, name) for name in MODEL_SETTINGS})
            planned = sum(memory(c.batch_size, c.optimizer, c.recompute, True, 1, shape).values()) / 1e9
            figures = dict(planned_GB=planned, peak_GB=peak, reserved_GB=reserved, tokens_per_s=float(speed))
            ok = bench.quick or abs(planned / reserved - 1) < 0.1
            bench.report(f"dry run gpt2{size}", ok, **figures, command_s=seconds)


def main() -> int:
    config, _ = load_settings(BenchConfig)
    bench = Bench(config)
    bench.run(card)
    if config.half in (0, 1):
        bench.run(gradients, optimizers, greedy, training_step, small_steps, attention_backends, nanogpt_step)
        bench.run(sampling, transformers_sampling)
    if config.half in (0, 2):
        bench.run(shakespeare, resume, dry_runs)
    print(bench.table())
    return int(any(result.get("ok") is False for result in bench.results))


if __name__ == "__main__":
    run_script(main)
