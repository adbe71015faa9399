# SPDX-License-Identifier: Apache-2.0
"""What is no adapter file of this model is a ValueError that says why; the model is
bit for bit what it was, and no tensor is read that it has no place for."""

import contextlib
import copy
import json
import math
import os
import pathlib
import pickle
import random
import re
import sys
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gpart import Partition, attach, load, save
from tests.models import (
    ALL,
    NET,
    D,
    parameters,
    python,
    refused,
    slow,
    snapshot,
    trainable,
)
from tests.storage_models import read, rewrite, trained, write
from tests.test_format import golden_model

GOLDEN = sorted((pathlib.Path(__file__).parents[1] / "format").glob("golden/*"))
NO_ADAPTER = "is no adapter of this model: "
ATTACHED = pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])


def here(attached):
    """The model that a file is loaded into, with an adapter of the same kind or not."""
    return trained(seed=1) if attached else NET.model()


@pytest.fixture
def file(tmp_path):
    """The adapter of trained()."""
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


# --- Wrong content under a digest that agrees ---
def put(**metadata):
    return lambda m, t: m.update(metadata)


def put_theta(edit):
    return lambda m, t: t.update(theta=edit(t["theta"]))


def put_tensor(name, value):
    return lambda m, t: t.update({name: value})


def manifest(edit, grow=0):
    """Edit the manifest, [[name, shape], ...], and add grow to N."""

    def apply(metadata, tensors):
        entries = json.loads(metadata["manifest"])
        edit(entries)
        metadata["manifest"] = json.dumps(entries)
        metadata["N"] = str(int(metadata["N"]) + grow)

    return apply


def put_shape(shape):
    """Instead of [24, 16], for body.0.weight."""
    return manifest(lambda entries: entries[0].__setitem__(1, shape))


def put_name(name):
    """Instead of body.2.bias, [5]."""
    return manifest(lambda entries: entries[3].__setitem__(0, name))


def unlike(name, theirs, ours):
    """What is said of a shape."""
    ours = ours if ours is None else [*ours]
    return re.escape(f"{NO_ADAPTER}{name} has shape {[*theirs]}, and {ours} here")


