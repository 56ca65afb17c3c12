"""Images from other servers: which addresses are refused, that the address checked is the one connected to, limits.

No address but 127.0.0.1 is connected to. The code never does: a test's `connect` leads from the public address that was
checked to a server of the test.
"""

import asyncio
import ipaddress
import shutil
import ssl
import subprocess
from urllib.parse import urlsplit

import pytest

pytest.importorskip("h11", reason="the extra serve is not installed")

from attnpack_serve.fetching import FetchError, Host, Network, fetch, is_public
from attnpack_serve.images import BadImageError, ImageLimits, load_images
from tests.serve.test_images import PNG, data_url

PUBLIC = "93.184.215.14"
HOSTS = ("images.example.com",)
URL = "http://images.example.com/a.png"


class Web:
    """A server whose answers are given by path, and the network that leads to it from any public address.

    connected: address, port and TLS name of every connection. asked: requests. resolved: names looked up.
    """

    def __init__(self, answers, addresses=None, tls=None):
        self.answers, self.addresses, self.tls = answers, addresses or {}, tls
        self.connected, self.asked, self.resolved = [], [], []
        self.sent = 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls and self.tls[0])
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    @property
    def network(self):
        return Network(self._resolve, self._connect)

    async def _resolve(self, host, port):
        self.resolved.append(host)
        found = self.addresses.get(host, PUBLIC)
        # A list has one answer for each time that it is asked.
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, OSError):
            raise found
        return found.split()

    async def _connect(self, address, port, ssl=None, server_hostname=None):
        assert is_public(ipaddress.ip_address(address))
        self.connected.append((address, port, server_hostname))
        if ssl:
            assert ssl.check_hostname and ssl.verify_mode.name == "CERT_REQUIRED"
            return await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.tls[1], server_hostname=server_hostname
            )
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def _serve(self, reader, writer):
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(request)
            answer = self.answers[request.split()[1]]
            for part in [answer] if isinstance(answer, bytes) else answer:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                    continue
                writer.write(part)
                await writer.drain()
                self.sent += len(part)
        except OSError:
            pass
        finally:
            writer.close()


