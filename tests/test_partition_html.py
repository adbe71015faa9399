"""course/partition.html in a headless Chromium: the page's own gpart-v1, in JavaScript,
against vectors.json and the golden files, and what the page shows of them."""

import base64
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.linalg import norm

from tests.test_format import REFUSED, VECTORS, label, reader

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "course" / "partition.html"
GOLDEN = ROOT / "format" / "golden"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: needs Chromium")


class Browser:
    """One tab, spoken to in Chromium's own protocol: messages of JSON, each with a zero
    byte at its end, which it reads from file descriptor 3 and answers on 4."""

    def __init__(self, profile):
        theirs, self.commands = os.pipe()
        self.answers, their_answers = os.pipe()
        # out of the way of 3 and 4, which the shell is to give them
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs, their_answers)]
        shell = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs, their_answers, *ends):
            os.close(fd)
        self.count, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = answer["sessionId"]
        watch = "globalThis.errors = []; addEventListener('error', (e) => errors.push("
        watch += "e.message)); addEventListener('unhandledrejection', (e) => "
        watch += "errors.push(String(e.reason)))"
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=watch)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.answers, 1 << 20)
                assert more, "Chromium has ended"
                self.rest += more
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """The value of a script's last expression, awaited if it is a promise."""
        settings = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=script, **settings)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, width):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=PAGE.as_uri())
        self.wait("document.readyState === 'complete'")

    def set(self, **values):
        """Move sliders as a person would: the value, then the event."""
        for key, value in values.items():
            self.run(
                f"{{ const input = document.getElementById('{key}'); input.value = "
                f"{value}; input.dispatchEvent(new Event('input')); }}"
            )

    def text(self, css):
        return self.run(f"document.querySelector('{css}')?.innerText ?? ''")

    def texts(self, css):
        return self.run(
            f"Array.from(document.querySelectorAll('{css}'), (x) => x.textContent)"
        )

    def drop(self, content, name="adapter.safetensors"):
        """Drop a file on the page; wait until it shows the layers or an error."""
        data = base64.b64encode(content).decode()
        self.run(
            f"""{{
                document.getElementById("verdict").textContent = "";
                document.getElementById("report").textContent = "";
                const bytes = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], "{name}"));
                const how = {{ dataTransfer, bubbles: true, cancelable: true }};
                document.body.dispatchEvent(new DragEvent("drop", how));
            }}"""
        )
        self.wait("document.querySelector('table, .bad:not(:empty)')")

    def wait(self, condition):
        self.run(
            f"""(async () => {{
                const start = performance.now();
                while (!({condition})) {{
                    await new Promise((go) => setTimeout(go, 5));
                    if (performance.now() > start + 60_000) throw Error("in vain");
                }}
            }})()"""
        )

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=60)
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
    browser.open(width=1000)
    yield browser
    assert browser.run("errors") == []


# --- gpart-v1 in JavaScript ---
@pytest.mark.parametrize("case", VECTORS["permutations"], ids=label)
def test_page_permutes_as_the_vectors(page, case):
    setup = f"const p = partition({case['N']}n, 1, {case['seed']}n);"
    count = min(int(case["N"]), 2**16)
    a, b, keys, pi = page.run(
        f"{{ {setup} [p.a, p.b, p.keys, range({count}).map((i) => "
        "String(permute(i, p)))] }"
    )
    assert [a, b, keys, pi[:12]] == [case["a"], case["b"], case["keys"], case["pi"]]
    packed = struct.pack(f"<{count}q", *map(int, pi))
    assert f"{zlib.crc32(packed):08x}" == case["crc32"]
    for trace in case["traces"]:
        i = trace["i"] + ("n" if int(case["N"]) > 2**53 else "")
        got = page.run(f"{{ {setup} String(permute({i}, p)) }}")
        assert got == trace["steps"][-1]["E"]


@pytest.mark.parametrize("case", VECTORS["permutations"], ids=label)
def test_page_partitions_as_the_vectors(page, case):
    bits = "(x) => new Uint32Array(Float32Array.of(x).buffer)[0]"
    last = f"{int(case['N']) - 1}" + ("n" if int(case["N"]) > 2**53 else "")
    for part in case["partitions"]:
        got = page.run(
            f"""{{
                const p = partition({case["N"]}n, {part["d"]}, {case["seed"]}n);
                const j = {part["j"]}, bits = {bits};
                [range({len(part["groups"])}).map((i) => group(i, p)),
                    group({last}, p), j.map((j) => String(size(j, p))),
                    j.map((j) => bits(scale(j, p, true)))]
            }}"""
        )
        assert got[:3] == [part["groups"], part["last"], part["sizes"]]
        assert [f"{x:08x}" for x in got[3]] == part["scale"]