HOSTILE = {
    "newer format": (put(format="gpart-v2"), "its format is gpart-v2, not gpart-v1"),
    "no format": (lambda m, t: m.pop("format"), "its format is None, not gpart-v1"),
    "d wrong": (put(d="36"), r"theta has shape \[37\], not \[36\]"),
    "d over N": (put(d="534"), "d must be in 1..N = 1..533, got 534"),
    "d zero": (put(d="0"), "d must be in 1..N = 1..533, got 0"),
    "d a fraction": (put(d="37.0"), "are ints.*d=37.0"),
    "d missing": (lambda m, t: m.pop("d"), "are ints.*d={}"),
    "seed too large": (put(seed=str(2**64)), "seed must be in"),
    "seed a long list": (put(seed=str([0] * 1000)), "are ints.*seed=.0, 0"),
    "seed negative": (put(seed="-1"), "seed must be in"),
    "isometric a number": (put(isometric="1"), "isometric is a bool"),
    "N wrong": (put(N="534"), "533 weights are adapted, not 534"),
    "N missing": (lambda m, t: m.pop("N"), "are ints.*N={}"),
    "theta half": (put_theta(torch.Tensor.half), "theta in torch.float16 does not fit"),
    "theta double": (
        put_theta(torch.Tensor.double),
        "theta in torch.float64 does not fit",
    ),
    "theta integer": (put_theta(torch.Tensor.int), "theta in torch.int32 does not fit"),
    "theta too long": (
        put_theta(lambda t: t.repeat(2)),
        r"theta has shape \[74\], not \[37\]",
    ),
    "theta a matrix": (
        put_theta(lambda t: t[None]),
        r"has shape \[1, 37\], not \[37\]",
    ),
    "theta NaN": (put_theta(lambda t: t * math.nan), ": theta is not finite"),
    "theta infinite": (put_theta(lambda t: t / 0), ": theta is not finite"),
    "theta missing": (lambda m, t: t.pop("theta"), "theta has shape None, not"),
    "head NaN": (
        put_tensor("head.0.bias", torch.full([3], math.nan)),
        ": head.0.bias is not finite",
    ),
    "head of wrong shape": (
        put_tensor("head.0.bias", torch.ones(4)),
        unlike("head.0.bias", (4,), (3,)),
    ),
    "head unknown": (
        put_tensor("neck.bias", torch.ones(4)),
        unlike("neck.bias", (4,), None),
    ),
    "head of the adapter": (
        put_tensor("gpart.theta", torch.ones(37)),
        unlike("gpart.theta", (37,), None),
    ),
    "head complex": (
        put_tensor("head.0.bias", torch.ones(3).cfloat()),
        "head.0.bias in torch.complex64 does not fit",
    ),
    "head integer": (
        put_tensor("head.0.bias", torch.ones(3).long()),
        "head.0.bias in torch.int64 does not fit",
    ),
    "head of 8 bits": (
        put_tensor("head.0.bias", torch.ones(3).to(torch.float8_e4m3fn)),
        "head.0.bias in torch.float8_e4m3fn does not fit",
    ),
    "buffer not integer": (
        put_tensor("head.1.num_batches_tracked", torch.tensor(1.5)),
        "num_batches_tracked in torch.float32 does not fit",
    ),
    "buffer of fewer bits": (
        put_tensor("head.1.num_batches_tracked", torch.tensor(1).int()),
        "num_batches_tracked in torch.int32 does not fit",
    ),
    "adapted and stored": (
        put_tensor("body.0.bias", torch.ones(24)),
        "body.0.bias is adapted, and replaced too",
    ),
    "manifest empty": (put(manifest="[]"), "0 weights are adapted, not 533"),
    "manifest missing": (lambda m, t: m.pop("manifest"), "0 weights are adapted"),
    "name lacking": (manifest(list.pop), "528 weights are adapted, not 533"),
    "name twice": (manifest(lambda m: m.append(m[1])), "names a parameter twice"),
    "name twice in N too": (
        manifest(lambda m: m.append(m[1]), grow=24),
        "533 weights are adapted, not 557",
    ),
    "name unknown": (put_name("no.such"), unlike("no.such", (5,), None)),
    "name of the adapter": (put_name("gpart.theta"), unlike("gpart.theta", (5,), None)),
    "name a list": (put_name([]), "unhashable"),
    "shape transposed": (
        put_shape([16, 24]),
        unlike("body.0.weight", (16, 24), (24, 16)),
    ),
    "shape flattened": (put_shape([384]), unlike("body.0.weight", (384,), (24, 16))),
    "shape negative": (
        put_shape([-24, -16]),
        unlike("body.0.weight", (-24, -16), (24, 16)),
    ),
    "shape no list": (put_shape(384), "not iterable"),
    "shape enormous": (put_shape([0.5, 10**400]), "body.0.weight has shape"),
    "base of words": (put(base='{"stats": "one"}'), "could not convert"),
    "base of nothing": (put(base='{"stats": null}'), NO_ADAPTER),
    "base of numbers": (put(base="[1, 2]"), NO_ADAPTER),
    "base enormous": (put(base=f'{{"stats": {10**400}}}'), "too large"),
}


@ATTACHED
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name, attached, file):
    edit, match = HOSTILE[name]
    rewrite(file, edit)
    model = here(attached)
    with refused(model, match) as raised:
        load(model, file)
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) <= 1000


def test_a_buffer_is_not_adapted(file):
    """It would be, by its name and shape."""
    rewrite(file, put_name("stats"))
    model = NET.model()
    with refused(model, "stats is a Tensor"):
        load(model, file)


GARBLED = ["null", '"37"', "-1", "1e999", "3 7", "[[", "[" * 10**5, "NaN", "", "5.0"]
KEYS = ["N", "d", "seed", "isometric", "manifest", "base"]