def ok(body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = ["HTTP/1.1 200 OK", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def to(place: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()


def fetched(url, answers=None, hosts=HOSTS, most=1000, seconds=20.0, **options):
    """What was downloaded or what was said, and the server."""

    async def run():
        async with Web(answers or {}, **options) as web:
            try:
                return await fetch(url, hosts, most, seconds, web.network), web
            except FetchError as error:
                assert error.__cause__ is None
                return str(error), web

    return asyncio.run(run())


def loaded(url, hosts=(), **options):
    async def run():
        async with Web({"/a.png": ok(PNG)}, **options) as web:
            return await load_images([data_url(PNG), url], ImageLimits(hosts=hosts), web.network), web

    return asyncio.run(run())


#: Hosts in URLs that lead inwards: as they are written, and to what the system's resolver makes of them.
INWARDS = {
    "127.0.0.1": "127.0.0.1",
    "[::1]": "::1",
    "10.0.0.1": "10.0.0.1",
    "172.16.0.1": "172.16.0.1",
    "192.168.0.1": "192.168.0.1",
    "169.254.169.254": "169.254.169.254",
    "100.64.0.1": "100.64.0.1",
    "0.0.0.0": "0.0.0.0",
    "224.0.0.1": "224.0.0.1",
    "255.255.255.255": "255.255.255.255",
    "2130706433": "127.0.0.1",
    "0x7f000001": "127.0.0.1",
    "0177.0.0.1": "127.0.0.1",
    "127.1": "127.0.0.1",
    "[::]": "::",
    "[::ffff:127.0.0.1]": "::ffff:127.0.0.1",
    "[::ffff:a00:1]": "::ffff:10.0.0.1",
    "[64:ff9b::7f00:1]": "64:ff9b::7f00:1",
    "[64:ff9b::a9fe:a9fe]": "64:ff9b::169.254.169.254",
    "[fe80::1]": "fe80::1",
    "[fd00::1]": "fd00::1",
    "[ff02::1]": "ff02::1",
    "localhost": "127.0.0.1",
    "named.example.com": "10.1.2.3",
    "both.example.com": f"{PUBLIC} 127.0.0.1",
    "both6.example.com": f"{PUBLIC} fe80::1%eth0",
}


@pytest.mark.parametrize("host", INWARDS)
@pytest.mark.parametrize("allowed", [False, True])
def test_what_leads_inwards_is_refused(host, allowed):
    web = {"addresses": {host.strip("[]"): INWARDS[host]}}
    with pytest.raises(BadImageError) as caught:
        loaded(f"http://{host}/a.png", (host,) if allowed else HOSTS, **web)
    said = str(caught.value)
    assert said.startswith(f"image 2: got 'http://{host}/a.png'"[:40])
    # Also where the operator allows it by name.
    assert ("address that is not public" if allowed else "expected a host and a port from which") in said
    assert "data: URL" in said


@pytest.mark.parametrize("host", [host for host in INWARDS if not host.endswith(".com")])
def test_the_systems_resolver_is_checked_too(host):
    async def connect(*_, **__):
        raise AssertionError("connected")

    with pytest.raises(FetchError, match=r"not public|no address for the host"):
        asyncio.run(fetch(f"http://{host}/", (host,), 1000, 20.0, Network(connect=connect)))


@pytest.mark.parametrize(
    "address",
    [
        *("192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "240.0.0.1"),
        *("::127.0.0.1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1", "64:ff9b:1::1"),
        *("fec0::1", "fc00::1", "::ffff:169.254.169.254", "2606:4700::1%1"),
    ],
)
def test_special_addresses_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_other_addresses_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_without_allowed_hosts_nothing_is_looked_up():
    with pytest.raises(
        BadImageError, match=r"image 2: got 'http.*', but this server fetches no images; send .* data: URL"
    ):
        loaded("https://images.example.com/a.png")
    said, web = fetched(URL, hosts=())
    assert "fetches no images" in said and web.resolved == []


#: URLs that no host's name makes good.
MISSHAPEN = {
    "http://user:secret@images.example.com/": "a user's name or a password",
    "http://images.example.com@10.0.0.1/": "a user's name or a password",
    "http://10.0.0.1\\@images.example.com/": "printable ASCII",
    "http://images.example.com\\.evil.example/": "printable ASCII",
    "http://images.example.com/a b": "printable ASCII",
    "http://images.example.com/\r\nHost: evil": "printable ASCII",
    "http://images.example.com/\x7f": "printable ASCII",
    "http://images.example.com/ä": "percent-encode",
    "http://images.example.com:port/": "expected http:// or https://",
    "http://images.example.com:99999/": "expected http:// or https://",
    "http://[::1/": "expected http:// or https://",
    "http:///a.png": "expected http:// or https://",
    "http://images.example.com:8080/": "a host and a port from which",
    "http://images.example.com:0/": "a host and a port from which",
    "http://images.example.com./": "expected http:// or https://",
    "http://images.example.com.evil.example/": "a host and a port from which",
    "http://evil-images.example.com/": "a host and a port from which",
    "ftp://images.example.com/a.png": "expected http:// or https://",
    "file://images.example.com/etc/passwd": "expected http:// or https://",
}


@pytest.mark.parametrize("url", MISSHAPEN)
def test_misshapen_urls_are_refused_before_a_look_up(url):
    said, web = fetched(url)
    assert MISSHAPEN[url] in said and "secret" not in said and web.resolved == []


@pytest.mark.parametrize(
    ("entry", "url", "allows"),
    [
        ("images.example.com", "HTTP://Images.Example.COM/", True),
        ("Images.Example.com", URL, True),
        ("images.example.com", "https://images.example.com:80/", True),
        ("images.example.com:8080", "http://images.example.com:8080/", True),
        ("images.example.com:8080", URL, False),
        (".example.com", URL, True),
        (".example.com", "http://a.b.example.com/", True),
        (".example.com", "http://example.com/", False),
        (".example.com", "http://badexample.com/", False),
        ("example.com", URL, False),
        ("[2606:4700::1111]:8080", "http://[2606:4700::1111]:8080/", True),
    ],
)
def test_hosts_are_named_exactly(entry, url, allows):
    split = urlsplit(url)
    port = split.port or {"http": 80, "https": 443}[split.scheme]
    assert Host.parse(entry).allows(split.hostname or "", port) is allows
    _, web = fetched(url, hosts=(entry,), addresses={split.hostname: OSError("unknown")})
    assert bool(web.resolved) is allows


@pytest.mark.parametrize(
    "entry", ["", ".", "*", "*.example.com", "a..b", "http://a", "a/b", "a:0", "a:x", "a@b", "a b", "::1", "[::g]"]
)
def test_hosts_that_are_none_are_refused(entry):
    with pytest.raises(ValueError, match="expected a host's name without scheme and path"):
        Host.parse(entry)


def test_an_image_is_fetched():
    images, web = loaded(URL, HOSTS)
    assert [image.size for image in images] == [(24, 16)] * 2
    assert images[0].tobytes() == images[1].tobytes()
    assert web.connected == [(PUBLIC, 80, None)] and web.resolved == ["images.example.com"]
    (request,) = web.asked
    assert "host: images.example.com\r\n" in request.lower()
    assert not any(word in request.lower() for word in ("cookie", "authorization", "proxy"))


def test_what_is_fetched_is_decoded_like_the_rest():
    with pytest.raises(BadImageError, match="image 2: got 5 bytes of another kind, expected a PNG"):
        asyncio.run(_load_text())


async def _load_text():
    async with Web({"/a.png": ok(b"hello")}) as web:
        await load_images([data_url(PNG), URL], ImageLimits(hosts=HOSTS), web.network)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to():
    # A name that resolves inwards the second time it is asked for.
    found, web = fetched(URL, {"/a.png": ok(PNG)}, addresses={"images.example.com": [PUBLIC, "127.0.0.1"]})
    assert found == PNG
    assert web.connected == [(PUBLIC, 80, None)] and web.resolved == ["images.example.com"]


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found, web = fetched(URL, {"/a.png": ok(PNG)})
    assert found == PNG and web.asked[0].startswith("GET /a.png HTTP/1.1")


def test_the_next_address_is_tried_and_ipv4_first(monkeypatch):
    async def run():
        async with Web({"/a.png": ok(PNG)}, {"images.example.com": f"2606:4700::1111 {PUBLIC} 1.1.1.1"}) as web:
            tried = []

            async def connect(address, port, **options):
                tried.append(address)
                if address == PUBLIC:
                    raise ConnectionRefusedError
                return await web._connect(address, port, **options)

            return await fetch(URL, HOSTS, 1000, 20.0, Network(web._resolve, connect)), tried

    assert asyncio.run(run()) == (PNG, [PUBLIC, "1.1.1.1"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    answers = {"/a.png": to("/b.png?size=2#top", status), "/b.png?size=2": ok(PNG)}
    found, web = fetched(URL, answers)
    assert found == PNG and web.resolved == ["images.example.com"] * 2


def test_three_redirects_are_followed_and_no_more():
    answers = {f"/{number}": to(f"/{number + 1}") for number in range(4)} | {"/3": ok(PNG), "/4": ok(PNG)}
    found, web = fetched("http://images.example.com/0", answers)
    assert found == PNG and len(web.asked) == 4
    said, web = fetched("http://images.example.com/0", answers | {"/3": to("/4")})
    assert "got more than 3 redirects, expected an image; give the address" in said and len(web.asked) == 4


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("http://10.0.0.1/", "a host and a port from which"),
        ("http://inner.example.com/", "has an address that is not public"),
        ("//inner.example.com/", "has an address that is not public"),
        ("http://images.example.com:22/", "a host and a port from which"),
        ("file:///etc/passwd", "expected http:// or https://"),
        ("data:image/png;base64,aGk=", "expected http:// or https://"),
        ("http://[", "expected http:// or https://"),
        ("http://user@images.example.com/", "a user's name or a password"),
        ("/a\xffb", "printable ASCII"),
    ],
)
def test_redirects_are_checked_like_the_first(target, part):
    hosts = (*HOSTS, "inner.example.com")
    answer = to(target).decode().encode("latin-1")
    said, web = fetched(URL, {"/a.png": answer}, hosts, addresses={"inner.example.com": "192.168.0.7"})
    assert part in said and len(web.connected) == 1


def test_a_redirect_to_a_name_that_turned_inwards_is_refused():
    answers = {"/a.png": to("/b.png")}
    said, web = fetched(URL, answers, addresses={"images.example.com": [PUBLIC, "127.0.0.1"]})
    assert "has an address that is not public" in said and len(web.connected) == 1


def test_a_length_beyond_the_limit_is_refused_before_the_body():
    said, _ = fetched(URL, {"/a.png": [ok(b"").replace(b"Length: 0", b"Length: 1001"), 30.0]})
    assert "got more than 1,000 bytes at" in said and "expected at most that; send a smaller image" in said
    assert fetched(URL, {"/a.png": ok(bytes(1000))})[0] == bytes(1000)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_goes_on_stops_at_the_limit(chunked):
    part = bytes(1 << 16)
    body = [b"10000\r\n" + part + b"\r\n" if chunked else part] * 1600
    head = ok(b"", *(["Transfer-Encoding: chunked"] if chunked else []), length=False)
    said, web = fetched(URL, {"/a.png": [head, *body]}, most=1 << 20)
    assert "got more than 1,048,576 bytes" in said
    # A hundredth of what the server would send; the rest is what lies in buffers between.
    assert web.sent < 16 << 20


def test_what_takes_too_long_is_given_up():
    for answer in ([30.0], [ok(b"", length=False), *[b"x", 0.05] * 600]):
        said, _ = fetched(URL, {"/a.png": answer}, seconds=0.3)
        assert "within 0.3 seconds" in said and "send the image as a data: URL" in said


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "got status 404 for 'http://images"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "got status 302"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 0\r\n\r\n", "got status 206"),
        (ok(PNG, "Content-Encoding: gzip"), "status 200 and a content coding"),
        (ok(PNG)[:-20], "breaks off or is not HTTP"),
        (b"", "breaks off or is not HTTP"),
        (b"220 mail.example.com ESMTP\r\n", "breaks off or is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, "breaks off or is not HTTP"),
    ],
)
def test_answers_that_are_no_image_are_refused(answer, part):
    assert part in fetched(URL, {"/a.png": answer})[0]


def test_names_that_are_unknown_and_servers_that_are_away():
    said, _ = fetched(URL, addresses={"images.example.com": OSError("unknown")})
    assert "got no address for the host of" in said and "check its name" in said

    async def refuse(*_, **__):
        raise ConnectionRefusedError

    async def resolve(*_):
        return [PUBLIC]

    with pytest.raises(FetchError, match="got no connection for 'http://images"):
        asyncio.run(fetch(URL, HOSTS, 1000, 20.0, Network(resolve, refuse)))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates_are_for_the_name_and_not_the_address(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=DNS:images.example.com", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    url = "https://images.example.com/a.png"
    found, web = fetched(url, {"/a.png": ok(PNG)}, tls=(server, client))
    assert found == PNG and web.connected == [(PUBLIC, 443, "images.example.com")]
    # Another name, and an authority that is not trusted.
    for name, context in (("other.example.com", client), ("images.example.com", ssl.create_default_context())):
        said, web = fetched(f"https://{name}/a.png", {"/a.png": ok(PNG)}, (name,), tls=(server, context))
        assert "got no certificate that is valid for it" in said and web.asked == []
