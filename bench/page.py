"""Tokens per second and seconds to open of pages made by tools/page.py, in headless Chromium from file://.

python bench/page.py out-quickstart/model.html PATH/model.html
"""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    for path in map(Path, sys.argv[1:]):
        page, started = browser.new_page(), time.perf_counter()
        page.goto(path.resolve().as_uri(), wait_until="commit")
        expect(page.locator("#go")).to_be_enabled(timeout=60_000)
        seconds = time.perf_counter() - started
        rates = []
        for _ in range(3):
            page.click("#go")
            expect(page.locator("#status")).to_contain_text("a second", timeout=120_000)
            rates.append(page.inner_text("#status"))
        megabytes = path.stat().st_size / 1e6
        print(f"{path}: {megabytes:.2f} MB, open after {seconds:.1f} s; {'; '.join(rates)}", flush=True)
        page.close()
