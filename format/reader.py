"""Reads gpart-v1, as README.md says: python format/reader.py < adapter.safetensors"""

import hashlib
import json
import math
import sys

import numpy as np

KEYS = ("N", "d", "seed", "isometric", "manifest")
NAMES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16"}
NAMES |= {"I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64"}
NAMES |= {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF << 52}


def permute(i, N, seed):
    """pi(i) for each i of an int64 array."""
    a = math.isqrt(N - 1) + 1
    b = -(-N // a)
    halves = [i // b, i % b]
    for t in range(16 if N < 2**16 else 6):
        z = (seed + (t + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        x = (z ^ z >> 31) >> 33 ^ halves[1 - t % 2]
        x = (x ^ x >> 16) * 0x7FEB352D % 2**31
        x = (x ^ x >> 15) * 0x46CA68B5 % 2**31
        halves[t % 2] = (halves[t % 2] + (x ^ x >> 16)) % (a, b)[t % 2]
    out = halves[0] * b + halves[1]
    if (beyond := out >= N).any():
        out[beyond] = permute(out[beyond], N, seed)
    return out


def scale(N, d, isometric=True, dtype=np.float32):
    """1/sqrt(n_j): the root and its reciprocal in float64, rounded once to dtype."""
    sizes = N // d + (np.arange(d) < N % d)
    return (1 / np.sqrt(sizes) if isometric else np.ones(d)).astype(dtype)


def update(adapter, dtype=np.float32):
    """{name: P theta}, to be added to the weights in dtype (float64 for float64)."""
    N, d, seed = adapter["N"], adapter["d"], adapter["seed"]
    theta = np.frombuffer(adapter["tensors"]["theta"][2], "<f4").astype(dtype)
    moves = theta * scale(N, d, adapter["isometric"], dtype)
    updates, at = {}, 0
    for name, shape in adapter["manifest"]:
        i = np.arange(at, at + math.prod(shape))
        updates[name] = moves[permute(i, N, seed) % d].reshape(shape)
        at += i.size
    return updates


def digest(metadata, tensors):
    """The sha256 of {key: text}, without its own, and {name: (dtype, shape, bytes)}."""
    compact = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    sha = hashlib.sha256(compact(metadata).encode())
    for name, (dtype, shape, data) in sorted(tensors.items()):
        sha.update(compact([name, NAMES[dtype], shape]).encode() + data)
    return sha.hexdigest()


def require(condition, what):
    if not condition:
        raise ValueError(what)


def naturals(values):
    return type(values) is list and all(type(n) is int and n >= 0 for n in values)


def unpack(content):
    """The metadata and {name: (dtype, shape, bytes)} of a safetensors file."""
    end = at = 8 + int.from_bytes(content[:8], "little")
    require(8 < end <= min(len(content), 10**8), "cut short, or not safetensors")
    header = json.loads(content[8:end].decode("utf-8"))
    metadata, tensors = header.pop("__metadata__"), {}
    require(all(type(x) is str for x in metadata.values()), "metadata is not text")
    for name, x in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = x["dtype"], x["shape"], x["data_offsets"]
        require(naturals(shape) and naturals(offsets), f"{name} has no proper shape")
        width = int(dtype.strip("BFIOLU") or 8) // 8  # BOOL has 1 byte, F32 has 4
        start, at = at, at + width * math.prod(shape)
        require(offsets == [start - end, at - end], f"{name}: bytes do not fit shape")
        tensors[name] = dtype, shape, content[start:at]
        if mask := EXPONENTS.get(dtype):  # NaN and infinity have all its bits
            bits = np.frombuffer(content[start:at], f"<u{width}")
            require((bits & mask != mask).all(), f"{name} has NaN or infinite values")
    require(at == len(content), "cut short, or longer than its tensors")
    return metadata, tensors


def check(tensors, N, d, seed, isometric, manifest):
    require(naturals([N, d, seed]) and type(isometric) is bool, "wrong types")
    good = 1 <= d <= min(N, 2**31 - 1) and N <= 2**62 and seed < 2**64
    require(good, f"out of range: N is {N}, d is {d}, seed is {seed}")
    require(all(naturals(shape) for _, shape in manifest), "manifest: no proper shape")
    total = sum(math.prod(shape) for _, shape in manifest)
    require(total == N, f"the manifest has {total} weights, N is {N}")
    require(len(dict(manifest) | tensors) == len(manifest) + len(tensors), "name twice")
    require(tensors["theta"][:2] == ("F32", [d]), f"theta is not F32 [{d}]")


def read(content):
    """A file's bytes as a dict, or a ValueError that says why they are no adapter."""
    try:
        metadata, tensors = unpack(content)
        found, sha256 = metadata.get("format"), metadata.pop("sha256")
        require(found == "gpart-v1", f"its format is {found}, not gpart-v1")
        require(sha256 == digest(metadata, tensors), "its sha256 is wrong")
        adapter = {key: json.loads(metadata[key]) for key in KEYS}
        check(tensors, **adapter)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise ValueError(f"no usable adapter file: {e}") from e
    return {**adapter, "sha256": sha256, "metadata": metadata, "tensors": tensors}


if __name__ == "__main__":
    print(*read(sys.stdin.buffer.read()).items(), sep="\n")
