"""Files of kvzip, changed by hand: the format as docs/file_format.md describes it, without kvzip's own reader."""

import hashlib
import json
import struct

import numpy as np
from safetensors.torch import load, save


def parts(path):
    """A file's tensor table with its metadata, kvzip's header, and the bytes after them."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    outer = json.loads(data[8 : 8 + size])
    return outer, json.loads(outer["__metadata__"]["kvzip"]), data[8 + size :]


def put(path, data):
    """Writes a new file in place of one: writing over it waits for the disk, 5 ms each time."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def checksum(data):
    """A tensor's: of the sums of words over the columns of rows of 509, of 1,024 rows at a time, modulo 2**64."""
    row, sums = 509 * 8, b""
    for start in range(0, len(data), 1024 * row):
        block = data[start : start + 1024 * row]
        words = np.frombuffer(block + bytes(-len(block) % row), dtype="<u8").reshape(-1, 509)
        sums += words.sum(axis=0, dtype=np.uint64).astype("<u8").tobytes()
    return hashlib.blake2b(sums, digest_size=8).hexdigest()


def stamp(head):
    """The bytes of a header with its checksum in place of 16 zeros."""
    return head.replace(b"0" * 16, hashlib.blake2b(head, digest_size=8).hexdigest().encode(), 1)


def join(outer, text, data):
    """A file of a tensor table, the text of kvzip's header and the tensors' bytes."""
    outer = {"__metadata__": {"checksum": "0" * 16, "kvzip": text}} | {k: v for k, v in outer.items() if k[:2] != "__"}
    head = json.dumps(outer).encode()
    return struct.pack("<Q", len(head)) + stamp(head) + data


def rewrite(path, change):
    """Changes the kvzip header of a file, leaving its tensors alone."""
    outer, header, data = parts(path)
    change(header)
    put(path, join(outer, json.dumps(header), data))


def retouch(path, change):
    """Changes the tensors of a file, leaving the rest of its header alone; their checksums are right."""
    _, header, _ = parts(path)
    tensors = load(path.read_bytes())
    change(tensors)
    put(path, save(tensors, metadata={"kvzip": json.dumps(header)}))
    outer, _, data = parts(path)
    places = {name: entry["data_offsets"] for name, entry in outer.items() if name != "__metadata__"}
    header["checksums"] = {name: checksum(data[a:b]) for name, (a, b) in places.items()}
    put(path, join(outer, json.dumps(header), data))
