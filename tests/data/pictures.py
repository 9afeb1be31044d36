"""Pictures, tables and shards that several data tests draw for themselves."""

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def colour(number: int) -> tuple[int, int, int]:
    """A colour that says which sample a picture belongs to."""
    return (number % 256, number // 256, 200)


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """A folder of PNGs and a pairs.csv; the broken ones hold no picture."""
    folder.mkdir(exist_ok=True)
    lines = ["image,text"]
    for number in range(count):
        data = b"not a picture" if number in broken else png(number)
        (folder / f"{number:03}.png").write_bytes(data)
        lines.append(f"{number:03}.png,text {number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_files(start: int, count: int) -> dict[str, bytes]:
    """Samples with a .txt or, every other one, a .json."""
    files = {}
    for number in range(start, start + count):
        files[f"{number:04}.png"] = png(number)
        if number % 2:
            files[f"{number:04}.json"] = json.dumps({"text": f"text {number}"}).encode()
        else:
            files[f"{number:04}.txt"] = f"text {number}\n".encode()
    return files


def write_shards(folder: Path, shards: int, samples: int) -> str:
    """Shards of numbered samples; returns the pattern that names them."""
    for shard in range(shards):
        write_shard(folder / f"s-{shard:03}.tar", shard_files(shard * samples, samples))
    return str(folder / f"s-{{000..{shards - 1:03}}}.tar")


def letters(texts: list[str]) -> Tensor:
    """A tokenizer: 16 character codes, padded with zeros."""
    rows = [[ord(c) % 128 for c in text[:16].ljust(16, "\0")] for text in texts]
    return torch.tensor(rows)


def as_list(samples):
    """A collate function that changes nothing."""
    return samples