@pytest.mark.parametrize("value", GARBLED, ids=lambda text: text[:9])
@pytest.mark.parametrize("key", KEYS)
def test_garbled_metadata_are_refused(key, value, file):
    """A signed file whose numbers are none, or not even JSON."""
    rewrite(file, put(**{key: value}))
    model = NET.model()
    with refused(model, NO_ADAPTER):
        load(model, file)


def test_what_the_file_holds_apart_is_not_tied(file):
    """Two entries that are one parameter here cannot both be added."""
    apart = nn.ModuleDict({key: nn.Linear(4, 4, bias=False) for key in "ab"})
    tied = copy.deepcopy(apart)
    attach(apart, 5, target_modules=ALL)
    save(apart, file)
    tied["b"].weight = tied["a"].weight
    with refused(tied, "16 weights are adapted, not 32"):
        load(tied, file)
    rewrite(file, put(N="16"))
    with refused(tied, ": the manifest names a parameter twice$"):
        load(tied, file)


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_a_digest_is_required(digest, file):
    """Without its sha256, or with another, a file is refused for that."""
    metadata, tensors = read(file)
    del metadata["sha256"]
    signature = {"sha256": digest} if digest else {}
    safetensors.torch.save_file(tensors, file, metadata | signature)
    model = NET.model()
    with refused(model, "is damaged: wrong sha256$"):
        load(model, file)


def test_a_dtype_that_this_torch_does_not_know_is_refused(file, monkeypatch):
    """As an older one does not know the newest of 8 and of 4 bits."""
    rewrite(file, put_tensor("head.0.bias", torch.ones(3).to(torch.float8_e4m3fn)))
    monkeypatch.delattr(torch, "float8_e4m3fn")
    model = NET.model()
    with refused(model, f"{NO_ADAPTER}.*float8_e4m3fn"):
        load(model, file)


