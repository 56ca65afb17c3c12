"""Screenshots of the page for the documentation: `python -m tests.serve.shots FOLDER [URL QUESTION IMAGE...]`.

Without a URL the page is that of the test's own server, with an answer that is made up.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.serve.fake_server import serving, streamed
from tests.serve.test_page import BROWSER, NARROW, WIDE, picture

VIEWS = {"wide": {**WIDE, "color_scheme": "light"}, "wide-dark": WIDE, "narrow": NARROW}


def shoot(folder: Path, url: str, question: str, *images: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for name, options in VIEWS.items():
            page = browser.new_context(**options).new_page()
            page.goto(url)
            page.get_by_label("Add images").set_input_files(images)
            page.get_by_role("img", name=f"Image {len(images)}").wait_for()
            page.screenshot(path=folder / f"{name}-empty.png")
            page.get_by_label("Your question").fill(question)
            page.get_by_role("button", name="Ask", exact=True).click()
            page.get_by_text("tokens/s").wait_for(timeout=600_000)
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


def main() -> None:
    folder, *given = sys.argv[1:]
    if given:
        url, question, *images = given
        shoot(Path(folder), url, question, *map(Path, images))
        return
    with serving() as server:
        server.answers += [streamed("It is red all over: a plain rectangle, wider than it is high.")] * len(VIEWS)
        image = Path(folder, "image.png")
        image.write_bytes(picture("red", (320, 200)))
        shoot(Path(folder), server.url, "What is to be seen here?", image)


if __name__ == "__main__":
    main()
