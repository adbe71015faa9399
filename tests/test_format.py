"""gpart-v1 is what format/ says: vectors.json, computed with plain integers, holds
gpart.py and format/reader.py; the two agree on real files and refuse the same ones."""

import hashlib
import json
import re
import runpy
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import gpart

FORMAT = Path(__file__).parents[1] / "format"
reader = SimpleNamespace(**runpy.run_path(str(FORMAT / "reader.py")))
make_vectors = SimpleNamespace(**runpy.run_path(str(FORMAT / "make_vectors.py")))
VECTORS = json.loads((FORMAT / "vectors.json").read_text(encoding="utf-8"))
LARGE = 2**24  # [d] of 2**31 - 1 is too much for a test
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def hexadecimal(t):
    """Every element's bits, the most significant digit first."""
    width = t.dtype.itemsize
    data = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [data[i : i + width][::-1].hex() for i in range(0, len(data), width)]


def from_hexadecimal(texts, dtype):
    data = b"".join(bytes.fromhex(text)[::-1] for text in texts)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def label(case):
    return " ".join(
        f"{key}={case[key]}" for key in ("file", "N", "seed") if key in case
    )


permutations = pytest.mark.parametrize("case", VECTORS["permutations"], ids=label)
updates = pytest.mark.parametrize("case", VECTORS["updates"], ids=label)
files = pytest.mark.parametrize("case", VECTORS["files"], ids=label)


# --- The vectors ---
@pytest.mark.slow
def test_vectors_are_what_the_script_writes():
    golden = FORMAT / "golden" / "elsewhere.safetensors"
    assert golden.read_bytes() == make_vectors.elsewhere()
    text = (FORMAT / "vectors.json").read_text(encoding="utf-8")
    assert text == make_vectors.text()


@permutations
def test_reader_permutes_as_the_vectors(case):
    N, seed = int(case["N"]), int(case["seed"])
    first = reader.permute(np.arange(min(N, 2**16)), N, seed)
    assert [str(x) for x in first[:12]] == case["pi"]
    assert f"{zlib.crc32(first.astype('<i8').tobytes()):08x}" == case["crc32"]
    for trace in case["traces"]:
        i = np.array([int(trace["i"])])
        assert str(reader.permute(i, N, seed)[0]) == trace["steps"][-1]["E"]
    for part in case["partitions"]:
        if part["d"] < LARGE:
            scale = torch.from_numpy(reader.scale(N, part["d"]))
            assert hexadecimal(scale[part["j"]]) == part["scale"]


@permutations
def test_gpart_partitions_as_the_vectors(case):
    N = int(case["N"])
    for part in case["partitions"]:
        P = gpart.Partition(N, part["d"], int(case["seed"]))
        assert P.groups(0, min(N, 12)).tolist() == part["groups"]
        assert P.groups(N - 1, N).tolist() == [part["last"]]
        if part["d"] < LARGE:
            assert [str(n) for n in P.sizes()[part["j"]].tolist()] == part["sizes"]
            assert hexadecimal(P.scale()[part["j"]]) == part["scale"]
        if part["d"] == N:  # then g is pi
            pi = P.groups(0, min(N, 2**16)).numpy().astype("<i8")
            assert f"{zlib.crc32(pi.tobytes()):08x}" == case["crc32"]


