"""The page and its headers, without a browser."""

import base64
import hashlib
import re
import subprocess
import sys

from attnpack_serve.page import page


def test_the_policy_allows_the_pages_own_script_and_style_alone():
    html, headers = page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
        # No other one, which the policy would stop.
        assert len(re.findall(rf"<{tag}\b", html)) == 1
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    assert "unsafe" not in headers["Content-Security-Policy"] and "*" not in headers["Content-Security-Policy"]
    assert not re.search(r"<[^>]*\s(style|on\w+)=", html)
    assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_one_file_without_outside_resources():
    html, _ = page()
    assert not re.search(r"https?:|//\w|url\(|@import|\bimport\b", re.sub(r"(?m)(^|\s)//.*$", "", html))
    sources = re.findall(r"\b(?:src|href|action)=\"([^\"]*)\"", html)
    assert sources == ["data:,"]
    assert html.count("\n") < 400


def test_no_text_becomes_html():
    html, _ = page()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", html)


def test_every_control_has_a_name():
    html, _ = page()
    labelled = set(re.findall(r'<label for="(\w+)"', html))
    assert set(re.findall(r'<(?:input|textarea|select)[^>]*\bid="(\w+)"', html)) == labelled


def test_neither_images_nor_the_page_need_pytorch():
    code = (
        "import sys, attnpack_serve.images, attnpack_serve.page\n"
        "assert not {'torch', 'transformers', 'numpy', 'attnpack_fx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