# --- Foreign, damaged, and headers that lie ---
CONTENTS = {
    "empty": b"",
    "text": b"theta = 0.5, seed = 42\n" * 9,
    "pickle": pickle.dumps([1, 2, 3]),
    "huge header": b"\xff" * 64,
    "zeros": bytes(512),
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "other tensors": safetensors.torch.save(
        {"theta": torch.zeros(D)}, {"format": "pt"}
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_foreign_file_is_refused(name, file):
    file.write_bytes(CONTENTS[name])
    model = NET.model()
    with refused(model, NO_ADAPTER):
        load(model, file)


def test_a_pickle_is_never_opened(file):
    """Loading one could run what it says."""
    opened = []

    class Trap:
        def __reduce__(self):
            return opened.append, (1,)

    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=NO_ADAPTER):
        load(NET.model(), file)
    assert not opened
    model = NET.model()
    torch.save({"theta": torch.zeros(D)}, file)
    with refused(model, NO_ADAPTER):
        load(model, file)


def test_damaged_file_is_refused(file):
    """One bit flipped in any byte, header and tensors alike; cut short; run on. The
    file as it was still loads."""
    content, draw = file.read_bytes(), random.Random(0)
    assert len(content) > 1000
    lengths = [*range(0, len(content), 37), 7, 8, 9, len(content) - 1]
    damaged = [content[:n] for n in lengths]
    damaged += [content + b"\0", content + content]
    for at, byte in enumerate(content):
        flipped = bytes([byte ^ 1 << draw.randrange(8)])
        damaged.append(content[:at] + flipped + content[at + 1 :])
    model = NET.model()
    before = snapshot(model)
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{NO_ADAPTER}|is damaged: wrong sha256"):
            load(model, file)
    assert snapshot(model) == before
    file.write_bytes(content)
    load(model, file)


def unpack(content):
    """A safetensors file is the length of its header in 8 bytes, the header, which is
    JSON, and the body: (header, body)."""
    at = 8 + int.from_bytes(content[:8], "little")
    return content[8:at], content[at:]


def pack(header, body=b""):
    return len(header).to_bytes(8, "little") + header + body


def put_header(old, new):
    """Replace what the pattern old matches in the header."""

    def edit(content):
        header, body = unpack(content)
        header, count = re.subn(old.encode(), new.encode(), header)
        assert count == 1
        return pack(header, body)

    return edit


def put_claim(**claims):
    """Let the header say other things of theta, float32 [37], than are true."""

    def edit(content):
        text, body = unpack(content)
        header = json.loads(text)
        header["theta"].update(claims)
        return pack(json.dumps(header).encode(), body)

    return edit


def put_metadata(value):
    def edit(content):
        text, body = unpack(content)
        header = json.loads(text) | {"__metadata__": value}
        return pack(json.dumps(header).encode(), body)

    return edit


def put_empty(count):
    """Add many tensors without an element to the header."""

    def edit(content):
        text, body = unpack(content)
        header = json.loads(text)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header |= {f"x{k}": empty for k in range(count)}
        return pack(json.dumps(header).encode(), body)

    return edit


HEADERS = {
    "length 2^63": lambda c: (2**63).to_bytes(8, "little") + c[8:],
    "length of the file": lambda c: (len(c) - 8).to_bytes(8, "little") + c[8:],
    "10^12 elements": put_claim(shape=[10**12], data_offsets=[0, 4 * 10**12]),
    "10^12 elements in no bytes": put_claim(shape=[10**12]),
    "2^64 elements": put_claim(shape=[2**32, 2**32], data_offsets=[0, 0]),
    "10^4 dimensions": put_claim(shape=[37] + [1] * 10**4),
    "shape negative": put_claim(shape=[-37]),
    "shape fractional": put_claim(shape=[37.5]),
    "shape a string": put_claim(shape="37"),
    "offsets reversed": put_claim(data_offsets=[148, 0]),
    "offsets overlapping": put_claim(data_offsets=[4, 152]),
    "offsets negative": put_claim(data_offsets=[-148, 0]),
    "dtype unknown": put_claim(dtype="F31"),
    "dtype of 10^4 letters": put_claim(dtype="F" * 10**4),
    "dtype integer": put_claim(dtype="I32"),
    "dtype unsigned": put_claim(dtype="U32"),
    "dtype half": put_claim(dtype="F16", shape=[74]),
    "dtype of 4 bits": put_claim(dtype="F4", shape=[296]),
    "dtype of 8 bits": put_claim(dtype="F8_E8M0", shape=[148]),
    "metadata no strings": put_header('"37"', "37"),
    "metadata a list": put_metadata([]),
    "metadata null": put_metadata(None),
    "metadata twice": put_header(
        '"__metadata__":', '"__metadata__":{"d":"37"},"__metadata__":'
    ),
    "key twice": put_header('"d":"37"', '"d":"37","d":"36"'),
    "theta twice": put_header(
        '"theta":{"dtype":"F32"(.*?})', r'\g<0>,"theta":{"dtype":"I32"\1'
    ),
    "lone surrogate": put_header('"37"', r'"\\ud800"'),
    "no UTF-8": lambda c: c.replace(b"theta", b"th\xff\xfea"),
    "no JSON": lambda c: c.replace(b'"theta":', b'"theta";'),
    "a list": lambda c: pack(b"[" + unpack(c)[0] + b"]", unpack(c)[1]),
    "nested lists": lambda c: pack(b"[" * 10**4),
    "nested objects": lambda c: pack(b'{"a":' * 10**4),
    "nested metadata": put_header('"37"', '{"d":' * 10**4 + "37" + "}" * 10**4),
    "10^3 tensors": put_empty(10**3),
}


@ATTACHED
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name, attached, file):
    file.write_bytes(HEADERS[name](file.read_bytes()))
    model = here(attached)
    with refused(model, f"{NO_ADAPTER}|is damaged: wrong sha256"):
        load(model, file)


def test_a_repeated_key_changes_no_meaning(file):
    """JSON may say a key twice, with two values: a ValueError, or the adapter that was
    signed."""
    file.write_bytes(put_header('"d":"37"', '"d":"36","d":"37"')(file.read_bytes()))
    model = NET.model()
    before = snapshot(model)
    with contextlib.suppress(ValueError):
        load(model, file)
    assert snapshot(model) in (before, snapshot(trained()))