@permutations
def test_every_trace_ends_in_its_index_of_the_permutation(case):
    """The intermediates belong to the answers: E after each walk, below N at last."""
    N, b = int(case["N"]), case["b"]
    for trace in case["traces"]:
        at = int(trace["i"])
        for step in trace["steps"]:
            assert at >= N or step is trace["steps"][0]
            assert step["rounds"][0] == [at // b, at % b]
            assert len(step["rounds"]) == 1 + len(case["keys"])
            left, right = step["rounds"][-1]
            at = int(step["E"])
            assert at == left * b + right
        assert at < N
        if int(trace["i"]) < len(case["pi"]):
            assert case["pi"][int(trace["i"])] == str(at)


@updates
def test_updates_are_the_vectors(case):
    """P theta, in float32 and float64, from gpart.py and from reader.py."""
    N, d, seed = case["N"], case["d"], int(case["seed"])
    theta = from_hexadecimal(case["theta"], torch.float32)
    P = gpart.Partition(N, d, seed, case["isometric"])
    assert hexadecimal(P.expand(theta)) == case["update"]
    assert hexadecimal(P.expand(theta.double())) == case["update64"]
    adapter = {"N": N, "d": d, "seed": seed, "isometric": case["isometric"]}
    adapter |= {"manifest": [["w", [N]]]}
    adapter |= {"tensors": {"theta": ("F32", [d], theta.numpy().tobytes())}}
    single = torch.from_numpy(reader.update(adapter)["w"])
    double = torch.from_numpy(reader.update(adapter, np.float64)["w"])
    assert hexadecimal(single) == case["update"]
    assert hexadecimal(double) == case["update64"]


@pytest.mark.parametrize("dtype", DTYPES)
@updates
def test_sums_are_the_vectors(case, dtype):
    """W + P theta: the product rounded, then the sum, then one cast."""
    model = nn.Sequential(nn.Linear(case["N"], 1, bias=False, dtype=DTYPES[dtype]))
    weight = from_hexadecimal(case["weights"][dtype], DTYPES[dtype])
    model[0].weight.data.copy_(weight[None])
    setting = {"seed": int(case["seed"]), "isometric": case["isometric"]}
    adapter = gpart.attach(model, case["d"], target_modules="all-linear", **setting)
    adapter.theta.data.copy_(from_hexadecimal(case["theta"], torch.float32))
    read = model[0].weight.detach()
    gpart.merge(model)
    assert hexadecimal(read) == case["sums"][dtype]
    assert hexadecimal(model[0].weight.detach()) == case["sums"][dtype]


@pytest.mark.parametrize("case", VECTORS["digests"])
def test_reader_digests_as_the_vectors(case):
    tensors = {
        t["name"]: (t["dtype"], t["shape"], bytes.fromhex(t["data"]))
        for t in case["tensors"]
    }
    metadata = {key: x for key, x in case["metadata"].items() if key != "sha256"}
    assert reader.digest(metadata, tensors) == case["sha256"]


def golden_model(file):
    """The model that a golden file was made for: every parameter counts in 64ths."""
    if file == "one-number.safetensors":
        model = nn.Linear(4, 3)
    elif file == "one-each.safetensors":
        model = nn.Linear(4, 3).bfloat16()
    elif file == "six-rounds.safetensors":
        model = nn.Linear(256, 256)
    elif file == "not-isometric.safetensors":
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2).bfloat16())
    elif file == "norm-and-head.safetensors":
        model = net()
    else:
        layers = {"｡": nn.Linear(4, 3), "größe": nn.Linear(3, 2), "😀": nn.Linear(2, 1)}
        model = nn.ModuleDict(layers)
    for w in model.parameters():
        w.data.copy_((torch.arange(w.numel()) % 64 / 64 - 0.5).view(w.shape))
    return model


@files
def test_golden_file_means_what_the_vectors_say(case):
    """Also in gpart.py: a file written once means the same for ever."""
    path = FORMAT / "golden" / case["file"]
    adapter = reader.read(path.read_bytes())
    loaded = gpart.load(golden_model(case["file"]), path)
    for key in ("N", "d", "seed", "isometric"):
        assert str(adapter[key]) == str(case[key])
        assert getattr(loaded.partition, key) == adapter[key]
    assert adapter["sha256"] == case["sha256"]
    assert adapter["manifest"] == case["manifest"]
    found = {name: [t[0], t[1]] for name, t in adapter["tensors"].items()}
    assert found == case["tensors"]
    theta = np.frombuffer(adapter["tensors"]["theta"][2], np.float32).copy()
    assert hexadecimal(torch.from_numpy(theta)) == case["theta"]
    assert hexadecimal(loaded.theta.detach()) == case["theta"]

    ids = reader.permute(np.arange(adapter["N"]), adapter["N"], adapter["seed"])
    groups = torch.from_numpy(ids % adapter["d"]).int()
    assert f"{zlib.crc32(groups.numpy().tobytes()):08x}" == case["groups_crc32"]
    torch.testing.assert_close(loaded.partition.groups(), groups, rtol=0, atol=0)
    update = [x.flatten() for x in reader.update(adapter).values()]
    delta = [x.detach().flatten() for x in loaded.delta().values()]
    expanded = loaded.partition.expand(loaded.theta.detach())
    sha256 = hashlib.sha256(np.concatenate(update).tobytes()).hexdigest()
    assert sha256 == case["update_sha256"]
    assert hashlib.sha256(expanded.numpy()).hexdigest() == case["update_sha256"]
    torch.testing.assert_close(torch.cat(delta), expanded, rtol=0, atol=0)


