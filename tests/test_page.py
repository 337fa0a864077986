"""tools/page.py: the page in a real browser, from file://, without a network. Needs `playwright` and Chromium:

pip install playwright; apt-get install chromium
"""

import base64
import json
import math
import shutil

import pytest
import torch
from conftest import run_main
from test_checkpoint import TEXT, make_model, of_kind
from test_model import random_model

from model import GPTConfig
from plaingpt.checkpoint import load_model, model_with, save_model
from plaingpt.generate import Sampling, filtered
from plaingpt.tokenizer import make_tokenizer
from tools.page import quantize, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
sync_api.expect.set_options(timeout=300_000)  # a busy machine
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SCRIPTS = [
    "", " ", "\n", "  two  spaces \t\r\n end ", "don't we'll I'VE it's'd 'twas", "x=1;y2=22/3.14", "naïve Äpfel ﬁ Ǆ",
    "Ελληνικά кириллица עברית العربية हिन्दी ไทย 한국어 日本語 汉字 ქართული አማርኛ", "१२३ ٣٤ Ⅷ ½ ²",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 e\u0301 \u200d\u200b", "a\u0085b\ufeffc\u00a0d\u3000e\u180ef\u2028g\x1ch\x00i",
    "<|endoftext|> and <|endoftext|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Write the page of a model and open it; at the end there must have been no error and no request."""
    contexts, troubles = [], []

    def open_page(model=None, tokenizer=None, path=None, name="a model", bits=16, dark=False, size="desktop", **more):
        if path is None:
            write_page(path := tmp_path / "model.html", name, model, tokenizer, bits, **more)
        scheme = "dark" if dark else "light"
        context = browser.new_context(offline=True, viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        allowed = (path.as_uri(), "blob:")  # the page itself and its worker
        page.on("request", lambda request: request.url.startswith(allowed) or troubles.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("ready")
        return page

    open_page.troubles = troubles
    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def ask(page, name, *given):
    """The worker's answer; typed arrays as lists."""
    script = "async ([name, ...given]) => JSON.stringify(await ask(name, ...given), (k, v) => v?.buffer ? [...v] : v)"
    return json.loads(page.evaluate(script, [name, *given]))


def all_logits(page, ids: list[int]) -> torch.Tensor:
    """(T, V), as base64: as JSON it would take seconds."""
    script = """async ids => {
      const bytes = [];
      for (let n = 1; n <= ids.length; n++) bytes.push(new Uint8Array((await ask("logits", ids.slice(0, n))).buffer));
      return btoa(bytes.map(all => Array.from(all, byte => String.fromCharCode(byte)).join("")).join(""));
    }"""
    data = bytearray(base64.b64decode(page.evaluate(script, ids)))
    return torch.frombuffer(data, dtype=torch.float32).view(len(ids), -1)


@torch.no_grad()
def in_torch(model, ids) -> torch.Tensor:
    return model(torch.tensor([ids]))[0][0]


def show(page, view: str) -> None:
    page.click(f"nav a[href='#/{view}']")
    sync_api.expect(page.locator(f"#{view}")).to_be_visible()


@pytest.mark.parametrize(
    ("kind", "bias", "shape", "bits"),
    [
        ("gpt2", True, (8, 1, 1, 4), 16),
        *(("char", False, (24, 3, 2, 10), bits) for bits in (16, 8)),
        *(("byte", True, (33, 2, 3, 12), bits) for bits in (16, 8)),
        *(("bpe", False, (64, 4, 4, 64), bits) for bits in (16, 8)),
        *(("bpe", True, (1, 1, 1, 1), bits) for bits in (16, 8)),
    ],
)
def test_logits_are_torchs_at_every_position(opened, kind, bias, shape, bits):
    tokenizer = of_kind(kind)
    block_size, n_layer, n_head, n_embd = shape
    model = random_model(GPTConfig(block_size, tokenizer.vocab_size, n_layer, n_head, n_embd, bias=bias), 0.15, seed=1)
    page = opened(model, tokenizer, bits=bits, start="a")
    ids = torch.randint(tokenizer.vocab_size, (block_size,), generator=torch.Generator().manual_seed(2)).tolist()
    assert (all_logits(page, ids) - in_torch(model, ids)).abs().max() <= (0.01 if bits == 16 else 1)
    weights = model.weights()
    for name, weight in weights.items():
        if weight.dim() == 2:
            scale, integers = quantize(weight, bits)
            weights[name] = scale[:, None] * integers
    rounded = model_with(model.config, weights)
    assert (all_logits(page, ids) - in_torch(rounded, ids)).abs().max() <= 1e-4
    # The cache is used again for another text with the same beginning, and after a walk back
    other = [*ids[: block_size // 2], 0][:block_size]
    assert (torch.tensor(ask(page, "logits", other)) - in_torch(rounded, other)[-1]).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte", "bpe"])
def test_ids_and_greedy_text_are_torchs(opened, kind):
    tokenizer = of_kind(kind)
    model = make_model(tokenizer)
    page = opened(model, tokenizer)
    texts = [*SCRIPTS, TEXT]
    if kind == "char":
        texts = ["", TEXT, TEXT[::-1], "".join(c for c in tokenizer.vocabulary() if len(c) == 1)]
    for text in texts:
        for special in (False, True):
            ids = tokenizer.encode(text, special=special)
            assert ask(page, "encode", text, special) == ids, (text, special)
            assert ask(page, "decode", ids) == tokenizer.decode(ids)
    if kind != "char":
        lone = page.evaluate("ask('encode', 'a\\ud800b\\udc00\\ud83d', false)")
        assert lone == tokenizer.encode("a\ufffdb\ufffd\ufffd")
    for length in (3, 24, 31):  # to beyond block_size
        prompt = tokenizer.encode(TEXT)[:length]
        greedy = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
        script = """async ([ids, prompt, sampling]) => {
          while (ids.length < prompt + 60) ids.push((await ask("next", ids, prompt, sampling))[0]);
          return ids.slice(prompt);
        }"""
        expected = list(model.generate(prompt, 60, temperature=0.0))
        assert page.evaluate(script, [prompt, len(prompt), greedy]) == expected


def test_a_character_that_the_model_does_not_know_is_named(opened):
    tokenizer = make_tokenizer("char", ["abc"], 0)
    page = opened(make_model(tokenizer), tokenizer, start="ab")
    page.fill("#prompt", "abψ")
    sync_api.expect(page.locator("#error")).to_contain_text("“ψ”")
    page.fill("#prompt", "abc")
    sync_api.expect(page.locator("#error")).to_be_empty()


def test_greedy_text_is_that_of_sample_py_and_the_score_that_of_the_model(opened, tiny_run):
    model, tokenizer = load_model(tiny_run / "best")
    page = opened(model, tokenizer, name=str(tiny_run / "best"), start="tree and")
    assert page.inner_text("#name") == tiny_run.name
    page.click("text=Sampling settings")
    page.evaluate("$('temperature').value = 0, $('length').value = 100")
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text("100 tokens")
    flags = ["--temperature=0", "--max_new_tokens=100", "--dtype=float32", "--start=tree and"]
    written = run_main("sample", f"--out_dir={tiny_run}", *flags).out
    assert page.text_content("#text") == written.removesuffix("\n")

    page.fill("#prompt", TEXT[-200:])
    page.click("#score")
    sync_api.expect(page.locator("#status")).to_contain_text("bits per byte: 200 bytes")
    ids, block, total = [tokenizer.end_of_text, *tokenizer.encode(TEXT[-200:])], model.config.block_size, 0.0
    for end in range(1, len(ids)):  # each id given the ids before it, in windows that overlap by half
        start = max(0, math.ceil((end - block) / (block // 2)) * (block // 2))
        total -= model(torch.tensor([ids[start:end]]))[0][0, -1].log_softmax(-1)[ids[end]].item()
    bits = float(page.inner_text("#status").split()[0])
    assert bits == pytest.approx(total / math.log(2) / 200, abs=2e-4)
    assert page.text_content("#text").replace("⏎", "").endswith(TEXT[-200:])


def test_sampling_follows_the_distribution(opened):
    tokenizer = make_tokenizer("char", ["abc"], 0)
    page = opened(make_model(tokenizer), tokenizer)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 1.5
    script = """async ([logits, sampling, n, vary]) => {
      const counts = new Array(12).fill(0), all = [], typed = Float32Array.from(logits);
      for (let i = 0; i < n; i++)
        all.push(ask("draw", typed, { ...sampling, seed: vary === "seed" ? i : 1337 }, vary === "index" ? i : 40));
      for (const id of await Promise.all(all)) counts[id]++;
      return counts;
    }"""
    n = 10000
    for sampling in (
        Sampling(),
        Sampling(0.7, 5),
        Sampling(1.3, 0, 0.8),
        Sampling(1.0, 7, 0.9, 0.08),
        Sampling(0.8, min_p=0.1),
    ):
        p, ids = filtered(logits, sampling)
        expected = torch.zeros(12, dtype=torch.float64)
        expected[ids[0] if ids is not None else torch.arange(12)] = p[0].double() / p.sum()
        settings = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        possible = expected > 0
        freedom = int(possible.sum()) - 1
        for vary in ("seed", "index") if sampling == Sampling() else ("seed",):
            counts = page.evaluate(script, [logits[0].tolist(), settings, n, vary])
            counts = torch.tensor(counts, dtype=torch.float64)
            assert (counts[~possible] == 0).all()
            chi_squared = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum().item()
            assert chi_squared < freedom + 4 * math.sqrt(2 * freedom) + 4, (sampling, vary)  # by chance once in 10,000


def test_the_end_of_a_text_is_not_counted_as_a_token(opened, tiny_run):
    model, tokenizer = load_model(tiny_run / "best")
    page = opened(model, tokenizer, start="tree and")
    page.evaluate("model.end_of_text = -1")
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text("200 tokens")
    new = page.evaluate("story.ids")[-200:]
    last = next(i for i in range(1, 200) if new[i] not in new[:i])
    page.evaluate(f"model.end_of_text = {new[last]}")
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text(f"The model ended the text. {last} token")


def test_tokens_their_alternatives_and_a_branch(opened, tiny_run):
    model, tokenizer = load_model(tiny_run / "best")
    page = opened(model, tokenizer, start="tree and")
    page.evaluate("model.end_of_text = -1")  # so that the text has a known length
    page.check("#as-tokens")
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text("200 tokens")
    sync_api.expect(page.locator("#text .chip")).to_have_count(208)
    page.locator("#text .chip").first.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#choice-bars li")).to_have_count(10)
    ids = page.evaluate("story.ids")
    with torch.no_grad():
        p = model(torch.tensor([ids[:10]]))[0][0, -1].softmax(-1)
    top = p.topk(2)
    assert float(page.inner_text("#choice-bars li >> nth=0").split()[-2]) == pytest.approx(
        100 * top.values[0].item(), abs=0.6
    )
    assert f"{-math.log2(p[ids[10]]):.1f} bits" in page.inner_text("#choice-says")
    page.click("#choice-bars li >> nth=1")
    sync_api.expect(page.locator("#status")).to_contain_text("200 tokens")
    branched = page.evaluate("story.ids")
    assert branched[:11] == [*ids[:10], int(top.indices[1])] and len(branched) == 211
    page.evaluate("$('length').max = 1e6, $('length').value = 1e6")  # it would end before the click
    page.click("#more")
    page.click("#stop")
    sync_api.expect(page.locator("#status")).to_contain_text("Stopped")
    stopped = page.evaluate("story.ids")
    assert stopped[:211] == branched and len(stopped) < 10**6


def test_the_views_show_the_models_own_numbers(opened, tiny_run):
    model, tokenizer = load_model(tiny_run / "best")
    page = opened(model, tokenizer, name=str(tiny_run / "best"), start="stone and rain")
    wte, wpe = (table.weight.detach() for table in (model.transformer.wte, model.transformer.wpe))
    near = ask(page, "neighbors", 5)
    cosines = torch.nn.functional.cosine_similarity(wte[: tokenizer.vocab_size], wte[5], dim=1)
    cosines[5] = -2
    assert near[0][0] == int(cosines.argmax()) and near[0][1] == pytest.approx(cosines.max().item(), abs=1e-3)
    ids = tokenizer.encode("stone and rain")
    walk = ask(page, "walk", ids)
    for block in walk["blocks"]:
        assert len(block["heads"]) == model.config.n_head
        assert all(sum(head) == pytest.approx(1, abs=1e-4) and len(head) == len(ids) for head in block["heads"])
    assert [i for i, _, _ in walk["blocks"][-1]["lens"]] == [i for i, _, _ in walk["logits"][:3]]
    x = wte[ids[-1]] + wpe[len(ids) - 1]
    assert walk["size"] == pytest.approx(x.norm().item(), abs=1e-3)
    show(page, "walk")
    sync_api.expect(page.locator("#steps > li")).to_have_count(model.config.n_layer + 4)
    page.click("#walk-text .chip >> nth=4")
    sync_api.expect(page.locator("#steps")).to_contain_text("Position 4 is")
    assert f"{model.num_parameters():,} parameters" in page.inner_text("#about")
    assert str(tiny_run.parent) not in page.content()


HOSTILE = "<script>document.title='run'</script><!--<img src=x onerror=alert(1)>${alert(1)}`{{script}}</style>"


def test_nothing_in_a_model_becomes_markup_or_script(opened, tmp_path):
    tokenizer = make_tokenizer("bpe", [f"{HOSTILE} " * 50], 320)
    assert {"</", "script", "${"} <= {token.strip("Ġ") for token in tokenizer.vocabulary()}
    out_dir = tmp_path / "<img src=x onerror=alert(1)>" / "last"
    out_dir.mkdir(parents=True)
    model = make_model(tokenizer)
    save_model(out_dir, model, tokenizer)
    path = tmp_path / "page.html"
    write_page(path, str(out_dir), model, tokenizer, start=HOSTILE)
    assert "onerror" not in path.read_text()
    page = opened(path=path)
    page.check("#as-tokens")
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text("a second")
    for view in ("tables", "walk", "write"):
        show(page, view)
    page.click("#score")
    sync_api.expect(page.locator("#status")).to_contain_text("bits per byte")
    assert (
        page.inner_text("#name").startswith("<img")
        and page.title().startswith("<img")
        and page.locator("img").count() == 0
    )
    assert page.locator("script").count() == 2  # the worker's and the page's
    assert page.text_content("#text").endswith(HOSTILE)
    refused = """url => new Promise(done => {
      document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
      fetch(url).catch(() => {});
    })"""
    assert page.evaluate(refused, "https://example.org") == "connect-src"
    opened.troubles.clear()  # the browser reports it


@pytest.mark.parametrize(("size", "dark"), [("phone", False), ("desktop", True)])
def test_every_view_fits_its_screen(opened, tiny_run, size, dark, tmp_path):
    model, tokenizer = load_model(tiny_run / "best")
    page = opened(model, tokenizer, name=str(tiny_run / "best"), size=size, dark=dark, start="tree")
    for view in ("write", "tables", "walk"):
        show(page, view)
        page.reload()
        page.evaluate("ready")
        sync_api.expect(page.locator("section:visible")).to_have_id(view)
        assert page.evaluate("scrollY") == 0, "a link to a view starts at its top"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        page.screenshot(path=tmp_path / f"{view}.png", full_page=True)


def test_the_first_words_end_with_the_text(opened):
    tokenizer = of_kind("bpe")
    model = make_model(tokenizer, bias=True)
    with torch.no_grad():  # whatever the model reads, the end of the text is most likely by far
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1e4 * model.transformer.wte.weight[tokenizer.end_of_text])
    assert opened(model, tokenizer).input_value("#prompt") == ""


def test_what_cannot_be_a_page_is_refused_in_one_line(tmp_path, tiny_run, monkeypatch):
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_run / "best", foreign)
    (foreign / "SHA256SUMS").unlink()
    description = json.loads((foreign / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Lowercase"}
    (foreign / "tokenizer.json").write_text(json.dumps(description))
    for model, out, reason in (
        (foreign, tmp_path / "page.html", "the page cannot encode with it"),
        (tiny_run / "best", tmp_path / "none" / "page.html", "No such file or directory"),
    ):
        ended = run_main("tools.page", model, f"--out={out}")
        assert (ended.status, ended.out) == (2, "") and reason in ended.err.splitlines()[-1], ended.err
    monkeypatch.setattr("tools.page.MOST_MILLIONS", 0.001)
    ended = run_main("tools.page", tiny_run / "best", f"--out={tmp_path / 'page.html'}")
    assert ended.status == 2 and "browsers do not open pages of models above 0.001M" in ended.err
    assert not list(tmp_path.glob("*.html*"))


def test_a_model_whose_logits_overflow_opens(opened, tiny_run):
    model, tokenizer = load_model(tiny_run / "best")
    with torch.no_grad():
        model.transformer.wte.weight *= 1e30
    page = opened(model, tokenizer)
    page.click("#go")
    sync_api.expect(page.locator("#status")).to_contain_text("a second")


def test_the_command_says_the_size(tmp_path, tiny_run, opened):
    ended = run_main("tools.page", tiny_run / "best", f"--out={tmp_path / 'page.html'}", "--start=sea")
    assert ended.status == 0 and "a page of about" in ended.err and "open it in a browser" in ended.err
    assert opened(path=tmp_path / "page.html").input_value("#prompt") == "sea"
