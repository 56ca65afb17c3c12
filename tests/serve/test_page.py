"""The page in a browser, where one is found: asking, streaming, stopping, failing."""

import base64
import contextlib
import functools
import io
import re
import shutil
import threading

import pytest

pytest.importorskip("PIL", reason="the extra serve is not installed")

from PIL import Image

from tests.serve.fake_server import failing, serving, streamed

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def picture(colour: str = "red", size: tuple[int, int] = (32, 24), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def chosen(*files: bytes) -> list[dict]:
    return [{"name": f"{number}.png", "mimeType": "image/png", "buffer": file} for number, file in enumerate(files)]


def data_url(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def seen(browser, server, request):
    """The page, opened at a server; whatever the console says fails the test unless it asks for it."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 800}}))
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.goto(server.url)
    opened.get_by_text("digits-llava").first.wait_for(state="attached")
    yield opened
    context.close()
    # Chromium itself tells of answers with an error's status.
    assert [said for said in opened.complaints if "Failed to load resource" not in said] == []


def ask(seen, text: str) -> None:
    seen.get_by_label("Your question").fill(text)
    seen.get_by_role("button", name="Ask", exact=True).click()


def answered(seen) -> None:
    seen.get_by_role("status").get_by_text("Answered.").wait_for()


def last_text(seen) -> str:
    return seen.locator(".turn:last-child .text").inner_text()


def test_an_answer_streams_in_and_figures_follow(seen, server):
    go_on = threading.Event()
    server.answers.append(streamed("A red ", "rectangle", go_on, ", and nothing else."))
    seen.get_by_label("Add images").set_input_files(chosen(picture()))
    seen.get_by_role("img", name="Image 1").wait_for()
    ask(seen, "What is to be seen?")
    # Part of it, while the server has not sent the rest.
    seen.get_by_text("A red rectangle", exact=True).wait_for()
    assert seen.locator("dl").count() == 0 and seen.locator(".turn").last.get_attribute("aria-busy") == "true"
    assert seen.get_by_role("button", name="Stop").is_visible()
    assert not seen.get_by_role("button", name="Ask", exact=True).is_visible()
    go_on.set()
    answered(seen)
    assert last_text(seen) == "A red rectangle, and nothing else."
    assert seen.locator(".turn").last.get_attribute("aria-busy") is None
    told = dict(zip(seen.locator("dt").all_inner_texts(), seen.locator("dd").all_inner_texts(), strict=True))
    assert told == {
        "Cache holds": "1.31 MB",
        "Dense would hold": "10.5 MB",
        "Compression": "8\N{MULTIPLICATION SIGN}",
        "Speed": "31.5 tokens/s",
        "Tokens in, out": "1,061, 7",
    }
    assert seen.get_by_role("meter").evaluate("meter => meter.value / meter.max") == pytest.approx(1 / 8)
    ((headers, body),) = server.asked
    assert body == {
        "model": "digits-llava",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(picture())}},
                    {"type": "text", "text": "What is to be seen?"},
                ],
            }
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "Authorization" not in headers and headers["Content-Type"] == "application/json"
    assert seen.evaluate("document.activeElement.id") == "question"
    assert set(server.paths) == {"/", "/v1/models"}


def test_follow_up_questions_keep_the_conversation(seen, server):
    server.answers += [streamed("Red."), streamed("Blue."), streamed("Hello.")]
    seen.get_by_label("Add images").set_input_files(chosen(picture("red"), picture("blue")))
    seen.get_by_role("img", name="Image 2").wait_for()
    ask(seen, "The first?")
    answered(seen)
    # By keyboard alone: Shift and Enter begin a line, Enter asks.
    seen.keyboard.type("And")
    seen.keyboard.press("Shift+Enter")
    seen.keyboard.type("the second?")
    seen.keyboard.press("Enter")
    seen.get_by_text("Blue.", exact=True).wait_for()
    answered(seen)
    messages = server.asked[1][1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0] == server.asked[0][1]["messages"][0] and len(messages[0]["content"]) == 3
    assert messages[1]["content"] == "Red."
    assert messages[2]["content"] == [{"type": "text", "text": "And\nthe second?"}]
    seen.get_by_role("button", name="Start anew").click()
    assert seen.locator(".turn").count() == 0
    ask(seen, "Hello?")
    answered(seen)
    assert len(server.asked[2][1]["messages"]) == 1


#: Hands a file over as a drop or a paste does.
HAND_OVER = """([kind, text]) => {
    const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0)), files = new DataTransfer();
    files.items.add(new File([bytes], "a.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    document.body.dispatchEvent(kind === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: files })
        : new DragEvent(kind, { ...options, dataTransfer: files }));
}"""


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_are_dropped_and_pasted(seen, server, way):
    server.answers.append(streamed("Green."))
    file = picture("green")
    if way == "drop":
        seen.evaluate(HAND_OVER, ["dragover", base64.b64encode(file).decode()])
        assert "over" in seen.locator("body").get_attribute("class")
    seen.evaluate(HAND_OVER, [way, base64.b64encode(file).decode()])
    seen.get_by_role("img", name="Image 1").wait_for()
    assert "over" not in seen.locator("body").get_attribute("class").split()
    ask(seen, "What?")
    answered(seen)
    assert server.asked[0][1]["messages"][0]["content"][0]["image_url"]["url"] == data_url(file)


def test_images_are_taken_back(seen, server):
    server.answers.append(streamed("Blue."))
    seen.get_by_label("Add images").set_input_files(chosen(picture("red"), picture("blue")))
    seen.get_by_role("button", name="Remove image 1").click()
    ask(seen, "What?")
    answered(seen)
    urls = [part["image_url"]["url"] for part in server.asked[0][1]["messages"][0]["content"][:-1]]
    assert urls == [data_url(picture("blue"))]


def test_what_is_no_image_is_told_and_not_sent(seen, server):
    seen.get_by_label("Add images").set_input_files(chosen(b"no image at all"))
    assert "0.png is no image that can be shown here." in seen.get_by_role("alert").inner_text()
    assert seen.locator("#shots img").count() == 0


def test_large_images_are_made_smaller(seen, server):
    server.answers.append(streamed("Large."))
    seen.get_by_label("Add images").set_input_files(chosen(picture("blue", (6000, 4000))))
    seen.get_by_role("img", name="Image 1").wait_for()
    ask(seen, "What?")
    answered(seen)
    head, data = server.asked[0][1]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert 11e6 < image.width * image.height <= 12e6 and image.width / image.height == pytest.approx(1.5, rel=0.01)
    assert image.getpixel((9, 9))[2] > 240


def test_an_answer_is_stopped(seen, server):
    server.answers += [streamed("One, two, ", threading.Event(), "three"), streamed("Three.")]
    ask(seen, "Count.")
    seen.get_by_text("One, two,").wait_for()
    seen.get_by_role("button", name="Stop").click()
    seen.get_by_role("status").get_by_text("Stopped.").wait_for()
    assert server.broken_off.wait(10)
    assert (
        seen.get_by_role("button", name="Ask", exact=True).is_visible() and not seen.get_by_role("alert").is_visible()
    )
    # What had come stays, on the page and in the conversation.
    ask(seen, "Go on.")
    answered(seen)
    assert server.asked[1][1]["messages"][1] == {"role": "assistant", "content": "One, two, "}


def test_what_is_stopped_before_a_word_can_be_asked_again(seen, server):
    server.answers.append(streamed(threading.Event(), "late"))
    seen.get_by_label("Add images").set_input_files(chosen(picture()))
    seen.get_by_role("img", name="Image 1").wait_for()
    ask(seen, "Slow?")
    seen.get_by_role("button", name="Stop").click()
    seen.get_by_role("status").get_by_text("Stopped.").wait_for()
    assert seen.get_by_label("Your question").input_value() == "Slow?" and seen.locator(".turn").count() == 0
    assert seen.locator("#shots img").count() == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "The server cannot answer this question. Because."),
        (401, "The server asks for an API key."),
        (413, "That is too much for the server: send fewer or smaller images. Because."),
        (429, "The server is busy. Wait a little and ask again. Because."),
        (500, "The server failed. Because. (500)"),
        (503, "The server is not ready or too busy."),
    ],
)
def test_errors_are_told_in_words(seen, server, status, words):
    server.answers += [(status, "Because."), streamed("Now.")]
    ask(seen, "What?")
    seen.get_by_role("alert").wait_for()
    assert words in seen.get_by_role("alert").inner_text()
    # The question is there to be asked again.
    assert seen.get_by_label("Your question").input_value() == "What?" and seen.locator(".turn").count() == 0
    seen.get_by_role("button", name="Ask", exact=True).click()
    answered(seen)
    assert not seen.get_by_role("alert").is_visible() and len(server.asked[1][1]["messages"]) == 1


def test_answers_that_fail_on_the_way_are_told(seen, server):
    server.answers += [failing("Out of memory.", "Half"), streamed("Half")[:2], streamed("Cut", finish="length")]
    for words in ("The server failed. Out of memory.", "The server cannot be reached, or the connection broke off."):
        ask(seen, "What?")
        seen.get_by_role("alert").get_by_text(words).wait_for()
        assert last_text(seen) == "Half"
    ask(seen, "What?")
    seen.get_by_role("status").get_by_text("Cut off: the longest answer that the server gives.").wait_for()
    assert not seen.get_by_role("alert").is_visible()


def test_an_empty_question_is_not_sent(seen, server):
    ask(seen, "  ")
    assert "Ask something first" in seen.get_by_role("alert").inner_text() and server.asked == []


def test_an_api_key_is_sent_and_kept_for_the_tab_alone(browser, server):
    server.key = "sk-secret"
    server.answers.append(streamed("Yes."))
    context = browser.new_context()
    seen = context.new_page()
    seen.goto(server.url)
    seen.get_by_role("alert").get_by_text("The server asks for an API key.").wait_for()
    seen.get_by_label("Only if the server asks for one.").fill("sk-secret")
    seen.get_by_label("Your question").click()
    seen.get_by_text("digits-llava").first.wait_for(state="attached")
    assert not seen.get_by_role("alert").is_visible()
    seen.reload()
    seen.get_by_text("digits-llava").first.wait_for(state="attached")
    ask(seen, "Really?")
    answered(seen)
    assert server.asked[0][0]["Authorization"] == "Bearer sk-secret"
    assert seen.evaluate("localStorage.length") == 0 and context.cookies() == []
    context.close()


HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><b>bold</b>\n&amp; [a](javascript:alert(1))"
)


def test_nothing_in_an_answer_is_run(seen, server):
    server.answers += [streamed(HOSTILE), (400, HOSTILE)]
    ask(seen, HOSTILE)
    answered(seen)
    assert last_text(seen) == HOSTILE
    ask(seen, "Again?")
    seen.get_by_role("alert").wait_for()
    assert HOSTILE.split("\n")[0] in seen.get_by_role("alert").inner_text()
    assert (
        seen.evaluate("window.ran") is None and seen.locator("#talk script, #talk img, #talk b, #fault *").count() == 0
    )


#: What an injection would do.
INJECTIONS = (
    "() => { document.body.innerHTML = '<b>'; }",
    "() => { const s = document.createElement('script'); s.append('window.ran = 3'); document.body.append(s); }",
    "() => { const s = document.createElement('style'); s.append('* { color: red }'); document.body.append(s); }",
    "() => { const i = new Image(); i.src = 'stolen'; document.body.append(i); }",
    "() => fetch('http://127.0.0.1:9/stolen')",
)


def test_the_policy_holds_in_the_browser(seen, server):
    for injection in INJECTIONS:
        with contextlib.suppress(Exception):
            seen.evaluate(injection)
    assert seen.evaluate("window.ran") is None and seen.get_by_label("Your question").count() == 1
    assert "/stolen" not in server.paths
    for directive in ("TrustedHTML", "TrustedScript", "style-src", "img-src", "connect-src"):
        assert any(directive in said for said in seen.complaints), directive
    seen.complaints.clear()


NARROW = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 1}
WIDE = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"}


@pytest.mark.parametrize("seen", [NARROW, {"viewport": {"width": 320, "height": 600}}, WIDE], indirect=True)
def test_nothing_is_wider_than_the_screen(seen, server):
    server.answers += [streamed("A" * 500 + " " + "word " * 200), (400, "B" * 500)]
    seen.get_by_label("Add images").set_input_files(chosen(*[picture(size=(900, 60))] * 3))
    seen.get_by_role("img", name="Image 3").wait_for()
    wide = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not seen.evaluate(wide)
    ask(seen, "C" * 300)
    answered(seen)
    assert not seen.evaluate(wide)
    ask(seen, "What?")
    seen.get_by_role("alert").wait_for()
    seen.get_by_text("API key", exact=True).click()
    assert not seen.evaluate(wide)
    # What is tapped is large enough to be tapped.
    heights = seen.locator("button:visible, .button:visible").evaluate_all("all => all.map(each => each.offsetHeight)")
    assert len(heights) >= 3 and min(heights) >= 32


@pytest.mark.parametrize("seen", [NARROW], indirect=True)
def test_a_phone_is_offered_its_camera(seen):
    assert seen.get_by_text("Photo", exact=True).is_visible()
    assert seen.locator("#camera").get_attribute("capture") == "environment"


def test_a_mouse_is_not_offered_a_camera(seen):
    assert not seen.get_by_text("Photo", exact=True).is_visible() and seen.get_by_text("Add images").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme)
    seen = context.new_page()
    seen.goto(server.url)
    ground, ink, soft = (
        seen.evaluate(f"() => getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("body", "backgroundColor"), ("body", "color"), (".soft", "color"))
    )
    assert (_light(ground) > 0.5) is (scheme == "light")
    for text in (ink, soft):
        bright, dim = sorted((_light(text), _light(ground)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5  # WCAG 2, AA
    context.close()


@functools.cache
def _light(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_tab_reaches_everything_in_order(seen):
    reached = []
    for _ in range(4):
        seen.keyboard.press("Tab")
        reached.append(seen.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:4] == ["question", "files", "ask", "SUMMARY"]