# --- Bounds ---
class Watched:
    """safe_open that notes which tensors are read."""

    real, seen = safetensors.safe_open, []

    def __init__(self, *args, **kwargs):
        self.file = Watched.real(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        self.seen.append(name)
        return self.file.get_tensor(name)


NO_PLACE = {
    "theta too long": put_theta(lambda t: t.repeat(1000)),
    "head unknown": put_tensor("neck.bias", torch.ones(4)),
    "head of wrong shape": put_tensor("head.0.bias", torch.ones(4000)),
    "name unknown": put_name("no.such"),
    "shape transposed": put_shape([16, 24]),
    "adapted and stored": put_tensor("body.0.bias", torch.ones(24)),
    "newer format": put(format="gpart-v2"),
    "N wrong": put(N="534"),
}


@ATTACHED
@pytest.mark.parametrize("name", NO_PLACE)
def test_no_tensor_is_read_that_the_model_has_no_place_for(
    name, attached, file, monkeypatch
):
    """Nor any other of such a file: the header is enough to refuse it."""
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    load(here(attached), file)
    assert sorted(Watched.seen) == sorted(read(file)[1])
    rewrite(file, NO_PLACE[name])
    Watched.seen.clear()
    with pytest.raises(ValueError, match=NO_ADAPTER):
        load(here(attached), file)
    assert Watched.seen == []


MANY = 10**5
SIGNED = {
    "names": manifest(
        lambda m: m.extend([f"{k}.weight", [24, 16]] for k in range(MANY))
    ),
    "equal names": manifest(lambda m: m.extend(m[:1] * MANY), grow=24 * 16 * MANY),
    "dimensions": put_shape([1] * MANY),
    "letters of a name": put_name("x" * 9 * MANY),
    "letters of a shape": put_shape("x" * 9 * MANY),
    "letters of the format": put(format="x" * 9 * MANY),
    "digits of the seed": put(seed="9" * 4 * MANY),
    "numbers for a seed": put(seed=str([0] * MANY)),
    "weights": put(N=str(10**12), d=str(10**9)),
    "sums": put(base=json.dumps({str(k): 0 for k in range(MANY)} | {"x": ""})),
}
RAW = {
    "dimensions of theta": put_claim(shape=[1] * MANY),
    "letters of a dtype": put_claim(dtype="F" * 9 * MANY),
    "letters of a key": put_header('"theta"', f'"{"theta" * MANY}"'),
    "nested lists": lambda content: pack(b"[" * 9 * MANY),
    "tensors": put_empty(MANY),
}
MEASURED = """
import copy, json, sys, time, torch, gpart

def peak():
    status = open("/proc/self/status", encoding="utf-8").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

plain, attached = (torch.load(sys.argv[1], weights_only=False) for _ in range(2))
gpart.load(attached, sys.argv[2])
before, results = peak(), []
for path in sys.argv[3:]:
    for model in plain, attached:  # each path twice
        state, start = copy.deepcopy(model.state_dict()), time.process_time()
        try:
            gpart.load(model, path)
        except ValueError as error:
            seconds = time.process_time() - start
            letters = len(str(error).replace(path, ""))
        after = model.state_dict()
        assert {*after} == {*state}
        assert all(torch.equal(after[key], state[key]) for key in state)
        results.append([seconds, letters])
print(json.dumps([peak() - before, results]))
"""


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux tells it")
def test_a_hostile_file_costs_no_more_than_its_header(file):
    """10^5 names, dimensions or tensors, and 10^12 elements in a sparse file of that
    size: less than 5 s of CPU each, a message of at most 1,000 letters, and all
    together no more than 25 times the memory of the largest of the headers, 6 MB."""
    content, base = file.read_bytes(), file.with_name("base.pt")
    torch.save(NET.model(), base)
    paths = [file.with_name(name) for name in (*SIGNED, *RAW, "sparse")]
    for path in paths:
        edit = RAW.get(path.name, lambda content: content)
        path.write_bytes(edit(content))
        if path.name in SIGNED:
            rewrite(path, SIGNED[path.name])
    header = max(path.stat().st_size for path in paths)
    assert 6e6 < header < 7e6
    claim = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    head = json.dumps({"__metadata__": read(file)[0], "theta": claim}).encode()
    paths[-1].write_bytes(pack(head))
    os.truncate(paths[-1], 8 + len(head) + 4 * 10**12)
    megabytes, results = json.loads(python(MEASURED, base, file, *paths))
    assert len(results) == 2 * len(paths)
    for k, (seconds, letters) in enumerate(results):
        assert seconds < 5, paths[k // 2].name
        assert letters <= 1000, paths[k // 2].name
    assert megabytes * 2**20 < 25 * header


# --- Drawn changes ---
WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
LIMITS = [0, 1, 16, 24, 36, 37, 38, 533, 2**31, 2**63, 2**64 - 1, 2**64, 10**400]
NUMBERS = st.sampled_from(LIMITS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner),
)
OWN = [*NET.pristine.state_dict(), "theta", "gpart.theta", "body", ""]
NAMES = st.sampled_from(OWN) | WORDS
SIZES = [(37,), (36,), (24, 16), (16, 24), (24,), (5, 24), (5,), (3, 5), (3,), ()]
SHAPES = st.sampled_from(SIZES)
VALUES = st.sampled_from([0.0, 0.5, -1.0, 300.0, math.inf, math.nan])
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
OTHERS = [torch.float8_e4m3fn, torch.cfloat, torch.int64]
DTYPES = st.sampled_from([*sorted(FLOATS, key=str), *OTHERS])
NOT_SUMS = ["format", "N", "d", "seed", "isometric", "manifest", "gpart_version"]
KINDS = ["text", "json", "number", "less", "entry", "order", "tensor", "d"]


def tamper(draw, metadata, tensors):
    """One drawn change of the metadata, of the manifest or of the tensors."""
    entries = None
    with contextlib.suppress(KeyError, ValueError):
        entries = json.loads(metadata["manifest"])
    entries = entries if isinstance(entries, list) else []
    kind = draw(st.sampled_from(KINDS))
    if kind == "text":
        metadata[draw(st.sampled_from([*NOT_SUMS, "extra"]))] = draw(WORDS)
    elif kind == "json":
        metadata[draw(st.sampled_from(NOT_SUMS))] = json.dumps(draw(JSON))
    elif kind == "number":
        metadata[draw(st.sampled_from(["N", "d", "seed"]))] = str(draw(NUMBERS))
    elif kind == "less":
        part = draw(st.sampled_from([metadata, tensors]))
        part.pop(draw(st.sampled_from([*part, "none"])), None)
    elif kind == "entry":
        at, new = draw(st.integers(0, len(entries))), [draw(NAMES), draw(SHAPES | JSON)]
        end = at + draw(st.integers(0, 2))
        entries[at:end] = draw(st.sampled_from([[new], []]))
        metadata["manifest"] = json.dumps(entries)
    elif kind == "order":
        metadata["manifest"] = json.dumps(draw(st.permutations(entries)))
    elif kind == "tensor":
        name = draw(NAMES)
        same = st.just(tensors[name].shape) if name in tensors else SHAPES
        values = torch.full(draw(same | SHAPES), draw(VALUES))
        tensors[name] = values.to(draw(DTYPES))
    else:
        tensors["theta"] = torch.full([draw(st.integers(0, 600))], 0.5)
        metadata["d"] = str(len(tensors["theta"]))


def own(model):
    return {n: t for n, t in model.state_dict().items() if not n.startswith("gpart.")}


def meaning(metadata, tensors, model):
    """Partition, manifest and heads of an adapter of this model, by the page of the
    format; some exception if it is none."""
    assert metadata["format"] == "gpart-v1"
    P = Partition(*(json.loads(metadata[key]) for key in KEYS[:4]))
    entries = json.loads(metadata["manifest"])
    manifest = [(name, tuple(shape)) for name, shape in entries]
    heads = {name: t for name, t in tensors.items() if name != "theta"}
    weights, ours = parameters(model), own(model)
    assert all(weights[name].shape == shape for name, shape in manifest)
    assert not any(name.startswith("gpart.") for name, _ in manifest)
    for name, t in heads.items():
        dtypes = {t.dtype, ours[name].dtype}
        assert t.shape == ours[name].shape
        assert len(dtypes) == 1 or dtypes <= FLOATS
    assert len({*dict(manifest), *heads}) == len(manifest) + len(heads)
    assert sum(weights[name].numel() for name, _ in manifest) == P.N
    assert tensors["theta"].dtype == torch.float32
    assert tensors["theta"].shape == (P.d,)
    assert all(t.isfinite().all() for t in tensors.values())
    if hasattr(model, "gpart"):
        assert (P, manifest) == (model.gpart.partition, model.gpart.manifest)
        assert heads.keys() >= model.gpart.saved
    return P, manifest, heads


@slow
@ATTACHED
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_load_takes_what_the_format_allows_and_nothing_else(attached, data, file):
    """A signed file with drawn changes: if it is still an adapter of this model, its
    theta and heads are loaded, and train, and no other bit is changed. Otherwise a
    ValueError, and no bit is."""
    metadata, tensors = (dict(sorted(part.items())) for part in read(file))
    for _ in range(data.draw(st.integers(1, 3))):
        tamper(data.draw, metadata, tensors)
    path = file.with_name("tampered.safetensors")
    write(path, metadata, tensors)
    model = here(attached)
    before, ours = snapshot(model), {n: t.clone() for n, t in own(model).items()}
    try:
        P, manifest, heads = meaning(metadata, tensors, model)
    except Exception:
        with pytest.raises(ValueError):
            load(model, path)
        assert snapshot(model) == before
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base may be another one then
            adapter = load(model, path)
        assert (adapter.partition, adapter.manifest) == (P, manifest)
        assert torch.equal(adapter.theta, tensors["theta"])
        expected = ours | heads
        for name, t in own(model).items():
            assert torch.equal(t, expected[name].to(t.dtype))
        trained_here = {name for name in heads if name in parameters(model)}
        assert {*trainable(model)} == trained_here | {"gpart.theta"}


def mutate(content, draw):
    """One random damage: bytes overwritten, inserted, zeroed, cut out, doubled,
    reversed, moved; another length of the header; one bit."""
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    a, b, c = content[:i], content[i:j], content[j:]
    some = draw.randbytes(draw.choice([1, 2, 8, 64]))
    length = draw.randrange(2 ** draw.choice([5, 10, 16, 64])).to_bytes(8, "little")
    at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    kinds = [a, c, a + c, a + b + b + c, c + b + a, a + b[::-1] + c]
    kinds += [a + bytes(len(b)) + c, a + some + b + c]
    kinds += [a + some + content[i + len(some) :], length + content[8:]]
    kinds += [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]]
    return draw.choice(kinds)


@slow
@ATTACHED
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_mutated_file_is_refused(golden, attached, tmp_path):
    """Each of 300 different damages to a golden file. The undamaged file still
    loads."""
    path = tmp_path / "mutated.safetensors"
    content, draw = golden.read_bytes(), random.Random(0)
    model = golden_model(golden.name)
    if attached:
        load(model, golden).theta.data.fill_(1.0)
    drawn = dict.fromkeys(mutate(content, draw) for _ in range(400))
    damaged = [bad for bad in drawn if bad != content][:300]
    assert len(damaged) == 300
    before = snapshot(model)
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{NO_ADAPTER}|is damaged: wrong sha256"):
            load(model, path)
    assert snapshot(model) == before
    load(model, golden)
    assert torch.equal(model.gpart.theta, read(golden)[1]["theta"])