# --- Real files ---
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 11)
        self.out.weight = self.embed.weight


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


REAL = {  # model, d, arguments of attach
    "float32": (net, 7, {"seed": 3}),
    "bfloat16": (lambda: net().bfloat16(), 7, {"seed": 2**64 - 1}),
    "float16": (lambda: net().half(), 44, {}),
    "float64": (lambda: net().double(), 7, {}),
    "d = 1": (net, 1, {}),
    "d = N": (net, 45, {"seed": 2**53 + 1}),
    "a bias": (net, 7, {"target_modules": ["0.weight", "0.bias"]}),
    "not isometric": (net, 7, {"isometric": False}),
    "a head": (net, 7, {"target_modules": "0", "modules_to_save": "2"}),
    "a norm": (net, 7, {"target_modules": "0", "modules_to_save": ["1", "2"]}),
    "tied": (Tied, 7, {"target_modules": ["out", "embed", "body"]}),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2)),
        5,
        {"target_modules": "0"},
    ),
}


def trained(name):
    torch.manual_seed(0)
    build, d, arguments = REAL[name]
    model = build()
    model.requires_grad_(True)
    adapter = gpart.attach(model, d, **{"target_modules": "all-linear", **arguments})
    nn.init.normal_(adapter.theta)
    return model, adapter