@pytest.mark.parametrize("case", VECTORS["updates"], ids=label)
def test_page_updates_as_the_vectors(page, case):
    theta = [int(bits, 16) for bits in case["theta"]]
    update = page.run(
        f"""{{
            const p = partition({case["N"]}n, {case["d"]}, {case["seed"]}n);
            const theta = new Float32Array(Uint32Array.from({theta}).buffer);
            const bits = new Uint32Array(
                moves(theta, p, {json.dumps(case["isometric"])}).buffer);
            range({case["N"]}).map((i) => bits[group(i, p)])
        }}"""
    )
    assert [f"{x:08x}" for x in update] == case["update"]


@pytest.mark.parametrize("case", VECTORS["digests"])
def test_page_digests_as_the_vectors(page, case):
    metadata = {key: x for key, x in case["metadata"].items() if key != "sha256"}
    tensors = [
        [t["name"], {**t, "data": list(bytes.fromhex(t["data"]))}]
        for t in case["tensors"]
    ]
    got = page.run(
        f"""digest({json.dumps(metadata)}, {json.dumps(tensors)}.map(([name, t]) =>
            [name, {{ ...t, data: Uint8Array.from(t.data) }}]))"""
    )
    assert got == case["sha256"]


# --- Files ---
@pytest.mark.parametrize("case", VECTORS["files"], ids=label)
def test_dropped_file_is_shown(page, case):
    """The digest, what the file says, and each layer's share of the update."""
    content = (GOLDEN / case["file"]).read_bytes()
    page.drop(content, case["file"])
    assert page.text("#verdict").startswith(f"✓ {case['file']} is whole")
    assert case["sha256"] in page.text("#verdict")
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["N"] == case["N"]
    assert facts["d"] == str(case["d"])
    assert facts["seed"] == case["seed"]
    assert facts["isometric"] == str(case["isometric"]).lower()
    for name, (dtype, shape) in case["tensors"].items():
        if name != "theta":
            assert f"{name} {dtype} {shape}" in facts["other tensors"]

    update = reader.update(reader.read(content))
    squares = [np.square(x.astype(np.float64)).sum() for x in update.values()]
    columns = np.array(page.texts("td")).reshape(-1, 5).T
    assert columns[0].tolist() == [name for name, _ in case["manifest"]]
    shapes = [
        " \N{MULTIPLICATION SIGN} ".join(map(str, shape))
        for _, shape in case["manifest"]
    ]
    assert columns[1].tolist() == shapes
    parts = [100 * x.size / int(case["N"]) for x in update.values()]
    assert columns[2].tolist() == [f"{x:.1f} %" for x in parts]
    shares = [f"{100 * x / sum(squares):.1f} %" for x in squares]
    assert columns[3].tolist() == shares
    (length,) = re.findall(r"‖Pθ‖ = ([\d.]+),", page.text("#layers .note"))
    assert float(length) == float(f"{sum(squares) ** 0.5:.6g}")


def test_chosen_file_is_shown(page):
    """Through the file input as through a drop."""
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    found = page.call("DOM.querySelector", nodeId=document, selector="#file")
    path = str(GOLDEN / "elsewhere.safetensors")
    page.call("DOM.setFileInputFiles", files=[path], nodeId=found["nodeId"])
    page.wait("document.querySelector('table')")
    assert page.text("#verdict").startswith("✓ elsewhere.safetensors")


def test_histogram_counts_every_number(page):
    """theta = (-1, 0, 0, 3): four bins over [-1, 3], the second one the fullest."""
    figure = page.run("histogram(Float32Array.of(-1, 0, 0, 3))")
    heights = [float(x) for x in re.findall(r'height="([\d.]+)" fill', figure)]
    assert heights == [50, 100, 0, 50]
    assert "from -1 to 3; the fullest bar has 2 of 4" in figure


