"""Writes vectors.json, the known answers of gpart-v1, and one golden file:

    python format/make_vectors.py

Plain Python integers and floats, the standard library only, nothing of gpart.py or
reader.py: one index, one weight at a time, as README.md says it. Running it again
writes the same bytes.
"""

import functools
import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent
MASK64, MASK31 = 2**64 - 1, 2**31 - 1
CODES = {"float16": "e", "float32": "f", "float64": "d"}
NAMES = {"BOOL": "bool", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
NAMES |= {"F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32"}
NAMES |= {"I64": "int64", "U8": "uint8", "U16": "uint16", "U32": "uint32"}
NAMES |= {"U64": "uint64"}


# --- The permutation ---
@functools.cache
def grid(N):
    a = math.isqrt(N - 1) + 1
    return a, -(-N // a)


@functools.cache
def round_keys(N, seed):
    keys = []
    for t in range(1, 17 if N < 2**16 else 7):
        z = (seed + t * 0x9E3779B97F4A7C15) & MASK64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
        keys.append((z ^ (z >> 31)) >> 33)
    return keys


def F(k, x):
    x ^= k
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK31
    x ^= x >> 15
    x = x * 0x46CA68B5 & MASK31
    return x ^ (x >> 16)


def walk(N, seed, i):
    """Each E on the way from i to pi(i), with [l, r] before and after every round."""
    a, b = grid(N)
    steps = []
    while not steps or i >= N:
        left, right = divmod(i, b)
        rounds = [[left, right]]
        for t, k in enumerate(round_keys(N, seed)):
            if t % 2 == 0:
                left = (left + F(k, right)) % a
            else:
                right = (right + F(k, left)) % b
            rounds.append([left, right])
        i = left * b + right
        steps.append({"rounds": rounds, "E": str(i)})
    return steps


def permute(N, seed, i):
    return int(walk(N, seed, i)[-1]["E"])


# --- Floating point: Python's float is float64; bits are written in hexadecimal ---
def bits(dtype, x):
    if dtype == "bfloat16":  # the upper half of a float32, to nearest, ties to even
        n = int(bits("float32", x), 16)
        return f"{(n + 0x7FFF + (n >> 16 & 1)) >> 16:04x}"
    return struct.pack(">" + CODES[dtype], x).hex()


def value(dtype, hexadecimal):
    if dtype == "bfloat16":
        return value("float32", hexadecimal + "0000")
    return struct.unpack(">" + CODES[dtype], bytes.fromhex(hexadecimal))[0]


def rounded(dtype, x):
    return value(dtype, bits(dtype, x))


def size(N, d, j):
    return N // d + (j < N % d)


def scale(N, d, j, isometric=True, dtype="float32"):
    return rounded(dtype, 1 / math.sqrt(size(N, d, j))) if isometric else 1.0


def update(N, d, seed, isometric, theta, dtype="float32"):
    """(P theta)_i for each i, each product rounded once to dtype."""
    scales = [scale(N, d, j, isometric, dtype) for j in range(d)]
    moves = [rounded(dtype, t * s) for t, s in zip(theta, scales, strict=True)]
    return [moves[permute(N, seed, i) % d] for i in range(N)]


# --- Files ---
def ascii_json(data):
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(metadata, tensors):
    """The texts hashed, the digest: tensors are {name: (dtype, shape, bytes)}."""
    texts = [ascii_json({k: v for k, v in metadata.items() if k != "sha256"})]
    sha = hashlib.sha256(texts[0].encode())
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        texts.append(ascii_json([name, NAMES[dtype], shape]))
        sha.update(texts[-1].encode() + data)
    return texts, sha.hexdigest()


def pack(metadata, tensors):
    """The bytes of a safetensors file, the digest added to its metadata."""
    metadata = {**metadata, "sha256": digest(metadata, tensors)[1]}
    header, at = {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at = offsets[1]
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return (
        struct.pack("<Q", len(head)) + head + b"".join(t[2] for t in tensors.values())
    )


def unpack(content):
    """Metadata and tensors of a file that is known to be sound."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata, data = header.pop("__metadata__"), content[8 + length :]
    tensors = {
        name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])])
        for name, t in header.items()
    }
    return metadata, tensors


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


# --- The cases ---
PARTITIONS = [  # (N, seed, every d)
    (1, 0, [1]),
    (2, 1, [1, 2]),
    (3, 7, [1, 2, 3]),
    (6, 0, [1, 4, 6]),
    (12, 42, [1, 5, 12]),
    (1000, 0, [1, 7, 64, 128, 1000]),
    (2**16 - 1, 1, [1, 23040, 2**16 - 1]),
    (2**16, 0, [1, 23040, 2**16]),
    (2**16 + 1, 2**63, [1, 23040, 2**16 + 1]),
    (14155776, 0, [1, 23040, 14155776]),
    (14155776, 1, [1, 23040, 14155776]),
    (2**31 + 11, 2**53 + 1, [1, 23040, 2**31 - 1]),
    (2**53 + 111, 2**40 + 1, [1, 23040, 2**31 - 1]),
    ((2**30 + 1) ** 2, 5, [1, 23040, 2**31 - 1]),  # isqrt through floats is too large
    ((2**30 + 1) ** 2 + 1, 6, [1, 23040, 2**31 - 1]),  # a ceiling of floats, too small
    (2**62, 2**64 - 1, [1, 23040, 2**31 - 1]),
]
MOVES = [1.5, -2.25, 0.1, -1e-3, 3e4, -0.0, 1e-42, 0.3, -0.7, 1 / 3, 2**-20, -65.125]
UPDATES = [  # (N, d, seed, isometric)
    (1, 1, 0, True),
    (12, 1, 3, True),
    (12, 5, 42, True),
    (12, 12, 5, True),
    (30, 7, 2**40 + 1, True),
    (30, 7, 2**40 + 1, False),
]
HEADS = {"F32": floats([0.5, -1.25, 3.0]), "BF16": bytes.fromhex("803f00c0")}
IN_ORDER = ['"\\/', "B", "a", "\x7f\n\x01", "é", "｡", "😀"]  # by code point
DIGESTS = [  # (metadata, tensors)
    ({}, {}),
    (
        {"b": "2", "a": "1", "sha256": "not hashed"},
        {"theta": ("F32", [3], HEADS["F32"])},
    ),
    (
        {
            "name": "Größe 😀",
            "😀": "U+1F600",
            "｡": "U+FF61",
            "controls": "\x00\t\x1f\x7f/",
        },
        {
            "theta": ("F32", [3], HEADS["F32"]),
            "head.weight": ("BF16", [2, 1], HEADS["BF16"]),
            "head.steps": ("I64", [], struct.pack("<q", -7)),
            "head.empty": ("F16", [0, 4], b""),
        },
    ),
    ({}, {name: ("BF16", [2], HEADS["BF16"]) for name in IN_ORDER}),
    ({}, {dtype: (dtype, [0], b"") for dtype in NAMES}),
]


def partition_case(N, seed, ds):
    first = [permute(N, seed, i) for i in range(min(N, 12))]
    low = [permute(N, seed, i) for i in range(min(N, 2**16))]
    walked = (i for i in range(min(N, 4096)) if len(walk(N, seed, i)) > 1)
    traced = sorted({0, N - 1, next(walked, 0)})
    cases = []
    for d in ds:
        js = sorted({0, max(N % d - 1, 0), N % d, d - 1})
        cases.append(
            {
                "d": d,
                "groups": [x % d for x in first],
                "last": permute(N, seed, N - 1) % d,
                "j": js,
                "sizes": [str(size(N, d, j)) for j in js],
                "scale": [bits("float32", scale(N, d, j)) for j in js],
            }
        )
    return {
        "N": str(N),
        "seed": str(seed),
        "a": grid(N)[0],
        "b": grid(N)[1],
        "keys": round_keys(N, seed),
        "pi": [str(x) for x in first],
        "crc32": f"{zlib.crc32(struct.pack(f'<{len(low)}q', *low)):08x}",
        "traces": [{"i": str(i), "steps": walk(N, seed, i)} for i in traced],
        "partitions": cases,
    }


def update_case(N, d, seed, isometric):
    theta = [rounded("float32", t) for t in MOVES[:d]]
    single = update(N, d, seed, isometric, theta)
    double = update(N, d, seed, isometric, theta, "float64")
    weights, sums = {}, {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        moves, wide = (double, dtype) if dtype == "float64" else (single, "float32")
        w = [rounded(dtype, math.sin(i + 1)) for i in range(N)]
        weights[dtype] = [bits(dtype, x) for x in w]
        # one sum in wide, one cast to dtype
        both = zip(w, moves, strict=True)
        sums[dtype] = [bits(dtype, rounded(wide, x + m)) for x, m in both]
    return {
        "N": N,
        "d": d,
        "seed": str(seed),
        "isometric": isometric,
        "theta": [bits("float32", t) for t in theta],
        "update": [bits("float32", x) for x in single],
        "update64": [bits("float64", x) for x in double],
        "weights": weights,
        "sums": sums,
    }


def digest_case(metadata, tensors):
    listed = [
        {"name": name, "dtype": dtype, "shape": shape, "data": data.hex()}
        for name, (dtype, shape, data) in tensors.items()
    ]
    texts, sha256 = digest(metadata, tensors)
    case = {"metadata": metadata, "tensors": listed, "texts": texts, "sha256": sha256}
    return case


def file_case(path):
    metadata, tensors = unpack(path.read_bytes())
    N, d, seed = (int(metadata[key]) for key in ("N", "d", "seed"))
    isometric = metadata["isometric"] == "true"
    theta = struct.unpack(f"<{d}f", tensors["theta"][2])
    groups = [permute(N, seed, i) % d for i in range(N)]
    moves = floats(update(N, d, seed, isometric, theta))
    return {
        "file": path.name,
        "N": str(N),
        "d": d,
        "seed": str(seed),
        "isometric": isometric,
        "manifest": json.loads(metadata["manifest"]),
        "tensors": {name: [t[0], t[1]] for name, t in sorted(tensors.items())},
        "sha256": digest(metadata, tensors)[1],
        "theta": [bits("float32", t) for t in theta],
        "groups_crc32": f"{zlib.crc32(struct.pack(f'<{N}i', *groups)):08x}",
        "update_sha256": hashlib.sha256(moves).hexdigest(),
    }


def elsewhere():
    """A file that gpart.py did not write: names that are not ASCII, a head, and a base
    whose parameters are i / 64 - 1/2 for i = 0, 1, ..."""
    manifest = [["｡.weight", [3, 4]], ["größe.weight", [2, 3]], ["😀.weight", [1, 2]]]
    frozen = {"｡.weight": 12, "größe.weight": 6, "größe.bias": 2, "😀.weight": 2}
    base = {name: sum(i / 64 - 0.5 for i in range(n)) for name, n in frozen.items()}
    metadata = {
        "format": "gpart-v1",
        "N": "20",
        "d": "6",
        "seed": "9007199254740993",
        "isometric": "true",
        "manifest": json.dumps(manifest, ensure_ascii=False),
        "base": json.dumps({name: float(f"{x:.6g}") for name, x in base.items()}),
        "base_model_name_or_path": "größe/😀",
        "gpart_version": "0",
        "written_by": "make_vectors.py",
    }
    tensors = {
        "theta": ("F32", [6], floats(MOVES[:4] + MOVES[7:9])),
        "｡.bias": ("F32", [3], HEADS["F32"]),
        "😀.bias": ("F32", [1], HEADS["F32"][:4]),
    }
    return pack(metadata, tensors)


def vectors():
    golden = sorted(FOLDER.glob("golden/*.safetensors"))
    return {
        "permutations": [partition_case(*case) for case in PARTITIONS],
        "updates": [update_case(*case) for case in UPDATES],
        "digests": [digest_case(*case) for case in DIGESTS],
        "files": [file_case(path) for path in golden],
    }


def text():
    """One case a line, so that a changed case is a changed line."""
    sections = []
    for name, cases in vectors().items():
        lines = ",\n".join(json.dumps(case) for case in cases)
        sections.append(f'"{name}": [\n{lines}\n]')
    return "{" + ",\n".join(sections) + "}\n"


if __name__ == "__main__":
    (FOLDER / "golden" / "elsewhere.safetensors").write_bytes(elsewhere())
    (FOLDER / "vectors.json").write_text(text(), encoding="utf-8")