@pytest.mark.parametrize("name", REAL)
def test_reader_reads_what_gpart_saves(name, tmp_path):
    """Partition, manifest, digest, every tensor, and P theta to the bit."""
    path = tmp_path / "adapter.safetensors"
    model, adapter = trained(name)
    gpart.save(model, path)
    got = reader.read(path.read_bytes())
    for key in ("N", "d", "seed", "isometric"):
        assert got[key] == getattr(adapter.partition, key)
    assert [(n, tuple(shape)) for n, shape in got["manifest"]] == adapter.manifest
    state = model.state_dict() | {"theta": adapter.theta.detach()}
    for key, (dtype, shape, data) in got["tensors"].items():
        assert shape == list(state[key].shape)
        assert f"torch.{reader.NAMES[dtype]}" == str(state[key].dtype)
        assert (
            data
            == state[key].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    for key, delta in adapter.delta().items():
        torch.testing.assert_close(
            torch.from_numpy(reader.update(got)[key]), delta.detach(), rtol=0, atol=0
        )


@pytest.mark.parametrize("name", REAL)
def test_reader_merges_as_gpart(name, tmp_path):
    """W + P theta with reader.py's P theta is what gpart.py leaves in the model."""
    path = tmp_path / "adapter.safetensors"
    model, _ = trained(name)
    before = {key: w.clone() for key, w in model.state_dict().items()}
    gpart.save(model, path)
    gpart.detach(model, merge=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    adapter = reader.read(path.read_bytes())
    for key, _ in adapter["manifest"]:
        w = before[key]
        wide = torch.promote_types(w.dtype, torch.float32)
        numpy_dtype = np.float64 if wide is torch.float64 else np.float32
        update = torch.from_numpy(reader.update(adapter, numpy_dtype)[key])
        assert torch.equal((w.to(wide) + update).to(w.dtype), after[key].detach())


@pytest.mark.parametrize("name", REAL)
def test_base_is_the_sums_of_what_the_file_does_not_carry(name, tmp_path):
    path = tmp_path / "adapter.safetensors"
    model, _ = trained(name)
    gpart.save(model, path)
    adapter = reader.read(path.read_bytes())
    sums = {}
    for key, t in model.state_dict().items():
        carried = key in adapter["tensors"] or key.startswith("gpart.")
        if t.is_floating_point() and not carried:
            values = t.double().flatten().tolist()
            total = sum(make_vectors.rounded("bfloat16", x) for x in values)
            sums[key] = float(f"{total:.6g}")
    assert json.loads(adapter["metadata"]["base"]) == sums


def test_gpart_loads_what_others_write(tmp_path):
    """Another writer's file, with a head and a metadata key that gpart.py does not
    know, loads, and has the same digest when gpart.py saves it again as it came."""
    path = tmp_path / "adapter.safetensors"
    theta = torch.arange(7.0)
    manifest = [["0.weight", [5, 6]]]
    metadata = {"format": "gpart-v1", "N": "30", "d": "7", "seed": "12"}
    metadata |= {"isometric": "true", "manifest": json.dumps(manifest), "x": "é"}
    head = torch.arange(15.0).view(3, 5).bfloat16()
    data = head.flatten().view(torch.uint8).numpy().tobytes()
    tensors = {"theta": ("F32", [7], theta.numpy().tobytes())}
    tensors |= {"2.weight": ("BF16", [3, 5], data)}
    path.write_bytes(make_vectors.pack(metadata, tensors))
    model = net()
    model[2].bfloat16()
    adapter = gpart.load(model, path)
    assert adapter.partition == gpart.Partition(30, 7, 12)
    assert torch.equal(adapter.theta.detach(), theta)
    assert torch.equal(model[2].weight.detach(), head)


# --- What a reader must refuse ---
def edited(edit):
    """A golden file with an edit of metadata or tensors, signed again."""
    content = (FORMAT / "golden" / "one-number.safetensors").read_bytes()
    metadata, tensors = make_vectors.unpack(content)
    edit(metadata, tensors)
    return make_vectors.pack(metadata, tensors)


def put(key, text):
    return edited(lambda metadata, tensors: metadata.update({key: text}))


def put_theta(dtype, shape, data):
    tensor = (dtype, shape, data)
    return edited(lambda metadata, tensors: tensors.update(theta=tensor))


def put_d(d):
    """d, and a theta that goes with it."""

    def edit(metadata, tensors):
        metadata["d"] = str(d)
        tensors["theta"] = ("F32", [d], d * ONE)

    return edited(edit)


def replaced(old, new):
    """One damage to the bytes that keeps the length of the header."""
    content = (FORMAT / "golden" / "one-number.safetensors").read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def in_utf_16():
    """A sound file but for its header's encoding."""
    content = put_d(1)
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].decode().encode("utf-16-le")
    return len(header).to_bytes(8, "little") + header + content[end:]


SOUND = (FORMAT / "golden" / "one-number.safetensors").read_bytes()
ONE = make_vectors.floats([1.0])
REFUSED = {
    "empty": b"",
    "a length alone": SOUND[:8],
    "cut short": SOUND[:-1],
    "one byte more": SOUND + b"\0",
    "a header without an end": b"\xff" * 8 + SOUND[8:],
    "a pickle": b"\x80\x02}q\x00.",
    "a list for a header": (2).to_bytes(8, "little") + b"[]",
    "no metadata": (2).to_bytes(8, "little") + b"{}",
    "not UTF-8": replaced(b"gpart_version", b"gpart_versio\xff"),
    "UTF-16": in_utf_16(),
    "a number for a text": replaced(b'"12"', b" 12 "),
    "a number in the metadata": put("rank", 5),
    "a wrong digest": replaced(b"999bb1da", b"999bb1db"),
    "a changed theta": SOUND[:-4] + ONE,
    "a newer format": put("format", "gpart-v2"),
    "another format": put("format", "pt"),
    "N = 0": put("N", "0"),
    "N that is not the manifest's": put("N", "13"),
    "d = 0": put_d(0),
    "d > N": put_d(13),
    "d that is not theta's": put("d", "2"),
    "d that is a float": put("d", "1.0"),
    "d that is no number": put("d", "true"),
    "d that is no JSON": put("d", "one"),
    "a negative seed": put("seed", "-1"),
    "a seed of 65 bits": put("seed", str(2**64)),
    "isometric that is a number": put("isometric", "1"),
    "isometric in capitals": put("isometric", "True"),
    "a manifest that is a number": put("manifest", "5"),
    "a manifest without shapes": put("manifest", '["weight"]'),
    "a name twice": put("manifest", '[["weight", [2, 3]], ["weight", [3, 2]]]'),
    "negative shapes": put("manifest", '[["weight", [-3, -4]]]'),
    "fractions in a shape": put("manifest", '[["weight", [1.5, 8]]]'),
    "too deep": put("manifest", "[" * 100_000),
    "no theta": edited(lambda metadata, tensors: tensors.clear()),
    "no seed": edited(lambda metadata, tensors: metadata.pop("seed")),
    "no format": edited(lambda metadata, tensors: metadata.pop("format")),
    "theta in float64": put_theta("F64", [1], bytes(8)),
    "theta in integers": put_theta("I32", [1], bytes(4)),
    "a longer theta": put_theta("F32", [2], 2 * ONE),
    "theta as a matrix": put_theta("F32", [1, 1], ONE),
    "theta as a scalar": put_theta("F32", [], ONE),
    "NaN": put_theta("F32", [1], make_vectors.floats([float("nan")])),
    "infinity": put_theta("F32", [1], make_vectors.floats([float("-inf")])),
    "NaN in a head": edited(
        lambda metadata, tensors: tensors.update(bias=("BF16", [3], b"\xc1\x7f" * 3))
    ),
    "adapted and stored": edited(
        lambda metadata, tensors: tensors.update(weight=("F32", [3, 4], 12 * ONE))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(name, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(REFUSED[name])
    with pytest.raises(ValueError, match="no usable adapter file"):
        reader.read(REFUSED[name])
    with pytest.raises(ValueError):
        gpart.load(nn.Linear(4, 3), path)


def test_a_signed_edit_that_breaks_no_rule_is_read(tmp_path):
    """The edits above are refused for what they change, not for being edited."""
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(put_d(5))
    assert reader.read(path.read_bytes())["d"] == 5
    assert gpart.load(nn.Linear(4, 3), path).partition.d == 5


@files
def test_every_flipped_bit_is_refused(case):
    content = (FORMAT / "golden" / case["file"]).read_bytes()
    for i in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[i // 8] ^= 1 << i % 8
        with pytest.raises(ValueError, match="no usable adapter file"):
            reader.read(bytes(damaged))


# --- The page ---
@pytest.mark.slow
def test_specification_has_the_golden_table():
    """README.md's rows: N, seed, pi(0), pi(1), ..., and the CRC-32 of all of pi."""
    page = (FORMAT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| ([\d ]+) \| ([0-9a-f]{8}) \|$", page, re.M
    )
    assert len(rows) == 5
    for N, seed, first, crc in rows:
        N, seed = int(N), int(seed)
        got = 0
        for at in range(0, N, 2**16):
            pi = reader.permute(np.arange(at, min(at + 2**16, N)), N, seed)
            if at == 0:
                assert " ".join(map(str, pi[:12])) == first
            got = zlib.crc32(pi.astype("<i8").tobytes(), got)
        assert f"{got:08x}" == crc


def test_reader_is_short_and_needs_numpy_alone():
    source = (FORMAT / "reader.py").read_text(encoding="utf-8")
    imports = re.findall(r"^(?:import|from) (\w+)", source, re.M)
    assert len(source.splitlines()) <= 120
    assert imports == ["hashlib", "json", "math", "sys", "numpy"]