@pytest.mark.parametrize("name", REFUSED)
def test_page_refuses(page, name):
    """What reader.py and gpart.py refuse; nothing of the file is shown."""
    page.drop((GOLDEN / "one-number.safetensors").read_bytes())
    assert page.texts("table") != []
    page.drop(REFUSED[name], "bad<b>.safetensors")
    assert page.text("#verdict").startswith("✗ bad<b>.safetensors is no usable")
    assert page.text("#report") == ""


@pytest.mark.slow
def test_page_refuses_every_flipped_bit(page):
    content = (GOLDEN / "elsewhere.safetensors").read_bytes()
    accepted = page.run(
        f"""(async () => {{
            const bytes = Uint8Array.from({list(content)}), accepted = [];
            await read(bytes);
            for (let i = 0; i < 8 * bytes.length; i++) {{
                const damaged = bytes.slice();
                damaged[i >> 3] ^= 1 << i % 8;
                await read(damaged).then(() => accepted.push(i), () => 0);
            }}
            return accepted;
        }})()"""
    )
    assert accepted == []


# --- What it shows ---
@pytest.mark.parametrize("d", [1, 5, 12])
def test_sliders_deal_the_weights(page, d):
    """N = 12 and seed 42 give the vectors' groups, their sizes, and P^T P = I."""
    page.set(N=12, seed=42, d=d)
    (case,) = (c for c in VECTORS["permutations"] if c["N"] == "12")
    (part,) = (part for part in case["partitions"] if part["d"] == d)
    groups = part["groups"]
    assert page.texts("#weights span") == [str(j) for j in groups]
    sizes = [groups.count(j) for j in range(d)]
    shown = page.run("document.querySelector('#sizes svg').ariaLabel")
    assert shown == "Group sizes: " + ", ".join(map(str, sizes))
    assert page.run("document.querySelectorAll('#P rect[data-g]').length") == 12
    assert page.run("document.querySelectorAll('#PtP rect[data-g]').length") == d
    if d <= 8:
        assert page.texts("#PtP text") == ["1"] * d
    page.run("document.getElementById('isometric').click()")
    if d <= 8:
        assert page.texts("#PtP text") == [str(n) for n in sizes]


def lengths(page):
    """‖θ‖, ‖Pθ‖ and ‖BA‖ as the page tells them."""
    shown = page.run("document.querySelector('#lengths svg').ariaLabel")
    return re.findall(r"is (\d+\.\d+)", shown)


def test_lengths_are_kept_by_P_and_bent_by_LoRA(page):
    theta = np.array([0.5, -1, 0.25, 1.5, -0.75])
    own, BA = norm(theta), norm(np.outer(theta[3:], theta[:3]))
    page.set(N=12, seed=42, d=5)
    page.run(f"theta.splice(0, 5, ...{theta.tolist()}); draw()")
    assert lengths(page) == [f"{x:.3f}" for x in (own, own, BA)]
    page.run("document.querySelector('[data-move=double]').click()")
    assert lengths(page) == [f"{x:.3f}" for x in (2 * own, 2 * own, 4 * BA)]
    assert page.texts("#theta output") == [f"{2 * x:.2f}" for x in theta]
    page.run("document.getElementById('isometric').click()")
    unscaled = norm(2 * theta * np.sqrt([3, 3, 2, 2, 2]))
    assert lengths(page) == [f"{x:.3f}" for x in (2 * own, unscaled, 4 * BA)]


def test_slider_moves_theta(page):
    page.set(N=12, d=2)
    page.run("document.querySelector('[data-move=zero]').click()")
    assert lengths(page) == ["0.000", "0.000", "0.000"]
    page.run(
        "{ const input = document.querySelectorAll('#theta input')[1]; input.value = "
        "1.5; input.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    assert lengths(page) == ["1.500", "1.500", "0.000"]


@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("N", [1, 48])
def test_nothing_is_wider_than_the_window(browser, width, N):
    browser.open(width)
    browser.set(N=N, d=N)
    browser.drop((GOLDEN / "elsewhere.safetensors").read_bytes())
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("errors") == []


def test_page_is_one_short_file():
    html = PAGE.read_text(encoding="utf-8")
    assert len(html.splitlines()) <= 400
    assert not re.search(r"src=|href=|url\(|@import|fetch\(|XMLHttp", html)
